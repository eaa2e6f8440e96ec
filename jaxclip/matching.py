"""Whether a file holds the tree that its reader wants, leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxclip import _checks
from jaxclip.layout import leaf_name
from jaxclip.quantization import QuantizedArray
from jaxclip.sources import Source

__all__ = ["match_leaves"]


def match_leaves(like: Any, source: Source) -> list[str]:
    """Returns the name in a source of each leaf of a tree, in the order of the tree.

    Args:
      like: Tree of arrays or `jax.ShapeDtypeStruct`, or with `QuantizedArray` leaves.
      source: What lies on disk. In a tree of ours names are paths; elsewhere they are keys
        joined by "/" or ".".

    Returns:
      Names, one for each leaf of `like`.

    Raises:
      ValueError: If a leaf is missing, of another shape or dtype, of another grid where
        `like` has low-bit leaves, or the source has leaves that `like` does not; names the
        first.

    Example:
      >>> source = Source({"a.w": jax.ShapeDtypeStruct((2,), "float32")}, str, {})
      >>> match_leaves({"a": {"w": jax.ShapeDtypeStruct((2,), "float32")}}, source)
      ['a.w']
    """
    names = []
    wanted = jax.tree_util.tree_leaves_with_path(like, is_leaf=_is_quantized)
    for path, leaf in wanted:
        name = next((n for n in _spellings(path, source) if n in source.leaves), None)
        if name is None:
            raise ValueError(f"'{_checks.path_name(path)}' is wanted, but there is no such leaf.")
        _check_fits(name, leaf, source.leaves[name])
        names.append(name)
    unwanted = source.leaves.keys() - set(names)
    if unwanted:
        raise ValueError(f"'{min(unwanted)}' is there, but is not wanted.")
    return names


def _spellings(path: tuple, source: Source) -> list[str]:
    """The names that a leaf at this path may have."""
    keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    if source.structure is not None:
        return [leaf_name(keys)]
    return ["/".join(keys), ".".join(keys)]


def _check_fits(name: str, wanted: Any, found: Any) -> None:
    pairs = [("shape", tuple(wanted.shape), tuple(found.shape))]
    pairs += [("dtype", jnp.dtype(wanted.dtype), jnp.dtype(found.dtype))]
    if _is_quantized(wanted):
        found_grid = _grid(found) if _is_quantized(found) else "none"
        pairs += [("grid", _grid(wanted), found_grid)]
    for what, asked, got in pairs:
        if asked != got:
            raise ValueError(f"'{name}' has {what} {got}, and {asked} is wanted.")


def _grid(leaf: QuantizedArray) -> str:
    granularity = leaf.granularity.from_the_end(leaf.ndim)
    return (
        f"bits={leaf.bits!r}, axis={granularity.axis}, group_size={granularity.group_size}, "
        f"full_signed={leaf.full_signed}, zero_point={leaf.zero is not None}, "
        f"scale_dtype={leaf.scale_dtype}"
    )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)
