"""Gradient clipping with a threshold learned from history.

Each transform keeps a statistic of past gradients, and three rules hold for all of them:

* A NaN or an infinity in the gradient, or a traced hyper-parameter that is NaN, makes a bad
  step: zeros, counted in `num_nonfinite`; every statistic stays as it was, bit for bit.
* A gradient of zeros enters no statistic, and a statistic that is still zero clips nothing:
  layers whose gradients begin at zero (adapters, unused embeddings) are not frozen.
* Statistics are float32 and finite: larger norms count as the largest float32, averages of
  squares are kept as roots. Traced hyper-parameters are clamped to their range.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip import _checks
from jaxclip._checks import compute_dtype, increment, is_clippable, keep_weak_type
from jaxclip.gradients import clip_to_norm
from jaxclip.norms import RescaledNorm, rescaled_global_norm, unit_and_modulus
from jaxclip.thresholds import round_toward_zero

__all__ = [
    "AdagcState",
    "AutoclipState",
    "ClipLeafSpikesState",
    "ClipSpikesState",
    "ZclipState",
    "adagc",
    "autoclip",
    "clip_leaf_spikes",
    "clip_spikes",
    "zclip",
]

_MAX, _TINY = np.finfo(np.float32).max, np.finfo(np.float32).tiny
# Covers the rounding of a coefficient and of the products with it.
_MARGIN = 1 - 4 * np.finfo(np.float32).eps


class _State(NamedTuple):
    """What every transform of this room keeps; scalars, float32 but for the counts.

    Attributes:
      step, pre_norm, post_norm, num_nonfinite: As in `ClipByGlobalNormState`.
      clip_coef: `post_norm / pre_norm`; 0 after a bad step.
      clip_rate: Share of the steps, leaves or entries so far that were clipped.
      threshold: The threshold that the last good step has set; 0 before there is one.
      num_learned: Steps that have entered the statistics, int32.
      learned: The statistics, an array or a tree of arrays.
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


class AutoclipState(_State):
    """State of `autoclip`; `learned` is the window, newest norm last, 0 where empty, or ()."""


class ZclipState(_State):
    """State of `zclip`; `learned` has "mean" and "std", `threshold` is `mean + z * std`."""


class AdagcState(_State):
    """State of `adagc`; `learned` is the reference of each floating leaf, in order.

    `threshold` is the largest global norm that the last step could let pass.
    """


class ClipSpikesState(_State):
    """State of `clip_spikes`; `learned` is a tree of each entry's root mean square.

    `threshold` is `sqrt(theta)`, in units of these.
    """


class ClipLeafSpikesState(_State):
    """State of `clip_leaf_spikes`; `learned` is the bound on each floating leaf, in order.

    `threshold` is the largest of these.
    """


def autoclip(
    quantile: ArrayLike = 0.1,
    *,
    window: int | None = None,
    initial: ArrayLike | None = None,
    learning_rate: ArrayLike = 0.05,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm at a running quantile of the norms seen so far.

    `t <- t * exp(learning_rate * (quantile - [norm <= t]))`, which settles where a share
    `quantile` of the norms is below `t`; or with `window=n` the exact quantile of the last
    `n` norms. A norm enters before the clip and unclipped, as in AutoClip.

    Args:
      quantile: Share of the steps that are not clipped, in [0, 1]. May be traced.
      window: How many norms to remember; None for the tracker, which keeps `t` alone.
      initial: Positive `t` to start at; None for the first norm. May be traced.
      learning_rate: Step of the tracker's logarithm, not negative. May be traced.
      axis_name: As in `clip_by_global_norm`.

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
      >>> print(f"{clipped[0]:.3f} {state.pre_norm} {state.threshold}")
      2.000 900.0 2.0

    References:
      Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks, 2020, https://arxiv.org/abs/2007.14469
      Andrew et al., Differentially Private Learning with Adaptive Clipping, 2019,
      https://arxiv.org/abs/1905.03871
    """
    _checks.check_decay_rate("quantile", quantile)
    _checks.check_nonnegative("learning_rate", learning_rate)
    if window is not None:
        _checks.check_count("window", window)
    if initial is not None:
        _checks.check_positive("initial", initial)
        if window is not None:
            raise ValueError("initial must be None with a window: its norms set the threshold.")

    def start(params):
        del params
        first = jnp.array(0.0 if initial is None else _clamp(initial, 0, _MAX), jnp.float32)
        return first, () if window is None else jnp.zeros((window,), jnp.float32)

    def rule(updates, norm, size, state):
        t, share, history = state.threshold, _clamp(quantile, 0, 1), state.learned
        if window is None:
            is_below = (size <= t).astype(jnp.float32)
            moved = t * jnp.exp(_clamp(learning_rate, 0, _MAX) * (share - is_below))
            t = jnp.where(t > 0, _clamp(moved, _TINY, _MAX), size)
        else:
            history = jnp.concatenate([history[1:], size[None]])
            t = _quantile(history, share)
        clipped, clip = clip_to_norm(updates, norm, t)
        return clipped, clip.post_norm, clip.is_clipped, t, history

    return _transform(AutoclipState, start, rule, (quantile, learning_rate), axis_name)


def zclip(
    z: ArrayLike = 2.5, alpha: ArrayLike = 0.97, warmup: int = 25, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clips the global norm where it is a spike: more than `z` deviations above its mean.

    For `s = (norm - mean) / std > z` the norm becomes `mean + z**2 / s * std`, the lower the
    larger the spike. Then `mean <- alpha * mean + (1 - alpha) * norm` and
    `var <- alpha * var + (1 - alpha) * (norm - mean)**2`, of the clipped norm and the new
    mean. The first `warmup` norms are not clipped: their mean and variance are the start.

    Args:
      z: Deviations above the mean that make a spike, in [0, inf]. May be traced.
      alpha: Decay rate of the mean and variance, in [0, 1]. May be traced.
      warmup: How many norms make the start; 0 is as 1.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. Nothing is
      clipped while the variance is 0; a lasting rise of the norm is followed slowly.

    Raises:
      TypeError: If `z` or `alpha` is not a number.
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
    _checks.check_threshold("z", z)
    _checks.check_decay_rate("alpha", alpha)
    _check_warmup(warmup)

    def start(params):
        del params
        learned = {name: jnp.zeros((), jnp.float32) for name in ("mean", "std")}
        return jnp.zeros((), jnp.float32), learned

    def rule(updates, norm, size, state):
        mean, std, limit = state.learned["mean"], state.learned["std"], _clamp(z, 0, jnp.inf)
        spread, above = limit * std, size - mean
        count = increment(state.num_learned)
        is_warm = count <= jnp.maximum(warmup, 1)
        is_spike = ~is_warm & (std > 0) & (above > spread)
        bound = mean + spread * (spread / jnp.where(is_spike, above, 1))
        clipped, clip = clip_to_norm(updates, norm, jnp.where(is_spike, bound, jnp.inf))

        # In warm-up the plain mean and variance (Welford), then moving averages.
        keep = jnp.where(is_warm, 1 - 1 / count.astype(jnp.float32), _clamp(alpha, 0, 1))
        change = jnp.where(is_spike, bound, size) - mean
        off_mean = change * jnp.where(is_warm, jnp.sqrt(keep), keep)
        new_std = jnp.hypot(jnp.sqrt(keep) * std, jnp.sqrt(1 - keep) * off_mean)
        mean, std = mean + (1 - keep) * change, _clamp(new_std, 0, _MAX)
        threshold = mean + jnp.where(std > 0, limit * std, 0)  # z may be inf
        learned = {"mean": mean, "std": std}
        return clipped, clip.post_norm, clip.is_clipped, threshold, learned

    return _transform(ZclipState, start, rule, (z, alpha), axis_name)


def adagc(
    relative: ArrayLike = 1.05,
    beta: ArrayLike = 0.98,
    warmup: int = 100,
    *,
    max_norm: Any = 1.0,
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
      warmup: How many steps are warm-up; with 0 a leaf starts at its first norm, unclipped.
      max_norm: Bound in warm-up: number in [0, inf], traced scalar, or schedule.
      axis_name: As in `clip_by_global_norm`.

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
    schedule: Any = max_norm if callable(max_norm) else lambda step: max_norm
    if not callable(max_norm):
        _checks.check_threshold("max_norm", max_norm)
    _checks.check_threshold("relative", relative)
    _checks.check_decay_rate("beta", beta)
    _check_warmup(warmup)

    def rule(updates, norm, size, state):
        leaves, reference = _floating_leaves(updates, state), state.learned
        norms = [rescaled_global_norm(x, axis_name=axis_name) for x in leaves]
        sizes, cap = _stack(map(_in_float32, norms)), _clamp(schedule(state.step), 0, jnp.inf)
        is_warm = state.num_learned < warmup
        own = jnp.where(reference > 0, _clamp(relative, 0, jnp.inf) * reference, jnp.inf)
        bounds = jnp.where(is_warm, _split_bound(cap, norms, norm), own)
        pairs = zip(leaves, norms, strict=True)
        clipped = [clip_to_norm(x, n, bounds[i])[0] for i, (x, n) in enumerate(pairs)]

        passed = jnp.minimum(sizes, bounds)
        average = reference + (1 - _clamp(beta, 0, 1)) * (passed - reference)
        new = jnp.where(is_warm, jnp.minimum(reference, passed), average)
        new = jnp.where(passed > 0, jnp.where(reference > 0, new, passed), reference)
        threshold = jnp.where(is_warm, cap, _norm_of(_clamp(bounds, 0, _MAX)))
        rate = jnp.sum(sizes > bounds, dtype=jnp.float32) / max(len(leaves), 1)
        return _replace_floating(updates, clipped), _norm_of(passed), rate, threshold, new

    return _transform(AdagcState, _start_leaves, rule, (relative, beta), axis_name)


def clip_spikes(
    theta: ArrayLike = 5000.0, *, decay: ArrayLike = 0.999, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clips single entries whose square is more than `theta` times its usual value.

    `|g| <= sqrt(theta * v)` entry by entry, then `v <- decay * v + (1 - decay) * g**2` of
    the clipped entry. `v` is corrected for its start at 0, so that `theta` means the same
    from the second step on (SPAM waits some hundred steps instead).

    Args:
      theta: Largest ratio of `g**2` to its average, in [0, inf]. May be traced.
      decay: Decay rate of the average, in [0, 1]; 1 is the plain mean. May be traced.
      axis_name: As in `clip_by_global_norm`; only a bad step is decided globally.

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
    _checks.check_threshold("theta", theta)
    _checks.check_decay_rate("decay", decay)

    def start(params):
        def zeros(p):
            return jnp.zeros_like(p, dtype=jnp.float32) if is_clippable(p) else jnp.int32(0)

        return jnp.zeros((), jnp.float32), jax.tree.map(zeros, params)

    def rule(updates, norm, size, state):
        _checks.check_same_structure("updates", updates, "rms", state.learned)
        leaves, root = _floating_leaves(updates), jnp.sqrt(_clamp(theta, 0, jnp.inf))
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(state.learned), strict=True)
        rms = [r for g, r in pairs if is_clippable(g)]
        bounds = [jnp.where(r > 0, root * r, jnp.inf) for r in rms]
        new, weight = [], _average_weight(decay, state)
        for g, r, bound in zip(leaves, rms, bounds, strict=True):
            passed = jnp.minimum(_modulus(g), bound)
            average = jnp.hypot(jnp.sqrt(1 - weight) * r, jnp.sqrt(weight) * passed)
            new.append(_clamp(average, 0, _MAX))
        clipped = [_clip_entries(g, bound) for g, bound in zip(leaves, bounds, strict=True)]
        post, rate = _entry_stats(leaves, clipped, bounds, axis_name)
        learned = _replace_floating(updates, new, state.learned)
        return _replace_floating(updates, clipped), post, rate, root, learned

    return _transform(ClipSpikesState, start, rule, (theta, decay), axis_name)


def clip_leaf_spikes(
    decay: ArrayLike = 0.999, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the entries of a leaf that are above the average of its largest entry.

    `m <- decay * m + (1 - decay) * max|g|`, corrected for its start at 0, and entries with
    `|g| > m` become `g / max|g| * m`: the AdaClip of Stable-SPAM. As published, the maximum
    enters before the clip and unclipped.

    Args:
      decay: Decay rate of the average, in [0, 1]; 1 is the plain mean. May be traced.
      axis_name: As in `clip_by_global_norm`.

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
    _checks.check_decay_rate("decay", decay)

    def rule(updates, norm, size, state):
        leaves, m = _floating_leaves(updates, state), state.learned
        tops = [rescaled_global_norm(x, ord=np.inf, axis_name=axis_name) for x in leaves]
        largest = _stack(map(_in_float32, tops))
        m = m + _average_weight(decay, state) * (largest - m)
        coefs = m / jnp.where(largest > 0, largest, 1) * _MARGIN
        clipped = [_scale_entries(g, m[i], coefs[i]) for i, g in enumerate(leaves)]
        post, rate = _entry_stats(leaves, clipped, list(m), axis_name)
        return _replace_floating(updates, clipped), post, rate, jnp.max(m, initial=0), m

    return _transform(ClipLeafSpikesState, _start_leaves, rule, (decay,), axis_name)


# --- Parts ----------------------------------------------------------------------------


def _transform(
    state_type: Any, start: Any, rule: Any, settings: tuple, axis_name: str | None
) -> optax.GradientTransformationExtraArgs:
    """A transform that learns from good steps and gives zeros at bad ones.

    `start(params)` is the first threshold and statistic. `rule(updates, norm, size, state)`
    is the clipped updates, their norm, the share clipped, the new threshold and statistic;
    what it returns at a bad step is not used.
    """

    def init_fn(params):
        threshold, learned = start(params)
        floats = {n: jnp.zeros((), jnp.float32) for n in ("pre_norm", "post_norm", "clip_rate")}
        counts = {n: jnp.zeros((), jnp.int32) for n in ("step", "num_nonfinite", "num_learned")}
        coef = jnp.ones((), jnp.float32)
        return state_type(**floats, **counts, clip_coef=coef, threshold=threshold, learned=learned)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        norm = rescaled_global_norm(updates, axis_name=axis_name)
        size = _in_float32(norm)
        clipped, post, rate, threshold, learned = rule(updates, norm, size, state)
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
        return _checks.map_clippable(zero_if_bad, clipped), state._replace(
            step=step,
            pre_norm=jnp.where(is_bad, state.pre_norm, size),
            post_norm=post,
            clip_coef=jnp.where(is_bad, 0, coef),
            clip_rate=state.clip_rate + (rate - state.clip_rate) / step.astype(jnp.float32),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
            threshold=keep(_clamp(threshold, 0, _MAX), state.threshold),
            num_learned=increment(state.num_learned, enters),
            learned=keep(learned, state.learned),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_warmup(warmup: Any) -> None:
    """Raises unless `warmup` is an integer of at least 0, or a jax array (as injected)."""
    is_integer = isinstance(warmup, (int, np.integer)) and not isinstance(warmup, bool)
    if not isinstance(warmup, jax.Array) and not (is_integer and warmup >= 0):
        raise ValueError(f"warmup must be an integer of at least 0, got {warmup!r}.")


def _clamp(value: Any, low: Any, high: Any) -> jax.Array:
    """`value` in float32 and in [low, high]; NaN stays NaN."""
    return jnp.clip(jnp.asarray(value, jnp.float32), low, high)


def _in_float32(norm: RescaledNorm) -> jax.Array:
    """The norm, at most the largest float32; NaN if an entry is."""
    return jnp.minimum(norm.norm / norm.rescale, _MAX).astype(jnp.float32)


def _norm_of(tree: Any, axis_name: str | None = None) -> jax.Array:
    return _in_float32(rescaled_global_norm(tree, axis_name=axis_name))


def _stack(scalars: Any) -> jax.Array:
    scalars = list(scalars)
    return jnp.stack(scalars) if scalars else jnp.zeros((0,), jnp.float32)


def _start_leaves(params: Any) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((), jnp.float32), jnp.zeros((len(_floating_leaves(params)),), jnp.float32)


def _floating_leaves(tree: Any, state: Any = None) -> list[Any]:
    leaves = [x for x in jax.tree.leaves(tree) if is_clippable(x)]
    if state is not None and len(leaves) != state.learned.size:
        raise ValueError(
            f"updates must have the floating leaves that the parameters had at init, "
            f"{state.learned.size} of them, got {len(leaves)}."
        )
    return leaves if state is None else [jnp.asarray(x) for x in leaves]


def _replace_floating(updates: Any, leaves: list[jax.Array], rest: Any = None) -> Any:
    """`rest`, or `updates` itself, with what is floating in `updates` replaced in order."""
    new, rest = iter(leaves), updates if rest is None else rest
    return jax.tree.map(lambda x, r: next(new) if is_clippable(x) else r, updates, rest)


def _split_bound(cap: jax.Array, norms: list[RescaledNorm], whole: RescaledNorm) -> jax.Array:
    """Bounds on the leaves that together bound the global norm by `cap`; inf if it is below."""
    dtype = whole.norm.dtype
    divisor = jnp.where(whole.norm > 0, whole.norm, 1)
    units = [part.norm.astype(dtype) / divisor for part in norms]
    ratios = [whole.rescale / part.rescale.astype(dtype) for part in norms]
    shares = [(u * r).astype(jnp.float32) for u, r in zip(units, ratios, strict=True)]
    is_above = whole.norm > cap.astype(dtype) * whole.rescale
    return jnp.where(is_above, cap * _MARGIN * _stack(shares), jnp.inf)


def _average_weight(decay: ArrayLike, state: Any) -> jax.Array:
    """Weight of the newest value in a moving average corrected for its start at 0."""
    decay, count = _clamp(decay, 0, 1), state.num_learned.astype(jnp.float32) + 1
    weight = (1 - decay) / -jnp.expm1(count * jnp.log(decay))
    return jnp.where((decay == 1) | (count == 1), 1 / count, weight)


def _modulus(g: Any) -> jax.Array:
    """|g| in float32 (float64 for float64)."""
    g = jnp.asarray(g)
    modulus = unit_and_modulus(g)[1] if jnp.iscomplexobj(g) else jnp.abs(g)
    return modulus.astype(jnp.finfo(compute_dtype(g.dtype)).dtype)


def _clip_entries(g: Any, bound: jax.Array) -> jax.Array:
    g = jnp.asarray(g)
    bound = jnp.asarray(round_toward_zero(bound, jnp.finfo(g.dtype).dtype))
    if jnp.iscomplexobj(g):
        unit, modulus = unit_and_modulus(g)
        clipped = jnp.where(modulus > bound, unit * (bound * _MARGIN).astype(g.dtype), g)
    else:
        clipped = jnp.clip(g, -bound, bound)
    return keep_weak_type(clipped, g)


def _scale_entries(g: jax.Array, bound: jax.Array, coef: jax.Array) -> jax.Array:
    wide = compute_dtype(g.dtype)
    scaled = g.astype(wide) * coef.astype(wide)
    scaled = round_toward_zero(scaled, g.dtype) if wide != g.dtype else scaled
    return keep_weak_type(jnp.where(_modulus(g) > bound, scaled, g), g)


def _entry_stats(leaves: Any, clipped: Any, bounds: Any, axis_name: Any) -> tuple[Any, Any]:
    """Norm of the clipped leaves, and the share of entries that were above their bound."""
    pairs = zip(leaves, bounds, strict=True)
    above = [jnp.sum(_modulus(g) > bound, dtype=jnp.float32) for g, bound in pairs]
    rate = jnp.sum(_stack(above)) / max(sum(np.size(g) for g in leaves), 1)
    rate = rate if axis_name is None else lax.pmean(rate, axis_name)
    return _norm_of(clipped, axis_name), rate


def _quantile(history: jax.Array, share: jax.Array) -> jax.Array:
    """The quantile of the positive entries, linear between two; empty places are 0."""
    ordered, count = jnp.sort(history), jnp.sum(history > 0, dtype=jnp.int32)
    place = share * jnp.maximum(count - 1, 0).astype(jnp.float32)
    low = history.size - count + jnp.floor(place).astype(jnp.int32)
    low, high = (jnp.clip(i, 0, history.size - 1) for i in (low, low + 1))
    return ordered[low] + (place - jnp.floor(place)) * (ordered[high] - ordered[low])
