"""Training with low bits: weights kept on a grid, and what a low-bit tree may still learn.

tx = keep_on_grid(optax.adam(1e-3), "ternary", start_step=500)     train on the grid
parts, rebuild = trainable_parts(compress(params, "ternary"))      then train its scales
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxclip._core import checks
from jaxclip._core.floats import compute_dtype, increment, keep_weak_type
from jaxclip._core.grids import Bits, Grid, as_grid
from jaxclip._core.trees import is_clippable, map_clippable
from jaxclip._core.updates import rounded_sum, update_between
from jaxclip.lowbit.arrays import dequantize, is_quantized
from jaxclip.lowbit.policies import Policy
from jaxclip.lowbit.trees import compress
from jaxclip.thresholds.by_error import least_squares


class KeepOnGridState(NamedTuple):
    """State of `keep_on_grid`.

    Attributes:
      step: Scalar int32, steps so far.
      residual: What rounding took from the weights, in float32 or wider; 0 before `start_step`.
      inner_state: State of the wrapped optimizer, which sees the weights before rounding.
    """

    step: jax.Array
    residual: Any
    inner_state: Any


def keep_on_grid(
    inner: optax.GradientTransformation,
    bits: Bits | Grid,
    *,
    start_step: int = 0,
    rule: Any = None,
    policy: Policy = (),
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that from a step on the weights lie on a low-bit grid.

    `v = w + r`, `v <- v + inner(g, v)`, `w <- Q(v)` and `r <- v - w`, where
    `Q(v) = decompress(compress(v, bits, ...))`; the first `start_step` updates are those of
    `inner`. Gradients are taken at the rounded `w` and go to `v`: the straight-through
    derivative, without a change to the loss, and with what rounding took kept in the state.
    There it is float32 for weights in half precision, too, so that small steps add up.

    Goes around everything that is to see or bound the unrounded weights: a box goes inside,
    `keep_on_grid(optax.chain(inner, project_weights(box(fan_in(1.0)))), ...)`.

    Args:
      inner: Any optimizer.
      bits: A `Grid`, or its width with one scale for each index along the last axis.
      start_step: Steps before the first rounding, at least 0. May be traced.
      rule: As in `compress`; None for `least_squares`. Codes and scales are chosen anew at every
        step, so it should be cheap.
      policy: As in `compress`, for widths and rules leaf by leaf.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are kept. Its
      state has as many numbers as the weights. Parameters are on the grid to the rounding of
      `optax.apply_updates`. The low-bit tree itself is `compress(w + r, bits, ...)` with the same
      arguments, of the sum in the dtype of `r`; for one bit and ternary
      `compress(params, bits, rule=max_abs)` has its codes. A step that is NaN or infinite is
      handed on, and `r` stays.

    Raises:
      TypeError: If `inner` is no transformation, or an argument of `compress` is of a wrong
        type.
      ValueError: If `bits` or `start_step` is not allowed, or `update` gets no params; at
        `init`, as `compress`.

    Example:
      >>> params = {"kernel": jnp.array([[0.9, -0.2], [0.1, 0.6]])}
      >>> tx = keep_on_grid(optax.sgd(0.1), "ternary")
      >>> grads = {"kernel": jnp.ones((2, 2))}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"].round(3))
      [[ 0.8 -0.4]
       [ 0.   0.4]]

    References:
      Courbariaux et al., BinaryConnect, 2015, https://arxiv.org/abs/1511.00363
      Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013,
      https://arxiv.org/abs/1308.3432
    """
    inner = checks.check_transformation("inner", inner)
    grid = as_grid(bits, axis=-1)
    _check_start_step(start_step)

    # Compiled, which also spares it a look at every value outside jit.
    @jax.jit
    def low_bit(params):
        return compress(params, grid, rule=least_squares if rule is None else rule, policy=policy)

    def init_fn(params):
        jax.eval_shape(low_bit, params)  # says now what is wrong with the arguments
        residual = jax.tree.map(_no_residual, params)
        return KeepOnGridState(jnp.zeros((), jnp.int32), residual, inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        checks.check_params_given("keep_on_grid", params)
        checks.check_same_structure("updates", updates, "params", params)
        seen = map_clippable(_seen, params, state.residual)
        updates, inner_state = inner.update(updates, state.inner_state, seen, **extra_args)
        after = map_clippable(_moved, params, state.residual, updates)
        small, is_on = jax.eval_shape(low_bit, after), state.step >= start_step

        def on_grid(after: Any) -> Any:
            return jax.tree.map(
                lambda v, q: dequantize(q) if is_quantized(q) else v, after, low_bit(after)
            )

        # The grid costs nothing before it is asked for, but where the condition is batched.
        target = lax.cond(is_on, on_grid, lambda after: after, after)

        # Leaves that stay as they are move as `inner` says, and have no residual.
        def move(u: Any, w: Any, t: Any, q: Any) -> Any:
            if not is_quantized(q):
                return u
            u, w = jnp.asarray(u), jnp.asarray(w)
            t = t.astype(w.dtype)
            return keep_weak_type(jnp.where(is_on, update_between(u, w, t, t, t), u), u)

        def remain(u: Any, w: Any, v: Any, q: Any, r: Any) -> Any:
            if not is_quantized(q):
                return r
            rest = v - rounded_sum(jnp.asarray(w), u).astype(v.dtype)
            return jnp.where(is_on & jnp.isfinite(rest), rest, r)

        updates = jax.tree.map(move, updates, params, target, small)
        residual = jax.tree.map(remain, updates, params, after, small, state.residual)
        return updates, KeepOnGridState(increment(state.step), residual, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_start_step(value: Any) -> None:
    if not isinstance(value, jax.Array):
        checks.check_count("start_step", value, at_least=0)
    elif value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"start_step must be an integer of at least 0, got {value!r}.")


def _no_residual(w: Any) -> jax.Array:
    if not is_clippable(w):
        return jnp.zeros(())
    return jnp.zeros_like(w, compute_dtype(jnp.result_type(w)))


def _seen(w: jax.Array, r: jax.Array) -> jax.Array:
    """The weights before rounding, in their dtype."""
    return keep_weak_type(rounded_sum(w, r), w)


def _moved(w: jax.Array, r: jax.Array, u: Any) -> jax.Array:
    """The weights before rounding, after a step, in the dtype of the residual."""
    return w.astype(r.dtype) + r + jnp.asarray(u).astype(r.dtype)
