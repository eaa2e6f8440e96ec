"""Weights in a box, exactly: `w <- min(max(w, -t), t)`.

The threshold decides which leaves are boxed: a number boxes every floating leaf, `fan_in`
leaves biases and norm scales free. `mask` excludes further leaves.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.compiling import groups_alike
from jaxclip._core.floats import compute_dtype, inverse_size, not_folded
from jaxclip._core.trees import Mask, PyTree, map_clippable
from jaxclip._core.updates import bound_in, bounds_nothing, clip_modulus, clip_sum, is_unbounded
from jaxclip.thresholds.values import resolve_threshold


def kernels_only(params: optax.Params) -> PyTree:
    """Returns the mask that is True on leaves of two or more dimensions.

    Args:
      params: Any pytree of arrays.

    Returns:
      A tree of bools with the structure of `params`.

    Example:
      >>> kernels_only({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
      {'bias': False, 'kernel': True}
    """
    checks.refuse_step("kernels_only", params, "parameters")
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def clip_weights(
    params: optax.Params,
    threshold: PyTree,
    mask: Mask | None = None,
    *,
    step: ArrayLike | None = None,
) -> optax.Params:
    """Projects parameters onto the box `[-threshold, threshold]`, exactly.

    `w <- min(max(w, -t), t)`; complex weights are scaled to modulus at most `t`.

    Args:
      params: Any pytree of arrays.
      threshold: Number in [0, inf], traced scalar, schedule, rule, or a prefix tree of
        these, in the units of the weights. None in a tree leaves its weights free.
      mask: The leaves to box, all if None: a tree of bools (a prefix is enough), or a function
        of the parameters that returns one, such as `kernels_only`.
      step: Scalar integer for schedules; 0 if not given.

    Returns:
      New parameters of the same structure, shapes, dtypes and weak types. `|w| <= t`
      for `t` as given, rounded towards zero into each leaf's dtype. Clipped entries are
      on that bound exactly; the others are unchanged, bit for bit. NaN weights stay NaN; a
      traced threshold of NaN bounds nothing.

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
    return clip_to_bounds(params, resolve_bounds(params, threshold, mask, step))


def weight_clip_rate(
    params: optax.Params,
    threshold: PyTree,
    mask: Mask | None = None,
    *,
    step: ArrayLike | None = None,
) -> jax.Array:
    """Returns the fraction of the boxed weights that are on their bound or outside.

    Args:
      params: Any pytree of arrays.
      threshold: The box, as in `clip_weights`.
      mask: The boxed leaves, all if None: a tree of bools, or a function that returns one.
      step: Scalar integer for schedules; 0 if not given.

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
    return rate_on_bounds(params, resolve_bounds(params, threshold, mask, step))


# --- A bound for each leaf, resolved once per step ------------------------------------


def resolve_bounds(
    params: optax.Params, threshold: PyTree, mask: Mask | None, step: ArrayLike | None
) -> PyTree:
    """Returns the threshold of each leaf, inf where the mask is False."""
    # A masked leaf becomes an integer: it has no bound, and `per_tree` does not measure it.
    return resolve_threshold(threshold, trees.masked(mask, params, params, 0), step)


def clip_to_bounds(params: optax.Params, bounds: PyTree, *, are_sums: bool = False) -> optax.Params:
    """Clips weights, or sums of weights and updates, to the result of `resolve_bounds`."""
    return map_clippable(clip_sum if are_sums else clip_modulus, params, bounds)


def rate_on_bounds(params: optax.Params, bounds: PyTree) -> jax.Array:
    """Returns `weight_clip_rate` for the result of `resolve_bounds`."""
    boxed, num_boxed = [], 0
    for w, given in zip(jax.tree.leaves(params), jax.tree.leaves(bounds), strict=True):
        if not trees.is_clippable(w) or is_unbounded(given):
            continue
        w = jnp.asarray(w)
        bound = bound_in(given, w)
        boxed.append((w, bound, given if isinstance(given, float) else id(given)))
        if isinstance(bound, np.ndarray):
            num_boxed += 0 if bounds_nothing(bound) else w.size
        else:
            num_bounds = jnp.sum(~bounds_nothing(bound), dtype=jnp.float32)
            num_boxed += num_bounds * (w.size / max(bound.size, 1))
    leaves, keys = [w for w, _, _ in boxed], [key for _, _, key in boxed]
    counts = [
        _num_on_bound([leaves[i] for i in group], *_number_below(boxed[group[0]][1]))
        for group in groups_alike(leaves, keys)
    ]
    num_on_bound = jnp.sum(jnp.stack(counts)) if counts else jnp.zeros((), jnp.float32)
    return num_on_bound / jnp.maximum(jnp.asarray(num_boxed, jnp.float32), 1)


def _number_below(bound: jax.Array | np.ndarray) -> tuple:
    """Returns a scale, and the next number below a bound times it."""
    # The scale is a power of two that brings the bound near 1, None if it need not.
    xp = np if isinstance(bound, np.ndarray) else jnp
    wide = compute_dtype(bound.dtype)
    below = xp.nextafter(bound, xp.zeros_like(bound)).astype(wide)
    below = xp.where(bound == 0, -xp.ones_like(below), below)
    is_free = bounds_nothing(bound)
    bound = xp.asarray(bound.astype(wide))
    is_ordinary = (bound == 0) | ((bound > 2.0**-60) & (bound < 2.0**60))
    if xp is np and np.all(is_ordinary & ~is_free):
        return None, below
    # Weights times 0 are below 1: nothing is counted. With a NaN the sum over a large leaf is NaN.
    scale = inverse_size(bound)
    scale = xp.where(is_free, xp.zeros_like(scale), scale)
    return scale, xp.where(is_free, xp.ones_like(below), below * scale)


@jax.jit  # leaves of one shape share one trace
def _num_on_bound(leaves: list[jax.Array], scale: jax.Array | None, below: jax.Array) -> jax.Array:
    """Returns how many entries are on a finite bound or outside, in float32."""
    leaves, scale, below = not_folded((leaves, scale, below))
    if not below.ndim:  # once for all leaves
        below = jnp.full_like(leaves[0], below, below.dtype)

    def is_on_bound(w: jax.Array) -> jax.Array:
        modulus = jnp.abs(w)
        if jnp.iscomplexobj(w):  # `clip_modulus` stays a few ulps inside the circle
            modulus = modulus * (1 + 8 * jnp.finfo(w.dtype).eps)
        modulus = modulus.astype(below.dtype)
        modulus = modulus if scale is None else modulus * scale
        # Not by comparing entries: XLA on CPU writes an array of conditions to memory before it
        # sums them. The difference is exact near the bound.
        return jnp.sign(jnp.maximum(modulus, below) - below).astype(jnp.int8)  # 0 for NaN

    counts = functools.reduce(operator.add, map(is_on_bound, leaves))
    return jnp.sum(counts.astype(jnp.float32))
