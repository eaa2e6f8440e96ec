"""Clips each entry of the gradient by itself: `min(max(g, -c), c)`, complex entries by modulus.

An infinity becomes the bound with its sign and a NaN becomes 0; both make a bad step, counted in
`num_nonfinite`. The other entries do not depend on these, and are clipped as in any step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import floats
from jaxclip._core.floats import (
    compute_dtype,
    increment,
    keep_weak_type,
    not_folded,
    round_toward_zero,
    select,
)
from jaxclip._core.trees import PyTree, floating_leaves, is_clippable, replace_floating
from jaxclip._core.updates import clip_modulus
from jaxclip.gradients.state import ClipStats
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold


class ClipByValueState(NamedTuple):
    """State of `clip_by_value`.

    Attributes:
      step: Scalar int32, steps so far.
      stats: A `ClipStats` without norms and coefficient; its `clip_rate` is that of the entries
        at the last finite step.
    """

    transform_name = "clip_by_value"
    keeps_finite = True

    step: jax.Array
    stats: ClipStats


def clip_by_value(max_abs: PyTree) -> optax.GradientTransformationExtraArgs:
    """Clips every gradient entry to `[-max_abs, max_abs]`.

    `g <- min(max(g, -c), c)`; complex entries are scaled to modulus at most `c`. An
    infinity becomes the bound with its sign; NaN becomes 0.

    Args:
      max_abs: A threshold: number in [0, inf], traced scalar, schedule, rule, or a prefix
        tree of these, in the units of the gradient.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The bound holds
      for `max_abs` as given: it is rounded towards zero into each leaf's dtype.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN.

    Example:
      >>> tx = clip_by_value(1.0)
      >>> grads = jnp.array([-3.0, 0.5, 2.0])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([-1. ,  0.5,  1. ], dtype=float32)
    """
    check_threshold_tree("max_abs", max_abs)

    def init_fn(params):
        del params
        stats = ClipStats.create(without=("pre_norm", "post_norm", "clip_coef"))
        return ClipByValueState(step=jnp.zeros((), jnp.int32), stats=stats)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        bounds = resolve_threshold(max_abs, updates, state.step, name="max_abs")
        clipped, num_clipped, is_bad = clip_entries(updates, bounds)
        num_entries = max(sum(np.size(g) for g in floating_leaves(updates)), 1)
        rate = jnp.where(is_bad, state.stats.clip_rate, num_clipped / num_entries)
        stats = state.stats.update(is_bad, clip_rate=rate)
        return clipped, ClipByValueState(step=increment(state.step), stats=stats)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_entries(tree: optax.Updates, bounds: PyTree) -> tuple[optax.Updates, jax.Array, jax.Array]:
    """Clips entries to their leaf's bound; also returns how many, and True for a bad step."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(bounds), strict=True)
    leaves = [(jnp.asarray(g), bound) for g, bound in pairs if is_clippable(g)]
    clipped = [_clip_leaf(g, _bound_in_dtype(g, bound)) for g, bound in leaves]
    counts = jnp.stack([jnp.zeros((), jnp.float32), *(count for _, count in clipped)])
    num_clipped = jnp.sum(counts)
    is_bad = jnp.isnan(num_clipped) | floats.has_nan([bound for _, bound in leaves])
    return replace_floating(tree, [g for g, _ in clipped]), num_clipped, is_bad


def _bound_in_dtype(g: jax.Array, bound: Any) -> Any:
    """Returns the bound in the real dtype of `g`, and 0 for a traced NaN, a bad step."""
    bound = round_toward_zero(bound, jnp.finfo(g.dtype).dtype)
    return jnp.where(jnp.isnan(bound), 0, bound) if isinstance(bound, jax.Array) else bound


# Jitted, so that leaves of one shape share one trace.
@jax.jit
def _clip_leaf(g: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the leaf with its entries clipped, and how many were; NaN if one is not finite."""
    if jnp.iscomplexobj(g):
        num_clipped = jnp.sum(jnp.abs(g) > bound, dtype=jnp.float32) + floats.zero_or_nan(g)
        has_sign = jnp.isfinite(g)
    else:
        # In arithmetic, because XLA on CPU writes the conditions that it counts to memory.
        wide = compute_dtype(g.dtype)
        largest = jnp.asarray(jnp.finfo(wide).max, wide)
        x, limit = not_folded((g.astype(wide), jnp.minimum(bound.astype(wide), largest)))
        excess = jnp.abs(x) - limit
        is_clipped = jnp.sign(excess + jnp.abs(excess)) + (x - x)  # 0 or 1; NaN if not finite
        num_clipped = jnp.sum(is_clipped).astype(jnp.float32)
        has_sign = ~jnp.isnan(g)
    clipped = select(has_sign, clip_modulus(g, bound), jnp.zeros_like(g))
    return keep_weak_type(clipped, g), num_clipped
