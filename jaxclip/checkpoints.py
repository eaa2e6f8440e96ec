"""Files: trees of arrays and low-bit arrays, saved whole or not at all, read with suspicion.

    .safetensors   any tree, `QuantizedArray` leaves included; a checksum for every byte
    .npz           (nested) dicts of arrays; names joined by "/"
    .npy           one array

A file appears under its name only when it is complete and on disk: it is written beside
its place, synced and renamed. Nothing is ever unpickled. What is read is checked before
it is believed, and memory is never claimed on the word of a header alone.
"""

import contextlib
import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp

from jaxclip import archives, headers, layout
from jaxclip.atomic import replacing
from jaxclip.grids import Bits
from jaxclip.matching import match_leaves
from jaxclip.quantization import QuantizedArray
from jaxclip.sources import SUFFIXES, open_source

__all__ = ["CheckpointError", "FileReport", "TensorReport", "inspect", "load", "save"]


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
      >>> import numpy as np
      >>> folder = tempfile.TemporaryDirectory()
      >>> save(folder.name + "/net.safetensors", {"bias": np.zeros(2, np.float32)})
      >>> load(folder.name + "/net.safetensors")
      {'bias': array([0., 0.], dtype=float32)}
      >>> folder.cleanup()
    """
    path = Path(path)
    if path.suffix not in _PREPARERS:
        raise ValueError(f"path must end in {SUFFIXES}, got {str(path)!r}.")
    with replacing(path, overwrite) as file:
        write = _PREPARERS[path.suffix](tree)  # refuses what it cannot hold before any writing
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
        `jax.device_put`. None leaves NumPy arrays.

    Returns:
      NumPy arrays throughout, or jax arrays on `device`. For our `.safetensors` files the
      tree that was saved, with its `QuantizedArray` leaves; for others, folders and `.npz`, a
      flat dict from name to array; for `.npy` an array.

    Raises:
      CheckpointError: If the file is damaged, not what its suffix says, of a newer version,
        or not a regular file. `.npy` files have no checksum, so damage to values goes unseen.
      ValueError: If the file does not hold what `like` does; names the first difference.
      FileNotFoundError: If there is no file.
      OSError: If the disk refuses.

    Example:
      >>> load("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        with _naming(path):
            source = stack.enter_context(open_source(path))
            names = None if like is None else match_leaves(like, source)

        def read(name: str) -> Any:
            with _naming(path):
                leaf = source.read(name)
            return leaf if device is None else jax.device_put(leaf, device)

        if names is None:
            return source.restore(read)
        structure = jax.tree.structure(like, is_leaf=lambda x: isinstance(x, QuantizedArray))
        return jax.tree.unflatten(structure, [read(name) for name in names])


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One leaf of a file.

    Attributes:
      path: Its name in the file.
      shape: Shape of the array.
      dtype: Dtype of the array, `float32`.
      bits: Width of its codes, or None if it is stored as it is.
      num_bytes: Bytes that it takes in the file.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    bits: Bits | None
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What a file or folder of weights holds; `print` it for a table.

    Attributes:
      path: The file or folder.
      tensors: One `TensorReport` a leaf.
    """

    path: str
    tensors: tuple[TensorReport, ...]

    @property
    def num_weights(self) -> int:
        """Entries of all arrays."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes that all leaves take, without headers."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def __str__(self) -> str:
        width = max([len(tensor.path) for tensor in self.tensors] + [12])
        lines = [f"{'leaf':<{width}} {'shape':>16} {'dtype':>9} {'bits':>8} {'bytes':>13}"]
        lines += [
            f"{t.path:<{width}} {'x'.join(map(str, t.shape)) or 'scalar':>16} {t.dtype:>9} "
            f"{t.bits or 'as is':>8} {t.num_bytes:>13,}"
            for t in self.tensors
        ]
        totals = f"{len(self.tensors):,} leaves, {self.num_weights:,} entries"
        return "\n".join([*lines, f"{totals:<{width + 36}} {self.num_bytes:>13,}"])


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
    path = Path(path)
    with _naming(path), open_source(path) as source:
        tensors = tuple(
            TensorReport(
                path=name,
                shape=tuple(leaf.shape),
                dtype=jnp.dtype(leaf.dtype).name,
                bits=leaf.bits if isinstance(leaf, QuantizedArray) else None,
                num_bytes=source.num_bytes[name],
            )
            for name, leaf in source.leaves.items()
        )
    return FileReport(str(path), tensors)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What is wrong with a file is a `CheckpointError` with its name."""
    try:
        yield
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


_PREPARERS = {
    ".safetensors": _prepare_safetensors,
    ".npz": archives.prepare_npz,
    ".npy": archives.prepare_npy,
}
