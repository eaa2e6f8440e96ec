"""Clips each entry of the gradient by itself: `min(max(g, -c), c)`, complex entries by modulus.

An infinity becomes the bound with its sign and a NaN becomes 0; both make a bad step, counted in
`num_nonfinite`. The other entries do not depend on these, and are clipped as in any step.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core.compiling import groups_alike
from jaxclip._core.floats import (
    compute_dtype,
    has_nan,
    increment,
    is_normal,
    keep_weak_type,
    not_folded,
    round_toward_zero,
    select,
    zero_or_nan,
)
from jaxclip._core.trees import PyTree, floating_leaves, is_clippable, replace_floating
from jaxclip._core.updates import clip_leaf
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
    given = [(jnp.asarray(g), bound) for g, bound in pairs if is_clippable(g)]
    leaves, clipped, counts = [g for g, _ in given], {}, [jnp.zeros((), jnp.float32)]
    keys = [bound if isinstance(bound, float) else id(bound) for _, bound in given]
    for group in groups_alike(leaves, keys):
        bound = _bound_in_dtype(*given[group[0]])
        clipped |= {i: _clip_leaf(leaves[i], bound, is_normal(bound)) for i in group}
        counts.append(_num_clipped([leaves[i] for i in group], bound))
    num_clipped = jnp.sum(jnp.stack(counts))
    is_bad = jnp.isnan(num_clipped) | has_nan([bound for _, bound in given])
    clipped = [clipped[i] for i in range(len(leaves))]
    return replace_floating(tree, clipped), num_clipped, is_bad


def _bound_in_dtype(g: jax.Array, bound: Any) -> Any:
    """Returns the bound in the real dtype of `g`, and 0 for a traced NaN, a bad step."""
    bound = round_toward_zero(bound, jnp.finfo(g.dtype).dtype)
    return jnp.where(jnp.isnan(bound), 0, bound) if isinstance(bound, jax.Array) else bound


@functools.partial(jax.jit, static_argnums=2)  # leaves of one shape share one trace
def _clip_leaf(g: jax.Array, bound: jax.Array, is_normal: bool) -> jax.Array:
    """Returns the leaf with its entries clipped, and 0 for NaN."""
    has_sign = jnp.isfinite(g) if jnp.iscomplexobj(g) else g == g
    clipped = select(has_sign, clip_leaf(g, bound, is_normal), jnp.zeros_like(g))
    return keep_weak_type(clipped, g)


@jax.jit  # leaves of one shape share one trace
def _num_clipped(leaves: list[jax.Array], bound: jax.Array) -> jax.Array:
    """Returns how many entries of leaves of one shape are clipped; NaN if one is not finite."""
    if jnp.iscomplexobj(leaves[0]):
        counts = [jnp.sum(jnp.abs(g) > bound, dtype=jnp.float32) + zero_or_nan(g) for g in leaves]
        return functools.reduce(operator.add, counts)
    # In arithmetic, because XLA on CPU writes the conditions that it counts to memory.
    wide = compute_dtype(leaves[0].dtype)
    largest = jnp.asarray(jnp.finfo(wide).max, wide)
    xs, limit = not_folded(
        ([g.astype(wide) for g in leaves], jnp.minimum(bound.astype(wide), largest))
    )

    def is_clipped(x: jax.Array) -> jax.Array:
        excess = jnp.abs(x) - limit
        return jnp.sign(excess + jnp.abs(excess)) + (x - x)  # 0 or 1; NaN if not finite

    return jnp.sum(functools.reduce(operator.add, map(is_clipped, xs))).astype(jnp.float32)
