"""Weights as they lie on disk: what is there, and each leaf on its own when asked for.

    .safetensors   one file, ours with its tree, others' flat
    a folder       shards by `model.safetensors.index.json`, or one `model.safetensors`
    .npz, .npy     NumPy's own

What is wrong with a file is a `CheckpointError` that names it; the rooms that read parts of
files raise ValueError, which becomes one here.
"""

import contextlib
import dataclasses
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxclip.checkpoints import numpy_files, shards
from jaxclip.checkpoints.format import layout, parsing
from jaxclip.lowbit.arrays import QuantizedArray

ALLOWED_SUFFIXES = ".safetensors, .npz or .npy"


class CheckpointError(ValueError):
    """A file is damaged, of a foreign kind or of a newer version; names file and tensor."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns what is wrong with a file into a `CheckpointError` with its name.

    Args:
      path: The file.

    Example:
      >>> with naming(Path("net.npy")):
      ...     raise ValueError("it is damaged.")
      Traceback (most recent call last):
      jaxclip.sources.CheckpointError: net.npy: it is damaged.
    """
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Source:
    """Leaves on disk, while the files are open.

    Attributes:
      leaves: Every leaf by name: `jax.ShapeDtypeStruct`, or a `QuantizedArray` of them.
      read: Reads one leaf by its name, as NumPy arrays, and checks it.
      num_bytes: Bytes that each leaf takes on disk, by name.
      files: The files that are read.
      structure: The structure of the tree whose leaves these are, in this order; None for a
        flat dict.
      folder: The folder that is read, by its own name or its index; None if one file is.
    """

    leaves: dict[str, Any]
    read: Callable[[str], Any]
    num_bytes: dict[str, int]
    files: tuple[Path, ...] = ()
    structure: Any = None
    folder: Path | None = None

    def restore(self, read: Callable[[str], Any]) -> Any:
        """Returns the tree, or flat dict, with `read` called once a leaf."""
        values = {name: read(name) for name in self.leaves}
        if self.structure is None:
            return values
        return jax.tree.unflatten(self.structure, values.values())

    def check_unharmed_by(self, dst: Path) -> None:
        """Raises if something new at `dst` would be one of the files, or part of the folder.

        Args:
          dst: A file or folder that is to be written.

        Raises:
          FileExistsError: If it is one of the files that are read, under any name.
          ValueError: If it lies in the folder that is read and has the name of a part.

        Example:
          >>> Source({}, str, {}, folder=Path(".")).check_unharmed_by(Path("model.safetensors"))
          Traceback (most recent call last):
          ValueError: 'model.safetensors' would change what the folder '.' holds, which is read:
          take another name.
        """
        if any(dst.exists() and dst.samefile(file) for file in self.files):
            raise FileExistsError(f"'{dst}' is a file that is read: write to another.")
        if self.folder is None or not shards.is_part_of_folder(dst.name):
            return
        if dst.parent.exists() and dst.parent.samefile(self.folder):
            raise ValueError(
                f"'{dst}' would change what the folder '{self.folder}' holds, which is read: "
                "take another name."
            )


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Opens a file or folder of weights; leaves are read one by one while it is open.

    Args:
      path: A `.safetensors`, `.npz` or `.npy` file, an index of shards, or a folder.

    Returns:
      A context manager that gives a `Source`.

    Raises:
      CheckpointError: If it is not what its name says, or damaged; `read` raises it too.
      FileNotFoundError: If there is nothing at `path`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.save(folder + "/w.npy", np.ones(3))
      ...     with open_source(Path(folder + "/w.npy")) as source:
      ...         print(source.leaves["array"].shape, source.read("array"))
      (3,) [1. 1. 1.]
    """
    with contextlib.ExitStack() as stack:
        with naming(path):
            source = _open(stack, path)

        def read(name: str) -> Any:
            with naming(path):
                return source.read(name)

        yield dataclasses.replace(source, read=read)


def _open(stack: contextlib.ExitStack, path: Path) -> Source:
    folder = None
    if path.is_dir():
        folder, path = path, shards.find_shards(path) or path / "model.safetensors"
    file = stack.enter_context(_open_regular(path))
    size = os.fstat(file.fileno()).st_size
    if path.name.endswith(".safetensors.index.json"):
        return _open_shards(stack, path, file.read(size))
    if path.suffix not in _OPENERS:
        raise ValueError(f"the suffix must be {ALLOWED_SUFFIXES}.")
    return dataclasses.replace(_OPENERS[path.suffix](file, size), files=(path,), folder=folder)


def _open_regular(path: Path) -> BinaryIO:
    """Opens a regular file; others are refused unopened, as opening may wait or act."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file.")
        # Should it become a FIFO now, opening still does not wait.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no file '{path}'.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file.")
    return file


# --- safetensors ------------------------------------------------------------------------


def _open_safetensors(file: BinaryIO, file_size: int) -> Source:
    prefix = file.read(8)
    length = parsing.header_length(prefix, file_size)
    contents = parsing.parse_header(prefix + file.read(length), file_size - 8 - length)

    def read_tensor(tensor: layout.Tensor) -> np.ndarray:
        file.seek(8 + length + tensor.start)
        try:
            array = numpy_files.read_array(file, tensor.numpy_dtype, tensor.shape)
        except ValueError as error:
            raise ValueError(f"tensor {tensor.name!r}: {error}") from error
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data)
        if contents.checksums and checksum != contents.checksums[tensor.name]:
            raise ValueError(f"tensor {tensor.name!r}: it is damaged, its checksum differs.")
        return array

    if contents.leaves is None:
        tensors = contents.tensors
        leaves = {n: jax.ShapeDtypeStruct(t.shape, t.numpy_dtype) for n, t in tensors.items()}
        sizes = {name: t.stop - t.start for name, t in tensors.items()}
        return Source(leaves, lambda name: read_tensor(tensors[name]), sizes)
    sizes = dict.fromkeys(contents.leaves, 0)
    for tensor in contents.tensors.values():
        sizes[tensor.leaf] += tensor.stop - tensor.start
    return Source(
        leaves=contents.leaves,
        read=lambda name: contents.restore_leaf(name, read_tensor),
        num_bytes=sizes,
        structure=jax.tree.structure(
            contents.tree, is_leaf=lambda x: isinstance(x, QuantizedArray)
        ),
    )


def _open_shards(stack: contextlib.ExitStack, path: Path, index: bytes) -> Source:
    folder = path.parent
    weight_map, total_size = shards.read_index(index, folder)
    opened: dict[str, Source] = {}
    for shard in sorted(set(weight_map.values())):
        file = stack.enter_context(_open_regular(folder / shard))
        with _in_shard(shard):
            source = _open_safetensors(file, os.fstat(file.fileno()).st_size)
            if source.structure is not None:
                raise ValueError("a shard must be a plain file of tensors, not one of a tree.")
        for name in source.leaves:
            if weight_map.get(name) != shard:
                raise ValueError(f"tensor {name!r} is in shard {shard!r}, but not by the index.")
        opened[shard] = source
    for name, shard in weight_map.items():
        if name not in opened[shard].leaves:
            raise ValueError(f"tensor {name!r} is missing in its shard {shard!r}.")

    def read(name: str) -> np.ndarray:
        with _in_shard(weight_map[name]):
            return opened[weight_map[name]].read(name)

    sizes = {name: opened[shard].num_bytes[name] for name, shard in weight_map.items()}
    shards.check_total_size(total_size, sum(sizes.values()))
    leaves = {name: opened[shard].leaves[name] for name, shard in weight_map.items()}
    files = (path, *(folder / shard for shard in opened))
    return Source(leaves, read, sizes, files, folder=folder)


@contextlib.contextmanager
def _in_shard(shard: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"shard {shard!r}: {error}") from error


# --- NumPy's ----------------------------------------------------------------------------
#
# Files of either byte order are read; in memory it is the machine's, the only one jax takes.


def _open_npz(file: BinaryIO, file_size: int) -> Source:
    members = numpy_files.open_npz(file, file_size)
    leaves = {n: jax.ShapeDtypeStruct(m.shape, _native(m.dtype)) for n, m in members.items()}
    sizes = {name: m.num_bytes for name, m in members.items()}
    return Source(leaves, lambda name: _in_native_order(members[name].read()), sizes)


def _open_npy(file: BinaryIO, file_size: int) -> Source:
    member = numpy_files.open_npy(file, file_size)
    leaves = {"array": jax.ShapeDtypeStruct(member.shape, _native(member.dtype))}
    structure = jax.tree.structure(0)
    sizes = {"array": member.num_bytes}
    return Source(leaves, lambda _: _in_native_order(member.read()), sizes, structure=structure)


def _native(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def _in_native_order(array: np.ndarray) -> np.ndarray:
    return array.astype(_native(array.dtype), copy=False)


_OPENERS: dict[str, Callable[[BinaryIO, int], Source]] = {
    ".safetensors": _open_safetensors,
    ".npz": _open_npz,
    ".npy": _open_npy,
}
