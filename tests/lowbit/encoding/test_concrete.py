"""Tests of `lowbit.encoding`: two programs for all shapes, with the results of the traced path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip import Grid
from jaxclip.lowbit.distortion import quantization_error
from jaxclip.lowbit.encoding import programs as encoding_programs
from jaxclip.lowbit.quantizer import quantize_on_host
from oracles import compilations

GRIDS = [
    Grid(4, axis=-1),
    Grid(4, axis=0, group_size=64),
    Grid(3, axis=-1, group_size=48, levels="narrow"),
    Grid(2, axis=None, scale_dtype="float16"),
    Grid("ternary", axis=0, group_size=200, scale_dtype="log8"),
    Grid(1, axis=-1, group_size=7),
    Grid(8, axis=-1),
    Grid(4, axis=-1, group_size=64, zero_point=True),
]
quick_first = [
    pytest.param(grid, marks=[] if i < 2 else pytest.mark.thorough) for i, grid in enumerate(GRIDS)
]


def weights(shape, dtype=np.float32, seed=0):
    return (0.02 * np.random.default_rng(seed).standard_t(5, shape)).astype(dtype)


def on_host(w, grid, rule=jaxclip.mse_optimal):
    return quantize_on_host(w, grid, threshold=rule(), name="w")


@pytest.mark.parametrize("grid", quick_first, ids=repr)
@pytest.mark.parametrize("rule", [jaxclip.mse_optimal, jaxclip.max_abs])
def test_the_result_is_that_of_the_traced_path(grid, rule):
    w = weights((200, 96))
    small, error = on_host(w, grid, rule)
    traced = jax.jit(lambda w: jaxclip.quantize(w, grid, threshold=rule))(w)
    assert jax.tree.structure(traced) == jax.tree.structure(jax.tree.map(jnp.asarray, small))
    for name in ("qvalue", "scale", "zero"):
        a, b = (getattr(q, name) for q in (small, traced))
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    # Sums in another order may decide between candidates of nearly equal error.
    other = quantization_error(w, traced)
    assert error.squared_error == pytest.approx(other.squared_error, rel=1e-4)
    is_same = np.asarray(traced.scale) == small.scale
    if small.zero is not None:
        is_same &= np.asarray(traced.zero) == small.zero
    is_same = np.broadcast_to(small.grid.expand_with(np, is_same, w.shape), w.shape)
    np.testing.assert_array_equal(small.qvalue[is_same], np.asarray(traced.qvalue)[is_same])
    assert is_same.any()


@pytest.mark.parametrize("grid", quick_first, ids=repr)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("factor", [1.0, 1e30], ids=["ordinary", "large"])
def test_the_error_is_that_of_float64(grid, dtype, factor):
    w = weights((130, 70)) * np.float32(factor if dtype != np.float16 else 1.0)
    w = w.astype(dtype)
    small, error = on_host(w, grid)
    expected = quantization_error(w, small)
    assert error.squared_error == pytest.approx(expected.squared_error, rel=1e-5)
    assert error.squared_norm == pytest.approx(expected.squared_norm, rel=1e-5)
    assert error.num_clipped == expected.num_clipped


def test_few_programs_serve_leaves_of_every_shape():
    encoding_programs.compiled.cache_clear()
    rng = np.random.default_rng(0)
    shapes = [tuple(rng.integers(2, 90, 2)) for _ in range(30)] + [(300, 20), (20, 300)]
    params = {str(i): {"kernel": weights(shape)} for i, shape in enumerate(shapes)}
    with compilations.counted() as programs:
        jaxclip.compress(params, 4)
    # One searches for scales, one rounds to codes.
    assert len(programs) == 2
    with compilations.counted() as programs:
        for bits in (2, "ternary", 8):
            jaxclip.compress(params, bits, rule=jaxclip.max_abs)
    assert not programs


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("grid", [Grid(4, axis=-1), Grid(4, axis=0, group_size=64)], ids=repr)
def test_an_entry_that_is_not_finite_is_named(bad, grid):
    w = weights((100, 70))
    w[3, 69] = bad
    with pytest.raises(ValueError, match=rf"w must be finite .* got -?{abs(bad)} at \(3, 69\)"):
        on_host(w, grid)


def test_a_float64_beyond_float32_is_named():
    with pytest.raises(ValueError, match=r"must be finite .* at \(1, 0\)"):
        on_host(np.array([[1.0, 2.0], [1e300, 1.0]]), Grid(4, axis=-1))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_arrays_in_any_order_of_memory_have_the_same_codes(order):
    w = weights((20, 30, 16))
    other = np.ascontiguousarray(w.transpose(order)).transpose(np.argsort(order))
    for grid in (Grid(4, axis=(0, 2)), Grid(4, axis=1, group_size=32), Grid(4, axis=2)):
        for a, b in zip(*(jax.tree.leaves(on_host(x, grid)[0]) for x in (w, other)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.thorough
def test_rows_longer_than_a_part_are_searched_whole():
    w = weights((2, 300_000))
    small, error = on_host(w, Grid(4, axis=0))
    traced = jax.jit(lambda w: jaxclip.quantize(w, Grid(4, axis=0)))(w)
    np.testing.assert_allclose(small.scale, traced.scale, rtol=1e-4)
    assert error.squared_error == pytest.approx(
        quantization_error(w, traced).squared_error, rel=1e-4
    )
