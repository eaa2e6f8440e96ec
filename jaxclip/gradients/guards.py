"""Wrappers that keep bad steps out of an optimizer.

A skipped step leaves the inner state as it was, bit for bit. Its updates are -0.0, because
`w + -0.0` is `w` even where w is -0.0. Exceptions are subnormals where the backend flushes them
(XLA on CPU does), and updates that a later link multiplies, which may come out as 0.0. Nothing
branches: old and new are selected between.

The gradient decides, so the choice costs one pass over it and no memory. Only `skip_nonfinite`
also checks that the inner transform makes finite updates of a finite gradient; it goes around the
others: `skip_nonfinite(skip_or_clip(...))`.
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

from jaxclip._core import checks
from jaxclip._core.floats import FLOAT32_MAX, FLOAT32_TINY, increment, keep_weak_type
from jaxclip._core.trees import floating_leaves, is_clippable, map_clippable
from jaxclip.gradients.state import ClipStats, LeafReport, keeps_finite
from jaxclip.norms.of_trees import is_nonfinite
from jaxclip.norms.scaling import NormClip, bound_at, clip_to_norm, norm_of
from jaxclip.thresholds.values import check_number_or_schedule


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
      step: Scalar int32, steps so far, skipped ones included.
      inner_state: State of the inner transform.
      num_skipped: Scalar int32, steps skipped so far.
      num_consecutive: Scalar int32, steps skipped since the last that was not.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      is_skipped: Scalar bool, True if the last step was skipped.
    """

    transform_name = "skip_nonfinite"

    step: jax.Array
    inner_state: optax.OptState
    num_skipped: jax.Array
    num_consecutive: jax.Array
    num_nonfinite: jax.Array
    is_skipped: jax.Array


class SkipOrClipState(NamedTuple):
    """State of `skip_or_clip`; norms beyond float32 are kept as its largest number.

    Attributes:
      step: Scalar int32, steps so far, skipped ones included.
      inner_state: State of the inner transform.
      stats: A `ClipStats`; its `clip_coef` is 0 after any skipped step.
      threshold: Scalar float32, above which the last norm was a spike.
      norm_mean: Scalar float32, moving average of the norms of the accepted steps.
      norm_deviation: Scalar float32, their moving standard deviation.
      num_consecutive: Scalar int32, finite spikes skipped since the last accepted step.
      num_skipped: Scalar int32, steps skipped so far, for any reason.
      leaves: A `LeafReport`.
    """

    transform_name = "skip_or_clip"

    step: jax.Array
    inner_state: optax.OptState
    stats: ClipStats
    threshold: jax.Array
    norm_mean: jax.Array
    norm_deviation: jax.Array
    num_consecutive: jax.Array
    num_skipped: jax.Array
    leaves: LeafReport


def skip_nonfinite(
    inner: optax.GradientTransformation,
    *,
    check_inner: bool = True,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips every step that is not finite: parameters and inner state stay as they were.

    Unlike `optax.apply_if_finite`, it never lets a NaN in after a number of bad steps.

    Args:
      inner: Any optax transformation, preferably the whole optimizer.
      check_inner: True to skip also steps with a finite gradient at which the updates or an
        array of the state become non-finite: a second moment that overflows, a learning rate
        of NaN. They count only in `num_skipped`. Scalars of the state are not checked, because
        an infinite threshold is legitimate. The inner transform is then computed twice, so
        that no second copy of its state is kept; but not if it is a chain of jaxclip's sign
        optimizers and clips, which make finite updates of finite gradients and weights.
      axis_name: Mapped axis over which all devices skip together, inside `shard_map` or
        `pmap`. Under `jit` on sharded arrays leave it None: the decision is global already.

    Returns:
      A transform; a skipped step's updates are -0.0. Its `num_consecutive`, which `clip_stats`
      reads, tells a stop rule how many steps in a row were skipped.

    Raises:
      TypeError: If `inner` is not an optax transformation.

    Example:
      >>> w = jnp.array([1.0, -0.0])
      >>> tx = skip_nonfinite(optax.sgd(0.5, momentum=0.9))
      >>> updates, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates), state.num_skipped)
      [ 1. -0.] 1
    """
    inner = checks.check_transformation("inner", inner)

    def init_fn(params):
        return SkipNonfiniteState(
            step=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
            num_skipped=jnp.zeros((), jnp.int32),
            num_consecutive=jnp.zeros((), jnp.int32),
            num_nonfinite=jnp.zeros((), jnp.int32),
            is_skipped=jnp.zeros((), bool),
        )

    def update_fn(updates, state, params=None, **extra_args):
        is_bad = _on_any_device(is_nonfinite(updates, extra_args.get("pre_norm")), axis_name)
        is_skipped = is_bad
        if check_inner and not keeps_finite(state.inner_state):
            # Behind barriers, or XLA would merge the two updates and keep the first one's results.
            g, old = map_clippable(lax.optimization_barrier, (updates, state.inner_state))
            trial = inner.update(g, old, params, **extra_args)
            is_skipped |= _on_any_device(_ceased_to_be_finite(old, *trial), axis_name)
        new = inner.update(updates, state.inner_state, params, **extra_args)
        updates, inner_state = _step_unless(is_skipped, state.inner_state, *new)
        return updates, SkipNonfiniteState(
            step=increment(state.step),
            inner_state=inner_state,
            num_skipped=increment(state.num_skipped, is_skipped),
            num_consecutive=jnp.where(is_skipped, increment(state.num_consecutive), 0),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
            is_skipped=is_skipped,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def skip_or_clip(
    inner: optax.GradientTransformation,
    drop_norm: ArrayLike | optax.Schedule = math.inf,
    max_norm: ArrayLike | optax.Schedule = math.inf,
    *,
    num_deviations: ArrayLike | optax.Schedule = math.inf,
    decay: ArrayLike = 0.99,
    num_warmup: int | jax.Array = 100,
    max_consecutive: int | jax.Array | None = 5,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips the steps whose gradient norm is a spike, and clips the others to `max_norm`.

    A spike is a norm above `drop_norm`, or above `mean + num_deviations * deviation` of the
    norms, before the clip, of the steps accepted so far: `mean <- mean + a * (x - mean)`,
    `variance <- (1 - a) * (variance + a * (x - mean)**2)` for the n-th accepted norm x, with
    `a = max(1 - decay, 1 / n)`: plain mean and variance at first, moving ones later.

    Args:
      inner: Any optax transformation, preferably the whole optimizer.
      drop_norm: Number in [0, inf], traced scalar (below 0 counts as 0), or schedule, in
        the units of the gradient. A traced NaN makes a bad step, here and below.
      max_norm: Bound of the clip, that of `clip_by_global_norm`: number in [0, inf], traced
        scalar, or schedule, in the units of the gradient.
      num_deviations: Number of standard deviations in [0, inf], traced scalar, or schedule;
        with inf the history is not used.
      decay: Decay rate of mean and variance, in [0, 1]. May be traced.
      num_warmup: Number of accepted steps before the history counts; until then `drop_norm`
        alone keeps a spike out of it.
      max_consecutive: After this many finite spikes in a row the next one is accepted,
        clipped, and enters the history. So training continues if the gradients have reached
        a new level. None for never. Non-finite steps are never accepted, and neither
        lengthen nor end a run of spikes.
      axis_name: Mapped axis to take the norm over inside `shard_map` or `pmap`, so that all
        devices skip together. Under `jit` on sharded arrays leave it None.

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
      ...     print(f"{updates[0]:.2f} {state.stats.pre_norm:.0f} {state.stats.clip_coef:.2f}")
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
    min_accepted = _as_count("num_warmup", num_warmup)
    max_spikes = _as_count("max_consecutive", max_consecutive)

    def init_fn(params):
        return SkipOrClipState(
            step=jnp.zeros((), jnp.int32),
            inner_state=inner.init(params),
            stats=ClipStats.create(),
            threshold=jnp.full((), FLOAT32_MAX, jnp.float32),
            norm_mean=jnp.zeros((), jnp.float32),
            norm_deviation=jnp.zeros((), jnp.float32),
            num_consecutive=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            leaves=LeafReport.create(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        norm, leaf_norms = norm_of(updates, extra_args.get("pre_norm"), axis_name=axis_name)
        dtype = norm.norm.dtype
        max_deviations = bound_at("num_deviations", num_deviations, state.step)
        limit = _usual_norm(state, max_deviations, min_accepted).astype(dtype)
        threshold = jnp.minimum(bound_at("drop_norm", drop_norm, state.step, dtype), limit)
        weight = _newest_weight(state, decay)
        bound = bound_at("max_norm", max_norm, state.step, dtype)
        clipped, clip = clip_to_norm(updates, norm, bound)
        is_bad = clip.is_bad | jnp.isnan(threshold) | jnp.isnan(weight)
        is_spike = ~is_bad & (norm.norm > threshold * norm.rescale)
        is_dropped = is_spike & (state.num_consecutive < max_spikes)
        is_skipped = is_bad | is_dropped
        new = inner.update(clipped, state.inner_state, params, **extra_args)
        updates, inner_state = _step_unless(is_skipped, state.inner_state, *new)

        threshold = jnp.minimum(threshold, FLOAT32_MAX).astype(jnp.float32)
        state = _counted(state, clip, weight, is_bad, is_dropped)
        return updates, state._replace(
            inner_state=inner_state,
            threshold=jnp.where(is_bad, state.threshold, threshold),
            leaves=state.leaves.update(leaf_norms, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- Parts ----------------------------------------------------------------------------


def _as_count(name: str, given: int | jax.Array | None) -> jax.Array | np.int32:
    """Returns a count as int32; None is a count that is never reached."""
    if given is not None:
        checks.check_traced_count(name, given)
    if isinstance(given, jax.Array):
        return given.astype(jnp.int32)
    return np.int32(np.iinfo(np.int32).max if given is None else given)


def _usual_norm(
    state: SkipOrClipState, num_deviations: jax.Array, min_accepted: jax.Array | np.int32
) -> jax.Array:
    """Returns the largest norm that is not a spike by the history; inf in warm-up."""
    # Not 0 times an infinite number of deviations, which would be NaN.
    deviation = jnp.maximum(state.norm_deviation, FLOAT32_TINY)
    limit = num_deviations * deviation + state.norm_mean
    return jnp.where(state.step - state.num_skipped >= min_accepted, limit, jnp.inf)


def _newest_weight(state: SkipOrClipState, decay: ArrayLike) -> jax.Array:
    """Returns the weight of the next norm in the moving averages, at first that of a plain mean."""
    count = state.step - state.num_skipped + 1
    weight = 1 - jnp.asarray(decay).astype(jnp.float32)
    return jnp.clip(jnp.maximum(weight, 1 / count.astype(jnp.float32)), 0, 1)


def _counted(
    state: SkipOrClipState,
    clip: NormClip,
    weight: jax.Array,
    is_bad: jax.Array,
    is_dropped: jax.Array,
) -> SkipOrClipState:
    """Returns the state with one more step in its statistics, counts and moving averages."""
    is_skipped, step = is_bad | is_dropped, increment(state.step)
    stats = state.stats.update(
        is_bad,
        pre_norm=clip.pre_norm,
        post_norm=jnp.where(is_skipped, 0, clip.post_norm),
        clip_coef=jnp.where(is_skipped, 0, clip.clip_coef),
        clip_rate=jnp.where(is_skipped, 0, clip.is_clipped),
        num_steps=step,
    )
    change = stats.pre_norm - state.norm_mean
    # Of the deviation, not the variance: squares of large norms overflow.
    deviation = jnp.hypot(state.norm_deviation, jnp.sqrt(weight) * change)
    deviation = jnp.sqrt(1 - weight) * deviation
    num_consecutive = jnp.where(is_skipped, state.num_consecutive, 0)
    return state._replace(
        step=step,
        stats=stats,
        norm_mean=jnp.where(is_skipped, state.norm_mean, state.norm_mean + weight * change),
        norm_deviation=jnp.where(is_skipped, state.norm_deviation, deviation),
        num_consecutive=increment(num_consecutive, is_dropped),
        num_skipped=increment(state.num_skipped, is_skipped),
    )


def _on_any_device(flag: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns True if a flag holds on any device of the axis."""
    return flag if axis_name is None else lax.pmax(flag.astype(jnp.int32), axis_name) > 0


def _ceased_to_be_finite(
    old_state: optax.OptState, updates: optax.Updates, new_state: optax.OptState
) -> jax.Array:
    """Returns True if an update, or an entry of the state that was finite before, is not finite."""
    # From conditions, which XLA on CPU writes to memory: a byte per entry. With a sum, as in
    # `has_nonfinite`, it would write the updates themselves, which are not kept otherwise.
    pairs = zip(jax.tree.leaves(old_state), jax.tree.leaves(new_state), strict=True)
    is_good = [jnp.all(jnp.isfinite(u)) for u in floating_leaves(updates)]
    is_good += [
        jnp.all(~jnp.isfinite(old) | jnp.isfinite(new))
        for old, new in pairs
        if is_clippable(new) and jnp.ndim(new)
    ]
    return ~jnp.all(jnp.stack(is_good)) if is_good else jnp.zeros((), bool)


def _step_unless(
    is_skipped: jax.Array,
    old_state: optax.OptState,
    updates: optax.Updates,
    new_state: optax.OptState,
) -> tuple[optax.Updates, optax.OptState]:
    """Returns the updates and state of a step, or -0.0 and the old state."""
    select = functools.partial(_select, is_skipped)
    updates = map_clippable(lambda u: select(-jnp.zeros_like(u), u), updates)
    return updates, jax.tree.map(select, old_state, new_state)


def _select(condition: jax.Array, old: Any, new: Any) -> Any:
    if new is old or getattr(new, "dtype", None) == jax.dtypes.float0:
        return new
    selected = jnp.where(condition, old, new)
    return keep_weak_type(selected, old) if getattr(old, "weak_type", False) else selected
