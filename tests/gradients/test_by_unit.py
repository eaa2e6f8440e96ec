"""Clips by leaf, against float64 NumPy."""

import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jaxclip
from oracles.quick import quick_first
from oracles.units import DTYPES, exact, norm, tree_of, update

some_dtype = pytest.mark.parametrize("dtype", quick_first(DTYPES[::-1]))


@pytest.mark.thorough
@some_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_each_leaf_is_scaled_to_its_bound_or_left_alone(dtype, scale):
    grads = tree_of(dtype, scale)
    clipped, state = update(jaxclip.clip_by_leaf_norm(0.5), grads)
    above = 0
    for name, g in grads.items():
        out, before = exact(clipped[name]), norm(g)
        assert norm(out) <= 0.5
        if before <= 0.5:
            np.testing.assert_array_equal(out, exact(g))
            continue
        above += 1
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(out, exact(g) * 0.5 / before, rtol=tolerance, atol=1e-6)
    np.testing.assert_allclose(state.stats.clip_rate, above / 3)
    total = np.sqrt(sum(norm(g) ** 2 for g in grads.values()))
    np.testing.assert_allclose(state.stats.pre_norm, total, rtol=1e-5)


def test_the_reported_norm_of_a_stacked_leaf_is_right_at_the_top_of_float32():
    grads = {"layers": jnp.array([[1e38], [2e38]])}
    _, state = update(jaxclip.clip_by_leaf_norm(1.0, stacked_axes=1), grads)
    np.testing.assert_allclose(state.leaves.norms, [5**0.5 * 1e38], rtol=1e-6)


def test_layers_of_a_stacked_leaf_are_clipped_apart():
    grads = {"layers": jnp.array([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])}
    clipped, state = update(jaxclip.clip_by_leaf_norm(1.0, stacked_axes=1), grads)
    np.testing.assert_allclose(clipped["layers"], [[0.6, 0.8], [0.3, 0.4], [0.6, 0.8]], rtol=2e-6)
    np.testing.assert_allclose(state.stats.clip_rate, 2 / 3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_leaves_of_very_different_size_are_each_clipped_right(scale):
    grads = {"a": jnp.array([3.0, 4.0]), "b": scale * jnp.array([3.0, 4.0])}
    clipped, _ = update(jaxclip.clip_by_leaf_norm({"a": 0.5, "b": 0.5 * scale}), grads)
    np.testing.assert_allclose(clipped["a"], [0.3, 0.4], rtol=2e-6)
    np.testing.assert_allclose(exact(clipped["b"]) / scale, [0.3, 0.4], rtol=2e-6)


@pytest.mark.thorough
@some_dtype
def test_the_root_mean_square_of_a_leaf_is_at_most_the_threshold(dtype):
    grads = tree_of(dtype, 3.0)
    clipped, _ = update(jaxclip.clip_by_block_rms(0.25), grads)
    for name, g in grads.items():
        rms = norm(clipped[name]) / np.sqrt(g.size)
        before = norm(g) / np.sqrt(g.size)
        assert rms <= 0.25
        tolerance = max(2e-6, 4 * float(jnp.finfo(dtype).eps))  # the margin of the clip
        np.testing.assert_allclose(rms, min(before, 0.25), rtol=tolerance)


@pytest.mark.thorough
@pytest.mark.parametrize("n", [3, 12, 46])
def test_a_root_mean_square_one_rounding_above_the_threshold_is_clipped(n):
    # 2 n entries whose squares sum to n**2, and the largest float32 below their rms sqrt(n / 2).
    # Times the root of 2 n rounded to nearest it would be n, the norm itself.
    grads = jnp.ones(2 * n).at[0].set(n - 1)
    threshold = np.float32((n / 2) ** 0.5)
    while 2 * fractions.Fraction(float(threshold)) ** 2 >= n:
        threshold = np.nextafter(threshold, np.float32(0))
    clipped, state = update(jaxclip.clip_by_block_rms(float(threshold)), grads)
    total = sum(fractions.Fraction(float(x)) ** 2 for x in clipped)
    assert total <= 2 * n * fractions.Fraction(float(threshold)) ** 2
    assert float(state.stats.clip_rate) == 1


@pytest.mark.thorough
def test_the_mean_square_is_over_the_entries_of_all_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    tx, spec = jaxclip.clip_by_block_rms(1.0, axis_name="x"), PartitionSpec("x")
    grads = jnp.array([1.0, -1.0, 3.0, 3.0, -1.0, 1.0, -3.0, 3.0])  # rms sqrt(5)

    def clip(g):
        return tx.update(g, tx.init(g))[0]

    clipped = jax.jit(jax.shard_map(clip, mesh=mesh, in_specs=spec, out_specs=spec))(grads)
    np.testing.assert_allclose(clipped, grads / np.sqrt(5), rtol=2e-6)
    np.testing.assert_allclose(clipped, update(jaxclip.clip_by_block_rms(1.0), grads)[0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(jaxclip.clip_by_leaf_norm, 1.0),
        functools.partial(jaxclip.clip_by_block_rms, 1.0),
    ],
)
def test_a_bad_entry_gives_zeros_everywhere_and_names_its_leaf(make, bad):
    grads = tree_of(jnp.float32)
    grads["b"] = grads["b"].at[2].set(bad)
    clipped, state = update(make(), grads, tree_of(jnp.float32))
    assert not any(np.any(x) for x in jax.tree.leaves(clipped))
    assert int(state.stats.num_nonfinite) == 1
    assert int(state.leaves.nonfinite_leaf) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_of_zero_or_a_traced_negative_one_gives_zeros(threshold):
    grads = tree_of(jnp.float32)
    for make in (jaxclip.clip_by_leaf_norm, jaxclip.clip_by_block_rms):
        clipped, _ = update(make(jnp.float32(threshold)), grads, grads)
        assert not any(np.any(x) for x in jax.tree.leaves(clipped))


@pytest.mark.parametrize("jit", [lambda f: f, pytest.param(jax.jit, marks=pytest.mark.thorough)])
def test_the_largest_threshold_of_float32_changes_no_bit_and_warns_of_nothing(jit):
    grads = {"w": jnp.full((3, 4), 3e38)}
    for make in (jaxclip.clip_by_leaf_norm, jaxclip.clip_by_block_rms):
        tx = make(3.4e38)
        clipped, _ = jit(tx.update)(grads, tx.init(grads))
        # The norm of the twelve entries is beyond it, their root mean square is not.
        assert np.array_equal(clipped["w"], grads["w"]) == (make is jaxclip.clip_by_block_rms)


def test_a_threshold_with_an_entry_for_each_weight_is_refused_by_path():
    tx = jaxclip.clip_by_leaf_norm({"a": jnp.ones((2,)), "b": 1.0})
    grads = {"a": jnp.ones((2,)), "b": jnp.ones((3,))}
    with pytest.raises(ValueError, match="'a'"):
        tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("wrt", [0, 1])
def test_the_derivative_of_a_clip_by_units_is_that_of_its_formula(wrt):
    rng = np.random.default_rng(0)
    grads, weights = ({"w": rng.normal(size=(3, 2)), "b": rng.normal(size=4)} for _ in range(2))
    grads["w"][:, 1] *= 1e-3  # a unit within its bound
    tx = jaxclip.adaptive_grad_clip(0.1)

    def unit_norms(x):
        return jnp.sqrt(jnp.sum(x**2, axis=0, keepdims=True))

    def formula(g, w):
        return g * jnp.minimum(1, 0.1 * unit_norms(w) / unit_norms(g))

    def clipped(grads, weights):
        return tx.update(grads, tx.init(weights), weights)[0]

    def slope(clip):
        def weighted_sum(*trees):
            return sum(jnp.sum(jnp.cos(3.0 * u)) for u in jax.tree.leaves(clip(*trees)))

        trees = jax.tree.map(jnp.float32, (grads, weights))
        return jax.jit(jax.grad(weighted_sum, wrt))(*trees)

    expected = slope(lambda g, w: jax.tree.map(formula, g, w))
    for name in grads:
        np.testing.assert_allclose(slope(clipped)[name], expected[name], rtol=2e-5, atol=1e-6)
