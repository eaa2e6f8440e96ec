"""Clips relative to the weights: adaptive gradient clipping, and updates by their share."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks, floats, trees
from jaxclip._core.floats import round_toward_zero
from jaxclip.gradients.by_unit import _all_axes, _State, _unit_clip
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.of_units import measure_units, unit_axes
from jaxclip.thresholds.values import check_number_or_schedule


class AdaptiveGradClipState(_State):
    """State of `adaptive_grad_clip`; a unit is what `axis` says."""


class ClipUpdateRelativeState(_State):
    """State of `clip_update_relative`; a unit is a leaf."""


def adaptive_grad_clip(
    clipping: Any,
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
      eps: The least norm that weights count with, not negative, so that weights that start
        at 0 can move. May be traced.
      axis: The axes over which a unit's norm is taken, as in `norms.unit_norms`: for a
        kernel all but its output axis. None goes by the leaf's dimensions: the first axis
        of two or three, the first three of four (HWIO), all entries of a vector.
      axis_name: As in `clip_by_leaf_norm`.

    Returns:
      A transform, as `clip_by_leaf_norm`.

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
    schedule: Any = clipping if callable(clipping) else lambda step: clipping
    checks.check_nonnegative("eps", eps)
    axes_of = functools.partial(unit_axes, axis=axis)

    def terms_for(updates, params, step):
        checks.check_params_given("adaptive_grad_clip", params)
        checks.check_same_structure("updates", updates, "params", params)
        ratio = jnp.maximum(jnp.asarray(round_toward_zero(schedule(step), jnp.float32)), 0)
        least = jnp.asarray(eps)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
        weights = [jnp.asarray(w) for g, w in pairs if trees.is_clippable(g)]
        units = [measure_units(w, axes_of(w.shape), axis_name=axis_name) for w in weights]
        return [[ratio] * len(units), [least] * len(units), units]

    return _unit_clip(AdaptiveGradClipState, axes_of, terms_for, _bound_of_weights, axis_name)


def clip_update_relative(
    relative: ArrayLike = 0.5, absolute: ArrayLike = 1e-2, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Bounds every update relative to its weight, by one coefficient a leaf (Clippy).

    `u <- u * min(1, min over entries of (relative * |w| + absolute) / |u|)`. For updates that
    the learning rate has scaled already: put it last in the chain, in front of a weight box.
    A leaf keeps its direction; one entry above its bound shrinks all of it.

    Args:
      relative: Share of a weight that a step may change, in [0, inf]. May be traced.
      absolute: What a step may always change, in [0, inf], in the units of the weights. With
        0, a leaf that has a weight of 0 does not move. May be traced.
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

    def coefficient(u: jax.Array, w: jax.Array) -> jax.Array:
        dtype = jnp.finfo(floats.compute_dtype(u.dtype, w.dtype)).dtype
        settings = [jnp.asarray(x).astype(dtype) for x in (relative, absolute)]
        share, least = (jnp.maximum(x, 0) for x in settings)
        # Halves, whose modulus never overflows.
        size, step = (jnp.abs(x * jnp.asarray(0.5, x.dtype)).astype(dtype) for x in (w, u))
        # An infinite share of a weight of 0 is no bound either, not NaN.
        allowed = jnp.where(jnp.isinf(share), share, share * size) + least / 2
        ratio = jnp.where(step > allowed, allowed / step, jnp.ones_like(step))
        # Sums, for a minimum may lose a NaN; 0, or NaN if an entry is not finite.
        bad = jnp.sum(0 * step) + jnp.sum(0 * size)
        bad = jnp.where(jnp.isnan(share) | jnp.isnan(least), jnp.nan, bad)
        smallest = jnp.min(ratio, initial=1)
        if axis_name is not None:
            smallest, bad = lax.pmin(smallest, axis_name), lax.psum(bad, axis_name)
        return smallest + bad

    def terms_for(updates, params, step):
        del step
        checks.check_params_given("clip_update_relative", params)
        checks.check_same_structure("updates", updates, "params", params)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True)
        pairs = [(jnp.asarray(u), jnp.asarray(w)) for u, w in pairs if trees.is_clippable(u)]
        coefficient_of = jax.jit(coefficient)
        return [[coefficient_of(u, w) for u, w in pairs]]

    return _unit_clip(ClipUpdateRelativeState, _all_axes, terms_for, _bound_by_share, axis_name)


def _bound_of_weights(
    norm: RescaledNorm, ratio: jax.Array, least: jax.Array, weights: RescaledNorm
) -> jax.Array:
    """`ratio * max(norm of the weights, least)`; NaN where these are not finite."""
    dtype = norm.norm.dtype
    ratio, least = ratio.astype(dtype), least.astype(dtype)
    size, rescale = (x.astype(dtype) for x in weights)
    bound = jnp.maximum(ratio * size / rescale, ratio * least)
    bound = jnp.where(jnp.isinf(ratio), jnp.inf, bound)
    return jnp.where(jnp.isfinite(size), bound, jnp.nan)


def _bound_by_share(norm: RescaledNorm, share: jax.Array) -> jax.Array:
    bound = norm.norm * share.astype(norm.norm.dtype) / norm.rescale
    return jnp.where(share == 1, jnp.inf, bound)
