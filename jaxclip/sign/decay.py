"""Decoupled weight decay, of all weights or only of those that the step moves towards 0 as well.

u <- u - decay * w,    cautious: where u * w <= 0
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core import checks
from jaxclip._core.floats import Spread, compute_dtype, increment, keep_weak_type, saturate
from jaxclip._core.trees import Mask, check_mask_for_leaves, map_clippable
from jaxclip.sign.kinds import alignment
from jaxclip.thresholds.values import check_number_or_schedule


class _NoState(NamedTuple):
    """State of a link without one."""

    keeps_finite = True


class _StepState(NamedTuple):
    """State of a link with a schedule: a scalar int32 step count."""

    keeps_finite = True

    step: jax.Array


def cautious_decay(
    weight_decay: ArrayLike | optax.Schedule,
    mask: Mask | None = None,
    *,
    is_direction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Decays the weights that the step of an optimizer moves towards 0 as well, and no others.

    `u <- u - weight_decay * w` where `u * w <= 0`, entry by entry. Where decay and step disagree
    the step stays as it is, so the decay does not move the minimum of the loss.

    It follows any optimizer: `optax.chain(optax.muon(rate), cautious_decay(0.1 * rate))`, with the
    learning rate in its coefficient. With `is_direction` it takes the place of
    `optax.add_decayed_weights`, before the learning rate.

    Args:
      weight_decay: Coefficient, not negative: a number, a traced scalar, or a schedule.
      mask: The leaves that decay, all if None: a tree of bools, or a function of the parameters
        that returns one.
      is_direction: True if the updates are subtracted later: `u <- u + weight_decay * w` where
        `u * w >= 0`.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are kept. A
      coefficient that is traced, or of a schedule, and is not finite or negative counts as 0.
      A sum beyond the dtype becomes its largest number; entries that are NaN or infinite stay so.

    Raises:
      TypeError: If `weight_decay` or `mask` is of a wrong type.
      ValueError: If `weight_decay` is negative or not finite, or `is_direction` is not a bool; in
        `update`, without params.

    Example:
      >>> tx = optax.chain(optax.sgd(0.5), cautious_decay(0.25))
      >>> w = jnp.array([4.0, -4.0])
      >>> tx.update(jnp.array([2.0, 2.0]), tx.init(w), w)[0]
      Array([-2., -1.], dtype=float32)

    References:
      Chen et al., Cautious Weight Decay, 2025, https://arxiv.org/abs/2510.12402
    """
    checks.check_choice("is_direction", is_direction, (False, True))
    return decay_weights(weight_decay, mask, True, is_direction)


def decay_weights(
    weight_decay: ArrayLike | optax.Schedule,
    mask: Mask | None,
    is_cautious: bool,
    is_direction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adds `weight_decay * w` to the direction, or subtracts it from the update, in its dtype."""
    check_number_or_schedule("weight_decay", weight_decay, checks.check_nonnegative)
    checks.check_choice("cautious_decay", is_cautious, (False, True))
    check_mask_for_leaves(mask)
    is_off = isinstance(weight_decay, (int, float)) and weight_decay == 0

    def init_fn(params):
        del params
        return _StepState(jnp.zeros((), jnp.int32)) if callable(weight_decay) else _NoState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if is_off:
            return updates, state
        checks.check_params_given("weight_decay", params)
        checks.check_same_structure("updates", updates, "params", params)
        step = getattr(state, "step", 0)  # a number needs no state
        value = finite_or_zero(checks.value_at("weight_decay", weight_decay, step))
        value = jnp.asarray(value)  # that of a schedule may be an integer
        value = value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)
        value = jnp.maximum(value, 0)  # a late negative number must not grow weights
        coefficient = Spread(value if is_direction else -value)

        def leaf(u: jax.Array, p: ArrayLike) -> jax.Array:
            return _decayed(u, jnp.asarray(p), coefficient.like(u), is_cautious, is_direction)

        updates = map_clippable(leaf, updates, params)
        return updates, _StepState(increment(state.step)) if callable(weight_decay) else state

    decay = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return decay if mask is None else optax.masked(decay, mask)


# Jitted, so that leaves of one shape share one trace.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _decayed(
    u: jax.Array, p: jax.Array, coefficient: jax.Array, is_cautious: bool, is_direction: bool
) -> jax.Array:
    """Returns `u + coefficient * p` in the dtype of u; cautious decay leaves some of p out."""
    wide = compute_dtype(u.dtype)
    if coefficient.dtype != jnp.finfo(wide).dtype:  # beyond it the largest number, not infinity
        coefficient = cast_saturated(coefficient, jnp.finfo(wide).dtype)
    shrink = coefficient.astype(wide) * p.astype(wide)
    if is_cautious:
        sign = alignment(u, p)
        agrees = sign >= 0 if is_direction else sign <= 0
        shrink = jnp.where(agrees & jnp.isfinite(u), shrink, jnp.zeros_like(shrink))
    total = u.astype(wide) + shrink
    # A decay beyond the dtype ends at its largest number; an update that is infinite stays so.
    total = jnp.where(jnp.isfinite(u), cast_saturated(total, u.dtype), u)
    return keep_weak_type(total, u)


def finite_or_zero(number: ArrayLike) -> jax.Array | np.ndarray:
    """Returns an array with 0 in place of a number that is not finite; numbers stay in NumPy."""
    if not isinstance(number, jax.Array):
        # That of a schedule may be NaN, too. What is only beyond the dtype becomes infinite.
        number = number if np.isfinite(number) else 0.0
        with np.errstate(over="ignore"):
            return np.asarray(number, jnp.result_type(float))
    return jnp.where(jnp.isfinite(number), number, jnp.zeros_like(number))


def cast_saturated(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Casts to a dtype, clipped to its finite range (by modulus, too); NaN stays NaN."""
    fraction = 0.7 if jnp.iscomplexobj(x) else 1.0  # of each part, so that the modulus is finite
    return saturate(x, dtype, fraction).astype(dtype)
