"""Files: trees of arrays and low-bit arrays, saved whole or not at all, read with suspicion.

    .safetensors   any tree, `QuantizedArray` leaves included; a checksum for every byte
    .npz           (nested) dicts of arrays; names joined by "/"
    .npy           one array

A file appears under its name only when it is complete and on disk: it is written beside
its place, synced and renamed. Nothing is ever unpickled. What is read is checked before
it is believed, and memory is never claimed on the word of a header alone.
"""

import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxclip import archives, headers, layout
from jaxclip.atomic import replacing

__all__ = ["CheckpointError", "load", "save"]

_SUFFIXES = ".safetensors, .npz or .npy"


class CheckpointError(ValueError):
    """A file is damaged, of a foreign kind or of a newer version; names file and tensor."""


def save(path: str | os.PathLike, tree: Any, *, overwrite: bool = False) -> None:
    """Writes a tree to a file: all of it or nothing, whatever happens on the way.

    The file is written under a temporary name in the same directory, tensor by tensor,
    synced to disk and renamed. After a crash at any moment the name holds the old file or
    the new one; a leftover temporary file is removed by the next save to the same path.
    Equal trees give equal bytes.

    Args:
      path: Where to; the suffix decides the format: `.safetensors` for any tree, `.npz` for
        (nested) dicts of arrays, `.npy` for one array. NumPy's formats have no bfloat16.
      tree: Nested dicts, lists, tuples and None with arrays and `QuantizedArray` leaves.
      overwrite: Whether an existing file may be replaced; its permissions are kept.

    Raises:
      FileExistsError: If `path` exists and `overwrite` is False, or is not a regular file
        (a directory, symlink, FIFO or device is never replaced).
      FileNotFoundError: If the directory does not exist.
      TypeError: If the format cannot hold a leaf or a node; the message names it.
      ValueError: If the suffix is unknown, or a leaf or key is not valid.
      OSError: If the disk is full or refuses. The old file is intact.

    Example:
      >>> import tempfile
      >>> folder = tempfile.TemporaryDirectory()
      >>> save(folder.name + "/net.safetensors", {"bias": np.zeros(2, np.float32)})
      >>> load(folder.name + "/net.safetensors")
      {'bias': array([0., 0.], dtype=float32)}
      >>> folder.cleanup()
    """
    path = Path(path)
    if path.suffix not in _PREPARERS:
        raise ValueError(f"path must end in {_SUFFIXES}, got {str(path)!r}.")
    with replacing(path, overwrite) as file:
        write = _PREPARERS[path.suffix](tree)  # refuses what it cannot hold before any writing
        write(file)


def load(path: str | os.PathLike) -> Any:
    """Reads a file that `save` wrote, or any `.safetensors`, `.npz` or `.npy` file of arrays.

    Args:
      path: The file; the suffix decides the format.

    Returns:
      NumPy arrays throughout. For our `.safetensors` files the tree that was saved, with its
      `QuantizedArray` leaves; for others, and for `.npz`, a flat dict from name to array;
      for `.npy` an array.

    Raises:
      CheckpointError: If the file is damaged, not what its suffix says, of a newer version,
        or not a regular file. `.npy` files have no checksum, so damage to values goes unseen.
      FileNotFoundError: If there is no file.
      OSError: If the disk refuses.

    Example:
      >>> load("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    path = Path(path)
    with _open_regular(path) as file:
        if path.suffix not in _READERS:
            raise CheckpointError(f"{path}: the suffix must be {_SUFFIXES}.")
        try:
            return _READERS[path.suffix](file, os.fstat(file.fileno()).st_size)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}: {error}") from error


# --- Writers: a tree is checked first, what is returned writes it ------------------------


def _prepare_safetensors(tree: Any) -> Callable[[BinaryIO], None]:
    plan = layout.plan_file(tree)
    header_size = len(headers.make_header(plan))
    for name, leaf in plan.leaves.items():
        for array in jax.tree.leaves(leaf):
            layout.check_has_values(name, array)

    def write(file: BinaryIO) -> None:
        file.write(bytes(header_size))  # zeros until the checksums are known
        checksums = {}
        for tensor in plan.tensors:
            checksum = 0
            for chunk in plan.chunks(tensor):
                checksum = zlib.crc32(chunk.data, checksum)
                file.write(chunk.data)
            checksums[tensor.name] = checksum
        file.seek(0)
        file.write(headers.make_header(plan, checksums))

    return write


# --- Readers ----------------------------------------------------------------------------


def _open_regular(path: Path) -> BinaryIO:
    """Opens a regular file; others are refused unopened, as opening may wait or act."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: not a regular file.")
        # Should it become a FIFO now, opening still does not wait.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no file '{path}'.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{path}: not a regular file.")
    return file


def _read_safetensors(file: BinaryIO, file_size: int) -> Any:
    prefix = file.read(8)
    length = headers.header_length(prefix, file_size)
    contents = headers.parse_header(prefix + file.read(length), file_size - 8 - length)

    def read(tensor: layout.Tensor) -> np.ndarray:
        file.seek(8 + length + tensor.start)
        try:
            array = archives.read_array(file, tensor.numpy_dtype, tensor.shape)
        except ValueError as error:
            raise ValueError(f"tensor {tensor.name!r}: {error}") from error
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data)
        if contents.checksums and checksum != contents.checksums[tensor.name]:
            raise ValueError(f"tensor {tensor.name!r}: it is damaged, its checksum differs.")
        return array

    return contents.restore(read)


_PREPARERS = {
    ".safetensors": _prepare_safetensors,
    ".npz": archives.prepare_npz,
    ".npy": archives.prepare_npy,
}
_READERS: dict[str, Callable[[BinaryIO, int], Any]] = {
    ".safetensors": _read_safetensors,
    ".npz": archives.read_npz,
    ".npy": archives.read_npy,
}
