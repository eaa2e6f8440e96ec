"""Thresholds as given, directed rounding, and the rules against exact optima."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from exact_scales import distributions, exact_optimum
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxclip
from jaxclip.grids import code_range
from jaxclip.thresholds import (
    check_threshold_tree,
    fan_in,
    max_abs,
    mse_optimal,
    resolve_threshold,
    round_toward_zero,
)

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
jitted_round = jax.jit(round_toward_zero, static_argnums=1)


# --- Directed rounding -----------------------------------------------------------------


def truncated(value, dtype) -> np.ndarray:
    """Exact rounding towards zero in NumPy; beyond the dtype, its largest number."""
    value = np.asarray(value).astype(np.float64)
    largest = float(ml_dtypes.finfo(dtype).max)
    near = np.clip(value, -largest, largest).astype(dtype)
    grew = np.abs(near.astype(np.float64)) > np.abs(value)
    near = np.where(grew, np.nextafter(near, np.zeros((), dtype)), near)
    return np.where(np.isinf(value), value, near.astype(np.float64))


def float32_of_all_sizes(size=16):
    finite = hnp.arrays(np.uint32, size).map(lambda b: b.view(np.float32))
    return finite.map(lambda x: np.where(np.isnan(x), np.float32(0.1), x).astype(np.float32))


def assert_equal_up_to_flushed_subnormals(got, expected, dtype):
    got = np.asarray(got).astype(np.float64)
    flushed = (got == 0) & (np.abs(expected) < 2.0**-126)
    assert np.array_equal(np.where(flushed, 0, got), np.where(flushed, 0, expected))


@every_dtype
@given(x=float32_of_all_sizes())
def test_traced_rounding_towards_zero_equals_numpy_and_eager_equals_jit(dtype, x):
    expected = truncated(x, dtype)
    for rounding in (round_toward_zero, jitted_round):
        got = rounding(jnp.asarray(x), np.dtype(dtype))
        assert got.dtype == dtype
        assert_equal_up_to_flushed_subnormals(got, expected, dtype)


@every_dtype
@given(x=st.floats(allow_nan=False))
def test_a_python_number_is_rounded_towards_zero_and_beyond_the_dtype_is_inf(dtype, x):
    got = round_toward_zero(x, dtype)
    assert isinstance(got, np.ndarray)
    assert got.dtype == dtype
    if abs(x) > float(ml_dtypes.finfo(dtype).max):
        assert float(got) == np.copysign(np.inf, x)
    else:
        assert float(got) == truncated(x, dtype)


@every_dtype
def test_jit_does_not_keep_excess_precision_when_rounding(dtype):
    # 0.1, 0.3 and their like lie between two numbers of the dtype; a rounding by cast and
    # comparison is simplified away when both ends up in one fusion.
    x = (np.random.default_rng(0).uniform(-3, 3, 4096)).astype(np.float32)

    @jax.jit
    def fused(x):
        return round_toward_zero(x * 1.0, dtype).astype(jnp.float32) * 2.0

    assert np.array_equal(np.asarray(fused(jnp.asarray(x)), np.float64), 2 * truncated(x, dtype))


def test_float16_subnormal_results_are_rounded_towards_zero():
    unit = 2.0**-24
    x = np.asarray([0.999, 1.0, 1.5, 1.999, 2.0, 1023.5, -0.5, -1.9, -3.01]) * unit
    expected = np.asarray([0, 1, 1, 1, 2, 1023, 0, -1, -3]) * unit
    for got in (
        round_toward_zero(jnp.asarray(x, jnp.float32), jnp.float16),
        jitted_round(jnp.asarray(x, jnp.float32), np.dtype(np.float16)),
        round_toward_zero(x, jnp.float16),
    ):
        assert np.array_equal(np.asarray(got, np.float64), expected)


@every_dtype
def test_infinities_and_nan_stay(dtype):
    x = np.asarray([np.inf, -np.inf, np.nan], np.float32)
    for got in (round_toward_zero(x, dtype), jitted_round(jnp.asarray(x), np.dtype(dtype))):
        assert np.array_equal(np.asarray(got, np.float64), x, equal_nan=True)


def test_beyond_the_dtype_numpy_numbers_become_inf_and_jax_entries_the_largest_number():
    got = np.asarray(round_toward_zero(np.asarray([1e6, -7e4]), jnp.float16), np.float64)
    assert np.array_equal(got, [np.inf, -np.inf])
    for rounding in (round_toward_zero, jitted_round):
        got = np.asarray(rounding(jnp.asarray([1e6, -7e4]), np.dtype(np.float16)), np.float64)
        assert np.array_equal(got, [65504, -65504])


@pytest.mark.parametrize(
    ("source", "target"), [(np.float16, ml_dtypes.bfloat16), (ml_dtypes.bfloat16, np.float16)]
)
@given(bits=hnp.arrays(np.uint16, 16))
def test_rounding_between_the_two_16_bit_dtypes_never_grows(source, target, bits):
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = np.nan_to_num(bits.view(source).astype(np.float64), posinf=1, neginf=-1).astype(source)
    got = np.asarray(jitted_round(jnp.asarray(x), np.dtype(target)), np.float64)
    assert np.all(np.abs(got) <= np.abs(x.astype(np.float64)))


@every_dtype
@given(x=hnp.arrays(np.float64, 8, elements=st.floats(-1e30, 1e30)))
@example(x=np.full(8, 0.5 - 2.0**-40))  # float32 rounds it up to 0.5, before any other dtype
def test_a_float64_jax_array_is_rounded_towards_zero(dtype, x):
    with enable_x64(True):
        got = np.asarray(jitted_round(jnp.asarray(x), np.dtype(dtype)), np.float64)
    assert np.all(np.abs(got) <= np.abs(x))


def test_the_derivative_of_the_rounding_is_that_of_a_cast():
    grad = jax.grad(lambda t: round_toward_zero(t, jnp.bfloat16).astype(jnp.float32))(0.1)
    assert float(grad) == 1.0


# --- What may be given -----------------------------------------------------------------

NO_THRESHOLD = [
    "0.5",
    b"0.5",
    None,
    True,
    np.True_,
    0.5j,
    np.asarray(1j),
    np.asarray("x"),
    np.asarray(True),
    -1.0,
    -1,
    np.float32(-1),
    np.nan,
    -np.inf,
    np.full(2, -1.0),
    np.full(2, np.nan),
    np.full(2, 1j),
    np.full(2, "x"),
    np.full(2, True),
    fan_in,
    max_abs,
    mse_optimal,
]
PARAMS = {"a": {"w": np.ones((4, 2), np.float32), "b": np.ones(2, np.float32)}, "n": np.arange(3)}


def name_of(bad) -> str:
    return getattr(bad, "__name__", repr(bad))


@pytest.mark.parametrize("bad", NO_THRESHOLD, ids=name_of)
def test_what_is_no_threshold_is_refused_by_name(bad):
    for check in (
        lambda: check_threshold_tree("threshold", bad),
        lambda: check_threshold_tree("threshold", {"a": bad, "n": 1.0}),
        lambda: resolve_threshold(bad, PARAMS),
    ):
        with pytest.raises((TypeError, ValueError), match="threshold"):
            check()


@pytest.mark.parametrize("shape", [(3,), (5, 1), (4, 1), (1, 4, 2), (0,)])
def test_an_array_that_does_not_broadcast_to_a_leaf_is_refused_with_path_and_shapes(shape):
    for t in (np.ones(shape), jnp.ones(shape)):
        with pytest.raises(ValueError, match=r"threshold.*'a/(w|b)'.*broadcast"):
            resolve_threshold(t, PARAMS)


def test_an_array_gives_every_channel_a_threshold_of_its_own():
    t = np.asarray([0.5, 2.0], np.float32)
    got = resolve_threshold({"a": {"w": t, "b": jnp.asarray([-1.0, 3.0])}, "n": 1.0}, PARAMS)["a"]
    assert np.array_equal(np.broadcast_to(got["w"], (4, 2)), np.broadcast_to(t, (4, 2)))
    assert np.array_equal(got["b"], [0.0, 3.0])  # a jax array's negative entries count as 0


def test_a_bad_entry_of_a_threshold_tree_is_named_by_its_path():
    with pytest.raises(ValueError, match="threshold at 'a/w'"):
        check_threshold_tree("threshold", {"a": {"w": -1.0, "b": 1.0}})
    with pytest.raises(TypeError, match="threshold at 'a/w'"):
        resolve_threshold({"a": {"w": "no", "b": 1.0}, "n": 1.0}, PARAMS)


@pytest.mark.parametrize("bad", [{"q": 1.0}, {}, [1.0, 2.0], {"a": {"w": 1.0}, "n": 1.0}], ids=repr)
def test_a_tree_that_is_no_prefix_of_the_parameters_is_refused(bad):
    with pytest.raises(ValueError, match="prefix"):
        resolve_threshold(bad, PARAMS)


def test_a_number_a_prefix_and_a_full_tree_reach_every_leaf():
    assert resolve_threshold(2, PARAMS) == {"a": {"w": 2.0, "b": 2.0}, "n": np.inf}
    assert resolve_threshold({"a": 0.5, "n": 1.0}, PARAMS)["a"] == {"w": 0.5, "b": 0.5}
    full = {"a": {"w": 0.25, "b": np.inf}, "n": 1.0}
    assert resolve_threshold(full, PARAMS)["a"] == {"w": 0.25, "b": np.inf}


def test_a_schedule_is_taken_at_the_step_and_at_zero_without_one():
    halving = lambda step: 2.0 ** (-step.astype(jnp.float32))  # noqa: E731
    assert float(resolve_threshold(halving, PARAMS)["a"]["w"]) == 1.0
    assert float(resolve_threshold(halving, PARAMS, jnp.int32(3))["a"]["w"]) == 0.125
    traced = jax.jit(lambda step: resolve_threshold({"a": halving, "n": 1.0}, PARAMS, step)["a"])
    assert float(traced(jnp.int32(2))["b"]) == 0.25


def test_a_traced_negative_threshold_counts_as_zero_and_nothing_recompiles():
    traces = []

    @jax.jit
    def resolved(t):
        traces.append(1)
        return resolve_threshold(t, PARAMS)["a"]["w"]

    assert [float(resolved(t)) for t in (-3.0, 0.0, 0.5, np.inf)] == [0, 0, 0.5, np.inf]
    assert len(traces) == 1
    assert resolved(0.5).dtype == jnp.result_type(float)


def test_the_empty_tree_has_no_thresholds():
    assert resolve_threshold(0.5, {}) == {}
    assert resolve_threshold(0.5, None) is None
    assert resolve_threshold(fan_in(1.0), ()) == ()


# --- fan_in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape", "inputs"),
    [
        ("dense/kernel", (64, 10), 64),
        ("conv/kernel", (3, 3, 16, 32), 3 * 3 * 16),
        ("conv1d/kernel", (5, 16, 32), 5 * 16),
        ("general/kernel", (4, 8, 10), 32),
        ("attention/query/kernel", (32, 4, 8), 32),
        ("attention/key/kernel", (32, 4, 8), 32),
        ("attention/value/kernel", (32, 4, 8), 32),
        ("attention/out/kernel", (4, 8, 32), 32),
        ("embed/embedding", (1000, 16), 16),
        ("dense/bias", (10,), None),
        ("norm/scale", (64,), None),
        ("temperature", (), None),
    ],
)
def test_fan_in_is_read_by_the_layer_conventions_of_flax(path, shape, inputs):
    tree = jnp.zeros(shape)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    (got,) = jax.tree.leaves(resolve_threshold(fan_in(0.5), tree))
    expected = np.inf if inputs is None else 0.5 * np.sqrt(2 / inputs)
    np.testing.assert_allclose(float(got), expected, rtol=1e-6)


def test_stacked_axes_are_not_inputs():
    params = {"kernel": jnp.zeros((12, 64, 10)), "bias": jnp.zeros((12, 10))}
    got = resolve_threshold(fan_in(1.0, stacked_axes=1), params)
    np.testing.assert_allclose(float(got["kernel"]), np.sqrt(2 / 64), rtol=1e-6)
    assert float(got["bias"]) == np.inf


def test_kappa_may_be_traced_or_a_schedule():
    params = {"w": jnp.zeros((8, 3)), "b": jnp.zeros(3)}
    traced = jax.jit(lambda k: resolve_threshold(fan_in(k), params))(2.0)
    assert (float(traced["w"]), float(traced["b"])) == (1.0, np.inf)
    scheduled = fan_in(lambda step: 1.0 + step)
    assert float(resolve_threshold(scheduled, params, jnp.float32(3))["w"]) == 2.0


@pytest.mark.parametrize("bad", ["1", None, True, 1j, -1.0, np.nan, np.ones(2)], ids=repr)
def test_a_kappa_that_is_no_number_is_refused_by_name(bad):
    with pytest.raises((TypeError, ValueError), match="kappa"):
        fan_in(bad)


@pytest.mark.parametrize("bad", [-1, 1.5, True, "1", None], ids=repr)
def test_stacked_axes_must_be_a_count(bad):
    with pytest.raises((TypeError, ValueError), match="stacked_axes"):
        fan_in(1.0, stacked_axes=bad)


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


# --- mse_optimal -----------------------------------------------------------------------

ALL_BITS = [1, "ternary", 2, 3, 4, 5, 6, 8]
GRIDS = [(b, True) for b in ALL_BITS] + [(b, False) for b in (2, 3, 4, 5, 6, 8)]
FEW_BITS = (1, "ternary", 2, 3, 4)
NUM_ROWS, ROW = 16, 64


def brute_force_optimum(x, bits, full_signed):
    """Least squared error over a dense grid of scales: an upper bound of the optimum."""
    low, high = code_range(bits, full_signed)
    scales = np.abs(x).max() * np.linspace(0.01, 1.2, 40001)[:, None]
    errors = [
        np.sum((x - s * np.clip(np.round(x / s), low, high)) ** 2, axis=1).min()
        for s in (scales, -scales)
    ]
    return min(errors)


NAMES = list(distributions(NUM_ROWS, ROW))


@functools.cache
def measured(bits, full_signed: bool, seed: int = 7) -> dict[str, np.ndarray]:
    """Errors of `quantize` and of the exact optimum, for all distributions in one call."""
    rows = np.concatenate(list(distributions(NUM_ROWS, ROW, seed).values())).astype(np.float32)
    errors = {}
    for name, rule in {"mse": mse_optimal, "max": max_abs}.items():
        q = jaxclip.quantize(
            jnp.asarray(rows), bits, threshold=rule, axis=0, full_signed=full_signed
        )
        decoded = np.asarray(q.scale, np.float64) * np.asarray(q.qvalue, np.float64)
        errors[name] = np.sum((rows.astype(np.float64) - decoded) ** 2, axis=1)
    errors["best"] = np.asarray([exact_optimum(r, bits, full_signed) for r in rows])
    errors["energy"] = np.sum(rows.astype(np.float64) ** 2, axis=1)
    return {k: v.reshape(len(NAMES), NUM_ROWS) for k, v in errors.items()}


@pytest.mark.parametrize(
    ("bits", "full_signed"), [("ternary", True), (2, True), (3, False), (4, True)]
)
def test_the_oracle_is_never_above_a_dense_search_and_within_a_hair_of_it(bits, full_signed):
    rng = np.random.default_rng(8)
    for x in (rng.normal(size=12), rng.uniform(-1, 1, 12), np.abs(rng.normal(size=12))):
        best, dense = exact_optimum(x, bits, full_signed), brute_force_optimum(x, bits, full_signed)
        assert best <= dense * (1 + 1e-9)
        assert dense <= best * 1.001


def worst_ratios(bits, full_signed) -> dict[str, float]:
    """Total error of a distribution's rows over their optimum: the worst of some seeds."""
    seeds = (7, 1, 2, 3) if bits in FEW_BITS else (7,)
    runs = [measured(bits, full_signed, seed) for seed in seeds]
    ratios = [run["mse"].sum(axis=1) / run["best"].sum(axis=1) for run in runs]
    return dict(zip(NAMES, np.max(ratios, axis=0).tolist(), strict=True))


@pytest.mark.parametrize(("bits", "full_signed"), GRIDS)
def test_the_total_error_is_as_near_the_optimum_as_the_docstring_says(bits, full_signed):
    allowed = 0.005 if bits in FEW_BITS else 0.06 if bits == 8 else 0.03
    assert worst_ratios(bits, full_signed) == {n: pytest.approx(1, abs=allowed) for n in NAMES}


@pytest.mark.parametrize(("bits", "full_signed"), GRIDS)
def test_the_error_is_never_below_the_exact_optimum_nor_above_that_of_max_abs(bits, full_signed):
    errors = measured(bits, full_signed)
    slack = 1e-10 * errors["energy"]
    assert np.all(errors["mse"] >= errors["best"] - slack)
    if bits != 1:
        assert np.all(errors["mse"] <= errors["max"] + slack)
    assert np.all(errors["mse"] <= errors["max"] * (1 + 1e-6) + slack)


@given(data=st.data())
def test_mse_optimal_is_never_worse_than_max_abs_whatever_the_weights(data):
    bits, full_signed = data.draw(
        st.sampled_from([("ternary", True), (2, True), (4, True), (8, False)])
    )
    exponents = data.draw(hnp.arrays(np.int8, 16, elements=st.integers(-20, 20)))
    x = np.ldexp(data.draw(hnp.arrays(np.int8, 16)).astype(np.float32), exponents)[None]
    errors = []
    for rule in (mse_optimal, max_abs):
        q = jaxclip.quantize(jnp.asarray(x), bits, threshold=rule, full_signed=full_signed)
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


@pytest.mark.parametrize("bits", ["ternary", 4])
def test_padding_of_the_last_group_changes_nothing(bits):
    x = np.random.default_rng(10).normal(size=(1, 11)).astype(np.float32)
    grouped = np.asarray(mse_optimal(bits, axis=0, group_size=8)(jnp.asarray(x)))
    alone = np.asarray(mse_optimal(bits)(jnp.asarray(x[:, 8:])))
    ratio = {}
    for name, t in (("grouped", grouped[0, 8]), ("alone", alone.item())):
        q = jaxclip.quantize(jnp.asarray(x[:, 8:]), bits, threshold=float(t))
        ratio[name] = np.sum((x[:, 8:] - np.asarray(jaxclip.dequantize(q))) ** 2)
    assert ratio["grouped"] <= 1.01 * exact_optimum(x[0, 8:], bits, True) + 1e-12
    assert ratio["alone"] <= 1.01 * exact_optimum(x[0, 8:], bits, True) + 1e-12


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


def test_zero_and_empty_blocks_have_finite_thresholds():
    for rule in (max_abs(axis=0), mse_optimal(1, axis=0), mse_optimal(4, axis=0)):
        assert np.array_equal(rule(jnp.zeros((2, 3))), np.zeros((2, 1)))
        assert rule(jnp.zeros((0, 3))).shape == (0, 1)
        assert np.all(np.isfinite(rule(jnp.zeros((2, 0)))))
