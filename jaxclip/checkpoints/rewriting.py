"""Files of weights rewritten leaf by leaf: compressed, decompressed, clipped.

Memory is bounded by the largest leaf. The new file appears when it is complete; what is read
is never written to.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip._core.atomic import check_destination, replacing
from jaxclip._core.extras import progress_bar
from jaxclip._core.grids import Bits, Grid
from jaxclip.checkpoints.format.headers import header_size
from jaxclip.checkpoints.format.layout import leaf_name, plan_file
from jaxclip.checkpoints.format.writing import write_plain, write_tree
from jaxclip.checkpoints.reading import Source, open_source
from jaxclip.checkpoints.rows import compress_leaf, outline_leaf
from jaxclip.checkpoints.sizes import SizeReport, report_plan, with_errors
from jaxclip.lowbit.arrays import QuantizedArray, dequantize, is_quantized
from jaxclip.lowbit.budgets import (
    ALL_WIDTHS,
    Budget,
    Option,
    check_budget,
    outline_of,
    widths_within_average,
    widths_within_file,
)
from jaxclip.lowbit.distortion import QuantizationError, quantization_error
from jaxclip.lowbit.entropy_coding import check_coding
from jaxclip.lowbit.policies import LeafSpec, Policy, leaf_specs
from jaxclip.lowbit.trees import decompress
from jaxclip.thresholds.by_error import mse_optimal
from jaxclip.thresholds.values import check_one_threshold, resolve_threshold
from jaxclip.weights.clipping import clip_weights


def compress_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    bits: Bits | Grid | None = None,
    *,
    target_bits_per_weight: float | None = None,
    target_bytes: int | None = None,
    rule: Any = mse_optimal,
    bit_price: float = 0.0,
    policy: Policy = (),
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
      bits: A `Grid`, or a width as in `compress`, with one scale for each index along the first
        axis: PyTorch's layouts have the output channel first, where flax's have it last.
      target_bits_per_weight: As in `compress`. With a target the weights are read twice: first
        to measure their errors at every width.
      target_bytes: As in `compress`. With a `coding` the file is at most as large as this.
      rule: As in `compress`; a rule that looks at more than one leaf is not possible here.
      bit_price: As in `compress`, with a `coding` only; leaves are then compressed whole.
      policy: As in `compress`, on the names in the source.
      coding: As in `save`.
      overwrite: Whether an existing file may be replaced.
      dry_run: Whether to write nothing and only return the sizes. Without `coding` they
        follow from shapes, and no weight is read unless a target needs it.
      progress: Whether to show a bar where there is a terminal or a notebook, and rich.

    Returns:
      A `SizeReport` with what each leaf lost, as `size_report(original=)` has it, unless no
      weight was read or written; `total_bytes` is the size of the file.

    Raises:
      CheckpointError: As in `load`.
      TypeError: As in `compress`.
      FileExistsError: As in `save`; also if `dst` is one of the files that are read, under
        any name.
      ValueError: As in `compress`; also if a leaf has a price and there is no `coding`, or `dst`
        lies in a folder that is read and has the name of a numbered shard or `model.safetensors`.

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
    grid = bits if isinstance(bits, Grid) else Grid(bits, axis=0)
    budget = check_budget(grid.bits, target_bits_per_weight, target_bytes)
    if budget is None and grid.bits is None:
        grid = dataclasses.replace(grid, bits=4)
    default = LeafSpec(grid, rule, bit_price)
    specs: dict[str, LeafSpec] = {}

    def outline(source: Source) -> dict[str, Any]:
        names, leaves = list(source.leaves), list(source.leaves.values())
        found = leaf_specs(names, leaves, policy, default)
        specs.update({name: spec for name, spec in zip(names, found, strict=True) if spec})
        priced = [name for name, spec in specs.items() if spec.has_price]
        if coding is None and priced:
            raise ValueError(
                "bit_price needs a coding: packed codes take the same bytes at any price, and "
                f"leaf '{priced[0]}' has one."
            )
        if budget is not None:
            specs.update(_allocated(budget, source, specs, coding))
        return source.leaves | {n: outline_leaf(source.leaves[n], s, n) for n, s in specs.items()}

    def rewrite_leaf(name: str, leaf: Any) -> tuple[Any, QuantizationError | None]:
        if name in specs:
            return compress_leaf(leaf, specs[name], name)
        return leaf, quantization_error(leaf, leaf)

    num_passes = 1 if budget is None else 2
    return _rewrite(
        src, dst, outline, rewrite_leaf, coding, overwrite, dry_run, progress, num_passes
    )


def _allocated(
    budget: Budget, source: Source, specs: dict[str, LeafSpec], coding: str | None
) -> dict[str, LeafSpec]:
    """The specs that had no width, with the one that the budget gives: a pass over the leaves."""
    free = [name for name, spec in specs.items() if spec.grid.bits is None]
    small = {n: outline_leaf(source.leaves[n], s, n) for n, s in specs.items() if n not in free}
    small = source.leaves | small
    measured = []
    for name in free:
        leaf, options = source.read(name), []
        for width in ALL_WIDTHS:
            q, error = compress_leaf(leaf, specs[name], name, width)
            assert error is not None
            options.append(Option(outline_of(q), plan_file(q).data_bytes, error.squared_error))
        measured.append(options)

    def file_bytes(outlines: list[QuantizedArray]) -> int:
        tree = small | dict(zip(free, outlines, strict=True))
        plan = plan_file(source.restore(tree.__getitem__))
        return header_size(plan, coding) + plan.data_bytes

    if budget.bits_per_weight is not None:
        fixed = [leaf for leaf in small.values() if is_quantized(leaf)]
        widths = widths_within_average(budget.bits_per_weight, measured, fixed)
    else:
        assert budget.num_bytes is not None
        widths = widths_within_file(budget.num_bytes, measured, file_bytes)
    return {name: specs[name].with_bits(w) for name, w in zip(free, widths, strict=True)}


def decompress_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: Any = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> SizeReport:
    """Writes the arrays that a low-bit file stands for to a plain `.safetensors` file.

    Any library that reads safetensors loads it, by the names that `inspect` shows; the keys of
    one dict of arrays, such as the tensors of a file of another library, keep their names as they
    are, and with "/", "%" or ":" in one of them the file has no checksums.

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
      ValueError: If `dst` has another suffix, or a name as in `compress_checkpoint`.

    Example:
      >>> decompress_checkpoint("small.safetensors", "net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'small.safetensors'.
    """

    def outline(source: Source) -> dict[str, Any]:
        arrays = {n: x for n, x in source.leaves.items() if is_quantized(x)}
        return source.leaves | jax.eval_shape(lambda t: decompress(t, dtype), arrays)

    def decompress_leaf(name: str, leaf: Any) -> tuple[Any, None]:
        del name
        return dequantize(leaf, dtype) if is_quantized(leaf) else leaf, None

    return _rewrite(
        src, dst, outline, decompress_leaf, None, overwrite, False, progress, is_plain=True
    )


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

    Names stay as `decompress_checkpoint` says.

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
      ValueError: If the threshold is negative or NaN, `include` matches no leaf, or as in
        `decompress_checkpoint`.

    Example:
      >>> clip_checkpoint("net.safetensors", "clipped.safetensors", 0.1)
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    check_one_threshold("threshold", threshold)
    pattern = re.compile(include)

    def outline(source: Source) -> dict[str, Any]:
        if not any(pattern.search(name) for name in source.leaves):
            raise ValueError(f"include={include!r} matches no leaf.")
        return source.leaves

    def clip_leaf(name: str, leaf: Any) -> tuple[Any, None]:
        if is_quantized(leaf) or not pattern.search(name):
            return leaf, None
        if leaf.dtype == np.float64:  # which jax may not have
            t = np.asarray(resolve_threshold(threshold, leaf), np.float64)
            return np.clip(leaf, -t, t), None
        return clip_weights(leaf, threshold), None

    return _rewrite(src, dst, outline, clip_leaf, None, overwrite, False, progress, is_plain=True)


def _rewrite(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    outline: Callable[[Source], dict[str, Any]],
    rewrite_leaf: Callable[[str, Any], tuple[Any, QuantizationError | None]],
    coding: str | None,
    overwrite: bool,
    dry_run: bool,
    progress: bool,
    num_passes: int = 1,
    is_plain: bool = False,
) -> SizeReport:
    """Writes what `rewrite_leaf` makes of each leaf; `outline` tells its shapes before.

    With `is_plain` tensors have the names that they have in the source. A file of ours writes
    some characters otherwise: where there are any, the file is one of no origin.
    """
    src, dst = Path(src), Path(dst)
    check_coding(coding)
    if dst.suffix != ".safetensors":
        raise ValueError(f"dst must end in .safetensors, got {str(dst)!r}.")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(src))
        source.check_unchanged_by(dst)
        if not dry_run:
            check_destination(dst, overwrite)
        needs_no_weights = dry_run and coding is None
        num_passes -= needs_no_weights
        num_bytes = num_passes * sum(source.num_bytes.values())
        bar = progress_bar(num_bytes, progress and num_passes > 0, is_in_bytes=True)
        advance = stack.enter_context(bar)

        def read(name: str) -> Any:
            leaf = source.read(name)
            advance(source.num_bytes[name])
            return leaf

        outlined = outline(dataclasses.replace(source, read=read))
        plan = plan_file(source.restore(outlined.__getitem__))
        if needs_no_weights:
            return report_plan(plan, header_size(plan, None))
        flat = _flat_names(source)
        names = {leaf_name((key,)): name for key, name in flat.items()} if flat else {}
        errors: dict[str, QuantizationError | None] = {}

        def produce(name: str) -> Any:
            leaf, errors[name] = rewrite_leaf(names.get(name, name), read(names.get(name, name)))
            return leaf

        if is_plain and any(leaf_name((key,)) != key for key in flat):
            specs = {key: outlined[name] for key, name in flat.items()}
            if not any(is_quantized(spec) for spec in specs.values()):
                file = stack.enter_context(replacing(dst, overwrite))
                size = write_plain(file, specs, lambda key: produce(leaf_name((key,))))
                return _renamed(report_plan(plan, size), {leaf_name((key,)): key for key in flat})
        nowhere = Path(os.devnull)
        target = nowhere.open("wb") if dry_run else replacing(dst, overwrite)
        final = write_tree(stack.enter_context(target), plan, produce, coding)
    return with_errors(report_plan(final, header_size(plan, coding)), errors)


def _flat_names(source: Source) -> dict[str, str]:
    """The source's names by key if it holds one dict of leaves, as others' files do; else {}."""
    tree = source.restore(lambda name: name)
    is_flat = type(tree) is dict and all(type(x) is str for pair in tree.items() for x in pair)
    return tree if is_flat and "__metadata__" not in tree else {}


def _renamed(report: SizeReport, names: dict[str, str]) -> SizeReport:
    leaves = (dataclasses.replace(leaf, path=names[leaf.path]) for leaf in report.leaves)
    return dataclasses.replace(report, leaves=tuple(leaves))
