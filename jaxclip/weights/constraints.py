"""Any projection as a constraint: the last link of a chain, or a wrapper around an optimizer.

Both change updates so that after `optax.apply_updates` the parameters are in the set.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.floats import increment, phase_and_modulus
from jaxclip._core.trees import Mask, is_clippable, map_clippable, path_name
from jaxclip._core.updates import update_within
from jaxclip.thresholds.values import check_threshold_tree
from jaxclip.weights.boxes import Box
from jaxclip.weights.clipping import _bounds
from jaxclip.weights.projections import Projection

# Fields of optimizer states that hold an average of gradients: Adam, Lion, Signum; SGD.
_MOMENTA = ("mu", "trace")


class ProjectWeightsState(NamedTuple):
    """State of `project_weights`.

    Attributes:
      step: Scalar int32, steps so far.
    """

    step: jax.Array


class ConstrainState(NamedTuple):
    """State of `constrain`.

    Attributes:
      step: Scalar int32, steps so far.
      inner_state: State of the wrapped optimizer.
    """

    step: jax.Array
    inner_state: Any


def project_weights(
    projection: Any, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Changes updates so that after `optax.apply_updates` the weights are in a set.

    `u <- project(w + u) - w`, corrected for rounding. Must be the last link of a chain.
    Weights that start outside are brought in by the first step (boxes: see `box`).

    Args:
      projection: A `Projection` such as `max_norm(2.0)` or `nonnegative()`, or a prefix tree
        of these for different parts; None for a part that is free.
      mask: Tree of bools (a prefix will do), or a function of the parameters that gives one,
        such as `kernels_only`: which leaves are projected. None for all.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are kept.
      Boxes and `max_norm` are never left, however the sum is rounded, the others only by its
      rounding: each projection says so, and for which dtypes of the updates. An update that
      leads to a point of the set is the one that was asked for (with `box(t)`, to its
      rounding).

    Raises:
      TypeError: If an entry of `projection` is not a `Projection`.
      ValueError: If the prefix does not fit, or `update` gets no params.

    Example:
      >>> import jaxclip
      >>> w = jnp.array([0.5, -0.5])
      >>> tx = optax.chain(optax.sgd(1.0), project_weights(jaxclip.weights.max_norm(1.0)))
      >>> updates, _ = tx.update(jnp.array([-2.5, -4.5]), tx.init(w), w)
      >>> print(jnp.linalg.norm(optax.apply_updates(w, updates)) <= 1)
      True
    """
    _check_projections(projection)

    def init_fn(params):
        del params
        return ProjectWeightsState(step=jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _check_trees("project_weights", updates, params)
        sets = _sets_of(params, projection, mask)
        updates = _map(_correct, updates, params, sets, state.step)
        return updates, ProjectWeightsState(step=increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def constrain(
    inner: optax.GradientTransformation,
    projection: Any,
    mask: Mask | None = None,
    *,
    zero_momentum_at_bound: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that after `optax.apply_updates` the weights are in a set.

    `u <- project(w + inner(g)) - w`, corrected for rounding: `project_weights` behind
    `inner`, which sees the state of `inner`, too.

    Args:
      inner: Any optimizer.
      projection: As in `project_weights`.
      mask: As in `project_weights`.
      zero_momentum_at_bound: Whether a momentum that pushes a weight on its bound further out
        is set to zero, so that the weight can turn at once. For boxes only. A momentum is
        what the state of `inner` holds under the name `mu` or `trace`, for a leaf of the
        same path and shape as in the parameters; it is taken for an average of gradients,
        against which weights move. Measured on digits, it frees weights from their bounds
        without a clear gain (see `docs/transforms.md`), so it is off by default.

    Returns:
      A transform, as `project_weights`.

    Raises:
      TypeError: If `inner` is no transformation, an entry of `projection` is not a
        `Projection`, or `zero_momentum_at_bound` is not a bool or meets a set that is no box.
      ValueError: If the prefix does not fit, or `update` gets no params.

    Example:
      >>> import jaxclip
      >>> tx = constrain(optax.sgd(0.5), {"w": jaxclip.box(0.0, 0.25), "b": None})
      >>> params = {"w": jnp.array([0.25, 0.25]), "b": jnp.array([0.25])}
      >>> grads = {"w": jnp.array([1.0, -1.0]), "b": jnp.array([-1.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(*optax.apply_updates(params, updates).values())
      [0.75] [0.   0.25]
    """
    inner = checks.check_transformation("inner", inner)
    _check_projections(projection)
    if not isinstance(zero_momentum_at_bound, (bool, np.bool_)):
        raise TypeError(f"zero_momentum_at_bound must be a bool, got {zero_momentum_at_bound!r}.")
    if zero_momentum_at_bound:
        _check_boxes(projection)

    def init_fn(params):
        return ConstrainState(step=jnp.zeros((), jnp.int32), inner_state=inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        _check_trees("constrain", updates, params)
        sets = _sets_of(params, projection, mask)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        if zero_momentum_at_bound:
            sides = _map(_side, updates, params, sets, state.step)
            inner_state = _without_push(inner_state, sides)
        updates = _map(_correct, updates, params, sets, state.step)
        return updates, ConstrainState(step=increment(state.step), inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- A projection for every leaf ------------------------------------------------------


class _Everything(Box):
    """The set of all arrays."""

    def project(self, path: str, w: jax.Array, step: ArrayLike) -> jax.Array:
        return w

    def correct(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        return u

    def side(self, path: str, u: jax.Array, w: jax.Array, step: ArrayLike) -> jax.Array:
        return jnp.zeros_like(w)


_EVERYTHING = _Everything()


def _entries(projection: Any) -> Any:
    return jax.tree_util.tree_flatten_with_path(projection, is_leaf=lambda x: x is None)


def _check_projections(projection: Any) -> None:
    for path, given in _entries(projection)[0]:
        is_part = given is None and path
        if not (is_part or isinstance(given, Projection)):
            where = f"projection at '{path_name(path)}'" if path else "projection"
            raise TypeError(f"{where} must be a Projection such as box(1.0), got {given!r}.")


def _check_boxes(projection: Any) -> None:
    for path, given in _entries(projection)[0]:
        if not (given is None or isinstance(given, Box)):
            where = f"projection at '{path_name(path)}'" if path else "projection"
            raise TypeError(f"zero_momentum_at_bound needs boxes, but {where} is {given!r}.")


def _check_trees(name: str, updates: Any, params: Any) -> None:
    checks.check_params_given(name, params)
    checks.check_same_structure("updates", updates, "params", params)


def _sets_of(params: Any, projection: Any, mask: Mask | None) -> Any:
    """A projection for every leaf, from a prefix tree and a mask."""
    entries, treedef = _entries(projection)
    try:
        subtrees = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            "projection must be one projection or a prefix tree of the parameters; "
            f"this one is not: {error}"
        ) from error
    sets = [
        jax.tree.map(lambda _, given=given: _EVERYTHING if given is None else given, subtree)
        for (_, given), subtree in zip(entries, subtrees, strict=True)
    ]
    return trees.masked(mask, params, jax.tree.unflatten(treedef, sets), _EVERYTHING)


def _map(fn: Any, updates: Any, params: Any, sets: Any, step: jax.Array) -> Any:
    """Maps over the floating leaves; the others of `updates` pass through."""

    def apply(path: tuple, u: Any, w: Any, projection: Projection) -> Any:
        if not is_clippable(u):
            return u
        return fn(projection, path_name(path), jnp.asarray(u), jnp.asarray(w), step)

    return jax.tree_util.tree_map_with_path(apply, updates, params, sets)


def _correct(
    projection: Projection, path: str, u: jax.Array, w: jax.Array, step: jax.Array
) -> jax.Array:
    return projection.correct(path, u, w, step)


def _side(projection: Box, path: str, u: jax.Array, w: jax.Array, step: jax.Array) -> jax.Array:
    return projection.side(path, u, w, step)


# --- Momentum -------------------------------------------------------------------------


def _without_push(state: Any, sides: Any) -> Any:
    """The state, without momentum that moves weights on their bounds further out."""
    by_path = {
        path_name(path): side
        for path, side in jax.tree_util.tree_leaves_with_path(sides)
        if is_clippable(side)
    }

    def release(path: tuple, m: Any) -> Any:
        places = [i for i, key in enumerate(path) if getattr(key, "name", None) in _MOMENTA]
        names = [path_name(path[i + 1 :]) for i in places]
        side = next((by_path[name] for name in names if name in by_path), None)
        if side is None or not is_clippable(m) or np.shape(m) != side.shape:
            return m
        m = jnp.asarray(m)
        is_complex = jnp.iscomplexobj(m) or jnp.iscomplexobj(side)
        unit = phase_and_modulus(m)[0] if is_complex else jnp.sign(m)
        push = jnp.real(jnp.conj(unit) * side.astype(unit.dtype))
        # Weights move against an average of gradients.
        return jnp.where(push < 0, jnp.zeros_like(m), m)

    return jax.tree_util.tree_map_with_path(release, state)


class KeepWeightsWithinState(NamedTuple):
    """State of `keep_weights_within`.

    Attributes:
      step: Scalar int32, steps so far.
    """

    step: jax.Array


def keep_weights_within(
    threshold: Any, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Changes updates so that after `optax.apply_updates` every weight is in the box.

    `u <- clip(w + u, -t, t) - w`, corrected by an ulp where the rounded sum would leave
    the box. Must be the last link of a chain. Weights that start outside are brought in
    by the first step, if the updates are of the weights' dtype, or one that has all its
    numbers; coarser ones, whose spacing at such a weight may be wider than the box, bring
    it as near as one update can, and the next steps go on from there. Entries may end an
    ulp inside the bound: where the bound has to be hit to the last bit (so that `t` is a
    code), use `clip_weights`.

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
        checks.check_params_given("keep_weights_within", params)
        checks.check_same_structure("updates", updates, "params", params)
        bounds = _bounds(params, threshold, mask, state.step)
        updates = map_clippable(update_within, updates, params, bounds)
        return updates, KeepWeightsWithinState(step=increment(state.step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
