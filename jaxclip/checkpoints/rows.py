"""A leaf compressed some rows at a time, with its error, so that memory is bounded.

If no scale is shared between rows, parts have the same codes as the whole, and their errors add up.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxclip._core import signals
from jaxclip._core.grids import Bits
from jaxclip.checkpoints.stored_rows import StoredRows
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.distortion import QuantizationError, quantization_error
from jaxclip.lowbit.policies import LeafSpec

_PART_BYTES = 2**24
"""Bytes of a leaf that are compressed at a time where its rows have scales of their own."""
_READ_BYTES = 2**22
"""Bytes of a leaf in a file that are read at a time: a few parts of the program for each core."""


def compress_leaf(
    leaf: np.ndarray, spec: LeafSpec, name: str, bits: Bits | None = None
) -> tuple[QuantizedArray, QuantizationError]:
    """Returns a real floating leaf as low-bit, and its error; `bits` replaces the spec's width."""
    on_host = spec.quantize_on_host(leaf, name, bits)
    if on_host is not None:  # float64, which jax may have disabled, stays the leaf's dtype
        return dataclasses.replace(on_host[0], dtype=leaf.dtype), on_host[1]

    def compress_part(part: np.ndarray) -> QuantizedArray:
        signals.check_stop()
        return dataclasses.replace(spec.quantize(part, name, bits), dtype=part.dtype)

    num_rows = max(_PART_BYTES // max(leaf[:1].nbytes, 1), 1) if leaf.ndim else 1
    if leaf.ndim and len(leaf) > num_rows:
        like = spec.outline(leaf, name, bits)
        if _has_separate_rows(like, spec):
            return _compress_by_rows(leaf, like, compress_part, num_rows)
    small = compress_part(leaf)
    return small, _error_of(leaf, small)


def compress_stored(
    stored: StoredRows, spec: LeafSpec, name: str
) -> tuple[QuantizedArray, QuantizationError] | None:
    """Returns `compress_leaf` of a leaf in a file, of which some rows are read at a time.

    None where it takes the whole leaf, or where that is not larger than what is read at a time.
    """
    if spec.has_price or spec.moments is not None or spec.step is not None:
        return None
    like = spec.outline(jax.ShapeDtypeStruct(stored.shape, stored.dtype), name)
    step = _rows_of_a_group(like)
    num_rows = max(_READ_BYTES // stored.row_bytes // (step or 1), 2) * (step or 1)
    if step is None or stored.shape[0] <= 2 * num_rows:
        return None
    whole = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), like)
    total = QuantizationError(0.0, 0.0, 0)
    start = 0
    while start < stored.shape[0]:
        # The last part takes what is left: a single group would be cut in another way.
        is_last = stored.shape[0] - start < 2 * num_rows
        rows = slice(start, stored.shape[0] if is_last else start + num_rows)
        start = rows.stop
        part = stored[rows]
        try:
            found = spec.quantize_on_host(part, name)
        except ValueError:
            if np.isfinite(part).all():
                raise
            found = spec.quantize_on_host(stored[:], name)  # raises with the entry's index in it
        if found is None:  # a rule that takes a program for just this leaf
            return None
        small, error = found
        blocks = slice(rows.start // step, -(-rows.stop // step))
        for target, values in zip(jax.tree.leaves(whole), jax.tree.leaves(small), strict=True):
            target[rows if target is whole.qvalue else blocks] = values
        total += error
    return dataclasses.replace(whole, dtype=stored.dtype), total


def _rows_of_a_group(like: QuantizedArray) -> int | None:
    """Returns how many rows share scales; None if all do, or parts of many rows."""
    grid, ndim = like.grid, len(like.shape)
    is_shared = not grid.group_axes(ndim) and 0 not in grid.channel_axes(ndim)
    if is_shared or grid.scale_dtype == "log8":  # which measures all scales of the array
        return None
    return grid.rows_of_a_group(like.shape)


def _has_separate_rows(like: QuantizedArray, spec: LeafSpec) -> bool:
    """Returns True if rows compressed in parts equal those of the array compressed at once."""
    importance: Any = getattr(spec.rule, "importance", None)
    factors = np.shape(importance)
    # An importance may have a factor for each row, log8 measures all scales of the array, prices
    # count all codes, and with moments rows make up for each other's errors.
    has_factor_for_each_row = len(factors) == like.ndim and factors[0] > 1
    return (
        like.scale.shape[:1] == like.shape[:1]
        and getattr(spec.rule, "is_blockwise", True)
        and not has_factor_for_each_row
        and like.grid.scale_dtype != "log8"
        and not spec.has_price
        and spec.moments is None
        and spec.step is None
    )


def _compress_by_rows(
    leaf: np.ndarray,
    like: QuantizedArray,
    compress_part: Callable[[np.ndarray], QuantizedArray],
    num_rows: int,
) -> tuple[QuantizedArray, QuantizationError]:
    whole = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), like)
    total = QuantizationError(0.0, 0.0, 0)
    for start in range(0, len(leaf), num_rows):
        part = leaf[start : start + num_rows]
        count = len(part)
        if not np.isfinite(part).all():
            compress_part(leaf)  # raises with the entry's index in the leaf, not in the part
        # All parts have one shape: one compiled program serves them.
        padding = [(0, num_rows - count)] + [(0, 0)] * (leaf.ndim - 1)
        small = compress_part(np.pad(part, padding) if count < num_rows else part)
        small = jax.tree.map(lambda array, n=count: np.asarray(array)[:n], small)
        for target, rows in zip(jax.tree.leaves(whole), jax.tree.leaves(small), strict=True):
            target[start : start + count] = rows
        total += _error_of(part, small)
    return whole, total


def _error_of(leaf: np.ndarray, small: QuantizedArray) -> QuantizationError:
    error = quantization_error(leaf, small)
    assert error is not None  # because the leaf is real floating
    return error
