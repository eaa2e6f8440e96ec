"""The search for a scale, in every layout that it treats in its own way, beside the optimum."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip._core.grids import LevelRange, code_range
from jaxclip.thresholds.search import candidates
from jaxclip.thresholds.search.scale import best_scale
from oracles.exact_scales import distributions, exact_optimum
from oracles.quick import quick_first

SIGNED = LevelRange(-8, 7, True)


def errors_of(x: np.ndarray, scale, low: int, high: int) -> np.ndarray:
    """Squared error of each row, in float64."""
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    safe = np.where(scale == 0, 1, scale)
    return np.sum((x - scale * np.clip(np.round(x / safe), low, high)) ** 2, axis=-1)


def exact_total(rows: np.ndarray, bits, levels: str) -> float:
    return sum(exact_optimum(row, bits, levels) for row in np.asarray(rows, np.float64))


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Gaussian columns of many sizes, some with an outlier."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1:]))
    return np.where(rng.random(shape) < 1e-3, 20 * x, x).astype(np.float32)


# Short rows; rows in two slabs, of which the last begins in the first; long ones.
@pytest.mark.thorough
@pytest.mark.parametrize("row", [32, 100, 384])
@pytest.mark.parametrize("bits", ["ternary", 2, 3, 4])
@pytest.mark.parametrize("levels", ["full", "narrow"])
def test_up_to_4_bits_the_error_is_near_the_optimum_in_every_layout_of_rows(row, bits, levels):
    low, high = code_range(bits, levels)
    for name, rows in distributions(24, row).items():
        rows = rows.astype(np.float32)
        got = best_scale(jnp.asarray(rows), (1,), np.float32(row), LevelRange(low, high, True))
        total, best = np.sum(errors_of(rows, got, low, high)), exact_total(rows, bits, levels)
        # Few entries have deep dips; of heavy tails the total is the error of a row or two.
        allowed = 1.03 if row == 32 or name == "Student-t, 1.5" else 1.005
        assert total <= best * allowed + 1e-9 * np.sum(np.square(rows, dtype=np.float64)), name


@pytest.mark.parametrize("dtype", quick_first([ml_dtypes.bfloat16, np.float16, np.float32]))
def test_low_precision_weights_have_the_scale_of_their_values(dtype):
    x = weights(16, 128).astype(dtype)
    got = best_scale(jnp.asarray(x), (1,), np.float32(128), SIGNED)
    assert got.dtype == jnp.float32
    best = exact_total(x.astype(np.float64), 4, "full")
    assert np.sum(errors_of(x.astype(np.float64), got, *SIGNED[:2])) <= 1.005 * best


@pytest.mark.thorough
def test_a_whole_tensor_is_searched_in_slabs():
    x = weights(300_001)  # several slabs, the last of which begins in the one before
    got = best_scale(jnp.asarray(x), (0,), np.float32(x.size), SIGNED)
    assert errors_of(x, got, *SIGNED[:2]) <= 1.005 * exact_optimum(x, 4, "full")


@pytest.mark.thorough
@pytest.mark.parametrize("row", [16, 160])
def test_many_rows_are_searched_in_chunks_and_each_as_if_alone(row):
    num_rows = candidates._SLAB // row + 11  # a second chunk, which begins in the first
    x = weights(num_rows, row)
    got = np.asarray(best_scale(jnp.asarray(x), (1,), np.float32(row), SIGNED))
    few = np.r_[0:20, num_rows - 20 : num_rows]
    alone = best_scale(jnp.asarray(x[few]), (1,), np.float32(row), SIGNED)
    mine, theirs = errors_of(x[few], got[few], *SIGNED[:2]), errors_of(x[few], alone, *SIGNED[:2])
    np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    assert np.sum(mine) <= 1.01 * exact_total(x[few], 4, "full")


@pytest.mark.parametrize(
    ("shape", "axes"),
    quick_first(
        [((3, 30, 7), (0, 2)), ((70, 6), (0,)), ((5, 70, 6), (1,)), ((3, 3, 8, 6), (0, 1, 2))], 2
    ),
)
def test_the_axes_of_a_block_may_lie_anywhere(shape, axes):
    x = weights(*shape)
    got = best_scale(jnp.asarray(x), axes, np.float32(1), SIGNED)
    assert got.shape == tuple(1 if a in axes else n for a, n in enumerate(shape))
    count = int(np.prod([shape[a] for a in axes]))
    got = np.asarray(best_scale(jnp.asarray(x), axes, np.float32(count), SIGNED))
    last = tuple(range(-len(axes), 0))
    rows = np.moveaxis(x, axes, last).reshape(-1, count)
    error = np.sum(errors_of(rows, got.reshape(-1, 1), *SIGNED[:2]))
    assert error <= 1.006 * exact_total(rows, 4, "full")


@pytest.mark.thorough
def test_jit_vmap_and_eager_agree():
    x = jnp.asarray(weights(4, 6, 96))
    eager = best_scale(x, (2,), np.float32(96), SIGNED)
    search = lambda x: best_scale(x, (x.ndim - 1,), np.float32(96), SIGNED)  # noqa: E731
    for other in (jax.jit(search)(x), jax.vmap(search)(x)):
        mine, theirs = errors_of(x, eager, *SIGNED[:2]), errors_of(x, other, *SIGNED[:2])
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [("x", None), ("x", "y")])
def test_sharded_weights_have_the_scales_of_the_same_weights_on_one_device(kind, spec):
    x = weights(16, 96)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        for axes in ((0,), (0, 1)):
            count = np.float32(np.prod([x.shape[a] for a in axes]))
            got = jax.jit(lambda x, a=axes, n=count: best_scale(x, a, n, SIGNED))(sharded)
            alone = best_scale(jnp.asarray(x), axes, count, SIGNED)
            rows = x.T if axes == (0,) else x.reshape(-1, int(count))
            errors = [
                np.sum(errors_of(rows, np.asarray(s).reshape(-1, 1), *SIGNED[:2]))
                for s in (got, alone)
            ]
            np.testing.assert_allclose(errors[0], errors[1], rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("row", quick_first([96, 32]))
def test_inside_shard_map_each_device_searches_its_rows(row):
    x = weights(16, row)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(
        lambda x: best_scale(x, (1,), np.float32(row), SIGNED),
        mesh=mesh,
        in_specs=PartitionSpec("x"),
        out_specs=PartitionSpec("x"),
    )
    got, alone = jax.jit(local)(x), best_scale(jnp.asarray(x), (1,), np.float32(row), SIGNED)
    mine, theirs = errors_of(x, got, *SIGNED[:2]), errors_of(x, alone, *SIGNED[:2])
    np.testing.assert_allclose(mine, theirs, rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("bits", ["ternary", 4, 8])
@pytest.mark.parametrize("row", [1, 3, 80])
def test_degenerate_rows_have_finite_scales_and_no_needless_error(bits, row):
    low, high = code_range(bits)
    constant = np.full(row, -0.3)
    outlier = np.r_[1e3, np.full(row - 1, 1e-3)]
    x = np.stack([np.zeros(row), constant, outlier, 1e-42 * constant, 1e38 * constant])
    x = x.astype(np.float32)
    got = np.asarray(best_scale(jnp.asarray(x), (1,), np.float32(row), LevelRange(low, high, True)))
    assert np.all(np.isfinite(got))
    assert got[0] == 0
    assert np.all(errors_of(x[1:2], got[1:2], low, high) <= 1e-12 * np.sum(x[1] ** 2))
    assert np.all(errors_of(x[2:3], got[2:3], low, high) <= 1.1e-6 * row)
    largest = float(x[4, 0])
    assert errors_of(x[4:] / largest, got[4:] / largest, low, high) <= 1e-12 * row


def test_a_threshold_beyond_float32_is_its_largest_number():
    x = np.float32([[-3.4e38, 3.3e38, 1e38, -2.9e38]])
    for bits in ("ternary", 4, 8):
        q = jaxclip.quantize(x, bits, threshold=jaxclip.mse_optimal)
        error = np.abs(np.asarray(q, np.float64) - x).max()
        assert error <= np.abs(np.float64(q.scale)).max() * 1.01
        assert np.asarray(q.qvalue).any()


@pytest.mark.thorough
def test_the_search_keeps_little_memory_between_its_passes():
    x = jax.ShapeDtypeStruct((1 << 18, 64), jnp.float32)
    search = jax.jit(lambda x: best_scale(x, (1,), np.float32(64), SIGNED))
    used = search.lower(x).compile().memory_analysis()
    if used is None:
        pytest.skip("this version of jax does not say")
    # XLA of jax 0.7 copies the weights; the candidates of all rows would take twice as much.
    assert used.temp_size_in_bytes <= 1.25 * 4 * x.size
