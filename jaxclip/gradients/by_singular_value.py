"""Clips the singular values of each matrix of the gradient: `U diag(min(s, c)) V^H`.

The matrices are capped by products alone, without a singular value decomposition;
`jaxclip.norms.singular_values` describes the method and its error. A bad step gives zeros for all
leaves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclip._core import checks
from jaxclip._core.floats import increment, is_bad_step
from jaxclip._core.trees import PyTree, path_name
from jaxclip.gradients.state import ClipStats
from jaxclip.norms.scaling import zero_if
from jaxclip.norms.singular_values import cap_leaf, count_matrices
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold


class ClipBySpectralNormState(NamedTuple):
    """State of `clip_by_spectral_norm`.

    Attributes:
      step: Scalar int32, steps so far.
      stats: A `ClipStats` without `post_norm` and `clip_coef`. Its `pre_norm` is the largest
        spectral norm of the last gradient's matrices: an estimate from below, at most a few
        percent too low. Its `clip_rate` is that of the matrices at the last step.
    """

    transform_name = "clip_by_spectral_norm"

    step: jax.Array
    stats: ClipStats


def clip_by_spectral_norm(
    max_norm: PyTree, *, steps: int | None = None, stacked_axes: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Caps the singular values of every matrix at `max_norm`.

    `U diag(s) V^H <- U diag(min(s, c)) V^H`, by matrix products alone. A leaf of more than
    two dimensions is one matrix: its last axis is the columns, all others are the rows. Leaves
    of fewer than two dimensions pass through.

    Args:
      max_norm: A threshold: number in [0, inf], traced scalar, schedule, rule, or a prefix
        tree of these, in the units of the gradient; one number per leaf.
      steps: Rounds of each of the two matrix signs, at least 1; None is 12. More
        rounds are more exact, see `jaxclip.norms.singular_values.cap_singular_values`.
      stacked_axes: Number of leading axes that stack separate matrices, as the layers of a
        scanned model do; None is 0.

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
      >>> print(jnp.round(clipped["w"], 3), clipped["b"], state.stats.pre_norm)
      [[2. 0.]
       [0. 1.]] [7.] 5.0

    References:
      Newhouse et al., Training Transformers with Enforced Lipschitz Constants, 2025,
      https://arxiv.org/abs/2507.13338
    """
    if steps is not None:
        checks.check_count("steps", steps)
    stacked_axes = 0 if stacked_axes is None else stacked_axes
    checks.check_count("stacked_axes", stacked_axes, at_least=0)
    check_threshold_tree("max_norm", max_norm)

    def init_fn(params):
        del params
        stats = ClipStats.create(without=("post_norm", "clip_coef"))
        return ClipBySpectralNormState(step=jnp.zeros((), jnp.int32), stats=stats)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        bounds = resolve_threshold(max_norm, updates, state.step, name="max_norm")
        entries, treedef = jax.tree_util.tree_flatten_with_path(updates)
        pairs = list(zip(entries, jax.tree.leaves(bounds), strict=True))
        is_bad = is_bad_step(updates, bounds)
        leaves = [
            cap_leaf("max_norm", path_name(path), g, bound, steps, stacked_axes)
            for (path, g), bound in pairs
        ]
        num_matrices = sum(count_matrices(g, stacked_axes) for _, g in entries)
        num_clipped = sum((x.num_clipped for x in leaves), jnp.zeros((), jnp.float32))
        capped = jax.tree.unflatten(treedef, [x.capped for x in leaves])
        stats = state.stats.update(
            is_bad,
            pre_norm=jnp.max(jnp.stack([jnp.zeros((), jnp.float32), *(x.norm for x in leaves)])),
            clip_rate=jnp.where(is_bad, 0, num_clipped / max(num_matrices, 1)),
        )
        state = ClipBySpectralNormState(step=increment(state.step), stats=stats)
        return zero_if(is_bad, capped), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
