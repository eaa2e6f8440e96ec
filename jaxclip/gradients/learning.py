"""What the clips that learn from history have in common.

`learning_transform` makes a transform of a rule. It keeps the statistics in a
`LearningState`, and three rules hold for all of them:

* A NaN or an infinity in the gradient, or a traced hyper-parameter that is NaN, makes a bad
  step: zeros, counted in `num_nonfinite`; every statistic stays as it was, bit for bit.
* A gradient of zeros enters no statistic, and a statistic that is still zero clips nothing:
  layers whose gradients begin at zero (adapters, unused embeddings) are not frozen.
* Statistics are float32 and finite: larger norms count as the largest float32, averages of
  squares are kept as roots. Traced hyper-parameters are clamped to their range.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclip._core.floats import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    clamp,
    increment,
    keep_weak_type,
)
from jaxclip._core.trees import floating_leaves, map_clippable
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.state import LeafReport


class LearningState(NamedTuple):
    """What every clip that learns keeps; scalars, float32 but for the counts.

    Attributes:
      step, pre_norm, post_norm, num_nonfinite: As in `ClipByGlobalNormState`.
      clip_coef: `post_norm / pre_norm`; 0 after a bad step.
      clip_rate: Share of the steps, leaves or entries so far that were clipped.
      threshold: The threshold that the last good step has set; 0 before there is one.
      num_learned: Steps that have entered the statistics, int32.
      learned: The statistics, an array or a tree of arrays.
      leaves: A `LeafReport`.
    """

    step: jax.Array
    pre_norm: jax.Array
    post_norm: jax.Array
    clip_coef: jax.Array
    clip_rate: jax.Array
    num_nonfinite: jax.Array
    threshold: jax.Array
    num_learned: jax.Array
    learned: Any
    leaves: LeafReport


class LearningStep(NamedTuple):
    """What a rule makes of one gradient; at a bad step only the norms count.

    Attributes:
      updates: The clipped gradient.
      norm: `RescaledNorm` of the gradient before the clip; not finite if an entry is not.
      leaf_norms: Those of its leaves, as `norm_of` gives them.
      post_norm: Scalar, the norm after the clip; not read where `clip_rate` is 0.
      clip_rate: Scalar float32, share of the step, its leaves or entries that was clipped.
      threshold: Scalar, the new threshold; a NaN makes a bad step.
      learned: The new statistics.
    """

    updates: Any
    norm: RescaledNorm
    leaf_norms: jax.Array | None
    post_norm: jax.Array
    clip_rate: jax.Array
    threshold: jax.Array
    learned: Any


def learning_transform(
    state_type: type[LearningState],
    start: Callable[[Any], tuple[jax.Array, Any]],
    rule: Callable[[Any, Any, Any], LearningStep],
    settings: tuple = (),
) -> optax.GradientTransformationExtraArgs:
    """Makes a transform of a rule that learns from good steps; bad ones give zeros.

    Args:
      state_type: A subclass of `LearningState`, whose name is the name in `clip_stats`.
      start: `start(params)` gives the first threshold (0 for none yet) and statistics; it
        needs only shapes.
      rule: `rule(updates, state, pre_norm)` gives a `LearningStep`; `pre_norm` is the norm if
        it is known already, as `norm_of` takes it.
      settings: Hyper-parameters, scalars, of which a NaN makes a bad step.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept if the rule does.

    Example:
      >>> from jaxclip.norms.scaling import clip_to_norm, norm_of
      >>> def halve_the_last_norm(updates, state, pre_norm):
      ...     norm, each = norm_of(updates, pre_norm)
      ...     bound = jnp.where(state.pre_norm > 0, state.pre_norm / 2, jnp.inf)
      ...     clipped, clip = clip_to_norm(updates, norm, bound)
      ...     return LearningStep(clipped, norm, each, clip.post_norm, clip.is_clipped, bound, ())
      >>> tx = learning_transform(
      ...     LearningState, lambda params: (jnp.zeros(()), ()), halve_the_last_norm
      ... )
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (4.0, jnp.nan, 4.0):
      ...     clipped, state = tx.update(jnp.array([g]), state)
      >>> print(f"{clipped[0]:.3f} {state.num_nonfinite}")
      2.000 1
    """

    def init_fn(params):
        threshold, learned = start(params)
        floats = {n: jnp.zeros((), jnp.float32) for n in ("pre_norm", "post_norm", "clip_rate")}
        counts = {n: jnp.zeros((), jnp.int32) for n in ("step", "num_nonfinite", "num_learned")}
        coef = jnp.ones((), jnp.float32)
        fields = {"threshold": threshold, "learned": learned, "leaves": LeafReport.create(params)}
        return state_type(**floats, **counts, clip_coef=coef, **fields)

    def update_fn(updates, state, params=None, **extra_args):
        del params
        seen = rule(updates, state, extra_args.get("pre_norm"))
        clipped, norm, each, post, rate, threshold, learned = seen
        size = norm_in_float32(norm)
        nan = [jnp.isnan(jnp.asarray(x)) for x in (*settings, threshold)]
        is_bad = jnp.any(jnp.stack([~jnp.isfinite(norm.norm), *nan]))
        enters = ~is_bad & (size > 0)

        def zero_if_bad(g):
            return keep_weak_type(jnp.where(is_bad, jnp.zeros_like(g), g), g)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(enters, n, o), new, old)

        step, rate = increment(state.step), jnp.where(is_bad, 0, rate)
        # Not clipped at all is said by the norm itself, without rounding.
        post = jnp.where(is_bad, 0, jnp.where(rate > 0, jnp.minimum(post, size), size))
        coef = jnp.where(size > 0, post / size, 1)
        return map_clippable(zero_if_bad, clipped), state._replace(
            step=step,
            pre_norm=jnp.where(is_bad, state.pre_norm, size),
            post_norm=post,
            clip_coef=jnp.where(is_bad, 0, coef),
            clip_rate=state.clip_rate + (rate - state.clip_rate) / step.astype(jnp.float32),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
            threshold=keep(clamp(threshold, 0, FLOAT32_MAX), state.threshold),
            num_learned=increment(state.num_learned, enters),
            learned=keep(learned, state.learned),
            leaves=state.leaves.update(each, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def norm_in_float32(norm: RescaledNorm) -> jax.Array:
    """Returns a norm as a finite float32.

    Args:
      norm: As `rescaled_global_norm` gives it; scalars, or arrays of one shape.

    Returns:
      Float32, at most its largest number, 0 below its normal range; NaN if an entry is.

    Example:
      >>> norm = RescaledNorm(jnp.float32(2e38), jnp.float32(0.5))
      >>> bool(norm_in_float32(norm) == jnp.finfo(jnp.float32).max)
      True
    """
    size = jnp.minimum(norm.norm / norm.rescale, FLOAT32_MAX)
    # A float64 norm, too: a subnormal float32 is 0 to one operation and not to the next.
    return jnp.where(size < FLOAT32_TINY, 0, size).astype(jnp.float32)


def zero_per_leaf(params: Any) -> tuple[jax.Array, jax.Array]:
    """Returns a first threshold of 0, and 0 for each floating leaf: a `start` for a rule.

    Args:
      params: Pytree of arrays or shapes.

    Returns:
      A float32 scalar, and a float32 vector with a number for each floating leaf.

    Example:
      >>> zero_per_leaf({"w": jnp.ones((3, 2)), "step": jnp.int32(0)})[1]
      Array([0.], dtype=float32)
    """
    return jnp.zeros((), jnp.float32), jnp.zeros((len(floating_leaves(params)),), jnp.float32)
