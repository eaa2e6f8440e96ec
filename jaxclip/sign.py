"""The sign-gradient step `w <- w - alpha * sign(g)` and its family.

The sign of an entry is -1, 0 or 1: 0 for 0, -0 and NaN, and 1 or -1 for the infinities.
A complex entry becomes `z / |z|`, 0 where it is not finite. Float32 subnormals have sign 0
where the backend flushes them to zero (XLA on CPU does).

A non-finite gradient entry never enters a momentum: that entry of the momentum stays as
it was, and `num_nonfinite` in the state counts the steps at which it happened.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip import _checks
from jaxclip._checks import compute_dtype, increment, keep_weak_type, map_clippable
from jaxclip.norms import unit_and_modulus
from jaxclip.thresholds import resolve_threshold

__all__ = [
    "ScaleByLionState",
    "ScaleBySignState",
    "ScaleBySignumState",
    "lion",
    "scale_by_lion",
    "scale_by_sign",
    "scale_by_signum",
    "sign_sgd",
    "signum",
]


class ScaleBySignState(NamedTuple):
    """State of `scale_by_sign`.

    Attributes:
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
    """

    num_nonfinite: jax.Array


class ScaleBySignumState(NamedTuple):
    """State of `scale_by_signum`.

    Attributes:
      mu: Momentum, a tree like the parameters; finite always.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
    """

    mu: optax.Updates
    num_nonfinite: jax.Array


class ScaleByLionState(NamedTuple):
    """State of `scale_by_lion`.

    Attributes:
      mu: Momentum, a tree like the parameters; finite always.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
    """

    mu: optax.Updates
    num_nonfinite: jax.Array


# --- Directions -----------------------------------------------------------------------


def scale_by_sign() -> optax.GradientTransformationExtraArgs:
    """Replaces every gradient entry by its sign: -1, 0 or 1.

    As `optax.scale_by_sign`, except that NaN becomes 0 and is counted.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. Leaves that are
      not floating (integers, bools, float0, keys) pass through.

    Example:
      >>> tx = scale_by_sign()
      >>> grads = jnp.array([-3.0, 0.0, 0.5, jnp.nan])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([-1.,  0.,  1.,  0.], dtype=float32)

    References:
      Bernstein et al., signSGD, 2018, https://arxiv.org/abs/1802.04434
    """

    def init_fn(params):
        del params
        return ScaleBySignState(num_nonfinite=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        signs = map_clippable(lambda g: keep_weak_type(_sign(g), g), updates)
        return signs, ScaleBySignState(num_nonfinite=_count(state.num_nonfinite, updates))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_signum(
    beta: ArrayLike = 0.9, accumulator_dtype: Any = None, *, nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by the sign of its exponential moving average.

    `m <- beta * m + (1 - beta) * g; update = sign(m)`, or with `nesterov`
    `update = sign(beta * m + (1 - beta) * g)` for the new `m`. Computed in float32.

    Args:
      beta: Decay rate in [0, 1]. May be traced.
      accumulator_dtype: Dtype of the momentum; None for the dtype of each parameter.
      nesterov: Whether to look one step ahead.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept.

    Raises:
      TypeError: If `beta` is not a number.
      ValueError: If `beta` is outside [0, 1].

    Example:
      >>> tx = scale_by_signum(0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([4.0, -4.0]), state)
      >>> tx.update(jnp.array([-1.0, -1.0]), state)[0]
      Array([ 1., -1.], dtype=float32)

    References:
      Bernstein et al., signSGD, 2018, https://arxiv.org/abs/1802.04434
    """
    _checks.check_decay_rate("beta", beta)

    def direction(g: jax.Array, m: jax.Array) -> jax.Array:
        new = _average(m, g, beta)
        return _average(new, g, beta) if nesterov else new

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        signs, mu = _momentum_step(updates, state.mu, direction, beta)
        count = _count(state.num_nonfinite, updates)
        return signs, ScaleBySignumState(mu=mu, num_nonfinite=count)

    def init_fn(params):
        mu = _zero_momentum(params, accumulator_dtype)
        return ScaleBySignumState(mu=mu, num_nonfinite=jnp.zeros((), jnp.int32))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_lion(
    b1: ArrayLike = 0.9, b2: ArrayLike = 0.99, mu_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by Lion's sign step.

    `update = sign(b1 * m + (1 - b1) * g); m <- b2 * m + (1 - b2) * g`, in float32.

    Args:
      b1: Weight of the momentum in the direction, in [0, 1]. May be traced.
      b2: Decay rate of the momentum, in [0, 1]. May be traced.
      mu_dtype: Dtype of the momentum; None for the dtype of each parameter.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept.

    Raises:
      TypeError: If `b1` or `b2` is not a number.
      ValueError: If `b1` or `b2` is outside [0, 1].

    Example:
      >>> tx = scale_by_lion()
      >>> grads = jnp.array([2.0, -0.1, 0.0])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([ 1., -1.,  0.], dtype=float32)

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
      https://arxiv.org/abs/2302.06675
    """
    _checks.check_decay_rate("b1", b1)
    _checks.check_decay_rate("b2", b2)

    def direction(g: jax.Array, m: jax.Array) -> jax.Array:
        return _average(m, g, b1)

    def init_fn(params):
        mu = _zero_momentum(params, mu_dtype)
        return ScaleByLionState(mu=mu, num_nonfinite=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        signs, mu = _momentum_step(updates, state.mu, direction, b2)
        count = _count(state.num_nonfinite, updates)
        return signs, ScaleByLionState(mu=mu, num_nonfinite=count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- Optimizers -----------------------------------------------------------------------


def sign_sgd(
    learning_rate: Any, *, relative_to: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Steps by the sign of the gradient: exactly `w <- w - learning_rate * sign(g)`.

    Args:
      learning_rate: Step size alpha, in units of the weights: a finite number, a traced
        scalar, or a schedule `step -> number`. It is rounded once, to each leaf's dtype.
      relative_to: A threshold (number, schedule, rule or prefix tree). The step of each
        leaf is then `learning_rate * threshold`, so that alpha is a share of the weight
        box; leaves without a box (threshold inf) take `learning_rate` itself.

    Returns:
      An optimizer, for `optax.apply_updates`.

    Raises:
      TypeError: If `learning_rate` or `relative_to` is of a wrong type.
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
    return optax.chain(scale_by_sign(), _scale_by_step(learning_rate, relative_to))


def signum(
    learning_rate: Any,
    beta: ArrayLike = 0.9,
    accumulator_dtype: Any = None,
    *,
    nesterov: bool = False,
    weight_decay: ArrayLike = 0.0,
    mask: Any = None,
    relative_to: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps by the sign of the gradient's moving average, with decoupled weight decay.

    `w <- w - learning_rate * (sign(m) + weight_decay * w)`, `m` as in `scale_by_signum`.

    Args:
      learning_rate: As in `sign_sgd`.
      beta: Decay rate of the momentum, in [0, 1]. May be traced.
      accumulator_dtype: Dtype of the momentum; None for the dtype of each parameter.
      nesterov: Whether to look one step ahead.
      weight_decay: Coefficient of the decay, not negative. May be traced.
      mask: Tree of bools, or a function of the parameters that gives one: what decays.
      relative_to: As in `sign_sgd`.

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
    """
    return optax.chain(
        scale_by_signum(beta, accumulator_dtype, nesterov=nesterov),
        _decay_weights(weight_decay, mask),
        _scale_by_step(learning_rate, relative_to),
    )


def lion(
    learning_rate: Any,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: ArrayLike = 1e-3,
    mask: Any = None,
    *,
    relative_to: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps by Lion's sign direction, with decoupled weight decay.

    `w <- w - learning_rate * (sign(b1 * m + (1 - b1) * g) + weight_decay * w)`. The
    arguments are those of `optax.lion`, in its order.

    Args:
      learning_rate: As in `sign_sgd`.
      b1: Weight of the momentum in the direction, in [0, 1]. May be traced.
      b2: Decay rate of the momentum, in [0, 1]. May be traced.
      mu_dtype: Dtype of the momentum; None for the dtype of each parameter.
      weight_decay: Coefficient of the decay, not negative. May be traced.
      mask: Tree of bools, or a function of the parameters that gives one: what decays.
      relative_to: As in `sign_sgd`.

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
    """
    return optax.chain(
        scale_by_lion(b1, b2, mu_dtype),
        _decay_weights(weight_decay, mask),
        _scale_by_step(learning_rate, relative_to),
    )


# --- Parts ----------------------------------------------------------------------------


def _sign(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return unit_and_modulus(x)[0]
    return jnp.where(jnp.isnan(x), jnp.zeros_like(x), jnp.sign(x))


def _average(m: jax.Array, g: jax.Array, beta: ArrayLike) -> jax.Array:
    """beta * m + (1 - beta) * g in float32 or wider."""
    wide = compute_dtype(m.dtype, g.dtype)
    real = jnp.finfo(wide).dtype
    beta = jnp.asarray(beta).astype(real)
    return beta.astype(wide) * m.astype(wide) + (1 - beta).astype(wide) * g.astype(wide)


def _momentum_step(updates: Any, mu: Any, direction: Any, decay: ArrayLike) -> tuple[Any, Any]:
    """Signs of `direction(g, m)`, and the momentum averaged where g is finite."""
    _checks.check_same_structure("updates", updates, "momentum", mu)

    def step(g: jax.Array, m: jax.Array) -> jax.Array:
        return keep_weak_type(_sign(direction(g, m)).astype(g.dtype), g)

    def average(g: Any, m: jax.Array) -> jax.Array:
        new = _average(m, jnp.asarray(g), decay).astype(m.dtype)
        return keep_weak_type(jnp.where(jnp.isfinite(g) & jnp.isfinite(new), new, m), m)

    signs = map_clippable(step, updates, mu)
    mu = jax.tree.map(lambda g, m: average(g, m) if _checks.is_clippable(g) else m, updates, mu)
    return signs, mu


def _zero_momentum(params: optax.Params, dtype: Any) -> Any:
    """Zeros like the floating leaves; other leaves keep a scalar zero as a placeholder."""

    def zeros(p: Any) -> jax.Array:
        if not _checks.is_clippable(p):
            return jnp.zeros((), jnp.int32)
        return jnp.zeros_like(p, dtype=dtype)

    return jax.tree.map(zeros, params)


def _count(num_nonfinite: jax.Array, updates: Any) -> jax.Array:
    """One more if any floating entry of `updates` is not finite."""
    finite = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(updates) if _checks.is_clippable(g)]
    bad = ~functools.reduce(jnp.logical_and, finite) if finite else False
    return increment(num_nonfinite, bad)


def _decay_weights(weight_decay: ArrayLike, mask: Any) -> optax.GradientTransformationExtraArgs:
    """`optax.add_decayed_weights`, keeping dtypes under a traced coefficient."""
    _checks.check_nonnegative("weight_decay", weight_decay)

    def decayed(g: jax.Array, p: Any) -> jax.Array:
        wide = compute_dtype(g.dtype)
        shrink = jnp.asarray(weight_decay).astype(wide) * jnp.asarray(p).astype(wide)
        return keep_weak_type((g.astype(wide) + shrink).astype(g.dtype), g)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if not (isinstance(weight_decay, (int, float)) and weight_decay == 0):
            _checks.check_params_given("weight_decay", params)
            _checks.check_same_structure("updates", updates, "params", params)
            updates = map_clippable(decayed, updates, params)
        return updates, state

    decay = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    return decay if mask is None else optax.masked(decay, mask)


class _StepState(NamedTuple):
    """Scalar int32 step count, for schedules."""

    step: jax.Array


def _scale_by_step(
    learning_rate: Any, relative_to: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate` in float32, rounded once, or relative to a threshold.

    A traced step that is not finite counts as 0.
    """
    if not callable(learning_rate):
        _checks.check_finite("learning_rate", learning_rate)

    def scaled(u: jax.Array, step: jax.Array, size: Any) -> jax.Array:
        wide = compute_dtype(u.dtype)
        step = step * jnp.where(jnp.isinf(size), jnp.ones_like(size), size)
        return keep_weak_type((-step.astype(wide) * u.astype(wide)).astype(u.dtype), u)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        step = jnp.asarray(rate)
        step = jnp.where(jnp.isfinite(step), step, jnp.zeros_like(step))
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
