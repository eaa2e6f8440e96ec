"""Codes packed along one axis of an array, which keeps its other axes: arrays at rest in memory.

    byte = sum_k (code_k - low) << (k * width),    8 / width codes that follow each other

`packing` has the dense bytes of files. Here rows stay apart, so shifts alone decode a tile, and a
shard of the bytes has the codes of the shard.
"""

from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxclip._core.grids import Bits, Grid, Levels

_Array: TypeAlias = Any  # of NumPy or of jax; results are of the same kind
# Bits that a code takes. Widths that do not divide a byte are rounded up: XLA does not vectorize
# loops over codes that lie across bytes, which made products 20 times slower.
_WIDTHS: dict[Bits, int] = {1: 1, "ternary": 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}


def codes_per_byte(bits: Bits) -> int:
    """Returns the number of codes that share a byte."""
    return 8 // _WIDTHS[bits]


class Packing(NamedTuple):
    """The axis along which codes are packed, and the entries that it has unpacked.

    Attributes:
      axis: The axis, counted from the end, so that it stays right in stacks.
      length: Entries of the array along the axis.
    """

    axis: int
    length: int

    @classmethod
    def of(cls, shape: tuple[int, ...], bits: Bits) -> "Packing":
        """Returns the packing of the fewest bytes, if possible not along the last axis."""
        # Along the last axis codes that share a byte are neighbours: slow to take apart.
        axes = range(-2, -len(shape) - 1, -1) if len(shape) > 1 else (-1,)
        axis = min(axes, key=lambda a: cls(a, shape[a]).num_rows(bits) / max(shape[a], 1))
        return cls(axis, shape[axis])

    def shape_of(self, packed_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the array."""
        shape = list(packed_shape)
        shape[self.axis] = self.length
        return tuple(shape)

    def num_rows(self, bits: Bits) -> int:
        """Returns the bytes along the axis."""
        return -(-self.length // codes_per_byte(bits))


def pack_along(codes: _Array, packing: Packing, bits: Bits, levels: Levels) -> _Array:
    """Returns int8 codes packed along an axis, as uint8."""
    xp = np if isinstance(codes, np.ndarray) else jnp
    axis, per_byte = packing.axis % codes.ndim, codes_per_byte(bits)
    unsigned = Grid(bits, levels=levels).to_places(codes)
    padding = [(0, 0)] * codes.ndim
    padding[axis] = (0, -packing.length % per_byte)
    unsigned = xp.pad(unsigned.astype(np.uint8), padding)
    before, after = unsigned.shape[:axis], unsigned.shape[axis + 1 :]
    fields = unsigned.reshape(*before, packing.num_rows(bits), per_byte, *after)
    fields = fields << _places(per_byte, axis + 1, len(after))
    return xp.sum(fields, axis=axis + 1, dtype=np.uint8)


def unpack_along(packed: _Array, packing: Packing, bits: Bits, levels: Levels) -> _Array:
    """Returns the int8 codes that `pack_along` packed."""
    axis, per_byte = packing.axis % packed.ndim, codes_per_byte(bits)
    before, after = packed.shape[:axis], packed.shape[axis + 1 :]
    rows = packed.shape[axis]
    fields = packed.reshape(*before, rows, 1, *after) >> _places(per_byte, axis + 1, len(after))
    unsigned = fields & np.uint8(2 ** _WIDTHS[bits] - 1)
    unsigned = unsigned.reshape(*before, rows * per_byte, *after)
    if rows * per_byte != packing.length:
        unsigned = unsigned[(slice(None),) * axis + (slice(packing.length),)]
    return Grid(bits, levels=levels).from_places(unsigned.astype(np.int8))


def _places(per_byte: int, num_before: int, num_after: int) -> np.ndarray:
    """Returns the places of codes in a byte, along an axis between others."""
    places = np.arange(0, 8, 8 // per_byte, dtype=np.uint8)
    return places.reshape(*(1,) * num_before, per_byte, *(1,) * num_after)
