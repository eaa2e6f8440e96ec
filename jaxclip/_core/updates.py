"""Updates after which the rounded sum with the weights is in a set, not only near it.

`optax.apply_updates` rounds `w + u`. An update to a point of a set, `target - w`, is rounded
itself, and so is its sum with `w`: of the weights that should end on a bound, some end beyond
it. Here the sum is looked at as it will be rounded, and the update corrected by an ulp.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxclip._core.floats import (
    compute_dtype,
    exceeds,
    keep_weak_type,
    phase_and_modulus,
    round_toward_zero,
)


def is_unbounded(bound: Any) -> bool:
    """Returns whether a resolved threshold bounds nothing, and is known to.

    Args:
      bound: A leaf of what `resolve_threshold` returns.

    Example:
      >>> is_unbounded(float("inf")), is_unbounded(2.0)
      (True, False)
    """
    return isinstance(bound, float) and bound == float("inf")


def bound_in(bound: Any, w: jax.Array) -> jax.Array:
    """Returns a bound in the real dtype of `w`; a traced NaN bounds nothing.

    Args:
      bound: A leaf of what `resolve_threshold` returns.
      w: The array that it bounds.

    Example:
      >>> bound_in(0.1, jnp.zeros(3, jnp.bfloat16))
      Array(0.0996094, dtype=bfloat16)
    """
    bound = jnp.asarray(round_toward_zero(bound, jnp.finfo(w.dtype).dtype))
    return jnp.where(jnp.isnan(bound), jnp.full_like(bound, jnp.inf), bound)


def clip_modulus(w: jax.Array, bound: Any) -> jax.Array:
    """Returns weights of modulus at most `bound`: `min(max(w, -bound), bound)` of real ones.

    Args:
      w: Floating array.
      bound: As in `bound_in`; broadcasts against `w`.

    Returns:
      An array like `w`; entries within the bound are untouched. NaN stays NaN.

    Example:
      >>> clip_modulus(jnp.array([-2.0, 0.3]), 0.5)
      Array([-0.5,  0.3], dtype=float32)
    """
    if is_unbounded(bound):
        return w
    bound = bound_in(bound, w)
    if jnp.iscomplexobj(w):
        unit, modulus = phase_and_modulus(w)
        eps = jnp.finfo(bound.dtype).eps  # the modulus itself is rounded
        inside = (bound * (1 - 4 * eps)).astype(w.dtype)
        is_outside = (modulus >= bound * (1 - 2 * eps)) & jnp.isfinite(bound)
        return keep_weak_type(jnp.where(is_outside, unit * inside, w), w)
    # Not as a minimum and a maximum: those flush subnormals inside the box to zero.
    clipped = jnp.where(exceeds(w, bound), jnp.where(w < 0, -bound, bound), w)
    return keep_weak_type(clipped, w)


def update_within(u: jax.Array, w: Any, bound: Any) -> jax.Array:
    """Returns an update `v` in the dtype of `u` with `|round(w + v)| <= bound`.

    Args:
      u: The update that is asked for.
      w: The weights, of the same shape.
      bound: As in `bound_in`; broadcasts against `w`.

    Returns:
      An array like `u`, equal to it where nothing is bounded.

    Example:
      >>> update_within(jnp.array([1.0, 0.125]), jnp.array([0.25, 0.25]), 0.5)
      Array([0.25 , 0.125], dtype=float32)
    """
    if is_unbounded(bound):
        return u
    w = jnp.asarray(w)
    bound = bound_in(bound, w)
    correct = _complex_update if jnp.iscomplexobj(w) else _real_update
    # Where nothing is bounded the update stays as it is: w + u may overflow.
    return keep_weak_type(jnp.where(jnp.isinf(bound), u, correct(u, w, bound)), u)


def _real_update(u: jax.Array, w: jax.Array, bound: jax.Array) -> jax.Array:
    wide = compute_dtype(w.dtype, u.dtype)
    target = clip_modulus((w.astype(wide) + u.astype(wide)).astype(w.dtype), bound)
    return update_between(u, w, target, -bound, bound)


def update_between(
    u: jax.Array, w: jax.Array, target: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """Returns the update to a target, corrected by an ulp where the sum is rounded outside.

    Args:
      u: Floating array, whose dtype is taken.
      w: The weights, real.
      target: Where they shall be, in their dtype and between the bounds.
      low: Lower bound in their dtype.
      high: Upper bound in their dtype.

    Returns:
      A finite array of the dtype of `u`, where the others are finite. The sum is within the
      bounds for certain where these are no closer than the spacing of numbers like
      `target - w` in the dtype of `u`, elsewhere as near as one update can bring it.

    Example:
      >>> w, low, high = jnp.array([0.7]), jnp.float32(0.0), jnp.float32(0.1)
      >>> print(w + update_between(w, w, jnp.array([0.1]), low, high) <= 0.1)
      [ True]
    """
    largest = jnp.finfo(u.dtype).max
    v = jnp.clip(update_to(target, u, w), -largest, largest)
    wide = compute_dtype(w.dtype, u.dtype)
    first, last, start = (x.astype(wide) for x in (low, high, w))

    def after(v: jax.Array) -> jax.Array:
        return _rounded(start + v.astype(wide), w.dtype)

    def beyond(x: jax.Array) -> jax.Array:
        return jnp.maximum(x - last, first - x)

    moved = after(v)
    less = jnp.nextafter(v, jnp.full_like(v, -jnp.inf))
    more = jnp.nextafter(v, jnp.full_like(v, jnp.inf))
    corrected = jnp.where(moved > last, less, jnp.where(moved < first, more, v))
    # A single ulp may lead from one side of a narrow box to the other, and further away.
    return jnp.where(beyond(after(corrected)) <= beyond(moved), corrected, v)


def update_to(target: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
    """Returns `target - w`, computed in float32 or wider, in the dtype of `u`.

    Args:
      target: Where the weights shall be.
      u: Floating array, whose dtype is taken.
      w: The weights.

    Example:
      >>> update_to(jnp.array([0.5]), jnp.zeros(1, jnp.bfloat16), jnp.array([2.0]))
      Array([-1.5], dtype=bfloat16)
    """
    wide = compute_dtype(w.dtype, u.dtype)
    return (target.astype(wide) - w.astype(wide)).astype(u.dtype)


def _complex_update(u: jax.Array, w: jax.Array, bound: jax.Array) -> jax.Array:
    """An update to a point as far inside the circle as its sum with `w` may be rounded."""
    wide = compute_dtype(w.dtype, u.dtype)
    moved = w.astype(wide) + u.astype(wide)
    unit, modulus = phase_and_modulus(moved)
    half = w.astype(wide) * 0.5 + u.astype(wide) * 0.5  # in case the sum overflows
    unit = jnp.where(jnp.isfinite(moved), unit, phase_and_modulus(half)[0])
    eps = max(float(jnp.finfo(w.dtype).eps), float(jnp.finfo(u.dtype).eps))
    radius = bound * (1 - 4 * eps) - phase_and_modulus(w)[1] * (2 * eps)
    radius = jnp.maximum(radius, 0).astype(modulus.dtype)
    target = jnp.where(modulus > radius, unit * radius.astype(wide), moved)
    return (target - w.astype(wide)).astype(u.dtype)


def rounded_sum(w: jax.Array, v: jax.Array) -> jax.Array:
    """Returns `w + v` as `optax.apply_updates` rounds it, safe from XLA's excess precision.

    Args:
      w: Floating array, whose dtype is taken.
      v: Floating array of the same shape.

    Example:
      >>> rounded_sum(jnp.array([1.0], jnp.bfloat16), jnp.array([1e-3], jnp.bfloat16))
      Array([1], dtype=bfloat16)
    """
    wide = compute_dtype(w.dtype, v.dtype)
    total = w.astype(wide) + v.astype(wide)
    if jnp.iscomplexobj(total):
        parts = (_rounded(part, w.dtype) for part in (jnp.real(total), jnp.imag(total)))
        return lax.complex(*parts).astype(w.dtype)
    return _rounded(total, w.dtype).astype(w.dtype)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Real numbers rounded to those that a dtype has, in the dtype that they are in."""
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, info.nexp, info.nmant)
    tiny = float(info.tiny)
    if float(jnp.finfo(x.dtype).tiny) == tiny:
        return rounded
    # `reduce_precision` has no subnormals; those of the dtype are normal here, an ulp apart.
    ulp = tiny * float(info.eps)
    return jnp.where(jnp.abs(x) < tiny, jnp.round(x * (1 / ulp)) * ulp, rounded)
