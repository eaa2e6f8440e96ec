"""Error feedback: the part that a clip or a compressor cuts off is added to the next gradient.

update = inner(g + e),        e <- (g + e) - update
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core import checks
from jaxclip._core.floats import compute_dtype, keep_weak_type, saturate
from jaxclip._core.trees import PyTree, is_clippable, map_clippable
from jaxclip.gradients.by_value import clip_entries
from jaxclip.gradients.guards import skip_nonfinite
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`, inside that of `skip_nonfinite`, which counts the steps.

    Attributes:
      inner_state: State of the inner transform.
      residual: The residual, a tree like the parameters; finite always.
    """

    inner_state: optax.OptState
    residual: optax.Updates


def error_feedback(
    inner: optax.GradientTransformation,
    *,
    max_residual: PyTree = math.inf,
    residual_dtype: DTypeLike | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the part of a gradient that the inner transform cut off to the next gradient.

    `update = inner(g + e); e <- (g + e) - update`: the updates sum to the sum of the
    gradients minus the last e. The inner transform must keep the units and the sign of the
    gradient: a clip (U-Clip), or `scale_by_sign(scaled_sign())` (EF-signSGD). With a bare sign
    the residual would grow without bound. The learning rate comes after it in the chain.

    Args:
      inner: An optax transformation that clips or compresses.
      max_residual: A threshold as in `clip_by_value`, to which every entry of e is clipped;
        the excess is lost. A finite one limits for how many steps one huge gradient acts. It
        also bounds e where the mean gradient is beyond the inner clip.
      residual_dtype: Real floating dtype of e; None for the dtype of each parameter. Float32
        carries the rounding of bfloat16 updates over, too. Complex leaves keep their own.
      axis_name: Mapped axis over which all devices skip a bad step together, inside `shard_map`
        or `pmap`. Under `jit` on sharded arrays leave it None.

    Returns:
      A transform within `skip_nonfinite`, whose `inner_state` holds e: a bad step changes
      nothing. Sums beyond the range of a dtype count as its largest number.

    Raises:
      TypeError: If `inner` is not an optax transformation, `max_residual` of a wrong type,
        or `residual_dtype` not a real floating dtype.
      ValueError: If `max_residual` is negative or NaN.

    Example:
      >>> import jaxclip
      >>> tx = error_feedback(jaxclip.clip_by_value(1.0))
      >>> state = tx.init(jnp.zeros(2))
      >>> for grads in jnp.array([[1.5, 0.1], [0.0, 0.1]]):
      ...     updates, state = tx.update(grads, state)
      ...     print(updates, state.inner_state.residual)
      [1.  0.1] [0.5 0. ]
      [0.5 0.1] [0. 0.]

    References:
      Karimireddy et al., Error Feedback Fixes SignSGD, 2019,
      https://arxiv.org/abs/1901.09847; Elesedy and Hutter, U-Clip, 2023,
      https://arxiv.org/abs/2302.02971
    """
    inner = checks.check_transformation("inner", inner)
    if residual_dtype is not None and not jnp.issubdtype(residual_dtype, jnp.floating):
        raise TypeError(f"residual_dtype must be a real floating dtype, got {residual_dtype!r}.")
    check_threshold_tree("max_residual", max_residual)

    def zeros(p: ArrayLike) -> jax.Array:
        if not is_clippable(p):
            return jnp.zeros((), jnp.int32)  # a placeholder
        return jnp.zeros_like(p, dtype=None if jnp.iscomplexobj(p) else residual_dtype)

    def init_fn(params):
        return ErrorFeedbackState(
            inner_state=inner.init(params),
            residual=jax.tree.map(zeros, params),
        )

    def feed_back(updates, state, params=None, **extra_args):
        step = extra_args.pop("feedback_step")
        checks.check_same_structure("updates", updates, "residual", state.residual)
        sums = map_clippable(_add, updates, state.residual)
        given = map_clippable(lambda g, s: keep_weak_type(s.astype(g.dtype), g), updates, sums)
        updates, inner_state = inner.update(given, state.inner_state, params, **extra_args)
        residual = map_clippable(_remainder, state.residual, sums, updates)
        bounds = resolve_threshold(max_residual, residual, step, name="max_residual")
        residual, _, _ = clip_entries(residual, bounds)
        return updates, ErrorFeedbackState(inner_state, residual)

    feedback = optax.GradientTransformationExtraArgs(init_fn, feed_back)
    guarded = skip_nonfinite(feedback, check_inner=False, axis_name=axis_name)

    def update_fn(updates, state, params=None, **extra_args):
        # Schedules count every step, as those of other transforms do, also the skipped ones.
        return guarded.update(updates, state, params, feedback_step=state.step, **extra_args)

    return optax.GradientTransformationExtraArgs(guarded.init, update_fn)


# --- Parts ----------------------------------------------------------------------------


def _add(g: jax.Array, e: jax.Array) -> jax.Array:
    """Returns the sum of gradient and residual, in float32 or wider."""
    wide = compute_dtype(g.dtype, e.dtype)
    return saturate(g.astype(wide) + e.astype(wide), g.dtype)


def _remainder(e: jax.Array, total: jax.Array, update: jax.Array) -> jax.Array:
    """Returns the part of a sum that the update lacks, as the new residual."""
    rest = saturate(total - jnp.asarray(update).astype(total.dtype), e.dtype)
    return keep_weak_type(rest.astype(e.dtype), e)
