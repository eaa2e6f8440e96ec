"""Files of weights rewritten leaf by leaf: compressed, decompressed, clipped.

Memory is bounded by the largest leaf. The new file appears when it is complete, and the source is
never written to.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxclip._core.grids import Bits, Grid
from jaxclip._core.layouts import LAYOUTS, Layout, layouts_of
from jaxclip.checkpoints.compressing import SharedStep, best_within
from jaxclip.checkpoints.decoding import decoded_in_parts
from jaxclip.checkpoints.format.codes import Allowance, coded_tensor
from jaxclip.checkpoints.format.headers import MAX_RATIO, header_size
from jaxclip.checkpoints.format.layout import (
    Leaf,
    StoredLeaf,
    is_copied,
    leaf_name,
    plan_file,
)
from jaxclip.checkpoints.format.masks import Mask
from jaxclip.checkpoints.format.zeros import without_zeros
from jaxclip.checkpoints.leaf_by_leaf import LeafWithError, Output, rewrite
from jaxclip.checkpoints.reading import Source
from jaxclip.checkpoints.rows import compress_leaf, compress_stored
from jaxclip.checkpoints.sizes import SizeReport
from jaxclip.checkpoints.stored_rows import StoredRows
from jaxclip.lowbit.arrays import QuantizedArray, dequantize_stored, is_quantized
from jaxclip.lowbit.budgets import (
    ALL_WIDTHS,
    Budget,
    check_budget,
    option_of,
    widths_within_average,
    widths_within_file,
)
from jaxclip.lowbit.coding.entropy_coding import Coding
from jaxclip.lowbit.distortion import quantization_error
from jaxclip.lowbit.no_weights import reasons_to_keep
from jaxclip.lowbit.policies import (
    LeafSpec,
    Policy,
    leaf_specs,
    with_calibration,
)
from jaxclip.lowbit.rounding.moments import Calibration
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
    bit_price: float | None = None,
    policy: Policy = (),
    layout: Layout | None = None,
    coding: Coding | None = None,
    calibration: Calibration | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    max_ratio: float = MAX_RATIO,
    progress: bool = True,
) -> SizeReport:
    """Compresses a file or folder of weights to one low-bit file, leaf by leaf.

    Memory is bounded by a few times the largest leaf, however large the checkpoint. Leaves of
    `.safetensors` files of other libraries whose scales belong to rows, or to groups of them, are
    read some rows at a time: without a coding that takes less than the largest leaf. The new file
    appears when it is complete; a crash or an interrupt leaves no file. The source is never written
    to, and its metadata are kept. A leaf whose codes and scales would take no fewer bytes than the
    leaf stays as it is, and so do the moments of an optimizer unless a policy names them; the
    report says so.

    Args:
      src: File or folder that `load` takes. Leaves that are low-bit already are copied.
      dst: The `.safetensors` file to write.
      bits: A `Grid`, or a width: 1, 2, 3, 4, 5, 6, 8 or "ternary", with one scale for each output.
        None is 4, or the width that a target chooses.
      target_bits_per_weight: Largest average number of bits of an entry of a low-bit leaf, codes
        and scales included, in (0, inf). With a target the weights are read twice: first to
        measure their errors at every width.
      target_bytes: Largest size of the file in bytes, at least 1. With `coding="lanes"` or
        "smallest" that of the coded file, with steps as in `compress`: the weights are then read
        up to eleven times. With other codings that of packed codes.
      rule: Rule that chooses clip thresholds, its factory, or a number; not `per_tree`, which
        measures several leaves.
      bit_price: Error that an entropy-coded bit is worth, in squared steps, at least 0, such as
        0.12; needs a `coding`, and leaves are then compressed whole. None is 0, or 0.4 where
        `target_bytes` is that of a coded file.
      policy: Pairs `(regex, spec)`, as in `compress`, for the names in the source.
      layout: Where the outputs are: "in_out" (flax: the last axis) or "out_in" (PyTorch: the
        first). None takes it from the names, as in `compress`. Where no name says it, the file's
        metadata do (`format`: "pt", "mlx", "flax" or "tf"); without them a `.safetensors` file or
        folder of another library is "out_in", all else "in_out". The report has the layouts and
        the axes. In "out_in" a leaf of three dimensions whose last axis is 32 or longer is a stack
        of matrices, with a scale for each of their outputs.
      coding: Entropy coding of the codes: None, "huffman", "ans", "lanes" or "smallest", as
        for `save`. Float leaves are then read twice, first for the sizes of their masks.
      calibration: Moments of the inputs of leaves, as in `compress`, by the names in the source.
      overwrite: True to replace an existing file.
      dry_run: True to write nothing and only return the sizes. Without `coding` they follow from
        shapes, and no weight is read unless a target needs it.
      max_ratio: Bytes of arrays that a byte of the source may stand for, as for `load`.
      progress: True to show a bar on a terminal or in a notebook, if rich is installed.

    Returns:
      A `SizeReport`, with the error of each leaf unless no weight was read for it;
      `total_bytes` is the size of the file.

    Raises:
      CheckpointError: If the source is damaged, foreign or of a newer version.
      TypeError: If an argument is of a wrong type, or both a width and a target are given.
      FileExistsError: If `dst` exists and `overwrite` is False, or it is not a regular file, or
        it is one of the files that are read, under any name.
      ValueError: If an argument is not allowed, a regex matches no leaf, a weight is NaN or
        infinite (the message names leaf and index), a target is out of reach, a leaf has a price
        and there is no `coding`, or `dst` would become a part of the folder that is read.

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
    grid = bits if isinstance(bits, Grid) else Grid(bits)
    budget = check_budget(grid.bits, target_bits_per_weight, target_bytes)
    if budget is None and grid.bits is None:
        grid = dataclasses.replace(grid, bits=4)
    default = LeafSpec(grid, rule, bit_price)
    specs: dict[str, LeafSpec] = {}
    facts: dict[str, Any] = {}  # of the report

    def outline(source: Source) -> dict[str, Leaf]:
        names = [name for name, leaf in source.leaves.items() if not is_copied(leaf.dtype)]
        leaves = [source.leaves[name] for name in names]
        layouts = layouts_of(names, layout, source.default_layout)
        found = leaf_specs(names, leaves, policy, default, layouts)
        # Names of a flat source are keys, which the new file escapes.
        paths = {n: leaf_name((n,)) if source.structure is None else n for n in source.leaves}
        facts["kept"] = tuple(sorted(paths[name] for name in found.kept))
        facts["no_weights"] = {paths[name]: reason for name, reason in found.no_weights.items()}
        facts["layouts"] = tuple(x for x in LAYOUTS if x in found.layouts)
        of_leaves = found.specs
        if calibration is not None:
            of_leaves = with_calibration(of_leaves, names, calibration)
        specs.update({name: spec for name, spec in zip(names, of_leaves, strict=True) if spec})
        priced = [name for name, spec in specs.items() if spec.has_price]
        if coding is None and priced:
            raise ValueError(
                "bit_price needs a coding, because packed codes take the same bytes at any price; "
                f"leaf {priced[0]!r} has a price."
            )
        if budget is not None:
            specs.update(_specs_within(budget, source, specs, coding))
        return source.leaves | {n: s.outline(source.leaves[n], n) for n, s in specs.items()}

    def rewrite_leaf(name: str, leaf: StoredLeaf) -> LeafWithError:
        if name in specs and not isinstance(leaf, QuantizedArray):
            return compress_leaf(leaf, specs[name], name)
        return leaf, None if is_copied(leaf.dtype) else quantization_error(leaf, leaf)

    def rewrite_rows(name: str, leaf: StoredRows) -> LeafWithError | None:
        return compress_stored(leaf, specs[name], name) if name in specs else None

    output = Output(Path(dst), overwrite, progress, coding, dry_run, max_ratio=max_ratio)
    num_passes = 1 if budget is None else 2
    report = rewrite(src, output, outline, rewrite_leaf, num_passes, rewrite_rows)
    return dataclasses.replace(report, **facts)


def _specs_within(
    budget: Budget, source: Source, specs: dict[str, LeafSpec], coding: str | None
) -> dict[str, LeafSpec]:
    """Returns the specs without a width, given widths that fit the budget; reads their leaves."""
    free = [name for name, spec in specs.items() if spec.grid.bits is None]
    if budget.num_bytes is not None and coding in ("lanes", "smallest"):
        return _coded_specs_within(budget.num_bytes, source, specs, free, coding)
    small = {n: s.outline(source.leaves[n], n) for n, s in specs.items() if n not in free}
    small = source.leaves | small
    measured = []
    for name in free:
        leaf, options = np.asarray(source.read(name)), []
        spec = specs[name].factored(leaf, name)
        for width in ALL_WIDTHS:
            q, error = compress_leaf(leaf, spec, name, width)
            is_own = spec.calibration is None
            options.append(option_of(q, error.squared_error if is_own else spec.error_of(leaf, q)))
        measured.append(options)

    def file_bytes(outlines: list[QuantizedArray]) -> int:
        tree = small | dict(zip(free, outlines, strict=True))
        outlined = source.restore(tree.__getitem__)
        plan = plan_file(outlined, is_copy=True, metadata=source.metadata)
        return header_size(plan, coding) + plan.data_bytes

    if budget.bits_per_weight is not None:
        fixed = [leaf for leaf in small.values() if is_quantized(leaf)]
        widths = widths_within_average(budget.bits_per_weight, measured, fixed)
    else:
        assert budget.num_bytes is not None
        widths = widths_within_file(budget.num_bytes, measured, file_bytes)
    return {name: specs[name].with_bits(w) for name, w in zip(free, widths, strict=True)}


def _coded_specs_within(
    target_bytes: int, source: Source, specs: dict[str, LeafSpec], free: list[str], coding: str
) -> dict[str, LeafSpec]:
    """Returns the specs without a width, given steps with which the coded file fits."""
    parts = {}
    for name in free:
        specs[name].check_coded(name)
        leaf = np.asarray(source.read(name))
        parts[name] = SharedStep.of(specs[name].factored(leaf, name), leaf)

    is_flat = source.structure is None
    names = {leaf_name((name,)) if is_flat else name: name for name in source.leaves}
    masks: dict[str, Mask] | None = None

    def with_step(step: float) -> dict[str, LeafSpec]:
        return {n: dataclasses.replace(specs[n], step=step * parts[n].unit) for n in free}

    def num_bytes(stepped: dict[str, LeafSpec]) -> int:
        found = specs | stepped
        outlined = source.leaves | {n: s.outline(source.leaves[n], n) for n, s in found.items()}
        tree = source.restore(outlined.__getitem__)
        plan = plan_file(tree, is_copy=True, metadata=source.metadata)
        nonlocal masks  # of the other leaves: the same at every step
        if masks is None:
            masks = without_zeros(plan, lambda name: source.read(names[name]), coding).masks
        plan = plan.with_masks(masks)
        sizes, allowance = {}, Allowance(plan)
        for tensor in plan.tensors:
            name = names[tensor.leaf]
            if name in found and tensor.name.endswith(":codes"):
                q, _ = compress_leaf(np.asarray(source.read(name)), found[name], name)
                coded = coded_tensor(tensor, q, coding, allowance)
                sizes |= {} if coded is None else {tensor.name: coded[1].size}
        return header_size(plan, coding) + plan.resized(sizes).data_bytes

    return best_within(target_bytes, with_step, num_bytes, target_bytes, list(parts.values()))


def decompress_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: DTypeLike | None = None,
    *,
    overwrite: bool = False,
    max_ratio: float = MAX_RATIO,
    progress: bool = True,
) -> SizeReport:
    """Writes the weights of a low-bit file, decompressed, to a plain `.safetensors` file.

    Any library that reads safetensors loads it, by the names that `inspect` shows. If the source
    is one dict of arrays, such as a file of another library, its names are kept. The new file has
    no checksums if one of them has a "/", "%" or ":". Metadata such as `format` are kept.
    Memory is bounded by the codes of the largest leaf, one byte an entry, and a few parts of its
    values.

    Args:
      src: File or folder that `load` takes.
      dst: The `.safetensors` file to write.
      dtype: Floating dtype of the leaves that were compressed; None for their own.
      overwrite: True to replace an existing file.
      max_ratio: Bytes of arrays that a byte of the source may stand for, as for `load`.
      progress: True to show a bar on a terminal or in a notebook, if rich is installed.

    Returns:
      A `SizeReport` of the new file.

    Raises:
      CheckpointError: If the source is damaged, foreign or of a newer version.
      FileExistsError: If `dst` exists and `overwrite` is False, or it is not a regular file, or
        it is one of the files that are read, under any name.
      ValueError: If `dst` has another suffix, or would become a part of the folder that is read;
        if a weight is beyond `dtype`.

    Example:
      >>> decompress_checkpoint("small.safetensors", "net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'small.safetensors'.
    """

    def outline(source: Source) -> dict[str, Leaf]:
        arrays = {n: x for n, x in source.leaves.items() if is_quantized(x)}
        plain = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype)
            for n, x in arrays.items()
        }
        return source.leaves | plain

    def decompress_leaf(name: str, leaf: StoredLeaf) -> LeafWithError:
        if not is_quantized(leaf):
            return leaf, None
        streamed = decoded_in_parts(leaf, dtype, name)
        return dequantize_stored(leaf, dtype, name) if streamed is None else streamed, None

    output = Output(Path(dst), overwrite, progress, keeps_names=True, max_ratio=max_ratio)
    return rewrite(src, output, outline, decompress_leaf)


def clip_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    threshold: Any,
    *,
    include: str = "",
    overwrite: bool = False,
    max_ratio: float = MAX_RATIO,
    progress: bool = True,
) -> SizeReport:
    """Writes the weights of a file or folder, clipped to `[-threshold, threshold]`.

    Metadata are kept, and names in the same cases as in `decompress_checkpoint`.

    Args:
      src: File or folder that `load` takes; low-bit leaves are copied.
      dst: The `.safetensors` file to write.
      threshold: Number in [0, inf], or a rule that chooses one for each leaf.
      include: Regular expression; leaves with a match in their name are clipped. With "" these
        are all but the moments of an optimizer.
      overwrite: True to replace an existing file.
      max_ratio: Bytes of arrays that a byte of the source may stand for, as for `load`.
      progress: True to show a bar on a terminal or in a notebook, if rich is installed.

    Returns:
      A `SizeReport` of the new file.

    Raises:
      CheckpointError: If the source is damaged, foreign or of a newer version.
      FileExistsError: If `dst` exists and `overwrite` is False, or it is not a regular file, or
        it is one of the files that are read, under any name.
      TypeError: If the threshold is of a wrong type.
      ValueError: If the threshold is negative or NaN, `include` matches no leaf, or `dst` has
        another suffix or would become a part of the folder that is read.

    Example:
      >>> clip_checkpoint("net.safetensors", "clipped.safetensors", 0.1)
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    check_one_threshold("threshold", threshold)
    pattern = re.compile(include)
    no_weights: dict[str, str] = {}

    def outline(source: Source) -> dict[str, Leaf]:
        if not any(pattern.search(name) for name in source.leaves):
            raise ValueError(f"include={include!r} matches no leaf.")
        no_weights.update(reasons_to_keep(source.leaves))
        return source.leaves

    def clip_leaf(name: str, leaf: StoredLeaf) -> LeafWithError:
        is_kept = isinstance(leaf, QuantizedArray) or is_copied(leaf.dtype)
        is_kept = is_kept or (not include and name in no_weights)
        if is_kept or not pattern.search(name):
            return leaf, None
        if leaf.dtype == np.float64:  # not clip_weights: jax may have float64 disabled
            t = np.asarray(resolve_threshold(threshold, leaf), np.float64)
            return np.clip(leaf, -t, t), None
        return np.asarray(clip_weights(leaf, threshold)), None

    output = Output(Path(dst), overwrite, progress, keeps_names=True, max_ratio=max_ratio)
    return rewrite(src, output, outline, clip_leaf)
