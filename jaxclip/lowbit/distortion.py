"""What arrays lose when they become low-bit: squared error and clipped entries, in float64."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxclip._core.floats import FLOAT32_MAX
from jaxclip.lowbit.arrays import QuantizedArray

# Entries that are taken to float64 at once: bounds memory.
_PIECE = 2**17
# Scales are rounded to float32 or less; what the rounding cuts off is not called clipped.
_ROUNDING = np.float32(2**-20)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What an array, or a part of one, lost; losses of parts add up.

    Attributes:
      squared_error: `sum (w - q)**2`.
      squared_norm: `sum w**2`.
      num_clipped: Clipped entries; None if what is stored is not low-bit.
    """

    squared_error: float
    squared_norm: float
    num_clipped: int | None

    def __add__(self, other: "Loss") -> "Loss":
        clipped = None
        if self.num_clipped is not None and other.num_clipped is not None:
            clipped = self.num_clipped + other.num_clipped
        return Loss(
            self.squared_error + other.squared_error,
            self.squared_norm + other.squared_norm,
            clipped,
        )


def loss_of(array: Any, stored: Any) -> Loss | None:
    """Returns what an array lost.

    Args:
      array: Array of any shape and dtype, or a `QuantizedArray`; not traced.
      stored: What became of it, of the same shape; or the same object.

    Returns:
      A `Loss`; None unless both are real floating.

    Example:
      >>> w = np.array([3.0, 4.0], np.float32)
      >>> loss_of(w, np.array([3.0, 3.0], np.float32))
      Loss(squared_error=1.0, squared_norm=25.0, num_clipped=None)
    """
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (array, stored)):
        return None
    # An untouched leaf lost nothing, even one that is not finite.
    error = 0.0 if stored is array else squared_error(array, stored)
    clipped = _num_clipped(array, stored) if isinstance(stored, QuantizedArray) else None
    return Loss(error, squared_norm(array), clipped)


def squared_norm(array: Any) -> float:
    """Returns `sum w**2`, in float64.

    Args:
      array: Real floating array of any shape, or a `QuantizedArray`; not traced.

    Returns:
      A Python float.

    Example:
      >>> squared_norm(np.array([3.0, 4.0], np.float32))
      25.0
    """
    return float(sum(np.sum(np.square(piece)) for piece in _pieces(array)))


def squared_error(array: Any, other: Any) -> float:
    """Returns `sum (w - q)**2`, in float64.

    Args:
      array: Real floating array of any shape, or a `QuantizedArray`; not traced.
      other: Another of the same shape.

    Returns:
      A Python float.

    Example:
      >>> from jaxclip.lowbit.quantizer import quantize
      >>> w = jnp.array([0.5, -0.5, 0.25])
      >>> squared_error(w, quantize(w, "ternary", threshold=0.5))
      0.0625
    """
    differences = (a - b for a, b in zip(_pieces(array), _pieces(other), strict=True))
    return float(sum(np.sum(np.square(d)) for d in differences))


def clipped_share(array: Any, low_bit: QuantizedArray) -> float:
    """Returns the share of entries beyond the outermost level of their block's grid.

    Such an entry decodes to that level, however far away it is. On a full signed grid the
    longer side reaches one level beyond the threshold, and what lies there is not clipped.

    Args:
      array: Real floating array, or a `QuantizedArray`; not traced.
      low_bit: What it was quantized to.

    Returns:
      A Python float in [0, 1]; what exceeds a level by less than a millionth, as by the
      rounding of scales to float32, does not count.

    Example:
      >>> from jaxclip.lowbit.quantizer import quantize
      >>> w = jnp.array([0.5, -0.75, 2.0, 0.25])
      >>> clipped_share(w, quantize(w, "ternary", threshold=1.0))
      0.25
    """
    return _num_clipped(array, low_bit) / max(math.prod(low_bit.shape), 1)


def _num_clipped(array: Any, low_bit: QuantizedArray) -> int:
    zero = 0 if low_bit.zero is None else np.asarray(low_bit.zero).astype(np.float32)
    scale = np.asarray(low_bit.scale).astype(np.float32)
    with np.errstate(over="ignore"):  # a level beyond float32 clips nothing
        ends = [
            scale * (np.float32(code) - zero) * (1 + _ROUNDING) for code in low_bit.grid.code_range
        ]
    bottom, top = (_expanded(low_bit, end(*ends)) for end in (np.minimum, np.maximum))
    values, count = _values(array), 0
    for rows in _row_slices(low_bit.shape):
        w = values(rows).astype(np.float32, copy=False)
        outside = (w < _rows_of(bottom, rows)) | (w > _rows_of(top, rows))
        count += int(np.count_nonzero(outside))
    return count


# --- Values, some rows at a time ------------------------------------------------------
#
# NumPy throughout: what is measured is there already, and nothing is compiled for it.


def _pieces(array: Any) -> Iterator[np.ndarray]:
    """The entries in float64, some at a time."""
    values = _values(array)
    for rows in _row_slices(array.shape):
        yield values(rows).astype(np.float64).reshape(-1)


def _row_slices(shape: tuple[int, ...]) -> Iterator[Any]:
    """What cuts an array into pieces along its first axis."""
    if not shape:
        yield ...
        return
    step = max(_PIECE // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _rows_of(part: np.ndarray, rows: Any) -> np.ndarray:
    """The rows of what broadcasts against the array."""
    return part if part.ndim == 0 or part.shape[0] == 1 else part[rows]


def _values(array: Any) -> Callable[[Any], np.ndarray]:
    """Gives the values of some rows, of a low-bit array what `dequantize` returns."""
    if not isinstance(array, QuantizedArray):
        return np.asarray(array).__getitem__
    codes, scale = np.asarray(array.qvalue), _expanded(array, np.asarray(array.scale))
    zero = None if array.zero is None else _expanded(array, np.asarray(array.zero))
    largest = min(float(jnp.finfo(array.dtype).max), FLOAT32_MAX)

    def decoded(rows: Any) -> np.ndarray:
        levels = codes[rows].astype(np.float32)
        if zero is not None:
            levels = levels - _rows_of(zero, rows).astype(np.float32)
        with np.errstate(over="ignore"):
            values = _rows_of(scale, rows).astype(np.float32) * levels
        return np.clip(values, -largest, largest).astype(array.dtype)

    return decoded


def _expanded(low_bit: QuantizedArray, compact: np.ndarray) -> np.ndarray:
    """One value a block repeated along the group axis, to broadcast against the array."""
    axis = low_bit.grid.group_axis(low_bit.ndim)
    if axis is None:
        return compact
    repeated = np.repeat(compact, low_bit.grid.group_size_of(low_bit.shape), axis=axis)
    return repeated[(slice(None),) * axis + (slice(low_bit.shape[axis]),)]
