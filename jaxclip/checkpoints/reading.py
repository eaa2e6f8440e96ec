"""Weights on disk: names and shapes are read from headers, leaves one by one on request.

    .safetensors   one file: a tree if jaxclip wrote it, else a flat dict
    a folder       shards listed by `model.safetensors.index.json`, or one `model.safetensors`
    .npz, .npy     NumPy's formats

Modules that parse a part of a file raise ValueError. Here it becomes a `CheckpointError` that
names the file.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip._core import checks, signals
from jaxclip._core.layouts import Layout
from jaxclip._core.text import escaped
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints import numpy_files, shards
from jaxclip.checkpoints.format import parsing
from jaxclip.checkpoints.format.headers import ALWAYS_ALLOWED_BYTES, MAX_RATIO
from jaxclip.checkpoints.format.layout import DTYPES, Leaf, StoredLeaf, Tensor, native_dtype
from jaxclip.checkpoints.format.masks import Mask
from jaxclip.checkpoints.stored_rows import StoredRows
from jaxclip.lowbit.arrays import is_quantized

# What files name as their `format`.
_LAYOUT_OF_FRAMEWORK: dict[str, Layout] = {"pt": "out_in", "mlx": "out_in"}
_LAYOUT_OF_FRAMEWORK |= {"flax": "in_out", "tf": "in_out"}
ALLOWED_SUFFIXES = ".safetensors, .npz or .npy"
_OF_TORCH = (
    "Files of torch are pickles, which can run code, so they are not read: load one with "
    "torch.load(path, weights_only=True), and write it with safetensors.torch.save_file."
)
_MAX_OPEN_FILES = 16


class CheckpointError(ValueError):
    """Error of a file that is damaged, foreign or of a newer version; names file and tensor."""


@contextlib.contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Turns ValueErrors into `CheckpointError`s that name the file."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise CheckpointError(escaped(f"{path}: {error}")) from error
    except MemoryError as error:
        message = f"{path}: what it holds does not fit into memory. {error}"
        raise CheckpointError(escaped(message)) from error


@dataclasses.dataclass(frozen=True)
class Source:
    """Leaves on disk, readable while the files are open.

    Attributes:
      leaves: Shape and dtype of every leaf, by name.
      read: Reads and checks one leaf, by name.
      num_bytes: Bytes that each leaf takes on disk, by name.
      total_bytes: Bytes of all files that are read.
      files: The files that are read.
      structure: The tree whose leaves these are, in this order; None for a flat dict.
      folder: The folder that is read, by its own name or its index; None for a single file.
      metadata: Entries of other programs in headers; of shards, those of the first that has them.
      masks: Masks of the leaves whose zeros are left out, by name.
      rows: Returns a leaf, by name, of which rows can be read apart; None where it cannot be, as
        where a checksum of the whole is to be compared first.
    """

    leaves: dict[str, Leaf]
    read: Callable[[str], StoredLeaf]
    num_bytes: dict[str, int]
    total_bytes: int = 0
    files: tuple[Path, ...] = ()
    structure: Any = None
    folder: Path | None = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    masks: dict[str, Mask] = dataclasses.field(default_factory=dict)
    rows: Callable[[str], StoredRows | None] = lambda name: None

    @property
    def default_layout(self) -> Layout:
        """The layout of leaves of which no name says it."""
        framework = self.metadata.get("format", "")
        if framework in _LAYOUT_OF_FRAMEWORK:
            return _LAYOUT_OF_FRAMEWORK[framework]
        # Without a framework, safetensors of another library is taken to be PyTorch's.
        is_foreign = self.structure is None and all(f.suffix != ".npz" for f in self.files)
        return "out_in" if is_foreign else "in_out"

    def restore(self, read: Callable[[str], PyTree]) -> PyTree:
        """Returns the tree, or flat dict, with `read` called once per leaf."""
        values = {name: read(name) for name in self.leaves}
        if self.structure is None:
            return values
        return jax.tree.unflatten(self.structure, values.values())

    def check_unchanged_by(self, dst: Path) -> None:
        """Raises if a new file or folder `dst` would change this source."""
        if any(dst.exists() and dst.samefile(file) for file in self.files):
            raise FileExistsError(f"{str(dst)!r} is a file that is read: write to another.")
        if self.folder is None or not shards.is_part_of_folder(dst.name):
            return
        if dst.parent.exists() and dst.parent.samefile(self.folder):
            raise ValueError(
                f"{str(dst)!r} would change the content of the folder {str(self.folder)!r}, "
                "which is read: use another name."
            )


@contextlib.contextmanager
def open_source(path: Path, max_ratio: float | None = MAX_RATIO) -> Iterator[Source]:
    """Opens a file, an index of shards or a folder; leaves can be read in this context.

    The leaves must not take more than 256 MiB and `max_ratio` times the bytes on disk. None is for
    those who only look at headers.
    """
    if max_ratio is not None:
        checks.check_threshold("max_ratio", max_ratio)
    with contextlib.ExitStack() as stack:
        with checkpoint_errors(path):
            source = _open(stack, path)
            if max_ratio is not None:
                _check_ratio(source, max_ratio)

        def read(name: str) -> StoredLeaf:
            signals.check_stop()
            try:
                return source.read(name)
            except (ValueError, OverflowError, MemoryError):
                with checkpoint_errors(path):  # entered only now: it takes longer than a small leaf
                    raise

        def rows(name: str) -> StoredRows | None:
            stored = source.rows(name)
            return None if stored is None else stored.within(lambda: checkpoint_errors(path))

        yield dataclasses.replace(source, read=read, rows=rows)


def _open(stack: contextlib.ExitStack, path: Path) -> Source:
    folder = path if path.is_dir() else None
    if folder is not None:
        path = shards.find_weights(folder)
    file = stack.enter_context(_open_regular(path))
    if path.name.endswith(".safetensors.index.json"):
        return _open_shards(stack, path, file)
    if path.suffix not in _OPENERS:
        hint = " " + _OF_TORCH if path.suffix in (".pt", ".pth", ".bin", ".ckpt") else ""
        raise ValueError(f"the suffix must be {ALLOWED_SUFFIXES}.{hint}")
    size = os.fstat(file.fileno()).st_size
    source = _OPENERS[path.suffix](file, size)
    return dataclasses.replace(source, total_bytes=size, files=(path,), folder=folder)


def _check_ratio(source: Source, max_ratio: float) -> None:
    """Raises if the leaves are too large for the files that they are in."""
    num_bytes = sum(map(_bytes_in_memory, source.leaves.values()))
    if num_bytes <= ALWAYS_ALLOWED_BYTES:
        return
    on_disk = 0
    for file in source.files:
        on_disk += _bytes_on_disk(file)
        if num_bytes <= ALWAYS_ALLOWED_BYTES + max_ratio * on_disk:
            return
    raise ValueError(
        f"its arrays would take {num_bytes:,} bytes, more than max_ratio={max_ratio:g} times its "
        f"{on_disk:,} bytes on disk: it may be made to exhaust memory. If you trust it, pass a "
        "larger max_ratio."
    )


def _bytes_in_memory(leaf: Leaf) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in _parts(leaf))


def _parts(leaf: Leaf) -> Sequence[Any]:
    return jax.tree.leaves(leaf) if is_quantized(leaf) else (leaf,)


def _bytes_on_disk(path: Path) -> int:
    """Returns the size of a file without its holes, which take no place on disk."""
    # Not the number of blocks, which lags behind on some file systems.
    total = position = 0
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not hasattr(os, "SEEK_DATA"):
            return size
        try:
            while position < size:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
                position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                total += position - start
        except OSError as error:
            return total if error.errno == errno.ENXIO else size  # nothing but a hole is left
    return total


def _open_regular(path: Path) -> io.BufferedIOBase:
    """Opens a regular file; refuses others unopened, because opening them may block or act."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file.")
        # Not blocking: if the file becomes a FIFO just now, opening it still does not block.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no file {str(path)!r}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file.")
    return file


def _open_safetensors(file: io.BufferedIOBase, file_size: int) -> Source:
    return _safetensors_source(lambda: file, file_size)


def _safetensors_source(get_file: Callable[[], io.BufferedIOBase], file_size: int) -> Source:
    """Reads the header of a file; `get_file` returns it open, now and when a leaf is read."""
    file = get_file()
    prefix = file.read(8)
    length = parsing.header_length(prefix, file_size)
    contents = parsing.parse_header(prefix + file.read(length), file_size - 8 - length)
    tensors, checksums = contents.tensors, contents.checksums

    def read_from(tensor: Tensor, start: int, num_bytes: int) -> np.ndarray:
        file = get_file()
        file.seek(8 + length + start)
        try:
            stored = numpy_files.read_bytes(file, num_bytes)
            if tensor.dtype == "BOOL":
                numpy_files.check_booleans(stored)
        except ValueError as error:
            raise ValueError(f"tensor {tensor.name!r}: {error}") from error
        return stored

    def read_tensor(tensor: Tensor) -> np.ndarray:
        stored = read_from(tensor, tensor.start, tensor.num_bytes)
        if checksums and zlib.crc32(stored.data) != checksums[tensor.name]:
            raise ValueError(f"tensor {tensor.name!r}: it is damaged, its checksum differs.")
        return tensor.array_of(stored)

    def rows_of(name: str) -> StoredRows | None:
        tensor = tensors[name]
        is_plain = tensor.dtype in DTYPES and tensor.dtype != "BOOL" and math.prod(tensor.shape)
        if checksums or not is_plain or not tensor.shape:
            return None

        def read_some(start: int, num_bytes: int) -> np.ndarray:
            return read_from(tensor, tensor.start + start, num_bytes)

        return StoredRows(tensor.shape, tensor.numpy_dtype, read_some)

    if contents.leaves is None:
        return Source(
            leaves={name: tensor.outline for name, tensor in tensors.items()},
            read=lambda name: read_tensor(tensors[name]),
            num_bytes={name: tensor.num_bytes for name, tensor in tensors.items()},
            metadata=contents.metadata,
            rows=rows_of,
        )
    sizes = dict.fromkeys(contents.leaves, 0)
    for tensor in tensors.values():
        sizes[tensor.leaf] += tensor.num_bytes
    return Source(
        leaves=contents.leaves,
        read=lambda name: contents.restore_leaf(name, read_tensor),
        num_bytes=sizes,
        structure=jax.tree.structure(contents.tree, is_leaf=is_quantized),
        metadata=contents.metadata,
        masks=contents.masks,
    )


class _OpenFiles:
    """Files that are opened when they are read, a few at a time: processes may open only some."""

    def __init__(self) -> None:
        self._files: dict[Path, io.BufferedIOBase] = {}
        self._first: dict[Path, tuple[int, ...]] = {}

    def get(self, path: Path) -> io.BufferedIOBase:
        """Returns a file, which must be the same as at the first time."""
        if path in self._files:
            return self._files[path]
        while len(self._files) >= _MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        file = self._files[path] = _open_regular(path)
        status = os.fstat(file.fileno())
        now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._first.setdefault(path, now) != now:
            raise ValueError("it was changed while it was read.")
        return file

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()


def _open_shards(stack: contextlib.ExitStack, path: Path, index: io.BufferedIOBase) -> Source:
    folder = path.parent
    weight_map, total_size, total_bytes = shards.read_index(index, folder)
    files = stack.enter_context(contextlib.closing(_OpenFiles()))
    opened: dict[str, Source] = {}
    unassigned: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        get_file = functools.partial(files.get, folder / shard)
        with _shard_errors(shard):
            size = os.fstat(get_file().fileno()).st_size
            source = _safetensors_source(get_file, size)
            if source.structure is not None:
                raise ValueError("a shard must be a plain file of tensors, not one of a tree.")
        total_bytes += size
        unassigned |= {name: shard for name in source.leaves if weight_map.get(name) != shard}
        opened[shard] = source
    for name, shard in weight_map.items():
        if name not in opened[shard].leaves:
            raise ValueError(f"tensor {name!r} is missing from its shard {shard!r}.")

    def read(name: str) -> StoredLeaf:
        with _shard_errors(weight_map[name]):
            return opened[weight_map[name]].read(name)

    def rows(name: str) -> StoredRows | None:
        stored = opened[weight_map[name]].rows(name)
        return None if stored is None else stored.within(lambda: _shard_errors(weight_map[name]))

    sizes = {name: opened[shard].num_bytes[name] for name, shard in weight_map.items()}
    shards.warn_of_differences(total_size, sum(sizes.values()), unassigned)
    leaves = {name: opened[shard].leaves[name] for name, shard in weight_map.items()}
    paths = (path, *(folder / shard for shard in opened))
    metadata: dict[str, str] = {}
    for source in opened.values():
        metadata = source.metadata | metadata
    return Source(
        leaves, read, sizes, total_bytes, paths, folder=folder, metadata=metadata, rows=rows
    )


@contextlib.contextmanager
def _shard_errors(shard: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"shard {shard!r}: {error}") from error


def _open_npz(file: io.BufferedIOBase, file_size: int) -> Source:
    arrays = numpy_files.open_npz(file, file_size)
    return Source(
        leaves={n: jax.ShapeDtypeStruct(a.shape, native_dtype(a.dtype)) for n, a in arrays.items()},
        read=lambda name: _in_native_order(arrays[name].read()),
        num_bytes={name: array.num_bytes for name, array in arrays.items()},
    )


def _open_npy(file: io.BufferedIOBase, file_size: int) -> Source:
    array = numpy_files.open_npy(file, file_size)
    return Source(
        leaves={"array": jax.ShapeDtypeStruct(array.shape, native_dtype(array.dtype))},
        read=lambda _: _in_native_order(array.read()),
        num_bytes={"array": array.num_bytes},
        structure=jax.tree.structure(0),
    )


def _in_native_order(array: np.ndarray) -> np.ndarray:
    return array.astype(native_dtype(array.dtype), copy=False)


_OPENERS: dict[str, Callable[[io.BufferedIOBase, int], Source]] = {
    ".safetensors": _open_safetensors,
    ".npz": _open_npz,
    ".npy": _open_npy,
}
