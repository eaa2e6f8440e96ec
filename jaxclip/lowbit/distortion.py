"""The error of low-bit arrays: squared error and clipped entries, in float64.

In NumPy, some rows at a time: compiling for each shape would take longer than the sums.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core.floats import FLOAT32_MAX
from jaxclip.lowbit.arrays import QuantizedArray, is_quantized

# Entries that are cast to float64 at once, to bound memory.
_PIECE = 2**17
# Scales are rounded to float32 or less; entries beyond a level by only that are not clipped.
_ROUNDING = np.float32(2**-20)
_Array: TypeAlias = np.ndarray | jax.Array | QuantizedArray
_Rows: TypeAlias = slice | EllipsisType


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """The error of an array or of a part of one; errors of parts add up.

    Attributes:
      squared_error: `sum (w - q)**2`.
      squared_norm: `sum w**2`.
      num_clipped: Entries beyond the outermost level of their block's grid; None if the stored
        array is not low-bit.
    """

    squared_error: float
    squared_norm: float
    num_clipped: int | None

    def __add__(self, other: "QuantizationError") -> "QuantizationError":
        num_clipped = None
        if self.num_clipped is not None and other.num_clipped is not None:
            num_clipped = self.num_clipped + other.num_clipped
        return QuantizationError(
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            num_clipped,
        )


def quantization_error(array: Any, stored: Any) -> QuantizationError | None:
    """Returns the error of `stored` against `array`; None unless both are real floating."""
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (array, stored)):
        return None
    # An unchanged leaf has no error, even one that is not finite.
    error = 0.0 if stored is array else squared_error(array, stored)
    num_clipped = _num_clipped(array, stored) if isinstance(stored, QuantizedArray) else None
    return QuantizationError(error, squared_norm(array), num_clipped)


def squared_norm(array: _Array) -> float:
    """Returns `sum w**2`."""
    return float(sum(np.sum(np.square(piece)) for piece in _pieces(array)))


def squared_error(array: _Array, other: _Array) -> float:
    """Returns `sum (w - q)**2`."""
    differences = (a - b for a, b in zip(_pieces(array), _pieces(other), strict=True))
    return float(sum(np.sum(np.square(d)) for d in differences))


def _num_clipped(array: _Array, low_bit: QuantizedArray) -> int:
    # On a full grid the longer side reaches one level beyond the threshold; an entry there is
    # not clipped.
    zero = 0 if low_bit.zero is None else np.asarray(low_bit.zero).astype(np.float32)
    scale = np.asarray(low_bit.scale).astype(np.float32)
    with np.errstate(over="ignore"):  # a level beyond float32 clips nothing
        ends = [
            scale * (np.float32(code) - zero) * (1 + _ROUNDING) for code in low_bit.grid.code_range
        ]
    bottom = _expanded(low_bit, np.minimum(*ends))  # a negative scale swaps the ends
    top = _expanded(low_bit, np.maximum(*ends))
    read_values, count = _reader(array), 0
    for rows in _row_slices(low_bit.shape):
        w = read_values(rows).astype(np.float32, copy=False)
        outside = (w < _rows_of(bottom, rows)) | (w > _rows_of(top, rows))
        count += int(np.count_nonzero(outside))
    return count


# --- Values, some rows at a time ------------------------------------------------------


def _pieces(array: _Array) -> Iterator[np.ndarray]:
    """Yields the entries in float64, some at a time."""
    read_values = _reader(array)
    for rows in _row_slices(array.shape):
        yield read_values(rows).astype(np.float64).reshape(-1)


def _row_slices(shape: tuple[int, ...]) -> Iterator[_Rows]:
    if not shape:
        yield ...
        return
    step = max(_PIECE // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _rows_of(part: np.ndarray, rows: _Rows) -> np.ndarray:
    """Returns the rows of an array that broadcasts along its first axis."""
    return part if part.ndim == 0 or part.shape[0] == 1 else part[rows]


def _reader(array: _Array) -> Callable[[_Rows], np.ndarray]:
    """Returns a function of rows; the values of low-bit arrays are those of `dequantize`."""
    if not is_quantized(array):
        return np.asarray(array).__getitem__
    codes, scale = np.asarray(array.unpacked().qvalue), _expanded(array, np.asarray(array.scale))
    zero = None if array.zero is None else _expanded(array, np.asarray(array.zero))
    largest = min(float(jnp.finfo(array.dtype).max), FLOAT32_MAX)

    def decode(rows: _Rows) -> np.ndarray:
        levels = codes[rows].astype(np.float32)
        if zero is not None:
            levels = levels - _rows_of(zero, rows).astype(np.float32)
        with np.errstate(over="ignore"):
            values = _rows_of(scale, rows).astype(np.float32) * levels
        return np.clip(values, -largest, largest).astype(array.dtype)

    return decode


def _expanded(low_bit: QuantizedArray, compact: np.ndarray) -> np.ndarray:
    """Returns one value per block repeated along the axes of its groups."""
    return low_bit.grid.expand_with(np, compact, low_bit.shape)
