"""Any pytree as the dicts, lists and tuples that a file holds, by its key paths.

FrozenDict, OrderedDict, nnx.State      a dict of their items
NamedTuple, dataclass, equinox.Module   a dict of their fields
nnx.Param, linen.Partitioned            their value, under the name of the box itself
a node that names no keys               a list
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxclip._core.trees import PyTree
from jaxclip.lowbit.arrays import is_quantized

DEPTH_LIMIT = 64  # of nested nodes
_ARRAYS = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)


def as_plain(tree: PyTree) -> PyTree:
    """Returns a tree with dicts and lists for its other nodes; the leaves are checked later.

    In a module, or another node that is no container, functions and texts become None, because
    `load` takes them from its `like`, and Python numbers become arrays.
    """
    return _as_plain(tree, 0, False)


def _as_plain(node: PyTree, depth: int, is_in_module: bool) -> PyTree:
    if node is None or depth > DEPTH_LIMIT:  # which ends cycles: the caller refuses the depth
        return node
    if type(node) is dict:
        return {k: _as_plain(child, depth + 1, is_in_module) for k, child in node.items()}
    if type(node) in (list, tuple):
        return type(node)(_as_plain(child, depth + 1, is_in_module) for child in node)
    node, entries = _unboxed(node)
    if entries is None:
        return _plain_leaf(node) if is_in_module else node
    if node is None or type(node) in (dict, list, tuple):  # inside a box
        return _as_plain(node, depth, is_in_module)
    is_module = not isinstance(node, (Mapping, list, tuple))
    plain = {k: _as_plain(child, depth + 1, is_in_module or is_module) for k, child in entries}
    if isinstance(node, Mapping):
        return plain
    if plain and not any(isinstance(key, str) for key in plain):
        return list(plain.values())
    return {k: x for k, x in plain.items() if not (is_module and _is_empty(x))}


def _is_empty(plain: PyTree) -> bool:
    return plain is None or (isinstance(plain, (dict, list, tuple)) and not plain)


def _plain_leaf(leaf: Any) -> Any:
    """Returns a leaf of a module as a file has it: None for what only a program can hold."""
    if is_static(leaf):
        return None
    return np.asarray(leaf) if isinstance(leaf, (bool, int, float)) else leaf


def is_static(leaf: Any) -> bool:
    """Returns True for leaves that are part of a module's program, not of its weights."""
    return callable(leaf) or isinstance(leaf, (str, bytes, np.dtype))


def named_leaves(tree: PyTree) -> list[tuple[tuple[str | int, ...], Any]]:
    """Returns the leaves with the keys that `as_plain` gives them, in the order of jax."""
    return list(_named(tree, ()))


def _named(node: PyTree, path: tuple) -> Iterator[tuple[tuple, Any]]:
    node, entries = _unboxed(node)
    if entries is None:
        yield path, node
        return
    for key, child in entries:
        yield from _named(child, (*path, key))


def _unboxed(node: PyTree) -> tuple[PyTree, list[tuple[Any, PyTree]] | None]:
    """Returns a node without its boxes, and its children by key; None if it is a leaf."""
    while True:
        entries = _children(node)
        is_box = entries is not None and [key for key, _ in entries] in (["value"], [".value"])
        if entries is None or not is_box or isinstance(node, Mapping):
            return node, entries
        node = entries[0][1]


def _children(node: PyTree) -> list[tuple[Any, PyTree]] | None:
    """Returns the children of a node by key, in the order of jax; None for a leaf."""
    if is_quantized(node) or isinstance(node, _ARRAYS):
        return None
    entries = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    if any(not path for path, _ in entries):
        return None
    return [(_key(path[0]), child) for path, child in entries]


def _key(key: Any) -> Any:
    """Returns what an entry of a path stands for."""
    if isinstance(key, (DictKey, FlattenedIndexKey)):
        return key.key
    if isinstance(key, SequenceKey):
        return key.idx
    return key.name if isinstance(key, GetAttrKey) else str(key)
