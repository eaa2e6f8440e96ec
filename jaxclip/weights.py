"""Constraints on the parameters themselves: weights stay in a box while training.

`clip_weights` is the exact projection, for after `optax.apply_updates` (and inside
`make_train_step`). `keep_weights_within` is the same constraint as the last link of a
chain, for training loops that are not ours to change.

Which leaves are boxed follows from the threshold: a number boxes every floating leaf,
`fan_in` leaves biases and norm scales free, `mask` narrows either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxclip import _checks
from jaxclip._checks import compute_dtype, exceeds, increment, keep_weak_type, map_clippable
from jaxclip.rescaling import not_folded, unit_and_modulus
from jaxclip.thresholds import check_threshold_tree, resolve_threshold, round_toward_zero

__all__ = [
    "KeepWeightsWithinState",
    "clip_weights",
    "keep_weights_within",
    "kernels_only",
    "weight_clip_rate",
    "weight_outside_rate",
]

_Mask = Any | Callable[[Any], Any]


def kernels_only(params: optax.Params) -> Any:
    """Returns the mask that is True on leaves of two or more dimensions.

    Args:
      params: Any pytree of arrays.

    Returns:
      A tree of bools with the structure of `params`.

    Example:
      >>> kernels_only({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
      {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def clip_weights(
    params: optax.Params, threshold: Any, mask: _Mask | None = None, *, step: Any = None
) -> optax.Params:
    """Projects parameters onto the box `[-threshold, threshold]`, exactly.

    `w <- min(max(w, -t), t)`; complex weights are scaled to modulus at most `t`.

    Args:
      params: Any pytree of arrays.
      threshold: Number in [0, inf], traced scalar, schedule, rule, or a prefix tree of
        these, in the units of the weights.
      mask: Tree of bools (a prefix will do), or a function of the parameters that gives
        one, such as `kernels_only`: which leaves are boxed. None for all.
      step: Scalar integer for schedules; 0 if not given.

    Returns:
      New parameters of the same structure, shapes, dtypes and weak types. `|w| <= t`
      for `t` as given, rounded towards zero into each leaf's dtype; clipped entries are
      on that bound exactly, the others are untouched. NaN weights stay NaN; a traced
      threshold of NaN bounds nothing.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN, or a tree does not fit.

    Example:
      >>> clip_weights({"w": jnp.array([-2.0, 0.3])}, 0.5)
      {'w': Array([-0.5,  0.3], dtype=float32)}

    References:
      Elsayed et al., Weight Clipping for Deep Continual and Reinforcement Learning, 2024,
      https://arxiv.org/abs/2407.01704
    """
    bounds = _bounds(params, threshold, mask, step)
    return map_clippable(_project, params, bounds)


def weight_clip_rate(
    params: optax.Params, threshold: Any, mask: _Mask | None = None, *, step: Any = None
) -> jax.Array:
    """Returns the share of boxed weights that are on the bound (or outside).

    Args:
      params: As in `clip_weights`.
      threshold: As in `clip_weights`.
      mask: As in `clip_weights`.
      step: As in `clip_weights`.

    Returns:
      A float32 scalar in [0, 1]: entries with `|w| >= t` over entries that have a finite
      threshold; 0 if none has.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN, or a tree does not fit.

    Example:
      >>> weight_clip_rate(jnp.array([-0.5, 0.1, 0.5, 0.2]), 0.5)
      Array(0.5, dtype=float32)
    """
    return _share_of_boxed(_num_on_bound, params, _bounds(params, threshold, mask, step))


def weight_outside_rate(
    params: optax.Params, threshold: Any, mask: _Mask | None = None, *, step: Any = None
) -> jax.Array:
    """Returns the share of boxed weights that are outside: that `clip_weights` would move.

    Args:
      params: As in `clip_weights`.
      threshold: As in `clip_weights`.
      mask: As in `clip_weights`.
      step: As in `clip_weights`.

    Returns:
      A float32 scalar in [0, 1]: entries with `|w| > t` over entries that have a finite
      threshold; 0 if none has.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN, or a tree does not fit.

    Example:
      >>> weight_outside_rate(jnp.array([-0.6, 0.1, 0.5, 0.2]), 0.5)
      Array(0.25, dtype=float32)
    """
    return _share_of_boxed(_num_outside, params, _bounds(params, threshold, mask, step))


def _share_of_boxed(count: Callable[..., jax.Array], params: Any, bounds: Any) -> jax.Array:
    """What is counted in each leaf that has a box, over the entries that have one."""
    counted = boxed = jnp.zeros((), jnp.float32)
    for w, t in zip(jax.tree.leaves(params), jax.tree.leaves(bounds), strict=True):
        if not _checks.is_clippable(w) or _is_free(t):
            continue
        w = jnp.asarray(w)
        t = _bound_in(t, w)
        counted += count(*not_folded((w, t)))
        boxed += jnp.sum(jnp.isfinite(t), dtype=jnp.float32) * (w.size / max(t.size, 1))
    return counted / jnp.maximum(boxed, 1)


def _num_on_bound(w: jax.Array, t: jax.Array) -> jax.Array:
    """How many entries are on a finite bound or outside, in float32."""
    modulus = jnp.abs(w)
    if jnp.iscomplexobj(w):  # `_project` stays a few ulps inside the circle
        modulus = modulus * (1 + 8 * jnp.finfo(t.dtype).eps)
    below = jnp.where(t == 0, -jnp.ones_like(t), jnp.nextafter(t, jnp.zeros_like(t)))
    return _num_above(modulus, below, jnp.isfinite(t))


def _num_outside(w: jax.Array, t: jax.Array) -> jax.Array:
    """How many entries are outside a finite bound, in float32."""
    return _num_above(jnp.abs(w), t, jnp.isfinite(t))


def _num_above(modulus: jax.Array, limit: jax.Array, has_box: jax.Array) -> jax.Array:
    """How many numbers that have a box are above a limit, in float32.

    For a single limit without comparing entries: XLA on CPU writes an array of conditions to
    memory before it adds them up. Differences are exact near the limit; positive ones count.
    """
    if limit.size != 1:
        return jnp.sum((modulus > limit) & has_box, dtype=jnp.float32)
    wide = compute_dtype(modulus.dtype)
    excess = modulus.astype(wide) - limit.reshape(()).astype(wide)
    count = jnp.sum(jnp.sign(excess + jnp.abs(excess))).astype(jnp.float32)
    return jnp.where(has_box.reshape(()), count, 0)


class KeepWeightsWithinState(NamedTuple):
    """State of `keep_weights_within`.

    Attributes:
      step: Scalar int32, steps so far.
    """

    step: jax.Array


def keep_weights_within(
    threshold: Any, mask: _Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Changes updates so that after `optax.apply_updates` every weight is in the box.

    `u <- clip(w + u, -t, t) - w`, corrected by an ulp where the rounded sum would leave
    the box. Must be the last link of a chain. Weights that start outside are brought in
    by the first step. Entries may end an ulp inside the bound: where the bound has to be
    hit to the last bit (so that `t` is a code), use `clip_weights`.

    Args:
      threshold: As in `clip_weights`; schedules count the steps of this transform.
      mask: As in `clip_weights`.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are
      kept.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN, or `update` gets no params.

    Example:
      >>> w = jnp.array([0.4, -0.1])
      >>> tx = optax.chain(optax.sgd(1.0), keep_weights_within(0.5))
      >>> updates, _ = tx.update(jnp.array([-1.0, 0.2]), tx.init(w), w)
      >>> optax.apply_updates(w, updates)
      Array([ 0.5, -0.3], dtype=float32)
    """
    check_threshold_tree("threshold", threshold)

    def init_fn(params):
        del params
        return KeepWeightsWithinState(step=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _checks.check_params_given("keep_weights_within", params)
        _checks.check_same_structure("updates", updates, "params", params)
        bounds = _bounds(params, threshold, mask, state.step)
        updates = map_clippable(_corrected_update, updates, params, bounds)
        return updates, KeepWeightsWithinState(step=increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _bounds(params: Any, threshold: Any, mask: _Mask | None, step: Any) -> Any:
    """The threshold of every leaf, inf where the mask is False."""
    bounds = resolve_threshold(threshold, params, step)
    if mask is None:
        return bounds
    chosen = mask(params) if callable(mask) else mask
    return jax.tree.map(
        lambda is_boxed, subtree: jax.tree.map(lambda t: t if is_boxed else float("inf"), subtree),
        chosen,
        bounds,
    )


def _is_free(bound: Any) -> bool:
    return isinstance(bound, float) and bound == float("inf")


def _project(w: jax.Array, bound: Any) -> jax.Array:
    if _is_free(bound):
        return w
    bound = _bound_in(bound, w)
    if jnp.iscomplexobj(w):
        unit, modulus = unit_and_modulus(w)
        eps = jnp.finfo(bound.dtype).eps  # the modulus itself is rounded
        inside = (bound * (1 - 4 * eps)).astype(w.dtype)
        is_outside = (modulus >= bound * (1 - 2 * eps)) & jnp.isfinite(bound)
        return keep_weak_type(jnp.where(is_outside, unit * inside, w), w)
    # Not as a minimum and a maximum: those flush subnormals inside the box to zero.
    clipped = jnp.where(exceeds(w, bound), jnp.where(w < 0, -bound, bound), w)
    return keep_weak_type(clipped, w)


def _bound_in(bound: Any, w: jax.Array) -> jax.Array:
    """The bound in the real dtype of `w`; a traced NaN bounds nothing."""
    bound = jnp.asarray(round_toward_zero(bound, jnp.finfo(w.dtype).dtype))
    return jnp.where(jnp.isnan(bound), jnp.full_like(bound, jnp.inf), bound)


def _corrected_update(u: jax.Array, w: Any, bound: Any) -> jax.Array:
    """An update `v` in the dtype of `u` with `|round(w + v)| <= bound`."""
    if _is_free(bound):
        return u
    w = jnp.asarray(w)
    bound = _bound_in(bound, w)
    correct = _complex_update if jnp.iscomplexobj(w) else _real_update
    # Where nothing is bounded the update stays as it is: w + u may overflow.
    return keep_weak_type(jnp.where(jnp.isinf(bound), u, correct(u, w, bound)), u)


def _real_update(u: jax.Array, w: jax.Array, bound: jax.Array) -> jax.Array:
    """An update to the projection, corrected by an ulp where the sum is rounded outside."""
    wide = compute_dtype(w.dtype, u.dtype)
    target = _project((w.astype(wide) + u.astype(wide)).astype(w.dtype), bound)
    v = (target.astype(wide) - w.astype(wide)).astype(u.dtype)
    after = _rounded_sum(w, v)
    above = jnp.nextafter(v, jnp.full_like(v, -jnp.inf))
    below = jnp.nextafter(v, jnp.full_like(v, jnp.inf))
    return jnp.where(after > bound, above, jnp.where(after < -bound, below, v))


def _complex_update(u: jax.Array, w: jax.Array, bound: jax.Array) -> jax.Array:
    """An update to a point as far inside the circle as its sum with `w` may be rounded."""
    wide = compute_dtype(w.dtype, u.dtype)
    moved = w.astype(wide) + u.astype(wide)
    unit, modulus = unit_and_modulus(moved)
    half = w.astype(wide) * 0.5 + u.astype(wide) * 0.5  # in case the sum overflows
    unit = jnp.where(jnp.isfinite(moved), unit, unit_and_modulus(half)[0])
    eps = max(float(jnp.finfo(w.dtype).eps), float(jnp.finfo(u.dtype).eps))
    radius = bound * (1 - 4 * eps) - unit_and_modulus(w)[1] * (2 * eps)
    radius = jnp.maximum(radius, 0).astype(modulus.dtype)
    target = jnp.where(modulus > radius, unit * radius.astype(wide), moved)
    return (target - w.astype(wide)).astype(u.dtype)


def _rounded_sum(w: jax.Array, v: jax.Array) -> jax.Array:
    """`w + v` as `optax.apply_updates` rounds it, safe from XLA's excess precision."""
    wide = compute_dtype(w.dtype, v.dtype)
    total = w.astype(wide) + v.astype(wide)
    info = jnp.finfo(w.dtype)
    return lax.reduce_precision(total, info.nexp, info.nmant).astype(w.dtype)
