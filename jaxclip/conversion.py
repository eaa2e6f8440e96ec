"""Files of weights rewritten leaf by leaf: compressed, decompressed, clipped.

Memory is bounded by the largest leaf. The new file appears when it is complete; what is read
is never written to.
"""

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.atomic import replacing
from jaxclip.coding import check_coding
from jaxclip.compression import compress, decompress
from jaxclip.grids import Bits
from jaxclip.headers import header_size
from jaxclip.layout import leaf_name, plan_file
from jaxclip.progress import byte_bar
from jaxclip.quantization import QuantizedArray, dequantize
from jaxclip.sizes import SizeReport, report_plan
from jaxclip.sources import open_source
from jaxclip.threshold_rules import mse_optimal
from jaxclip.thresholds import check_threshold_tree, resolve_threshold
from jaxclip.weights import clip_weights
from jaxclip.writing import write_tree

__all__ = ["clip_checkpoint", "compress_checkpoint", "decompress_checkpoint"]

_PART_BYTES = 2**24
"""Bytes of a leaf that are compressed at a time where its rows have scales of their own."""


def compress_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    bits: Bits = 4,
    *,
    rule: Any = mse_optimal,
    axis: int | tuple[int, ...] | None = 0,
    group_size: int | None = None,
    full_signed: bool = True,
    zero_point: bool = False,
    scale_dtype: Any = "float32",
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
      zero_point: As in `compress`.
      scale_dtype: As in `compress`.
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
      >>> from jaxclip.checkpoints import save
      >>> folder = tempfile.TemporaryDirectory()
      >>> source = folder.name + "/net.npz"
      >>> save(source, {"kernel": np.ones((64, 64), np.float32)})
      >>> report = compress_checkpoint(source, folder.name + "/small.safetensors", "ternary")
      >>> report.raw_bytes, report.leaves[0].stored_bytes
      (16384, 1076)
      >>> folder.cleanup()
    """
    grid: dict[str, Any] = {
        "axis": axis,
        "group_size": group_size,
        "full_signed": full_signed,
        "zero_point": zero_point,
        "scale_dtype": scale_dtype,
    }

    def outline(tree: Any) -> Any:
        small = jax.eval_shape(lambda t: compress(t, bits, rule=rule, policy=policy, **grid), tree)
        # Others stay as they are: tracing would give int64 another dtype.
        return {n: x if isinstance(x, QuantizedArray) else tree[n] for n, x in small.items()}

    def compress_leaf(name: str, leaf: Any, like: Any) -> Any:
        if not isinstance(like, QuantizedArray) or isinstance(leaf, QuantizedArray):
            return leaf

        def compress_part(part: Any) -> QuantizedArray:
            # The policy has chosen the width; one leaf has one path, its name.
            options: Any = {**grid, "rule": rule, "policy": [("", like.bits)]}
            return compress({name: part}, like.bits, **options)[name]

        has_own_scales = like.scale.shape[:1] == like.shape[:1]
        is_joint = not getattr(rule, "is_blockwise", True) or like.scale_dtype == "log8"
        if not has_own_scales or is_joint:  # log8 has a unit for the whole array
            return compress_part(leaf)
        return _by_rows(leaf, like, compress_part)

    return _rewrite(src, dst, outline, compress_leaf, coding, overwrite, dry_run, progress)


def _by_rows(
    leaf: np.ndarray, like: QuantizedArray, compress_part: Callable[[Any], QuantizedArray]
) -> QuantizedArray:
    """Compresses some rows at a time, as no scale is shared between them: bounds the memory."""
    num_rows = max(_PART_BYTES // max(leaf[:1].nbytes, 1), 1)
    if len(leaf) <= num_rows:
        return compress_part(leaf)
    whole = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), like)
    for start in range(0, len(leaf), num_rows):
        part = leaf[start : start + num_rows]
        if not np.isfinite(part).all():
            return compress_part(leaf)  # which names the entry by its place in the leaf
        # All parts have one shape, so that one program serves them.
        padding = [(0, num_rows - len(part))] + [(0, 0)] * (leaf.ndim - 1)
        small = compress_part(np.pad(part, padding) if len(part) < num_rows else part)
        for target, rows in zip(jax.tree.leaves(whole), jax.tree.leaves(small), strict=True):
            target[start : start + len(part)] = np.asarray(rows)[: len(part)]
    return whole


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
        source = stack.enter_context(open_source(src))
        if any(dst.exists() and dst.samefile(file) for file in source.files):
            raise FileExistsError(f"'{dst}' is a file that is read: write to another.")
        outlined = outline(source.leaves)
        plan = plan_file(source.restore(outlined.__getitem__))
        if dry_run and coding is None:
            return report_plan(plan, header_size(plan, None))
        advance = stack.enter_context(byte_bar(sum(source.num_bytes.values()), progress))
        # The names of others are keys of a flat dict here, in which "/" is written otherwise.
        is_flat = source.structure is None
        names = {leaf_name((name,)) if is_flat else name: name for name in source.leaves}

        def produce(name_in_plan: str) -> Any:
            name = names[name_in_plan]
            leaf = source.read(name)
            advance(source.num_bytes[name])
            return rewrite_leaf(name, leaf, outlined[name])

        nowhere = Path(os.devnull)
        target = nowhere.open("wb") if dry_run else replacing(dst, overwrite)
        final = write_tree(stack.enter_context(target), plan, produce, coding)
    return report_plan(final, header_size(plan, coding))
