"""Sizes of trees on disk, leaf by leaf and to the byte, and the errors of their low-bit leaves.

`total_bytes = overhead_bytes + sum(stored_bytes)` is the size of the file, and
`relative_error = sum((w - q)**2) / sum(w**2)` the error of its weights.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks
from jaxclip._core.grids import Bits
from jaxclip._core.html import html_report, html_table
from jaxclip._core.reports import format_table
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints.format.codes import Allowance, coded_tensor
from jaxclip.checkpoints.format.headers import header_size
from jaxclip.checkpoints.format.layout import (
    FilePlan,
    Leaf,
    check_has_values,
    name_and_bits,
    plan_file,
)
from jaxclip.checkpoints.format.masks import Mask
from jaxclip.checkpoints.format.zeros import without_zeros
from jaxclip.checkpoints.reading import Source
from jaxclip.lowbit.arrays import QuantizedArray, dequantize, is_quantized
from jaxclip.lowbit.coding.entropy_coding import Coding, check_coding
from jaxclip.lowbit.distortion import QuantizationError, quantization_error


@dataclasses.dataclass(frozen=True)
class LeafSize:
    """One leaf of a `SizeReport`.

    Attributes:
      path: Tree path, `layer/kernel`, or name in the file.
      shape: Shape of the array.
      dtype: Name of its dtype; for a low-bit leaf that of the original array.
      bits: Width of its codes; None for an array stored as it is.
      raw_bytes: Bytes of the array in its own dtype.
      stored_bytes: Bytes that it takes in the file: codes and scales, or the array.
      threshold: Largest of its clip thresholds; None for an array stored as it is, and where
        no values were read.
      relative_error: `sum((w - q)**2) / sum(w**2)` against the original; None if unknown or not
        real floating.
      clip_rate: Fraction of the original's entries beyond the outermost level of their block's
        grid, in [0, 1]; None if unknown, and for an array stored as it is.
      coded_bits: Bits on disk of an entry, scales included, if codes are entropy-coded or zeros
        are left out; else None.
      axes: Channel axes with scales of their own, counted from 0; () if one scale or group is for
        all; None for an array stored as it is.
      density: Fraction of the entries that are not 0, in [0, 1]; None if unknown or not real
        floating.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    bits: Bits | None
    raw_bytes: int
    stored_bytes: int
    threshold: float | None = None
    relative_error: float | None = None
    clip_rate: float | None = None
    axes: tuple[int, ...] | None = None
    coded_bits: float | None = None
    density: float | None = None

    def cells(self) -> list[str]:
        """Returns its row of the printed table; cells of unknown values are empty."""
        shape, bits = "x".join(map(str, self.shape)), str(self.bits or "as is")
        if self.coded_bits is not None:
            bits = "sparse" if self.bits is None else f"{bits}, coded"
            bits += f" {self.coded_bits:.2f}"
        axes = "" if self.axes is None else ",".join(map(str, self.axes)) or "none"
        sizes = [axes, f"{self.raw_bytes:,}", f"{self.stored_bytes:,}"]
        density = "" if self.density == 1 else _percent(self.density)
        lost = [_short(self.relative_error), _percent(self.clip_rate)]
        known = [density, _short(self.threshold), *lost]
        return [self.path, shape or "scalar", self.dtype, bits, *sizes, *known]


@dataclasses.dataclass(frozen=True, repr=False)
class SizeReport:
    """Sizes of the leaves of a tree or file on disk; `print` it for a table.

    Attributes:
      leaves: One `LeafSize` per leaf.
      overhead_bytes: Bytes of headers: names, shapes, structure, checksums.
      total_bytes: Size of the file, or of all files of a folder.
      raw_bytes: Bytes of all arrays in their own dtype.
      relative_error: `sum((w - q)**2) / sum(w**2)` over all leaves that have one; None if none has.
      clip_rate: Fraction of clipped entries over all leaves that have one; None if none has.
      kept: Paths of leaves that stay as they are because codes and scales would take no fewer
        bytes.
      layouts: Layouts of the leaves that were compressed: "in_out", "out_in" or both; empty if
        unknown.
      no_weights: Paths of leaves that stay as they are because they are no weights, and why:
        "optimizer state" or "quantized already".
    """

    leaves: tuple[LeafSize, ...]
    overhead_bytes: int
    total_bytes: int
    raw_bytes: int
    relative_error: float | None = None
    clip_rate: float | None = None
    kept: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    no_weights: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Bytes of the arrays in their own dtype, over the bytes on disk."""
        return self.raw_bytes / self.total_bytes

    @property
    def num_weights(self) -> int:
        """Entries of all arrays."""
        return sum(math.prod(leaf.shape) for leaf in self.leaves)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of codes and scales per entry of the low-bit leaves; None if there are none."""
        low_bit = [leaf for leaf in self.leaves if leaf.bits is not None]
        num_entries = sum(math.prod(leaf.shape) for leaf in low_bit)
        num_bytes = sum(leaf.stored_bytes for leaf in low_bit)
        return 8 * num_bytes / num_entries if num_entries else None

    def with_densities(self, densities: Mapping[str, float | None]) -> "SizeReport":
        """Returns the report with the densities of some leaves, by path."""
        leaves = tuple(
            dataclasses.replace(leaf, density=densities.get(leaf.path, leaf.density))
            for leaf in self.leaves
        )
        return dataclasses.replace(self, leaves=leaves)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the leaves as dicts, one per row, for instance for `pandas.DataFrame`."""
        return [dataclasses.asdict(leaf) for leaf in self.leaves]

    def __repr__(self) -> str:
        bits = None if self.bits_per_weight is None else f"{self.bits_per_weight:.2f}"
        text = f"{len(self.leaves)} leaves, total_bytes={self.total_bytes}"
        return f"SizeReport({text}, bits_per_weight={bits})"

    def _repr_html_(self) -> str:
        title = f"{self.total_bytes:,} bytes, {self._change()}"
        return html_report(title, html_table(self._cells()))

    def __str__(self) -> str:
        layouts = f"\nlayout: {' and '.join(self.layouts)}" if self.layouts else ""
        return f"{format_table(self._cells())}  ({self._change()}){layouts}"

    def _cells(self) -> list[list[str]]:
        """Returns the rows of the printed table, the titles first."""
        sizes = ["leaf", "shape", "dtype", "bits", "axis", "raw", "stored"]
        rows = [[*sizes, "density", "threshold", "error", "clipped"]]
        rows += [leaf.cells() for leaf in self.leaves]
        for leaf, row in zip(self.leaves, rows[1:], strict=True):
            row[3] += ": no smaller" if leaf.path in self.kept else ""
            row[3] += f": {self.no_weights[leaf.path]}" if leaf.path in self.no_weights else ""
        rows.append(["file header", *[""] * 5, f"{self.overhead_bytes:,}", *[""] * 4])
        rows.append(["total", *[""] * 4, f"{self.raw_bytes:,}", f"{self.total_bytes:,}", "", ""])
        rows[-1] += [_short(self.relative_error), _percent(self.clip_rate)]
        # Sizes are always shown, the other columns where something is known.
        always = {rows[0].index(name) for name in sizes if name != "axis"}
        shown = [i for i in range(len(rows[0])) if i in always or any(r[i] for r in rows[1:])]
        return [[row[i] for i in shown] for row in rows]

    def _change(self) -> str:
        """Returns how much smaller or larger the file is than its arrays."""
        if self.total_bytes <= self.raw_bytes:
            return f"{self.ratio:.1f}x smaller"
        growth = f"{1 / self.ratio:.3g}x" if self.raw_bytes else f"{self.total_bytes:,} bytes"
        return f"{growth} larger"


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{rate:.2%}"


def size_report(
    small: PyTree, coding: Coding | None = None, *, original: PyTree = None
) -> SizeReport:
    """Returns the bytes a compressed tree takes, leaf by leaf; the total is the file's size.

    Args:
      small: Result of `compress`; plain arrays are counted as they are. With
        `jax.ShapeDtypeStruct`s for arrays only sizes are reported.
      coding: The coding for `checkpoints.save`; codes, and the masks of float leaves with zeros,
        are coded to measure their size.
      original: The tree before it was compressed, of the same structure and shapes, to measure
        the error; None to report only sizes.

    Returns:
      A `SizeReport`, printable. `total_bytes` equals the size of the file that
      `checkpoints.save(path, small, coding=coding)` writes, to the byte.

    Raises:
      TypeError: If the tree is of a kind that `checkpoints.save` refuses, or has no values
        to compare with `original`.
      ValueError: If `original` has other leaves or shapes.

    Example:
      >>> from jaxclip import compress
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> report = size_report(compress(params, bits="ternary"), original=params)
      >>> report.leaves[0].raw_bytes, report.leaves[0].stored_bytes
      (16384, 1076)
      >>> print(f"{report.relative_error:.2f}")
      0.18
    """
    check_coding(coding)
    plan = plan_file(small)
    plan = without_zeros(plan, plan.leaves.__getitem__, coding)
    allowance = Allowance(plan)
    coded = {t.name: coded_tensor(t, plan.leaves[t.leaf], coding, allowance) for t in plan.tensors}
    sizes = {name: found[1].size for name, found in coded.items() if found is not None}
    report = report_plan(plan.resized(sizes), header_size(plan, coding))
    report = report.with_densities({name: density_of(x) for name, x in plan.leaves.items()})
    return report if original is None else _compared(report, plan, original)


def report_plan(plan: FilePlan, overhead_bytes: int) -> SizeReport:
    """Returns the sizes of a planned file; the plan must have the sizes of coded codes."""
    stored = dict.fromkeys(plan.leaves, 0)
    for tensor in plan.tensors:
        stored[tensor.leaf] += tensor.num_bytes
    return _report(plan.leaves, stored, overhead_bytes + plan.data_bytes, plan.masks)


def report_source(source: Source) -> SizeReport:
    """Returns the sizes of the leaves of an open source, without reading weights."""
    return _report(source.leaves, source.num_bytes, source.total_bytes, source.masks)


def density_of(leaf: Leaf) -> float | None:
    """Returns the fraction of a leaf's entries that are not 0; None if it is not known.

    It is for leaves that are low-bit or real floating, and for those that are not empty.
    """
    if not math.prod(leaf.shape) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    for array in jax.tree.leaves(leaf):
        if isinstance(array, jax.ShapeDtypeStruct) or not checks.is_concrete(array):
            return None
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return None
    with jax.ensure_compile_time_eval():  # for a concrete array inside a caller's jit
        if not is_quantized(leaf):
            return float(np.mean(np.asarray(leaf) != 0))
        codes = leaf.unpacked().qvalue
        if leaf.zero is not None:
            codes = dequantize(dataclasses.replace(leaf, scale=jnp.ones_like(leaf.scale)))
        # Not a mean of conditions, which would take another byte an entry.
        return int(np.count_nonzero(np.asarray(codes))) / math.prod(leaf.shape)


def _report(
    leaves: Mapping[str, Leaf],
    stored_bytes: Mapping[str, int],
    total_bytes: int,
    masks: Mapping[str, Mask],
) -> SizeReport:
    sizes = tuple(
        LeafSize(
            path=name,
            shape=tuple(leaf.shape),
            dtype=name_and_bits(leaf.dtype)[0],
            bits=leaf.bits if isinstance(leaf, QuantizedArray) else None,
            raw_bytes=_raw_bytes(leaf),
            stored_bytes=stored_bytes[name],
            threshold=_largest_threshold(leaf),
            axes=_channel_axes(leaf),
            coded_bits=_coded_bits(leaf, stored_bytes[name], masks.get(name)),
            density=_density_by(masks.get(name), leaf),
        )
        for name, leaf in leaves.items()
    )
    return SizeReport(
        leaves=sizes,
        overhead_bytes=total_bytes - sum(stored_bytes.values()),
        total_bytes=total_bytes,
        raw_bytes=sum(leaf.raw_bytes for leaf in sizes),
    )


def _coded_bits(leaf: Leaf, stored_bytes: int, mask: Mask | None) -> float | None:
    is_coded = isinstance(leaf, QuantizedArray) and stored_bytes < leaf.num_bytes
    return 8 * stored_bytes / math.prod(leaf.shape) if is_coded or mask else None


def _density_by(mask: Mask | None, leaf: Leaf) -> float | None:
    return None if mask is None else mask.num_values / math.prod(leaf.shape)


def _raw_bytes(leaf: Leaf) -> int:
    """Returns the bytes of an array in its own dtype."""
    return math.prod(leaf.shape) * name_and_bits(leaf.dtype)[1] // 8


def _channel_axes(leaf: Leaf) -> tuple[int, ...] | None:
    if not isinstance(leaf, QuantizedArray):
        return None
    return leaf.fitted_grid.channel_axes(leaf.ndim)


def _largest_threshold(leaf: Leaf) -> float | None:
    if not isinstance(leaf, QuantizedArray):
        return None
    scale = leaf.scale
    if isinstance(scale, jax.ShapeDtypeStruct) or not checks.is_concrete(scale):
        return None
    if isinstance(scale, jax.Array) and not scale.is_fully_addressable:
        return None
    with jax.ensure_compile_time_eval():  # for a concrete array inside a caller's jit
        return float(np.max(np.asarray(leaf.threshold), initial=0))


def _compared(report: SizeReport, plan: FilePlan, original: PyTree) -> SizeReport:
    """Returns the report with the errors against `original`."""
    originals = plan_file(original).leaves
    if originals.keys() != plan.leaves.keys():
        odd = sorted(originals.keys() ^ plan.leaves.keys())
        raise ValueError(f"original must have the same leaves; only one tree has {odd[:5]}.")
    errors = {}
    for leaf in report.leaves:
        now, before = plan.leaves[leaf.path], originals[leaf.path]
        if tuple(before.shape) != leaf.shape:
            raise ValueError(
                f"original at {leaf.path!r} must have shape {leaf.shape}, got {before.shape}."
            )
        if jnp.issubdtype(now.dtype, jnp.floating):
            for array in (now, before):
                values = array.qvalue if isinstance(array, QuantizedArray) else array
                check_has_values(leaf.path, values)
        errors[leaf.path] = quantization_error(before, now)
    dtypes = {name: leaf.dtype for name, leaf in originals.items()}
    return _with_dtypes(with_errors(report, errors), dtypes)


def _with_dtypes(report: SizeReport, dtypes: Mapping[str, Any]) -> SizeReport:
    """Returns a report with the dtypes that arrays had before they were compressed, by path."""
    # Where jax has no float64, the low-bit array of a float64 leaf stands for a float32.
    leaves = []
    for leaf in report.leaves:
        if leaf.bits is not None and leaf.path in dtypes:
            name, bits = name_and_bits(dtypes[leaf.path])
            raw_bytes = math.prod(leaf.shape) * bits // 8
            leaf = dataclasses.replace(leaf, dtype=name, raw_bytes=raw_bytes)
        leaves.append(leaf)
    raw_bytes = sum(leaf.raw_bytes for leaf in leaves)
    return dataclasses.replace(report, leaves=tuple(leaves), raw_bytes=raw_bytes)


def with_errors(report: SizeReport, errors: Mapping[str, QuantizationError | None]) -> SizeReport:
    """Returns a report with the error of each leaf, by path; None if it is not real floating."""
    leaves, known = [], []
    num_clipped = num_entries = 0
    for leaf in report.leaves:
        error = errors[leaf.path]
        if error is not None:
            known.append(error)
            clip_rate = None
            if error.num_clipped is not None:
                size = math.prod(leaf.shape)
                clip_rate = error.num_clipped / max(size, 1)
                num_clipped += error.num_clipped
                num_entries += size
            relative_error = _ratio(error.squared_error, error.squared_norm)
            leaf = dataclasses.replace(leaf, relative_error=relative_error, clip_rate=clip_rate)
        leaves.append(leaf)
    squared_error = sum(error.squared_error for error in known)
    squared_norm = sum(error.squared_norm for error in known)
    return dataclasses.replace(
        report,
        leaves=tuple(leaves),
        relative_error=_ratio(squared_error, squared_norm) if known else None,
        clip_rate=num_clipped / num_entries if num_entries else None,
    )


def _ratio(squared_error: float, squared_norm: float) -> float:
    # 0 without an error, even if the norm is 0 or NaN; infinite if only the norm is 0.
    if squared_error == 0:
        return 0.0
    return squared_error / squared_norm if squared_norm else math.inf
