"""Magnitudes as two factors, so that no square overflows or underflows.

    size = size_of_rescaled / rescale,        rescale in {2**-k, 1, 2**k}

Ordinary magnitudes have a rescale of 1. Multiplying by a power of two is exact.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._checks import compute_dtype

__all__ = [
    "RescaledNorm",
    "accumulator",
    "change_of_norm",
    "largest_of",
    "not_folded",
    "over_devices",
    "power_of_two",
    "quotient",
    "rescale_for",
    "rescaled_total",
    "unit_and_modulus",
]


class RescaledNorm(NamedTuple):
    """Norms as two factors, `norm / rescale`, that cannot overflow or underflow.

    Attributes:
      norm: Array, the norm of what was measured times `rescale`.
      rescale: Powers of two, of the same shape; 1 for ordinary magnitudes.
    """

    norm: jax.Array
    rescale: jax.Array

    def value(self) -> jax.Array:
        """The norm as one number: inf if it exceeds the dtype."""
        return self.norm / self.rescale


def accumulator(leaves: list[jax.Array]) -> Any:
    """Returns the dtype to add up in: float32, or float64 if a leaf is.

    Args:
      leaves: Floating arrays.

    Example:
      >>> accumulator([jnp.zeros(2, jnp.bfloat16)]).__name__
      'float32'
    """
    is_wide = any(jnp.finfo(x.dtype).bits == 64 for x in leaves)
    return jnp.float64 if is_wide else jnp.float32


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


@functools.partial(jax.jit, static_argnums=(2, 3))
def rescaled_total(
    x: jax.Array, rescale: jax.Array, axes: tuple[int, ...], ord: float
) -> jax.Array:
    """Returns the sum of `|x * rescale|**ord`, or for `ord=inf` the largest.

    Jitted, so that leaves of one shape share one trace.

    Args:
      x: Floating array.
      rescale: In the dtype to add up in; broadcasts against `x`.
      axes: What to reduce over; dimensions are kept.
      ord: 1, 2 or inf.

    Example:
      >>> rescaled_total(jnp.array([3.0, 4.0]), jnp.float32(1), (0,), 2)
      Array([25.], dtype=float32)
    """
    x, rescale = not_folded((x, rescale))
    parts = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
    parts = [p.astype(rescale.dtype) * rescale for p in parts]
    if ord == 2:
        squares = [jnp.square(p) for p in parts]
        each = squares[0] if len(parts) == 1 else squares[0] + squares[1]
    else:
        each = jnp.abs(parts[0]) if len(parts) == 1 else jnp.hypot(*parts)
    if ord < np.inf:
        return jnp.sum(each, axis=axes, keepdims=True)
    return largest_of(each, axes, keepdims=True)


def largest_of(
    x: jax.Array, axes: tuple[int, ...] | None = None, *, keepdims: bool = False
) -> jax.Array:
    """Returns the largest of numbers that are not negative: NaN if one is, 0 if there is none.

    A maximum alone may lose a NaN: XLA on CPU does (jaxlib 0.10.2, from 4,096 float32 on).

    Args:
      x: Floating array without negative numbers.
      axes: What to reduce over; None for all.
      keepdims: Whether to keep these as axes of length 1.

    Example:
      >>> print(largest_of(jnp.array([1.0, jnp.nan, jnp.inf])), largest_of(jnp.array([2.0, 3.0])))
      nan 3.0
    """
    # A sum does not lose it; infinity adds 0.
    nan = jnp.sum(0 / (1 + x), axis=axes, keepdims=keepdims)
    return jnp.max(x, axis=axes, keepdims=keepdims, initial=0) + nan


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


def over_devices(totals: jax.Array, ord: float, axis_name: str | None) -> jax.Array:
    """Returns totals added up, or their largest, over a mapped axis.

    Args:
      totals: As `rescaled_total` gives them.
      ord: 1, 2 or inf.
      axis_name: The axis; None for none.

    Example:
      >>> jax.vmap(lambda x: over_devices(x, 2, "x"), axis_name="x")(jnp.array([1.0, 2.0]))
      Array([3., 3.], dtype=float32)
    """
    if axis_name is None:
        return totals
    if ord < np.inf:
        return lax.psum(totals, axis_name)
    return lax.pmax(totals, axis_name) + lax.psum(0 / (1 + totals), axis_name)  # as `largest_of`


def change_of_norm(x: jax.Array, dx: jax.Array, norm: RescaledNorm, ord: float) -> jax.Array:
    """Returns what each entry adds to the change of the rescaled norm when x changes by dx.

    Args:
      x: Floating array.
      dx: Its change, of the same shape.
      norm: The norm that it is part of; broadcasts against `x`.
      ord: 1, 2 or inf; which norm.

    Example:
      >>> x, norm = jnp.array([3.0, 4.0]), RescaledNorm(jnp.float32(5), jnp.float32(1))
      >>> print(change_of_norm(x, jnp.ones(2), norm, 2))
      [0.6 0.8]
    """
    wide = compute_dtype(x.dtype)
    rescale = norm.rescale.astype(wide)
    scaled = jnp.conj(x.astype(wide)) * rescale
    if ord == 2:
        slope = scaled / jnp.where(norm.norm > 0, norm.norm, 1).astype(wide)
    else:
        modulus = jnp.abs(scaled)
        slope = scaled / jnp.where(modulus > 0, modulus, 1).astype(wide)
        slope = slope if ord == 1 else slope * (modulus == norm.norm).astype(wide)
    return jnp.real(slope * (dx.astype(wide) * rescale)).astype(norm.norm.dtype)


def unit_and_modulus(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `z / |z|` and `|z|` of complex numbers, without overflow or underflow.

    Args:
      z: Complex array.

    Returns:
      `z / |z|` in the dtype of `z` (0 where z is 0 or not finite), and `|z|` in the real
      dtype (inf where it exceeds the dtype).

    Example:
      >>> unit, modulus = unit_and_modulus(jnp.array([3e38 + 3e38j, 0]))
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
