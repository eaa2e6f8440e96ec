"""Boxes: sets with a lower and an upper bound for every entry.

`box(t)` is `[-t, t]`, complex entries by their modulus; `box(low, high)` is for real ones.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core import checks
from jaxclip._core.floats import in_whole_bytes, keep_weak_type, round_toward_zero, widest_bound
from jaxclip._core.trees import PyTree
from jaxclip._core.updates import clip_modulus, rounded_sum, update_between, update_within
from jaxclip.thresholds.rules import Bound, ThresholdRule
from jaxclip.thresholds.values import check_number_or_schedule, check_threshold_tree
from jaxclip.weights.projections import Projection


@checks.refuses_step
def box(low: PyTree, high: ArrayLike | optax.Schedule | None = None) -> Projection:
    """Makes the projection onto arrays with entries in `[low, high]`, or in `[-low, low]`.

    `w <- min(max(w, low), high)`. With one argument it is the box of `clip_weights`.

    Args:
      low: The lower bound: number in [-inf, inf), traced scalar, or schedule, in the units
        of the weights. Given alone, the threshold of `clip_weights`: number in [0, inf],
        traced scalar, array that broadcasts, schedule, rule such as `fan_in(1.0)`, or a
        prefix tree of these.
      high: The upper bound: number in (-inf, inf], traced scalar, or schedule.

    Returns:
      A `Projection`. Bounds hold as given: they are rounded inwards into each leaf's dtype;
      where that leaves no number between them, entries are at the upper one. Entries beyond a
      bound end on it exactly; the others keep their bits (subnormals too, except with a
      bound of 0 on both sides). NaN stays NaN; a traced NaN bounds nothing; a traced
      `low > high` gives `high`. Complex entries are bounded by their modulus and need the
      form with one argument.

      In `project_weights`: weights inside the bounds stay inside, but may end an ulp short of a
      bound. Weights outside are brought in if 0 is between the bounds and the updates have the
      weights' dtype, or one that contains it. In other cases the spacing of the updates may be
      wider than the box: the weight then ends as near as one update can bring it, and the next
      steps continue from there.

    Raises:
      TypeError: If a bound is of a wrong type; when it is used, if a complex leaf meets two
        bounds.
      ValueError: If a concrete bound is NaN, `low` alone is negative, or `low > high`; when
        it is used, if an array or a prefix tree does not fit.

    Example:
      >>> w = jnp.array([-2.0, 0.3, 5.0])
      >>> print(box(-1.0, 2.0)(w), box(0.5)(w))
      [-1.   0.3  2. ] [-0.5  0.3  0.5]
    """
    if high is None:
        check_threshold_tree("low", low)
        return _Box(threshold=low)
    for name, bound, never in (("low", low, np.inf), ("high", high, -np.inf)):
        if isinstance(bound, ThresholdRule):
            raise TypeError(f"{name} must not be a rule; give one rule alone: box({name}).")
        check_number_or_schedule(name, bound, functools.partial(checks.check_bound, never=never))
    numbers = [x for x in (low, high) if not callable(x) and not isinstance(x, jax.Array)]
    if len(numbers) == 2 and low > high:
        raise ValueError(f"low must not be above high, got {low!r} and {high!r}.")
    return _Interval(low=low, high=high)


@checks.refuses_step
def nonnegative() -> Projection:
    """Makes the projection onto arrays without negative entries.

    `w <- max(w, 0)`.

    Returns:
      The `Projection` `box(0.0, inf)`. -0 stays -0.

    Raises:
      TypeError: When it is used, for a complex leaf.

    Example:
      >>> print(nonnegative()(jnp.array([-2.0, 3.0])))
      [0. 3.]
    """
    return box(0.0, float("inf"))


@dataclasses.dataclass(frozen=True)
class _Box(Projection):
    def project(self, path: str, w: jax.Array, bound: Bound) -> jax.Array:
        return clip_modulus(w, bound)

    def correct(self, path: str, u: jax.Array, w: jax.Array, bound: Bound) -> jax.Array:
        return update_within(u, w, bound)


@dataclasses.dataclass(frozen=True)
class _Interval(Projection):
    low: ArrayLike | optax.Schedule = 0.0
    high: ArrayLike | optax.Schedule = 0.0

    def at_step(self, step: ArrayLike) -> Projection:
        low = checks.value_at("low", self.low, step)
        high = checks.value_at("high", self.high, step)
        return _Interval(low=low, high=high)

    def project(self, path: str, w: jax.Array, bound: Bound) -> jax.Array:
        return keep_weak_type(_clip_between(w, *self._ends(path, w)), w)

    def correct(self, path: str, u: jax.Array, w: jax.Array, bound: Bound) -> jax.Array:
        low, high = self._ends(path, w)
        moved = rounded_sum(w, u)
        target = _clip_between(moved, low, high)
        v = update_between(u, w, target, low, high)
        return keep_weak_type(jnp.where(target == moved, u, v), u)

    def _ends(self, path: str, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the bounds in the dtype of `w`, rounded inwards."""
        if jnp.iscomplexobj(w):
            raise TypeError(
                f"complex numbers have no order: {path!r} of dtype {w.dtype} needs a box with one "
                "argument, which bounds the modulus."
            )
        low: Any = self.low
        low, high = -_round_down(-low, w.dtype), _round_down(self.high, w.dtype)
        return jnp.minimum(low, high), high


def _round_down(bound: Any, dtype: DTypeLike) -> jax.Array:
    """Returns the largest number of `dtype` that is not above an upper bound; inf for NaN."""
    if isinstance(bound, jax.Array):
        near = round_toward_zero(bound, dtype)
        wide = jnp.float64 if bound.dtype == jnp.float64 else jnp.float32
        is_above = near.astype(wide) > bound.astype(wide)
        near = jnp.where(is_above, jnp.nextafter(near, jnp.full_like(near, -jnp.inf)), near)
    else:  # in NumPy, because jax would compare in float32
        bound = np.maximum(np.asarray(bound, np.float64), -float(jnp.finfo(dtype).max))
        near = round_toward_zero(bound, dtype)
        with np.errstate(over="ignore"):
            below = np.nextafter(near, np.asarray(-np.inf, dtype))
        near = jnp.asarray(np.where(near.astype(np.float64) > bound, below, near))
    return jnp.where(jnp.isnan(near), jnp.full_like(near, widest_bound(near.dtype)), near)


def _clip_between(w: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    # Not as a minimum and a maximum: those flush subnormals to zero.
    key, lowest, highest = (_order(x) for x in (w, low, high))
    clipped = jnp.where(key > highest, high, jnp.where(key < lowest, low, w))
    return jnp.where(jnp.isnan(w), w, clipped)


def _order(x: jax.Array) -> jax.Array:
    """Returns integers in the order of the numbers: -0 and 0 are equal, subnormals differ."""
    x = in_whole_bytes(x)
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
    largest = jnp.iinfo(bits.dtype).max
    # Not by comparing with 0, which XLA on CPU would do as with numbers.
    sign = bits >> jnp.asarray(8 * x.dtype.itemsize - 1, bits.dtype)
    return ((bits & jnp.asarray(largest, bits.dtype)) ^ sign) - sign
