"""Clips relative to the weights: the norm of each unit, or the entries of each update.

The bound is a fraction of the weights' own size, plus something for weights of 0:

    norm(g) <= clipping * max(norm(w), eps)     or     |u| <= relative * |w| + absolute
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import as_float, compute_dtype, rescale_for
from jaxclip._core.trees import floating_leaves, is_clippable
from jaxclip.gradients.by_unit import UnitClipState, all_axes, clip_units
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.of_units import measure_units, unit_axes
from jaxclip.norms.scaling import bound_at
from jaxclip.thresholds.values import check_number_or_schedule


class AdaptiveGradClipState(UnitClipState):
    """State of `adaptive_grad_clip`; a unit is the weights into one output."""

    transform_name = "adaptive_grad_clip"


class ClipUpdateRelativeState(UnitClipState):
    """State of `clip_update_relative`; a unit is a leaf."""

    transform_name = "clip_update_relative"


def adaptive_grad_clip(
    clipping: ArrayLike | optax.Schedule,
    eps: ArrayLike = 1e-3,
    axis: int | Sequence[int] | None = None,
    *,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient of each unit relative to the norm of its weights (AGC).

    `g <- g * min(1, clipping * max(norm(w), eps) / norm(g))`, unit by unit: the weights into
    one output. Needs the parameters.

    Args:
      clipping: Number in [0, inf], traced scalar, or schedule: the largest ratio of the
        norms.
      eps: Lower bound on the norm of the weights, not negative, so that weights that start
        at 0 can move. May be traced.
      axis: Axes over which a unit's norm is taken, as in `norms.unit_norms`: for a
        kernel all but its output axis. None goes by the leaf's dimensions: the first axis
        of two or three, the first three of four (HWIO), all entries of a vector.
      axis_name: Mapped axis to take the norms over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are kept.
      The norm of each unit is at most its bound, up to the rounding of the weights' norm; units
      at or below it come back bit-identical; a bad step gives zeros.

    Raises:
      TypeError: If `clipping` or `eps` is of a wrong type.
      ValueError: If one is negative or NaN, `axis` out of range, or `update` gets no params.

    Example:
      >>> tx = adaptive_grad_clip(0.1)
      >>> w = jnp.array([[3.0, 0.0], [4.0, 1.0]])  # units of norm 5 and 1
      >>> g = jnp.array([[3.0, 0.05], [4.0, 0.0]])
      >>> print(tx.update(g, tx.init(w), w)[0].round(3))
      [[0.3  0.05]
       [0.4  0.  ]]

    References:
      Brock et al., High-Performance Large-Scale Image Recognition Without Normalization,
      2021, https://arxiv.org/abs/2102.06171
    """
    check_number_or_schedule("clipping", clipping)
    checks.check_nonnegative("eps", eps)
    axes_of = functools.partial(unit_axes, axis=axis)

    def terms_of(updates, params, step):
        weights = _weights_of(updates, params, "adaptive_grad_clip")
        units = [measure_units(w, axes_of(w.shape), axis_name=axis_name) for w in weights]
        ratio, least_norm = bound_at("clipping", clipping, step), as_float(eps)
        return [[ratio] * len(units), [least_norm] * len(units), units]

    return clip_units(AdaptiveGradClipState, axes_of, terms_of, _bound_of_weights, axis_name)


def clip_update_relative(
    relative: ArrayLike = 0.5, absolute: ArrayLike = 1e-2, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Bounds every update relative to its weight, by one coefficient per leaf (Clippy).

    `u <- u * min(1, min over entries of (relative * |w| + absolute) / |u|)`. For updates that
    the learning rate has scaled already: put it last in the chain, before a weight box.
    A leaf keeps its direction; one entry above its bound shrinks all of it.

    Args:
      relative: Fraction of a weight that a step may change, in [0, inf]. May be traced.
      absolute: Change that is allowed to every weight, in [0, inf], in the units of the weights.
        With 0, a leaf that has a weight of 0 does not move. May be traced.
      axis_name: Mapped axis over which leaves are split, inside `shard_map` or `pmap`.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are
      kept. Updates within their bounds come back bit-identical; a bad step gives zeros.

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If one is negative or NaN, or `update` gets no params.

    Example:
      >>> tx = clip_update_relative(0.5, 0.1)
      >>> w, u = jnp.array([1.0, 0.0]), jnp.array([-1.2, 0.1])
      >>> print(tx.update(u, tx.init(w), w)[0].round(3))
      [-0.6   0.05]

    References:
      Tang et al., Improving Training Stability for Multitask Ranking Models in Recommender
      Systems, 2023, https://arxiv.org/abs/2302.09178
    """
    checks.check_threshold("relative", relative)
    checks.check_threshold("absolute", absolute)

    def terms_of(updates, params, step):
        del step
        weights = _weights_of(updates, params, "clip_update_relative")
        pairs = zip(floating_leaves(updates), weights, strict=True)
        bounds = as_float(relative), as_float(absolute)
        terms = [_coefficient(jnp.asarray(u), w, *bounds, axis_name) for u, w in pairs]
        return [[coef for coef, _ in terms], [rescale for _, rescale in terms]]

    return clip_units(ClipUpdateRelativeState, all_axes, terms_of, _bound_by_coefficient, axis_name)


def _weights_of(updates: optax.Updates, params: optax.Params, name: str) -> list[jax.Array]:
    """Returns the weights of the floating updates; raises, naming the transform, without them."""
    checks.check_params_given(name, params)
    checks.check_same_structure("updates", updates, "params", params)
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
    return [jnp.asarray(w) for u, w in pairs if is_clippable(u)]


def _bound_of_weights(
    norm: RescaledNorm, ratio: jax.Array, least_norm: jax.Array, weights: RescaledNorm
) -> jax.Array:
    """Returns `ratio * max(norm of the weights, least_norm)`; NaN where these are not finite."""
    dtype = norm.norm.dtype
    ratio, least_norm = ratio.astype(dtype), least_norm.astype(dtype)
    size, rescale = weights.norm.astype(dtype), weights.rescale.astype(dtype)
    bound = jnp.maximum(ratio * size / rescale, ratio * least_norm)
    bound = jnp.where(jnp.isinf(ratio), jnp.inf, bound)
    return jnp.where(jnp.isfinite(size), bound, jnp.nan)


@functools.partial(jax.jit, static_argnums=4)  # leaves of one shape share one trace
def _coefficient(
    u: jax.Array, w: jax.Array, relative: ArrayLike, absolute: ArrayLike, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the coefficient of a leaf over a power of two, and that power."""
    dtype = jnp.finfo(compute_dtype(u.dtype, w.dtype)).dtype
    relative_bound = jnp.maximum(jnp.asarray(relative).astype(dtype), 0)
    absolute_bound = jnp.maximum(jnp.asarray(absolute).astype(dtype), 0)
    # Halves, whose modulus never overflows.
    half_w = jnp.abs(w * jnp.asarray(0.5, w.dtype)).astype(dtype)
    half_u = jnp.abs(u * jnp.asarray(0.5, u.dtype)).astype(dtype)
    # An infinite multiple of a weight of 0 is no bound either, not NaN.
    is_free = jnp.isinf(relative_bound)
    allowed = jnp.where(is_free, relative_bound, relative_bound * half_w) + absolute_bound / 2
    # Over a power of two, because the coefficient of a huge update is below the normal range.
    largest = _largest(half_u, axis_name)
    rescale = jnp.minimum(rescale_for(largest), 1)
    ratio = jnp.where(half_u > allowed, allowed / (half_u * rescale), 1 / rescale)
    # Sums, because a minimum may lose a NaN: 0, or NaN if an entry is not finite.
    zero_or_nan = jnp.sum(0 * half_u) + jnp.sum(0 * half_w)
    has_nan_bound = jnp.isnan(relative_bound) | jnp.isnan(absolute_bound)
    zero_or_nan = jnp.where(has_nan_bound, jnp.nan, zero_or_nan)
    smallest = jnp.minimum(jnp.min(ratio, initial=jnp.inf), 1 / rescale)
    if axis_name is not None:
        smallest = lax.pmin(smallest, axis_name)
        zero_or_nan = lax.psum(zero_or_nan, axis_name)
    return smallest + zero_or_nan, rescale


def _largest(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the largest of non-negative entries, on all devices of the axis."""
    largest = jnp.max(x, initial=0)
    return largest if axis_name is None else lax.pmax(largest, axis_name)


def _bound_by_coefficient(norm: RescaledNorm, coef: jax.Array, rescale: jax.Array) -> jax.Array:
    """Returns `coef * rescale` of the norm; inf where that is 1."""
    dtype = norm.norm.dtype
    coef, rescale = coef.astype(dtype), rescale.astype(dtype)
    bound = norm.norm * coef * (rescale / norm.rescale)
    return jnp.where(coef * rescale == 1, jnp.inf, bound)
