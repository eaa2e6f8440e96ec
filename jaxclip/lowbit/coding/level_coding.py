"""Levels of a trellis, or codes of any grid, in about as many bytes as their entropy.

    bits ~ -log2 p(code | class of the entry, state modulo 2)

The bytes are a header, the tables of `code_lengths`, classes and escaped codes (deflated), and the
numbers and words of `rans`. Chains are decoded side by side. In the table of a state stand levels
instead of codes, and the next states, so that the trellis costs hardly any time.
"""

import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from jaxclip.lowbit.coding import code_lengths, rans
from jaxclip.lowbit.coding.code_classes import (
    MAX_CLASSES,
    Classes,
    blocks,
    choose_classes,
    count_codes,
    one_class,
)
from jaxclip.lowbit.coding.trellis import NEXT_STATES, path_of

_HEADER = struct.Struct("<BBHIII")
_RAW_DEFLATE = -15
# A lane costs three bytes, here 0.4 %. Fewer lanes would take fewer bytes and more time.
_BYTES_PER_LANE = 800
_MAX_LANES = 4096
# Steps that a reader takes at most; a writer takes half as many and one chain. So there are more
# lanes where codes take hardly any bytes.
_MAX_STEPS = 2**16
_MAX_CHAIN = 2**15
_TILE = 64  # columns
# Values that stand for an escaped code, plus 2 in an odd state, plus 1 for an odd code.
_ESCAPED = -(2**15)
_MAX_CODE = 2**30
_NEXT_STATES = {1: np.zeros((1, 2), np.int64), **NEXT_STATES}


class _Header(NamedTuple):
    """The first 16 bytes."""

    num_states: int
    num_classes: int
    num_lanes: int
    chain: int
    side_size: int  # of classes and escaped codes, deflated
    num_escaped: int

    def check(self, count: int) -> None:
        """Raises unless a writer makes such a header for `count` levels."""
        num_chains = -(-count // max(self.chain, 1))
        num_rounds = -(-num_chains // max(self.num_lanes, 1))
        if not (
            self.num_states in _NEXT_STATES
            and 1 <= self.num_classes <= MAX_CLASSES
            and 1 <= self.num_lanes <= max(num_chains, 1)
            and 1 <= self.chain <= max(count, 1)
            and num_rounds * self.chain <= _MAX_STEPS
            and self.num_escaped <= count
        ):
            raise _damaged("their header is not valid")


def encode_levels(levels: np.ndarray, *, chain: int, num_states: int | None = None) -> bytes:
    """Returns levels as bytes; `decode_levels` gives them back.

    Args:
      levels: Integers below 2**30 in magnitude, 2**30 at most, taken in row-major order.
      chain: Entries after which the trellis begins anew, from 1 to 2**15.
      num_states: 4 or 8; 1 for any integers, without a trellis; None for a trellis with a path of
        these levels, if there is one.

    Raises:
      ValueError: If levels or chains are too large, or the levels on no path of the trellis.
    """
    flat = np.asarray(levels).reshape(-1)
    if flat.size and max(int(flat.max()), -int(flat.min()), flat.size - 1) >= _MAX_CODE:
        raise ValueError(f"levels must be below {_MAX_CODE} in number and magnitude.")
    chain = max(min(chain, flat.size), 1)
    if chain > _MAX_CHAIN:
        raise ValueError(f"chain must be at most {_MAX_CHAIN}, got {chain}.")
    rows = np.pad(flat, (0, -flat.size % chain)).reshape(-1, chain)  # 0 is a level of all states
    for tried in (8, 4, 1) if num_states is None else (num_states,):
        found = (rows, np.zeros(rows.shape, np.uint8)) if tried == 1 else path_of(rows, tried)
        if found is not None:
            return _encode(flat.size, *found, tried)
    raise ValueError(f"levels must be on a path of the trellis of {num_states} states.")


def _encode(count: int, codes: np.ndarray, is_odd: np.ndarray, num_states: int) -> bytes:
    """Returns the bytes of codes, one chain a row."""
    classes = choose_classes(codes, is_odd)
    counts = count_codes(codes, is_odd, classes)
    fitted = [code_lengths.fit_lengths(row) if row.any() else None for row in counts]
    tables = [None if pair is None else code_lengths.frequencies(*pair) for pair in fitted]
    num_bytes = sum(_bits(*pair) for pair in zip(counts, tables, strict=True)) / 8
    num_lanes = _num_lanes(codes.shape, num_bytes)
    places, escaped = _places(codes, is_odd, classes, tables)
    numbers, words = rans.encode(_steps(places, tables, num_lanes), num_lanes)
    deflate = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE)
    side = deflate.compress(classes.stored() + escaped.astype("<i4").tobytes()) + deflate.flush()
    header = _Header(num_states, classes.number, num_lanes, codes.shape[1], len(side), escaped.size)
    stored = [_table_bytes(pair) for pair in fitted]
    parts = [_HEADER.pack(*header), *(stored if num_states > 1 else stored[::2]), side]
    return b"".join([*parts, numbers.astype("<u4").tobytes(), words.astype("<u2").tobytes()])


def _bits(counts: np.ndarray, frequencies: np.ndarray | None) -> float:
    """Returns about how many bits the counted magnitudes take."""
    if frequencies is None:
        return 0.0
    limit = _limit(frequencies)
    used = np.append(frequencies[limit:-2], frequencies[-1])
    counts = np.append(counts[: limit + 1], counts[limit + 1 :].sum())
    return float(np.sum(counts * (code_lengths.TOTAL_BITS - np.log2(np.maximum(used, 1)))))


def _limit(frequencies: np.ndarray | None) -> int:
    """Returns the largest code of a table: there are 2 * limit + 1 codes and two escapes."""
    return 0 if frequencies is None else len(frequencies) // 2 - 1


def _num_lanes(shape: tuple[int, int], num_bytes: float) -> int:
    """Returns how many chains are coded side by side; all rounds have about as many."""
    num_chains, length = shape
    most = min(max(int(num_bytes / _BYTES_PER_LANE), 1), _MAX_LANES)
    most = max(most, -(-2 * num_chains * length // _MAX_STEPS))
    num_rounds = max(-(-num_chains // most), 1)
    return max(-(-num_chains // num_rounds), 1)


def _tiles(shape: tuple[int, int], num_lanes: int) -> list[tuple[slice, slice]]:
    """Returns rows that are coded side by side, and some of their columns, in order."""
    num_chains, length = shape
    rows = [slice(i, min(i + num_lanes, num_chains)) for i in range(0, num_chains, num_lanes)]
    # Few columns at a time: a tile is transposed, which is slow beyond the cache.
    columns = [slice(i, min(i + _TILE, length)) for i in range(0, length, _TILE)]
    return list(itertools.product(rows, columns))


def _places(
    codes: np.ndarray,
    is_odd: np.ndarray,
    classes: Classes,
    tables: Sequence[np.ndarray | None],
) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the symbols of codes are in the joined tables, and the escaped codes."""
    limits = np.array([_limit(table) for table in tables])
    sizes = [0 if table is None else len(table) for table in tables]
    zeros = np.cumsum(sizes) - sizes + limits  # place of code 0
    places, escaped = np.empty(codes.shape, np.int32), [codes.reshape(-1)[:0]]
    for rows in blocks(codes.shape):
        context = 2 * classes.of(rows) + is_odd[rows]
        part, limit = codes[rows].astype(np.int64), limits[context]
        is_escaped = np.abs(part) > limit
        escaped.append(part[is_escaped])
        places[rows] = zeros[context] + np.where(is_escaped, limit + 1 + (part & 1), part)
    return places, np.concatenate(escaped)


def _steps(
    places: np.ndarray, tables: Sequence[np.ndarray | None], num_lanes: int
) -> Iterator[np.ndarray]:
    """Yields the symbols of all lanes for `rans.encode`, from the last step to the first."""
    symbols = [rans.symbol_places(table) for table in tables if table is not None]
    joined = np.concatenate(symbols) if symbols else np.zeros(0, np.int64)
    for rows, steps in reversed(_tiles(places.shape, num_lanes)):
        yield from joined.take(places[rows, steps].T)[::-1]


def _table_bytes(fitted: tuple[np.ndarray, int] | None) -> bytes:
    """Returns the number of lengths, that of the escape, and lengths."""
    if fitted is None:
        return b"\0"
    lengths, escape = fitted
    return bytes([len(lengths), escape]) + lengths.tobytes()


# --- Reading --------------------------------------------------------------------------------


def decode_levels(data: bytes, count: int, dtype: DTypeLike = np.int8) -> np.ndarray:
    """Returns the `count` levels that `encode_levels` coded.

    Memory is bounded by `count` and the size of the data, even if they are malicious.

    Raises:
      ValueError: If the data are damaged, or the levels do not fit in `dtype`.
    """
    if len(data) < _HEADER.size:
        raise _damaged("they are cut short")
    header = _Header(*_HEADER.unpack_from(data))
    header.check(count)
    num_chains = -(-count // header.chain)
    tables, start = _read_tables(data, header)
    end = start + header.side_size + 4 * header.num_lanes
    if end > len(data) or (len(data) - end) % 2:
        raise _damaged("their length is wrong")
    classes, escaped = _read_side(data[start : start + header.side_size], header, num_chains)
    numbers = np.frombuffer(data, "<u4", header.num_lanes, start + header.side_size)
    words = np.frombuffer(data, "<u2", -1, end)
    decoder = rans.Decoder(_decoding_tables(tables, header.num_states), numbers, words)
    values, first_places = np.empty((num_chains, header.chain), np.int16), []
    for rows, columns in _tiles(values.shape, header.num_lanes):
        if not columns.start:
            decoder.begin(rows.stop - rows.start)
            first_places = _first_places(classes, rows)
        values[rows, columns] = decoder.decode(first_places[columns]).T
    decoder.check_end()
    levels = _with_escaped(values.reshape(-1), escaped, header.num_states, np.dtype(dtype))
    if levels[count:].any():
        raise _damaged("entries follow the last one")
    return levels[:count]


def _damaged(reason: str) -> ValueError:
    return ValueError(f"its coded data are damaged: {reason}.")


def _read_tables(data: bytes, header: _Header) -> tuple[list[np.ndarray | None], int]:
    """Returns the frequencies of each context, and where the tables end."""
    tables: list[np.ndarray | None] = [None] * (2 * header.num_classes)
    start = _HEADER.size
    for context in range(0, len(tables), 1 if header.num_states > 1 else 2):
        num_lengths = data[start] if start < len(data) else 0
        end = start + (2 + num_lengths if num_lengths else 1)
        if num_lengths > len(code_lengths.NODES) or end > len(data):
            raise _damaged("their tables are not valid")
        if num_lengths:
            lengths = np.frombuffer(data, np.uint8, num_lengths, start + 2)
            tables[context] = code_lengths.frequencies(lengths, data[start + 1])
        start = end
    return tables, start


def _read_side(side: bytes, header: _Header, num_chains: int) -> tuple[Classes, np.ndarray]:
    """Returns the classes and the escaped codes."""
    chain, num_classes, num_escaped = header.chain, header.num_classes, header.num_escaped
    sizes = (num_chains, chain) if num_classes > 1 else (0, 0)
    expected = sum(sizes) + 4 * num_escaped
    decoder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        # One byte more than is expected shows a stream that is too long, and bounds the memory.
        stream = decoder.decompress(side, expected + 1)
    except zlib.error as error:
        raise _damaged(str(error)) from error
    if len(stream) != expected or not decoder.eof or decoder.unused_data:
        raise _damaged("their classes or escaped codes have a wrong length")
    escaped = np.frombuffer(stream, "<i4", num_escaped, sum(sizes))
    if num_classes == 1:
        return one_class(num_chains, chain), escaped
    rows = np.frombuffer(stream, np.int8, num_chains)
    return Classes(rows, np.frombuffer(stream, np.int8, chain, num_chains), num_classes), escaped


def _decoding_tables(tables: Sequence[np.ndarray | None], num_states: int) -> np.ndarray:
    """Returns the tables of all classes and states, one after another."""
    joined = np.zeros((len(tables) // 2, rans.MAX_STATES, code_lengths.TOTAL), np.int64)
    for i, state in np.ndindex(len(joined), num_states):
        is_odd = state % 2
        frequencies = tables[2 * i + is_odd]
        if frequencies is not None:
            limit = _limit(frequencies)
            codes = np.arange(-limit, limit + 3)
            codes[-2:] = 0, 1  # their parity is that of the escaped code
            values = codes if num_states == 1 else 2 * codes - np.sign(codes) * is_odd
            values[-2:] = _ESCAPED + 2 * is_odd + np.arange(2)
            next_states = _NEXT_STATES[num_states][state, codes % 2]
            joined[i, state] = rans.decoding_table(frequencies, values, next_states)
    return joined.reshape(-1)


def _first_places(classes: Classes, rows: slice) -> list[np.ndarray | None]:
    """Returns for each column where the tables of the rows' classes begin; None for the first."""
    if classes.number == 1:
        return [None] * len(classes.columns)
    of_rows = classes.rows[rows].astype(np.int64)
    found = {
        column: np.clip(of_rows + column, 0, classes.number - 1)
        * (rans.MAX_STATES * code_lengths.TOTAL)
        for column in np.unique(classes.columns).tolist()
    }
    return [found[column] for column in classes.columns.tolist()]


def _with_escaped(
    values: np.ndarray, escaped: np.ndarray, num_states: int, dtype: np.dtype
) -> np.ndarray:
    """Returns values in a dtype, with the levels of escaped codes in their places."""
    is_escaped = values < _ESCAPED + 4
    kinds = values[is_escaped].astype(np.int64) - _ESCAPED
    if kinds.size != escaped.size or (kinds % 2 != escaped % 2).any():
        raise _damaged("escaped codes are missing")
    if escaped.size:
        values = values.astype(np.int32)
        if num_states == 1:
            values[is_escaped] = escaped
        else:
            values[is_escaped] = 2 * escaped - np.sign(escaped) * (kinds // 2)
    limits = np.iinfo(dtype)
    if values.min(initial=0) < limits.min or values.max(initial=0) > limits.max:
        raise ValueError(f"its levels do not fit in {dtype}.")
    return values.astype(dtype)
