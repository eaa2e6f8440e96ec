"""Formats of scales against the table in the module's docstring, in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip.lowbit.scale_formats import decode_log8, encode_log8, round_scale

FORMATS = ["float32", "float16", "bfloat16", "log8"]
# smallest and largest magnitude, and the relative error between (for float16 from 2**-14 on).
TABLE = {
    "float32": (2.0**-126, float(np.finfo(np.float32).max), 0.0),
    "float16": (2.0**-24, 65504.0, 2.0**-11),
    "bfloat16": (2.0**-126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 2.0**-8),
}
every_format = pytest.mark.parametrize("scale_dtype", FORMATS)
round_jit = jax.jit(round_scale, static_argnums=1)
normal_scales = st.floats(2.0**-126, float(np.finfo(np.float32).max), width=32).flatmap(
    lambda x: st.sampled_from([x, -x])
)
lists_of_scales = st.lists(normal_scales, min_size=6, max_size=6).map(
    lambda values: np.asarray(values, np.float32)
)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@given(scale=lists_of_scales)
def test_rounding_stays_within_the_error_and_the_range_of_the_table(scale_dtype, scale):
    smallest, largest, error = TABLE[scale_dtype]
    rounded = round_jit(scale, scale_dtype)
    assert rounded.dtype == jnp.dtype(scale_dtype)
    got, wanted = np.asarray(rounded, np.float64), scale.astype(np.float64)
    assert np.array_equal(np.sign(got), np.sign(wanted))
    size = np.clip(np.abs(wanted), smallest, largest)
    absolute = 2.0**-25 if scale_dtype == "float16" else 0
    assert np.all(np.abs(np.abs(got) - size) <= np.maximum(error * size, absolute))


@given(scale=lists_of_scales)
def test_log8_rounds_to_the_nearest_of_127_steps_below_the_largest(scale):
    got = np.abs(np.asarray(round_jit(scale, "log8"), np.float64))
    size = np.abs(scale.astype(np.float64))
    unit = max(size.max(), 2.0**-110)
    smallest = unit * 2.0 ** (-127 / 8)
    inside = size >= smallest
    limit = 2 ** (1 / 16) * (1 + 1e-6)
    assert np.all((got / size)[inside] <= limit)
    assert np.all((size / got)[inside] <= limit)
    np.testing.assert_allclose(got[~inside], smallest, rtol=1e-6)
    steps = 8 * np.log2(unit / got)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)


@given(scale=lists_of_scales)
def test_log8_scales_are_bytes_and_a_unit_bit_for_bit(scale):
    rounded = np.asarray(round_jit(scale, "log8"))
    codes, unit = encode_log8(rounded)
    assert (codes.dtype, codes.shape) == (np.uint8, scale.shape)
    assert (unit.dtype, unit.shape) == (np.float32, ())
    decoded = decode_log8(codes, unit)
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == rounded.tobytes()


@every_format
@given(scale=lists_of_scales)
def test_rounding_twice_changes_nothing(scale_dtype, scale):
    once = round_jit(scale, scale_dtype)
    twice = round_jit(np.asarray(once, np.float32), scale_dtype)
    assert np.asarray(twice).tobytes() == np.asarray(once).tobytes()


@pytest.mark.thorough
def test_the_bytes_of_log8_are_those_of_a_table_worked_by_hand():
    # Eight steps to a factor of two; 128 is the sign.
    scale = np.float32([1, -1, 0.5, 2**-0.125, -(2**-1.5), 2**-15.875, -(2**-15.875)])
    codes, unit = encode_log8(np.asarray(round_scale(scale, "log8")))
    assert codes.tolist() == [0, 128, 8, 1, 140, 127, 255]
    assert unit == 1


@every_format
@pytest.mark.parametrize("scale", [1e-45, -1e-45, 3e38, 0.0, 2.0**-126])
def test_no_scale_becomes_zero_or_infinite(scale_dtype, scale):
    for others in ([], [1.0], [3e38]):
        array = np.asarray([scale, *others], np.float32)
        rounded = np.asarray(round_jit(array, scale_dtype)).astype(np.float64)
        assert np.all(np.isfinite(rounded))
        assert np.all(rounded != 0)


@pytest.mark.thorough
def test_scales_that_are_not_of_log8_are_not_encoded():
    for bad in ([1.0, 0.9], [np.nan], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="log8"), np.errstate(invalid="ignore"):
            encode_log8(np.float32(bad))
