"""Trees saved to files, whole or not at all, and loaded back bit for bit.

    .safetensors   any pytree, `QuantizedArray` leaves included; a checksum for every byte
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
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxclip._core.atomic import replacing
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints import numpy_files
from jaxclip.checkpoints.format.headers import MAX_RATIO
from jaxclip.checkpoints.format.layout import (
    Leaf,
    check_has_values,
    is_random_key,
    key_data,
    leaf_name,
    plan_file,
)
from jaxclip.checkpoints.format.pytrees import is_static, named_leaves
from jaxclip.checkpoints.format.writing import write_tree
from jaxclip.checkpoints.format.zeros import without_zeros
from jaxclip.checkpoints.reading import (
    ALLOWED_SUFFIXES,
    Source,
    checkpoint_errors,
    open_source,
)
from jaxclip.checkpoints.sizes import SizeReport, report_source
from jaxclip.lowbit.arrays import is_quantized
from jaxclip.lowbit.coding.entropy_coding import Coding, check_coding


def save(
    path: str | os.PathLike, tree: PyTree, *, coding: Coding | None = None, overwrite: bool = False
) -> None:
    """Writes a tree to a file atomically: the whole tree, or nothing.

    The file is written tensor by tensor under a temporary name in the same directory, synced to
    disk and renamed. After a crash the name holds the old file or the new one, never a part. The
    next save to the same path removes a temporary file that was left over: one that no writer has
    locked, or on other hosts one that is a day old. Where a file system cannot sync, the file is
    saved with a warning.

    Equal trees give equal bytes. With Huffman coding that needs the same version of zlib, and with
    "smallest" also the extra `coding` on both machines or on neither.

    Args:
      path: File to write. Its suffix is the format: `.safetensors` for any tree, `.npz` for
        (nested) dicts of arrays, `.npy` for one array. NumPy's formats have no bfloat16.
      tree: Pytree of arrays and `QuantizedArray` leaves. Dicts, lists, tuples and None come back
        as they were. Every other node is written by its key paths, as the dict or list of its
        children: FrozenDict, NamedTuple, dataclass, nnx and equinox modules. A box such as
        `nnx.Param` or linen's `Partitioned` is written as its value. `load(like=)` gives back the
        types. Functions and texts in a module are not written, and its Python numbers as arrays.
        Random keys are written to `.safetensors` as their data; `load(like=)` makes keys.
      coding: Entropy coding of low-bit codes in `.safetensors`, used for each leaf that it makes
        smaller. "huffman" is read by every Python. "ans" takes about the entropy of the codes,
        and readers need the extra `coding`. "lanes" takes .4 % more and only NumPy, and fewer bytes
        where rows or columns differ or codes are on a path of a trellis; small arrays are slow to
        decode. "smallest" takes the smallest for each leaf, without "ans" if the extra is not
        installed. Its file is never larger than with "huffman", and larger than with "ans" by at
        most 4 bytes per low-bit leaf and 7 bytes. With any coding the zeros of a float leaf are
        left out where that makes the file smaller: it has a mask of the other entries, coded as
        codes are or by "huffman", and their values. None packs codes at their width.
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
    packed: bool = False,
    max_ratio: float = MAX_RATIO,
) -> PyTree:
    """Reads the weights in a file or in a folder of shards, leaf by leaf.

    Args:
      path: A `.safetensors`, `.npz` or `.npy` file; or a folder with
        `model.safetensors.index.json` and its shards, or with `model.safetensors`.
      like: Tree of arrays or `jax.ShapeDtypeStruct` that the file must match; None for any. The
        result has its structure, types and static parts. Flat names are matched with keys joined
        by "/" or ".", also those that `safetensors.torch.save_model` left out because torch shared
        them with others. An array in it also matches a low-bit leaf of its shape and dtype. A
        Python number in it is read as one, and like a function or text it may be missing from the
        file. Random keys in it are made from their data, and are jax arrays.
      device: Device or sharding on which each leaf is put as soon as it is read; None returns
        NumPy arrays. A `NamedSharding` must divide every leaf's shape. It splits the codes of a
        low-bit leaf. Scales and zeros are split along the axes that it divides, and replicated
        along the others.
      packed: True to keep low-bit codes packed in memory, as `QuantizedArray.packed` does. So are
        leaves that are packed in `like`.
      max_ratio: Bytes of arrays that a byte on disk may stand for, in [0, inf]; 256 MiB more
        are always allowed. A file that takes less place on disk was made of zeros or to exhaust
        memory; holes of a sparse file take none.

    Returns:
      For a `.safetensors` file of `save` the tree that was saved; for one of another library, a
      folder or `.npz` a flat dict from name to array; for `.npy` an array. Arrays are NumPy's, or
      jax's on `device`; dtypes are those of the file.

    Raises:
      CheckpointError: If the file is damaged, not of the format of its suffix, of a newer version
        or not a regular file, if it does not fit into memory or `max_ratio`, or if it differs from
        `like`; names the first difference. `.npy` files have no checksum, so damaged values are
        not noticed.
      ValueError: If a leaf cannot be split as `device` says.
      FileNotFoundError: If there is no file.
      OSError: If the disk fails.

    Example:
      >>> load("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    with open_source(Path(path), max_ratio) as source:
        with checkpoint_errors(Path(path)):
            names = None if like is None else _match_leaves(like, source)

        def read(name: str) -> Leaf:
            leaf = source.read(name)
            if packed and is_quantized(leaf):
                leaf = leaf.packed()
            return leaf if device is None else _put(name, leaf, device)

        if names is None:
            return source.restore(read)
        wanted, structure = jax.tree.flatten(like, is_leaf=is_quantized)
        pairs = zip(names, wanted, strict=True)
        leaves = [x if name is None else _as_in(x, read(name)) for name, x in pairs]
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
    with open_source(Path(path), max_ratio=None) as source:
        return report_source(source)


# --- Writing: functions that check a tree, and return a function that writes it ---------------


def _prepare_safetensors(tree: PyTree, coding: str | None) -> Callable[[BinaryIO], Any]:
    plan = plan_file(tree)
    for name, leaf in plan.leaves.items():
        for array in jax.tree.leaves(leaf):
            check_has_values(name, array)
    read = plan.leaves.__getitem__
    plan = without_zeros(plan, read, coding)
    return lambda file: write_tree(file, plan, read, coding)


_PREPARERS: dict[str, Callable[[PyTree, str | None], Callable[[BinaryIO], Any]]] = {
    ".safetensors": _prepare_safetensors,
    ".npz": lambda tree, _: numpy_files.prepare_npz(tree),
    ".npy": lambda tree, _: numpy_files.prepare_npy(tree),
}


# --- Matching with a tree ---------------------------------------------------------------------


def _match_leaves(like: PyTree, source: Source) -> list[str | None]:
    """Returns the name in the source of each leaf of `like`; raises at the first difference.

    It is None for leaves that are no arrays and not in the source.
    """
    names: list[str | None] = []
    for keys, leaf in named_leaves(like):
        spellings = () if is_static(leaf) else _spellings(keys, source)
        name = next((n for n in spellings if n in source.leaves), None)
        if name is not None:
            _check_fits(name, leaf, source.leaves[name])
        elif hasattr(leaf, "shape"):
            raise ValueError(f"{'/'.join(map(str, keys))!r} is in like, but not in the file.")
        names.append(name)
    unwanted = source.leaves.keys() - set(names)
    if unwanted:
        raise ValueError(f"{min(unwanted)!r} is in the file, but not in like.")
    return names


def _spellings(keys: tuple[str | int, ...], source: Source) -> list[str]:
    """Returns the names that the leaf at a path may have in the source."""
    if source.structure is not None:
        return [leaf_name(keys)]
    texts = [str(key) for key in keys]
    names = ["/".join(texts), ".".join(texts)]
    # torch stores shared tensors once, and their other names in the metadata.
    return names + [source.metadata[n] for n in names if n in source.metadata]


def _as_in(template: Any, leaf: Leaf) -> Any:
    """Returns a leaf of the file in the form that it has in `like`."""
    # Axes may be counted from either end: the result has the template's form of the grid.
    if is_quantized(leaf) and is_quantized(template):
        leaf = leaf if template.packing is None else leaf.packed()
        return dataclasses.replace(leaf, grid=template.grid)
    if is_random_key(template):
        return jax.random.wrap_key_data(jnp.asarray(leaf), impl=_implementation(template))
    return type(template)(np.asarray(leaf).item()) if type(template) in _NUMBERS else leaf


def _implementation(keys: Any) -> Any:
    """Returns the implementation of random keys, of which a file has only the data."""
    if isinstance(keys, jax.Array):
        return jax.random.key_impl(keys)
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):  # jax tells that of a shape by its dtype
        if jax.eval_shape(lambda n=name: jax.random.key(0, impl=n)).dtype == keys.dtype:
            return name
    raise TypeError(f"like has random keys of dtype {keys.dtype}: give keys, not their shapes.")


_NUMBERS = {bool: jnp.bool_, int: jnp.integer, float: jnp.floating}


def _check_fits(name: str, wanted: Any, found: Any) -> None:
    if type(wanted) in _NUMBERS:
        if tuple(found.shape) or not jnp.issubdtype(found.dtype, _NUMBERS[type(wanted)]):
            raise ValueError(
                f"{name!r} has shape {tuple(found.shape)} and dtype {found.dtype}, but like has "
                f"the Python number {wanted!r}."
            )
        return
    wanted = key_data(wanted) if is_random_key(wanted) else wanted
    if not hasattr(wanted, "shape"):
        raise ValueError(f"{name!r} is an array in the file, but like has a {type(wanted)}.")
    pairs = [("shape", tuple(wanted.shape), tuple(found.shape))]
    pairs += [("dtype", jnp.dtype(wanted.dtype), jnp.dtype(found.dtype))]
    if is_quantized(wanted):
        found_grid = found.fitted_grid.from_the_end(found.ndim) if is_quantized(found) else "none"
        pairs += [("grid", wanted.fitted_grid.from_the_end(wanted.ndim), found_grid)]
    for field, asked, got in pairs:
        if asked != got:
            raise ValueError(f"{name!r} has {field} {got}, but like has {asked}.")


# --- Placing on devices -----------------------------------------------------------------------


def _put(name: str, leaf: Leaf, device: Any) -> Leaf:
    """Puts a leaf on a device, or splits it over several."""
    if not isinstance(device, NamedSharding):
        return jax.device_put(leaf, device)
    if _divided(leaf.shape, device).spec != device.spec:
        raise ValueError(
            f"device: leaf {name!r} of shape {leaf.shape} cannot be split by {device.spec} over "
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
