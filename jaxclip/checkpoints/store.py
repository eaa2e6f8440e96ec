"""Files: trees of arrays and low-bit arrays, saved whole or not at all, read with suspicion.

    .safetensors   any tree, `QuantizedArray` leaves included; a checksum for every byte
    .npz           (nested) dicts of arrays; names joined by "/"
    .npy           one array

A file appears under its name only when it is complete and on disk: it is written beside
its place, synced and renamed. Nothing is ever unpickled. What is read is checked before
it is believed, and memory is never claimed on the word of a header alone.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxclip._core import trees
from jaxclip._core.atomic import replacing
from jaxclip.checkpoints import numpy_files
from jaxclip.checkpoints.format.headers import header_size
from jaxclip.checkpoints.format.layout import check_has_values, leaf_name, plan_file
from jaxclip.checkpoints.format.writing import write_tree
from jaxclip.checkpoints.reading import ALLOWED_SUFFIXES, Source, checkpoint_errors, open_source
from jaxclip.checkpoints.sizes import FileReport, report_source
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.entropy_coding import check_coding


def save(
    path: str | os.PathLike, tree: Any, *, coding: str | None = None, overwrite: bool = False
) -> None:
    """Writes a tree to a file: all of it or nothing, whatever happens on the way.

    The file is written under a temporary name in the same directory, tensor by tensor,
    synced to disk and renamed. After a crash at any moment the name holds the old file or
    the new one; a leftover temporary file is removed by the next save to the same path.
    Equal trees give equal bytes (coded by Huffman: with one version of zlib; by the smallest
    coding: also with the extra `coding` in both places, or in neither).

    Args:
      path: Where to; the suffix decides the format: `.safetensors` for any tree, `.npz` for
        (nested) dicts of arrays, `.npy` for one array. NumPy's formats have no bfloat16.
      tree: Nested dicts, lists, tuples and None with arrays and `QuantizedArray` leaves.
      coding: How the codes of low-bit leaves are stored where that is smaller: "huffman",
        which every Python reads, "ans", of the size of their entropy (readers need the extra
        `coding`, too), or "smallest", for each leaf the smaller of both; of Huffman alone where
        the extra is not installed. A file by "smallest" is never larger than one by "huffman", and
        than one by "ans" by no more than 4 bytes a low-bit leaf, in the header, and 7 to align
        it. None packs codes at their width. For `.safetensors`.
      overwrite: Whether an existing file may be replaced; its permissions are kept.

    Raises:
      FileExistsError: If `path` exists and `overwrite` is False, or is not a regular file
        (a directory, symlink, FIFO or device is never replaced).
      FileNotFoundError: If the directory does not exist.
      TypeError: If the format cannot hold a leaf or a node; the message names it.
      ValueError: If the suffix or coding is unknown, or a leaf or key is not valid.
      ImportError: If `coding` is "ans" and its package is not installed.
      OSError: If the disk is full or refuses. The old file is intact.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> folder = tempfile.TemporaryDirectory()
      >>> save(folder.name + "/net.safetensors", {"bias": np.zeros(2, np.float32)})
      >>> load(folder.name + "/net.safetensors")
      {'bias': array([0., 0.], dtype=float32)}
      >>> folder.cleanup()
    """
    path = Path(path)
    check_coding(coding)
    if path.suffix not in _PREPARERS:
        raise ValueError(f"path must end in {ALLOWED_SUFFIXES}, got {str(path)!r}.")
    with replacing(path, overwrite) as file:
        write = _PREPARERS[path.suffix](tree, coding)  # refuses what it cannot hold
        write(file)


def load(path: str | os.PathLike, *, like: Any = None, device: Any = None) -> Any:
    """Reads the weights in a file or a folder of shards, leaf by leaf.

    Args:
      path: A `.safetensors`, `.npz` or `.npy` file; or a folder with
        `model.safetensors.index.json` and its shards, or with `model.safetensors`.
      like: Tree of arrays or `jax.ShapeDtypeStruct`: what the file must hold. The result has
        its structure; flat names are matched with keys joined by "/" or ".". Low-bit leaves
        may stand for arrays of their shape and dtype.
      device: Where each leaf is put when it has been read: a device or a sharding, as in
        `jax.device_put`. A `NamedSharding` must divide every leaf's shape; it splits the codes of
        low-bit leaves, and their scales and zeros along those axes where it divides these, too:
        elsewhere each device has them whole. None leaves NumPy arrays.

    Returns:
      NumPy arrays throughout, or jax arrays on `device`. For our `.safetensors` files the
      tree that was saved, with its `QuantizedArray` leaves; for others, folders and `.npz`, a
      flat dict from name to array; for `.npy` an array.

    Raises:
      CheckpointError: If the file is damaged, not what its suffix says, of a newer version,
        or not a regular file. `.npy` files have no checksum, so damage to values goes unseen.
      ValueError: If the file does not hold what `like` does, names the first difference; or if
        a leaf cannot be split as `device` says.
      FileNotFoundError: If there is no file.
      OSError: If the disk refuses.

    Example:
      >>> load("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    with open_source(Path(path)) as source:
        with checkpoint_errors(Path(path)):
            names = None if like is None else match_leaves(like, source)

        def read(name: str) -> Any:
            leaf = source.read(name)
            return leaf if device is None else _put(name, leaf, device)

        if names is None:
            return source.restore(read)
        wanted, structure = jax.tree.flatten(like, is_leaf=lambda x: isinstance(x, QuantizedArray))
        leaves = []
        for name, leaf in zip(names, wanted, strict=True):
            leaves.append(read(name))
            if isinstance(leaf, QuantizedArray):  # the same blocks, spelled as they are wanted
                leaves[-1] = dataclasses.replace(leaves[-1], granularity=leaf.granularity)
        return jax.tree.unflatten(structure, leaves)


def inspect(path: str | os.PathLike) -> FileReport:
    """Returns what a file or folder holds, from headers alone: no weight is read.

    Args:
      path: As in `load`.

    Returns:
      A `FileReport`, printable.

    Raises:
      CheckpointError: As in `load`; damage to the weights themselves goes unseen.
      FileNotFoundError: If there is no file.

    Example:
      >>> inspect("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    with open_source(Path(path)) as source:
        return report_source(str(path), source)


# --- Placing ------------------------------------------------------------------------------


def _put(name: str, leaf: Any, device: Any) -> Any:
    """A leaf on a device, or split over several."""
    if not isinstance(device, NamedSharding):
        return jax.device_put(leaf, device)
    if _divided(leaf.shape, device).spec != device.spec:
        raise ValueError(
            f"device: leaf '{name}' of shape {leaf.shape} cannot be split by {device.spec} over "
            f"a mesh of {dict(device.mesh.shape)}."
        )
    # Entries that share a scale may be on several devices, which then have it each.
    return jax.tree.map(lambda x: jax.device_put(x, _divided(x.shape, device)), leaf)


def _divided(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """The sharding without those entries that do not divide the shape."""

    def num_parts(entry: Any) -> int:
        names = entry if isinstance(entry, tuple) else (entry,)
        return math.prod(sharding.mesh.shape.get(name, 1) for name in names)

    entries = zip(sharding.spec, shape, strict=False)
    spec = PartitionSpec(*(e if n % num_parts(e) == 0 else None for e, n in entries))
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


# --- Writers: a tree is checked first, what is returned writes it ------------------------


def _prepare_safetensors(tree: Any, coding: str | None) -> Callable[[BinaryIO], Any]:
    plan = plan_file(tree)
    header_size(plan, coding)  # too many leaves are refused before any writing
    for name, leaf in plan.leaves.items():
        for array in jax.tree.leaves(leaf):
            check_has_values(name, array)

    return lambda file: write_tree(file, plan, plan.leaves.__getitem__, coding)


_PREPARERS: dict[str, Callable[[Any, str | None], Callable[[BinaryIO], Any]]] = {
    ".safetensors": _prepare_safetensors,
    ".npz": lambda tree, _: numpy_files.prepare_npz(tree),
    ".npy": lambda tree, _: numpy_files.prepare_npy(tree),
}


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
            raise ValueError(f"'{trees.path_name(path)}' is wanted, but there is no such leaf.")
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
