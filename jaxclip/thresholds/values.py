"""Thresholds as users give them, and as each leaf gets them.

A threshold is a number in [0, inf] or a 0-d array (inf: never clip), a schedule
`step -> number`, a rule `array -> threshold`, or a prefix tree of these. A bound holds for the
number as given: it is rounded towards zero into the dtype of the leaf that it bounds, so 0.1
never becomes bfloat16's 0.10009766.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.trees import PyTree
from jaxclip.thresholds.rules import Bound, ThresholdRule


def check_threshold_tree(name: str, threshold: PyTree) -> None:
    """Raises unless every entry of a threshold tree is a number, schedule, rule, or None."""
    entries = jax.tree_util.tree_leaves_with_path(threshold, is_leaf=_is_threshold_leaf)
    for path, given in entries:
        if path and given is None:  # alone, None is a forgotten argument
            continue
        where = f"{name} at {trees.path_name(path)!r}" if path else name
        if is_rule_factory(given):
            raise TypeError(f"{where} is the factory {given.__name__}: call it to make a rule.")
        if not callable(given):
            checks.check_threshold_array(where, given)


def is_rule_factory(given: object) -> bool:
    """Returns True for functions annotated to return a rule."""
    return getattr(given, "__annotations__", {}).get("return") is ThresholdRule


def check_one_threshold(name: str, threshold: PyTree) -> None:
    """Raises unless `threshold` is a number, a schedule, or a rule for one leaf at a time."""
    if isinstance(threshold, (dict, list, tuple)):
        raise TypeError(f"{name} must be one threshold, not a tree of them, got {threshold!r}.")
    check_threshold_tree(name, threshold)
    if not getattr(threshold, "is_leafwise", True):
        raise TypeError(
            f"{name} must be a threshold for each leaf alone, but per_tree measures all leaves."
        )


def check_number_or_schedule(
    name: str,
    given: object,
    check_number: Callable[[str, object], None] = checks.check_threshold,
) -> None:
    """Raises unless `given` is a number or a schedule; rules, though callable, are neither."""
    if isinstance(given, ThresholdRule) or is_rule_factory(given):
        raise TypeError(
            f"{name} must be a number or a schedule: a rule measures arrays, not steps."
        )
    if not callable(given):
        check_number(name, given)


def _is_threshold_leaf(x: object) -> bool:
    """Returns True if a node of a prefix tree is one threshold, even if jax would look into it."""
    return x is None or callable(x)


def resolve_threshold(
    threshold: PyTree,
    params: PyTree,
    step: ArrayLike | None = None,
    *,
    name: str = "threshold",
) -> PyTree:
    """Returns a threshold for every leaf of `params`.

    Args:
      threshold: A number, schedule, rule, an array that broadcasts against the leaves, or
        a prefix tree of these, in which None bounds nothing.
      params: Pytree whose leaves are bounded. Rules read their shapes or values.
      step: Scalar integer for schedules; without it they are taken at step 0.
      name: What errors call the threshold.

    Returns:
      A tree with the structure of `params`. Each leaf is a Python float if it was given
      as a number, else a float32 array that broadcasts against the leaf (float64 if it was
      given so). Entries of a jax array below 0 count as 0. Leaves without a threshold
      (integers, or biases under `fan_in`) get `inf`.

    Raises:
      TypeError: If a threshold, or the value of a schedule, is a string, bool, complex, or None
        in place of a tree; if it is a rule's factory; if a leaf is float8_e8m0fnu.
      ValueError: If a concrete number is negative or NaN, an array does not broadcast, the value
        of a schedule is not a scalar, or the prefix does not fit; the message names the path.

    Example:
      >>> resolve_threshold({"w": 0.5, "b": float("inf")}, {"w": jnp.ones(2), "b": jnp.ones(2)})
      {'b': inf, 'w': 0.5}
    """
    check_threshold_tree(name, threshold)
    step = jnp.zeros((), jnp.int32) if step is None else step

    def resolve_subtree(prefix_path: tuple, given: Any, subtree: PyTree) -> PyTree:
        if callable(given) and not isinstance(given, ThresholdRule):
            where = f"{name} at {trees.path_name(prefix_path)!r}" if prefix_path else name
            given = jnp.asarray(checks.value_at(where, given, step))
        flat, structure = jax.tree_util.tree_flatten_with_path(subtree)
        bounded = [
            (trees.path_name(prefix_path + path), leaf)
            for path, leaf in flat
            if trees.is_clippable(leaf)
        ]
        for path, leaf in bounded:
            _check_signed(path, leaf)
        if given is None:
            bounds = itertools.repeat(float("inf"))
        elif isinstance(given, ThresholdRule):
            bounds = iter(given.for_leaves(bounded, step))
        elif isinstance(given, jax.Array) and given.ndim == 0:
            bounds = itertools.repeat(as_threshold(given))  # the same array for all leaves
        else:
            bounds = iter([as_threshold(given, path, np.shape(leaf)) for path, leaf in bounded])
        return structure.unflatten(
            [next(bounds) if trees.is_clippable(leaf) else float("inf") for _, leaf in flat]
        )

    try:
        entries, treedef = jax.tree_util.tree_flatten_with_path(
            threshold, is_leaf=_is_threshold_leaf
        )
        subtrees = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            "threshold must be one value or a prefix tree of the parameters; "
            f"this one is not: {error}"
        ) from error
    resolved = [
        resolve_subtree(*entry, tree) for entry, tree in zip(entries, subtrees, strict=True)
    ]
    return jax.tree.unflatten(treedef, resolved)


def _check_signed(path: str, leaf: ArrayLike) -> None:
    """Raises TypeError for a format of positive powers of two, which have no bound around 0."""
    dtype = jnp.result_type(leaf)
    if jnp.finfo(dtype).nmant == 0:
        raise TypeError(
            f"a threshold bounds signed numbers, but {path!r} is {dtype}: mask it, or cast it."
        )


def as_threshold(given: Any, name: str = "", shape: tuple[int, ...] = ()) -> Bound:
    """Returns a threshold as a Python float, or as a jax array of the leaf's rank, at least 0."""
    if np.ndim(given) == 0 and not isinstance(given, jax.Array):
        return float(given)
    t = jnp.asarray(given)
    if t.ndim:
        padded = (1,) * (len(shape) - t.ndim) + t.shape
        if len(padded) != len(shape) or any(
            n not in (1, m) for n, m in zip(padded, shape, strict=True)
        ):
            raise ValueError(
                f"threshold for {name!r} must broadcast to its shape {shape}, got {t.shape}."
            )
        t = t.reshape(padded)
    return jnp.maximum(t if t.dtype == jnp.float64 else t.astype(jnp.float32), 0)
