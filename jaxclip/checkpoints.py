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
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxclip import archives
from jaxclip.atomic import replacing
from jaxclip.coding import check_coding
from jaxclip.compression import SizeReport, compress, decompress, report_plan
from jaxclip.file_reports import FileReport, report_source
from jaxclip.grids import Bits
from jaxclip.headers import header_size
from jaxclip.layout import check_has_values, plan_file
from jaxclip.matching import match_leaves
from jaxclip.progress import byte_bar
from jaxclip.quantization import QuantizedArray, dequantize
from jaxclip.sources import SUFFIXES, open_source
from jaxclip.threshold_rules import mse_optimal
from jaxclip.thresholds import check_threshold_tree, resolve_threshold
from jaxclip.weights import clip_weights
from jaxclip.writing import write_tree

__all__ = [
    "CheckpointError",
    "clip_checkpoint",
    "compress_checkpoint",
    "decompress_checkpoint",
    "inspect",
    "load",
    "save",
]


class CheckpointError(ValueError):
    """A file is damaged, of a foreign kind or of a newer version; names file and tensor."""


def save(
    path: str | os.PathLike, tree: Any, *, coding: str | None = None, overwrite: bool = False
) -> None:
    """Writes a tree to a file: all of it or nothing, whatever happens on the way.

    The file is written under a temporary name in the same directory, tensor by tensor,
    synced to disk and renamed. After a crash at any moment the name holds the old file or
    the new one; a leftover temporary file is removed by the next save to the same path.
    Equal trees give equal bytes (coded by Huffman: with one version of zlib).

    Args:
      path: Where to; the suffix decides the format: `.safetensors` for any tree, `.npz` for
        (nested) dicts of arrays, `.npy` for one array. NumPy's formats have no bfloat16.
      tree: Nested dicts, lists, tuples and None with arrays and `QuantizedArray` leaves.
      coding: How the codes of low-bit leaves are stored where that is smaller: "huffman",
        which every Python reads, or "ans", of the size of their entropy (needs the extra
        `coding`). None packs them at their width. For `.safetensors`.
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
        raise ValueError(f"path must end in {SUFFIXES}, got {str(path)!r}.")
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
        return report_source(str(path), source)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What is wrong with a file is a `CheckpointError` with its name."""
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from error


# --- Leaf by leaf -----------------------------------------------------------------------


def compress_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    bits: Bits = 4,
    *,
    rule: Any = mse_optimal,
    axis: int | tuple[int, ...] | None = 0,
    group_size: int | None = None,
    full_signed: bool = True,
    policy: Sequence[tuple[str, Bits | None]] = (),
    coding: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> SizeReport:
    """Compresses a file or folder of weights to one low-bit file, leaf by leaf.

    Memory is bounded by a few times the largest leaf, however large the checkpoint. The new
    file appears when it is complete; after a crash or an interrupt there is none, and the
    source is never written to.

    Args:
      src: As in `load`. Leaves that are low-bit already are copied.
      dst: The `.safetensors` file to write.
      bits: As in `compress`.
      rule: As in `compress`; a rule that looks at more than one leaf is not possible here.
      axis: As in `compress`, but 0 by default: PyTorch's layouts have the output channel
        first, where flax's have it last.
      group_size: As in `compress`.
      full_signed: As in `compress`.
      policy: As in `compress`, on the names in the source.
      coding: As in `save`.
      overwrite: Whether an existing file may be replaced.
      dry_run: Whether to write nothing and only return the sizes. Without `coding` they
        follow from shapes, and no weight is read.
      progress: Whether to show a bar where there is a terminal or a notebook, and rich.

    Returns:
      A `SizeReport`; `total_bytes` is the size of the file.

    Raises:
      CheckpointError: As in `load`.
      FileExistsError: As in `save`; also if `dst` is one of the files that are read, under
        any name.
      ValueError: As in `compress`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> folder = tempfile.TemporaryDirectory()
      >>> source = folder.name + "/net.npz"
      >>> save(source, {"kernel": np.ones((64, 64), np.float32)})
      >>> report = compress_checkpoint(source, folder.name + "/small.safetensors", "ternary")
      >>> report.raw_bytes, report.leaves[0].stored_bytes
      (16384, 1076)
      >>> folder.cleanup()
    """
    grid: dict[str, Any] = {"axis": axis, "group_size": group_size, "full_signed": full_signed}

    def outline(tree: Any) -> Any:
        small = jax.eval_shape(lambda t: compress(t, bits, rule=rule, policy=policy, **grid), tree)
        # Others stay as they are: tracing would give int64 another dtype.
        return {n: x if isinstance(x, QuantizedArray) else tree[n] for n, x in small.items()}

    def compress_leaf(name: str, leaf: Any, like: Any) -> Any:
        if not isinstance(like, QuantizedArray) or isinstance(leaf, QuantizedArray):
            return leaf
        # The policy has chosen the width; one leaf has one path, its name.
        return compress({name: leaf}, like.bits, rule=rule, policy=[("", like.bits)], **grid)[name]

    return _rewrite(src, dst, outline, compress_leaf, coding, overwrite, dry_run, progress)


def decompress_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: Any = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> SizeReport:
    """Writes the arrays that a low-bit file stands for to a plain `.safetensors` file.

    Any library that reads safetensors loads it, by the names that `inspect` shows.

    Args:
      src: As in `load`.
      dst: The `.safetensors` file to write.
      dtype: Floating dtype for the leaves that were compressed; None for their own.
      overwrite: Whether an existing file may be replaced.
      progress: As in `compress_checkpoint`.

    Returns:
      A `SizeReport`.

    Raises:
      CheckpointError: As in `load`.
      FileExistsError: As in `compress_checkpoint`.

    Example:
      >>> decompress_checkpoint("small.safetensors", "net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'small.safetensors'.
    """

    def outline(tree: Any) -> Any:
        arrays = {n: x for n, x in tree.items() if isinstance(x, QuantizedArray)}
        return tree | jax.eval_shape(lambda t: decompress(t, dtype), arrays)

    def decompress_leaf(name: str, leaf: Any, like: Any) -> Any:
        del name, like
        return dequantize(leaf, dtype) if isinstance(leaf, QuantizedArray) else leaf

    return _rewrite(src, dst, outline, decompress_leaf, None, overwrite, False, progress)


def clip_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    threshold: Any,
    *,
    include: str = "",
    overwrite: bool = False,
    progress: bool = True,
) -> SizeReport:
    """Writes the weights of a file or folder, clipped to `[-threshold, threshold]`.

    Args:
      src: As in `load`; low-bit leaves are copied.
      dst: The `.safetensors` file to write.
      threshold: Number in [0, inf] or a rule, as in `clip_weights`.
      include: Regular expression; leaves whose name it matches are clipped.
      overwrite: Whether an existing file may be replaced.
      progress: As in `compress_checkpoint`.

    Returns:
      A `SizeReport`.

    Raises:
      CheckpointError: As in `load`.
      FileExistsError: As in `compress_checkpoint`.
      TypeError: If the threshold is of a wrong type.
      ValueError: If the threshold is negative or NaN, or `include` matches no leaf.

    Example:
      >>> clip_checkpoint("net.safetensors", "clipped.safetensors", 0.1)
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    check_threshold_tree("threshold", threshold)
    pattern = re.compile(include)

    def outline(tree: Any) -> Any:
        if not any(pattern.search(name) for name in tree):
            raise ValueError(f"include={include!r} matches no leaf.")
        return tree

    def clip_leaf(name: str, leaf: Any, like: Any) -> Any:
        del like
        if isinstance(leaf, QuantizedArray) or not pattern.search(name):
            return leaf
        if leaf.dtype == np.float64:  # which jax may not have
            t = np.asarray(resolve_threshold(threshold, leaf), np.float64)
            return np.clip(leaf, -t, t)
        return clip_weights(leaf, threshold)

    return _rewrite(src, dst, outline, clip_leaf, None, overwrite, False, progress)


def _rewrite(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    outline: Callable[[dict[str, Any]], dict[str, Any]],
    rewrite_leaf: Callable[[str, Any, Any], Any],
    coding: str | None,
    overwrite: bool,
    dry_run: bool,
    progress: bool,
) -> SizeReport:
    """Writes what `rewrite_leaf` makes of each leaf; `outline` tells its shapes before."""
    src, dst = Path(src), Path(dst)
    check_coding(coding)
    if dst.suffix != ".safetensors":
        raise ValueError(f"dst must end in .safetensors, got {str(dst)!r}.")
    with contextlib.ExitStack() as stack:
        with _naming(src):
            source = stack.enter_context(open_source(src))
        if any(dst.exists() and dst.samefile(file) for file in source.files):
            raise FileExistsError(f"'{dst}' is a file that is read: write to another.")
        outlined = outline(source.leaves)
        plan = plan_file(source.restore(outlined.__getitem__))
        if dry_run and coding is None:
            return report_plan(plan, header_size(plan, None))
        advance = stack.enter_context(byte_bar(sum(source.num_bytes.values()), progress))

        def produce(name: str) -> Any:
            with _naming(src):
                leaf = source.read(name)
            advance(source.num_bytes[name])
            return rewrite_leaf(name, leaf, outlined[name])

        nowhere = Path(os.devnull)
        target = nowhere.open("wb") if dry_run else replacing(dst, overwrite)
        final = write_tree(stack.enter_context(target), plan, produce, coding)
    return report_plan(final, header_size(plan, coding))


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
    ".npz": lambda tree, _: archives.prepare_npz(tree),
    ".npy": lambda tree, _: archives.prepare_npy(tree),
}
