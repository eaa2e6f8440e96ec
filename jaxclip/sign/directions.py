"""Directions of the sign-gradient step `w <- w - alpha * sign(g)` and its family.

The sign of an entry is -1, 0 or 1: 0 for 0, -0 and NaN, and 1 or -1 for the infinities.
A complex entry becomes `z / |z|`, 0 where it is not finite. Float32 subnormals have sign 0
where the backend flushes them to zero (XLA on CPU does).

The sign is replaceable: every transform here takes a sign kind from `jaxclip.sign_kinds`
(soft, stochastic, scaled) in its place.

A non-finite gradient entry never enters a momentum: that entry of the momentum stays as
it was, and `num_nonfinite` in the state counts the steps at which it happened.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks, floats, trees
from jaxclip._core.floats import compute_dtype, increment, keep_weak_type
from jaxclip._core.trees import map_clippable
from jaxclip.norms.of_trees import MeasuredNorm
from jaxclip.sign.kinds import SignKind, resolve_sign_kind


class ScaleBySignState(NamedTuple):
    """State of `scale_by_sign`.

    Attributes:
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      sign_state: State of the sign kind; an empty tuple for those that have none.
    """

    transform_name = "scale_by_sign"

    num_nonfinite: jax.Array
    sign_state: Any = ()


class ScaleBySignumState(NamedTuple):
    """State of `scale_by_signum`.

    Attributes:
      mu: Momentum, a tree like the parameters; finite always.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      sign_state: State of the sign kind; an empty tuple for those that have none.
    """

    transform_name = "scale_by_signum"

    mu: optax.Updates
    num_nonfinite: jax.Array
    sign_state: Any = ()


class ScaleByLionState(NamedTuple):
    """State of `scale_by_lion`.

    Attributes:
      mu: Momentum, a tree like the parameters; finite always.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      sign_state: State of the sign kind; an empty tuple for those that have none.
    """

    transform_name = "scale_by_lion"

    mu: optax.Updates
    num_nonfinite: jax.Array
    sign_state: Any = ()


# --- Directions -----------------------------------------------------------------------


def scale_by_sign(kind: SignKind | None = None) -> optax.GradientTransformationExtraArgs:
    """Replaces every gradient entry by its sign: -1, 0 or 1.

    As `optax.scale_by_sign`, except that NaN becomes 0 and is counted, and that another
    sign kind may stand in the place of the sign.

    Args:
      kind: `soft_sign(...)`, `stochastic_sign(...)`, `scaled_sign(...)`, or None for the
        sign itself.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. Leaves that are
      not floating (integers, bools, float0, keys) pass through.

    Raises:
      TypeError: If `kind` is not a sign kind.

    Example:
      >>> tx = scale_by_sign()
      >>> grads = jnp.array([-3.0, 0.0, 0.5, jnp.nan])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([-1.,  0.,  1.,  0.], dtype=float32)

    References:
      Bernstein et al., signSGD, 2018, https://arxiv.org/abs/1802.04434
    """

    kind = resolve_sign_kind(kind)

    def init_fn(params):
        del params
        return ScaleBySignState(jnp.zeros((), jnp.int32), sign_state=kind.init())

    def update_fn(updates, state, params=None, **extra_args):
        del params
        signs, sign_state = kind.apply(updates, updates, state.sign_state)
        count = _count(state.num_nonfinite, updates, extra_args.get("pre_norm"))
        return signs, ScaleBySignState(num_nonfinite=count, sign_state=sign_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_signum(
    beta: ArrayLike = 0.9,
    accumulator_dtype: Any = None,
    *,
    nesterov: bool = False,
    sign: SignKind | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by the sign of its exponential moving average.

    `m <- beta * m + (1 - beta) * g; update = sign(m)`, or with `nesterov`
    `update = sign(beta * m + (1 - beta) * g)` for the new `m`. Computed in float32.

    Args:
      beta: Decay rate in [0, 1]. May be traced.
      accumulator_dtype: Dtype of the momentum; None for the dtype of each parameter.
      nesterov: Whether to look one step ahead.
      sign: A sign kind, as in `scale_by_sign`.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept.

    Raises:
      TypeError: If `beta` is not a number or `sign` not a sign kind.
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
    checks.check_decay_rate("beta", beta)
    kind = resolve_sign_kind(sign)

    def direction(g: jax.Array, m: jax.Array) -> jax.Array:
        new = _average(m, g, beta)
        return _average(new, g, beta) if nesterov else new

    def update_fn(updates, state, params=None, **extra_args):
        del params
        directions, mu = _momentum_step(updates, state.mu, direction, beta)
        signs, sign_state = kind.apply(directions, updates, state.sign_state)
        count = _count(state.num_nonfinite, updates, extra_args.get("pre_norm"))
        return signs, ScaleBySignumState(mu=mu, num_nonfinite=count, sign_state=sign_state)

    def init_fn(params):
        mu = _zero_momentum(params, accumulator_dtype)
        count = jnp.zeros((), jnp.int32)
        return ScaleBySignumState(mu=mu, num_nonfinite=count, sign_state=kind.init())

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_lion(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: Any = None,
    *,
    sign: SignKind | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by Lion's sign step.

    `update = sign(b1 * m + (1 - b1) * g); m <- b2 * m + (1 - b2) * g`, in float32.

    Args:
      b1: Weight of the momentum in the direction, in [0, 1]. May be traced.
      b2: Decay rate of the momentum, in [0, 1]. May be traced.
      mu_dtype: Dtype of the momentum; None for the dtype of each parameter.
      sign: A sign kind, as in `scale_by_sign`.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept.

    Raises:
      TypeError: If `b1` or `b2` is not a number or `sign` not a sign kind.
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
    checks.check_decay_rate("b1", b1)
    checks.check_decay_rate("b2", b2)
    kind = resolve_sign_kind(sign)

    def direction(g: jax.Array, m: jax.Array) -> jax.Array:
        return _average(m, g, b1)

    def init_fn(params):
        mu = _zero_momentum(params, mu_dtype)
        count = jnp.zeros((), jnp.int32)
        return ScaleByLionState(mu=mu, num_nonfinite=count, sign_state=kind.init())

    def update_fn(updates, state, params=None, **extra_args):
        del params
        directions, mu = _momentum_step(updates, state.mu, direction, b2)
        signs, sign_state = kind.apply(directions, updates, state.sign_state)
        count = _count(state.num_nonfinite, updates, extra_args.get("pre_norm"))
        return signs, ScaleByLionState(mu=mu, num_nonfinite=count, sign_state=sign_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- Parts ----------------------------------------------------------------------------


def _average(m: jax.Array, g: jax.Array, beta: ArrayLike) -> jax.Array:
    """beta * m + (1 - beta) * g in float32 or wider."""
    wide = compute_dtype(m.dtype, g.dtype)
    real = jnp.finfo(wide).dtype
    beta = jnp.asarray(beta).astype(real)
    return beta.astype(wide) * m.astype(wide) + (1 - beta).astype(wide) * g.astype(wide)


def _momentum_step(updates: Any, mu: Any, direction: Any, decay: ArrayLike) -> tuple[Any, Any]:
    """The directions `direction(g, m)`, and the momentum averaged where g is finite."""
    checks.check_same_structure("updates", updates, "momentum", mu)

    def average(g: Any, m: jax.Array) -> jax.Array:
        new = _average(m, jnp.asarray(g), decay).astype(m.dtype)
        return keep_weak_type(jnp.where(jnp.isfinite(g) & jnp.isfinite(new), new, m), m)

    directions = map_clippable(direction, updates, mu)
    mu = jax.tree.map(lambda g, m: average(g, m) if trees.is_clippable(g) else m, updates, mu)
    return directions, mu


def _zero_momentum(params: optax.Params, dtype: Any) -> Any:
    """Zeros like the floating leaves; other leaves keep a scalar zero as a placeholder."""

    def zeros(p: Any) -> jax.Array:
        if not trees.is_clippable(p):
            return jnp.zeros((), jnp.int32)
        return jnp.zeros_like(p, dtype=dtype)

    return jax.tree.map(zeros, params)


def _count(num_nonfinite: jax.Array, updates: Any, pre_norm: Any) -> jax.Array:
    """One more if any floating entry of `updates` is not finite.

    Where the norm of the gradient at the head of the chain is known, that says so: no pass.
    """
    if isinstance(pre_norm, MeasuredNorm):
        return increment(num_nonfinite, ~jnp.isfinite(pre_norm.norm.norm))
    return increment(num_nonfinite, floats.has_nonfinite(updates))
