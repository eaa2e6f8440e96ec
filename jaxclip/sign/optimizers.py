"""Sign optimizers, ready for `optax.apply_updates`: `w <- w - alpha * (sign(d) + decay * w)`.

An optimizer here is a direction d of `sign.directions`, decoupled weight decay, and a step
size alpha, which may be relative to the weight box.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    Spread,
    as_float,
    compute_dtype,
    increment,
    keep_weak_type,
)
from jaxclip._core.trees import Mask, PyTree, map_clippable
from jaxclip.sign.decay import cast_saturated, decay_weights, finite_or_zero
from jaxclip.sign.directions import scale_by_lion, scale_by_sign, scale_by_signum
from jaxclip.sign.kinds import SignKind
from jaxclip.thresholds.values import (
    check_number_or_schedule,
    check_threshold_tree,
    resolve_threshold,
)


def sign_sgd(
    learning_rate: ArrayLike | optax.Schedule,
    *,
    relative_to: PyTree = None,
    sign: SignKind | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps by the sign of the gradient: exactly `w <- w - learning_rate * sign(g)`.

    Args:
      learning_rate: Step size alpha, in units of the weights: a finite number, a traced
        scalar, or a schedule `step -> number`. It is rounded once, to each leaf's dtype.
      relative_to: A threshold (number, schedule, rule or prefix tree) that multiplies the step
        of each leaf, so that alpha is a fraction of the weight box. Leaves without a box
        (threshold inf) take `learning_rate` itself.
      sign: `soft_sign(...)`, `stochastic_sign(...)`, `scaled_sign(...)`, or None for the
        sign itself.

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
    learning_rate: ArrayLike | optax.Schedule,
    beta: ArrayLike = 0.9,
    accumulator_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    weight_decay: ArrayLike | optax.Schedule = 0.0,
    mask: Mask | None = None,
    relative_to: PyTree = None,
    sign: SignKind | None = None,
    cautious_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Steps by the sign of the gradient's moving average, with decoupled weight decay.

    `w <- w - learning_rate * (sign(m) + weight_decay * w)`, `m` as in `scale_by_signum`.

    Args:
      learning_rate: Step size alpha, in units of the weights: a finite number, a traced
        scalar, or a schedule `step -> number`. It is rounded once, to each leaf's dtype.
      beta: Decay rate of the momentum, in [0, 1]. May be traced.
      accumulator_dtype: Dtype of the momentum; None for the dtype of each parameter.
      nesterov: True to look one step ahead.
      weight_decay: Coefficient of the decay, not negative: a number, a traced scalar, or a
        schedule.
      mask: The leaves that decay, all if None: a tree of bools, or a function of the
        parameters that returns one.
      relative_to: A threshold (number, schedule, rule or prefix tree) that multiplies the step
        of each leaf, so that alpha is a fraction of the weight box. Leaves without a box
        (threshold inf) take `learning_rate` itself.
      sign: `soft_sign(...)`, `stochastic_sign(...)`, `scaled_sign(...)`, or None for the
        sign itself.
      cautious_decay: True to decay only the weights whose sign is not opposite to that of
        the direction: there decay and step both lead towards 0.

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
        decay_weights(weight_decay, mask, cautious_decay),
        _scale_by_step(learning_rate, relative_to),
    )


def lion(
    learning_rate: ArrayLike | optax.Schedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ArrayLike | optax.Schedule = 1e-3,
    mask: Mask | None = None,
    *,
    relative_to: PyTree = None,
    sign: SignKind | None = None,
    cautious_decay: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Steps by Lion's sign direction, with decoupled weight decay.

    `w <- w - learning_rate * (sign(b1 * m + (1 - b1) * g) + weight_decay * w)`. The
    arguments are those of `optax.lion`, in its order.

    Args:
      learning_rate: Step size alpha, in units of the weights: a finite number, a traced
        scalar, or a schedule `step -> number`. It is rounded once, to each leaf's dtype.
      b1: Weight of the momentum in the direction, in [0, 1]. May be traced.
      b2: Decay rate of the momentum, in [0, 1]. May be traced.
      mu_dtype: Dtype of the momentum; None for the dtype of each parameter.
      weight_decay: Coefficient of the decay, not negative: a number, a traced scalar, or a
        schedule.
      mask: The leaves that decay, all if None: a tree of bools, or a function of the
        parameters that returns one.
      relative_to: A threshold (number, schedule, rule or prefix tree) that multiplies the step
        of each leaf, so that alpha is a fraction of the weight box. Leaves without a box
        (threshold inf) take `learning_rate` itself.
      sign: `soft_sign(...)`, `stochastic_sign(...)`, `scaled_sign(...)`, or None for the
        sign itself.
      cautious_decay: True to decay only the weights whose sign is not opposite to that of
        the direction: there decay and step both lead towards 0.

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
        decay_weights(weight_decay, mask, cautious_decay),
        _scale_by_step(learning_rate, relative_to),
    )


# --- Step size ----------------------------------------------------------------------


class _StepSizeState(NamedTuple):
    """State of the step size: a scalar int32 step count, and the last learning rate."""

    keeps_finite = True  # it saturates

    step: jax.Array
    learning_rate: jax.Array  # float32, for reports; 0 if it was not finite


def _scale_by_step(
    learning_rate: ArrayLike | optax.Schedule, relative_to: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the step size in float32, and rounds once."""
    check_number_or_schedule("learning_rate", learning_rate, checks.check_finite)
    if relative_to is not None:
        check_threshold_tree("relative_to", relative_to)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        rate = finite_or_zero(checks.value_at("learning_rate", learning_rate, state.step))
        rate = rate if rate.dtype == jnp.float64 else rate.astype(jnp.float32)
        if relative_to is None:
            factor = Spread(-rate)
            updates = map_clippable(lambda u: _scaled(u, factor.like(u)), updates)
        else:
            checks.check_params_given("relative_to", params)
            checks.check_same_structure("updates", updates, "params", params)

            def relative(u: jax.Array, threshold: ArrayLike) -> jax.Array:
                size = as_float(threshold, rate.dtype)
                size = jnp.where(jnp.isinf(size), jnp.ones_like(size), size)
                return _scaled(u, -finite_or_zero(rate * size))

            thresholds = resolve_threshold(relative_to, params, state.step, name="relative_to")
            updates = map_clippable(relative, updates, thresholds)
        reported = jnp.asarray(finite_or_zero(jnp.asarray(rate).astype(jnp.float32)))
        return updates, _StepSizeState(step=increment(state.step), learning_rate=reported)

    def init_fn(params):
        del params
        zero = jnp.zeros((), jnp.float32)
        return _StepSizeState(step=jnp.zeros((), jnp.int32), learning_rate=zero)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.jit
def _scaled(u: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `factor * u` in the dtype of u."""
    wide = compute_dtype(u.dtype)
    if factor.dtype != jnp.finfo(wide).dtype:  # beyond it the largest number, not infinity
        factor = cast_saturated(factor, jnp.finfo(wide).dtype)
    return keep_weak_type(cast_saturated(factor.astype(wide) * u.astype(wide), u.dtype), u)
