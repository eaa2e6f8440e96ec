"""Averages of the weights over the steps of a run: exponential, or uniform over its end.

    s <- 1 + decay * s,    a <- a + (w - a) / s

So the first average is the first weights, without a bias towards where the run began.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import as_float, compute_dtype, increment, keep_weak_type
from jaxclip._core.trees import PyTree, is_clippable, map_clippable
from jaxclip.sparsity.keeping import KeepSparseState

_State = TypeVar("_State")


class AverageWeightsState(NamedTuple):
    """State of `average_weights`.

    Attributes:
      step: Scalar int32, steps so far.
      decay: Scalar float32, decay of the last step.
      total: Scalar float32, sum of the weights of the average; 0 before it begins.
      average: The average, a tree like the parameters, in float32 or wider; without the weights
        after the last step, which the optimizer has not seen.
    """

    step: jax.Array
    decay: jax.Array
    total: jax.Array
    average: PyTree


def average_weights(
    decay: ArrayLike = 0.999, *, start_step: ArrayLike = 0
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights beside an optimizer, in its state; `averaged_weights` reads them.

    `s <- 1 + decay * s; a <- a + (w - a) / s` for the weights after each step. That is the
    exponential moving average, divided by the sum of its coefficients. With decay 1 it is the
    uniform average, with `start_step = num_steps - k` that of the last k steps.

    A link of a chain, in any place: it reads parameters and passes the updates on. Averaged are
    the weights that the training has, also those that `make_train_step(weight_threshold=)` clips
    or rounds after the optimizer. Where the optimizer has this link, `fit` and `sweep` evaluate,
    keep and return the averages.

    Args:
      decay: Decay rate in [0, 1]; about `1 / (1 - decay)` steps count. May be traced: below 0 or
        NaN it counts as 0, and above 1 as 1.
      start_step: Steps whose weights do not count, at least 0. May be traced.

    Returns:
      A transform that needs `params`. Each entry of the average lies between the smallest and the
      largest that it had, exactly, so real weights in a box have an average in the box. An entry
      that is NaN or infinite does not count.

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If a concrete argument is out of its range; in `update`, without params.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), average_weights(1.0))
      >>> w, state = jnp.zeros(2), None
      >>> state = tx.init(w)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.array([-1.0, 2.0]), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> print(w, averaged_weights(state, w))
      [ 3. -6.] [ 2. -4.]

    References:
      Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992,
      https://doi.org/10.1137/0330046
      Izmailov et al., Averaging Weights Leads to Wider Optima, 2018,
      https://arxiv.org/abs/1803.05407
      Morales-Brotons et al., Exponential Moving Average of Weights in Deep Learning, 2024,
      https://arxiv.org/abs/2411.18704
    """
    checks.check_decay_rate("decay", decay)
    checks.check_traced_count("start_step", start_step, at_least=0)

    def init_fn(params):
        zero = jnp.zeros((), jnp.float32)
        average = jax.tree.map(_empty, params)
        return AverageWeightsState(jnp.zeros((), jnp.int32), zero, jnp.zeros_like(zero), average)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params_given("average_weights", params)
        checks.check_same_structure("params", params, "average", state.average)
        # These are the weights after the step before; those at the start do not count.
        rate = as_float(decay, jnp.float32)
        rate = jnp.where(rate >= 0, jnp.minimum(rate, 1), 0)
        state = state._replace(decay=rate)
        is_counted = state.step > start_step
        total, average = _with_weights(state, params)
        return updates, AverageWeightsState(
            step=increment(state.step),
            decay=rate,
            total=jnp.where(is_counted, total, state.total),
            average=map_clippable(
                lambda old, new: jnp.where(is_counted, new, old), state.average, average
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def averaged_weights(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """Returns the average of the weights of a run with `average_weights`, for evaluation.

    Args:
      opt_state: State of the optimizer, with that of one `average_weights` anywhere in it.
      params: The weights after the last step, which count as the last.

    Returns:
      Parameters of the structure, shapes and dtypes of `params`; `params` themselves before the
      average begins. Leaves that are not floating are those of `params`. Weights that
      `keep_sparse` has at zero are zero in the average, too.

    Raises:
      ValueError: If the state does not have the state of one `average_weights`, or does not fit
        `params`.

    Example:
      >>> tx = average_weights()
      >>> averaged_weights(tx.init(jnp.ones(2)), jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """
    states = _states_of(AverageWeightsState, opt_state)
    if len(states) != 1:
        raise ValueError(
            f"opt_state must have the state of one average_weights, got {len(states)} of them."
        )
    checks.check_same_structure("params", params, "average", states[0].average)
    _, average = _with_weights(states[0], params)

    def like(w: jax.Array, a: jax.Array) -> jax.Array:
        return keep_weak_type(a.astype(w.dtype), w)

    average = map_clippable(like, params, average)
    for sparse in _states_of(KeepSparseState, opt_state):
        # An average remembers weights that were pruned since.
        average = jax.tree.map(_kept, sparse.mask, average)
    return average


def weights_to_ship(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """Returns the averages if the optimizer has `average_weights`, and else the parameters."""
    if not _states_of(AverageWeightsState, opt_state):
        return params
    return averaged_weights(opt_state, params)


def _states_of(kind: type[_State], opt_state: optax.OptState) -> list[_State]:
    """Returns the outermost nodes of a kind in the state of an optimizer."""

    def is_state(node: object) -> bool:
        return isinstance(node, kind)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]


def _kept(mask: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.where(mask, w, jnp.zeros_like(w))


def _empty(w: ArrayLike) -> jax.Array:
    if not is_clippable(w):
        return jnp.zeros((), jnp.int32)  # a placeholder
    return jnp.zeros_like(w, compute_dtype(jnp.result_type(w)))


def _with_weights(state: AverageWeightsState, params: PyTree) -> tuple[jax.Array, PyTree]:
    """Returns the sum of coefficients and the average when these weights count, too."""
    total = 1 + state.decay * state.total
    is_first = state.total == 0

    def leaf(a: jax.Array, w: ArrayLike) -> jax.Array:
        wide = jnp.asarray(w).astype(a.dtype)
        moved = _between(wide, a, total.astype(jnp.finfo(a.dtype).dtype))
        return jnp.where(is_first, wide, jnp.where(jnp.isfinite(wide), moved, a))

    return total, map_clippable(leaf, state.average, params)


def _between(w: jax.Array, a: jax.Array, total: jax.Array) -> jax.Array:
    """Returns `a + (w - a) / total`, never outside of a and w; complex numbers part by part."""
    if jnp.iscomplexobj(w):
        parts = (_between(part(w), part(a), total) for part in (jnp.real, jnp.imag))
        return lax.complex(*parts)
    # The sum is rounded, and could be an ulp beyond both.
    return jnp.clip(a + (w - a) / total, jnp.minimum(a, w), jnp.maximum(a, w))
