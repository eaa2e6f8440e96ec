"""Trees: which leaf is stored at how many bits, and what that costs in bytes."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip import _checks
from jaxclip.coding import check_coding
from jaxclip.grids import Bits, code_range
from jaxclip.headers import header_size
from jaxclip.layout import FilePlan, coded_tensor, plan_file
from jaxclip.quantization import QuantizedArray, dequantize, quantize
from jaxclip.scale_formats import scale_format
from jaxclip.threshold_rules import mse_optimal

__all__ = ["LeafSize", "SizeReport", "compress", "decompress", "report_plan", "size_report"]


def compress(
    params: Any,
    bits: Bits = 4,
    *,
    rule: Any = mse_optimal,
    axis: int | tuple[int, ...] | None = -1,
    group_size: int | None = None,
    full_signed: bool = True,
    zero_point: bool = False,
    scale_dtype: Any = "float32",
    policy: Sequence[tuple[str, Bits | None]] = (),
) -> Any:
    """Replaces leaves of two or more dimensions by low-bit arrays.

    Args:
      params: Pytree of arrays. Biases, norm scales and leaves that are not real floating
        stay as they are, and so do low-bit leaves.
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary".
      rule: How clip thresholds are chosen: a rule or a rule's factory (`mse_optimal`,
        `max_abs`), bound here to the grid and granularity; or a number.
      axis: Channel axis with a scale for each index; by default the last, an output
        channel in flax's layouts. None for one scale a leaf.
      group_size: Entries that share a scale along the last non-channel axis.
      full_signed: Whether grids of two bits or more use the level -2**(bits-1).
      zero_point: Whether grids may lie unevenly around 0, as in `quantize`; not for 1 bit.
      scale_dtype: Format of the scales: float32, float16, bfloat16 or "log8".
      policy: Pairs `(regex, bits)`; the first whose regex matches a leaf's path decides
        its width, None to leave it as it is. Leaves that none matches follow `bits`.

    Returns:
      A tree of the same structure with `QuantizedArray` leaves, for `decompress`,
      `size_report` and `checkpoints.save`.

    Raises:
      TypeError: If an argument is of a wrong type.
      ValueError: If `bits` or `scale_dtype` is not allowed, `zero_point` comes with 1 bit, a
        regex matches no leaf, or a weight is NaN or
        infinite (the message names leaf and index).

    Example:
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> small = compress(params, bits="ternary")
      >>> small["kernel"].bits, small["bias"].dtype
      ('ternary', dtype('float32'))
    """
    code_range(bits)
    scale_dtype = scale_format(scale_dtype)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in policy):
        raise ValueError(f"policy must be pairs (regex, bits), got {policy!r}.")
    rules = [(_compiled(pattern), width) for pattern, width in policy]
    for _, width in rules:
        if width is not None:
            code_range(width)
    matched: set[int] = set()

    def width_of(path: str, leaf: Any) -> Bits | None:
        for i, (pattern, width) in enumerate(rules):
            if pattern.search(path):
                matched.add(i)
                return width
        return bits if np.ndim(leaf) >= 2 else None

    def compress_leaf(path: tuple, leaf: Any) -> Any:
        if _is_quantized(leaf):
            return leaf
        name = _checks.path_name(path)
        width = width_of(name, leaf)
        is_real = _checks.is_clippable(leaf) and not jnp.iscomplexobj(leaf)
        if width is None or not is_real:
            return leaf
        return quantize(
            leaf,
            width,
            threshold=rule,
            axis=axis if np.ndim(leaf) >= 2 else None,
            group_size=group_size,
            full_signed=full_signed,
            zero_point=zero_point,
            scale_dtype=scale_dtype,
            name=f"params at '{name}'",
        )

    small = jax.tree_util.tree_map_with_path(compress_leaf, params, is_leaf=_is_quantized)
    unmatched = [policy[i][0] for i in range(len(rules)) if i not in matched]
    if unmatched:
        raise ValueError(f"policy has patterns that match no leaf: {unmatched}.")
    return small


def decompress(small: Any, dtype: Any = None) -> Any:
    """Returns the tree of arrays that a compressed tree stands for.

    Args:
      small: What `compress` returned, or `checkpoints.load` read.
      dtype: Floating dtype for the leaves that were compressed; None for their own.

    Returns:
      The tree with every `QuantizedArray` dequantized; other leaves as they are.

    Example:
      >>> decompress(compress({"kernel": jnp.ones((2, 2))}, bits="ternary"))
      {'kernel': Array([[1., 1.],
             [1., 1.]], dtype=float32)}
    """
    return jax.tree.map(
        lambda leaf: dequantize(leaf, dtype) if _is_quantized(leaf) else leaf,
        small,
        is_leaf=_is_quantized,
    )


@dataclasses.dataclass(frozen=True)
class LeafSize:
    """One leaf of a `SizeReport`.

    Attributes:
      path: Tree path, `layer/kernel`.
      shape: Shape of the array.
      bits: Width of its codes, or None if it is stored as it is.
      raw_bytes: Bytes of the array in its own dtype.
      stored_bytes: Bytes of codes and scales, or of the array as it is.
    """

    path: str
    shape: tuple[int, ...]
    bits: Bits | None
    raw_bytes: int
    stored_bytes: int


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """What a compressed tree takes on disk; `print` it for a table.

    Attributes:
      leaves: One `LeafSize` a leaf.
      overhead_bytes: Bytes of the file's header: names, shapes, structure, checksums.
      total_bytes: Size of the file that `checkpoints.save` writes.
      raw_bytes: Bytes of all arrays in their own dtype.
    """

    leaves: tuple[LeafSize, ...]
    overhead_bytes: int
    total_bytes: int
    raw_bytes: int

    @property
    def ratio(self) -> float:
        """How many times smaller than the arrays in their own dtype."""
        return self.raw_bytes / self.total_bytes

    def __str__(self) -> str:
        lines = [f"{'leaf':<28} {'shape':>14} {'bits':>8} {'raw':>10} {'stored':>10}"]
        lines += [
            f"{leaf.path:<28} {'x'.join(map(str, leaf.shape)) or 'scalar':>14} "
            f"{leaf.bits or 'as is':>8} {leaf.raw_bytes:>10,} {leaf.stored_bytes:>10,}"
            for leaf in self.leaves
        ]
        lines.append(f"{'file header':<62} {self.overhead_bytes:>10,}")
        totals = f"{'total':<51} {self.raw_bytes:>10,} {self.total_bytes:>10,}"
        return "\n".join([*lines, f"{totals}  ({self.ratio:.1f}x smaller)"])


def size_report(small: Any, coding: str | None = None) -> SizeReport:
    """Returns the bytes a compressed tree takes, leaf by leaf; the total is the file's size.

    Args:
      small: What `compress` returned; plain arrays are counted as they are.
      coding: As in `checkpoints.save`; codes are then coded to measure them.

    Returns:
      A `SizeReport`, printable. `total_bytes` equals the size of the file that
      `checkpoints.save(path, small, coding=coding)` writes, to the byte.

    Raises:
      TypeError: If the tree is of a kind that `checkpoints.save` refuses.

    Example:
      >>> report = size_report(compress({"kernel": jnp.ones((64, 64))}, bits="ternary"))
      >>> report.leaves[0].raw_bytes, report.leaves[0].stored_bytes
      (16384, 1076)
    """
    check_coding(coding)
    plan = plan_file(small)
    coded = {t.name: coded_tensor(t, plan.leaves[t.leaf], coding) for t in plan.tensors}
    sizes = {name: data.size for name, data in coded.items() if data is not None}
    return report_plan(plan.resized(sizes), header_size(plan, coding))


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
            bits=leaf.bits if _is_quantized(leaf) else None,
            raw_bytes=math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize,
            stored_bytes=stored[name],
        )
        for name, leaf in plan.leaves.items()
    )
    raw_bytes = sum(leaf.raw_bytes for leaf in leaves)
    return SizeReport(leaves, overhead_bytes, overhead_bytes + plan.data_bytes, raw_bytes)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"policy has {pattern!r}, which is no regular expression: {error}"
        ) from error


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)
