"""Norms as two factors, so that no square overflows or underflows.

    norm = norm_of_rescaled / rescale,        rescale in {2**-k, 1, 2**k}

Ordinary magnitudes have a rescale of 1. Multiplying by a power of two is exact. Squares of
numbers of at most 32 bits are summed in float64, in one pass, whether or not jax has it switched
on. TPUs, which lack float64, and sums of float64 take a second pass if the first one overflows.
"""

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxclip._core.floats import FLOAT32_MAX, compute_dtype, not_folded, select

ORDERS = (1, 2, 1.0, 2.0, float("inf"))


def root_of_total(total: jax.Array, ord: float) -> jax.Array:
    """Returns the norm from the result of `rescaled_total`: its square root for `ord=2`."""
    return jnp.sqrt(total) if ord == 2 else total


class RescaledNorm(NamedTuple):
    """Norms as two factors, `norm / rescale`, that cannot overflow or underflow.

    Attributes:
      norm: Norm of the array times `rescale`.
      rescale: Power of two, of the same shape; 1 for ordinary magnitudes.
    """

    norm: jax.Array
    rescale: jax.Array

    def value(self) -> jax.Array:
        """Returns the norm as one number, inf if it exceeds the dtype."""
        return self.norm / self.rescale


def accumulator(leaves: Sequence[jax.Array]) -> type[np.generic]:
    """Returns the dtype to sum in: float32, or float64 if a leaf is float64."""
    is_wide = any(jnp.finfo(x.dtype).bits == 64 for x in leaves)
    return jnp.float64 if is_wide else jnp.float32


# --- In float64 -----------------------------------------------------------------------


def uses_float64(dtype: DTypeLike) -> bool:
    """Returns True if numbers of a dtype are summed in float64."""
    # Jax before 0.8 has no such switch for a part of a program, and takes the way of TPUs.
    is_possible = jax.default_backend() != "tpu" and hasattr(jax, "enable_x64")
    return is_possible and jnp.finfo(dtype).bits < 64


def with_float64() -> AbstractContextManager:
    """Returns a context in which jax keeps float64, if any is used."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=(1, 2))  # leaves of one shape share one trace
def wide_total(x: jax.Array, axes: tuple[int, ...], ord: float) -> jax.Array:
    """Returns the sum over `axes` of `|x|**ord`, or its largest for `ord=inf`, in float64."""
    with with_float64():
        return _total([p.astype(jnp.float64) for p in _real_parts(x)], axes, ord)


def root_of_wide_total(total: jax.Array, ord: float) -> RescaledNorm:
    """Returns float32 norms from float64 totals; not a number where these are not."""
    with with_float64():
        most, least = _ordinary_totals(jnp.float32, ord)
        small = jnp.full_like(total, 2.0**-90 if ord == 2 else 1.0)
        inverse = select(total < least, small, jnp.ones_like(total))
        inverse = select(total > most, jnp.full_like(total, 2.0**90), inverse)
        # Both end in a division or a root: XLA copies a cheaper operation on many totals into
        # all who use it.
        rescale = 1 / inverse
        powers = total * rescale * rescale if ord == 2 else total * rescale
        norm = root_of_total(powers.astype(jnp.float32), ord)
        return RescaledNorm(norm, rescale.astype(jnp.float32))


def wide_roots(totals: jax.Array, ord: float) -> tuple[jax.Array, jax.Array]:
    """Returns float32 norms of at most the largest float32, and the total, from float64 totals."""
    with with_float64():
        # Ends in a root or a division: XLA makes a sum of joined scalars one kernel with as many
        # operands, and copies cheaper operations on them into all who use the result.
        roots = jnp.sqrt(totals) if ord == 2 else totals / not_folded(jnp.ones_like(totals[0]))
        total = jnp.sum(roots * roots if ord == 2 else roots)
        total = total if ord < np.inf else largest_of(roots)
        norms = select(jnp.isfinite(roots), jnp.minimum(roots, FLOAT32_MAX), roots)
        return norms.astype(jnp.float32), total


def better_exponent(totals: jax.Array, ord: float) -> jax.Array:
    """Returns -1 for a total that overflowed, 1 if it may have underflowed, else 0 (also NaN)."""
    most, least = _ordinary_totals(totals.dtype, ord)
    exponent = jnp.where(totals > most, jnp.int32(-1), jnp.int32(0))
    return jnp.where(totals < least, jnp.int32(1), exponent) if ord == 2 else exponent


def _ordinary_totals(dtype: DTypeLike, ord: float) -> tuple[float, float]:
    """Returns the range of totals that need no rescaling in a dtype."""
    info = jnp.finfo(dtype)
    # For the other norms well within the range, so that `1 / norm` is normal too.
    most = float(info.max) if ord == 2 else 2.0 ** (info.maxexp // 2)
    least = 2.0**-800 if info.bits == 64 else 2.0**-64
    return most, least if ord == 2 else 0.0


# --- In the dtype of the input, rescaled ----------------------------------------------


@functools.partial(jax.jit, static_argnums=(2, 3))  # leaves of one shape share one trace
def rescaled_total(
    x: jax.Array, rescale: jax.Array, axes: tuple[int, ...], ord: float
) -> jax.Array:
    """Returns the sum over `axes` of `|x * rescale|**ord`, or its largest for `ord=inf`."""
    x, rescale = not_folded((x, rescale))
    return _total([p.astype(rescale.dtype) * rescale for p in _real_parts(x)], axes, ord)


def _real_parts(x: jax.Array) -> list[jax.Array]:
    return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def _total(parts: list[jax.Array], axes: tuple[int, ...], ord: float) -> jax.Array:
    """Returns the sum over `axes` of the moduli to a power, or the largest modulus."""
    if ord == 2:
        squares = [jnp.square(p) for p in parts]
        powers = squares[0] if len(parts) == 1 else squares[0] + squares[1]
    else:
        powers = jnp.abs(parts[0]) if len(parts) == 1 else jnp.hypot(*parts)
    if ord < np.inf:
        return jnp.sum(powers, axis=axes, keepdims=True)
    return largest_of(powers, axes, keepdims=True)


def largest_of(
    x: jax.Array, axes: tuple[int, ...] | None = None, *, keepdims: bool = False
) -> jax.Array:
    """Returns the largest of non-negative numbers: NaN if one is NaN, 0 if there are none."""
    # A maximum alone may lose a NaN: XLA on CPU does (jaxlib 0.10.2, from 4,096 float32 on).
    # A sum does not, and an infinity adds 0 to this one.
    nan = jnp.sum(0 / (1 + x), axis=axes, keepdims=keepdims)
    return jnp.max(x, axis=axes, keepdims=keepdims, initial=0) + nan


def over_devices(totals: jax.Array, ord: float, axis_name: str | None) -> jax.Array:
    """Returns the sum of totals over a mapped axis, or their largest for `ord=inf`."""
    if axis_name is None:
        return totals
    if ord < np.inf:
        return lax.psum(totals, axis_name)
    return lax.pmax(totals, axis_name) + lax.psum(0 / (1 + totals), axis_name)  # see `largest_of`


def change_of_norm(x: jax.Array, dx: jax.Array, norm: RescaledNorm, ord: float) -> jax.Array:
    """Returns each entry's contribution to the change of the rescaled norm if `x` moves by `dx`."""
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
