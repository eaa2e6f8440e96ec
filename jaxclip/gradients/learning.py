"""Helpers shared by the clips that learn their threshold from earlier gradients.

`learning_transform` makes a transform of a rule and keeps its statistics in a `LearningState`.
Three things hold for every rule:

* A NaN or an infinity in the gradient, or a traced hyper-parameter that is NaN, makes a bad
  step: zeros, counted in `num_nonfinite`; every statistic stays as it was, bit for bit.
* A gradient of zeros enters no statistic, and a statistic that is still zero clips nothing. So
  layers whose gradients begin at zero (adapters, unused embeddings) are not frozen.
* Statistics are float32 and finite: larger norms count as the largest float32, averages of
  squares are kept as roots. Traced hyper-parameters are clamped to their range.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core.floats import FLOAT32_MAX, FLOAT32_TINY, as_float, clamp, increment
from jaxclip._core.trees import PyTree, floating_leaves
from jaxclip.gradients.state import ClipStats, LeafReport
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.scaling import zero_if


class LearningState(NamedTuple):
    """State of a clip that learns its threshold.

    Attributes:
      step: Scalar int32, steps so far.
      stats: A `ClipStats`; its `clip_rate` is that of the steps, leaves or entries so far.
      threshold: Scalar float32, threshold set by the last good step; 0 before the first.
      num_learned: Scalar int32, steps that have entered the statistics.
      learned: The statistics, an array or a tree of arrays.
      leaves: A `LeafReport`.
    """

    keeps_finite = True

    step: jax.Array
    stats: ClipStats
    threshold: jax.Array
    num_learned: jax.Array
    learned: PyTree
    leaves: LeafReport


class LearningStep(NamedTuple):
    """Outcome of a rule for one gradient; at a bad step only the norms count.

    Attributes:
      updates: The clipped gradient.
      norm: `RescaledNorm` of the gradient before the clip; not finite if an entry is not.
      leaf_norms: Those of its leaves, as `norm_of` gives them.
      post_norm: Scalar, the norm after the clip; not read where `clip_rate` is 0.
      clip_rate: Scalar float32, clipped fraction of the step, its leaves or its entries.
      threshold: Scalar, the new threshold; a NaN makes a bad step.
      learned: The new statistics.
    """

    updates: optax.Updates
    norm: RescaledNorm
    leaf_norms: jax.Array | None
    post_norm: jax.Array
    clip_rate: jax.Array
    threshold: jax.Array
    learned: PyTree


def learning_transform(
    state_type: type[LearningState],
    start: Callable[[optax.Params], tuple[jax.Array, PyTree]],
    rule: Callable[..., LearningStep],
    settings: tuple[ArrayLike, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Makes a transform from a rule that learns from good steps; bad ones give zeros."""
    # `start(params)` gives the first threshold and statistics, `rule(updates, state, pre_norm)` a
    # step; `pre_norm` is as in `norm_of`. A NaN in one of `settings` makes a bad step.

    def init_fn(params):
        threshold, learned = start(params)
        return state_type(
            step=jnp.zeros((), jnp.int32),
            stats=ClipStats.create(),
            threshold=threshold,
            num_learned=jnp.zeros((), jnp.int32),
            learned=learned,
            leaves=LeafReport.create(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params
        new = rule(updates, state, extra_args.get("pre_norm"))
        size = norm_in_float32(new.norm)
        is_nan = [jnp.isnan(as_float(x)) for x in (*settings, new.threshold)]
        is_bad = jnp.any(jnp.stack([~jnp.isfinite(new.norm.norm), *is_nan]))
        is_learned = ~is_bad & (size > 0)
        step = increment(state.step)
        stats = _stats_after(state.stats, new, size, is_bad, step)

        def learn(new, old):
            return jax.tree.map(lambda n, o: jnp.where(is_learned, n, o), new, old)

        return zero_if(is_bad, new.updates), state_type(
            step=step,
            stats=stats,
            threshold=learn(clamp(new.threshold, 0, FLOAT32_MAX), state.threshold),
            num_learned=increment(state.num_learned, is_learned),
            learned=learn(new.learned, state.learned),
            leaves=state.leaves.update(new.leaf_norms, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stats_after(
    stats: ClipStats, new: LearningStep, size: jax.Array, is_bad: jax.Array, step: jax.Array
) -> ClipStats:
    """Returns the statistics after the outcome of a rule."""
    rate = jnp.where(is_bad, 0, new.clip_rate)
    # The norm itself where nothing was clipped: the rule's may be rounded.
    post_norm = jnp.where(rate > 0, jnp.minimum(new.post_norm, size), size)
    return stats.update(
        is_bad,
        pre_norm=size,
        post_norm=post_norm,
        clip_coef=jnp.where(size > 0, post_norm / size, 1),
        clip_rate=rate,
        num_steps=step,
    )


def norm_in_float32(norm: RescaledNorm) -> jax.Array:
    """Returns a norm as a finite float32, 0 below the normal range; NaN if an entry is."""
    size = jnp.minimum(norm.norm / norm.rescale, FLOAT32_MAX)
    # Also of float64: a subnormal float32 is 0 to one operation and not to the next.
    return jnp.where(size < FLOAT32_TINY, 0, size).astype(jnp.float32)


def zero_per_leaf(params: optax.Params) -> tuple[jax.Array, jax.Array]:
    """Returns a first threshold of 0, and 0 for each floating leaf: a `start` for a rule."""
    return jnp.zeros((), jnp.float32), jnp.zeros((len(floating_leaves(params)),), jnp.float32)
