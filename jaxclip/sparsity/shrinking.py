"""The proximal step of an L1 penalty: weights move towards 0, and stop there.

w <- sign(v) * max(|v| - t, 0),    v = w + u,    t = learning rate * penalty
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    as_float,
    compute_dtype,
    increment,
    keep_weak_type,
    phase_and_modulus,
    saturate,
)
from jaxclip._core.trees import Mask, PyTree, check_mask_for_leaves, is_clippable, masked
from jaxclip._core.updates import update_to
from jaxclip.thresholds.values import check_number_or_schedule


class SoftThresholdState(NamedTuple):
    """State of `soft_threshold`: a scalar int32 step count."""

    step: jax.Array


def soft_threshold(
    threshold: ArrayLike | optax.Schedule, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Shrinks the weights after a step by a threshold, those within it to exactly 0.

    `w <- sign(v) * max(|v| - t, 0)` with `v = w + u`, the proximal operator of `t |w|`. It comes
    after the learning rate, as the last link of a chain: with the step size alpha and the penalty
    lambda of the loss, `t = alpha * lambda`. After a sign step that is
    `optax.chain(lion(alpha), soft_threshold(alpha * penalty))`. All sign steps are alpha long, so
    with a penalty of 1 or more none leaves 0.

    Args:
      threshold: t, in the units of the weights: number in [0, inf), traced scalar, or schedule,
        such as `lambda step: penalty * learning_rate(step)`. A traced NaN or negative one
        shrinks nothing.
      mask: The leaves to shrink: a tree of bools (a prefix is enough), or a function of the
        parameters that returns one; None for leaves of two or more dimensions.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are kept.
      Weights within the threshold are exactly 0 after `optax.apply_updates`, if the updates are
      of the weights' dtype or one that contains it. Complex weights keep their phase. NaN and
      infinite updates are passed on.

    Raises:
      TypeError: If an argument is of a wrong type.
      ValueError: If a concrete threshold is negative, NaN or infinite, or `update` gets no params.

    Example:
      >>> params = {"kernel": jnp.array([[0.5, -0.25], [0.0, -1.0]])}
      >>> tx = optax.chain(optax.sgd(0.25), soft_threshold(0.25))
      >>> grads = {"kernel": jnp.array([[1.0, -1.0], [1.0, 0.0]])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"])
      [[ 0.    0.  ]
       [ 0.   -0.75]]

    References:
      Daubechies et al., An iterative thresholding algorithm for linear inverse problems with a
      sparsity constraint, 2004, https://arxiv.org/abs/math/0307152
    """
    check_number_or_schedule("threshold", threshold, checks.check_nonnegative)
    check_mask_for_leaves(mask)

    def init_fn(params):
        del params
        return SoftThresholdState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params_given("soft_threshold", params)
        checks.check_same_structure("updates", updates, "params", params)
        now = as_float(checks.value_at("threshold", threshold, state.step), jnp.float32)
        now = jnp.where(now > 0, now, jnp.zeros_like(now))

        def shrink(u: PyTree, w: PyTree) -> PyTree:
            is_in = is_clippable(u) and is_clippable(w) and (mask is not None or jnp.ndim(w) >= 2)
            return _shrunk(jnp.asarray(u), jnp.asarray(w), now) if is_in else u

        updates = jax.tree.map(shrink, updates, masked(mask, params, params, 0))
        return updates, SoftThresholdState(increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.jit  # leaves of one shape share one trace
def _shrunk(u: jax.Array, w: jax.Array, threshold: jax.Array) -> jax.Array:
    """Returns the update to the weights after a step, shrunk."""
    wide = compute_dtype(w.dtype, u.dtype)
    moved = w.astype(wide) + u.astype(wide)
    if jnp.iscomplexobj(moved):
        phase, modulus = phase_and_modulus(moved)
    else:
        phase, modulus = jnp.sign(moved), jnp.abs(moved)
    t = threshold.astype(modulus.dtype)
    to_zero = update_to(jnp.zeros_like(w), u, w).astype(wide)
    # Not as a target minus `w`, which would round the step to the spacing of the weights.
    shrunk = jnp.where(modulus <= t, to_zero, u.astype(wide) - phase * t.astype(wide))
    shrunk = jnp.where(jnp.isfinite(moved), saturate(shrunk, u.dtype), u.astype(wide))
    return keep_weak_type(jnp.where(t > 0, shrunk.astype(u.dtype), u), u)
