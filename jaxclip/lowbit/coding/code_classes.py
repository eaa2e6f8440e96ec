"""Classes of codes: entries whose codes are coded by one table, because they are about as large.

    class of entry (i, j) = clip(row_class[i] + column_class[j], 0, number - 1)

Rows are chains, columns the places in them. A class is a quarter of an octave of the deviation: the
next class instead of the right one costs .04 bits a code.
"""

import dataclasses
import zlib

import numpy as np

from jaxclip.lowbit.coding import code_lengths

MAX_CLASSES = 16
NUM_MAGNITUDES = code_lengths.LARGEST + 2  # those beyond are one
_BLOCK = 2**18  # entries counted at a time
_SAMPLE = 2**18  # entries on which kinds of classes are compared
_PER_OCTAVE = 4
_RANGE = 16  # classes of rows, and of columns, are this far from their median at most
_TABLE_BYTES = 10  # about
_LEAST = 32  # entries that have a class of their own; of few entries a class would be their code


@dataclasses.dataclass(frozen=True)
class Classes:
    """Classes of rows (int8) and columns (int8), and their number."""

    rows: np.ndarray
    columns: np.ndarray
    number: int = 1

    def of(self, rows: slice) -> np.ndarray:
        """Returns the classes of all entries of some rows."""
        total = self.rows[rows, None].astype(np.int64) + self.columns
        return np.clip(total, 0, self.number - 1)

    def stored(self) -> bytes:
        """Returns the classes as bytes; none if there is one class."""
        return self.rows.tobytes() + self.columns.tobytes() if self.number > 1 else b""


def one_class(num_rows: int, num_columns: int) -> Classes:
    """Returns the same class for all entries."""
    return Classes(np.zeros(num_rows, np.int8), np.zeros(num_columns, np.int8))


def blocks(shape: tuple[int, int]) -> list[slice]:
    """Returns the rows of blocks of bounded size."""
    step = max(_BLOCK // max(shape[1], 1), 1)
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def count_codes(codes: np.ndarray, is_odd: np.ndarray, classes: Classes) -> np.ndarray:
    """Returns how often each magnitude occurs: (2 * classes, magnitudes), odd states second."""
    size = 2 * classes.number * NUM_MAGNITUDES
    counts = np.zeros(size, np.int64)
    for rows in blocks(codes.shape):
        place = np.minimum(np.abs(codes[rows].astype(np.int64)), NUM_MAGNITUDES - 1)
        place += NUM_MAGNITUDES * (2 * classes.of(rows) + is_odd[rows])
        counts += np.bincount(place.reshape(-1), minlength=size)
    return counts.reshape(-1, NUM_MAGNITUDES)


def choose_classes(codes: np.ndarray, is_odd: np.ndarray) -> Classes:
    """Returns the classes that take the fewest bytes: none, of rows, of columns, or of both."""
    none = one_class(*codes.shape)
    if not codes.size:
        return none
    row_sums, column_sums = np.zeros(len(codes)), np.zeros(codes.shape[1])
    for block in blocks(codes.shape):
        squares = np.square(codes[block].astype(np.float64))
        row_sums[block] = squares.sum(1)
        column_sums += squares.sum(0)
    rows, columns = _octaves(row_sums), _octaves(column_sums)
    candidates = []
    if codes.shape[1] >= _LEAST:
        candidates.append((rows, none.columns))
    if codes.shape[0] >= _LEAST:
        candidates.append((none.rows, columns))
    if len(candidates) == 2:
        candidates.append((rows, columns))
    kept = slice(None, None, max(codes.size // _SAMPLE, 1))
    sampled, sampled_odd = np.ascontiguousarray(codes[kept]), is_odd[kept]

    def cost(classes: Classes) -> float:
        part = dataclasses.replace(classes, rows=classes.rows[kept])
        counts = count_codes(sampled, sampled_odd, part)
        bits = _entropy(counts) * len(codes) / len(sampled)
        num_tables = np.count_nonzero(counts.any(1))
        return bits + 8 * (_TABLE_BYTES * num_tables + len(zlib.compress(classes.stored(), 9)))

    return min([none, *(_numbered(*pair) for pair in candidates)], key=cost)


def _octaves(sums_of_squares: np.ndarray) -> np.ndarray:
    """Returns deviations as quarters of an octave from their median."""
    positive = sums_of_squares[sums_of_squares > 0]
    middle = np.median(positive) if positive.size else 1.0
    ratio = np.maximum(sums_of_squares / middle, 2.0**-32)
    found = np.round(_PER_OCTAVE / 2 * np.log2(ratio))
    return np.clip(found, -_RANGE, _RANGE).astype(np.int8)


def _numbered(rows: np.ndarray, columns: np.ndarray) -> Classes:
    """Returns classes from 0 on; the rarest at both ends share the outermost ones."""
    of_rows, of_columns = (
        np.bincount(part + np.int64(_RANGE), minlength=2 * _RANGE + 1) for part in (rows, columns)
    )
    below = np.cumsum(np.convolve(of_rows, of_columns)) / (rows.size * columns.size)
    low, high = (int(np.searchsorted(below, share)) for share in (0.005, 0.995))
    # The sums of both begin at -2 * _RANGE.
    shifted = (rows + np.int64(2 * _RANGE - low)).astype(np.int8)
    return Classes(shifted, columns, min(high - low + 1, MAX_CLASSES))


def _entropy(counts: np.ndarray) -> float:
    """Returns the bits of magnitudes and signs, given their contexts."""
    totals = np.maximum(counts.sum(1, keepdims=True), 1)
    bits = -np.sum(counts * np.log2(np.where(counts > 0, counts / totals, 1)))
    return float(bits + counts[:, 1:].sum())
