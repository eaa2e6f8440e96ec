"""Constraints on the parameters themselves: weights stay in a box while training.

`clip_weights` is the exact projection, for after `optax.apply_updates` (and inside
`make_train_step`). `keep_weights_within` is the same constraint as the last link of a
chain, for training loops that are not ours to change.

Which leaves are boxed follows from the threshold: a number boxes every floating leaf,
`fan_in` leaves biases and norm scales free, `mask` narrows either.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxclip._core import trees
from jaxclip._core.floats import compute_dtype, not_folded
from jaxclip._core.trees import Mask, map_clippable
from jaxclip._core.updates import bound_in, clip_modulus, is_unbounded
from jaxclip.thresholds.values import resolve_threshold


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
    params: optax.Params, threshold: Any, mask: Mask | None = None, *, step: Any = None
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
    return map_clippable(clip_modulus, params, bounds)


def weight_clip_rate(
    params: optax.Params, threshold: Any, mask: Mask | None = None, *, step: Any = None
) -> jax.Array:
    """Returns the share of boxed weights that are on the bound (or outside).

    Args:
      params: As in `clip_weights`.
      threshold: As in `clip_weights`.
      mask: As in `clip_weights`.
      step: As in `clip_weights`.

    Returns:
      A float32 scalar in [0, 1]: entries with `|w| >= t`, which no NaN is, over entries that
      have a finite threshold; 0 if none has.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN, or a tree does not fit.

    Example:
      >>> weight_clip_rate(jnp.array([-0.5, 0.1, 0.5, 0.2]), 0.5)
      Array(0.5, dtype=float32)
    """
    return _share_of_boxed(_num_on_bound, params, _bounds(params, threshold, mask, step))


def _share_of_boxed(count: Callable[..., jax.Array], params: Any, bounds: Any) -> jax.Array:
    """What is counted in each leaf that has a box, over the entries that have one."""
    counted = boxed = jnp.zeros((), jnp.float32)
    for w, t in zip(jax.tree.leaves(params), jax.tree.leaves(bounds), strict=True):
        if not trees.is_clippable(w) or is_unbounded(t):
            continue
        w = jnp.asarray(w)
        t = bound_in(t, w)
        counted += count(*not_folded((w, t)))
        boxed += jnp.sum(jnp.isfinite(t), dtype=jnp.float32) * (w.size / max(t.size, 1))
    return counted / jnp.maximum(boxed, 1)


def _num_on_bound(w: jax.Array, t: jax.Array) -> jax.Array:
    """How many entries are on a finite bound or outside, in float32."""
    modulus = jnp.abs(w)
    if jnp.iscomplexobj(w):  # `clip_modulus` stays a few ulps inside the circle
        modulus = modulus * (1 + 8 * jnp.finfo(t.dtype).eps)
    below = jnp.where(t == 0, -jnp.ones_like(t), jnp.nextafter(t, jnp.zeros_like(t)))
    return _num_above(modulus, below, jnp.isfinite(t))


def _num_above(modulus: jax.Array, limit: jax.Array, has_box: jax.Array) -> jax.Array:
    """How many numbers that have a box are above a limit, in float32.

    For a single limit without comparing entries: XLA on CPU writes an array of conditions to
    memory before it adds them up. Differences are exact near the limit; positive ones count.
    """
    if limit.size != 1:
        return jnp.sum((modulus > limit) & has_box, dtype=jnp.float32)
    wide = compute_dtype(modulus.dtype)
    excess = modulus.astype(wide) - limit.reshape(()).astype(wide)
    is_above = jnp.sign(excess + jnp.abs(excess)).astype(jnp.int8)  # an integer: 0 for NaN
    return jnp.where(has_box.reshape(()), jnp.sum(is_above.astype(jnp.float32)), 0)


def _bounds(params: Any, threshold: Any, mask: Mask | None, step: Any) -> Any:
    """The threshold of every leaf, inf where the mask is False."""
    # A number that is not floating has no bound, and no rule for a tree measures it.
    return resolve_threshold(threshold, trees.masked(mask, params, params, 0), step)
