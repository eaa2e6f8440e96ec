"""Boxes: sets with a lower and an upper bound for every entry."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import keep_weak_type, phase_and_modulus, round_toward_zero
from jaxclip._core.updates import (
    bound_in,
    clip_modulus,
    is_unbounded,
    rounded_sum,
    update_between,
    update_within,
)
from jaxclip.thresholds.rules import ThresholdRule
from jaxclip.thresholds.values import (
    check_number_or_schedule,
    check_one_threshold,
    resolve_threshold,
)
from jaxclip.weights.projections import Projection


class Box(Projection):
    """A projection that bounds each entry for itself, so that an entry may be on a bound."""

    def side(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        """Returns the outward direction where `w + u` is on a bound or beyond, 0 elsewhere."""
        raise TypeError(f"{type(self).__name__} must define `side`.")


def box(low: Any, high: Any = None) -> Box:
    """Makes the projection onto arrays with entries in `[low, high]`, or in `[-low, low]`.

    `w <- min(max(w, low), high)`. With one argument it is the box of `clip_weights`.

    Args:
      low: The lower bound: number in [-inf, inf), traced scalar, or schedule, in the units
        of the weights. Given alone, the half-width of the box: number in [0, inf], traced
        scalar, schedule, rule such as `fan_in(1.0)`, or an array that broadcasts.
      high: The upper bound: number in (-inf, inf], traced scalar, or schedule.

    Returns:
      A `Projection`. Bounds hold as given: they are rounded inwards into each leaf's dtype;
      where that leaves no number between them, entries are at the upper one. Entries beyond a
      bound are on it exactly, the others are untouched (subnormals, too, but for a
      bound of 0 on both sides). NaN stays NaN; a traced NaN bounds nothing; a traced
      `low > high` gives `high`. Complex entries are bounded by their modulus, which takes the
      form with one argument.

      As a constraint, after `optax.apply_updates`: within the bounds, perhaps an ulp inside,
      wherever an update leads there. From inside one does, and from outside, too, if the
      updates are of the weights' dtype, or one that has all its numbers, and 0 is between the
      bounds. Elsewhere the bounds may be closer than the spacing of updates as large as the
      step to them, or that step too large: a weight then ends as near as one update can bring
      it, and the next steps go on from there.

    Raises:
      TypeError: If a bound is of a wrong type; when it is used, if there are two bounds for a
        complex leaf.
      ValueError: If a concrete bound is NaN, `low` alone is negative, or `low > high`.

    Example:
      >>> w = jnp.array([-2.0, 0.3, 5.0])
      >>> print(box(-1.0, 2.0)(w), box(0.5)(w))
      [-1.   0.3  2. ] [-0.5  0.3  0.5]
    """
    if high is None:
        check_one_threshold("low", low)
        return _Modulus(low)
    for name, bound, never in (("low", low, np.inf), ("high", high, -np.inf)):
        if isinstance(bound, ThresholdRule):
            raise TypeError(f"{name} must not be a rule; give one rule alone: box({name}).")
        check_number_or_schedule(name, bound, functools.partial(checks.check_bound, never=never))
    numbers = [x for x in (low, high) if not callable(x) and not isinstance(x, jax.Array)]
    if len(numbers) == 2 and low > high:
        raise ValueError(f"low must not be above high, got {low!r} and {high!r}.")
    return _Interval(low, high)


def nonnegative() -> Box:
    """Makes the projection onto arrays without negative entries.

    `w <- max(w, 0)`.

    Returns:
      A `Projection`, `box(0.0, inf)`: the same promises. -0 is left alone.

    Raises:
      TypeError: When it is used, for a complex leaf.

    Example:
      >>> print(nonnegative()(jnp.array([-2.0, 3.0])))
      [0. 3.]
    """
    return _Interval(0.0, float("inf"))


@dataclasses.dataclass(frozen=True)
class _Modulus(Box):
    threshold: Any

    def _bound(self, path: str, w: jax.Array, step: ArrayLike) -> Any:
        return resolve_threshold(self.threshold, {path: w}, step)[path]

    def project(self, path: str, w: jax.Array, step: ArrayLike) -> jax.Array:
        return clip_modulus(w, self._bound(path, w, step))

    def correct(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        return update_within(u, w, self._bound(path, w, step))

    def side(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        bound, moved = self._bound(path, w, step), rounded_sum(w, u)
        if is_unbounded(bound):
            return jnp.zeros_like(w)
        bound = bound_in(bound, w)
        if not jnp.iscomplexobj(w):
            return jnp.where(jnp.abs(moved) >= bound, jnp.sign(moved), jnp.zeros_like(w))
        unit, modulus = phase_and_modulus(moved)
        near = bound * (1 - 8 * jnp.finfo(bound.dtype).eps)
        return jnp.where(modulus >= near, unit, jnp.zeros_like(unit))


@dataclasses.dataclass(frozen=True)
class _Interval(Box):
    low: Any
    high: Any

    def project(self, path: str, w: jax.Array, step: ArrayLike) -> jax.Array:
        return keep_weak_type(_clip_between(w, *self._bounds(path, w, step)), w)

    def correct(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        low, high = self._bounds(path, w, step)
        moved = rounded_sum(w, u)
        target = _clip_between(moved, low, high)
        v = update_between(u, w, target, low, high)
        return keep_weak_type(jnp.where(target == moved, u, v), u)

    def side(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        low, high = self._bounds(path, w, step)
        moved, one = rounded_sum(w, u), jnp.ones_like(w)
        below = jnp.where(moved <= low, -one, jnp.zeros_like(w))
        return jnp.where(moved >= high, one, below)

    def _bounds(self, path: str, w: jax.Array, step: ArrayLike) -> tuple[jax.Array, jax.Array]:
        if jnp.iscomplexobj(w):
            raise TypeError(
                f"complex numbers have no order: '{path}' of dtype {w.dtype} needs a box with one "
                "argument, which bounds the modulus."
            )
        low: Any = self.low(step) if callable(self.low) else self.low
        high: Any = self.high(step) if callable(self.high) else self.high
        low, high = -_round_down(-low, w.dtype), _round_down(high, w.dtype)
        return jnp.minimum(low, high), high


def _round_down(bound: Any, dtype: Any) -> jax.Array:
    """The largest number of `dtype` that is not above an upper bound; inf for NaN."""
    if isinstance(bound, jax.Array):
        near = round_toward_zero(bound, dtype)
        wide = jnp.float64 if bound.dtype == jnp.float64 else jnp.float32
        is_above = near.astype(wide) > bound.astype(wide)
        near = jnp.where(is_above, jnp.nextafter(near, jnp.full_like(near, -jnp.inf)), near)
    else:  # in NumPy, since jax would compare in float32
        bound = np.maximum(np.asarray(bound, np.float64), -float(jnp.finfo(dtype).max))
        near = round_toward_zero(bound, dtype)
        with np.errstate(over="ignore"):
            below = np.nextafter(near, np.asarray(-np.inf, dtype))
        near = jnp.asarray(np.where(near.astype(np.float64) > bound, below, near))
    return jnp.where(jnp.isnan(near), jnp.full_like(near, jnp.inf), near)


def _clip_between(w: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    # Not as a minimum and a maximum: those flush subnormals to zero.
    key, lowest, highest = (_order(x) for x in (w, low, high))
    clipped = jnp.where(key > highest, high, jnp.where(key < lowest, low, w))
    return jnp.where(jnp.isnan(w), w, clipped)


def _order(x: jax.Array) -> jax.Array:
    """Integers in the order of the numbers, -0 and 0 alike; subnormals are told apart."""
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    largest = jnp.iinfo(bits.dtype).max
    # Without comparing with 0, which XLA on CPU would do as with numbers.
    sign = bits >> jnp.asarray(8 * x.dtype.itemsize - 1, bits.dtype)
    return ((bits & jnp.asarray(largest, bits.dtype)) ^ sign) - sign
