"""Arrays of every shape as parts of one shape: slabs of pieces, of which some make a row.

A row is the entries that share a scale. It is cut into pieces of equal length, the last one
padded with zeros, and a slab holds whole rows. So a program that is compiled for the shape of a
part serves arrays of every shape.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxclip._core.grids import Grid

_PART = 2**18  # entries of a part
_SLAB = 2**14  # entries of a slab of short rows, which stays in the cache
_PIECE = 64  # entries of a piece of a long row
_TILE = 2**12  # entries that are transposed at a time
_LONGEST_PIECE = 128  # entries of a group that is one piece


class PartShape(NamedTuple):
    """Shape of a part.

    Attributes:
      num_slabs: Slabs of a part; no row is in two.
      num_pieces: Pieces of a slab.
      piece: Entries of a piece.
      is_row: True if each piece is a row, so that a slab may be cut anywhere.
    """

    num_slabs: int
    num_pieces: int
    piece: int
    is_row: bool

    def cut(self) -> "PartShape":
        """Returns the same part in slabs that stay in the cache, where rows allow it."""
        num_slabs = _PART // _SLAB if self.is_row else self.num_slabs
        return self._replace(
            num_slabs=num_slabs, num_pieces=self.num_pieces * self.num_slabs // num_slabs
        )


class Place(NamedTuple):
    """The rows of a slab: some channels, and some groups of each."""

    channels: slice
    groups: slice

    @property
    def num_rows(self) -> int:
        return math.prod(s.stop - s.start for s in self)


class Parts(NamedTuple):
    """An array as channels of groups of entries; each group is a row.

    Attributes:
      shape: The array's shape.
      order: Its axes, those of the channels first.
      num_apart: The number of axes of the channels.
      num_channels: Their product.
      length: Entries of a channel.
      size: Entries of a group; the last of a channel may have fewer.
      part_shape: Shape of the parts. Few different ones occur.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    num_apart: int
    num_channels: int
    length: int
    size: int
    part_shape: PartShape

    @property
    def num_groups(self) -> int:
        return -(-self.length // self.size)

    @property
    def row_pieces(self) -> int:
        """Pieces of a row."""
        return -(-self.size // self.part_shape.piece)

    def matrix(self, array: np.ndarray) -> np.ndarray:
        """Returns an array as (channels, entries), a view if one is possible."""
        return array.transpose(self.order).reshape(self.num_channels, self.length)

    def empty_codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns an empty array of codes, and it as a matrix."""
        codes = np.empty(self.shape, np.int8)
        matrix = self.matrix(codes)
        if np.may_share_memory(codes, matrix):
            return codes, matrix
        # These axes cannot be one in this order. So the codes are stored in another.
        matrix = np.empty((self.num_channels, self.length), np.int8)
        stored = matrix.reshape([self.shape[a] for a in self.order])
        return stored.transpose(np.argsort(self.order)), matrix

    def as_scales(self, per_group: np.ndarray) -> np.ndarray:
        """Returns a matrix (channels, groups) in the shape of the scales."""
        inside = [1] * (len(self.order) - self.num_apart)
        if inside:
            inside[-1] = self.num_groups
        apart = [self.shape[a] for a in self.order[: self.num_apart]]
        scales = per_group.reshape((*apart, *inside)).transpose(np.argsort(self.order))
        return np.array(scales, order="C")

    def places(self) -> list[list[Place]]:
        """Returns the places of the slabs of each part."""
        slabs, count = list(self._slabs()), self.part_shape.num_slabs
        return [slabs[i : i + count] for i in range(0, len(slabs), count)]

    def _slabs(self) -> Iterator[Place]:
        most = self.part_shape.num_pieces // self.row_pieces
        groups = min(most, self.num_groups)
        channels = most // groups
        for c in range(0, self.num_channels, channels):
            for g in range(0, self.num_groups, groups):
                yield Place(
                    slice(c, min(c + channels, self.num_channels)),
                    slice(g, min(g + groups, self.num_groups)),
                )

    def counts(self, place: Place) -> np.ndarray:
        """Returns the entries of each row of a place, without padding."""
        last = self.length - (self.num_groups - 1) * self.size
        groups = np.arange(place.groups.start, place.groups.stop)
        counts = np.where(groups == self.num_groups - 1, last, self.size)
        return np.tile(counts, place.channels.stop - place.channels.start)

    def pairs(
        self, matrix: np.ndarray, slab: np.ndarray, place: Place
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields views of a matrix and of a slab (pieces, entries) with the same entries."""
        num_channels = place.channels.stop - place.channels.start
        rows = slab[: place.num_rows * self.row_pieces].reshape(num_channels, -1, self.row_length)
        start = place.groups.start * self.size
        some = matrix[place.channels, start : place.groups.stop * self.size]
        num_full = some.shape[1] // self.size
        full = some[:, : num_full * self.size].reshape(num_channels, num_full, self.size)
        rest = some[:, num_full * self.size :]
        yield from _in_tiles(full, rows[:, :num_full, : self.size])
        if rest.size:
            yield rest, rows[:, num_full, : rest.shape[1]]

    @property
    def row_length(self) -> int:
        """Entries of a row with its padding."""
        return self.row_pieces * self.part_shape.piece


def parts_of(shape: tuple[int, ...], grid: Grid) -> Parts:
    """Returns the parts of an array that is not empty."""
    ndim, inside = len(shape), grid.group_axes(len(shape))
    channels = [a for a in range(ndim) if a not in inside] if inside else grid.channel_axes(ndim)
    inside = inside or tuple(a for a in range(ndim) if a not in channels)
    length = math.prod(shape[a] for a in inside)
    size = grid.group_size_of(shape) if grid.group_axes(ndim) else length
    return Parts(
        shape=shape,
        order=(*channels, *inside),
        num_apart=len(channels),
        num_channels=math.prod(shape[a] for a in channels),
        length=length,
        size=size,
        part_shape=_part_shape(size, is_grouped=size < length),
    )


def _in_tiles(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields two arrays (channels, groups, entries) tile by tile, if `a` is stored by columns."""
    # A copy would read every cache line of `a` again for each of its channels.
    if a.strides[2] <= a.strides[0]:
        yield a, b
        return
    step = max(_TILE // len(a), _PIECE)
    for g in range(a.shape[1]):
        for e in range(0, a.shape[2], step):
            yield a[:, g, e : e + step], b[:, g, e : e + step]


def _part_shape(size: int, is_grouped: bool) -> PartShape:
    if is_grouped and size <= _LONGEST_PIECE:
        num_slabs = _PART // _SLAB
        return PartShape(1, num_slabs * (_SLAB // size), size, is_row=True)
    row_pieces = -(-size // _PIECE)
    # At least eight rows in a slab, so that little of it is left empty.
    if 8 * row_pieces * _PIECE <= _SLAB:
        return PartShape(_PART // _SLAB, _SLAB // _PIECE, _PIECE, is_row=False)
    # A row longer than a part has parts of its own, of the next power of two.
    num_pieces = max(_PART // _PIECE, 1 << (row_pieces - 1).bit_length())
    return PartShape(1, num_pieces, _PIECE, is_row=False)
