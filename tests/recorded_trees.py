"""Trees whose files were recorded once, `recorded/version_*.safetensors`; made by formula.

A file of an old version is never written again. `python tests/recorded_trees.py FILE` shows
what the code of today writes for the newest one.
"""

import pathlib
import sys

import ml_dtypes
import numpy as np

from jaxclip import checkpoints
from jaxclip.grids import Granularity, code_range
from jaxclip.quantization import QuantizedArray

RECORDED = pathlib.Path(__file__).parent / "recorded"


def codes_of(shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Codes that run through the whole grid, in an order that is not sorted."""
    return (np.arange(np.prod(shape, dtype=int)) * 7 % (high - low + 1) + low).reshape(shape)


def version_1() -> dict:
    """Every width, granularity and kind of node, and plain arrays of some dtypes."""

    def low_bit(bits, shape, axis=None, group_size=None, full_signed=True, dtype=np.float32):
        low, high = code_range(bits, full_signed)
        codes = codes_of(shape, low, high)
        codes = np.where(codes == 0, 1, codes) if bits == 1 else codes
        granularity = Granularity(axis, group_size)
        scale_shape = granularity.scale_shape(shape)
        scale = np.arange(1, 1 + np.prod(scale_shape, dtype=int)).reshape(scale_shape) * 0.1
        return QuantizedArray(
            codes.astype(np.int8),
            (scale * np.where(full_signed and bits == 4, -1, 1)).astype(np.float32),
            bits, full_signed, granularity, np.dtype(dtype),
        )  # fmt: skip

    widths = (1, "ternary", 2, 3, 4, 5, 6, 8)
    return {
        "full": {str(b): low_bit(b, (7, 11), axis=-1) for b in widths},
        "narrow": {str(b): low_bit(b, (41,), full_signed=False) for b in widths},
        "grouped": [low_bit(b, (3, 10), -2, 4, dtype=ml_dtypes.bfloat16) for b in (2, 3)],
        "channels": (low_bit(4, (2, 3, 4), axis=(0, 2), dtype=np.float16), None),
        "single": low_bit(4, ()),
        "empty": low_bit("ternary", (0, 3), axis=1),
        "plain": {0: np.arange(5, dtype=np.int16), -1: np.full((2, 2), 1.5, ml_dtypes.bfloat16)},
        "a/b:c%": np.float32(0.1),
    }


if __name__ == "__main__":
    checkpoints.save(sys.argv[1], version_1())
