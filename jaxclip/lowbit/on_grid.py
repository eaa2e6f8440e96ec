"""Training on a low-bit grid: an optimizer whose weights are rounded after every step.

    v <- v + inner(g, v),    w <- Q(v)

Gradients are taken at the rounded weights w; the weights v before rounding accumulate the steps.
The scales of the grid follow from v by a rule, or are learned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import compute_dtype, increment, keep_weak_type
from jaxclip._core.grids import Bits, Grid, as_grid
from jaxclip._core.trees import PyTree, is_clippable, map_clippable
from jaxclip._core.updates import rounded_sum, update_between
from jaxclip.lowbit.arrays import is_quantized
from jaxclip.lowbit.learned_scales import (
    LearnedScales,
    Specs,
    compress_at,
    gradients_of_scales,
    learned,
    log_scales_of,
    no_log_scales,
)
from jaxclip.lowbit.policies import LeafSpec, Policy
from jaxclip.lowbit.quantizer import Threshold
from jaxclip.lowbit.trees import compress_tree, decompress, specs_of_tree
from jaxclip.thresholds.by_error import least_squares


class KeepOnGridState(NamedTuple):
    """State of `keep_on_grid`.

    Attributes:
      step: Scalar int32, steps so far.
      residual: Weights before rounding minus weights, in float32 or wider; 0 before `start_step`.
      inner_state: State of the wrapped optimizer, which sees the weights before rounding.
      scales: With `learn_scales` the scales and the state of their optimizer; else empty.
    """

    step: jax.Array
    residual: PyTree
    inner_state: optax.OptState
    scales: LearnedScales | optax.EmptyState = optax.EmptyState()


def keep_on_grid(
    inner: optax.GradientTransformation,
    bits: Bits | Grid,
    *,
    start_step: int = 0,
    rule: Threshold | None = None,
    policy: Policy = (),
    learn_scales: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that from `start_step` on the weights are on a low-bit grid.

    `v = w + r`, `v <- v + inner(g, v)`, `w <- Q(v)` and `r <- v - w`, where
    `Q(v) = decompress(compress(v, bits, ...))`; the first `start_step` updates are those of
    `inner`. Gradients are taken at the rounded `w` and applied to `v`: the straight-through
    derivative, without a change to the loss. The residual `r` stays in the state, in float32 even
    for weights in half precision, so small steps add up.

    Everything that reads or bounds the unrounded weights goes inside, such as a box:
    `keep_on_grid(optax.chain(inner, project_weights(box(fan_in(1.0)))), ...)`.

    With `learn_scales` the rule only gives the scales of the first step on the grid. From then on
    their logarithms are trained by the gradient of the loss, by that optimizer, as in LSQ:
    `dL/d ln s = sum g (w - v)` over the entries of a block inside the range of the grid, and
    `sum g w` over those outside (at one bit over all), divided by the root of their number times
    the highest code.

    Args:
      inner: Any optimizer.
      bits: A `Grid`, or its width with one scale for each output, by the names of leaves, as in
        `compress`.
      start_step: Steps before the first rounding, at least 0. May be traced.
      rule: A threshold rule, its factory or a number; None for `least_squares`. Codes and scales
        are chosen anew at every step, so it should be cheap.
      policy: Pairs `(regex, spec)` for widths, grids and rules leaf by leaf, as in `compress`.
      learn_scales: Optimizer of the logarithms of the scales, such as
        `optax.adam(optax.cosine_decay_schedule(1e-3, num_steps))`; None to choose them by `rule`
        at every step. Blocks of zeros start with the largest scale of their leaf.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are kept. Its
      state has as many numbers as the weights. Parameters are on the grid to the rounding of
      `optax.apply_updates`; `compress_trained` gives the low-bit tree itself. A step that is NaN
      or infinite is passed on, and `r` and the scales stay as they were.

    Raises:
      TypeError: If `inner` is not a transformation, or an argument of `compress` is of a wrong
        type.
      ValueError: If `bits` or `start_step` is not allowed, or `update` gets no params; in
        `init`, for the reasons of `compress`, or if `learn_scales` meets zero points.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
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
      Esser et al., Learned Step Size Quantization, 2020, https://arxiv.org/abs/1902.08153
    """
    inner = checks.check_transformation("inner", inner)
    grid = as_grid(bits, axis="outputs")
    checks.check_traced_count("start_step", start_step, at_least=0)

    of_scales = optax.set_to_zero() if learn_scales is None else learn_scales
    of_scales = checks.check_transformation("learn_scales", of_scales)

    # Jitted, so that outside of jit, too, no step waits for the check that all values are finite.
    @jax.jit
    def compressed(params):
        return compress_tree(params, _specs(params, grid, rule, policy))

    @jax.jit
    def compressed_at(params, log_scales):
        return compress_at(params, _specs(params, grid, rule, policy), log_scales)

    # Made once: outside of jit a `cond` compiles functions that it has not seen.
    def rounded(unrounded):
        return decompress(compressed(unrounded))

    def rounded_at(unrounded, log_scales):
        return decompress(compressed_at(unrounded, log_scales))

    def same(unrounded, *_):
        return unrounded

    def first_scales(scales, grads, before, after):
        del grads, before
        return scales._replace(log_scales=log_scales_of(compressed(after)))

    def next_scales(scales, grads, before, after):
        del after
        small = compressed_at(before, scales.log_scales)
        gradients = gradients_of_scales(grads, before, small, scales.log_scales)
        return learned(of_scales, scales, gradients)

    def kept_scales(scales, *_):
        return scales

    def init_fn(params):
        small = jax.eval_shape(compressed, params)  # raises now for wrong arguments
        residual = jax.tree.map(_no_residual, params)
        step = jnp.zeros((), jnp.int32)
        if learn_scales is None:
            return KeepOnGridState(step, residual, inner.init(params))
        log_scales = no_log_scales(small)  # until the first step on the grid
        scales = LearnedScales(log_scales, of_scales.init(log_scales))
        return KeepOnGridState(step, residual, inner.init(params), scales)

    def update_fn(updates, state, params=None, **extra_args):
        checks.check_params_given("keep_on_grid", params)
        checks.check_same_structure("updates", updates, "params", params)
        grads, scales = updates, state.scales
        before = map_clippable(_unrounded, params, state.residual)
        updates, inner_state = inner.update(updates, state.inner_state, before, **extra_args)
        after = map_clippable(_moved, params, state.residual, updates)
        small = jax.eval_shape(compressed, after)
        is_on = state.step >= start_step
        # A `cond`: before `start_step` the grid costs nothing, unless the condition is batched.
        if isinstance(scales, LearnedScales):
            phase = jnp.asarray(is_on, jnp.int32) + jnp.asarray(state.step > start_step, jnp.int32)
            branches = [kept_scales, first_scales, next_scales]
            scales = lax.switch(phase, branches, scales, grads, before, after)
            target = lax.cond(is_on, rounded_at, same, after, scales.log_scales)
        else:
            target = lax.cond(is_on, rounded, same, after)

        # Leaves that are not low-bit move as `inner` says, and have no residual.
        def move(u: PyTree, w: PyTree, t: PyTree, q: PyTree) -> PyTree:
            return _step_to_grid(jnp.asarray(u), jnp.asarray(w), t, is_on) if is_quantized(q) else u

        def next_residual(u: PyTree, w: PyTree, v: PyTree, q: PyTree, r: PyTree) -> PyTree:
            return _rest(jnp.asarray(u), jnp.asarray(w), v, r, is_on) if is_quantized(q) else r

        updates = jax.tree.map(move, updates, params, target, small)
        residual = jax.tree.map(next_residual, updates, params, after, small, state.residual)
        return updates, KeepOnGridState(increment(state.step), residual, inner_state, scales)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def compress_trained(
    params: optax.Params,
    opt_state: optax.OptState,
    bits: Bits | Grid,
    *,
    rule: Threshold | None = None,
    policy: Policy = (),
) -> PyTree:
    """Returns the low-bit tree of weights that were trained by `keep_on_grid`.

    `compress(w + r, bits, ...)`, by the rule, or with the scales that were learned. Decompressed,
    it is `params` to the rounding of `optax.apply_updates`.

    Args:
      params: The trained weights, once they are on the grid.
      opt_state: State of the optimizer, with that of one `keep_on_grid` anywhere in it.
      bits: As `keep_on_grid` was given it.
      rule: As `keep_on_grid` was given it.
      policy: As `keep_on_grid` was given it.

    Returns:
      A tree as from `compress`.

    Raises:
      ValueError: If the state does not have the state of one `keep_on_grid`, or for the reasons
        of `compress`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> params = {"kernel": jnp.array([[0.9, -0.2], [0.1, 0.6]])}
      >>> tx = keep_on_grid(optax.sgd(0.1), "ternary", learn_scales=optax.sgd(0.1))
      >>> grads = {"kernel": jnp.ones((2, 2))}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(compress_trained(params, state, "ternary")["kernel"].qvalue)
      [[ 1 -1]
       [ 0  1]]
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_state)
    states = [node for node in nodes if _is_state(node)]
    if len(states) != 1:
        raise ValueError(
            f"opt_state must have the state of one keep_on_grid, got {len(states)} of them."
        )
    unrounded = map_clippable(_sum, params, states[0].residual)
    specs = _specs(params, as_grid(bits, axis="outputs"), rule, policy)
    scales = states[0].scales
    if isinstance(scales, LearnedScales):
        return compress_at(unrounded, specs, scales.log_scales)
    return compress_tree(unrounded, specs)


def _specs(params: PyTree, grid: Grid, rule: Threshold | None, policy: Policy) -> Specs:
    default = LeafSpec(grid, least_squares if rule is None else rule)
    return specs_of_tree(params, default, policy)


def _is_state(node: object) -> bool:
    return isinstance(node, KeepOnGridState)


def _no_residual(w: ArrayLike) -> jax.Array:
    if not is_clippable(w):
        return jnp.zeros(())
    return jnp.zeros_like(w, compute_dtype(jnp.result_type(w)))


def _step_to_grid(u: jax.Array, w: jax.Array, target: jax.Array, is_on: jax.Array) -> jax.Array:
    """Returns the update to the point on the grid, or `u` before the grid is on."""
    t = target.astype(w.dtype)
    return keep_weak_type(jnp.where(is_on, update_between(u, w, t, t, t), u), u)


def _rest(
    u: jax.Array, w: jax.Array, unrounded: jax.Array, r: jax.Array, is_on: jax.Array
) -> jax.Array:
    """Returns the unrounded weights minus the weights after the update, where that is finite."""
    rest = unrounded - rounded_sum(w, u).astype(unrounded.dtype)
    return jnp.where(is_on & jnp.isfinite(rest), rest, r)


def _unrounded(w: jax.Array, r: jax.Array) -> jax.Array:
    """Returns the weights before rounding, in their dtype."""
    return keep_weak_type(rounded_sum(w, r), w)


def _moved(w: jax.Array, r: jax.Array, u: ArrayLike) -> jax.Array:
    """Returns the weights before rounding after a step, in the dtype of the residual."""
    return _sum(w, r) + jnp.asarray(u).astype(r.dtype)


def _sum(w: jax.Array, r: jax.Array) -> jax.Array:
    """Returns the weights before rounding, in the dtype of the residual."""
    return w.astype(r.dtype) + r
