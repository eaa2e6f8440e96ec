"""Any projection as the last link of a chain: `u <- project(w + u) - w`, corrected for rounding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclip._core import checks
from jaxclip._core.floats import increment
from jaxclip._core.trees import (
    Mask,
    PyTree,
    check_mask_for_leaves,
    for_every_leaf,
    is_clippable,
    masked,
    path_name,
)
from jaxclip.thresholds.rules import Bound
from jaxclip.thresholds.values import resolve_threshold
from jaxclip.weights.boxes import box
from jaxclip.weights.projections import Projection


class ProjectWeightsState(NamedTuple):
    """State of `project_weights`.

    Attributes:
      step: Scalar int32, steps so far.
    """

    step: jax.Array


def project_weights(
    projection: PyTree, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Changes updates so that after `optax.apply_updates` the weights are in a set.

    `u <- project(w + u) - w`, corrected for rounding. Must be the last link of a chain.
    Weights that start outside are brought in by the first step (boxes: see `box`).

    Args:
      projection: A `Projection` such as `box(0.5)` or `max_norm(2.0)`, or a prefix tree of
        these for different parts; None for a part that is free. Their schedules count the
        steps of this transform.
      mask: The leaves to project, all if None: a tree of bools (a prefix is enough), or a
        function of the parameters that returns one, such as `kernels_only`.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are kept.
      Weights never leave boxes and `max_norm`, however the sum is rounded; they leave other
      sets only by its rounding. Each projection documents for which dtypes of the updates. An
      update that leads to a point of the set is not changed (`box(t)` changes it by at most its
      rounding). A boxed weight may end an ulp inside its bound: use `clip_weights` where it
      must be on the bound to the last bit (so that `t` is a code).

    Raises:
      TypeError: If an entry of `projection` is not a `Projection`.
      ValueError: If the prefix does not fit, or `update` gets no params.

    Example:
      >>> import jaxclip
      >>> w = jnp.array([0.4, -0.1])
      >>> tx = optax.chain(optax.sgd(1.0), project_weights(jaxclip.box(0.5)))
      >>> updates, _ = tx.update(jnp.array([-1.0, 0.2]), tx.init(w), w)
      >>> optax.apply_updates(w, updates)
      Array([ 0.5, -0.3], dtype=float32)
    """
    entries = jax.tree_util.tree_leaves_with_path(projection, is_leaf=_is_none)
    for path, given in entries:
        is_free_part = given is None and path
        if not (is_free_part or isinstance(given, Projection)):
            where = f"projection at {path_name(path)!r}" if path else "projection"
            checks.refuse_step(where, given, "a Projection such as box(1.0)")
            raise TypeError(f"{where} must be a Projection such as box(1.0), got {given!r}.")
    check_mask_for_leaves(mask)
    projection = jax.tree.map(lambda p: _FREE if p is None else p, projection, is_leaf=_is_none)

    def init_fn(params):
        del params
        return ProjectWeightsState(step=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.check_params_given("project_weights", params)
        checks.check_same_structure("updates", updates, "params", params)
        sets = jax.tree.map(lambda p: p.at_step(state.step), projection)
        set_of_leaf = jax.tree.unflatten(
            jax.tree.structure(updates), for_every_leaf("projection", sets, params)
        )
        # A masked leaf becomes an integer: it is in no set, and `per_tree` does not measure it.
        params = masked(mask, params, params, 0)
        thresholds = jax.tree.map(lambda p: p.threshold, sets)
        bounds = resolve_threshold(thresholds, params, state.step)
        updates = jax.tree_util.tree_map_with_path(_correct, updates, params, set_of_leaf, bounds)
        return updates, ProjectWeightsState(step=increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_FREE = box(float("inf"))


def _is_none(x: PyTree) -> bool:
    return x is None


def _correct(path: tuple, u: PyTree, w: PyTree, projection: Projection, bound: Bound) -> PyTree:
    if not (is_clippable(u) and is_clippable(w)):
        return u
    return projection.correct(path_name(path), jnp.asarray(u), jnp.asarray(w), bound)
