"""Error feedback: what a clip or a compressor cuts off is kept, and paid back later."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclip._core import checks, trees
from jaxclip._core.floats import (
    compute_dtype,
    increment,
    keep_weak_type,
    saturate,
)
from jaxclip._core.trees import map_clippable
from jaxclip.gradients.by_value import ClipByValueState, clip_by_value
from jaxclip.gradients.guards import skip_nonfinite


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`, inside that of `skip_nonfinite`.

    Attributes:
      step: Scalar int32, steps so far that were not skipped.
      inner_state: State of the inner transform.
      residual: What is still owed, a tree like the parameters; finite always.
    """

    step: jax.Array
    inner_state: Any
    residual: optax.Updates


def error_feedback(
    inner: optax.GradientTransformation,
    *,
    max_residual: Any = math.inf,
    residual_dtype: Any = None,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Carries what the inner transform cut off a gradient over into the next step.

    `update = inner(g + e); e <- (g + e) - update`: the updates sum to the sum of the
    gradients less the last e. The inner transform must keep the units and the sign of the
    gradient: a clip (U-Clip), or `scale_by_sign(scaled_sign())` (EF-signSGD), as a bare sign
    would leave a residual without end. The learning rate comes after it in the chain.

    Args:
      inner: An optax transformation that clips or compresses.
      max_residual: A threshold as in `clip_by_value`, to which every entry of e is clipped;
        what it cuts is lost. A finite one keeps one huge gradient from being paid back for
        ever, and e bounded where the mean gradient lies beyond the inner clip.
      residual_dtype: Real floating dtype of e; None for the dtype of each parameter. Float32
        carries the rounding of bfloat16 updates over, too. Complex leaves keep their own.
      axis_name: As in `skip_nonfinite`.

    Returns:
      A transform within `skip_nonfinite`, whose `inner_state` holds e: a bad step changes
      nothing. Sums beyond a dtype count as its largest number.

    Raises:
      TypeError: If `inner` is not an optax transformation, `max_residual` of a wrong type,
        or `residual_dtype` not a real floating dtype.
      ValueError: If `max_residual` is negative or NaN.

    Example:
      >>> tx = error_feedback(clip_by_value(1.0))
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
    clip_residual = clip_by_value(max_residual)

    def zeros(p: Any) -> jax.Array:
        if not trees.is_clippable(p):
            return jnp.zeros((), jnp.int32)  # a placeholder
        return jnp.zeros_like(p, dtype=None if jnp.iscomplexobj(p) else residual_dtype)

    def init_fn(params):
        return ErrorFeedbackState(
            step=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
            residual=jax.tree.map(zeros, params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        checks.check_same_structure("updates", updates, "residual", state.residual)
        owed = map_clippable(_owed, updates, state.residual)
        given = map_clippable(lambda g, o: keep_weak_type(o.astype(g.dtype), g), updates, owed)
        updates, inner_state = inner.update(given, state.inner_state, params, **extra_args)
        residual = map_clippable(_unpaid, state.residual, owed, updates)
        # Of the bound's state only the step counts, for schedules.
        bound_state = ClipByValueState(state.step, jnp.zeros((), jnp.float32), state.step)
        residual, _ = clip_residual.update(residual, bound_state)
        return updates, ErrorFeedbackState(increment(state.step), inner_state, residual)

    feedback = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return skip_nonfinite(feedback, check_inner=False, axis_name=axis_name)


# --- Parts ----------------------------------------------------------------------------


def _owed(g: jax.Array, e: jax.Array) -> jax.Array:
    wide = compute_dtype(g.dtype, e.dtype)
    return saturate(g.astype(wide) + e.astype(wide), g.dtype)


def _unpaid(e: jax.Array, owed: jax.Array, update: jax.Array) -> jax.Array:
    unpaid = saturate(owed - jnp.asarray(update).astype(owed.dtype), e.dtype)
    return keep_weak_type(unpaid.astype(e.dtype), e)
