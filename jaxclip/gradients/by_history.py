"""Clips whose threshold is a norm, learned from the norms of earlier steps.

Three rules for a threshold t from norms n: a running quantile of n (`autoclip`), `mean + z * std`
(`zclip`), and for each leaf `relative * average of n` (`adagc`). `jaxclip.gradients.learning`
describes how bad steps are treated.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import FLOAT32_MAX, FLOAT32_TINY, clamp, increment, not_folded
from jaxclip._core.trees import PyTree, floating_leaves, replace_floating
from jaxclip.gradients.learning import (
    LearningState,
    LearningStep,
    learning_transform,
    norm_in_float32,
    zero_per_leaf,
)
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.of_units import rescaled_unit_norm
from jaxclip.norms.scaling import bound_at, clip_to_norm, norm_of, norm_of_norms
from jaxclip.thresholds.values import check_number_or_schedule


class AutoclipState(LearningState):
    """State of `autoclip`; `learned` is the window, newest norm last, 0 where empty, or ()."""

    transform_name = "autoclip"


class ZclipState(LearningState):
    """State of `zclip`; `learned` has "mean" and "std", `threshold` is `mean + z * std`."""

    transform_name = "zclip"


class AdagcState(LearningState):
    """State of `adagc`; `learned` is the reference of each floating leaf, in order.

    `threshold` is the largest global norm that the last step could have let through.
    """

    transform_name = "adagc"


def autoclip(
    quantile: ArrayLike = 0.1,
    *,
    window: int | None = None,
    initial: ArrayLike | None = None,
    learning_rate: ArrayLike = 0.05,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm at a running quantile of the norms seen so far.

    `t <- t * exp(learning_rate * (quantile - [norm <= t]))`, which settles where the fraction
    `quantile` of the norms is below `t`; or with `window=n` the exact quantile of the last
    `n` norms. A norm enters before the clip and unclipped, as in AutoClip.

    Args:
      quantile: Fraction of the steps that are not clipped, in [0, 1]. May be traced.
      window: Number of norms to remember; None for the tracker, which keeps `t` alone.
      initial: Positive `t` to start at; None for the first norm. May be traced.
      learning_rate: Step of the tracker's logarithm, not negative. May be traced.
      axis_name: Mapped axis to take the norm over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None: the norm is global already.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept.

    Raises:
      TypeError: If a number is of a wrong type.
      ValueError: If an argument is out of its range, or `initial` comes with `window`.

    Example:
      >>> tx = autoclip(0.5, window=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 900.0):
      ...     clipped, state = tx.update(jnp.array([norm]), state)
      >>> print(f"{clipped[0]:.3f} {state.stats.pre_norm} {state.threshold}")
      2.000 900.0 2.0

    References:
      Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks, 2020, https://arxiv.org/abs/2007.14469
      Andrew et al., Differentially Private Learning with Adaptive Clipping, 2019,
      https://arxiv.org/abs/1905.03871
    """
    checks.check_decay_rate("quantile", quantile)
    checks.check_nonnegative("learning_rate", learning_rate)
    if window is not None:
        checks.check_count("window", window)
    if initial is not None:
        checks.check_positive("initial", initial)
        if window is not None:
            raise ValueError("initial must be None with a window: its norms set the threshold.")

    def start(params):
        del params
        first = jnp.array(0.0 if initial is None else clamp(initial, 0, FLOAT32_MAX), jnp.float32)
        return first, () if window is None else jnp.zeros((window,), jnp.float32)

    def rule(updates, state, pre_norm):
        norm, leaf_norms = norm_of(updates, pre_norm, axis_name=axis_name)
        size = norm_in_float32(norm)
        t, history, fraction = state.threshold, state.learned, clamp(quantile, 0, 1)
        if window is None:
            is_below = (size <= t).astype(jnp.float32)
            moved = t * jnp.exp(clamp(learning_rate, 0, FLOAT32_MAX) * (fraction - is_below))
            t = jnp.where(t > 0, clamp(moved, FLOAT32_TINY, FLOAT32_MAX), size)
        else:
            history = jnp.concatenate([history[1:], size[None]])
            t = _quantile_of_window(history, fraction)
        # Decided in float32, as `t` is: the first norm is not above itself.
        bound = jnp.where(size > t, t, jnp.inf)
        return _clip_globally(updates, norm, leaf_norms, bound, t, history)

    return learning_transform(AutoclipState, start, rule, (quantile, learning_rate))


def zclip(
    z: ArrayLike = 2.5,
    alpha: ArrayLike = 0.97,
    warmup: int = 25,
    *,
    max_norm: ArrayLike | optax.Schedule = math.inf,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm where it is a spike: more than `z` deviations above its mean.

    Where `s = (norm - mean) / std > z` the norm becomes `mean + z**2 / s * std`, which is lower
    for larger spikes. Then `mean <- alpha * mean + (1 - alpha) * norm` and
    `var <- alpha * var + (1 - alpha) * (norm - mean)**2`, with the clipped norm and the new
    mean. They start from the mean and variance of the first `warmup` norms. As published,
    these are not clipped, so a spike among them passes and hides later ones. A `max_norm`
    clips them first.

    Args:
      z: Deviations above the mean that make a spike, in [0, inf]. May be traced.
      alpha: Decay rate of the mean and variance, in [0, 1]. May be traced.
      warmup: Number of norms in the first mean and variance; 0 counts as 1.
      max_norm: Bound while there is no statistic to clip by, in warm-up and until the
        variance is not 0: number in [0, inf], traced scalar, or schedule. Choose a few times
        the usual norm: if every norm of the warm-up is above it, it stays the bound.
      axis_name: Mapped axis to take the norm over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None: the norm is global already.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. A lasting rise
      of the norm is followed slowly.

    Raises:
      TypeError: If `z`, `alpha` or `max_norm` is of a wrong type.
      ValueError: If an argument is out of its range.

    Example:
      >>> tx = zclip(z=2.0, warmup=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 10.0):  # mean 2, deviation 1: 10 is 8 above
      ...     clipped, state = tx.update(jnp.array([norm]), state)
      >>> print(f"{clipped[0]:.3f}")
      2.500

    References:
      Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
      https://arxiv.org/abs/2504.02507
    """
    checks.check_threshold("z", z)
    checks.check_decay_rate("alpha", alpha)
    checks.check_traced_count("warmup", warmup, at_least=0)
    check_number_or_schedule("max_norm", max_norm)

    def start(params):
        del params
        learned = {name: jnp.zeros((), jnp.float32) for name in ("mean", "std")}
        return jnp.zeros((), jnp.float32), learned

    def rule(updates, state, pre_norm):
        norm, leaf_norms = norm_of(updates, pre_norm, axis_name=axis_name)
        size = norm_in_float32(norm)
        mean, std, num_stds = state.learned["mean"], state.learned["std"], clamp(z, 0, jnp.inf)
        deviation, max_deviation = size - mean, num_stds * std
        count = increment(state.num_learned)
        is_warm = count <= jnp.maximum(warmup, 1)
        has_std = ~is_warm & (std > 0)
        is_spike = has_std & (deviation > max_deviation)
        spike_bound = mean + max_deviation * (max_deviation / jnp.where(is_spike, deviation, 1))
        usual_bound = jnp.where(has_std, jnp.inf, bound_at("max_norm", max_norm, state.step))
        bound = jnp.where(is_spike, spike_bound, usual_bound)

        # In warm-up the plain mean and variance (Welford), then moving averages.
        decay = jnp.where(is_warm, 1 - 1 / count.astype(jnp.float32), clamp(alpha, 0, 1))
        change = jnp.minimum(bound, size) - mean
        off_mean = change * jnp.where(is_warm, jnp.sqrt(decay), decay)
        std = jnp.hypot(jnp.sqrt(decay) * std, jnp.sqrt(1 - decay) * off_mean)
        mean, std = mean + (1 - decay) * change, clamp(std, 0, FLOAT32_MAX)
        threshold = mean + jnp.where(std > 0, num_stds * std, 0)  # z may be inf
        learned = {"mean": mean, "std": std}
        return _clip_globally(updates, norm, leaf_norms, bound, threshold, learned)

    return learning_transform(ZclipState, start, rule, (z, alpha))


def adagc(
    relative: ArrayLike = 1.05,
    beta: ArrayLike = 0.98,
    warmup: int = 100,
    *,
    max_norm: ArrayLike | optax.Schedule = 1.0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the norm of each leaf relative to the average of its own clipped norms.

    `g <- g * min(1, relative * r / norm(g))` and, with the clipped norm,
    `r <- beta * r + (1 - beta) * norm(g)`, leaf by leaf. In warm-up the global norm is
    clipped to `max_norm` instead, and `r` is the leaf's smallest clipped norm. For any
    optimizer, not only Adam.

    Args:
      relative: Bound on a leaf's norm in units of `r`, in [0, inf]. May be traced.
      beta: Decay rate of the references `r`, in [0, 1]. May be traced.
      warmup: Number of steps of warm-up; with 0 a leaf starts at its first norm, unclipped.
      max_norm: Bound in warm-up: number in [0, inf], traced scalar, or schedule.
      axis_name: Mapped axis to take the norms over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept.

    Raises:
      TypeError: If a number is of a wrong type.
      ValueError: If an argument is out of its range, or leaves are missing.

    Example:
      >>> tx = adagc(warmup=0)
      >>> state = tx.init({"w": jnp.zeros(1), "b": jnp.zeros(1)})
      >>> for w in (2.0, 50.0):
      ...     clipped, state = tx.update({"w": jnp.array([w]), "b": jnp.array([9.0])}, state)
      >>> print(f"{clipped['w'][0]:.3f} {clipped['b'][0]:.3f}")
      2.100 9.000

    References:
      Wang et al., AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
      Clipping, 2025, https://arxiv.org/abs/2502.11034
    """
    checks.check_threshold("relative", relative)
    checks.check_decay_rate("beta", beta)
    checks.check_traced_count("warmup", warmup, at_least=0)
    check_number_or_schedule("max_norm", max_norm)

    def rule(updates, state, pre_norm):
        del pre_norm
        leaves, reference = [jnp.asarray(x) for x in floating_leaves(updates)], state.learned
        checks.check_num_leaves(leaves, reference.size)
        norms = [rescaled_unit_norm(x, tuple(range(x.ndim)), axis_name=axis_name) for x in leaves]
        norm = _norm_of_leaf_norms(norms)
        is_warm = state.num_learned < warmup
        max_global = bound_at("max_norm", max_norm, state.step, norm.norm.dtype)
        max_own = jnp.where(reference > 0, clamp(relative, 0, jnp.inf) * reference, jnp.inf)
        # In warm-up one coefficient for all, that of the global norm.
        deciding = [_select_norm(is_warm, norm, n) for n in norms]
        bounds = jnp.where(is_warm, max_global, max_own.astype(max_global.dtype))
        pairs = zip(leaves, deciding, strict=True)
        clips = [clip_to_norm(x, n, bounds[i]) for i, (x, n) in enumerate(pairs)]

        sizes = _stack(map(norm_in_float32, norms))
        coefs = _stack(clip.clip_coef for _, clip in clips)
        clipped_sizes = jnp.where(is_warm, sizes * coefs, jnp.minimum(sizes, max_own))
        is_finite = _stack(jnp.isfinite(n.norm) for n in norms).astype(bool)
        max_global = jnp.minimum(max_global, FLOAT32_MAX).astype(jnp.float32)
        return LearningStep(
            updates=replace_floating(updates, [x for x, _ in clips]),
            norm=norm,
            leaf_norms=jnp.where(is_finite, sizes, jnp.nan),
            post_norm=norm_of_norms(clipped_sizes),
            clip_rate=jnp.sum(_stack(clip.is_clipped for _, clip in clips)) / max(len(leaves), 1),
            threshold=jnp.where(is_warm, max_global, norm_of_norms(clamp(max_own, 0, FLOAT32_MAX))),
            learned=_moved_reference(reference, clipped_sizes, beta, is_warm),
        )

    return learning_transform(AdagcState, zero_per_leaf, rule, (relative, beta))


# --- Parts ----------------------------------------------------------------------------


def _clip_globally(
    updates: optax.Updates,
    norm: RescaledNorm,
    leaf_norms: jax.Array | None,
    bound: jax.Array,
    threshold: jax.Array,
    learned: PyTree,
) -> LearningStep:
    """Clips the global norm to a bound, as the outcome of a rule."""
    clipped, clip = clip_to_norm(updates, norm, bound)
    return LearningStep(
        updates=clipped,
        norm=norm,
        leaf_norms=leaf_norms,
        post_norm=clip.post_norm,
        clip_rate=clip.is_clipped,
        threshold=threshold,
        learned=learned,
    )


def _moved_reference(
    reference: jax.Array, clipped_sizes: jax.Array, beta: ArrayLike, is_warm: jax.Array
) -> jax.Array:
    """Returns the references of leaves after a step: the smallest in warm-up, then an average."""
    average = reference + (1 - clamp(beta, 0, 1)) * (clipped_sizes - reference)
    moved = jnp.where(is_warm, jnp.minimum(reference, clipped_sizes), average)
    moved = jnp.where(reference > 0, moved, clipped_sizes)
    return jnp.where(clipped_sizes > 0, moved, reference)


def _stack(scalars: Iterable[jax.Array]) -> jax.Array:
    scalars = [x.reshape(()) for x in scalars]
    return jnp.stack(scalars) if scalars else jnp.zeros((0,), jnp.float32)


def _select_norm(condition: jax.Array, one: RescaledNorm, other: RescaledNorm) -> RescaledNorm:
    """Returns one of two norms, as scalars in the dtype of the first."""
    pairs = zip(one, other, strict=True)
    return RescaledNorm(*(jnp.where(condition, a, b.reshape(()).astype(a.dtype)) for a, b in pairs))


def _norm_of_leaf_norms(parts: list[RescaledNorm]) -> RescaledNorm:
    """Returns the norm of a tree from those of its leaves."""
    dtype = jnp.float64 if any(p.norm.dtype == jnp.float64 for p in parts) else jnp.float32
    norms = _stack(p.norm.astype(dtype) for p in parts)
    rescales = _stack(p.rescale.astype(dtype) for p in parts)
    # Divided by an unknown 1: XLA copies cheaper operations into the kernel of every leaf.
    one = not_folded(jnp.ones((), dtype))
    rescale = jnp.min(rescales, initial=jnp.finfo(dtype).max) / one
    # A leaf that was scaled up is too small to count in a tree with one that was not.
    return RescaledNorm(norm_of_norms(norms * (rescale / rescales)), rescale)


def _quantile_of_window(history: jax.Array, fraction: jax.Array) -> jax.Array:
    """Returns the quantile of the positive entries, linear between two; empty places are 0."""
    ordered, count = jnp.sort(history), jnp.sum(history > 0, dtype=jnp.int32)
    place = fraction * jnp.maximum(count - 1, 0).astype(jnp.float32)
    below = history.size - count + jnp.floor(place).astype(jnp.int32)
    low = ordered[jnp.clip(below, 0, history.size - 1)]
    high = ordered[jnp.clip(below + 1, 0, history.size - 1)]
    return low + (place - jnp.floor(place)) * (high - low)
