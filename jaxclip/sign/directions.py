"""Directions of the sign-gradient step `w <- w - alpha * sign(g)` and its family.

The sign of an entry is -1, 0 or 1: 0 for 0, -0 and NaN, and 1 or -1 for the infinities.
A complex entry becomes `z / |z|`, 0 where it is not finite. Float32 subnormals have sign 0
where the backend flushes them to zero (XLA on CPU does). Every transform here takes a sign
kind of `sign.kinds` (soft, stochastic, scaled) in place of the sign.

A gradient entry that is not finite never enters a momentum: that entry of the momentum stays
as it was, and `num_nonfinite` in the state counts such steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core import checks
from jaxclip._core.floats import Spread, compute_dtype, increment, keep_weak_type, select
from jaxclip._core.trees import PyTree, is_clippable, map_clippable
from jaxclip.norms.of_trees import MeasuredNorm, is_nonfinite
from jaxclip.sign.kinds import SignKind, resolve_sign_kind


class ScaleBySignState(NamedTuple):
    """State of `scale_by_sign`.

    Attributes:
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      sign_state: State of the sign kind; an empty tuple for those that have none.
    """

    transform_name = "scale_by_sign"
    keeps_finite = True

    num_nonfinite: jax.Array
    sign_state: PyTree = ()


class ScaleBySignumState(NamedTuple):
    """State of `scale_by_signum`.

    Attributes:
      mu: Momentum, a tree like the parameters; always finite.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      sign_state: State of the sign kind; an empty tuple for those that have none.
    """

    transform_name = "scale_by_signum"
    keeps_finite = True

    mu: optax.Updates
    num_nonfinite: jax.Array
    sign_state: PyTree = ()


class ScaleByLionState(NamedTuple):
    """State of `scale_by_lion`, with the fields of `ScaleBySignumState`."""

    transform_name = "scale_by_lion"
    keeps_finite = True

    mu: optax.Updates
    num_nonfinite: jax.Array
    sign_state: PyTree = ()


# --- Directions -----------------------------------------------------------------------


def scale_by_sign(sign: SignKind | None = None) -> optax.GradientTransformationExtraArgs:
    """Replaces every gradient entry by its sign: -1, 0 or 1.

    Unlike in `optax.scale_by_sign`, NaN becomes 0 and is counted, and another sign kind can
    replace the sign.

    Args:
      sign: `soft_sign(...)`, `stochastic_sign(...)`, `scaled_sign(...)`, or None for the
        sign itself.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. Leaves that are
      not floating (integers, bools, float0, keys) pass through.

    Raises:
      TypeError: If `sign` is not a sign kind.

    Example:
      >>> tx = scale_by_sign()
      >>> grads = jnp.array([-3.0, 0.0, 0.5, jnp.nan])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([-1.,  0.,  1.,  0.], dtype=float32)

    References:
      Bernstein et al., signSGD, 2018, https://arxiv.org/abs/1802.04434
    """
    kind = resolve_sign_kind(sign)

    def init_fn(params):
        del params
        return ScaleBySignState(jnp.zeros((), jnp.int32), sign_state=kind.init())

    def update_fn(updates, state, params=None, **extra_args):
        del params
        signs, sign_state = kind.apply(updates, updates, state.sign_state)
        count = _count_nonfinite(state.num_nonfinite, updates, extra_args.get("pre_norm"))
        return signs, ScaleBySignState(num_nonfinite=count, sign_state=sign_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_signum(
    beta: ArrayLike = 0.9,
    accumulator_dtype: DTypeLike | None = None,
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
      nesterov: True to look one step ahead.
      sign: `soft_sign(...)`, `stochastic_sign(...)`, `scaled_sign(...)`, or None for the
        sign itself.

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

    def direction(g: jax.Array, m: jax.Array, weights: "_Weights") -> jax.Array:
        new = _average(m, g, *weights.like(m, g))
        return _average(new, g, *weights.like(new, g)) if nesterov else new

    return _scale_by_momentum(ScaleBySignumState, direction, beta, beta, accumulator_dtype, sign)


def scale_by_lion(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    sign: SignKind | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by Lion's sign step.

    `update = sign(b1 * m + (1 - b1) * g); m <- b2 * m + (1 - b2) * g`, in float32.

    Args:
      b1: Weight of the momentum in the direction, in [0, 1]. May be traced.
      b2: Decay rate of the momentum, in [0, 1]. May be traced.
      mu_dtype: Dtype of the momentum; None for the dtype of each parameter.
      sign: `soft_sign(...)`, `stochastic_sign(...)`, `scaled_sign(...)`, or None for the
        sign itself.

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

    def direction(g: jax.Array, m: jax.Array, weights: "_Weights") -> jax.Array:
        return _average(m, g, *weights.like(m, g))

    return _scale_by_momentum(ScaleByLionState, direction, b1, b2, mu_dtype, sign)


# --- Momentum -------------------------------------------------------------------------


def _scale_by_momentum(
    state_type: type[ScaleBySignumState] | type[ScaleByLionState],
    direction: Callable[[jax.Array, jax.Array, "_Weights"], jax.Array],
    beta: ArrayLike,
    decay: ArrayLike,
    mu_dtype: DTypeLike | None,
    sign: SignKind | None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces g by the sign of `direction(g, m, weights of beta)`, m its moving average."""
    kind = resolve_sign_kind(sign)

    def init_fn(params):
        return state_type(
            mu=_zero_momentum(params, mu_dtype),
            num_nonfinite=jnp.zeros((), jnp.int32),
            sign_state=kind.init(),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params
        checks.check_same_structure("updates", updates, "momentum", state.mu)
        weights = _Weights(beta)
        directions = map_clippable(lambda g, m: direction(g, m, weights), updates, state.mu)
        signs, sign_state = kind.apply(directions, updates, state.sign_state)
        return signs, state_type(
            mu=_next_momentum(updates, state.mu, decay),
            num_nonfinite=_count_nonfinite(
                state.num_nonfinite, updates, extra_args.get("pre_norm")
            ),
            sign_state=sign_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zero_momentum(params: optax.Params, dtype: DTypeLike | None) -> optax.Updates:
    """Returns zeros like the floating leaves, and a scalar in place of each other leaf."""

    def zeros(p: ArrayLike) -> jax.Array:
        if not is_clippable(p):
            return jnp.zeros((), jnp.int32)
        return jnp.zeros_like(p, dtype=dtype)

    return jax.tree.map(zeros, params)


def _next_momentum(updates: optax.Updates, mu: optax.Updates, decay: ArrayLike) -> optax.Updates:
    """Returns the momentum, averaged where the gradient is finite."""

    weights = _Weights(decay)

    def average(g: ArrayLike, m: jax.Array) -> jax.Array:
        if not is_clippable(g):
            return m
        g = jnp.asarray(g)
        return _next_leaf(m, g, *weights.like(m, g))

    return jax.tree.map(average, updates, mu)


class _Weights:
    """The weights `beta` and `1 - beta` of an average, in the dtypes and shapes of leaves."""

    def __init__(self, beta: ArrayLike):
        self._beta = beta
        self._pairs: dict[np.dtype, tuple[Spread, Spread]] = {}

    def like(self, m: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        dtype = jnp.finfo(compute_dtype(m.dtype, g.dtype)).dtype
        if dtype not in self._pairs:
            is_number = isinstance(self._beta, (int, float))
            beta = np.asarray(self._beta, dtype) if is_number else jnp.asarray(self._beta, dtype)
            self._pairs[dtype] = Spread(beta), Spread(np.asarray(1, dtype) - beta)
        first, second = self._pairs[dtype]
        return first.like(m), second.like(g)


@jax.jit  # leaves of one shape share one trace
def _next_leaf(m: jax.Array, g: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    average = _average(m, g, old, new).astype(m.dtype)
    # Where the gradient is not finite this is not either, also for a decay of 1.
    return keep_weak_type(select(jnp.isfinite(average), average, m), m)


@jax.jit
def _average(m: jax.Array, g: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns `old * m + new * g` in float32 or wider."""
    wide = compute_dtype(m.dtype, g.dtype)
    return old.astype(wide) * m.astype(wide) + new.astype(wide) * g.astype(wide)


def _count_nonfinite(count: jax.Array, updates: optax.Updates, pre_norm: PyTree) -> jax.Array:
    """Returns `count + 1` if an entry of the gradient is not finite, else `count`."""
    # The gradient at the head of the chain, if it was measured there: that saves a pass.
    gradient = pre_norm.tree if isinstance(pre_norm, MeasuredNorm) else updates
    return increment(count, is_nonfinite(gradient, pre_norm))
