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

from jaxclip._core.floats import compute_dtype, not_folded

_ORDERS = (1, 2, 1.0, 2.0, float("inf"))


def _root(total: jax.Array, ord: float) -> jax.Array:
    return jnp.sqrt(total) if ord == 2 else total


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
