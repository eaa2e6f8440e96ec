"""Leaves of a tree: which of them are clipped, and by which path they are named."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

PyTree: TypeAlias = Any  # of arrays, unless its docstring says more
# Which leaves are meant: a tree of bools (a prefix will do), or a function that gives one.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree]


def path_name(path: tuple) -> str:
    """A tree path as `layer/kernel`; flax nnx's trailing `.value` is left out."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value").removesuffix("/.value")


def is_clippable(leaf: Any) -> bool:
    """True for real and complex floating leaves; all others pass through transforms."""
    if isinstance(leaf, (bool, int)):
        return False
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def map_clippable(fn: Any, tree: Any, *rest: Any) -> Any:
    """Maps over the floating leaves, as jax arrays; the other leaves of `tree` pass through."""

    def apply(x: Any, *others: Any) -> Any:
        return fn(jnp.asarray(x), *others) if is_clippable(x) else x

    return jax.tree.map(apply, tree, *rest)


def masked(mask: Mask | None, params: Any, tree: Any, otherwise: Any) -> Any:
    """`tree`, of the structure of `params`, with `otherwise` for the leaves not in the mask."""
    if mask is None:
        return tree
    chosen = mask(params) if callable(mask) else mask
    entries, structure = jax.tree_util.tree_flatten_with_path(chosen)
    for path, is_in in entries:
        is_scalar = isinstance(is_in, (bool, np.bool_)) or (
            isinstance(is_in, (np.ndarray, jax.Array)) and not is_in.ndim and is_in.dtype == bool
        )
        if not is_scalar:
            where = f" at '{path_name(path)}'" if path else ""
            raise TypeError(f"mask must be True or False{where}, got {is_in!r}.")
    try:
        subtrees = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"mask must be a prefix tree of the parameters; this one is not: {error}"
        ) from error
    kept = [
        jax.tree.map(lambda x, is_in=is_in: x if is_in else otherwise, subtree)
        for (_, is_in), subtree in zip(entries, subtrees, strict=True)
    ]
    return structure.unflatten(kept)


def floating_leaves(tree: Any) -> list[Any]:
    """The leaves that count, in order."""
    return [x for x in jax.tree.leaves(tree) if is_clippable(x)]


def replace_floating(updates: Any, leaves: list[jax.Array], rest: Any = None) -> Any:
    """`rest`, or `updates` itself, with what is floating in `updates` replaced in order."""
    new, rest = iter(leaves), updates if rest is None else rest
    return jax.tree.map(lambda x, r: next(new) if is_clippable(x) else r, updates, rest)
