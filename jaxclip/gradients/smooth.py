"""Smooth limiters: what a clip does far above its threshold, without the kink at it.

By norm the whole tree is multiplied by `scale / (scale + norm)`; by value each entry
becomes `scale * tanh(g / scale)`. Both leave small gradients as they are, to first order,
keep the result below `scale`, and have a derivative everywhere. They shrink a little also
what a clip would leave alone: at half the scale by a third, or by 8 % by value.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclip._core import checks, floats
from jaxclip._core.floats import (
    FLOAT32_MAX,
    compute_dtype,
    increment,
    keep_weak_type,
    phase_and_modulus,
    round_toward_zero,
)
from jaxclip._core.trees import map_clippable
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.of_trees import rescaled_global_norm
from jaxclip.norms.scaling import clip_to_norm, norm_of
from jaxclip.thresholds.values import (
    check_number_or_schedule,
    check_threshold_tree,
    resolve_threshold,
)


class SmoothClipState(NamedTuple):
    """State of `smooth_clip` by norm.

    Attributes:
      step: Scalar int32, steps so far.
      pre_norm: Scalar float32, norm of the last gradient before.
      post_norm: Scalar float32, `clip_coef * pre_norm`, below the scale; 0 after a bad step.
      clip_coef: Scalar float32 in [0, 1], what the last gradient was multiplied by.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
    """

    step: jax.Array
    pre_norm: jax.Array
    post_norm: jax.Array
    clip_coef: jax.Array
    num_nonfinite: jax.Array


class SmoothClipByValueState(NamedTuple):
    """State of `smooth_clip` by value.

    Attributes:
      step: Scalar int32, steps so far.
      pre_norm: Scalar float32, the largest modulus in the last gradient before.
      post_norm: Scalar float32, the largest modulus after.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
    """

    step: jax.Array
    pre_norm: jax.Array
    post_norm: jax.Array
    num_nonfinite: jax.Array


def smooth_clip(
    scale: Any, *, by: str = "norm", axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Limits gradients to below `scale` by a smooth function with slope 1 at 0.

    By norm `g <- g * scale / (scale + norm(g))`, with the global norm. By value
    `g <- scale * tanh(g / scale)` entry by entry, complex entries by modulus.

    Args:
      scale: A threshold in the units of the gradient. By norm: number in [0, inf], traced
        scalar (below 0 counts as 0), or schedule; a traced NaN makes a bad step. By value
        also a rule, or a prefix tree of these.
      by: "norm" or "value".
      axis_name: Mapped axis to take the norm over inside `shard_map` or `pmap`; by norm only.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The norm, or every
      modulus, of the result is at most `scale` in exact arithmetic; with `scale` inf it is
      the input, bit for bit. After a bad step: zeros by norm; by value an infinity becomes
      the scale with its sign (0 if complex, or if the scale is infinite), and NaN 0.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN, `by` is neither of the two, or
        `axis_name` is given by value.

    Example:
      >>> grads = jnp.array([3.0, 4.0])
      >>> tx = smooth_clip(5.0)
      >>> print(jnp.round(tx.update(grads, tx.init(grads))[0], 4))
      [1.5 2. ]
      >>> tx = smooth_clip(5.0, by="value")
      >>> print(jnp.round(tx.update(grads, tx.init(grads))[0], 4))
      [2.6852 3.3202]

    References:
      Bu et al., Automatic Clipping: Differentially Private Deep Learning Made Easier and
      Stronger, 2022, https://arxiv.org/abs/2206.07136 (the norm plus a constant as divisor)
    """
    checks.check_choice("by", by, ("norm", "value"))
    check_threshold_tree("scale", scale)
    if by == "value":
        if axis_name is not None:
            raise ValueError("axis_name must be None by value: entries are limited one by one.")
        return _smooth_clip_by_value(scale)
    check_number_or_schedule("scale by norm", scale)
    return _smooth_clip_by_norm(scale, axis_name)


def _smooth_clip_by_norm(
    scale: Any, axis_name: str | None
) -> optax.GradientTransformationExtraArgs:
    def init_fn(params):
        del params
        return SmoothClipState(
            step=jnp.zeros((), jnp.int32),
            pre_norm=jnp.zeros((), jnp.float32),
            post_norm=jnp.zeros((), jnp.float32),
            clip_coef=jnp.ones((), jnp.float32),
            num_nonfinite=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params
        limit = scale(state.step) if callable(scale) else scale
        norm, _ = norm_of(updates, extra_args.get("pre_norm"), axis_name=axis_name)
        limited, clip = clip_to_norm(updates, norm, _smooth_norm(norm, limit))
        return limited, SmoothClipState(
            step=increment(state.step),
            pre_norm=jnp.where(clip.is_bad, state.pre_norm, clip.pre_norm),
            post_norm=clip.post_norm,
            clip_coef=clip.clip_coef,
            num_nonfinite=increment(state.num_nonfinite, clip.is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _smooth_norm(norm: RescaledNorm, limit: Any) -> jax.Array:
    """The norm after, `norm * limit / (norm + limit)`, which a clip then brings about."""
    size, rescale = norm
    limit = jnp.maximum(jnp.asarray(round_toward_zero(limit, size.dtype)), 0)
    # The ratio of the smaller to the larger, both times `rescale`, so that neither the
    # norm nor the sum overflows. Where the limit does, or sinks to 0, the ratio is 0.
    rescaled = limit * rescale
    larger = jnp.maximum(rescaled, size)
    is_usual = (larger > 0) & jnp.isfinite(larger)
    ratio = jnp.minimum(rescaled, size) / jnp.where(is_usual, larger, jnp.ones_like(larger))
    ratio = jnp.where(is_usual, ratio, jnp.zeros_like(ratio))
    return jnp.minimum(limit, size / rescale) / (1 + ratio)


def _smooth_clip_by_value(scale: Any) -> optax.GradientTransformationExtraArgs:
    def init_fn(params):
        del params
        return SmoothClipByValueState(
            step=jnp.zeros((), jnp.int32),
            pre_norm=jnp.zeros((), jnp.float32),
            post_norm=jnp.zeros((), jnp.float32),
            num_nonfinite=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        limits = resolve_threshold(scale, updates, state.step)
        limited = map_clippable(_limit_entries, updates, limits)
        is_bad = floats.is_bad_step(updates, limits)
        return limited, SmoothClipByValueState(
            step=increment(state.step),
            pre_norm=jnp.where(is_bad, state.pre_norm, _largest(updates)),
            post_norm=_largest(limited),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _limit_entries(g: jax.Array, limit: Any) -> jax.Array:
    """`limit * tanh(g / limit)`; 0 where that is not a number."""
    dtype = compute_dtype(g.dtype)
    limit = jnp.maximum(jnp.asarray(round_toward_zero(limit, jnp.finfo(dtype).dtype)), 0)
    if jnp.iscomplexobj(g):
        # Of a quarter, for the modulus of finite parts may exceed the dtype.
        unit, modulus = phase_and_modulus(g * jnp.asarray(0.25, g.dtype))
        # The parts of a unit are rounded: its modulus can be above 1 by as much as this.
        limit = limit * 0.25 * (1 - 4 * jnp.finfo(limit.dtype).eps)
        limited = unit * (4 * _limit_magnitude(modulus, limit)).astype(dtype)
    else:
        modulus = jnp.abs(g.astype(dtype))
        limited = _limit_magnitude(g.astype(dtype), limit)
    if g.dtype.itemsize < 4:
        limited = round_toward_zero(limited, g.dtype)
    # Where x**2 / 3 is below half an ulp, tanh(x) is x.
    smallest = 2.0**-27 if limit.dtype == jnp.float64 else 2.0**-13
    limited = jnp.where(modulus < limit * smallest, g, limited.astype(g.dtype))
    limited = jnp.where(jnp.isfinite(limited), limited, jnp.zeros_like(g))
    return keep_weak_type(limited, g)


@jax.custom_jvp
def _limit_magnitude(x: jax.Array, limit: jax.Array) -> jax.Array:
    """`limit * tanh(x / limit)`; 0 or `x` where the limit is 0 or infinite."""
    limited = limit * jnp.tanh(_ratio(x, limit))
    return jnp.where(jnp.isinf(limit), x, limited)


@_limit_magnitude.defjvp
def _limit_magnitude_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """By hand: a derivative of the quotient would square the limit, which may underflow."""
    ratio = _ratio(*primals)
    tanh = jnp.tanh(ratio)
    slope = 1 - tanh * tanh
    dx, dlimit = tangents
    return _limit_magnitude(*primals), slope * dx + (tanh - ratio * slope) * dlimit


def _ratio(x: jax.Array, limit: jax.Array) -> jax.Array:
    """`x / limit`, bounded where tanh is 1 long since (from 20 on, also in float64)."""
    is_usual = (limit > 0) & jnp.isfinite(limit)
    usual = jnp.where(is_usual, limit, jnp.ones_like(limit))
    # XLA may divide by multiplying with the reciprocal, which for the largest limits is
    # below the normal range.
    half_range = 2.0**512 if limit.dtype == jnp.float64 else 2.0**64
    shrink = jnp.where(usual > half_range, 1 / half_range, jnp.ones_like(usual))
    divisor = usual * shrink
    ratio = jnp.clip(x * shrink, -64 * divisor, 64 * divisor) / divisor
    extreme = jnp.where(limit == 0, 64 * jnp.sign(x), limit * 0)  # NaN if the limit is
    return jnp.where(is_usual, ratio, jnp.where(jnp.isinf(limit), jnp.zeros_like(x), extreme))


def _largest(tree: Any) -> jax.Array:
    """The largest modulus in a tree, at most the largest float32."""
    largest = rescaled_global_norm(tree, ord=float("inf")).norm.astype(jnp.float32)
    return jnp.minimum(largest, FLOAT32_MAX)
