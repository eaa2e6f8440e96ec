"""Wrappers that keep bad steps out of an optimizer.

A skipped step leaves the inner state as it was, bit for bit, and its updates are -0.0, for
`w + -0.0` is `w` even where w is -0.0 (but for subnormals where the backend flushes them,
as XLA on CPU does; and an update that is multiplied further down a chain may come out as
0.0). Nothing branches: old and new are selected between.

The gradient decides, so that the choice costs one pass over it and no memory. That what
the inner transform makes of a finite gradient is finite, too, `skip_nonfinite` alone
checks; it goes around the others: `skip_nonfinite(skip_or_clip(...))`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.floats import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    increment,
    keep_weak_type,
    round_toward_zero,
)
from jaxclip._core.trees import map_clippable
from jaxclip.norms.of_trees import is_nonfinite
from jaxclip.norms.scaling import clip_to_norm, norm_of
from jaxclip.norms.state import LeafReport
from jaxclip.thresholds.values import check_number_or_schedule


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
      step: Scalar int32, steps so far, skipped ones included.
      inner_state: State of the inner transform.
      num_skipped: Scalar int32, steps skipped so far.
      num_consecutive: Scalar int32, steps skipped since the last that was not.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      is_skipped: Scalar bool, whether the last step was skipped.
      is_exhausted: Scalar bool, whether at least the last `max_consecutive` steps were.
    """

    step: jax.Array
    inner_state: Any
    num_skipped: jax.Array
    num_consecutive: jax.Array
    num_nonfinite: jax.Array
    is_skipped: jax.Array
    is_exhausted: jax.Array


class SkipOrClipState(NamedTuple):
    """State of `skip_or_clip`; norms beyond float32 are kept as its largest number.

    Attributes:
      step: Scalar int32, steps so far, skipped ones included.
      inner_state: State of the inner transform.
      pre_norm: Scalar float32, norm of the last finite gradient, before the clip.
      post_norm: Scalar float32, `clip_coef * pre_norm`; 0 after a skipped step.
      clip_coef: Scalar float32 in [0, 1], as in `clip_by_global_norm`; 0 if skipped.
      clip_rate: Scalar float32, share of the steps so far that were clipped.
      threshold: Scalar float32, above which the last norm was a spike.
      norm_mean: Scalar float32, moving average of the norms of the accepted steps.
      norm_deviation: Scalar float32, their moving standard deviation.
      num_consecutive: Scalar int32, finite spikes skipped since the last accepted step.
      num_skipped: Scalar int32, steps skipped so far, for any reason.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      leaves: A `LeafReport`.
    """

    step: jax.Array
    inner_state: Any
    pre_norm: jax.Array
    post_norm: jax.Array
    clip_coef: jax.Array
    clip_rate: jax.Array
    threshold: jax.Array
    norm_mean: jax.Array
    norm_deviation: jax.Array
    num_consecutive: jax.Array
    num_skipped: jax.Array
    num_nonfinite: jax.Array
    leaves: LeafReport


def skip_nonfinite(
    inner: optax.GradientTransformation,
    max_consecutive: ArrayLike | None = None,
    *,
    check_inner: bool = True,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips every step that is not finite: parameters and inner state stay as they were.

    Unlike `optax.apply_if_finite`, it never gives up and lets a NaN in.

    Args:
      inner: Any optax transformation, best the whole optimizer.
      max_consecutive: After this many skipped steps in a row the state's `is_exhausted` is
        set, for a stop rule to read; steps are skipped all the same. None for never.
      check_inner: Whether to skip, and count in `num_skipped` alone, also steps at which the
        gradient was finite, but the updates or an array of the state ceased to be: a second
        moment that overflows, a learning rate of NaN. Scalars of the state do not count, as
        an infinite threshold is legitimate. The inner transform is then computed twice, so
        that no second copy of its state is kept.
      axis_name: Mapped axis over which all devices skip together, inside `shard_map` or
        `pmap`. Under `jit` on sharded arrays leave it None: the decision is global already.

    Returns:
      A transform; a skipped step's updates are -0.0.

    Raises:
      TypeError: If `inner` is not an optax transformation.
      ValueError: If `max_consecutive` is not an integer of at least 1.

    Example:
      >>> w = jnp.array([1.0, -0.0])
      >>> tx = skip_nonfinite(optax.sgd(0.5, momentum=0.9))
      >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates), state.num_skipped)
      [ 1. -0.] 1
    """
    inner = checks.check_transformation("inner", inner)
    limit = _as_limit("max_consecutive", max_consecutive)

    def init_fn(params):
        return SkipNonfiniteState(
            step=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
            num_skipped=jnp.zeros((), jnp.int32),
            num_consecutive=jnp.zeros((), jnp.int32),
            num_nonfinite=jnp.zeros((), jnp.int32),
            is_skipped=jnp.zeros((), bool),
            is_exhausted=jnp.zeros((), bool),
        )

    def update_fn(updates, state, params=None, **extra_args):
        is_bad = _anywhere(is_nonfinite(updates, extra_args.get("pre_norm")), axis_name)
        is_skipped = is_bad
        if check_inner:
            # Behind barriers, lest XLA merge the two and hold on to what the first gives.
            g, old = map_clippable(lax.optimization_barrier, (updates, state.inner_state))
            trial = inner.update(g, old, params, **extra_args)
            is_skipped |= _anywhere(_spoilt(old, *trial), axis_name)
        new = inner.update(updates, state.inner_state, params, **extra_args)
        updates, inner_state = _unless(is_skipped, state.inner_state, *new)
        consecutive = jnp.where(is_skipped, increment(state.num_consecutive), 0)
        return updates, SkipNonfiniteState(
            step=increment(state.step),
            inner_state=inner_state,
            num_skipped=increment(state.num_skipped, is_skipped),
            num_consecutive=consecutive,
            num_nonfinite=increment(state.num_nonfinite, is_bad),
            is_skipped=is_skipped,
            is_exhausted=consecutive >= limit,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def skip_or_clip(
    inner: optax.GradientTransformation,
    drop_norm: Any = math.inf,
    max_norm: Any = math.inf,
    *,
    num_deviations: Any = math.inf,
    decay: ArrayLike = 0.99,
    num_warmup: ArrayLike = 100,
    max_consecutive: ArrayLike | None = 5,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips the steps whose gradient norm is a spike, and clips the others to `max_norm`.

    A spike is a norm above `drop_norm`, or above `mean + num_deviations * deviation` of the
    norms, before the clip, of the steps accepted so far: `mean <- mean + a * (x - mean)`,
    `variance <- (1 - a) * (variance + a * (x - mean)**2)` for the n-th accepted norm x, with
    `a = max(1 - decay, 1 / n)`: plain mean and variance at first, moving ones later.

    Args:
      inner: Any optax transformation, best the whole optimizer.
      drop_norm: Number in [0, inf], traced scalar (below 0 counts as 0), or schedule, in
        the units of the gradient. A traced NaN makes a bad step, here and below.
      max_norm: As `drop_norm`; the clip is that of `clip_by_global_norm`.
      num_deviations: As `drop_norm`, in standard deviations; inf: history plays no part.
      decay: Decay rate of mean and variance, in [0, 1]. May be traced.
      num_warmup: Accepted steps before the history counts; until then `drop_norm` alone
        keeps a spike out of it.
      max_consecutive: After this many finite spikes in a row the next one is accepted,
        clipped, and enters the history: training goes on where the gradients have moved to
        a new level. None for never. Non-finite steps are never accepted, and neither
        lengthen nor end a row of spikes.
      axis_name: As in `skip_nonfinite`; the norm is taken over it, too.

    Returns:
      A transform; a skipped step's updates are -0.0.

    Raises:
      TypeError: If `inner` is not an optax transformation, or a number is of a wrong type.
      ValueError: If a number is out of its range.

    Example:
      >>> tx = skip_or_clip(optax.sgd(1.0), drop_norm=100.0, max_norm=1.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> for grads in jnp.array([[3.0, 4.0], [300.0, 400.0]]):
      ...     updates, state = tx.update(grads, state)
      ...     print(f"{updates[0]:.2f} {state.pre_norm:.0f} {state.clip_coef:.2f}")
      -0.60 5 0.20
      -0.00 500 0.00

    References:
      Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
      https://arxiv.org/abs/2504.02507
    """
    inner = checks.check_transformation("inner", inner)
    check_number_or_schedule("drop_norm", drop_norm)
    check_number_or_schedule("max_norm", max_norm)
    check_number_or_schedule("num_deviations", num_deviations)
    checks.check_decay_rate("decay", decay)
    num_warmup = _as_limit("num_warmup", num_warmup)
    max_spikes = _as_limit("max_consecutive", max_consecutive)

    def init_fn(params):
        return SkipOrClipState(
            step=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
            pre_norm=jnp.zeros((), jnp.float32),
            post_norm=jnp.zeros((), jnp.float32),
            clip_coef=jnp.ones((), jnp.float32),
            clip_rate=jnp.zeros((), jnp.float32),
            threshold=jnp.full((), FLOAT32_MAX, jnp.float32),
            norm_mean=jnp.zeros((), jnp.float32),
            norm_deviation=jnp.zeros((), jnp.float32),
            num_consecutive=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            num_nonfinite=jnp.zeros((), jnp.int32),
            leaves=LeafReport.create(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        norm, each = norm_of(updates, extra_args.get("pre_norm"), axis_name=axis_name)
        dtype = norm.norm.dtype
        num_accepted = state.step - state.num_skipped
        # Not 0 times an infinite number of deviations, which would be NaN.
        deviation = jnp.maximum(state.norm_deviation, FLOAT32_TINY)
        limit = _bound_at(num_deviations, state.step, jnp.float32) * deviation + state.norm_mean
        limit = jnp.where(num_accepted >= num_warmup, limit, jnp.inf)
        threshold = jnp.minimum(_bound_at(drop_norm, state.step, dtype), limit.astype(dtype))
        weight = 1 - jnp.asarray(decay).astype(jnp.float32)
        weight = jnp.clip(jnp.maximum(weight, 1 / (num_accepted + 1).astype(jnp.float32)), 0, 1)

        clipped, clip = clip_to_norm(updates, norm, _bound_at(max_norm, state.step, dtype))
        is_bad = clip.is_bad | jnp.isnan(threshold) | jnp.isnan(weight)
        is_spike = ~is_bad & (norm.norm > threshold * norm.rescale)
        is_dropped = is_spike & (state.num_consecutive < max_spikes)
        new = inner.update(clipped, state.inner_state, params, **extra_args)
        is_skipped = is_bad | is_dropped
        updates, inner_state = _unless(is_skipped, state.inner_state, *new)

        pre_norm = jnp.where(is_bad, state.pre_norm, clip.pre_norm)
        threshold32 = jnp.minimum(threshold, FLOAT32_MAX).astype(jnp.float32)
        change = pre_norm - state.norm_mean
        # Of the deviation, not the variance: squares of large norms overflow.
        deviation = jnp.hypot(state.norm_deviation, jnp.sqrt(weight) * change)
        deviation = jnp.sqrt(1 - weight) * deviation
        consecutive = jnp.where(is_skipped, state.num_consecutive, 0)
        step = increment(state.step)
        is_clipped = jnp.where(is_skipped, 0, clip.is_clipped)
        return updates, SkipOrClipState(
            step=step,
            inner_state=inner_state,
            pre_norm=pre_norm,
            post_norm=jnp.where(is_skipped, 0, clip.post_norm),
            clip_coef=jnp.where(is_skipped, 0, clip.clip_coef),
            clip_rate=state.clip_rate + (is_clipped - state.clip_rate) / step.astype(jnp.float32),
            threshold=jnp.where(is_bad, state.threshold, threshold32),
            norm_mean=jnp.where(is_skipped, state.norm_mean, state.norm_mean + weight * change),
            norm_deviation=jnp.where(is_skipped, state.norm_deviation, deviation),
            num_consecutive=increment(consecutive, is_dropped),
            num_skipped=increment(state.num_skipped, is_skipped),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
            leaves=state.leaves.update(each, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- Parts ----------------------------------------------------------------------------


def _as_limit(name: str, given: Any) -> Any:
    """A count as int32 where it is compared; None is a count that is not reached."""
    if isinstance(given, jax.Array):
        return given.astype(jnp.int32)
    if given is not None:
        checks.check_count(name, given)
    return np.int32(np.iinfo(np.int32).max if given is None else given)


def _bound_at(given: Any, step: jax.Array, dtype: Any) -> jax.Array:
    """The number, or what the schedule gives, in `dtype`; below 0 counts as 0."""
    value: Any = given(step) if callable(given) else given
    return jnp.maximum(jnp.asarray(round_toward_zero(value, dtype)), 0)


def _anywhere(flag: jax.Array, axis_name: str | None) -> jax.Array:
    """Whether a flag holds on any device of the axis."""
    return flag if axis_name is None else lax.pmax(flag.astype(jnp.int32), axis_name) > 0


def _spoilt(old_state: Any, updates: Any, new_state: Any) -> jax.Array:
    """Whether an update is not finite, or an entry of the state's arrays has ceased to be.

    From conditions, which XLA on CPU writes out: a byte an entry. Of a sum, as in
    `has_nonfinite`, it would write out the updates themselves, which are not kept otherwise.
    """
    pairs = zip(jax.tree.leaves(old_state), jax.tree.leaves(new_state), strict=True)
    kept = [jnp.all(jnp.isfinite(u)) for u in trees.floating_leaves(updates)]
    kept += [
        jnp.all(~jnp.isfinite(old) | jnp.isfinite(new))
        for old, new in pairs
        if trees.is_clippable(new) and jnp.ndim(new)
    ]
    return ~jnp.all(jnp.stack(kept)) if kept else jnp.zeros((), bool)


def _unless(is_skipped: jax.Array, old_state: Any, updates: Any, new_state: Any) -> tuple:
    """The updates and state of a step, or -0.0 and the old state."""
    keep = functools.partial(_keep_if, is_skipped)
    updates = map_clippable(lambda u: keep(-jnp.zeros_like(u), u), updates)
    return updates, jax.tree.map(keep, old_state, new_state)


def _keep_if(condition: jax.Array, old: Any, new: Any) -> Any:
    if new is old or getattr(new, "dtype", None) == jax.dtypes.float0:
        return new
    kept = jnp.where(condition, old, new)
    return keep_weak_type(kept, old) if getattr(old, "weak_type", False) else kept
