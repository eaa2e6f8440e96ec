"""Files: trees of arrays and low-bit arrays, saved whole or not at all, read with suspicion.

    .safetensors   any tree, `QuantizedArray` leaves included; a checksum for every byte
    .npz           (nested) dicts of arrays; names joined by "/"
    .npy           one array

A file appears under its name only when it is complete and on disk: it is written beside
its place, synced and renamed. Nothing is ever unpickled. What is read is checked before
it is believed, and memory is never claimed on the word of a header alone.
"""

import contextlib
import os
import platform
import re
import secrets
import stat
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxclip import archives, headers, layout

__all__ = ["CheckpointError", "load", "save"]

_SUFFIXES = ".safetensors, .npz or .npy"
# A temporary file that nobody has written to for this long belongs to nobody.
_STALE_SECONDS = 24 * 3600


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
    mode = _check_target(path, overwrite)
    write = _PREPARERS[path.suffix](tree)  # refuses what it cannot hold before any writing
    _remove_stale(path)
    temporary = path.with_name(
        f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.jaxclip-tmp"
    )
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            if mode is not None:
                os.chmod(temporary, mode)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path, overwrite)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        error.add_note(f"jaxclip: while saving {path}; a file that was there is unchanged.")
        raise
    _sync_directory(path.parent)


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


# --- Whole or not at all --------------------------------------------------------------


def _check_target(path: Path, overwrite: bool) -> int | None:
    """Raises unless `path` may be written; the permissions of the file that is replaced."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory '{path.parent}' to save '{path}' in.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the directory '{path.parent}' cannot be written to.")
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError(f"'{path}' is not a regular file, so it is not replaced.")
    if not overwrite:
        raise FileExistsError(f"'{path}' exists; pass overwrite=True to replace it.")
    return stat.S_IMODE(status.st_mode)


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Gives the finished file its name; without `overwrite` only if nobody has it yet."""
    if overwrite:
        _check_target(path, overwrite)
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        _check_target(path, overwrite)
        raise
    except OSError:  # a file system without hard links: a check and a rename must do
        _check_target(path, overwrite)
        os.replace(temporary, path)
    else:
        with contextlib.suppress(OSError):  # published already; the next save tidies up
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(handle)
    finally:
        os.close(handle)


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _remove_stale(path: Path) -> None:
    """Removes temporary files that writers of the same path left when they were killed."""
    ours = re.compile(
        rf"\.{re.escape(path.name)}\.([0-9a-f]{{8}})-([0-9]{{1,10}})-[0-9a-f]{{8}}\.jaxclip-tmp"
    )
    with os.scandir(path.parent) as entries:
        matches = [(entry, ours.fullmatch(entry.name)) for entry in entries]
    for entry, match in matches:
        with contextlib.suppress(OSError):
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            died_here = match[1] == _host() and not _is_alive(int(match[2]))
            if died_here or age > _STALE_SECONDS:
                os.unlink(entry.path)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not a mere question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


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
