"""Clips the gradient by its global norm: `g * min(1, max_norm / norm(g))`, one coefficient for all.

A NaN or an infinity in the gradient, or a NaN as threshold, makes a bad step: all leaves become
zeros, and `num_nonfinite` counts it. To leave the optimizer's state unchanged, too, use
`make_train_step` or `skip_nonfinite`, which skip the whole step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import increment
from jaxclip.gradients.state import ClipStats, LeafReport
from jaxclip.norms.scaling import clip_to_norm, norm_of
from jaxclip.thresholds.values import check_number_or_schedule


class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`.

    Attributes:
      step: Scalar int32, steps so far.
      stats: A `ClipStats`.
      leaves: A `LeafReport`; unchanged where a `pre_norm` was given as a number.
    """

    transform_name = "clip_by_global_norm"
    keeps_finite = True

    step: jax.Array
    stats: ClipStats
    leaves: LeafReport


def clip_by_global_norm(
    max_norm: ArrayLike | optax.Schedule,
    *,
    ord: float | None = None,
    eps: ArrayLike = 0.0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients by one coefficient so that their global norm is at most `max_norm`.

    `g <- g * min(1, max_norm / (norm(g) + eps))`. Agrees with `optax.clip_by_global_norm`, and is
    right where that is not: half-precision and very large or small gradients, `max_norm` 0, a
    traced `max_norm` with bfloat16 gradients.

    Args:
      max_norm: Number in [0, inf], traced scalar (below 0 counts as 0), or schedule, in
        the units of the gradient. A traced NaN makes a bad step.
      ord: Which norm: 1, 2 or inf. None is 2 (a number as default would be traced under
        `optax.inject_hyperparams`).
      eps: Number added to the norm, not negative; 1e-6 gives PyTorch's `clip_grad_norm_`, which
        also shrinks gradients less than eps below `max_norm`.
      axis_name: Mapped axis to take the norm over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None: the norm is global already.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The norm of the
      result is at most `max_norm` in exact arithmetic. Gradients at or below it come back
      bit-identical; a bad step gives zeros. `update(..., pre_norm=n)` takes a norm that is
      known already: a number, or the result of `jaxclip.norms.measure_norm` for these very
      updates, which `make_train_step` passes.

    Raises:
      TypeError: If `max_norm` is of a wrong type.
      ValueError: If `max_norm` is negative or NaN, `ord` not 1, 2 or inf, or `eps` negative.

    Example:
      >>> tx = clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
      >>> clipped, state = tx.update(grads, tx.init(grads))
      >>> print(f"{clipped['b']:.3f} {state.stats.post_norm:.3f}")
      0.800 1.000

    References:
      Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2013,
      https://arxiv.org/abs/1211.5063
    """
    ord = 2 if ord is None else ord
    checks.check_choice("ord", ord, (1, 2, 1.0, 2.0, float("inf")))
    checks.check_nonnegative("eps", eps)
    check_number_or_schedule("max_norm", max_norm)

    def init_fn(params):
        return ClipByGlobalNormState(
            step=jnp.zeros((), jnp.int32),
            stats=ClipStats.create(),
            leaves=LeafReport.create(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params
        bound = checks.value_at("max_norm", max_norm, state.step)
        norm, leaf_norms = norm_of(updates, extra_args.get("pre_norm"), ord, axis_name)
        clipped, clip = clip_to_norm(updates, norm, bound, eps)
        step = increment(state.step)
        stats = state.stats.update(
            clip.is_bad,
            pre_norm=clip.pre_norm,
            post_norm=clip.post_norm,
            clip_coef=clip.clip_coef,
            clip_rate=clip.is_clipped,
            num_steps=step,
        )
        leaves = state.leaves.update(leaf_norms, clip.is_bad)
        return clipped, ClipByGlobalNormState(step=step, stats=stats, leaves=leaves)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
