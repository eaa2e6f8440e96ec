"""The step to the corner of the box: `w <- (1 - gamma) * w - gamma * t * sign(m)`.

The corner `-t * sign(m)` is the point of the box `|w| <= t` where the sum of `m * w` is least: the
answer of the box's linear minimization oracle (LMO). All points between two points of the box are
in the box. So weights never leave it, without a projection.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    compute_dtype,
    increment,
    keep_weak_type,
    round_toward_zero,
    saturate,
)
from jaxclip._core.trees import PyTree, map_clippable
from jaxclip._core.updates import bound_in, bounds_nothing, clip_modulus, is_unbounded
from jaxclip.sign.directions import scale_by_signum
from jaxclip.thresholds.values import (
    check_number_or_schedule,
    check_threshold_tree,
    resolve_threshold,
)


class FrankWolfeState(NamedTuple):
    """State of the last link of `frank_wolfe`.

    Attributes:
      step: Scalar int32, steps so far.
      learning_rate: Scalar float32, gamma at the last step.
    """

    keeps_finite = True

    step: jax.Array
    learning_rate: jax.Array


def frank_wolfe(
    learning_rate: ArrayLike | optax.Schedule,
    threshold: PyTree,
    direction: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps a fraction of the way to the corner of the box that the gradient points at.

    `w <- (1 - gamma) * w - gamma * t * sign(m)`. It is the sign step of size `gamma * t` with the
    weight decay `1 / t`. Weights in the box stay in it; those outside come in exponentially fast,
    their excess times `1 - gamma` at each step.

    Args:
      learning_rate: gamma, the fraction of the way, in [0, 1]: a number, a traced scalar, or a
        schedule. Traced values are clipped to [0, 1]; NaN makes no step.
      threshold: t, the box: a number, schedule, rule such as `fan_in(1.0)`, or a prefix tree of
        these, in the units of the weights. A leaf without a box (threshold inf) takes the step
        `-gamma * sign(m)`.
      direction: A transform whose updates replace `sign(m)`, clipped to [-1, 1]: `scale_by_lion()`
        or `scale_by_signum(0.95)`, with any sign kind; None is `scale_by_signum(0.9)`.

    Returns:
      An optimizer, for `optax.apply_updates`, that needs `params`. Real weights in their box are in
      it after every step, however the sum is rounded; complex ones up to the rounding of their
      modulus. If a schedule shrinks the box, weights outside come in as above.

    Raises:
      TypeError: If an argument is of a wrong type.
      ValueError: If `learning_rate` is concrete and not in [0, 1], a threshold negative or NaN, or
        `update` gets no params.

    Example:
      >>> w = jnp.array([0.5, -0.5, 2.0])
      >>> tx = frank_wolfe(0.5, 0.5)
      >>> updates, _ = tx.update(jnp.array([3.0, 1e-3, 0.0]), tx.init(w), w)
      >>> print(optax.apply_updates(w, updates).round(3))
      [ 0.  -0.5  1. ]

    References:
      Pethick et al., Training Deep Learning Models with Norm-Constrained LMOs, 2025,
      https://arxiv.org/abs/2502.07529
      Chen et al., Lion Secretly Solves Constrained Optimization, 2023,
      https://arxiv.org/abs/2310.05898
    """
    check_number_or_schedule("learning_rate", learning_rate, checks.check_decay_rate)
    check_threshold_tree("threshold", threshold)
    direction = scale_by_signum() if direction is None else direction
    direction = checks.check_transformation("direction", direction)
    return optax.chain(direction, _step_to_corner(learning_rate, threshold))


def _step_to_corner(
    learning_rate: ArrayLike | optax.Schedule, threshold: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Turns directions into steps towards the corners they point away from."""

    def init_fn(params):
        del params
        return FrankWolfeState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params_given("frank_wolfe", params)
        checks.check_same_structure("updates", updates, "params", params)
        gamma = jnp.asarray(checks.value_at("learning_rate", learning_rate, state.step))
        gamma = gamma.astype(jnp.float64 if gamma.dtype == jnp.float64 else jnp.float32)
        gamma = jnp.where(jnp.isnan(gamma), 0, jnp.clip(gamma, 0, 1))
        bounds = resolve_threshold(threshold, params, state.step)
        updates = map_clippable(
            lambda d, w, bound: _leaf_step(d, jnp.asarray(w), gamma, bound), updates, params, bounds
        )
        reported = gamma.astype(jnp.float32)
        return updates, FrankWolfeState(increment(state.step), learning_rate=reported)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _leaf_step(d: jax.Array, w: jax.Array, gamma: jax.Array, bound: ArrayLike) -> jax.Array:
    """Returns `-gamma * (bound * d + w)` for `|d|` clipped to 1; `-gamma * d` without a bound."""
    wide = compute_dtype(d.dtype, w.dtype)
    d = clip_modulus(d, 1.0)
    if is_unbounded(bound):
        step = d.astype(wide)
    else:
        bound = jnp.asarray(bound_in(bound, w))
        is_free = bounds_nothing(bound)
        size = jnp.where(is_free, jnp.ones_like(bound), bound).astype(wide)
        step = size * d.astype(wide) + jnp.where(is_free, jnp.zeros_like(w), w).astype(wide)
    # A little less than gamma, and rounded towards zero: the step never overshoots its corner, so
    # neither does the rounded sum with `w`.
    real = jnp.finfo(wide).dtype
    fraction = gamma.astype(real) * (1 - 2 * float(jnp.finfo(real).eps))
    step = saturate(-fraction.astype(wide) * step, d.dtype)
    if not jnp.iscomplexobj(step):
        step = round_toward_zero(step, d.dtype)
    return keep_weak_type(step.astype(d.dtype), d)
