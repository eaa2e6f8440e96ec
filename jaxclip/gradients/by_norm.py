"""Clips the gradient by its global norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import increment
from jaxclip.norms.scaling import clip_to_norm, norm_of
from jaxclip.norms.state import LeafReport
from jaxclip.thresholds.values import check_number_or_schedule


class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`.

    Attributes:
      step: Scalar int32, steps so far.
      pre_norm: Scalar float32, norm of the last finite gradient before the clip, at most the
        largest float32.
      post_norm: Scalar float32, `clip_coef * pre_norm`; 0 after a bad step.
      clip_coef: Scalar float32 in [0, 1], what the last gradient was multiplied by.
      clip_rate: Scalar float32, share of the steps so far that were clipped.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      leaves: A `LeafReport`; unchanged where a `pre_norm` was given as a number.
    """

    step: jax.Array
    pre_norm: jax.Array
    post_norm: jax.Array
    clip_coef: jax.Array
    clip_rate: jax.Array
    num_nonfinite: jax.Array
    leaves: LeafReport


def clip_by_global_norm(
    max_norm: Any, *, ord: float | None = None, eps: ArrayLike = 0.0, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients by one coefficient so that their global norm is at most `max_norm`.

    `g <- g * min(1, max_norm / (norm(g) + eps))`. As `optax.clip_by_global_norm`, and right where
    that is not: half-precision and very large or small gradients, `max_norm` 0, a traced
    `max_norm` with bfloat16 gradients.

    Args:
      max_norm: Number in [0, inf], traced scalar (below 0 counts as 0), or schedule, in
        the units of the gradient. A traced NaN makes a bad step.
      ord: 1, 2 or inf; which norm. None is 2 (a number by default would be traced under
        `optax.inject_hyperparams`).
      eps: Added to the norm, not negative; 1e-6 gives PyTorch's `clip_grad_norm_`, which
        also shrinks gradients less than eps below `max_norm`.
      axis_name: Mapped axis to take the norm over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None: the norm is global already.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The norm of the
      result is at most `max_norm` in exact arithmetic; gradients at or below it come back
      bit-identical; a bad step gives zeros. `update(..., pre_norm=n)` takes a norm that is
      known already (a number, or a `norms.MeasuredNorm`, used if it is of these updates).

    Raises:
      TypeError: If `max_norm` is of a wrong type.
      ValueError: If `max_norm` is negative or NaN, `ord` not 1, 2 or inf, or `eps` negative.

    Example:
      >>> tx = clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
      >>> clipped, state = tx.update(grads, tx.init(grads))
      >>> print(f"{clipped['b']:.3f} {state.pre_norm:.3f} {state.post_norm:.3f}")
      0.800 5.000 1.000

    References:
      Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2013,
      https://arxiv.org/abs/1211.5063
    """
    ord = 2 if ord is None else ord
    checks.check_choice("ord", ord, (1, 2, 1.0, 2.0, float("inf")))
    checks.check_nonnegative("eps", eps)
    check_number_or_schedule("max_norm", max_norm)
    schedule: Any = max_norm if callable(max_norm) else None

    def init_fn(params):
        # An array for each field: one array twice could not be donated.
        return ClipByGlobalNormState(
            step=jnp.zeros((), jnp.int32),
            pre_norm=jnp.zeros((), jnp.float32),
            post_norm=jnp.zeros((), jnp.float32),
            clip_coef=jnp.ones((), jnp.float32),
            clip_rate=jnp.zeros((), jnp.float32),
            num_nonfinite=jnp.zeros((), jnp.int32),
            leaves=LeafReport.create(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params
        bound: Any = schedule(state.step) if schedule else max_norm
        norm, each = norm_of(updates, extra_args.get("pre_norm"), ord, axis_name)
        clipped, clip = clip_to_norm(updates, norm, bound, eps)
        step = increment(state.step)
        rate_change = (clip.is_clipped - state.clip_rate) / step.astype(jnp.float32)
        return clipped, ClipByGlobalNormState(
            step=step,
            pre_norm=jnp.where(clip.is_bad, state.pre_norm, clip.pre_norm),
            post_norm=clip.post_norm,
            clip_coef=clip.clip_coef,
            clip_rate=state.clip_rate + rate_change,
            num_nonfinite=increment(state.num_nonfinite, clip.is_bad),
            leaves=state.leaves.update(each, clip.is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
