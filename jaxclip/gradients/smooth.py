"""A smooth limiter: like a clip by norm far above its scale, but without a kink.

All leaves are multiplied by `scale / (scale + norm)`. Small gradients are unchanged to first
order, the norm of the result stays below `scale`, and there is a derivative everywhere. A gradient
that a clip would leave unchanged shrinks a little, too: by a third at half the scale.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core.floats import increment
from jaxclip.gradients.state import ClipStats
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.scaling import bound_at, clip_to_norm, norm_of
from jaxclip.thresholds.values import check_number_or_schedule


class SmoothClipState(NamedTuple):
    """State of `smooth_clip`.

    Attributes:
      step: Scalar int32, steps so far.
      stats: A `ClipStats` without `clip_rate`: every gradient is shrunk.
    """

    transform_name = "smooth_clip"

    step: jax.Array
    stats: ClipStats


def smooth_clip(
    scale: ArrayLike | optax.Schedule, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Limits the global norm of the gradient to below `scale` by a smooth function.

    `g <- g * scale / (scale + norm(g))`, which has slope 1 at 0.

    Args:
      scale: Number in [0, inf], traced scalar (below 0 counts as 0), or schedule, in the units
        of the gradient. A traced NaN makes a bad step.
      axis_name: Mapped axis to take the norm over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None: the norm is global already.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The norm of the result
      is at most `scale` in exact arithmetic; with `scale` inf it is the input, bit for bit. A bad
      step gives zeros.

    Raises:
      TypeError: If `scale` is of a wrong type.
      ValueError: If a concrete `scale` is negative or NaN.

    Example:
      >>> grads = jnp.array([3.0, 4.0])
      >>> tx = smooth_clip(5.0)
      >>> print(jnp.round(tx.update(grads, tx.init(grads))[0], 4))
      [1.5 2. ]

    References:
      Bu et al., Automatic Clipping: Differentially Private Deep Learning Made Easier and
      Stronger, 2022, https://arxiv.org/abs/2206.07136 (the norm plus a constant as divisor)
    """
    check_number_or_schedule("scale", scale)

    def init_fn(params):
        del params
        stats = ClipStats.create(without=("clip_rate",))
        return SmoothClipState(step=jnp.zeros((), jnp.int32), stats=stats)

    def update_fn(updates, state, params=None, **extra_args):
        del params
        norm, _ = norm_of(updates, extra_args.get("pre_norm"), axis_name=axis_name)
        limit = bound_at("scale", scale, state.step, norm.norm.dtype)
        limited, clip = clip_to_norm(updates, norm, _smooth_norm(norm, limit))
        stats = state.stats.update(
            clip.is_bad,
            pre_norm=clip.pre_norm,
            post_norm=clip.post_norm,
            clip_coef=clip.clip_coef,
        )
        return limited, SmoothClipState(step=increment(state.step), stats=stats)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _smooth_norm(norm: RescaledNorm, limit: jax.Array) -> jax.Array:
    """Returns the norm to scale to, `norm * limit / (norm + limit)`."""
    size, rescale = norm
    # The ratio of the smaller to the larger, both times `rescale`, so that neither the
    # norm nor the sum overflows. Where the limit overflows or underflows, the ratio is 0.
    rescaled = limit * rescale
    larger = jnp.maximum(rescaled, size)
    is_usual = (larger > 0) & jnp.isfinite(larger)
    ratio = jnp.minimum(rescaled, size) / jnp.where(is_usual, larger, jnp.ones_like(larger))
    ratio = jnp.where(is_usual, ratio, jnp.zeros_like(ratio))
    return jnp.minimum(limit, size / rescale) / (1 + ratio)
