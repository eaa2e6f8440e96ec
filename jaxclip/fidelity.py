"""What arrays lose when they become low-bit: squared error and clipped entries, in float64."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxclip.grids import code_range
from jaxclip.quantization import QuantizedArray, dequantize

__all__ = ["clipped_share", "squared_error", "squared_norm"]

# Entries that are taken to float64 at once: bounds memory.
_PIECE = 2**20
# Scales are rounded to float32 or less; what the rounding cuts off is not called clipped.
_ROUNDING = np.float32(2**-20)


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
    outside = np.asarray((w < bottom) | (w > top))
    return int(np.count_nonzero(outside)) / max(outside.size, 1)


def _pieces(array: Any) -> Iterator[np.ndarray]:
    """The entries in float64, some at a time."""
    if isinstance(array, QuantizedArray):
        array = dequantize(array)
    flat = np.asarray(array).reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE].astype(np.float64)
