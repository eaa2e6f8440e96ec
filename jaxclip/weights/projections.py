"""Projections: from an array to the nearest one of a set, for weights that have to stay there.

A `Projection` is a value, like a threshold: `max_norm(2.0)` is the set of arrays whose units
have a norm of at most 2, and calling it projects an array. `constraints.project_weights` and
`constraints.constrain` keep parameters in such sets while they are trained; the sets with a
bound for each entry are in `jaxclip.boxes`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.floats import compute_dtype, keep_weak_type, phase_and_modulus, round_toward_zero
from jaxclip._core.updates import is_unbounded, rounded_sum, update_to, update_within
from jaxclip.norms.magnitudes import accumulator
from jaxclip.norms.of_units import rescaled_unit_norm, unit_axes
from jaxclip.norms.scaling import Scaling, scale_leaf, scaling_to
from jaxclip.norms.singular_values import cap_leaf
from jaxclip.thresholds.values import check_one_threshold, resolve_threshold

# Over which axes a norm is taken; None for a unit by flax's layouts, ... for the whole leaf.
_Axis = int | Sequence[int] | EllipsisType | None


@dataclasses.dataclass(frozen=True)
class Projection:
    """A callable `array -> nearest array of a set`, made by a factory.

    A set of one's own needs a subclass with `project`; it has to leave alone what is in the
    set already.
    """

    def __call__(self, array: ArrayLike, step: Any = None) -> jax.Array:
        """Returns the projection of `array`, of the same shape, dtype and weak type.

        Args:
          array: Floating array; others are returned as they are.
          step: Scalar integer for schedules; 0 if not given.
        """
        array = jnp.asarray(array)
        if not trees.is_clippable(array):
            return array
        return self.project("", array, jnp.zeros((), jnp.int32) if step is None else step)

    def project(self, path: str, w: jax.Array, step: ArrayLike) -> jax.Array:
        """Returns the projection of the leaf at `path`."""
        raise TypeError(f"{type(self).__name__} must define `project`.")

    def correct(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        """Returns the update to the projection of `w + u`; `u` where that is in the set.

        Their sum is rounded, so it is in the set but for the rounding of `w`, of the update
        and of the sum. The projections of this package that can do better do.
        """
        moved = rounded_sum(w, u)
        target = self.project(path, moved, step)
        return keep_weak_type(jnp.where(target == moved, u, update_to(target, u, w)), u)


def max_norm(max_norm: Any, axis: _Axis = None) -> Projection:
    """Makes the projection onto arrays whose units have a norm of at most `max_norm`.

    `w <- w * min(1, max_norm / norm(w))`, unit by unit.

    Args:
      max_norm: Number in [0, inf], traced scalar, schedule, rule, or an array with a number
        for each unit, in the units of the weights. A traced NaN bounds nothing.
      axis: Axes over which a unit's norm is taken, as in `norms.unit_norms`: None for the
        weights into one output by flax's layouts, and the whole of a vector; `...` for all
        axes, so one norm a leaf.

    Returns:
      A `Projection`, right for every finite input. What it scales has a norm of at most
      `max_norm` in exact arithmetic, half precision included, and about 1e-6 below; a unit
      whose norm comes out, in float32, at or below `max_norm` is bit-identical. A unit with a
      NaN or an infinity is left alone. Complex entries count by their modulus.

      As a constraint, after `optax.apply_updates`: the same, if the updates are of the
      weights' dtype or finer; coarser ones add up to their rounding of the weights' norm.

    Raises:
      TypeError: If `max_norm` is of a wrong type.
      ValueError: If it is negative or NaN, or does not have one value a unit; if `axis` is
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
    return _MaxNorm(max_norm, axis)


def unit_norm(axis: _Axis = None) -> Projection:
    """Makes the projection onto arrays whose units have a norm of 1.

    `w <- w / norm(w)`, unit by unit.

    Args:
      axis: As in `max_norm`.

    Returns:
      A `Projection`, right for every finite input. Norms come out as 1 up to the rounding of
      the entries: within 1e-6 in float32, one epsilon in half precision. A unit of zeros has no
      direction and stays zero; one with a NaN or an infinity is left alone.

      As a constraint, after `optax.apply_updates`: the same, and the rounding of an update
      that is much larger than 1, if weights start far away.

    Raises:
      ValueError: If `axis` is out of range for a leaf.

    Example:
      >>> print(unit_norm()(jnp.array([3.0, 4.0])).round(3), unit_norm()(jnp.zeros(2)))
      [0.6 0.8] [0. 0.]
    """
    return _UnitNorm(axis)


def spectral_cap(
    max_singular_value: Any, steps: int | None = None, *, stacked_axes: int | None = None
) -> Projection:
    """Makes the projection onto matrices with singular values of at most `max_singular_value`.

    `U diag(s) V^H <- U diag(min(s, c)) V^H`, by matrix products alone: softly, see `steps`.
    A leaf of more than two dimensions is one matrix, its last axis against all others; leaves
    of fewer than two are left alone.

    Args:
      max_singular_value: Number in [0, inf], traced scalar, schedule, or rule; one number a
        leaf.
      steps: Rounds of each of the two matrix signs, at least 1; None is 12. What they buy is
        said in `spectra.cap_singular_values`, which this is.
      stacked_axes: Leading axes that number separate matrices; None is 0.

    Returns:
      A `Projection`. At 12 steps no singular value comes out above the cap by more than 1e-6
      of it, besides the rounding of half precision. Matrices whose Frobenius norm is at or
      below the cap are bit-identical; one with a NaN or an infinity does not become finite.

      As a constraint, after `optax.apply_updates`: the same, and the rounding of the sum, at
      most the dtype's epsilon times the Frobenius norm of the weights.

    Raises:
      TypeError: If `max_singular_value` is of a wrong type.
      ValueError: If it is negative or NaN, or has several values for a leaf; if `steps` or
        `stacked_axes` is not an integer in range.

    Example:
      >>> print(spectral_cap(2.0)(jnp.diag(jnp.array([5.0, 1.0]))).round(3))
      [[2. 0.]
       [0. 1.]]

    References:
      As of `spectra.clip_by_spectral_norm`.
    """
    check_one_threshold("max_singular_value", max_singular_value)
    if steps is not None:
        checks.check_count("steps", steps)
    num_stacked = 0 if stacked_axes is None else stacked_axes
    if num_stacked != 0:
        checks.check_count("stacked_axes", num_stacked)
    return _SpectralCap(max_singular_value, steps, num_stacked)


# --- The projections ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _MaxNorm(Projection):
    max_norm: Any
    axis: _Axis

    def project(self, path: str, w: jax.Array, step: ArrayLike) -> jax.Array:
        bound, axes = self._given(path, w, step)
        return w if is_unbounded(bound) else keep_weak_type(_to_norm(w, bound, axes), w)

    def correct(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        bound, axes = self._given(path, w, step)
        return u if is_unbounded(bound) else keep_weak_type(_update_to_norm(u, w, bound, axes), u)

    def _given(self, path: str, w: jax.Array, step: ArrayLike) -> tuple[Any, tuple[int, ...]]:
        """The bound of each unit, and the axes of a unit."""
        bound = resolve_threshold(self.max_norm, {path: w}, step)[path]
        axes = _axes_of(path, w, self.axis)
        if np.ndim(bound) and any(np.shape(bound)[a] != 1 for a in axes):
            raise ValueError(
                f"max_norm must have one value a unit; at '{path}' it has shape "
                f"{np.shape(bound)} for norms over the axes {axes} of {w.shape}."
            )
        is_number = is_unbounded(bound) or isinstance(bound, jax.Array)
        return bound if is_number else round_toward_zero(bound, accumulator([w])), axes


# Jitted, so that leaves of one shape share one trace.


@functools.partial(jax.jit, static_argnums=2)
def _to_norm(w: jax.Array, bound: ArrayLike, axes: tuple[int, ...]) -> jax.Array:
    return _scaled(w, _scaling(w, bound, axes))


@functools.partial(jax.jit, static_argnums=3)
def _update_to_norm(
    u: jax.Array, w: jax.Array, bound: ArrayLike, axes: tuple[int, ...]
) -> jax.Array:
    moved = rounded_sum(w, u)
    scaling = _scaling(moved, bound, axes)
    target = _scaled(moved, scaling)
    size = phase_and_modulus(target)[1] if jnp.iscomplexobj(target) else jnp.abs(target)
    # No entry is larger than that of the projection, so neither is a norm.
    return update_within(u, w, jnp.where(scaling.is_scaled, size, jnp.inf))


def _scaling(w: jax.Array, bound: ArrayLike, axes: tuple[int, ...]) -> Scaling:
    scaling, clip = scaling_to(rescaled_unit_norm(w, axes), bound)
    return scaling._replace(is_scaled=scaling.is_scaled & ~clip.is_bad)


@dataclasses.dataclass(frozen=True)
class _UnitNorm(Projection):
    axis: _Axis

    def project(self, path: str, w: jax.Array, step: ArrayLike) -> jax.Array:
        norm, rescale = rescaled_unit_norm(w, _axes_of(path, w, self.axis))
        has_direction = (norm > 0) & jnp.isfinite(norm)
        coef = 1 / jnp.where(has_direction, norm, jnp.ones_like(norm))
        real = jnp.finfo(compute_dtype(w.dtype)).dtype

        def scale(x: jax.Array) -> jax.Array:  # to nearest: no side of 1 is the safe one
            return x.astype(real) * rescale * coef

        is_complex = jnp.iscomplexobj(w)
        unit = lax.complex(scale(jnp.real(w)), scale(jnp.imag(w))) if is_complex else scale(w)
        return keep_weak_type(jnp.where(has_direction, unit.astype(w.dtype), w), w)


@dataclasses.dataclass(frozen=True)
class _SpectralCap(Projection):
    max_singular_value: Any
    steps: int | None
    num_stacked: int

    def project(self, path: str, w: jax.Array, step: ArrayLike) -> jax.Array:
        cap = resolve_threshold(self.max_singular_value, {path: w}, step)[path]
        if is_unbounded(cap):
            return w
        return cap_leaf("max_singular_value", path, w, cap, self.steps, self.num_stacked).capped


# --- Parts ----------------------------------------------------------------------------


def _axes_of(path: str, w: jax.Array, axis: _Axis) -> tuple[int, ...]:
    if axis is ...:
        return tuple(range(w.ndim))
    try:
        return unit_axes(w.shape, axis)
    except ValueError as error:
        raise ValueError(f"at '{path}': {error}") from error


def _scaled(w: jax.Array, scaling: Scaling) -> jax.Array:
    return scale_leaf(w, scaling, jnp.zeros((), bool))
