"""Trees saved to files, whole or not at all, and loaded back bit for bit.

    .safetensors   any tree, `QuantizedArray` leaves included; a checksum for every byte
    .npz           (nested) dicts of arrays; names joined by "/"
    .npy           one array

Nothing is ever unpickled. Headers are checked before data are read, and memory is allocated only
for sizes that fit the size of the file.
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
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints import numpy_files
from jaxclip.checkpoints.format.headers import header_size
from jaxclip.checkpoints.format.layout import Leaf, check_has_values, leaf_name, plan_file
from jaxclip.checkpoints.format.writing import write_tree
from jaxclip.checkpoints.reading import ALLOWED_SUFFIXES, Source, checkpoint_errors, open_source
from jaxclip.checkpoints.sizes import SizeReport, report_source
from jaxclip.lowbit.arrays import is_quantized
from jaxclip.lowbit.entropy_coding import check_coding


def save(
    path: str | os.PathLike, tree: PyTree, *, coding: str | None = None, overwrite: bool = False
) -> None:
    """Writes a tree to a file atomically: the whole tree, or nothing.

    The file is written tensor by tensor under a temporary name in the same directory, synced to
    disk and renamed. After a crash the name holds the old file or the new one, never a part. The
    next save to the same path removes a temporary file that was left over.

    Equal trees give equal bytes. With Huffman coding that needs the same version of zlib, and with
    "smallest" also the extra `coding` on both machines or on neither.

    Args:
      path: File to write. Its suffix is the format: `.safetensors` for any tree, `.npz` for
        (nested) dicts of arrays, `.npy` for one array. NumPy's formats have no bfloat16.
      tree: Nested dicts, lists, tuples and None with arrays and `QuantizedArray` leaves.
      coding: Entropy coding of low-bit codes in `.safetensors`, used for each leaf that it makes
        smaller. "huffman" is read by every Python. "ans" takes about the entropy of the codes,
        and readers need the extra `coding`. "smallest" takes the smaller of both for each leaf,
        or only Huffman if the extra is not installed. Its file is never larger than with
        "huffman", and larger than with "ans" by at most 4 bytes per low-bit leaf and 7 bytes.
        None packs codes at their width.
      overwrite: True to replace an existing file, whose permissions are kept.

    Raises:
      FileExistsError: If `path` exists and `overwrite` is False, or it is not a regular file: a
        directory, symlink, FIFO or device is never replaced.
      FileNotFoundError: If the directory does not exist.
      TypeError: If the format cannot hold a leaf or a node; the message names it.
      ValueError: If the suffix or coding is unknown, or a leaf or key is not valid.
      ImportError: If `coding` is "ans" and the extra `coding` is not installed.
      OSError: If the disk is full or fails. The old file is intact.

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
        write = _PREPARERS[path.suffix](tree, coding)  # raises if the format cannot hold the tree
        write(file)


def load(
    path: str | os.PathLike,
    *,
    like: PyTree = None,
    device: Any = None,
) -> PyTree:
    """Reads the weights in a file or in a folder of shards, leaf by leaf.

    Args:
      path: A `.safetensors`, `.npz` or `.npy` file; or a folder with
        `model.safetensors.index.json` and its shards, or with `model.safetensors`.
      like: Tree of arrays or `jax.ShapeDtypeStruct` that the file must match; None for any. The
        result has its structure. Flat names are matched with keys joined by "/" or ".". An array
        in it also matches a low-bit leaf of its shape and dtype.
      device: Device or sharding on which each leaf is put as soon as it is read; None returns
        NumPy arrays. A `NamedSharding` must divide every leaf's shape. It splits the codes of a
        low-bit leaf. Scales and zeros are split along the axes that it divides, and replicated
        along the others.

    Returns:
      For a `.safetensors` file of `save` the tree that was saved; for one of another library, a
      folder or `.npz` a flat dict from name to array; for `.npy` an array. Arrays are NumPy's, or
      jax's on `device`; dtypes are those of the file.

    Raises:
      CheckpointError: If the file is damaged, not of the format of its suffix, of a newer version
        or not a regular file, or differs from `like`; names the first difference. `.npy` files
        have no checksum, so damaged values are not noticed.
      ValueError: If a leaf cannot be split as `device` says.
      FileNotFoundError: If there is no file.
      OSError: If the disk fails.

    Example:
      >>> load("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    with open_source(Path(path)) as source:
        with checkpoint_errors(Path(path)):
            names = None if like is None else _match_leaves(like, source)

        def read(name: str) -> Leaf:
            leaf = source.read(name)
            return leaf if device is None else _put(name, leaf, device)

        if names is None:
            return source.restore(read)
        wanted, structure = jax.tree.flatten(like, is_leaf=is_quantized)
        leaves = []
        for name, template in zip(names, wanted, strict=True):
            leaf = read(name)
            # Axes may be counted from either end: the result has the template's form of the grid.
            if is_quantized(leaf) and is_quantized(template):
                leaf = dataclasses.replace(leaf, grid=template.grid)
            leaves.append(leaf)
        return jax.tree.unflatten(structure, leaves)


def inspect(path: str | os.PathLike) -> SizeReport:
    """Returns the leaves of a file or folder and their sizes, from headers alone.

    Args:
      path: A file or folder that `load` takes.

    Returns:
      A `SizeReport`, printable, without thresholds and errors.

    Raises:
      CheckpointError: If the file is damaged, foreign or of a newer version; damage to the
        weights themselves is not noticed.
      FileNotFoundError: If there is no file.

    Example:
      >>> inspect("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    with open_source(Path(path)) as source:
        return report_source(source)


# --- Writing: functions that check a tree, and return a function that writes it ---------------


def _prepare_safetensors(tree: PyTree, coding: str | None) -> Callable[[BinaryIO], Any]:
    plan = plan_file(tree)
    header_size(plan, coding)  # raises if there are too many leaves
    for name, leaf in plan.leaves.items():
        for array in jax.tree.leaves(leaf):
            check_has_values(name, array)

    return lambda file: write_tree(file, plan, plan.leaves.__getitem__, coding)


_PREPARERS: dict[str, Callable[[PyTree, str | None], Callable[[BinaryIO], Any]]] = {
    ".safetensors": _prepare_safetensors,
    ".npz": lambda tree, _: numpy_files.prepare_npz(tree),
    ".npy": lambda tree, _: numpy_files.prepare_npy(tree),
}


# --- Matching with a tree ---------------------------------------------------------------------


def _match_leaves(like: PyTree, source: Source) -> list[str]:
    """Returns the name in the source of each leaf of `like`; raises at the first difference."""
    names = []
    wanted = jax.tree_util.tree_leaves_with_path(like, is_leaf=is_quantized)
    for path, leaf in wanted:
        name = next((n for n in _spellings(path, source) if n in source.leaves), None)
        if name is None:
            raise ValueError(f"'{trees.path_name(path)}' is in like, but not in the file.")
        _check_fits(name, leaf, source.leaves[name])
        names.append(name)
    unwanted = source.leaves.keys() - set(names)
    if unwanted:
        raise ValueError(f"'{min(unwanted)}' is in the file, but not in like.")
    return names


def _spellings(path: tuple, source: Source) -> list[str]:
    """Returns the names that the leaf at a path may have in the source."""
    keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    if source.structure is not None:
        return [leaf_name(keys)]
    return ["/".join(keys), ".".join(keys)]


def _check_fits(name: str, wanted: Any, found: Any) -> None:
    pairs = [("shape", tuple(wanted.shape), tuple(found.shape))]
    pairs += [("dtype", jnp.dtype(wanted.dtype), jnp.dtype(found.dtype))]
    if is_quantized(wanted):
        found_grid = found.grid.from_the_end(found.ndim) if is_quantized(found) else "none"
        pairs += [("grid", wanted.grid.from_the_end(wanted.ndim), found_grid)]
    for field, asked, got in pairs:
        if asked != got:
            raise ValueError(f"'{name}' has {field} {got}, but like has {asked}.")


# --- Placing on devices -----------------------------------------------------------------------


def _put(name: str, leaf: Leaf, device: Any) -> Leaf:
    """Puts a leaf on a device, or splits it over several."""
    if not isinstance(device, NamedSharding):
        return jax.device_put(leaf, device)
    if _divided(leaf.shape, device).spec != device.spec:
        raise ValueError(
            f"device: leaf '{name}' of shape {leaf.shape} cannot be split by {device.spec} over "
            f"a mesh of {dict(device.mesh.shape)}."
        )
    # Entries that share a scale may be on several devices: each of these gets the scale.
    return jax.tree.map(lambda x: jax.device_put(x, _divided(x.shape, device)), leaf)


def _divided(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding, replicated along axes that its mesh does not divide evenly."""

    def num_parts(entry: Any) -> int:
        names = entry if isinstance(entry, tuple) else (entry,)
        return math.prod(sharding.mesh.shape.get(name, 1) for name in names)

    pairs = zip(sharding.spec, shape, strict=False)
    entries = [entry if size % num_parts(entry) == 0 else None for entry, size in pairs]
    return NamedSharding(sharding.mesh, PartitionSpec(*entries), memory_kind=sharding.memory_kind)
