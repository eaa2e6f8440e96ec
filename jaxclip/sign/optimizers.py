"""Sign optimizers, ready for `optax.apply_updates`: sign_sgd, signum, lion; and caution.

An optimizer here is a direction from `jaxclip.sign`, decoupled weight decay, and a step
size, which may be relative to the weight box. `cautious` wraps any optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    compute_dtype,
    increment,
    keep_weak_type,
    saturate,
)
from jaxclip._core.trees import map_clippable
from jaxclip.sign.directions import scale_by_lion, scale_by_sign, scale_by_signum
from jaxclip.sign.kinds import SignKind, sign_and_modulus
from jaxclip.thresholds.values import (
    check_number_or_schedule,
    check_threshold_tree,
    resolve_threshold,
)


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


# --- Parts ----------------------------------------------------------------------------


def _alignment(a: jax.Array, b: jax.Array) -> jax.Array:
    """-1, 0 or 1: the sign of `a * b` without its overflow or underflow; 0 for NaN."""
    unit_a, unit_b = sign_and_modulus(a)[0], sign_and_modulus(b)[0]
    wide = compute_dtype(a.dtype, b.dtype)
    return jnp.sign(jnp.real(jnp.conj(unit_a.astype(wide)) * unit_b.astype(wide)))


def _saturate(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in `dtype`, within its finite range, in modulus, too; NaN stays NaN."""
    fraction = 0.7 if jnp.iscomplexobj(x) else 1.0  # of each part, so that the modulus is finite
    return saturate(x, dtype, fraction).astype(dtype)


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
    check_number_or_schedule("weight_decay", weight_decay, checks.check_nonnegative)
    schedule: Any = weight_decay if callable(weight_decay) else None
    checks.check_choice("cautious_decay", is_cautious, (False, True))

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
            checks.check_params_given("weight_decay", params)
            checks.check_same_structure("updates", updates, "params", params)
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
    check_number_or_schedule("learning_rate", learning_rate, checks.check_finite)
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
            checks.check_params_given("relative_to", params)
            sizes = resolve_threshold(relative_to, params, state.step)
            sizes = jax.tree.map(lambda t: jnp.asarray(t, step.dtype), sizes)
            updates = map_clippable(lambda u, t: scaled(u, step, t), updates, sizes)
        return updates, _StepState(step=increment(state.step))

    def init_fn(params):
        del params
        return _StepState(step=jnp.zeros((), jnp.int32))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
