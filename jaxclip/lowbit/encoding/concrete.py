"""Codes, scales and errors of concrete arrays of every shape, by two compiled programs.

    array -> parts -> (search for scales) -> (codes, errors) -> codes, scales, error of the array

Programs are compiled for the shape of a part, not for that of an array. Threads share the parts.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxclip._core import signals
from jaxclip._core.grids import Grid
from jaxclip._core.threads import in_threads, num_cores
from jaxclip.lowbit.encoding.parts import Parts, Place, parts_of
from jaxclip.lowbit.encoding.programs import (
    Found,
    Numbers,
    Program,
    Rounding,
    Search,
    Statistics,
    compiled,
    numbers_of,
    scale_of,
)
from jaxclip.lowbit.scale_formats import dtype_in_memory
from jaxclip.thresholds.search.candidates import is_hard

# How scales are chosen: for the least squared error, or for the largest weight.
Choice: TypeAlias = Literal["mse_optimal", "max_abs"]


class Encoded(NamedTuple):
    """A low-bit array in NumPy, and its error.

    Attributes:
      codes: int8, in the array's shape.
      scale: One for each block, as the grid stores them.
      zero: int8, in the shape of the scales; None without a zero point.
      squared_error: `sum (w - q)**2`.
      squared_norm: `sum w**2`; not finite if an entry is not.
      num_clipped: Entries beyond the outermost level of their block's grid.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    squared_error: float
    squared_norm: float
    num_clipped: int


class _Part(NamedTuple):
    """The slabs of a part, as programs read them."""

    pieces: np.ndarray
    counts: np.ndarray  # entries of each row
    lengths: np.ndarray  # entries of each piece without padding
    row_pieces: np.int32
    num_used: np.int32
    is_hard: np.bool_  # rows of this length need more passes of a search


def encode_concrete(array: np.ndarray, grid: Grid, choice: Choice) -> Encoded:
    """Returns codes, scales and error of a real floating array that is not empty."""
    parts = parts_of(array.shape, grid)
    matrix = parts.matrix(array)
    # float64 is measured in float32, in which codes and scales are computed.
    dtype = "float32" if array.dtype.itemsize > 4 else array.dtype.name
    round_part = compiled(Rounding(parts.part_shape, grid.scale_dtype, dtype))
    plan = _search_for(parts, grid, choice)
    search_part = compiled(plan) if plan else _no_search
    numbers = numbers_of(grid, is_searched=plan is not None)
    if grid.scale_dtype == "log8":  # each scale is stored as a fraction of the largest
        numbers = numbers._replace(largest=_largest_scale(search_part, parts, matrix, numbers))

    codes, code_matrix = parts.empty_codes()
    shape = parts.num_channels, parts.num_groups
    scale = np.empty(shape, dtype_in_memory(grid.scale_dtype))
    zero = np.empty(shape, np.int8)

    def encode(places: Sequence[Place]) -> tuple[float, float, int]:
        part = _part(parts, matrix, places)
        found = search_part(*part, numbers)
        rounded, statistics = jax.tree.map(np.asarray, round_part(*part, found, numbers))
        for i, place in enumerate(places):
            for target, source in parts.pairs(code_matrix, rounded[i], place):
                target[...] = source
        for whole, values in ((scale, statistics.scale), (zero, np.asarray(found.zero))):
            for place, some in zip(places, _rows_of(values, parts, places), strict=True):
                target = whole[place.channels, place.groups]
                target[...] = some.reshape(target.shape)
        return _totals(statistics, len(places))

    errors, norms, num_clipped = zip(*_in_threads(encode, parts), strict=True)
    return Encoded(
        codes=codes,
        scale=parts.as_scales(scale),
        zero=parts.as_scales(zero) if grid.zero_point else None,
        squared_error=sum(errors),
        squared_norm=sum(norms),
        num_clipped=sum(num_clipped),
    )


def _search_for(parts: Parts, grid: Grid, choice: Choice) -> Search | None:
    """Returns the search for the scales of an array; None if they follow from the largest."""
    if choice == "max_abs":
        return Search(parts.part_shape, "range") if grid.zero_point else None
    if grid.bits == 1:
        return Search(parts.part_shape, "mean")
    if grid.zero_point:
        return Search(parts.part_shape, "scale_and_zero", is_hard=is_hard(parts.size))
    return Search(parts.part_shape, "scale", has_zero=not grid.is_odd)


def _largest_scale(
    search_part: Program, parts: Parts, matrix: np.ndarray, numbers: Numbers
) -> np.float32:
    """Returns the largest scale of all rows, not rounded."""

    def largest_of(places: Sequence[Place]) -> float:
        part = _part(parts, matrix, places)
        size = search_part(*part, numbers).size if numbers.is_searched else np.abs(part.pieces)
        return np.max(np.asarray(size)[: len(places)])

    return scale_of(np.float32(max(_in_threads(largest_of, parts))), numbers, np)


def _no_search(pieces: np.ndarray, *_: Any) -> Found:
    """Returns what is found where the largest weight decides."""
    nothing = np.zeros(pieces.shape[:2], np.float32)
    return Found(*[nothing] * len(Found._fields))


def _rows_of(per_piece: np.ndarray, parts: Parts, places: Sequence[Place]) -> list[np.ndarray]:
    """Returns the values of the rows that each slab has."""
    step = parts.row_pieces
    return [per_piece[i, : place.num_rows * step : step] for i, place in enumerate(places)]


def _totals(statistics: Statistics, num_slabs: int) -> tuple[float, float, int]:
    """Returns squared error, squared norm and the number of clipped entries."""
    used = Statistics(*(v[:num_slabs].astype(np.float64) for v in statistics))
    error = np.sum(used.error * np.square(used.error_unit))
    norm = np.sum(used.norm * np.square(used.norm_unit))
    return float(error), float(norm), int(np.sum(used.num_clipped))


def _in_threads(function: Callable[[Sequence[Place]], Any], parts: Parts) -> list[Any]:
    """Returns the results of a function of parts, in their order."""

    def checked(places: Sequence[Place], is_over: threading.Event) -> Any:
        del is_over  # a part takes milliseconds
        signals.check_stop()
        return function(places)

    places = parts.places()
    return in_threads(checked, places, min(num_cores(), len(places)))


def _part(parts: Parts, matrix: np.ndarray, places: Sequence[Place]) -> _Part:
    """Returns the entries of some slabs."""
    num_slabs, num_pieces, piece, _ = parts.part_shape
    pieces = _aligned_zeros((num_slabs, num_pieces, piece))
    counts, lengths = (np.full((num_slabs, num_pieces), n, np.float32) for n in (1, 0))
    starts = np.arange(parts.row_pieces) * piece
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, and refused later
        for i, place in enumerate(places):
            in_row = parts.counts(place)
            counts[i, : place.num_rows] = in_row
            in_pieces = np.clip(in_row[:, None] - starts, 0, piece)
            lengths[i, : in_pieces.size] = in_pieces.ravel()
            for source, target in parts.pairs(matrix, pieces[i], place):
                target[...] = source
    cut = parts.part_shape.cut()
    used = -(-places[0].num_rows // cut.num_pieces) if cut.is_row else len(places)
    numbers = np.int32(parts.row_pieces), np.int32(used), np.bool_(is_hard(parts.size))
    return _Part(pieces, counts, lengths, *numbers)


def _aligned_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Returns zeros in float32 that jax on CPU reads where they are, because of their address."""
    alignment, num_bytes = 64, 4 * math.prod(shape)
    memory = np.zeros(num_bytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + num_bytes].view(np.float32).reshape(shape)
