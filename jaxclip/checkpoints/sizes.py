"""What a tree takes on disk, leaf by leaf and to the byte, and what its low-bit leaves lost."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks
from jaxclip._core.grids import Bits
from jaxclip.checkpoints.format.codes import coded_tensor
from jaxclip.checkpoints.format.headers import header_size
from jaxclip.checkpoints.format.layout import FilePlan, check_has_values, plan_file
from jaxclip.checkpoints.reading import Source
from jaxclip.lowbit.arrays import QuantizedArray, is_quantized
from jaxclip.lowbit.distortion import QuantizationError, quantization_error
from jaxclip.lowbit.entropy_coding import check_coding


@dataclasses.dataclass(frozen=True)
class LeafSize:
    """One leaf of a `SizeReport`.

    Attributes:
      path: Tree path, `layer/kernel`.
      shape: Shape of the array.
      dtype: Name of its dtype; of a low-bit leaf, that of the array it stands for.
      bits: Width of its codes, or None if it is stored as it is.
      raw_bytes: Bytes of the array in its own dtype.
      stored_bytes: Bytes of codes and scales, or of the array as it is.
      threshold: The largest of its clip thresholds; None if it is stored as it is, or has
        no values.
      relative_error: `|W - Q|^2 / |W|^2` against the original; None if that is not known,
        or the leaf is not real floating.
      clipped_share: Share of the original's entries beyond the outermost level of their
        block's grid, in [0, 1]; None if that is not known, or it is stored as it is.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    bits: Bits | None
    raw_bytes: int
    stored_bytes: int
    threshold: float | None = None
    relative_error: float | None = None
    clipped_share: float | None = None

    def cells(self) -> list[str]:
        """Its row of the printed table; what is not known is empty."""
        shape, bits = "x".join(map(str, self.shape)), str(self.bits or "as is")
        sizes = [f"{self.raw_bytes:,}", f"{self.stored_bytes:,}", _short(self.threshold)]
        lost = [_short(self.relative_error), _percent(self.clipped_share)]
        return [self.path, shape or "scalar", self.dtype, bits, *sizes, *lost]


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """What a compressed tree takes on disk; `print` it for a table.

    Attributes:
      leaves: One `LeafSize` a leaf.
      overhead_bytes: Bytes of the file's header: names, shapes, structure, checksums.
      total_bytes: Size of the file that `checkpoints.save` writes.
      raw_bytes: Bytes of all arrays in their own dtype.
      relative_error: `|W - Q|^2 / |W|^2` over all leaves that have one; None if none has.
      clipped_share: Share of clipped entries over all leaves that have one; None if none has.
    """

    leaves: tuple[LeafSize, ...]
    overhead_bytes: int
    total_bytes: int
    raw_bytes: int
    relative_error: float | None = None
    clipped_share: float | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller than the arrays in their own dtype."""
        return self.raw_bytes / self.total_bytes

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of codes and scales that an entry of a low-bit leaf takes; None without any."""
        low_bit = [leaf for leaf in self.leaves if leaf.bits is not None]
        entries = sum(math.prod(leaf.shape) for leaf in low_bit)
        return 8 * sum(leaf.stored_bytes for leaf in low_bit) / entries if entries else None

    def rows(self) -> list[dict[str, Any]]:
        """The leaves as dicts, one a row, for instance for `pandas.DataFrame`."""
        return [dataclasses.asdict(leaf) for leaf in self.leaves]

    def __str__(self) -> str:
        titles = ["leaf", "shape", "dtype", "bits", "raw", "stored"]
        titles += ["threshold", "error", "clipped"]
        rows = [leaf.cells() for leaf in self.leaves]
        rows.append(["file header", *[""] * 4, f"{self.overhead_bytes:,}", *[""] * 3])
        rows.append(["total", *[""] * 3, f"{self.raw_bytes:,}", f"{self.total_bytes:,}", ""])
        rows[-1] += [_short(self.relative_error), _percent(self.clipped_share)]
        # Sizes are always there, the rest where something is known.
        shown = [i for i in range(9) if i < 6 or any(row[i] for row in rows)]
        widths = [max(len(row[i]) for row in [titles, *rows]) for i in shown]
        lines = [
            "  ".join(
                f"{row[i]:>{width}}" if i else f"{row[i]:<{width}}"
                for i, width in zip(shown, widths, strict=True)
            ).rstrip()
            for row in [titles, *rows]
        ]
        return "\n".join(lines) + f"  ({self.ratio:.1f}x smaller)"


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def size_report(small: Any, coding: str | None = None, *, original: Any = None) -> SizeReport:
    """Returns the bytes a compressed tree takes, leaf by leaf; the total is the file's size.

    Args:
      small: What `compress` returned; plain arrays are counted as they are. Shapes for
        arrays give sizes alone.
      coding: As in `checkpoints.save`; codes are then coded to measure them.
      original: The tree before it was compressed, to measure what was lost; a tree of the
        same structure and shapes.

    Returns:
      A `SizeReport`, printable. `total_bytes` equals the size of the file that
      `checkpoints.save(path, small, coding=coding)` writes, to the byte.

    Raises:
      TypeError: If the tree is of a kind that `checkpoints.save` refuses, or has no values
        to compare with `original`.
      ValueError: If `original` has other leaves or shapes.

    Example:
      >>> from jaxclip.lowbit.trees import compress
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> report = size_report(compress(params, bits="ternary"), original=params)
      >>> report.leaves[0].raw_bytes, report.leaves[0].stored_bytes
      (16384, 1076)
      >>> print(f"{report.relative_error:.2f}")
      0.18
    """
    check_coding(coding)
    plan = plan_file(small)
    coded = {t.name: coded_tensor(t, plan.leaves[t.leaf], coding) for t in plan.tensors}
    sizes = {name: found[1].size for name, found in coded.items() if found is not None}
    report = report_plan(plan.resized(sizes), header_size(plan, coding))
    return report if original is None else _compared(report, plan, original)


def report_plan(plan: FilePlan, overhead_bytes: int) -> SizeReport:
    """Returns the bytes that a planned file takes.

    Args:
      plan: With the sizes that coded tensors have.
      overhead_bytes: Bytes kept for the header.

    Example:
      >>> report_plan(plan_file({"w": jnp.zeros(3)}), 200).total_bytes
      212
    """
    stored: dict[str, int] = dict.fromkeys(plan.leaves, 0)
    for tensor in plan.tensors:
        stored[tensor.leaf] += tensor.stop - tensor.start
    leaves = tuple(
        LeafSize(
            path=name,
            shape=tuple(leaf.shape),
            dtype=jnp.dtype(leaf.dtype).name,
            bits=leaf.bits if is_quantized(leaf) else None,
            raw_bytes=math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize,
            stored_bytes=stored[name],
            threshold=_largest_threshold(leaf),
        )
        for name, leaf in plan.leaves.items()
    )
    raw_bytes = sum(leaf.raw_bytes for leaf in leaves)
    return SizeReport(leaves, overhead_bytes, overhead_bytes + plan.data_bytes, raw_bytes)


def _largest_threshold(leaf: Any) -> float | None:
    if not is_quantized(leaf):
        return None
    scale = leaf.scale
    if isinstance(scale, jax.ShapeDtypeStruct) or not checks.is_concrete(scale):
        return None
    if isinstance(scale, jax.Array) and not scale.is_fully_addressable:
        return None
    with jax.ensure_compile_time_eval():  # a concrete array inside somebody's jit
        return float(np.max(np.asarray(leaf.threshold), initial=0))


def _compared(report: SizeReport, plan: FilePlan, original: Any) -> SizeReport:
    """The report with what was lost against `original`."""
    originals = plan_file(original).leaves
    if originals.keys() != plan.leaves.keys():
        odd = sorted(originals.keys() ^ plan.leaves.keys())
        raise ValueError(f"original must have the same leaves; only one tree has {odd[:5]}.")
    errors = {}
    for leaf in report.leaves:
        now, before = plan.leaves[leaf.path], originals[leaf.path]
        if tuple(before.shape) != leaf.shape:
            raise ValueError(
                f"original at '{leaf.path}' must have shape {leaf.shape}, got {before.shape}."
            )
        if jnp.issubdtype(now.dtype, jnp.floating):
            for array in (now, before):
                values = array.qvalue if isinstance(array, QuantizedArray) else array
                check_has_values(leaf.path, values)
        errors[leaf.path] = quantization_error(before, now)
    return with_errors(report, errors)


def with_errors(report: SizeReport, errors: Mapping[str, QuantizationError | None]) -> SizeReport:
    """Returns a report with what its leaves lost.

    Args:
      report: A report without.
      errors: The error of each leaf, by path; None of those that are not real floating.

    Returns:
      A `SizeReport`.

    Example:
      >>> report = report_plan(plan_file({"w": jnp.zeros(3)}), 200)
      >>> with_errors(report, {"w": QuantizationError(1.0, 4.0, None)}).relative_error
      0.25
    """
    leaves, known, clipped, entries = [], [], 0, 0
    for leaf in report.leaves:
        error = errors[leaf.path]
        if error is not None:
            known.append(error)
            relative, share = _ratio(error.squared_error, error.squared_norm), None
            if error.num_clipped is not None:
                size = math.prod(leaf.shape)
                clipped, entries = clipped + error.num_clipped, entries + size
                share = error.num_clipped / max(size, 1)
            leaf = dataclasses.replace(leaf, relative_error=relative, clipped_share=share)
        leaves.append(leaf)
    lost, energy = sum(k.squared_error for k in known), sum(k.squared_norm for k in known)
    return dataclasses.replace(
        report,
        leaves=tuple(leaves),
        relative_error=_ratio(lost, energy) if known else None,
        clipped_share=clipped / entries if entries else None,
    )


def _ratio(lost: float, energy: float) -> float:
    """0 where nothing was lost, of nothing too; infinite where something came from nothing."""
    return 0.0 if lost == 0 else lost / energy if energy else math.inf


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


def report_source(path: str, source: Source) -> FileReport:
    """Returns what a source holds; no weight is read.

    Args:
      path: Its name, for the report.
      source: An open source.

    Example:
      >>> import jax
      >>> leaves = {"w": jax.ShapeDtypeStruct((2, 3), "float32")}
      >>> report_source("net.npz", Source(leaves, str, {"w": 24})).num_weights
      6
    """
    tensors = tuple(
        TensorReport(
            path=name,
            shape=tuple(leaf.shape),
            dtype=jnp.dtype(leaf.dtype).name,
            bits=leaf.bits if is_quantized(leaf) else None,
            num_bytes=source.num_bytes[name],
        )
        for name, leaf in source.leaves.items()
    )
    return FileReport(path, tensors)
