"""Trees whose files were recorded once, `recorded/version_*.safetensors`; made by formula.

A file of an old version is never written again. `python tests/oracles/recorded_trees.py FILE` shows
what the code of today writes for the newest one.
"""

import pathlib
import sys

import ml_dtypes
import numpy as np

from jaxclip import checkpoints
from jaxclip._core.grids import Grid, code_range
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.coding.trellis import levels_of

RECORDED = pathlib.Path(__file__).parents[1] / "peers" / "recorded"


def codes_of(shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Codes that run through the whole grid, in an order that is not sorted."""
    return (np.arange(np.prod(shape, dtype=int)) * 7 % (high - low + 1) + low).reshape(shape)


def version_1() -> dict:
    """Every width, granularity and kind of node, and plain arrays of some dtypes."""

    def low_bit(bits, shape, axis=None, group_size=None, levels="full", dtype=np.float32):
        low, high = code_range(bits, levels)
        codes = codes_of(shape, low, high)
        codes = np.where(codes == 0, 1, codes) if bits == 1 else codes
        grid = Grid(bits, levels=levels, axis=axis, group_size=group_size)
        scale_shape = grid.scale_shape(shape)
        scale = np.arange(1, 1 + np.prod(scale_shape, dtype=int)).reshape(scale_shape) * 0.1
        return QuantizedArray(
            codes.astype(np.int8),
            (scale * np.where(levels == "full" and bits == 4, -1, 1)).astype(np.float32),
            grid, np.dtype(dtype),
        )  # fmt: skip

    widths = (1, "ternary", 2, 3, 4, 5, 6, 8)
    return {
        "full": {str(b): low_bit(b, (7, 11), axis=-1) for b in widths},
        "narrow": {str(b): low_bit(b, (41,), levels="narrow") for b in widths},
        "grouped": [low_bit(b, (3, 10), -2, 4, dtype=ml_dtypes.bfloat16) for b in (2, 3)],
        "channels": (low_bit(4, (2, 3, 4), axis=(0, 2), dtype=np.float16), None),
        "single": low_bit(4, ()),
        "empty": low_bit("ternary", (0, 3), axis=1),
        "plain": {0: np.arange(5, dtype=np.int16), -1: np.full((2, 2), 1.5, ml_dtypes.bfloat16)},
        "a/b:c%": np.float32(0.1),
    }


def version_2() -> dict:
    """Zero points, and scales in every format, alone and together."""

    def low_bit(bits, scale_dtype, has_zero, shape=(5, 9), axis=-1, group_size=None):
        low, high = code_range(bits)
        grid = Grid(
            bits, axis=axis, group_size=group_size, zero_point=has_zero, scale_dtype=scale_dtype
        )
        scale_shape = grid.scale_shape(shape)
        places = np.arange(np.prod(scale_shape, dtype=int)).reshape(scale_shape)
        scale = 0.5 * 2.0 ** -np.minimum(places, 15)  # exact in every format
        sign = np.where(has_zero | (places % 2 == 0), 1, -1)
        in_memory = {"log8": "float32", "bfloat16": ml_dtypes.bfloat16}.get(
            scale_dtype, scale_dtype
        )
        return QuantizedArray(
            codes_of(shape, low, high).astype(np.int8), (scale * sign).astype(in_memory),
            grid, np.dtype(np.float32),
            codes_of(scale_shape, low, high).astype(np.int8) if has_zero else None,
        )  # fmt: skip

    formats = ("float32", "float16", "bfloat16", "log8")
    return {
        "scales": {name: low_bit(4, name, False) for name in formats},
        "zeros": {name: low_bit(3, name, True) for name in formats},
        "ternary": low_bit("ternary", "log8", True, shape=(4, 7), axis=0, group_size=3),
        "8": low_bit(8, "float32", True, shape=(300,), axis=None, group_size=100),
        "empty": low_bit(2, "log8", True, shape=(0, 3)),
        "plain": [np.arange(3.0), None],
    }


def version_3() -> dict:
    """Groups along all inputs of an output, and of a row where no axis has the outputs."""

    def low_bit(bits, shape, axis, group_size, scale_shape):
        scale = np.arange(1, 1 + np.prod(scale_shape, dtype=int)).reshape(scale_shape) * 0.1
        low, high = code_range(bits)
        return QuantizedArray(
            codes_of(shape, low, high).astype(np.int8), scale.astype(np.float32),
            Grid(bits, axis=axis, group_size=group_size), np.dtype(np.float32),
        )  # fmt: skip

    return {
        "flax": low_bit(4, (3, 2, 5, 4), -1, 8, (1, 1, 4, 4)),
        "torch": low_bit("ternary", (4, 5, 3, 2), 0, 16, (4, 1, 1, 2)),
        "middle": low_bit(3, (3, 2, 5), 1, 4, (1, 2, 4)),
        "rows": low_bit(8, (2, 3, 5), None, 4, (2, 1, 4)),
        "matrix": low_bit(2, (3, 10), -2, 4, (3, 3)),
    }


def version_4() -> dict:
    """Codes coded in lanes: on paths of both trellises and on none, with rare large ones."""
    places = np.arange(40 * 300)
    noise = places * 7919 % 31 + places * 104729 % 29 + places * 1299709 % 23 - 40
    size = np.where(places // 300 % 2, 0.02, 0.15)  # rows of two classes
    indices = np.round(noise * size).astype(np.int8).reshape(40, 300)

    def low_bit(codes):
        scale = np.arange(1, len(codes) + 1, dtype=np.float32)[:, None] * np.float32(0.01)
        return QuantizedArray(codes.astype(np.int8), scale, Grid(8, axis=0), np.dtype(np.float32))

    rare = indices.reshape(4, 3000)[:1].copy()
    rare[0, 1000] = 100
    return {
        "8 states": low_bit(np.asarray(levels_of(indices, 8))),
        "4 states": low_bit(np.asarray(levels_of(indices, 4))),
        "1 state": low_bit(indices),
        "escaped": low_bit(rare),
        "packed": low_bit(codes_of((40, 2), -128, 127)),
    }


def version_5() -> dict:
    """Balanced levels, packed and coded, beside another grid."""

    def low_bit(bits, shape, **fields):
        grid = Grid(bits, levels="balanced", **fields)
        low, high = grid.code_range
        codes = 2 * codes_of(shape, 0, (high - low) // 2) + low
        codes[: len(codes) // 2] = 1  # so that coding pays
        scale_shape = grid.scale_shape(shape)
        scale = np.arange(1, 1 + np.prod(scale_shape, dtype=int)).reshape(scale_shape) * 0.1
        return QuantizedArray(
            codes.astype(np.int8), scale.astype(np.float32), grid, np.dtype(np.float32)
        )

    full = version_1()["full"]["4"]
    widths = {str(b): low_bit(b, (60, 50), axis=-1) for b in (1, 2, 3, 4)}
    return widths | {"grouped": low_bit(2, (3, 10), axis=0, group_size=4), "full": full}


def version_6() -> dict:
    """Float leaves whose zeros are left out, with each coding of masks and without any."""
    places = np.arange(40 * 60)
    mixed = places * 2654435761 % 2**32
    mixed = (mixed ^ mixed >> 15) * 2246822519 % 2**32 >> 16  # looks like noise

    def sparse(is_value, dtype=np.float32, shape=(40, 60)):
        values = np.where(is_value, (mixed % 61 - 30.5) / 8, 0).reshape(shape)
        return values.astype(dtype)

    row, column = places // 60, places % 60
    one_of_four = row % 4 == (row // 4 * 60 + column) * 7919 % 31 % 4
    of_rows = mixed % 64 < np.where(row % 4 == 0, 48, 1)
    few = np.zeros((200, 40), np.float32)
    few[::2, 1] = 1.5
    return {
        "packed": sparse(mixed % 2 == 0),
        "groups": sparse(one_of_four, ml_dtypes.bfloat16),
        "rows": sparse(of_rows, np.float16, (4, 10, 60)),
        "few": few,
        "float8": sparse(mixed % 5 == 0, ml_dtypes.float8_e5m2),
        "float64": np.where(mixed % 64 == 7, -0.0, 0.0),
        "zeros": np.zeros(999, np.float32),
        "dense": np.arange(1, 9, dtype=np.float32),
        "low": version_1()["channels"][0],
    }


if __name__ == "__main__":
    checkpoints.save(sys.argv[1], version_6(), coding="lanes")
