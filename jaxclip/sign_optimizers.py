"""Sign optimizers, ready for `optax.apply_updates`: sign_sgd, signum, lion; and caution.

An optimizer here is a direction from `jaxclip.sign`, decoupled weight decay, and a step
size, which may be relative to the weight box. `cautious` wraps any optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip import _checks
from jaxclip._checks import compute_dtype, increment, keep_weak_type, map_clippable
from jaxclip.sign import scale_by_lion, scale_by_sign, scale_by_signum
from jaxclip.sign_kinds import SignKind, sign_and_modulus
from jaxclip.thresholds import (
    check_number_or_schedule,
    check_threshold_tree,
    resolve_threshold,
)

__all__ = ["CautiousState", "cautious", "lion", "sign_sgd", "signum"]


def sign_sgd(
    learning_rate: Any, *, relative_to: Any = None, sign: SignKind | None = None
) -> optax.GradientTransformationExtraArgs:
    """Steps by the sign of the gradient: exactly `w <- w - learning_rate * sign(g)`.

    Args:
      learning_rate: Step size alpha, in units of the weights: a finite number, a traced
        scalar, or a schedule `step -> number`. It is rounded once, to each leaf's dtype.
      relative_to: A threshold (number, schedule, rule or prefix tree). The step of each
        leaf is then `learning_rate * threshold`, so that alpha is a share of the weight
        box; leaves without a box (threshold inf) take `learning_rate` itself.
      sign: A sign kind, as in `scale_by_sign`.

    Returns:
      An optimizer, for `optax.apply_updates`.

    Raises:
      TypeError: If an argument is of a wrong type.
      ValueError: If `learning_rate` is not finite.

    Example:
      >>> w = jnp.array([0.5, -0.5])
      >>> tx = sign_sgd(0.25)
      >>> updates, _ = tx.update(jnp.array([3.0, -1e-3]), tx.init(w), w)
      >>> optax.apply_updates(w, updates)
      Array([ 0.25, -0.25], dtype=float32)

    References:
      Bernstein et al., signSGD, 2018, https://arxiv.org/abs/1802.04434
    """
    return optax.chain(scale_by_sign(sign), _scale_by_step(learning_rate, relative_to))


def signum(
    learning_rate: Any,
    beta: ArrayLike = 0.9,
    accumulator_dtype: Any = None,
    *,
    nesterov: bool = False,
    weight_decay: Any = 0.0,
    mask: Any = None,
    relative_to: Any = None,
    sign: SignKind | None = None,
    cautious_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Steps by the sign of the gradient's moving average, with decoupled weight decay.

    `w <- w - learning_rate * (sign(m) + weight_decay * w)`, `m` as in `scale_by_signum`.

    Args:
      learning_rate: As in `sign_sgd`.
      beta: Decay rate of the momentum, in [0, 1]. May be traced.
      accumulator_dtype: Dtype of the momentum; None for the dtype of each parameter.
      nesterov: Whether to look one step ahead.
      weight_decay: Coefficient of the decay, not negative: a number, a traced scalar, or a
        schedule.
      mask: Tree of bools, or a function of the parameters that gives one: what decays.
      relative_to: As in `sign_sgd`.
      sign: A sign kind, as in `scale_by_sign`.
      cautious_decay: Whether to decay only the weights whose sign is not opposite to that
        of the direction, which is where decay and step both lead towards 0.

    Returns:
      An optimizer, for `optax.apply_updates`.

    Raises:
      TypeError: If an argument is of a wrong type.
      ValueError: If an argument is out of its range.

    Example:
      >>> w = jnp.array([0.5, -0.5])
      >>> tx = signum(0.25)
      >>> updates, _ = tx.update(jnp.array([3.0, -1e-3]), tx.init(w), w)
      >>> optax.apply_updates(w, updates)
      Array([ 0.25, -0.25], dtype=float32)

    References:
      Bernstein et al., signSGD, 2018, https://arxiv.org/abs/1802.04434
      Chen et al., Cautious Weight Decay, 2025, https://arxiv.org/abs/2510.12402
    """
    return optax.chain(
        scale_by_signum(beta, accumulator_dtype, nesterov=nesterov, sign=sign),
        _decay_weights(weight_decay, mask, cautious_decay),
        _scale_by_step(learning_rate, relative_to),
    )


def lion(
    learning_rate: Any,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: Any = 1e-3,
    mask: Any = None,
    *,
    relative_to: Any = None,
    sign: SignKind | None = None,
    cautious_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Steps by Lion's sign direction, with decoupled weight decay.

    `w <- w - learning_rate * (sign(b1 * m + (1 - b1) * g) + weight_decay * w)`. The
    arguments are those of `optax.lion`, in its order.

    Args:
      learning_rate: As in `sign_sgd`.
      b1: Weight of the momentum in the direction, in [0, 1]. May be traced.
      b2: Decay rate of the momentum, in [0, 1]. May be traced.
      mu_dtype: Dtype of the momentum; None for the dtype of each parameter.
      weight_decay: Coefficient of the decay, not negative: a number, a traced scalar, or a
        schedule.
      mask: Tree of bools, or a function of the parameters that gives one: what decays.
      relative_to: As in `sign_sgd`.
      sign: A sign kind, as in `scale_by_sign`.
      cautious_decay: Whether to decay only the weights whose sign is not opposite to that
        of the direction, which is where decay and step both lead towards 0.

    Returns:
      An optimizer, for `optax.apply_updates`.

    Raises:
      TypeError: If an argument is of a wrong type.
      ValueError: If an argument is out of its range.

    Example:
      >>> w = jnp.array([0.5, -0.5])
      >>> tx = lion(0.25, weight_decay=0.0)
      >>> updates, _ = tx.update(jnp.array([3.0, -1e-3]), tx.init(w), w)
      >>> optax.apply_updates(w, updates)
      Array([ 0.25, -0.25], dtype=float32)

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
      https://arxiv.org/abs/2302.06675
      Chen et al., Cautious Weight Decay, 2025, https://arxiv.org/abs/2510.12402
    """
    return optax.chain(
        scale_by_lion(b1, b2, mu_dtype, sign=sign),
        _decay_weights(weight_decay, mask, cautious_decay),
        _scale_by_step(learning_rate, relative_to),
    )


# --- Caution --------------------------------------------------------------------------


class CautiousState(NamedTuple):
    """State of `cautious`.

    Attributes:
      inner_state: State of the inner transformation.
      agreement_rate: Scalar float32 in [0, 1], share of the entries that the last step
        kept; 1 before the first step.
    """

    inner_state: Any
    agreement_rate: jax.Array


def cautious(
    inner: optax.GradientTransformation, *, is_direction: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Keeps only the entries of an optimizer's step that go down the current gradient.

    `u <- u * [u * g < 0] * size / (count + 1)` leaf by leaf, where u is the update of
    `inner`, g the gradient and count the number of entries kept: a momentum that points up
    the gradient of this step waits, the others step further. (A leaf of one entry takes
    half its step.)

    Args:
      inner: An optimizer, whose updates `optax.apply_updates` adds. Decay put inside is
        masked with the rest; the paper decays outside.
      is_direction: True if `inner` returns a direction that is subtracted later, as
        `scale_by_lion` does: entries are then kept where `u * g > 0`.

    Returns:
      A transform; shapes, dtypes and weak types of the updates of `inner` are kept.

    Raises:
      TypeError: If `inner` is not a gradient transformation.
      ValueError: If `is_direction` is not a bool.

    Example:
      >>> tx = cautious(signum(0.5, beta=0.5))
      >>> w = jnp.zeros(3)
      >>> _, state = tx.update(jnp.array([4.0, 4.0, 4.0]), tx.init(w), w)
      >>> updates, _ = tx.update(jnp.array([-1.0, 1.0, 1.0]), state, w)
      >>> updates
      Array([ 0. , -0.5, -0.5], dtype=float32)

    References:
      Liang et al., Cautious Optimizers: Improving Training with One Line of Code, 2024,
      https://arxiv.org/abs/2411.16085
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(f"inner must be a gradient transformation, got {inner!r}.")
    _checks.check_choice("is_direction", is_direction, (False, True))
    inner = optax.with_extra_args_support(inner)

    def agrees(u: jax.Array, g: Any) -> jax.Array:
        alignment = _alignment(u, jnp.asarray(g))
        return alignment > 0 if is_direction else alignment < 0

    def keep(u: jax.Array, g: Any) -> jax.Array:
        kept = agrees(u, g)
        wide = compute_dtype(u.dtype)
        factor = u.size / (jnp.sum(kept, dtype=jnp.finfo(wide).dtype) + 1)
        scaled = _saturate(u.astype(wide) * factor.astype(wide), u.dtype)
        return keep_weak_type(jnp.where(kept, scaled, jnp.zeros_like(u)), u)

    def init_fn(params):
        return CautiousState(inner.init(params), jnp.ones((), jnp.float32))

    def update_fn(updates, state, params=None, **extra_args):
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        _checks.check_same_structure("updates", updates, "updates of inner", steps)
        rate = _share_of_true(map_clippable(agrees, steps, updates), steps)
        steps = map_clippable(keep, steps, updates)
        return steps, CautiousState(inner_state, rate)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- Parts ----------------------------------------------------------------------------


def _alignment(a: jax.Array, b: jax.Array) -> jax.Array:
    """-1, 0 or 1: the sign of `a * b` without its overflow or underflow; 0 for NaN."""
    unit_a, unit_b = sign_and_modulus(a)[0], sign_and_modulus(b)[0]
    wide = compute_dtype(a.dtype, b.dtype)
    return jnp.sign(jnp.real(jnp.conj(unit_a.astype(wide)) * unit_b.astype(wide)))


def _saturate(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype`, within its finite range, in modulus, too; NaN stays NaN."""
    # As a Python number: the largest of a wider `dtype` would overflow in that of `x`.
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(x.dtype).max))
    if jnp.iscomplexobj(x):
        parts = [jnp.clip(p, -0.7 * largest, 0.7 * largest) for p in (jnp.real(x), jnp.imag(x))]
        return lax.complex(*parts).astype(dtype)
    return jnp.clip(x, -largest, largest).astype(dtype)


def _share_of_true(flags: Any, like: Any) -> jax.Array:
    """Share of True among the entries of the floating leaves of `like`; 1 if it has none."""
    leaves = zip(jax.tree.leaves(flags), jax.tree.leaves(like), strict=True)
    counted = [flag for flag, x in leaves if _checks.is_clippable(x)]
    size = sum(flag.size for flag in counted)
    if size == 0:
        return jnp.ones((), jnp.float32)
    total = sum((jnp.sum(f, dtype=jnp.float32) for f in counted), jnp.zeros((), jnp.float32))
    return total / size


class _StepState(NamedTuple):
    """Scalar int32 step count, for schedules."""

    step: jax.Array


def _decay_weights(
    weight_decay: Any, mask: Any, is_cautious: bool
) -> optax.GradientTransformationExtraArgs:
    """`optax.add_decayed_weights`, keeping dtypes under a traced coefficient.

    A traced coefficient that is not finite counts as 0. If cautious, only where the
    direction `g` and the weight `p` have `g * p >= 0`.
    """
    check_number_or_schedule("weight_decay", weight_decay, _checks.check_nonnegative)
    schedule: Any = weight_decay if callable(weight_decay) else None
    _checks.check_choice("cautious_decay", is_cautious, (False, True))

    def decayed(g: jax.Array, p: Any, coefficient: Any) -> jax.Array:
        wide, p = compute_dtype(g.dtype), jnp.asarray(p)
        decay = jnp.asarray(coefficient).astype(wide)
        decay = jnp.where(jnp.isfinite(decay), decay, jnp.zeros_like(decay))
        shrink = decay * p.astype(wide)
        if is_cautious:
            shrink = jnp.where(_alignment(g, p) >= 0, shrink, jnp.zeros_like(shrink))
        return keep_weak_type((g.astype(wide) + shrink).astype(g.dtype), g)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
            _checks.check_params_given("weight_decay", params)
            _checks.check_same_structure("updates", updates, "params", params)
            coefficient = schedule(state.step) if schedule else weight_decay
            updates = map_clippable(lambda g, p: decayed(g, p, coefficient), updates, params)
        return updates, _StepState(increment(state.step)) if schedule else state

    def init_fn(params):
        del params
        return _StepState(jnp.zeros((), jnp.int32)) if schedule else optax.EmptyState()

    decay = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return decay if mask is None else optax.masked(decay, mask)


def _scale_by_step(
    learning_rate: Any, relative_to: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` in float32, rounded once, or relative to a threshold.

    A traced step that is not finite counts as 0.
    """
    check_number_or_schedule("learning_rate", learning_rate, _checks.check_finite)
    if relative_to is not None:
        check_threshold_tree("relative_to", relative_to)

    def scaled(u: jax.Array, step: jax.Array, size: Any) -> jax.Array:
        wide = compute_dtype(u.dtype)
        step = step * jnp.where(jnp.isinf(size), jnp.ones_like(size), size)
        step = jnp.where(jnp.isfinite(step), step, jnp.zeros_like(step))
        # A step beyond the leaf's dtype is its largest number, not infinity.
        step = _saturate(step, jnp.finfo(wide).dtype)
        return keep_weak_type(_saturate(-step.astype(wide) * u.astype(wide), u.dtype), u)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        step = jnp.asarray(rate)
        step = step if step.dtype == jnp.float64 else step.astype(jnp.float32)
        if relative_to is None:
            updates = map_clippable(lambda u: scaled(u, step, jnp.ones_like(step)), updates)
        else:
            _checks.check_params_given("relative_to", params)
            sizes = resolve_threshold(relative_to, params, state.step)
            sizes = jax.tree.map(lambda t: jnp.asarray(t, step.dtype), sizes)
            updates = map_clippable(lambda u, t: scaled(u, step, t), updates, sizes)
        return updates, _StepState(step=increment(state.step))

    def init_fn(params):
        del params
        return _StepState(step=jnp.zeros((), jnp.int32))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
