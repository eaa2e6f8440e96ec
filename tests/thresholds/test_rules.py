"""The rules that choose a threshold, against exact optima."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip._core.grids import code_range
from jaxclip.thresholds.by_error import least_squares, mse_optimal
from jaxclip.thresholds.by_magnitude import max_abs, percentile_abs, std_multiple
from jaxclip.thresholds.by_rate import rate_optimal
from oracles.compilations import counted
from oracles.exact_scales import distributions, exact_optimum
from oracles.quick import quick_first

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


# --- max_abs ---------------------------------------------------------------------------


@every_dtype
@given(data=st.data())
def test_max_abs_is_the_largest_magnitude_of_each_row(dtype, data):
    unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = data.draw(hnp.arrays(unsigned, (3, 5))).view(dtype).astype(np.float64)
    x = np.nan_to_num(x, posinf=1, neginf=-1).astype(dtype)
    got = np.asarray(max_abs(axis=0)(jnp.asarray(x)))
    expected = np.abs(x.astype(np.float64)).max(axis=1, keepdims=True)
    expected = np.where(expected < 2.0**-126, 0, expected)  # flushed on CPU
    assert got.dtype == np.float32
    assert np.array_equal(np.where(got < 2.0**-126, 0, got), expected)


# --- percentile_abs and std_multiple ---------------------------------------------------


def percentile_by_sorting(x, q):
    """The least magnitude of each row that q percent of its entries do not exceed."""
    size = np.sort(np.abs(x), axis=1)
    return size[:, [int(np.ceil(x.shape[1] * q / 100)) - 1]]


@every_dtype
@pytest.mark.parametrize("q", [0.01, 7, 50, 99.5, 100])
def test_percentile_abs_is_the_magnitude_that_sorting_finds(dtype, q):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 100)) * np.exp2(rng.integers(-8, 8, (4, 1)))).astype(dtype)
    x[0, :60] = 0
    x[1] = np.round(x[1].astype(np.float64)).astype(dtype)  # many equal magnitudes
    got = percentile_abs(q, axis=0)(jnp.asarray(x))
    assert np.array_equal(got, percentile_by_sorting(x.astype(np.float32), q))
    ours = np.asarray(percentile_abs(q)(jnp.asarray(x))).item()
    if q in (50, 100):  # where NumPy's product of share and count is exact
        assert ours == np.quantile(np.abs(x.astype(np.float32)), q / 100, method="inverted_cdf")


def test_percentile_abs_reaches_from_subnormal_to_the_largest_float32():
    x = np.asarray([[1e-37, 1e-3, 1.0, 3e38], [0, 0, 0, -2e-38]], np.float32)
    for q in (25, 50, 75, 100):
        assert np.array_equal(
            percentile_abs(q, axis=0)(jnp.asarray(x)), percentile_by_sorting(x, q)
        )


@pytest.mark.parametrize("power", [-100, 0, 120])
def test_std_multiple_is_k_times_the_root_mean_square_at_every_size(power):
    x = np.ldexp(np.random.default_rng(1).normal(1, 1, (3, 50)), power).astype(np.float32)
    got = std_multiple(2.5, axis=0)(jnp.asarray(x))
    expected = 2.5 * np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1, keepdims=True))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.thorough
def test_padding_of_the_last_group_counts_for_no_percentile_and_no_mean():
    x = np.random.default_rng(2).normal(size=(3, 11)).astype(np.float32)
    tail = jnp.asarray(x[:, 8:])
    for make in (functools.partial(percentile_abs, 40), functools.partial(std_multiple, 2.0)):
        grouped = np.asarray(make(axis=0, group_size=8)(jnp.asarray(x)))
        np.testing.assert_allclose(grouped[:, 8:9], make(axis=0)(tail), rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "rule", [percentile_abs(90), percentile_abs(90, axis=1), std_multiple(3.0)]
)
def test_percentiles_and_multiples_of_sharded_weights_are_those_of_one_device(kind, rule):
    x = np.random.default_rng(3).normal(size=(16, 6)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", "y")))
        got = jax.jit(rule)(sharded)
    np.testing.assert_allclose(np.asarray(got), rule(jnp.asarray(x)), rtol=1e-6)


@pytest.mark.thorough
def test_percentiles_clip_weights_and_compress_trees():
    params = {"kernel": jnp.asarray(np.arange(-10, 10, dtype=np.float32).reshape(5, 4))}
    clipped = jaxclip.clip_weights(params, percentile_abs(50))
    assert float(jnp.max(jnp.abs(clipped["kernel"]))) == 5
    small = jaxclip.compress(params, jaxclip.Grid(8, axis=None), rule=percentile_abs(50))
    np.testing.assert_allclose(small["kernel"].scale * 127, [[5]], rtol=1e-6)


@pytest.mark.parametrize("q", [0, -1, 100.5, float("nan")])
def test_a_percentile_outside_its_range_is_refused_when_made(q):
    with pytest.raises(ValueError, match="q must be"):
        percentile_abs(q)


@pytest.mark.parametrize("k", [0, -1.0, float("inf"), float("nan")])
def test_a_multiple_that_is_not_positive_and_finite_is_refused_when_made(k):
    with pytest.raises(ValueError, match="k must be positive and finite"):
        std_multiple(k)


# --- mse_optimal -----------------------------------------------------------------------

ALL_BITS = [1, "ternary", 2, 3, 4, 5, 6, 8]
GRIDS = [(b, "full") for b in ALL_BITS] + [(b, "narrow") for b in (2, 3, 4, 5, 6, 8)]
GRIDS += [(b, "balanced") for b in (1, 2, 3, 4)]
QUICK = [(1, "full"), ("ternary", "full"), (4, "full"), (3, "narrow")]
FEW_BITS = (1, "ternary", 2, 3, 4)
NUM_ROWS, ROW = 16, 64


def brute_force_optimum(x, bits, levels):
    """Least squared error over a dense grid of scales: an upper bound of the optimum."""
    low, high = code_range(bits, levels)
    scales = np.abs(x).max() * np.linspace(0.01, 1.2, 40001)[:, None]
    errors = [
        np.sum((x - s * np.clip(np.round(x / s), low, high)) ** 2, axis=1).min()
        for s in (scales, -scales)
    ]
    return min(errors)


NAMES = list(distributions(NUM_ROWS, ROW))


@functools.cache
def measured(bits, levels: str, seed: int = 7) -> dict[str, np.ndarray]:
    """Errors of `quantize` and of the exact optimum, for all distributions in one call."""
    rows = np.concatenate(list(distributions(NUM_ROWS, ROW, seed).values())).astype(np.float32)
    errors = {}
    for name, rule in {"mse": mse_optimal, "max": max_abs}.items():
        q = jaxclip.quantize(
            jnp.asarray(rows),
            jaxclip.Grid(bits, levels=levels, axis=0),
            threshold=rule,
        )
        decoded = np.asarray(q.scale, np.float64) * np.asarray(q.qvalue, np.float64)
        errors[name] = np.sum((rows.astype(np.float64) - decoded) ** 2, axis=1)
    errors["best"] = np.asarray([exact_optimum(r, bits, levels) for r in rows])
    errors["energy"] = np.sum(rows.astype(np.float64) ** 2, axis=1)
    return {k: v.reshape(len(NAMES), NUM_ROWS) for k, v in errors.items()}


@pytest.mark.parametrize(
    ("bits", "levels"), [("ternary", "full"), (2, "full"), (3, "narrow"), (4, "full")]
)
def test_the_oracle_is_never_above_a_dense_search_and_within_a_hair_of_it(bits, levels):
    rng = np.random.default_rng(8)
    for x in (rng.normal(size=12), rng.uniform(-1, 1, 12), np.abs(rng.normal(size=12))):
        best, dense = exact_optimum(x, bits, levels), brute_force_optimum(x, bits, levels)
        assert best <= dense * (1 + 1e-9)
        assert dense <= best * 1.001


def worst_ratios(bits, levels) -> dict[str, float]:
    """Total error of a distribution's rows over their optimum: the worst of some seeds."""
    seeds = (7, 1, 2, 3) if bits in FEW_BITS else (7,)
    runs = [measured(bits, levels, seed) for seed in seeds]
    ratios = [run["mse"].sum(axis=1) / run["best"].sum(axis=1) for run in runs]
    return dict(zip(NAMES, np.max(ratios, axis=0).tolist(), strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize(("bits", "levels"), GRIDS)
def test_the_total_error_is_as_near_the_optimum_as_the_docstring_says(bits, levels):
    allowed = 0.005 if bits in FEW_BITS else 0.06 if bits == 8 else 0.03
    assert worst_ratios(bits, levels) == {n: pytest.approx(1, abs=allowed) for n in NAMES}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("bits", "levels"), quick_first(sorted(GRIDS, key=lambda g: g not in QUICK), len(QUICK))
)
def test_the_error_is_never_below_the_exact_optimum_nor_above_that_of_max_abs(bits, levels):
    errors = measured(bits, levels)
    slack = 1e-10 * errors["energy"]
    assert np.all(errors["mse"] >= errors["best"] - slack)
    if bits != 1:
        assert np.all(errors["mse"] <= errors["max"] + slack)
    assert np.all(errors["mse"] <= errors["max"] * (1 + 1e-6) + slack)


@pytest.mark.thorough
@given(data=st.data())
def test_mse_optimal_is_never_worse_than_max_abs(data):
    bits, levels = data.draw(
        st.sampled_from([("ternary", "full"), (2, "full"), (4, "full"), (8, "narrow")])
    )
    exponents = data.draw(hnp.arrays(np.int8, 16, elements=st.integers(-20, 20)))
    x = np.ldexp(data.draw(hnp.arrays(np.int8, 16)).astype(np.float32), exponents)[None]
    errors = []
    for rule in (mse_optimal, max_abs):
        q = jaxclip.quantize(
            jnp.asarray(x),
            jaxclip.Grid(bits, levels=levels, axis=None),
            threshold=rule,
        )
        decoded = np.asarray(q.scale, np.float64) * np.asarray(q.qvalue, np.float64)
        errors.append(np.sum((x - decoded) ** 2))
    assert errors[0] <= errors[1] * (1 + 1e-6) + 1e-10 * np.sum(np.square(x, dtype=np.float64))


@pytest.mark.parametrize("bits", [1, "ternary", 2, 8])
def test_rows_that_lie_on_a_grid_are_stored_to_rounding(bits):
    low, high = code_range(bits)
    codes = np.asarray([low, high, 1, -1, high], np.float64)
    for scale in (0.37, -0.37):
        x = (scale * codes).astype(np.float32)
        q = jaxclip.quantize(jnp.asarray(x), bits)
        np.testing.assert_allclose(jaxclip.dequantize(q), x, rtol=1e-5)


def test_one_bit_takes_the_mean_magnitude_of_each_group_without_its_padding():
    x = np.random.default_rng(9).normal(size=(3, 7)).astype(np.float32)
    got = np.asarray(mse_optimal(1, axis=0, group_size=4)(jnp.asarray(x)))
    for row in range(3):
        np.testing.assert_allclose(got[row, :4], np.abs(x[row, :4]).mean(), rtol=1e-6)
        np.testing.assert_allclose(got[row, 4:], np.abs(x[row, 4:]).mean(), rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("bits", ["ternary", 4])
def test_padding_of_the_last_group_changes_nothing(bits):
    x = np.random.default_rng(10).normal(size=(1, 11)).astype(np.float32)
    grouped = np.asarray(mse_optimal(bits, axis=0, group_size=8)(jnp.asarray(x)))
    alone = np.asarray(mse_optimal(bits)(jnp.asarray(x[:, 8:])))
    ratio = {}
    for name, t in (("grouped", grouped[0, 8]), ("alone", alone.item())):
        q = jaxclip.quantize(jnp.asarray(x[:, 8:]), bits, threshold=float(t))
        ratio[name] = np.sum((x[:, 8:] - np.asarray(jaxclip.dequantize(q))) ** 2)
    assert ratio["grouped"] <= 1.01 * exact_optimum(x[0, 8:], bits, "full") + 1e-12
    assert ratio["alone"] <= 1.01 * exact_optimum(x[0, 8:], bits, "full") + 1e-12


@every_dtype
@pytest.mark.parametrize("power", [-100, -60, 0, 60, 120])
def test_thresholds_scale_with_the_weights(dtype, power):
    if power in (-100, -60, 60, 120) and dtype == np.float16:
        power = int(np.sign(power) * 8)
    x = np.random.default_rng(11).normal(size=(2, 32)).astype(dtype)
    scaled = (x.astype(np.float64) * 2.0**power).astype(dtype)
    assert np.array_equal(scaled.astype(np.float64), x.astype(np.float64) * 2.0**power)
    rule = mse_optimal(4, axis=0)
    one, other = np.asarray(rule(jnp.asarray(x))), np.asarray(rule(jnp.asarray(scaled)))
    np.testing.assert_allclose(other.astype(np.float64), one * 2.0**power, rtol=1e-5)


@pytest.mark.thorough
def test_rules_give_float32_that_broadcasts_and_the_same_under_jit_and_vmap():
    x = np.random.default_rng(12).normal(size=(3, 4, 10)).astype(np.float16)
    for rule in (
        max_abs(axis=1),
        mse_optimal(3, axis=(0, 1)),
        mse_optimal(4, axis=1, group_size=4),
    ):
        eager = rule(jnp.asarray(x))
        assert eager.dtype == jnp.float32
        assert np.broadcast_shapes(eager.shape, x.shape) == x.shape
        np.testing.assert_allclose(jax.jit(rule)(jnp.asarray(x)), eager, rtol=1e-5)
    rows = mse_optimal(3, axis=(0, 1))(jnp.asarray(x))
    mapped = jax.vmap(mse_optimal(3, axis=0))(jnp.asarray(x))
    np.testing.assert_allclose(mapped, rows, rtol=1e-5)


def test_a_rule_without_bits_asks_for_them():
    with pytest.raises(ValueError, match="mse_optimal needs bits"):
        mse_optimal()(jnp.ones(3))


@pytest.mark.parametrize("bits", [0, 9, 2.5, True, "2"], ids=repr)
def test_a_rule_with_unknown_bits_is_refused_when_made(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        mse_optimal(bits)


@pytest.mark.thorough
def test_zero_and_empty_blocks_have_finite_thresholds():
    few = (percentile_abs(50, axis=0), std_multiple(2.0, axis=0))
    for rule in (max_abs(axis=0), mse_optimal(1, axis=0), mse_optimal(4, axis=0), *few):
        assert np.array_equal(rule(jnp.zeros((2, 3))), np.zeros((2, 1)))
        assert rule(jnp.zeros((0, 3))).shape == (0, 1)
        assert np.all(np.isfinite(rule(jnp.zeros((2, 0)))))


@pytest.mark.thorough
@pytest.mark.parametrize("size", [64, 5000])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "rule",
    [
        functools.partial(max_abs),
        functools.partial(percentile_abs, 99.0),
        functools.partial(std_multiple, 3.0),
        *(functools.partial(mse_optimal, bits) for bits in (1, "ternary", 4, 8)),
        *(functools.partial(least_squares, bits) for bits in (1, "ternary", 8)),
    ],
    ids=lambda rule: f"{rule.func.__name__}{rule.args}",
)
def test_a_bad_weight_never_clips_the_others_away(rule, bad, size):
    w = np.random.default_rng(0).normal(size=(2, size)).astype(np.float32)
    w[0, 3] = bad
    for function in (rule(axis=0), jax.jit(rule(axis=0))):
        t = np.asarray(function(jnp.asarray(w)))[:, 0]
        assert not t[0] < 1  # of ordinary size, too large to clip, or NaN, which does not
        assert 0.5 < t[1] < 4


@pytest.mark.parametrize("rule", [max_abs(), std_multiple(3.0), mse_optimal(1), mse_optimal(4)])
def test_a_nan_in_one_leaf_never_clips_another_leaf_of_its_tree_away(rule):
    tree = {"bad": jnp.array([1.0, jnp.nan, 2.0]), "good": jnp.array([3.0, 4.0])}
    for clip in (jaxclip.clip_weights, jax.jit(jaxclip.clip_weights, static_argnums=1)):
        clipped = clip(tree, jaxclip.thresholds.per_tree(rule))
        np.testing.assert_array_equal(clipped["good"], [3.0, 4.0])
        np.testing.assert_array_equal(clipped["bad"], [1.0, np.nan, 2.0])


# --- Complex arrays ---------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rules_for_magnitudes_go_by_the_modulus_of_complex_entries(wrap):
    rng = np.random.default_rng(8)
    z = (rng.normal(size=(24, 4)) + 1j * rng.normal(size=(24, 4))).astype(np.complex64)
    size = np.abs(z.astype(np.complex128))
    exact = {
        max_abs(axis=1): size.max(0, keepdims=True),
        percentile_abs(75): np.quantile(size, 0.75, method="inverted_cdf"),
        std_multiple(2.0, axis=1): 2 * np.sqrt((size**2).mean(0, keepdims=True)),
        jaxclip.thresholds.per_tree(std_multiple(2.0)): 2 * np.sqrt((size**2).mean()),
        jaxclip.fan_in(1.0): np.sqrt(2 / 24),
    }
    for rule, expected in exact.items():
        np.testing.assert_allclose(wrap(rule)(jnp.asarray(z)), expected, rtol=1e-6)


ON_A_GRID = {
    "mse_optimal": mse_optimal(4),
    "one bit": mse_optimal(1),
    "importance": mse_optimal(4, importance=1.0),
    "least_squares": least_squares(4),
    "rate_optimal": rate_optimal(3.0),
    "per_tree": jaxclip.thresholds.per_tree(mse_optimal(4)),
}
sgd = optax.sgd(0.1)


def one_step_in_a_box(params, rule):
    step = jaxclip.make_train_step(lambda p, _: jnp.abs(p["a"]["c"][0]), sgd, weight_threshold=rule)
    return step(jaxclip.TrainState.create(params, sgd), None)


def updated_by(tx, params):
    return tx.update(params, tx.init(params), params)


USES = {
    "clip_weights": jaxclip.clip_weights,
    "jit": lambda params, rule: jax.jit(lambda p: jaxclip.clip_weights(p, rule))(params),
    "project_weights": lambda p, rule: updated_by(jaxclip.project_weights(jaxclip.box(rule)), p),
    "make_train_step": one_step_in_a_box,
    "resolve_threshold": lambda params, rule: jaxclip.thresholds.resolve_threshold(rule, params),
    "clip_by_value": lambda p, rule: updated_by(jaxclip.clip_by_value(rule), p),
}


@pytest.mark.parametrize("name", ON_A_GRID)
def test_rules_for_grids_refuse_complex_arrays(name):
    rule, z = ON_A_GRID[name], jnp.asarray([3j, 4j], jnp.complex64)
    for use in (rule, jax.jit(rule)):
        with pytest.raises(TypeError, match=r"complex numbers, but the array is complex"):
            use(z)
    with pytest.raises(TypeError, match=r"complex numbers, but 'a/c' is complex"):
        jaxclip.clip_weights({"a": {"c": z}, "w": jnp.ones(3)}, rule)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_wherever_a_rule_for_a_grid_meets_a_complex_leaf_its_path_is_named(use):
    params = {"a": {"c": jnp.asarray([3j, 4j], jnp.complex64)}, "w": jnp.ones(3)}
    for rule in (mse_optimal(4), least_squares(4)):
        with pytest.raises(TypeError, match=r"complex numbers, but 'a/c' is complex"):
            use(params, rule)


@pytest.mark.thorough
def test_a_mask_or_a_prefix_keeps_rules_for_grids_off_complex_leaves():
    c = jnp.asarray([3j, 4j], jnp.complex64)
    params, mask = {"c": c, "w": jnp.asarray([0.5, -1.0])}, {"c": False, "w": True}
    for rule in (least_squares(4), jaxclip.thresholds.per_tree(mse_optimal(1))):
        expected = jaxclip.clip_weights(params["w"], rule)
        clipped = jaxclip.clip_weights(params, rule, mask)
        assert np.array_equal(clipped["c"], c)
        assert np.array_equal(clipped["w"], expected)
        clipped = jaxclip.clip_weights(params, {"c": std_multiple(1.0), "w": rule})
        assert np.array_equal(clipped["w"], expected)


# --- Values ----------------------------------------------------------------------------

RULES = {
    "max_abs": lambda: max_abs(axis=0),
    "percentile_abs": lambda: percentile_abs(99),
    "percentile_abs of groups": lambda: percentile_abs(90.0, group_size=4),
    "std_multiple": lambda: std_multiple(2.5),
    "mse_optimal": lambda: mse_optimal(4),
    "fan_in": lambda: jaxclip.fan_in(0.5),
    "per_tree": lambda: jaxclip.thresholds.per_tree(percentile_abs(99)),
}


@pytest.mark.parametrize("name", RULES)
def test_an_equal_rule_is_equal_has_its_hash_and_compiles_nothing(name):
    tree = {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)}
    first, again = RULES[name](), RULES[name]()
    assert first == again
    assert hash(first) == hash(again)
    jaxclip.compress(tree, 4, rule=first)
    with counted() as compiled:
        jaxclip.compress(tree, 4, rule=again)
    assert not compiled


def test_rules_with_arrays_are_values_too():
    rows = np.float32([1, 2])
    first, again = (mse_optimal(4, importance=jnp.asarray(rows)) for _ in range(2))
    assert first == again
    assert hash(first) == hash(again)
    assert first != mse_optimal(4, importance=jnp.asarray(2 * rows))
    assert first != mse_optimal(4)
    assert jaxclip.fan_in(jnp.float32(0.5)) == jaxclip.fan_in(jnp.float32(0.5))
    assert len({jaxclip.fan_in(jnp.float32(k)) for k in (0.5, 0.5, 1.0)}) == 2
    # As a static argument, a rule of other importances is another rule.
    threshold = jax.jit(lambda x, rule: rule(x), static_argnums=1)
    x = jnp.array([[0.9, 0.3, -0.8, 0.2], [0.1, -0.7, 0.4, 0.5]])
    for weights in ([1.0, 0, 0, 0], [0.0, 0, 1, 0]):
        rule = mse_optimal(2, importance=jnp.array(weights))
        np.testing.assert_array_equal(threshold(x, rule), rule(x))
