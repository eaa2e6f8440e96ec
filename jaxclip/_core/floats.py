"""Exact arithmetic on floats: rounding towards zero, quotients that do not flush, bad values."""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core.trees import floating_leaves, is_clippable

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)  # the least normal number


def is_sharded(x: jax.Array) -> bool:
    """Whether an axis is split over an explicit mesh: then it must not be reshaped."""
    return any(s is not None for s in getattr(jax.typeof(x).sharding, "spec", ()))


def clamp(value: Any, low: Any, high: Any) -> jax.Array:
    """`value` in float32 and in [low, high]; NaN stays NaN."""
    return jnp.clip(jnp.asarray(value, jnp.float32), low, high)


def saturate(x: jax.Array, dtype: DTypeLike, fraction: float = 1.0) -> jax.Array:
    """Clips to a fraction of the finite range of `dtype`, real and imaginary parts apart."""
    if jnp.iscomplexobj(x):
        parts = (saturate(part, dtype, fraction) for part in (jnp.real(x), jnp.imag(x)))
        return lax.complex(*parts)
    # A Python number: the largest of a wider `dtype` would overflow in that of `x`.
    largest = fraction * min(float(jnp.finfo(dtype).max), float(jnp.finfo(x.dtype).max))
    return jnp.clip(x, -largest, largest)


def exceeds(x: jax.Array, bound: jax.Array) -> jax.Array:
    """`|x| > bound` for real `x`, or the bound is 0; False for NaN.

    Compares bits, which order like magnitudes: XLA on CPU takes subnormals for zero (also
    where it turns a comparison of bits with 0 into one of numbers).
    """
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    no_sign = jnp.asarray(jnp.iinfo(unsigned).max >> 1, unsigned)
    magnitude, limit = (lax.bitcast_convert_type(a, unsigned) & no_sign for a in (x, bound))
    return ((magnitude > limit) | (limit == 0)) & ~jnp.isnan(x)


def increment(count: jax.Array, condition: Any = True) -> jax.Array:
    """`count + 1` where `condition` holds, stopping at the largest integer."""
    return jnp.where(condition, jnp.asarray(optax.safe_increment(count)), count)


def has_nonfinite(tree: Any) -> jax.Array:
    """Whether a floating entry is not finite."""
    # Stacked as they are: a chain of 1,000 conditions is slow to compile.
    leaves = [zero_or_nan(jnp.asarray(x)) for x in floating_leaves(tree)]
    return jnp.any(jnp.isnan(jnp.stack(leaves))) if leaves else jnp.zeros((), bool)


@jax.jit
def zero_or_nan(x: jax.Array) -> jax.Array:
    """Float32 0, or NaN if an entry is not finite.

    A sum, for XLA on CPU writes out the conditions of which it takes the conjunction. Jitted,
    so that leaves of one shape share one trace.
    """
    if jnp.iscomplexobj(x):
        return zero_or_nan(jnp.real(x)) + zero_or_nan(jnp.imag(x))
    return jnp.sum((x - x).astype(jnp.float32))


def is_bad_step(updates: Any, bounds: Any) -> jax.Array:
    """Whether a floating entry of `updates` is not finite, or a bound (one a leaf) NaN."""
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(bounds), strict=True)
    return has_nonfinite(updates) | has_nan([b for g, b in pairs if is_clippable(g)])


def has_nan(bounds: list[Any]) -> jax.Array:
    """Whether a bound is NaN; numbers are not: they were checked when the transform was made."""
    nan = [jnp.any(jnp.isnan(bound)) for bound in bounds if isinstance(bound, jax.Array)]
    return jnp.any(jnp.stack(nan)) if nan else jnp.zeros((), bool)


def compute_dtype(*dtypes: Any) -> Any:
    """Float32, or wider or complex if one of `dtypes` is: what leaf functions compute in."""
    is_wide = any(jnp.finfo(d).bits == 64 for d in dtypes)
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
        return jnp.complex128 if is_wide else jnp.complex64
    return jnp.float64 if is_wide else jnp.float32


def keep_weak_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, weakly typed if `like` is; both have the same shape and dtype."""
    if like.weak_type and not x.weak_type:
        return like.at[...].set(x)
    return x


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """Returns the rescale for an exponent's sign, and 1 for 0.

    It brings the largest and the smallest magnitudes to squares that neither overflow (for
    up to 2**50 entries) nor sink below the normal range.

    Args:
      exponent: Integers.
      dtype: Float32 or float64.

    Example:
      >>> float(power_of_two(jnp.int32(-1), jnp.float32)) == 2.0**-90
      True
    """
    power = 540 if dtype == jnp.float64 else 90
    rescale = jnp.where(exponent < 0, 2.0**-power, jnp.ones((), dtype))
    return jnp.where(exponent > 0, 2.0**power, rescale)


def rescale_for(largest: jax.Array) -> jax.Array:
    """Returns the power of two that suits numbers of which the largest is known.

    Args:
      largest: Float32 or float64, not negative.

    Example:
      >>> print(rescale_for(jnp.array([1.0, 0.0, 1e30])) > 1)
      [False  True False]
    """
    exponent = jnp.where(largest > 2.0**38, -1, jnp.where(largest < 2.0**-50, 1, 0))
    return power_of_two(exponent, largest.dtype)


def not_folded(leaves: Any) -> Any:
    """Returns the leaves as they are, about which XLA then knows nothing.

    Of a constant one, as the gradient of an unused parameter is, it would square the rescale
    by itself, and 0 * inf is NaN. And a scalar that many arrays of one shape are compared or
    multiplied with is kept apart for each: shared, it would be written to memory in that shape.

    Args:
      leaves: Pytree of arrays.

    Example:
      >>> not_folded([jnp.zeros(2)])
      [Array([0., 0.], dtype=float32)]
    """
    return lax.optimization_barrier(leaves)


def phase_and_modulus(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `z / |z|` and `|z|` of complex numbers, without overflow or underflow.

    Args:
      z: Complex array.

    Returns:
      `z / |z|` in the dtype of `z` (0 where z is 0 or not finite), and `|z|` in the real
      dtype (inf where it exceeds the dtype).

    Example:
      >>> unit, modulus = phase_and_modulus(jnp.array([3e38 + 3e38j, 0]))
      >>> print(jnp.round(unit, 3), modulus)
      [0.707+0.707j 0.   +0.j   ] [inf  0.]
    """
    largest = jnp.maximum(jnp.abs(jnp.real(z)), jnp.abs(jnp.imag(z)))
    # A power of two: XLA would merge two divisions into one by a product that overflows.
    rescale = rescale_for(largest)
    real, imag = jnp.real(z) * rescale, jnp.imag(z) * rescale
    ordinary = (largest > 0) & jnp.isfinite(largest)
    length = jnp.sqrt(jnp.where(ordinary, real * real + imag * imag, jnp.ones_like(real)))
    unit = jnp.where(ordinary, lax.complex(real / length, imag / length), jnp.zeros_like(z))
    return unit, jnp.where(ordinary, length / rescale, largest)


def quotient(x: jax.Array, by: jax.Array) -> jax.Array:
    """Returns `x / by` where XLA may multiply by a reciprocal instead.

    Above 2**126 the reciprocal of a float32 is subnormal, and flushed to 0.

    Args:
      x: float32 array.
      by: float32 array that broadcasts, not 0.

    Returns:
      A float32 array.

    Example:
      >>> print(quotient(jnp.array([3e38]), jnp.array([3e38])))
      [1.]
    """
    room = jnp.where(jnp.abs(by) > 1, jnp.float32(0.25), jnp.float32(1))
    return (x * room) / (by * room)


# --- Thresholds as given --------------------------------------------------------------


def round_toward_zero(value: ArrayLike, dtype: Any) -> Any:
    """Returns `value` in `dtype`, never larger in magnitude than it was given.

    Args:
      value: Real number or floating array. May be traced.
      dtype: A real floating dtype.

    Returns:
      An array of `dtype`: NumPy's if `value` is a Python or NumPy number, else jax's.
      Infinities stay. A Python or NumPy number beyond the dtype becomes inf (it bounds
      nothing there), an entry of a jax array its largest finite value. Derivatives are
      those of a cast.

    Example:
      >>> round_toward_zero(0.1, jnp.bfloat16)
      array(0.0996094, dtype=bfloat16)
    """
    dtype = jnp.dtype(dtype)
    if isinstance(value, (int, float, np.ndarray, np.generic)):
        return _round_concrete(np.asarray(value, np.float64), dtype)
    value = jnp.asarray(value)
    if value.dtype == jnp.float64 and dtype != jnp.float64:
        value = _to_float32(value)
    return _truncate(value, dtype) if dtype.itemsize < 4 else value.astype(dtype)


def _round_concrete(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    largest = float(jnp.finfo(dtype).max)
    bounded = np.where(np.abs(value) > largest, np.copysign(np.inf, value), value)
    rounded = np.asarray(bounded.astype(dtype))
    grew = np.abs(rounded.astype(np.float64)) > np.abs(bounded)
    return np.asarray(np.where(grew, np.nextafter(rounded, np.zeros((), dtype)), rounded))


@jax.custom_jvp
def _to_float32(value: jax.Array) -> jax.Array:
    """Float64 rounded towards zero."""
    finite = jnp.clip(value, -FLOAT32_MAX, FLOAT32_MAX)
    bounded = jnp.where(jnp.isinf(value), value, finite)
    rounded = bounded.astype(jnp.float32)
    grew = jnp.abs(rounded.astype(value.dtype)) > jnp.abs(value)
    return jnp.where(grew, jnp.nextafter(rounded, jnp.zeros_like(rounded)), rounded)


@_to_float32.defjvp
def _to_float32_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _to_float32(*primals), tangents[0].astype(jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _truncate(value: jax.Array, dtype: np.dtype) -> jax.Array:
    # By bits: XLA may keep a bfloat16 in float32 inside a fusion, so rounding first and
    # comparing afterwards can see a difference of zero.
    value = value.astype(jnp.float32)
    info = jnp.finfo(dtype)
    mask = np.uint32(0xFFFFFFFF & ~((1 << (23 - info.nmant)) - 1))
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    cut = lax.bitcast_convert_type(bits & mask, jnp.float32)
    if info.nexp < 8:
        ulp = np.float32(info.smallest_subnormal)
        inverse = np.float32(1 / float(info.smallest_subnormal))
        small = jnp.abs(value) < np.float32(info.tiny)
        cut = jnp.where(small, jnp.trunc(value * inverse) * ulp, cut)
        largest = np.float32(info.max)
        cut = jnp.where(jnp.isinf(value), value, jnp.clip(cut, -largest, largest))
    return jnp.where(jnp.isnan(value), value, cut).astype(dtype)


@_truncate.defjvp
def _truncate_jvp(
    dtype: np.dtype, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _truncate(*primals, dtype), tangents[0].astype(dtype)
