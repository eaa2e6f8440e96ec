"""Projections: from an array to the nearest array of a set.

A `Projection` is a value, like a threshold: `max_norm(2.0)` is the set of arrays whose units
have a norm of at most 2, and calling it projects an array. `project_weights` keeps parameters
in such a set while they are trained. Sets with a bound for each entry are in `boxes`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from types import EllipsisType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.floats import compute_dtype, keep_weak_type, phase_and_modulus, round_toward_zero
from jaxclip._core.trees import PyTree
from jaxclip._core.updates import is_unbounded, rounded_sum, update_to, update_within
from jaxclip.norms.magnitudes import accumulator
from jaxclip.norms.of_units import rescaled_unit_norm, unit_axes
from jaxclip.norms.scaling import Scaling, scale_leaf, scaling_to
from jaxclip.norms.singular_values import cap_leaf
from jaxclip.thresholds.rules import Bound, ThresholdRule
from jaxclip.thresholds.values import check_one_threshold, resolve_threshold

# The axes over which a norm is taken; None for a unit by flax's layouts, ... for the whole leaf.
_Axis: TypeAlias = int | Sequence[int] | EllipsisType | None


@dataclasses.dataclass(frozen=True)
class Projection:
    """A callable `array -> nearest array of a set`, made by a factory.

    A subclass defines `project`, which must not change arrays that are in the set already.

    Attributes:
      threshold: The size of the set, resolved before `project` and `correct` see it.
    """

    threshold: PyTree = float("inf")

    def __call__(self, array: ArrayLike, step: ArrayLike | None = None) -> jax.Array:
        """Returns the projection of `array`, of the same shape, dtype and weak type.

        Args:
          array: Floating array; others are returned unchanged.
          step: Scalar integer for schedules; 0 if not given.
        """
        checks.refuse_step("the projection", array, "an array of weights")
        array = jnp.asarray(array)
        if not trees.is_clippable(array):
            return array
        step = jnp.zeros((), jnp.int32) if step is None else step
        bound = resolve_threshold(self.threshold, array, step)
        return self.at_step(step).project("", array, bound)

    def at_step(self, step: ArrayLike) -> "Projection":
        """Returns the projection with its schedules replaced by values, except in `threshold`."""
        del step
        return self

    def project(self, path: str, w: jax.Array, bound: Bound) -> jax.Array:
        """Returns the projection of the leaf at `path`."""
        raise TypeError(f"{type(self).__name__} must define `project`.")

    def correct(self, path: str, u: jax.Array, w: jax.Array, bound: Bound) -> jax.Array:
        """Returns the update to the projection of `w + u`; `u` where that is in the set."""
        # In the set up to the rounding of `w`, of the update and of their sum. Projections that
        # can do better override this method.
        moved = rounded_sum(w, u)
        target = self.project(path, moved, bound)
        return keep_weak_type(jnp.where(target == moved, u, update_to(target, u, w)), u)


@checks.refuses_step
def max_norm(
    max_norm: ArrayLike | optax.Schedule | ThresholdRule, axis: _Axis = None
) -> Projection:
    """Makes the projection onto arrays whose units have a norm of at most `max_norm`.

    `w <- w * min(1, max_norm / norm(w))`, unit by unit.

    Args:
      max_norm: Number in [0, inf], traced scalar, schedule, rule, or an array with a number
        for each unit, in the units of the weights. A traced NaN bounds nothing.
      axis: Axes over which a unit's norm is taken, as in `norms.unit_norms`: None for the
        weights into one output by flax's layouts, and the whole of a vector; `...` for all
        axes, so one norm per leaf.

    Returns:
      A `Projection`, right for every finite input. A unit that it scales has a norm of at most
      `max_norm` in exact arithmetic, in half precision too, and about 1e-6 below. A unit
      whose float32 norm is at or below `max_norm` is bit-identical. A unit with a NaN or an
      infinity is left unchanged. Complex entries count by their modulus.

      In `project_weights`: the same, if the updates are of the weights' dtype or finer;
      with coarser ones the norm may be above by up to their rounding.

    Raises:
      TypeError: If `max_norm` is of a wrong type.
      ValueError: If it is negative or NaN, or does not have one value per unit; if `axis` is
        out of range for a leaf.

    Example:
      >>> print(max_norm(1.0)(jnp.array([[3.0, 0.6], [4.0, 0.0]])).round(3))
      [[0.6 0.6]
       [0.8 0. ]]

    References:
      Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting,
      2014, https://jmlr.org/papers/v15/srivastava14a.html (max-norm regularization).
    """
    check_one_threshold("max_norm", max_norm)
    return _MaxNorm(threshold=max_norm, axis=axis)


@checks.refuses_step
def unit_norm(axis: _Axis = None) -> Projection:
    """Makes the projection onto arrays whose units have a norm of 1.

    `w <- w / norm(w)`, unit by unit.

    Args:
      axis: Axes over which a unit's norm is taken, as in `max_norm`.

    Returns:
      A `Projection`, right for every finite input. Norms are 1 up to the rounding of the
      entries: within 1e-6 in float32, one epsilon in half precision. A unit of zeros has no
      direction and stays zero; one with a NaN or an infinity is left unchanged.

      In `project_weights`: the same, plus the rounding of an update that is much larger than 1,
      if weights start far away.

    Raises:
      ValueError: If `axis` is out of range for a leaf.

    Example:
      >>> print(unit_norm()(jnp.array([3.0, 4.0])).round(3), unit_norm()(jnp.zeros(2)))
      [0.6 0.8] [0. 0.]
    """
    return _UnitNorm(axis=axis)


@checks.refuses_step
def spectral_cap(
    max_singular_value: ArrayLike | optax.Schedule | ThresholdRule,
    steps: int | None = None,
    *,
    stacked_axes: int | None = None,
) -> Projection:
    """Makes the projection onto matrices with singular values of at most `max_singular_value`.

    `U diag(s) V^H <- U diag(min(s, c)) V^H`, by matrix products alone; the accuracy depends on
    `steps`. A leaf of more than two dimensions is one matrix: its last axis is the columns, all
    others are the rows. Leaves of fewer than two dimensions are left unchanged.

    Args:
      max_singular_value: Number in [0, inf], traced scalar, schedule, or rule; one number per
        leaf.
      steps: Rounds of each of the two matrix signs, at least 1; None is 12.
        `norms.singular_values.cap_singular_values` states the accuracy.
      stacked_axes: Number of leading axes that stack separate matrices; None is 0.

    Returns:
      A `Projection`. At 12 steps no singular value exceeds the cap by more than 1e-6 of it,
      apart from the rounding of half precision. Matrices whose Frobenius norm is at or
      below the cap are bit-identical; one with a NaN or an infinity does not become finite.

      In `project_weights`: the same, plus the rounding of the sum, at most the dtype's epsilon
      times the Frobenius norm of the weights.

    Raises:
      TypeError: If `max_singular_value` is of a wrong type.
      ValueError: If it is negative or NaN, or has several values for a leaf; if `steps` or
        `stacked_axes` is not an integer in range.

    Example:
      >>> print(spectral_cap(2.0)(jnp.diag(jnp.array([5.0, 1.0]))).round(3))
      [[2. 0.]
       [0. 1.]]

    References:
      See `gradients.clip_by_spectral_norm`.
    """
    check_one_threshold("max_singular_value", max_singular_value)
    if steps is not None:
        checks.check_count("steps", steps)
    num_stacked = 0 if stacked_axes is None else stacked_axes
    checks.check_count("stacked_axes", num_stacked, at_least=0)
    return _SpectralCap(threshold=max_singular_value, steps=steps, num_stacked=num_stacked)


# --- The projections ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _MaxNorm(Projection):
    axis: _Axis = None

    def project(self, path: str, w: jax.Array, bound: Bound) -> jax.Array:
        axes = _axes_of(path, w, self.axis)
        if is_unbounded(bound):
            return w
        return keep_weak_type(_to_norm(w, _norm_bound(path, w, bound, axes), axes), w)

    def correct(self, path: str, u: jax.Array, w: jax.Array, bound: Bound) -> jax.Array:
        axes = _axes_of(path, w, self.axis)
        if is_unbounded(bound):
            return u
        return keep_weak_type(_update_to_norm(u, w, _norm_bound(path, w, bound, axes), axes), u)


def _norm_bound(path: str, w: jax.Array, bound: Bound, axes: tuple[int, ...]) -> ArrayLike:
    """Returns the bound of each unit's norm, a number in the dtype that norms are taken in."""
    if np.ndim(bound) and any(np.shape(bound)[a] != 1 for a in axes):
        raise ValueError(
            f"max_norm must have one value per unit; at {path!r} it has shape "
            f"{np.shape(bound)} for norms over the axes {axes} of {w.shape}."
        )
    return bound if isinstance(bound, jax.Array) else round_toward_zero(bound, accumulator([w]))


# Jitted, so that leaves of one shape share one trace.


@functools.partial(jax.jit, static_argnums=2)
def _to_norm(w: jax.Array, bound: ArrayLike, axes: tuple[int, ...]) -> jax.Array:
    return scale_leaf(w, _scaling(w, bound, axes))


@functools.partial(jax.jit, static_argnums=3)
def _update_to_norm(
    u: jax.Array, w: jax.Array, bound: ArrayLike, axes: tuple[int, ...]
) -> jax.Array:
    moved = rounded_sum(w, u)
    scaling = _scaling(moved, bound, axes)
    target = scale_leaf(moved, scaling)
    size = phase_and_modulus(target)[1] if jnp.iscomplexobj(target) else jnp.abs(target)
    # No entry is larger than that of the projection, so neither is a norm.
    return update_within(u, w, jnp.where(scaling.keeps_bits, jnp.inf, size))


def _scaling(w: jax.Array, bound: ArrayLike, axes: tuple[int, ...]) -> Scaling:
    """Returns the scaling of units down to a bound; those that are not finite stay."""
    scaling, clip = scaling_to(rescaled_unit_norm(w, axes), bound)
    return scaling._replace(
        keeps_bits=scaling.keeps_bits | clip.is_bad, is_bad=jnp.zeros_like(clip.is_bad)
    )


@dataclasses.dataclass(frozen=True)
class _UnitNorm(Projection):
    axis: _Axis = None

    def project(self, path: str, w: jax.Array, bound: Bound) -> jax.Array:
        norm, rescale = rescaled_unit_norm(w, _axes_of(path, w, self.axis))
        has_direction = (norm > 0) & jnp.isfinite(norm)
        coef = 1 / jnp.where(has_direction, norm, jnp.ones_like(norm))
        real = jnp.finfo(compute_dtype(w.dtype)).dtype

        def scale(x: jax.Array) -> jax.Array:  # rounded to nearest: neither side of 1 is safer
            return x.astype(real) * rescale * coef

        is_complex = jnp.iscomplexobj(w)
        unit = lax.complex(scale(jnp.real(w)), scale(jnp.imag(w))) if is_complex else scale(w)
        return keep_weak_type(jnp.where(has_direction, unit.astype(w.dtype), w), w)


@dataclasses.dataclass(frozen=True)
class _SpectralCap(Projection):
    steps: int | None = None
    num_stacked: int = 0

    def project(self, path: str, w: jax.Array, bound: Bound) -> jax.Array:
        if is_unbounded(bound):
            return w
        return cap_leaf("max_singular_value", path, w, bound, self.steps, self.num_stacked).capped


# --- Parts ----------------------------------------------------------------------------


def _axes_of(path: str, w: jax.Array, axis: _Axis) -> tuple[int, ...]:
    if axis is ...:
        return tuple(range(w.ndim))
    try:
        return unit_axes(w.shape, axis)
    except ValueError as error:
        raise ValueError(f"at {path!r}: {error}") from error
