"""What arrays lose when they become low-bit: squared error and clipped entries, in float64."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxclip.grids import code_range
from jaxclip.quantization import QuantizedArray, dequantize

__all__ = ["Loss", "clipped_share", "loss_of", "squared_error", "squared_norm"]

# Entries that are taken to float64 at once: bounds memory.
_PIECE = 2**20
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
    return float(sum(np.dot(piece, piece) for piece in _pieces(array)))


def squared_error(array: Any, other: Any) -> float:
    """Returns `sum (w - q)**2`, in float64.

    Args:
      array: Real floating array of any shape, or a `QuantizedArray`; not traced.
      other: Another of the same shape.

    Returns:
      A Python float.

    Example:
      >>> from jaxclip.quantization import quantize
      >>> w = jnp.array([0.5, -0.5, 0.25])
      >>> squared_error(w, quantize(w, "ternary", threshold=0.5))
      0.0625
    """
    differences = (a - b for a, b in zip(_pieces(array), _pieces(other), strict=True))
    return float(sum(np.dot(d, d) for d in differences))


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
      >>> from jaxclip.quantization import quantize
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
            scale * (np.float32(code) - zero) * (1 + _ROUNDING)
            for code in code_range(low_bit.bits, low_bit.full_signed)
        ]
    bottom, top = (
        low_bit.granularity.expand(jnp.asarray(end), low_bit.shape)
        for end in (np.minimum(*ends), np.maximum(*ends))
    )
    array = dequantize(array) if isinstance(array, QuantizedArray) else jnp.asarray(array)
    w = array.astype(jnp.float32)
    return int(np.count_nonzero(np.asarray((w < bottom) | (w > top))))


def _pieces(array: Any) -> Iterator[np.ndarray]:
    """The entries in float64, some at a time."""
    if isinstance(array, QuantizedArray):
        array = dequantize(array)
    flat = np.asarray(array).reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE].astype(np.float64)
