"""Clips of single entries against a moving average, of the entry itself or of its leaf's largest.

    |g| <= sqrt(theta * average of g**2)      or      |g| <= average of max|g| over the leaf

`jaxclip.gradients.learning` describes how bad steps are treated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    FLOAT32_MAX,
    clamp,
    compute_dtype,
    exceeds,
    keep_weak_type,
    phase_and_modulus,
    quotient,
    round_toward_zero,
)
from jaxclip._core.trees import PyTree, floating_leaves, is_clippable, replace_floating
from jaxclip.gradients.learning import (
    LearningState,
    LearningStep,
    learning_transform,
    norm_in_float32,
    zero_per_leaf,
)
from jaxclip.norms.of_trees import MeasuredNorm, rescaled_global_norm
from jaxclip.norms.scaling import norm_of

# Covers the rounding of a coefficient and of the products with it.
_MARGIN = 1 - 4 * float(np.finfo(np.float32).eps)


class ClipSpikesState(LearningState):
    """State of `clip_spikes`; `learned` is a tree of each entry's root mean square.

    `threshold` is `sqrt(theta)`, in units of these.
    """

    transform_name = "clip_spikes"


class ClipLeafSpikesState(LearningState):
    """State of `clip_leaf_spikes`; `learned` is the bound on each floating leaf, in order.

    `threshold` is the largest of these.
    """

    transform_name = "clip_leaf_spikes"


def clip_spikes(
    theta: ArrayLike = 5000.0, *, decay: ArrayLike = 0.999, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clips single entries whose square is more than `theta` times its usual value.

    `|g| <= sqrt(theta * v)` entry by entry, then `v <- decay * v + (1 - decay) * g**2` of
    the clipped entry. `v` is corrected for its start at 0, so that `theta` means the same
    from the second step on (SPAM waits some hundred steps instead).

    Args:
      theta: Largest ratio of `g**2` to its average, in [0, inf]. May be traced. The default
        is the published one, for rare and huge spikes: it lets 70 times the usual size
        pass; 10 lets 3 times pass.
      decay: Decay rate of the average, in [0, 1]; 1 is the plain mean. May be traced.
      axis_name: Mapped axis to take the reported norms over inside `shard_map` or `pmap`. Each
        entry is clipped by itself, but a step that is bad on one device is bad on all.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. Its state has a
      float32 number for each parameter. Entries that have been 0 so far are not clipped.

    Raises:
      TypeError: If `theta` or `decay` is not a number.
      ValueError: If an argument is out of its range, or the updates do not fit the state.

    Example:
      >>> tx = clip_spikes(theta=4.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> for g in ([1.0, -1.0], [1.5, -70.0]):
      ...     clipped, state = tx.update(jnp.array(g), state)
      >>> clipped
      Array([ 1.5, -2. ], dtype=float32)

    References:
      Huang et al., SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training,
      2025, https://arxiv.org/abs/2501.06842
    """
    checks.check_threshold("theta", theta)
    checks.check_decay_rate("decay", decay)

    def start(params):
        def zeros(p):
            return jnp.zeros_like(p, dtype=jnp.float32) if is_clippable(p) else jnp.int32(0)

        return jnp.zeros((), jnp.float32), jax.tree.map(zeros, params)

    def rule(updates, state, pre_norm):
        checks.check_same_structure("updates", updates, "rms", state.learned)
        max_ratio, weight = jnp.sqrt(clamp(theta, 0, jnp.inf)), _average_weight(decay, state)
        old_part, new_part = jnp.sqrt(1 - weight), jnp.sqrt(weight)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(state.learned), strict=True)
        clips, averages = [], []
        for g, rms in [(jnp.asarray(g), rms) for g, rms in pairs if is_clippable(g)]:
            clip, modulus = _clip_entries(g, jnp.where(rms > 0, max_ratio * rms, jnp.inf))
            clips.append(clip)
            averages.append(jnp.minimum(jnp.hypot(old_part * rms, new_part * modulus), FLOAT32_MAX))
        learned = replace_floating(updates, averages, state.learned)
        return _learning_step(updates, pre_norm, clips, max_ratio, learned, axis_name)

    return learning_transform(ClipSpikesState, start, rule, (theta, decay))


def clip_leaf_spikes(
    decay: ArrayLike = 0.999, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the entries of a leaf that are above the average of its largest entry.

    `m <- decay * m + (1 - decay) * max|g|`, corrected for its start at 0, and entries with
    `|g| > m` become `g / max|g| * m`: the AdaClip of Stable-SPAM. As published, the maximum
    enters before the clip and unclipped, so frequent spikes of the whole gradient raise the
    bound. Chain a clip of norms after it to limit these.

    Args:
      decay: Decay rate of the average, in [0, 1]; 1 is the plain mean. May be traced.
      axis_name: Mapped axis to take the largest entry over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept.

    Raises:
      TypeError: If `decay` is not a number.
      ValueError: If `decay` is outside [0, 1], or leaves are missing.

    Example:
      >>> tx = clip_leaf_spikes(decay=0.5)
      >>> state = tx.init(jnp.zeros(3))
      >>> for g in ([1.0, 1.0, 1.0], [0.5, 3.5, 4.0]):  # m = (1 + 2 * 4) / 3
      ...     clipped, state = tx.update(jnp.array(g), state)
      >>> print(*(f"{x:.3f}" for x in clipped))
      0.500 2.625 3.000

    References:
      Huang et al., Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam, 2025,
      https://arxiv.org/abs/2502.17055
    """
    checks.check_decay_rate("decay", decay)

    def rule(updates, state, pre_norm):
        leaves, average = [jnp.asarray(x) for x in floating_leaves(updates)], state.learned
        checks.check_num_leaves(leaves, average.size)
        moduli = [_modulus(g) for g in leaves]
        largest = _largest_per_leaf(moduli, axis_name)
        average = average + _average_weight(decay, state) * (largest - average)
        coefs = quotient(average, jnp.where(largest > 0, largest, 1)) * _MARGIN
        clips = list(map(_scale_entries, leaves, moduli, average, coefs))
        threshold = jnp.max(average, initial=0)
        return _learning_step(updates, pre_norm, clips, threshold, average, axis_name)

    return learning_transform(ClipLeafSpikesState, zero_per_leaf, rule, (decay,))


# --- Parts ----------------------------------------------------------------------------


class _EntryClip(NamedTuple):
    """A leaf whose entries were clipped, and the number of those."""

    clipped: jax.Array
    num_clipped: jax.Array


def _average_weight(decay: ArrayLike, state: LearningState) -> jax.Array:
    """Returns the weight of the newest value in a moving average corrected for its start at 0."""
    decay, count = clamp(decay, 0, 1), state.num_learned.astype(jnp.float32) + 1
    weight = (1 - decay) / -jnp.expm1(count * jnp.log(decay))
    return jnp.where((decay == 1) | (count == 1), 1 / count, weight)


def _modulus(g: jax.Array) -> jax.Array:
    """Returns |g| in float32 (float64 for float64)."""
    modulus = phase_and_modulus(g)[1] if jnp.iscomplexobj(g) else jnp.abs(g)
    return modulus.astype(jnp.finfo(compute_dtype(g.dtype)).dtype)


def _largest_per_leaf(moduli: list[jax.Array], axis_name: str | None) -> jax.Array:
    """Returns the largest of each leaf, on all devices of the axis, as a vector."""
    tops = [jnp.minimum(jnp.max(x, initial=0), FLOAT32_MAX).astype(jnp.float32) for x in moduli]
    largest = jnp.stack(tops) if tops else jnp.zeros((0,), jnp.float32)
    return largest if axis_name is None else lax.pmax(largest, axis_name)


def _clip_entries(g: jax.Array, bound: jax.Array) -> tuple[_EntryClip, jax.Array]:
    """Clips a leaf to the bound, and returns also the clipped moduli in float32."""
    modulus = _modulus(g)
    clipped_modulus = jnp.minimum(modulus, bound.astype(modulus.dtype))
    bound = jnp.asarray(round_toward_zero(bound, jnp.finfo(g.dtype).dtype))
    if jnp.iscomplexobj(g):
        is_above = _is_above(g, modulus, bound)
        inside = (bound * _MARGIN).astype(g.dtype)
        clipped = jnp.where(is_above, phase_and_modulus(g)[0] * inside, g)
    else:
        # Not as a minimum and a maximum: those flush subnormals inside the bound to zero.
        is_above = exceeds(g, bound)
        clipped = jnp.where(is_above, jnp.where(g < 0, -bound, bound), g)
    num_clipped = jnp.sum(is_above, dtype=jnp.float32)
    # Bounded in its own dtype first, because a float64 beyond float32 would become infinite.
    clipped_modulus = clamp(jnp.minimum(clipped_modulus, FLOAT32_MAX), 0, FLOAT32_MAX)
    return _EntryClip(keep_weak_type(clipped, g), num_clipped), clipped_modulus


def _is_above(g: jax.Array, modulus: jax.Array, bound: jax.Array) -> jax.Array:
    """Returns True where |g| > bound; by more than its rounding where g is complex."""
    tolerance = 1 + 4 * float(jnp.finfo(modulus.dtype).eps) * jnp.iscomplexobj(g)
    return modulus > bound.astype(modulus.dtype) * tolerance


def _scale_entries(
    g: jax.Array, modulus: jax.Array, bound: jax.Array, coef: jax.Array
) -> _EntryClip:
    """Multiplies the entries above a bound by a coefficient."""
    wide = compute_dtype(g.dtype)
    is_above = _is_above(g, modulus, bound)
    scaled = g.astype(wide) * coef.astype(wide)
    scaled = round_toward_zero(scaled, g.dtype) if wide != g.dtype else scaled
    clipped = keep_weak_type(jnp.where(is_above, scaled, g), g)
    return _EntryClip(clipped, jnp.sum(is_above, dtype=jnp.float32))


def _learning_step(
    updates: optax.Updates,
    pre_norm: MeasuredNorm | ArrayLike | None,
    clips: list[_EntryClip],
    threshold: jax.Array,
    learned: PyTree,
    axis_name: str | None,
) -> LearningStep:
    """Returns the outcome of a rule that has clipped entries."""
    num_entries = sum(clip.clipped.size for clip in clips)
    num_clipped = sum((clip.num_clipped for clip in clips), jnp.zeros((), jnp.float32))
    rate = num_clipped / max(num_entries, 1)
    clipped = [clip.clipped for clip in clips]
    norm, leaf_norms = norm_of(updates, pre_norm, axis_name=axis_name)
    return LearningStep(
        updates=replace_floating(updates, clipped),
        norm=norm,
        leaf_norms=leaf_norms,
        post_norm=norm_in_float32(rescaled_global_norm(clipped, axis_name=axis_name)),
        clip_rate=rate if axis_name is None else lax.pmean(rate, axis_name),
        threshold=threshold,
        learned=learned,
    )
