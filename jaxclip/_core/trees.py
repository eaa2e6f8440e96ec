"""Leaves of a tree: which of them are clipped, and by which path they are named."""

import collections
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

PyTree: TypeAlias = Any  # of arrays, unless its docstring says more
# Selects leaves: a tree of bools (a prefix is enough), or a function that returns one.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]


def path_name(path: tuple) -> str:
    """Returns a tree path as `layer/kernel`, without flax nnx's trailing `.value`."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value").removesuffix("/.value")


def unique_names(paths: Sequence[tuple]) -> list[str]:
    """Returns the names of tree paths; those of `{"a/b": x}` and `{"a": {"b": x}}` in full."""
    counts = collections.Counter(map(path_name, paths))
    return [
        path_name(path) if counts[path_name(path)] == 1 else jax.tree_util.keystr(path)
        for path in paths
    ]


def is_clippable(leaf: object) -> bool:
    """Returns True for real and complex floating leaves; all others pass through transforms."""
    if isinstance(leaf, (bool, int)):
        return False
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def map_clippable(fn: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps over the floating leaves, as jax arrays; the other leaves of `tree` pass through."""

    def apply(x: Any, *others: Any) -> Any:
        return fn(jnp.asarray(x), *others) if is_clippable(x) else x

    return jax.tree.map(apply, tree, *rest)


def check_mask_for_leaves(mask: Mask | None) -> None:
    """Raises TypeError if the mask of a transform is one bool for all leaves, or holds no bools."""
    # That is what a function becomes under optax.inject_hyperparams, which calls it with the step
    # in place of the parameters.
    if isinstance(mask, (bool, np.bool_, np.ndarray, jax.Array)):
        raise TypeError(
            "mask must be a tree of bools, a function of the parameters, or None for all leaves, "
            f"got {mask!r}: under optax.inject_hyperparams name it in static_args."
        )
    if not callable(mask):
        _check_bools(mask)


def _check_bools(mask: PyTree) -> None:
    """Raises TypeError unless every entry of a mask is True or False."""
    for path, is_in in jax.tree_util.tree_leaves_with_path(mask):
        is_scalar = isinstance(is_in, (bool, np.bool_)) or (
            isinstance(is_in, (np.ndarray, jax.Array)) and not is_in.ndim and is_in.dtype == bool
        )
        if not is_scalar:
            where = f" at {path_name(path)!r}" if path else ""
            raise TypeError(f"mask must be True or False{where}, got {is_in!r}.")


def masked(mask: Mask | None, params: PyTree, tree: PyTree, otherwise: object) -> PyTree:
    """Returns `tree` with `otherwise` at the leaves that the mask over `params` leaves out."""
    if mask is None:
        return tree
    chosen = mask(params) if callable(mask) else mask
    _check_bools(chosen)
    entries, structure = jax.tree.flatten(chosen)
    try:
        subtrees = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"mask must be a prefix tree of the parameters; this one is not: {error}"
        ) from error
    kept = [
        jax.tree.map(lambda x, is_in=is_in: x if is_in else otherwise, subtree)
        for is_in, subtree in zip(entries, subtrees, strict=True)
    ]
    return structure.unflatten(kept)


def for_every_leaf(name: str, prefix: PyTree, tree: PyTree) -> list[Any]:
    """Returns the entry of a prefix tree for each leaf of a tree; None is an entry, too."""
    entries, structure = jax.tree.flatten(prefix, is_leaf=lambda x: x is None)
    try:
        subtrees = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{name} must be one value or a prefix tree of the parameters; this one is not: {error}"
        ) from error
    return [e for e, t in zip(entries, subtrees, strict=True) for _ in jax.tree.leaves(t)]


def floating_leaves(tree: PyTree) -> list[Any]:
    """Returns the floating leaves, in order."""
    return [x for x in jax.tree.leaves(tree) if is_clippable(x)]


def replace_floating(
    updates: optax.Updates, leaves: Sequence[jax.Array], rest: PyTree = None
) -> optax.Updates:
    """Returns `rest`, or `updates` itself, with the floating leaves of `updates` replaced."""
    new, rest = iter(leaves), updates if rest is None else rest
    return jax.tree.map(lambda x, r: next(new) if is_clippable(x) else r, updates, rest)
