"""Clips the singular values of each matrix of the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclip._core import checks, floats, trees
from jaxclip._core.floats import increment, keep_weak_type
from jaxclip.norms.singular_values import _num_matrices, cap_leaf
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold


class ClipBySpectralNormState(NamedTuple):
    """State of `clip_by_spectral_norm`.

    Attributes:
      step: Scalar int32, steps so far.
      pre_norm: Scalar float32, the largest spectral norm of the last gradient's matrices
        before the clip: an estimate from below, short by a few per cent at most.
      clip_rate: Scalar float32, share of the matrices that the last step clipped.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
    """

    step: jax.Array
    pre_norm: jax.Array
    clip_rate: jax.Array
    num_nonfinite: jax.Array


def clip_by_spectral_norm(
    max_norm: Any, *, steps: int | None = None, stacked_axes: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Caps the singular values of every matrix at `max_norm`.

    `U diag(s) V^H <- U diag(min(s, c)) V^H`, by matrix products alone. A leaf of more than
    two dimensions is one matrix, its last axis against all others; leaves of fewer than two
    pass through.

    Args:
      max_norm: A threshold: number in [0, inf], traced scalar, schedule, rule, or a prefix
        tree of these, in the units of the gradient; one number a leaf.
      steps: Rounds of each of the two matrix signs, at least 1; None is 12. See
        `cap_singular_values` for what they buy.
      stacked_axes: Leading axes that number separate matrices, as the layers of a scanned
        model do; None is 0.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. Matrices whose
      Frobenius norm is at or below `max_norm` come back bit-identical; a bad step gives
      zeros for all leaves.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN, one has several values for a
        leaf, or `steps` or `stacked_axes` is not an integer in range.

    Example:
      >>> tx = clip_by_spectral_norm(2.0)
      >>> grads = {"w": jnp.diag(jnp.array([5.0, 1.0])), "b": jnp.array([7.0])}
      >>> clipped, state = tx.update(grads, tx.init(grads))
      >>> print(jnp.round(clipped["w"], 3), clipped["b"], state.pre_norm)
      [[2. 0.]
       [0. 1.]] [7.] 5.0

    References:
      Newhouse et al., Training Transformers with Enforced Lipschitz Constants, 2025,
      https://arxiv.org/abs/2507.13338
    """
    if steps is not None:
        checks.check_count("steps", steps)
    stacked_axes = 0 if stacked_axes is None else stacked_axes
    if stacked_axes != 0:
        checks.check_count("stacked_axes", stacked_axes)
    check_threshold_tree("max_norm", max_norm)

    def init_fn(params):
        del params
        return ClipBySpectralNormState(
            step=jnp.zeros((), jnp.int32),
            pre_norm=jnp.zeros((), jnp.float32),
            clip_rate=jnp.zeros((), jnp.float32),
            num_nonfinite=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        bounds = resolve_threshold(max_norm, updates, state.step)
        entries, treedef = jax.tree_util.tree_flatten_with_path(updates)
        pairs = list(zip(entries, jax.tree.leaves(bounds), strict=True))
        is_bad = floats.is_bad_step(updates, bounds)
        leaves = [
            cap_leaf("max_norm", trees.path_name(path), g, c, steps, stacked_axes)
            for (path, g), c in pairs
        ]
        num_matrices = sum(_num_matrices(g, stacked_axes) for _, g in entries)
        num_clipped = sum((x.num_clipped for x in leaves), jnp.zeros((), jnp.float32))
        pre_norm = jnp.max(jnp.stack([jnp.zeros((), jnp.float32), *(x.norm for x in leaves)]))
        clipped = jax.tree.unflatten(treedef, [x.capped for x in leaves])
        clipped = trees.map_clippable(lambda g: _zero_if(is_bad, g), clipped)
        return clipped, ClipBySpectralNormState(
            step=increment(state.step),
            pre_norm=jnp.where(is_bad, state.pre_norm, pre_norm),
            clip_rate=jnp.where(is_bad, 0, num_clipped / max(num_matrices, 1)),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zero_if(is_bad: jax.Array, g: jax.Array) -> jax.Array:
    return keep_weak_type(jnp.where(is_bad, jnp.zeros_like(g), g), g)
