"""`mse_optimal(importance=...)` beside a brute-force optimum of the weighted error."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip._core.grids import LevelRange, code_range
from jaxclip.checkpoints import rows
from jaxclip.thresholds.search import candidates
from jaxclip.thresholds.search.scale import best_scale
from oracles.exact_scales import optimal_scale


def errors_of(x, scale, low: int, high: int, importance) -> np.ndarray:
    """Weighted squared error of each row, in float64."""
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    safe = np.where(scale == 0, 1, scale)
    codes = np.clip(np.round(x / safe), low, high)
    return np.sum(np.asarray(importance, np.float64) * (x - scale * codes) ** 2, axis=-1)


def brute_force(x: np.ndarray, v: np.ndarray, low: int, high: int) -> float:
    """Least weighted error of a row: the codes between every two breakpoints, each refitted."""
    levels = np.arange(1, max(high, -low) + 1)
    ends = np.sort(np.ravel(np.abs(x)[:, None] / (levels - 0.5)))
    ends = np.append(ends[ends > 0], 2 * ends[-1])
    middles = (ends[1:] + ends[:-1]) / 2
    best = np.sum(v * x * x)
    for scale in np.concatenate([middles, -middles]) if low < -high else middles:
        codes = np.clip(np.round(x / scale), low, high)
        norm = np.sum(v * codes * codes)
        if norm > 0:
            best = min(best, np.sum(v * (x - codes * np.sum(v * x * codes) / norm) ** 2))
    return best


def draw(num_rows: int, row: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Heavy-tailed rows and importances of many sizes, some 0."""
    rng = np.random.default_rng(seed)
    v = rng.exponential(size=(num_rows, row)) ** 2 * (rng.random((num_rows, row)) < 0.9)
    return rng.standard_t(4, (num_rows, row)).astype(np.float32), v.astype(np.float32)


@pytest.mark.thorough
@pytest.mark.parametrize(("bits", "levels"), [("ternary", "full"), (3, "full"), (4, "narrow")])
def test_the_weighted_error_is_that_of_a_brute_force_search(bits, levels):
    x, v = draw(8, 32)
    low, high = code_range(bits, levels)
    rule = jaxclip.mse_optimal(importance=v)
    q = jaxclip.quantize(x, jaxclip.Grid(bits, levels=levels, axis=0), threshold=rule)
    got = errors_of(x, q.scale, low, high, v)
    best = np.asarray(
        [brute_force(*map(np.float64, row), low, high) for row in zip(x, v, strict=True)]
    )
    assert np.all(got >= best * (1 - 1e-5))
    assert np.sum(got) <= np.sum(best) * 1.01
    exact = errors_of(x, optimal_scale(x, (1,), low, high, v), low, high, v)
    np.testing.assert_allclose(exact, best, rtol=1e-5)


# One piece, several pieces, and slabs.
@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(16, 48), (6, 700), (1, candidates._SLAB + 101)])
def test_the_search_is_near_the_optimum_in_every_layout(shape):
    x, v = draw(*shape)
    got = best_scale(
        jnp.asarray(x), (1,), shape[1], LevelRange(-8, 7, True), jnp.asarray(v / v.max())
    )
    best = optimal_scale(x, (1,), -8, 7, v)
    got, best = (np.sum(errors_of(x, s, -8, 7, v)) for s in (got, best))
    assert best * (1 - 1e-5) <= got <= 1.01 * best


@pytest.mark.thorough
def test_importance_of_each_input_broadcasts_and_follows_the_groups():
    x, _ = draw(3, 20)
    v = np.random.default_rng(1).uniform(0.1, 9, 20)
    rule = jaxclip.mse_optimal(4, axis=0, group_size=8, importance=v)
    grouped = rule.compact(jnp.asarray(x))
    for i, part in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        alone = jaxclip.mse_optimal(4, axis=0, importance=v[part])(jnp.asarray(x[:, part]))
        np.testing.assert_allclose(grouped[:, i : i + 1], alone, rtol=1e-5)
    traced = jax.jit(lambda x, v: jaxclip.mse_optimal(4, axis=0, importance=v)(x))(x, v)
    eager = jaxclip.mse_optimal(4, axis=0, importance=v)(x)
    np.testing.assert_allclose(traced, eager, rtol=1e-5)


@pytest.mark.thorough
def test_a_constant_importance_of_any_size_and_zeros_alone_change_nothing():
    x, _ = draw(4, 64)
    weighted = [jaxclip.mse_optimal(3, axis=0, importance=v)(x) for v in (1.0, 3e-30, 5e30, 0.0)]
    assert np.all(np.isfinite(weighted))
    assert np.all(np.asarray(weighted) > 0)
    for other in weighted[1:]:
        np.testing.assert_allclose(other, weighted[0], rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_at_the_top_of_float32_an_importance_chooses_the_codes_of_ordinary_magnitudes(bits):
    x, v = draw(4, 64)
    v = v / (v.max() * np.float32(1.01))
    same, top = (
        jaxclip.quantize(x, jaxclip.Grid(bits, axis=0), threshold=jaxclip.mse_optimal(importance=i))
        for i in (v, v * np.float32(2.0**127) * 2)
    )
    np.testing.assert_array_equal(top.qvalue, same.qvalue)
    np.testing.assert_array_equal(top.scale, same.scale)


def test_one_bit_has_the_weighted_mean():
    t = jaxclip.mse_optimal(1, importance=[1.0, 3.0])(jnp.array([2.0, -4.0]))
    np.testing.assert_allclose(t, [3.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("importance", "error", "message"),
    [
        ([1.0, -1.0], ValueError, r"importance must be in \[0, inf\), got -1.0 at \(1,\)"),
        ([np.nan, 1.0], ValueError, r"importance must be in \[0, inf\), got nan at \(0,\)"),
        ([np.inf], ValueError, r"importance must be in \[0, inf\), got inf at \(0,\)"),
        ("large", TypeError, "importance must be an array of numbers, got 'large'"),
    ],
)
def test_nonsense_is_refused_when_the_rule_is_made(importance, error, message):
    with pytest.raises(error, match=message):
        jaxclip.mse_optimal(4, importance=importance)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2)])
def test_importance_of_a_wrong_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"importance must broadcast to the array, \(2, 2\), got"):
        jaxclip.mse_optimal(4, importance=np.ones(shape))(jnp.ones((2, 2)))


# --- Trees ----------------------------------------------------------------------------


@pytest.mark.thorough
def test_each_leaf_of_a_compressed_tree_has_its_own_importance():
    (a, v), (b, _) = draw(6, 32, seed=2), draw(6, 32, seed=3)
    params = {"a": jnp.asarray(a), "b": jnp.asarray(b), "c": jnp.asarray(a)}
    of_inputs = v[:1]
    policy = [
        ("a", {"rule": jaxclip.mse_optimal(importance=v)}),
        ("b", {"rule": jaxclip.mse_optimal(importance=of_inputs)}),
    ]
    small = jaxclip.compress(params, jaxclip.Grid(3, axis=0), policy=policy)
    for name, importance in (("a", v), ("b", of_inputs), ("c", np.ones((1, 1)))):
        x, q = np.asarray(params[name]), small[name]
        importance = np.broadcast_to(importance, x.shape)
        got = np.sum(importance * (np.asarray(jaxclip.dequantize(q), np.float64) - x) ** 2)
        best = sum(
            brute_force(*map(np.float64, row), *code_range(3))
            for row in zip(x, importance, strict=True)
        )
        assert best * (1 - 1e-5) <= got <= 1.01 * best


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("split", [("x", "y"), (None, "y")], ids=["as weights", "by inputs"])
def test_sharded_weights_and_importances_give_the_codes_of_one_device(split, kind):
    x, v = draw(16, 64, seed=4)
    v = v if split[0] else v[:1]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))

    def small(x, v, axis):
        rule = jaxclip.mse_optimal(importance=v)
        return jaxclip.compress({"kernel": x}, jaxclip.Grid(4, axis=axis), rule=rule)["kernel"]

    for axis in (0, None):
        expected = small(x, v, axis)
        with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
            many = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", "y")))
            factors = jax.device_put(v, NamedSharding(mesh, PartitionSpec(*split)))
            program = jax.jit(functools.partial(small, axis=axis)).lower(many, factors).compile()
            got = program(many, factors)
        np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-5)
        assert np.mean(np.asarray(got.qvalue) != np.asarray(expected.qvalue)) < 0.01
        moved = set(re.findall(r"all-\w+|collective-\w+|reduce-scatter", program.as_text()))
        if kind == AxisType.Explicit:  # where jax chooses, it may swap blocks between devices
            assert moved == {"all-reduce"}


@pytest.mark.thorough
@pytest.mark.parametrize("of", ["entries", "rows", "inputs"])
def test_a_leaf_compressed_some_rows_at_a_time_keeps_each_importance_to_its_row(
    of, monkeypatch, tmp_path
):
    x, v = draw(7, 16, seed=5)
    v = {"entries": v, "rows": v[:, :1] + 1, "inputs": v[0]}[of]
    source, target = tmp_path / "net.npz", tmp_path / "small.safetensors"
    np.savez(source, kernel=x)
    rule = jaxclip.mse_optimal(importance=v)
    monkeypatch.setattr(rows, "_PART_BYTES", 3 * x[:1].nbytes)
    jaxclip.checkpoints.compress_checkpoint(source, target, jaxclip.Grid(3, axis=0), rule=rule)
    got = jaxclip.checkpoints.load(target)["kernel"]
    expected = jaxclip.quantize(x, jaxclip.Grid(3, axis=0), threshold=rule)
    assert np.array_equal(got.qvalue, expected.qvalue)
    np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-6)


@pytest.mark.thorough
def test_an_importance_that_fits_one_leaf_alone_is_refused_with_the_other():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    with pytest.raises(
        ValueError, match=r"importance must broadcast to params at 'b', \(3, 2\), got"
    ):
        jaxclip.compress(params, 4, rule=jaxclip.mse_optimal(importance=np.ones((2, 3))))


@pytest.mark.thorough
def test_with_a_zero_point_an_importance_is_refused():
    rule = jaxclip.mse_optimal(importance=np.ones(3))
    with pytest.raises(ValueError, match="importance must be None for a grid with a zero point"):
        jaxclip.quantize(jnp.ones(3), jaxclip.Grid(4, zero_point=True), threshold=rule)
