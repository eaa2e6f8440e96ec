"""Codes and scales against float64 NumPy and hand-worked tables."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxclip
from jaxclip._core.grids import Grid, code_range
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.lowbit.quantizer import quantize
from oracles.quick import quick_first

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
ALL_BITS = [1, "ternary", 2, 3, 4, 5, 6, 8]
GRIDS = [(b, "full") for b in ALL_BITS] + [(b, "narrow") for b in (2, 3, 4, 5, 6, 8)]
TINY = 2.0**-126
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_grid = pytest.mark.parametrize(("bits", "levels"), GRIDS)
# One grid of each kind, for what compiles anew for each.
each_kind_of_grid = pytest.mark.parametrize(
    ("bits", "levels"),
    quick_first([(1, "full"), (4, "narrow"), ("ternary", "full"), (2, "full"), (8, "full")], 2),
)
every_rule = pytest.mark.parametrize("rule", [jaxclip.mse_optimal, jaxclip.max_abs])


def weights_of_any_size(dtype, shape=(3, 8)):
    """Finite numbers by their bits, from subnormals to the largest."""
    unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")

    largest = float(ml_dtypes.finfo(dtype).max)

    def finite(bits):
        with np.errstate(invalid="ignore"):  # signalling NaN
            x = bits.view(dtype).astype(np.float64)
        return np.nan_to_num(x, nan=1.0, posinf=largest, neginf=-largest).astype(dtype)

    return hnp.arrays(unsigned, shape).map(finite)


def exact(q: QuantizedArray) -> np.ndarray:
    """Scale times code in float64, for one scale a row."""
    return np.asarray(q.scale, np.float64) * np.asarray(q.qvalue, np.float64)


# --- Error bounds ----------------------------------------------------------------------


@every_grid
@settings(max_examples=25)
@given(x=weights_of_any_size(np.float32), power=st.integers(-110, 110))
def test_the_error_is_half_a_step_inside_the_threshold_and_the_excess_outside(
    bits, levels, x, power
):
    threshold = float(np.float32(0.7 * 2.0**power))
    q = quantize(
        jnp.asarray(x),
        Grid(bits, levels=levels, axis=None),
        threshold=threshold,
    )
    scale, t = abs(float(q.scale.item())), float(np.asarray(q.threshold).item())
    assert scale > 0
    np.testing.assert_allclose(t, threshold, rtol=1e-6)
    size = np.abs(x.astype(np.float64))
    error = np.abs(x.astype(np.float64) - exact(q))
    rounding = 1e-6 * np.minimum(size, 2 * t) + TINY  # the division rounds, subnormals flush
    inside = size <= t
    if bits == 1:
        assert np.all(error <= np.maximum(t, size - t) + rounding)
        return
    assert np.all(error[inside] <= (scale / 2 + rounding)[inside])
    assert np.all(error[~inside] <= (size - t + rounding + 1e-6 * size)[~inside])
    low, high = code_range(bits, levels)
    if low == -high:
        np.testing.assert_allclose(error[~inside], (size - t)[~inside], rtol=1e-5, atol=1e-5 * t)


@pytest.mark.thorough
@each_kind_of_grid
@every_rule
@settings(max_examples=15)
@given(x=weights_of_any_size(np.float32))
def test_finite_weights_have_finite_nonzero_scales_and_codes_in_range(bits, levels, rule, x):
    q = quantize(
        jnp.asarray(x),
        Grid(bits, levels=levels, axis=0),
        threshold=rule,
    )
    scale, codes = np.asarray(q.scale), np.asarray(q.qvalue)
    low, high = code_range(bits, levels)
    assert q.scale.dtype == jnp.float32
    assert q.qvalue.dtype == jnp.int8
    assert np.all(np.isfinite(scale))
    assert np.all(np.abs(scale) >= TINY)
    assert codes.min() >= low
    assert codes.max() <= high
    if bits == 1:
        assert set(np.unique(codes)) <= {-1, 1}


@pytest.mark.thorough
@every_dtype
@every_rule
@pytest.mark.parametrize(
    ("bits", "levels"), [(1, "full"), ("ternary", "full"), (4, "narrow"), (8, "full")]
)
@settings(max_examples=15)
@given(data=st.data())
def test_finite_weights_decode_to_finite_weights(bits, levels, rule, dtype, data):
    x = data.draw(weights_of_any_size(dtype))
    q = quantize(
        jnp.asarray(x),
        Grid(bits, levels=levels, axis=0),
        threshold=rule,
    )
    decoded = dequantize(q)
    assert decoded.dtype == dtype
    assert np.all(np.isfinite(np.asarray(decoded, np.float64)))


@every_dtype
@pytest.mark.parametrize(("bits", "levels"), [(2, "full"), (4, "narrow")])
@given(data=st.data())
def test_max_abs_clips_nothing_so_every_error_is_half_a_step(bits, levels, dtype, data):
    x = data.draw(weights_of_any_size(dtype))
    q = quantize(
        jnp.asarray(x),
        Grid(bits, levels=levels, axis=0),
        threshold=jaxclip.max_abs,
    )
    error = np.abs(x.astype(np.float64) - exact(q))
    half = np.abs(np.asarray(q.scale, np.float64)) / 2
    assert np.all(error <= half * (1 + 1e-4) + TINY)


@pytest.mark.thorough
@every_dtype
def test_dequantizing_multiplies_in_float32_and_casts_once(dtype):
    x = np.random.default_rng(0).normal(size=(5, 33)).astype(dtype)
    q = quantize(jnp.asarray(x), Grid(4, axis=0), threshold=jaxclip.max_abs)
    expected = (np.asarray(q.scale) * np.asarray(q.qvalue, np.float32)).astype(dtype)
    for f in (dequantize, jax.jit(dequantize)):
        got = f(q)
        assert got.dtype == dtype
        assert np.array_equal(np.asarray(got), expected)
    assert dequantize(q, jnp.float32).dtype == jnp.float32


@pytest.mark.thorough
def test_float64_weights_come_back_as_float64():
    with enable_x64(True):
        x = np.random.default_rng(1).normal(size=(4, 16))
        q = quantize(jnp.asarray(x), 8, threshold=jaxclip.max_abs)
        assert dequantize(q).dtype == jnp.float64
        assert q.scale.dtype == jnp.float32
        error = np.abs(x - np.asarray(dequantize(q)))
    assert error.max() <= 0.5001 * abs(float(q.scale.item()))


# --- Hard rows -------------------------------------------------------------------------


@each_kind_of_grid
@every_rule
def test_rows_of_zeros_keep_a_positive_scale_and_decode_to_zero(bits, levels, rule):
    q = quantize(
        jnp.zeros((2, 5)),
        Grid(bits, levels=levels, axis=0),
        threshold=rule,
    )
    assert np.all(np.abs(np.asarray(q.scale)) >= TINY)
    # One bit has no zero: the smallest normal number stands for it.
    assert np.all(np.abs(np.asarray(dequantize(q))) <= (TINY if bits == 1 else 0))


@pytest.mark.thorough
@each_kind_of_grid
@every_rule
def test_constant_rows_are_stored_to_rounding_from_1e_minus_37_to_1e37(bits, levels, rule):
    x = np.outer([0.3, -7.0, 1e-30, 1e30, 1e-37 * 127, 1e37], np.ones(6)).astype(np.float32)
    q = quantize(
        jnp.asarray(x),
        Grid(bits, levels=levels, axis=0),
        threshold=rule,
    )
    np.testing.assert_allclose(np.asarray(dequantize(q)), x, rtol=1e-6)


@pytest.mark.parametrize("bits", quick_first([1, 4, "ternary"], 2))
@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_single_entries_are_stored_to_rounding(bits, shape):
    for value in (0.3, -7.0, 1e-30, 1e30):
        q = quantize(jnp.full(shape, value, jnp.float32), bits)
        np.testing.assert_allclose(np.asarray(dequantize(q)), np.float32(value), rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@every_rule
@every_dtype
def test_the_largest_numbers_of_a_dtype_are_stored_and_decode_to_finite_numbers(bits, rule, dtype):
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.outer([1.0, -1.0, 1.0], np.ones(6)) * largest
    x[2] = np.asarray([1, 0.3, 0.29, -0.3, 0.28, 0.31]) * largest
    x = x.astype(dtype)
    q = quantize(jnp.asarray(x), Grid(bits, levels="narrow", axis=0), threshold=rule)
    assert np.all(np.isfinite(np.asarray(q.scale)))
    decoded = np.asarray(dequantize(q)).astype(np.float64)
    assert np.all(np.isfinite(decoded))
    np.testing.assert_allclose(decoded[:2], x[:2].astype(np.float64), rtol=1e-2)


@pytest.mark.parametrize(
    ("bits", "levels"), quick_first([(1, "full"), (4, "full"), ("ternary", "full")], 2)
)
@every_rule
def test_one_outlier_a_million_times_larger_keeps_the_error_of_max_abs(bits, levels, rule):
    x = np.random.default_rng(2).uniform(-1, 1, (2, 64)).astype(np.float32)
    x[0, 3], x[1, 9] = 1e6, -1e6
    q = quantize(
        jnp.asarray(x),
        Grid(bits, levels=levels, axis=0),
        threshold=rule,
    )
    assert np.all(np.isfinite(np.asarray(q.scale)))
    error = np.sum((x.astype(np.float64) - exact(q)) ** 2, axis=1)
    if bits == 1:
        best = np.sum(x.astype(np.float64) ** 2, 1) - np.abs(x.astype(np.float64)).sum(1) ** 2 / 64
        assert rule is jaxclip.max_abs or np.all(error <= best * (1 + 1e-5))
        return
    largest = np.sum(np.where(np.abs(x) > 1, 0, x).astype(np.float64) ** 2, axis=1)
    assert np.all(error <= largest + 1e-12 * 1e6**2)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@every_rule
@pytest.mark.parametrize("bits", quick_first([1, 4, 2, "ternary", 8], 2))
def test_subnormal_rows_divide_by_no_zero(bits, rule, dtype):
    x = np.asarray([[1e-44, -1e-42, 0, 9e-39], [1.3e-38, 1e-40, -2e-38, 0]]).astype(dtype)
    q = quantize(jnp.asarray(x), Grid(bits, axis=0), threshold=rule)
    assert np.all(np.isfinite(np.asarray(q.scale)))
    assert np.all(np.abs(np.asarray(q.scale)) >= TINY)
    error = np.abs(x.astype(np.float64) - exact(q))
    assert np.all(error <= 2 * TINY)


@pytest.mark.thorough
@pytest.mark.parametrize("bits", ALL_BITS)
def test_float16_subnormals_are_not_lost(bits):
    x = np.asarray([[1.0, -1.0, 1.0, 1.0]]) * 2.0**-24
    q = quantize(jnp.asarray(x, jnp.float16), bits)
    np.testing.assert_allclose(exact(q), x, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("group_size", [None, 2])
def test_arrays_without_entries_go_through(shape, group_size):
    for bits in (1, "ternary", 4):
        q = quantize(jnp.zeros(shape), Grid(bits, axis=None, group_size=group_size))
        assert dequantize(q).shape == shape


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([0.0, 1.0], r"threshold of w must be positive .* got 0 for block \(0, 0\), .* is 2\.0"),
        ([1.0, np.inf], "threshold of w must be finite .* got inf: max_abs clips nothing"),
        ([np.nan, 1.0], "threshold"),
        ([1.0, -1.0], "threshold"),
        ([1e39, 1.0], "threshold of w must be finite"),
    ],
    ids=str,
)
def test_thresholds_that_would_make_zeros_are_refused_in_an_array_as_they_are_alone(
    kind, thresholds, message
):
    w = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    with np.errstate(over="ignore"):
        t = kind(np.asarray(thresholds)[:, None])
    for grid in (Grid(4, axis=0), Grid(4, axis=0, zero_point=True)):
        with pytest.raises(ValueError, match=message):
            quantize(w, grid, threshold=t, name="w")


def test_a_number_beyond_float32_is_no_threshold():
    with pytest.raises(ValueError, match=r"threshold of w must be finite in float32 .* got 1e\+39"):
        quantize(jnp.ones((2, 3)), 4, threshold=1e39, name="w")


def test_a_threshold_of_0_is_for_a_block_of_zeros():
    w = jnp.asarray([[0.0, 0.0], [0.5, 3.0]])
    t = jaxclip.max_abs(axis=0)(w)
    assert t[0, 0] == 0
    q = quantize(w, Grid(4, axis=0), threshold=t)
    np.testing.assert_allclose(dequantize(q), [[0, 0], [0.5, 3]], atol=0.25)
    assert np.array_equal(q.qvalue[0], [0, 0])


# --- Blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "group_size", "scales"),
    [
        ((6, 4), None, None, (1, 1)),
        ((6, 4), -1, None, (1, 4)),
        ((6, 4), 0, None, (6, 1)),
        ((6, 4), (0, 1), None, (6, 4)),
        ((6, 4), -1, 4, (2, 4)),
        ((6, 5), 0, 4, (6, 2)),
        ((6, 5), None, 4, (6, 2)),
        ((2, 3, 5), 1, 2, (1, 3, 5)),
        ((2, 3, 5), 2, 2, (1, 3, 5)),
        ((7,), None, 3, (3,)),
        ((), None, 3, ()),
    ],
)
@pytest.mark.parametrize("bits", [1])
def test_scales_have_one_entry_a_block_and_blocks_are_independent(
    shape, axis, group_size, scales, bits
):
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    rule = jaxclip.mse_optimal
    q = quantize(jnp.asarray(x), Grid(bits, axis=axis, group_size=group_size), threshold=rule)
    assert q.scale.shape == scales
    assert q.shape == q.qvalue.shape == shape
    assert np.all(np.isfinite(np.asarray(dequantize(q))))
    if shape and scales != (1,) * len(shape):
        louder = x.copy()
        louder[(0,) * len(shape)] *= 100
        other = quantize(
            jnp.asarray(louder), Grid(bits, axis=axis, group_size=group_size), threshold=rule
        )
        changed = np.asarray(q.scale) != np.asarray(other.scale)
        assert changed.sum() <= 1


@pytest.mark.parametrize("bits", ALL_BITS)
def test_groups_are_quantized_as_they_would_be_alone(bits):
    x = np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)
    grouped = quantize(jnp.asarray(x), Grid(bits, axis=0, group_size=4), threshold=jaxclip.max_abs)
    for row in range(2):
        for g in range(2):
            part = x[row, 4 * g : 4 * g + 4]
            alone = quantize(jnp.asarray(part), bits, threshold=jaxclip.max_abs)
            assert np.array_equal(grouped.qvalue[row, 4 * g : 4 * g + 4], alone.qvalue)
            assert np.asarray(grouped.scale)[row, g] == np.asarray(alone.scale).item()


def test_thresholds_given_for_each_block_are_taken():
    x = np.random.default_rng(5).normal(size=(3, 8)).astype(np.float32)
    given_ = np.asarray([[0.5], [1.0], [2.0]], np.float32)
    for t in (given_, jnp.asarray(given_)):
        q = quantize(jnp.asarray(x), Grid(4, axis=0), threshold=t)
        np.testing.assert_allclose(q.threshold, given_, rtol=1e-6)
    rule = jaxclip.max_abs(axis=1)  # rebound to the call's own blocks
    assert quantize(jnp.asarray(x), Grid(4, axis=0), threshold=rule).scale.shape == (3, 1)


# --- Determinism, jit, the pytree ------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(("bits", "levels"), [(1, "full"), (4, "narrow")])
def test_encoding_is_deterministic_and_the_same_under_jit(bits, levels):
    x = jnp.asarray(np.random.default_rng(6).normal(size=(4, 32)).astype(np.float32))
    rule = jaxclip.mse_optimal
    encode = lambda x: quantize(x, Grid(bits, levels=levels, axis=0), threshold=rule)  # noqa: E731
    one, two, jitted = encode(x), encode(x), jax.jit(encode)(x)
    assert np.array_equal(one.qvalue, two.qvalue)
    assert np.array_equal(one.scale, two.scale)
    np.testing.assert_allclose(jitted.scale, one.scale, rtol=1e-5)
    np.testing.assert_allclose(dequantize(jitted), dequantize(one), rtol=1e-4, atol=1e-6)


@every_grid
def test_quantizing_what_was_decoded_gives_the_same_codes(bits, levels):
    x = np.random.default_rng(7).normal(size=(4, 32)).astype(np.float32)
    q = quantize(
        jnp.asarray(x),
        Grid(bits, levels=levels, axis=None),
        threshold=jaxclip.max_abs,
    )
    again = quantize(
        dequantize(q),
        Grid(bits, levels=levels, axis=None),
        threshold=q.threshold,
    )
    np.testing.assert_allclose(dequantize(again), dequantize(q), rtol=1e-6)


@pytest.mark.thorough
def test_a_quantized_array_is_a_pytree_of_codes_and_scales():
    x = jnp.asarray(np.random.default_rng(8).normal(size=(6, 10)).astype(np.float16))
    q = quantize(x, Grid(3, axis=1))
    leaves, treedef = jax.tree.flatten(q)
    assert [leaf.dtype for leaf in leaves] == [jnp.int8, jnp.float32]
    back = jax.tree.unflatten(treedef, leaves)
    assert (back.grid, back.dtype) == (q.grid, jnp.float16)
    through = jax.jit(lambda q: q)(q)
    assert np.array_equal(dequantize(through), dequantize(q))
    product = jax.jit(lambda q, v: v @ dequantize(q, jnp.float32))(q, jnp.ones((2, 6), jnp.float32))
    expected = np.ones((2, 6)) @ exact(q)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_vmap_quantizes_each_row():
    x = jnp.asarray(np.random.default_rng(9).normal(size=(3, 12)).astype(np.float32))
    q = jax.vmap(lambda r: quantize(r, 4, threshold=jaxclip.max_abs))(x)
    for i in range(3):
        alone = quantize(x[i], 4, threshold=jaxclip.max_abs)
        assert np.array_equal(q.qvalue[i], alone.qvalue)
        assert np.array_equal(q.scale[i], alone.scale)


@pytest.mark.thorough
def test_the_side_of_a_full_grid_goes_where_it_helps():
    # On (-2, -1, 0, 1) only a negative scale reaches both 2 and 1 exactly.
    x = jnp.asarray([2.0, 1.0, 0.0, -1.0])
    q = quantize(x, 2)
    assert float(q.scale.item()) == pytest.approx(-1.0, rel=1e-6)
    assert np.array_equal(q.qvalue, [-2, -1, 0, 1])
    assert np.array_equal(quantize(-x, 2).qvalue, [-2, -1, 0, 1])


def test_rounding_is_half_to_even_and_one_bit_of_zero_is_one():
    x = jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5, 7.0, 9.0, -9.0])
    q = quantize(x, Grid(4, levels="narrow", axis=None), threshold=7.0)
    assert np.array_equal(q.qvalue, [0, 2, 2, 0, -2, 7, 7, -7])
    one = quantize(jnp.asarray([0.0, -0.0, 2.0, -2.0]), 1, threshold=1.0)
    assert np.array_equal(one.qvalue, [1, 1, 1, -1])


# --- Bad input -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 7, 9, -1, 2.5, True, "2", None], ids=repr)
def test_unknown_bits_are_refused_with_the_allowed_list(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        quantize(jnp.ones(3), bits)


@every_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named_with_its_index(dtype, bad):
    x = np.ones((3, 4), np.float32)
    x[1, 2] = bad
    with pytest.raises(ValueError, match=rf"kernel must be finite.*{bad}.*\(1, 2\)"):
        quantize(jnp.asarray(x.astype(dtype)), 4, name="kernel")


@pytest.mark.parametrize(
    "array", [np.ones(3, int), np.ones(3, bool), np.ones(3, complex)], ids=repr
)
def test_an_array_that_is_not_real_floating_is_refused_by_name(array):
    with pytest.raises(TypeError, match="kernel must be real floating"):
        quantize(array, 4, name="kernel")


@pytest.mark.parametrize(
    "bad",
    [
        "max",
        None,
        True,
        1j,
        -1.0,
        0.0,
        np.nan,
        np.inf,
        np.ones(3),
        np.ones((3, 1)),
        np.ones((1, 1, 1)),
        np.full((1, 2), -1.0),
        np.full((1, 2), np.nan),
        np.full((1, 2), 1j),
        np.full((1, 2), True),
        np.full((1, 2), "a"),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("error")
def test_values_that_are_not_thresholds_are_refused_by_name(bad):
    with pytest.raises((TypeError, ValueError), match="threshold"):
        quantize(jnp.ones((3, 2)), Grid(4, axis=1), threshold=bad)


def test_a_function_that_is_no_rule_is_refused_by_name():
    with pytest.raises(TypeError, match="threshold"):
        quantize(jnp.ones((3, 2)), 4, threshold=lambda w: 1.0)


def test_the_threshold_of_a_box_is_a_rule_for_quantizing_too():
    q = quantize(jnp.ones((8, 3)), 4, threshold=jaxclip.fan_in(1.0))
    np.testing.assert_allclose(np.asarray(q.threshold), 0.5, rtol=1e-6)


@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_an_axis_out_of_range_is_refused(axis):
    with pytest.raises(ValueError, match="axis must be in"):
        quantize(jnp.ones((3, 2)), Grid(4, axis=axis))
