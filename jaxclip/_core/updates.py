"""Updates whose rounded sum with the weights is in a set, not only near it.

`optax.apply_updates` rounds `w + u`. An update to a point of a set, `target - w`, is itself
rounded, and so is its sum with `w`: some weights that should end on a bound end beyond it.
The functions here compute the sum as it will be rounded, and correct the update by an ulp.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core.floats import (
    compute_dtype,
    exceeds,
    is_normal,
    keep_weak_type,
    phase_and_modulus,
    round_toward_zero,
    saturate,
    select,
    widest_bound,
)


def is_unbounded(bound: ArrayLike) -> bool:
    """Returns True if the bound is known to be infinite (not traced)."""
    return isinstance(bound, float) and bound == float("inf")


def bound_in(bound: ArrayLike, w: jax.Array) -> jax.Array | np.ndarray:
    """Returns a bound in the real dtype of `w`; a traced NaN bounds nothing."""
    limit = round_toward_zero(bound, jnp.finfo(w.dtype).dtype)
    if isinstance(limit, np.ndarray):  # a number, which is not NaN
        return limit
    return jnp.where(jnp.isnan(limit), jnp.full_like(limit, widest_bound(limit.dtype)), limit)


def bounds_nothing(bound: jax.Array | np.ndarray) -> Any:
    """Returns True where a bound in its leaf's dtype is no less than every number of it."""
    return bound == widest_bound(bound.dtype)


def clip_modulus(w: jax.Array, bound: ArrayLike) -> jax.Array:
    """Clips weights to modulus `bound`; those within it keep their bits, and NaN stays NaN."""
    if is_unbounded(bound):
        return w
    bound = bound_in(bound, w)
    return _clip_leaf(w, bound, is_normal(bound))


def clip_leaf(w: jax.Array, bound: jax.Array, is_normal: bool) -> jax.Array:
    """Returns the weights with modulus at most a bound in their real dtype."""
    if jnp.iscomplexobj(w):
        phase, modulus = phase_and_modulus(w)
        eps = jnp.finfo(bound.dtype).eps  # the modulus itself is rounded
        inside = (bound * (1 - 4 * eps)).astype(w.dtype)
        is_outside = (modulus >= bound * (1 - 2 * eps)) & jnp.isfinite(bound)
        return keep_weak_type(jnp.where(is_outside, phase * inside, w), w)
    # Not as a minimum and a maximum, nor by comparing with both bounds, of which LLVM makes the
    # same: those flush subnormals inside the box to zero.
    limit = bound if bound.ndim else jnp.full_like(w, bound)
    is_outside = jnp.abs(w) > limit if is_normal else exceeds(w, bound)
    return keep_weak_type(select(is_outside, select(w < 0, -limit, limit), w), w)


_clip_leaf = jax.jit(clip_leaf, static_argnums=2)  # leaves of one shape share one trace


def clip_sum(w: jax.Array, bound: ArrayLike) -> jax.Array:
    """Returns `clip_modulus` of a sum, in which a backend that flushes subnormals left none."""
    limit = None if is_unbounded(bound) else bound_in(bound, w)
    is_plain = jnp.issubdtype(w.dtype, jnp.floating) and jnp.finfo(w.dtype).bits >= 16
    if limit is None or limit.ndim or not (is_plain and is_normal(limit)):
        return clip_modulus(w, bound)
    return keep_weak_type(lax.clamp(-limit, w, limit), w)


def update_within(u: jax.Array, w: ArrayLike, bound: ArrayLike) -> jax.Array:
    """Returns an update `v` like `u` with `|round(w + v)| <= bound`."""
    if is_unbounded(bound):
        return u
    w = jnp.asarray(w)
    bound = jnp.asarray(bound_in(bound, w))
    correct = _complex_update if jnp.iscomplexobj(w) else _real_update
    # Where nothing is bounded the update keeps its bits: w + u may overflow.
    return keep_weak_type(jnp.where(bounds_nothing(bound), u, correct(u, w, bound)), u)


def _real_update(u: jax.Array, w: jax.Array, bound: jax.Array) -> jax.Array:
    wide = compute_dtype(w.dtype, u.dtype)
    moved = saturate(w.astype(wide) + u.astype(wide), w.dtype).astype(w.dtype)
    target = clip_modulus(moved, bound)
    return update_between(u, w, target, -bound, bound)


def update_between(
    u: jax.Array, w: jax.Array, target: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """Returns `target - w`, corrected by an ulp where its sum with `w` is rounded outside."""
    # The sum is certain to be within the bounds if these are at least an ulp of `target - w` apart
    # in the dtype of `u`; otherwise it is as near as one update can bring it.
    v = saturate(update_to(target, u, w), u.dtype)
    wide = compute_dtype(w.dtype, u.dtype)
    low, high, start = low.astype(wide), high.astype(wide), w.astype(wide)

    def after(v: jax.Array) -> jax.Array:
        return _rounded(start + v.astype(wide), w.dtype)

    def excess(x: jax.Array) -> jax.Array:
        return jnp.maximum(x - high, low - x)

    moved = after(v)
    largest = jnp.full_like(v, jnp.finfo(v.dtype).max)  # not inf, which some formats lack
    less, more = jnp.nextafter(v, -largest), jnp.nextafter(v, largest)
    corrected = jnp.where(moved > high, less, jnp.where(moved < low, more, v))
    # A single ulp may lead from one side of a narrow box to the other, and further away.
    return jnp.where(excess(after(corrected)) <= excess(moved), corrected, v)


def update_to(target: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
    """Returns `target - w`, computed in float32 or wider, in the dtype of `u`."""
    wide = compute_dtype(w.dtype, u.dtype)
    return (target.astype(wide) - w.astype(wide)).astype(u.dtype)


def _complex_update(u: jax.Array, w: jax.Array, bound: jax.Array) -> jax.Array:
    """Returns an update to a point inside the circle, with a margin for the rounding of the sum."""
    wide = compute_dtype(w.dtype, u.dtype)
    moved = w.astype(wide) + u.astype(wide)
    phase, modulus = phase_and_modulus(moved)
    half = w.astype(wide) * 0.5 + u.astype(wide) * 0.5  # in case the sum overflows
    phase = jnp.where(jnp.isfinite(moved), phase, phase_and_modulus(half)[0])
    eps = max(float(jnp.finfo(w.dtype).eps), float(jnp.finfo(u.dtype).eps))
    radius = bound * (1 - 4 * eps) - phase_and_modulus(w)[1] * (2 * eps)
    radius = jnp.maximum(radius, 0).astype(modulus.dtype)
    target = jnp.where(modulus > radius, phase * radius.astype(wide), moved)
    return (target - w.astype(wide)).astype(u.dtype)


def rounded_sum(w: jax.Array, v: jax.Array) -> jax.Array:
    """Returns `w + v` as `optax.apply_updates` rounds it, safe from XLA's excess precision."""
    wide = compute_dtype(w.dtype, v.dtype)
    total = w.astype(wide) + v.astype(wide)
    if jnp.iscomplexobj(total):
        parts = (_rounded(part, w.dtype) for part in (jnp.real(total), jnp.imag(total)))
        return lax.complex(*parts).astype(w.dtype)
    return _rounded(total, w.dtype).astype(w.dtype)


def _rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rounds real numbers to those of another dtype, but keeps their own dtype."""
    info, wide = jnp.finfo(dtype), jnp.finfo(x.dtype)
    # With the exponents of x: an 8-bit format may have others than its number of bits suggests.
    rounded = lax.reduce_precision(x, wide.nexp, info.nmant)
    tiny = float(info.tiny)
    if float(wide.tiny) == tiny:
        return rounded
    beyond = jnp.copysign(jnp.asarray(widest_bound(dtype), x.dtype), x)
    rounded = jnp.where(jnp.abs(rounded) > float(info.max), beyond, rounded)
    # `reduce_precision` has no subnormals; those of the dtype are normal here, an ulp apart.
    ulp = tiny * float(info.eps)
    return jnp.where(jnp.abs(x) < tiny, jnp.round(x * (1 / ulp)) * ulp, rounded)
