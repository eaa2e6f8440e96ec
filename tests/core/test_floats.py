"""Rounding towards zero, phases of complex numbers, and dtypes, against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxclip._core import floats
from jaxclip._core.floats import phase_and_modulus, round_toward_zero

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
jitted_round = jax.jit(round_toward_zero, static_argnums=1)


# --- Rounding towards zero -------------------------------------------------------------


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


# --- Phases ----------------------------------------------------------------------------


@eager_and_jit
@pytest.mark.parametrize("scale", [1e-33, 1e-20, 1.0, 1e20, 2e38])
def test_phases_of_complex_numbers_are_right_at_every_magnitude(wrap, scale):
    rng = np.random.default_rng(6)
    z = ((rng.uniform(-1, 1, 64) + 1j * rng.uniform(-1, 1, 64)) * scale).astype(np.complex64)
    phase, modulus = wrap(phase_and_modulus)(jnp.asarray(z))
    exact = z.astype(np.complex128)
    np.testing.assert_allclose(phase, exact / np.abs(exact), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(modulus, np.abs(exact), rtol=1e-6)


@pytest.mark.thorough
def test_phases_of_zero_and_of_numbers_that_are_not_finite_are_zero():
    z = np.asarray([0, np.inf, complex(1, -np.inf), complex(np.nan, 1)], np.complex64)
    phase, modulus = phase_and_modulus(jnp.asarray(z))
    assert np.array_equal(phase, np.zeros(4))
    assert float(modulus[0]) == 0
    assert np.array_equal(modulus[1:3], [np.inf, np.inf])
    assert np.isnan(modulus[3])


def test_complex_numbers_beyond_the_largest_modulus_have_a_phase_under_jit():
    largest = float(np.finfo(np.float32).max)
    z = jax.lax.complex(*(jnp.full(2, x, jnp.float32) for x in (largest, -largest)))
    phase, modulus = jax.jit(phase_and_modulus)(z)
    np.testing.assert_allclose(phase, [np.sqrt(0.5) * (1 - 1j)] * 2, rtol=1e-6)
    assert np.all(np.isinf(modulus))


# --- Ranges and dtypes -----------------------------------------------------------------


@eager_and_jit
def test_a_quotient_by_a_number_with_a_subnormal_reciprocal_is_not_flushed(wrap):
    by = jnp.asarray([3e38, 2.0**127, 2e-38, -4.0], jnp.float32)
    assert np.array_equal(wrap(floats.quotient)(by, by), np.ones(4))


def test_saturated_numbers_are_within_both_ranges_and_keep_their_dtype():
    x = jnp.asarray([1e6, -np.inf, 3.0, np.nan])
    assert np.array_equal(
        floats.saturate(x, jnp.float16), [65504, -65504, 3, np.nan], equal_nan=True
    )
    assert floats.saturate(x, jnp.float16).dtype == jnp.float32
    # The range of float32 is wider than that of the array.
    half = floats.saturate(jnp.asarray([np.inf, 2.0], jnp.float16), jnp.float32, 0.5)
    assert np.array_equal(half, [32752, 2])
    assert complex(floats.saturate(jnp.asarray(1e6 - 1e6j), jnp.float16)) == 65504 - 65504j


def test_a_number_exceeds_a_bound_of_zero_even_where_it_is_subnormal_and_nan_exceeds_none():
    x = jnp.asarray([1e-40, -2e-40, 0.5, np.nan], jnp.float32)
    assert np.array_equal(floats.exceeds(x, jnp.float32(1.5e-40)), [False, True, True, False])
    assert np.array_equal(floats.exceeds(x, jnp.float32(0)), [True, True, True, False])


def test_rescaled_squares_stay_in_the_normal_range():
    largest = jnp.asarray([1.0, 0.0, 3e38, 2e-38], jnp.float32)
    squares = (largest * floats.rescale_for(largest)) ** 2
    assert np.all(np.isfinite(squares))
    assert np.all((squares == 0) == (largest == 0))
    assert floats.rescale_for(largest)[0] == 1


def test_weak_types_are_kept_only_where_they_were():
    weak = jnp.asarray(1.0)
    strong = jnp.asarray(1.0, weak.dtype)
    assert weak.weak_type
    assert floats.keep_weak_type(strong, weak).weak_type
    assert not floats.keep_weak_type(strong, strong).weak_type


@pytest.mark.thorough
def test_computation_is_in_float32_or_wider():
    assert floats.compute_dtype(jnp.float16, jnp.bfloat16) == jnp.float32
    assert floats.compute_dtype(jnp.float16, jnp.complex64) == jnp.complex64
    assert floats.compute_dtype(np.float64, jnp.bfloat16) == np.float64
    assert floats.compute_dtype(np.float64, jnp.complex64) == np.complex128


def test_select_keeps_the_bits_of_bfloat16_and_has_derivatives():
    bits = np.arange(2**16, dtype=np.uint16)  # every number, NaN payloads and subnormals too
    x, y = bits.view(jnp.bfloat16), bits[::-1].view(jnp.bfloat16)
    condition = bits % 3 == 0
    chosen = jax.jit(floats.select)(condition, x, y)
    assert np.array_equal(np.asarray(chosen).view(np.uint16), np.where(condition, bits, bits[::-1]))
    ones = jnp.ones(2, jnp.bfloat16)
    slopes = jax.grad(
        lambda x, y: jnp.sum(floats.select(jnp.array([True, False]), 2 * x, 3 * y)), (0, 1)
    )(ones, ones)
    assert np.array_equal(slopes, [[2, 0], [0, 3]])


# --- Scalars that meet many leaves ------------------------------------------------------


def test_a_scalar_is_broadcast_once_for_all_leaves_of_a_shape():
    def scaled(factor, leaves):
        factor = floats.Spread(factor)
        return [x * factor.like(x) for x in leaves]

    leaves = [jnp.full(shape, 2.0) for shape in [(3, 4)] * 5 + [(7,)] * 5]
    program = str(jax.make_jaxpr(scaled)(jnp.float32(3), leaves))
    assert program.count("broadcast_in_dim") == 2
    assert all(np.all(np.asarray(x) == 6) for x in jax.jit(scaled)(jnp.float32(3), leaves))


def test_a_scalar_stays_one_outside_of_a_program_and_on_a_mesh():
    scalar = jnp.float32(3)
    assert floats.Spread(scalar).like(jnp.ones((3, 4))) is scalar
    mesh = jax.make_mesh((1,), ("x",))
    x = jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    program = str(jax.make_jaxpr(lambda x: floats.Spread(scalar).like(x))(x))
    assert "broadcast" not in program
