"""One leaf compressed some rows at a time, with what it lost: bounds the memory."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxclip._core.grids import Bits
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.distortion import QuantizationError, quantization_error
from jaxclip.lowbit.policies import LeafSpec

_PART_BYTES = 2**24
"""Bytes of a leaf that are compressed at a time where its rows have scales of their own."""


def outline_leaf(leaf: Any, spec: LeafSpec, name: str, bits: Bits | None = None) -> QuantizedArray:
    """Returns what a leaf becomes, with shapes for arrays.

    Args:
      leaf: Its shape and dtype.
      spec: How it becomes low-bit.
      name: Its name, for messages.
      bits: Its width; None for that of the spec.

    Example:
      >>> from jaxclip._core.grids import Grid
      >>> spec = LeafSpec(Grid(4, axis=0), 0.5)
      >>> outline_leaf(jax.ShapeDtypeStruct((2, 3), "float32"), spec, "w").scale.shape
      (2, 1)
    """
    return jax.eval_shape(lambda w: spec.quantize(w, name, bits), leaf)


def compress_leaf(
    leaf: Any, spec: LeafSpec, name: str, bits: Bits | None = None
) -> tuple[QuantizedArray, QuantizationError | None]:
    """Returns a leaf as low-bit, and what it lost.

    Rows are compressed some at a time where no scale is shared between them, the rule looks at no
    more than a block, and bits have no price.

    Args:
      leaf: NumPy array, real floating.
      spec: How it becomes low-bit.
      name: Its name, for messages.
      bits: Its width; None for that of the spec.

    Raises:
      ValueError: As `quantize`; a weight that is not finite is named by its place in the leaf.

    Example:
      >>> from jaxclip._core.grids import Grid
      >>> spec = LeafSpec(Grid("ternary", axis=0), 0.5)
      >>> compress_leaf(np.array([[0.5, -0.25]], np.float32), spec, "w")[1]
      QuantizationError(squared_error=0.0625, squared_norm=0.3125, num_clipped=0)
    """

    def compress_part(part: Any) -> QuantizedArray:
        return spec.quantize(part, name, bits)

    def compress_whole() -> tuple[QuantizedArray, QuantizationError | None]:
        small = compress_part(leaf)
        return small, quantization_error(leaf, small)

    num_rows = max(_PART_BYTES // max(leaf[:1].nbytes, 1), 1) if leaf.ndim else 1
    if leaf.ndim == 0 or len(leaf) <= num_rows:
        return compress_whole()
    like = outline_leaf(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), spec, name, bits)
    has_own_scales = like.scale.shape[:1] == like.shape[:1]
    importance: Any = getattr(spec.rule, "importance", None)
    factors = np.shape(importance)
    # An importance may have a factor for each row, log8 measures all scales of the array, and
    # prices count all codes.
    is_joint = (
        not getattr(spec.rule, "is_blockwise", True)
        or (len(factors) == leaf.ndim and factors[0] > 1)
        or like.grid.scale_dtype == "log8"
        or spec.has_price
    )
    if is_joint or not has_own_scales:
        return compress_whole()
    return _by_rows(leaf, like, compress_part, num_rows)


def _by_rows(
    leaf: np.ndarray,
    like: QuantizedArray,
    compress_part: Callable[[Any], QuantizedArray],
    num_rows: int,
) -> tuple[QuantizedArray, QuantizationError | None]:
    whole = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), like)
    total = QuantizationError(0.0, 0.0, 0)
    for start in range(0, len(leaf), num_rows):
        part = leaf[start : start + num_rows]
        count = len(part)
        if not np.isfinite(part).all():
            compress_part(leaf)  # which names the entry by its place in the leaf
        # All parts have one shape, so that one program serves them.
        padding = [(0, num_rows - count)] + [(0, 0)] * (leaf.ndim - 1)
        small = compress_part(np.pad(part, padding) if count < num_rows else part)
        small = jax.tree.map(lambda array, n=count: np.asarray(array)[:n], small)
        for target, rows in zip(jax.tree.leaves(whole), jax.tree.leaves(small), strict=True):
            target[start : start + count] = rows
        error = quantization_error(part, small)
        assert error is not None
        total += error
    return whole, total
