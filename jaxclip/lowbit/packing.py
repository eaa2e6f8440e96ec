"""Integer codes as dense bytes, and back: the same bytes from NumPy and from jax.

    1, 2, 3, 4, 5, 6, 8 bits   bits [i * b, (i + 1) * b) of a little-endian bit stream
    ternary                    five per byte in base 3, the first the least significant digit

Eight codes fill whole bytes at every width, two or four at some widths. So codes, one byte each,
are read as words of that many bytes and joined: neighbours to pairs, pairs to fours, fours to
eights.
"""

import functools
import math
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxclip._core.grids import Bits, Grid, Levels, code_range

_Array: TypeAlias = Any  # of NumPy or of jax; results are of the same kind
# Codes that NumPy processes at a time, so that intermediate arrays stay in the cache. A multiple
# of 40, so that a piece ends on a byte at every width.
CODES_PER_CHUNK = 40 * 2**15
# The base-3 digits of each byte, eight bytes read as one word: five digits and three zeros.
_TRITS = np.arange(256)[:, None] // 3 ** np.arange(8) % 3 * (np.arange(8) < 5)
_TRITS_OF_BYTE = _TRITS.astype(np.uint8).view(np.uint64)[:, 0]


def num_packed_bytes(count: int, bits: Bits) -> int:
    """Returns the number of bytes that `pack_codes` makes of `count` codes."""
    code_range(bits)
    return _num_bytes(count, bits)


def _num_bytes(count: int, bits: Bits) -> int:
    return -(-count // 5) if bits == "ternary" else -(-count * int(bits) // 8)


def num_stored_bytes(shape: tuple[int, ...], num_blocks: int, grid: Grid) -> int:
    """Returns the bytes of packed codes, scales and zeros of an array in so many blocks."""
    assert grid.bits is not None
    return num_packed_bytes(math.prod(shape), grid.bits) + num_side_bytes(num_blocks, grid)


def num_side_bytes(num_blocks: int, grid: Grid) -> int:
    """Returns the bytes of scales and zeros."""
    is_log8 = grid.scale_dtype == "log8"
    per_block = 1 if is_log8 else jnp.dtype(grid.scale_dtype).itemsize
    # log8 also stores its largest scale, a float32.
    return num_blocks * (per_block + grid.zero_point) + 4 * is_log8


def count_codes(codes: np.ndarray, low: int, high: int) -> np.ndarray:
    """Returns the number of entries with each code from `low` to `high`."""
    counts = np.zeros(high - low + 1, np.int64)
    flat = codes.reshape(-1)
    for start in range(0, flat.size, CODES_PER_CHUNK):
        part = flat[start : start + CODES_PER_CHUNK].astype(np.int64) - low
        counts += np.bincount(part, minlength=counts.size)
    return counts


def pack_codes(codes: _Array, bits: Bits, *, levels: Levels = "full") -> _Array:
    """Packs integer codes densely into bytes.

    Code i becomes the unsigned `u = code - low`, halved where codes are odd, so that one bit is 0
    for -1 and 1 for 1. A width of b bits takes the bits [i * b, (i + 1) * b) of a little-endian
    stream. Ternary codes are base-3 digits, five per byte, the first the least significant. The
    last byte is padded with zeros.

    Args:
      codes: Integer array of any shape, entries on the grid; taken in row-major order. NumPy
        arrays stay NumPy; jax arrays may be traced.
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary".
      levels: "full", "narrow" for a grid without the level -2**(bits-1), or "balanced".

    Returns:
      A flat uint8 array.

    Raises:
      ValueError: If `bits` is not allowed.

    Example:
      >>> import numpy as np
      >>> pack_codes(np.array([1, -1, 0, 1, 1]), "ternary")
      array([227], dtype=uint8)
    """
    code_range(bits, levels)
    if not isinstance(codes, np.ndarray):
        return _pack(jnp.reshape(codes, (-1,)), bits, levels)
    flat, size = codes.reshape(-1), codes.size
    packed = np.empty(_num_bytes(size, bits), np.uint8)
    for start in range(0, size, CODES_PER_CHUNK):
        place = _bytes_of_piece(start, size, bits)
        packed[place] = _pack(flat[start : start + CODES_PER_CHUNK], bits, levels)
    return packed


def unpack_codes(packed: _Array, bits: Bits, count: int, *, levels: Levels = "full") -> _Array:
    """Unpacks the result of `pack_codes`.

    Args:
      packed: Flat uint8 array, NumPy or jax.
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary".
      count: Number of codes that were packed.
      levels: "full", "narrow" for a grid without the level -2**(bits-1), or "balanced".

    Returns:
      A flat int8 array of `count` codes.

    Raises:
      ValueError: If `bits` is not allowed, or `packed` does not have the right length.

    Example:
      >>> import numpy as np
      >>> unpack_codes(np.array([227], np.uint8), "ternary", 5)
      array([ 1, -1,  0,  1,  1], dtype=int8)
    """
    code_range(bits, levels)
    if packed.shape != (_num_bytes(count, bits),):
        raise ValueError(
            f"packed must have {_num_bytes(count, bits)} bytes for {count} codes at "
            f"bits={bits!r}, got shape {packed.shape}."
        )
    if not isinstance(packed, np.ndarray) or count <= CODES_PER_CHUNK:
        return _unpack(packed, bits, count, levels)
    codes = np.empty(count, np.int8)
    for start in range(0, count, CODES_PER_CHUNK):
        stop = min(start + CODES_PER_CHUNK, count)
        piece = packed[_bytes_of_piece(start, count, bits)]
        codes[start:stop] = _unpack(piece, bits, stop - start, levels)
    return codes


def _bytes_of_piece(start: int, count: int, bits: Bits) -> slice:
    stop = min(start + CODES_PER_CHUNK, count)
    return slice(_num_bytes(start, bits), _num_bytes(stop, bits))


# --- A piece, in NumPy or jax ---------------------------------------------------------


def _pack(codes: _Array, bits: Bits, levels: Levels) -> _Array:
    xp = np if isinstance(codes, np.ndarray) else jnp
    size = codes.size
    codes = codes if codes.dtype == np.int8 else codes.astype(np.int8)
    unsigned = _reinterpret(Grid(bits, levels=levels).to_places(codes), np.uint8)
    if bits == 8:
        return unsigned
    per_word = 5 if bits == "ternary" else 8
    if size % per_word:
        unsigned = xp.pad(unsigned, (0, -size % per_word))
    if bits == "ternary":
        digits = unsigned.reshape(-1, 5)
        packed = digits[:, 4]
        for i in (3, 2, 1, 0):
            packed = packed * np.uint8(3) + digits[:, i]
        return packed
    packed = _join(unsigned, int(bits))
    return packed.reshape(-1)[: _num_bytes(size, bits)]


def _unpack(packed: _Array, bits: Bits, count: int, levels: Levels) -> _Array:
    xp = np if isinstance(packed, np.ndarray) else jnp
    if bits == "ternary":
        unsigned = _digits(packed).reshape(-1)[:count]
    elif bits == 8:
        unsigned = packed
    else:
        num_bytes = -(-count // 8) * int(bits)
        if packed.size < num_bytes:
            packed = xp.pad(packed, (0, num_bytes - packed.size))
        unsigned = _split(packed, int(bits)).reshape(-1)[:count]
    return Grid(bits, levels=levels).from_places(_reinterpret(unsigned, np.int8))


def _digits(packed: _Array) -> _Array:
    """Returns the five base-3 digits of each byte."""
    if isinstance(packed, np.ndarray):
        return _first_columns(_TRITS_OF_BYTE.take(packed).view(np.uint8).reshape(-1, 8), 5)
    rest, digits = packed.astype(np.uint16), []
    for _ in range(5):
        third = rest * np.uint16(171) >> np.uint16(9)  # rest // 3, for a byte
        digits.append((rest - third * np.uint16(3)).astype(np.uint8))
        rest = third
    return jnp.stack(digits, axis=1)


def _join(unsigned: _Array, bits: int) -> _Array:
    """Returns codes, one byte each, joined into whole bytes."""
    shared = math.gcd(bits, 8)
    rows = unsigned.reshape(-1, 8 // shared)  # the fewest codes that fill whole bytes
    if isinstance(unsigned, np.ndarray):
        if bits == 1:
            return np.packbits(unsigned, bitorder="little")
        words = rows.view(f"<u{8 // shared}")
        return _first_columns(_compact(words, bits).view(np.uint8), bits // shared)
    # jax has 64-bit words only if they are enabled; XLA vectorizes byte operations by itself.
    columns = []
    for j in range(bits // shared):
        byte = None
        for i in range(8 * j // bits, -(-8 * (j + 1) // bits)):
            place = bits * i - 8 * j  # of code i's first bit in byte j
            code = rows[:, i]
            code = code << np.uint8(place) if place >= 0 else code >> np.uint8(-place)
            byte = code if byte is None else byte | code
        columns.append(byte)
    return jnp.stack(columns, axis=1)


def _split(packed: _Array, bits: int) -> _Array:
    """Returns the codes that `_join` joined, one byte each, in rows."""
    if isinstance(packed, np.ndarray):
        if bits == 1:
            return np.unpackbits(packed, bitorder="little")
        shared = math.gcd(bits, 8)
        dtype = np.dtype(f"<u{8 // shared}")
        if bits == shared:  # a word for each byte
            return _expand(packed.astype(dtype), bits).view(np.uint8)
        packed = packed.reshape(-1, bits // shared)
        rows = np.zeros((len(packed), 8 // shared), np.uint8)
        for j in range(packed.shape[1]):
            rows[:, j] = packed[:, j]
        return _expand(rows.view(dtype), bits).view(np.uint8)
    packed = packed.reshape(-1, bits)
    halves = [jnp.zeros(packed.shape[0], np.uint32)] * 2
    for j in range(bits):
        byte, place = packed[:, j].astype(np.uint32), 8 * j - 4 * bits
        if place < 0:
            halves[0] = halves[0] | byte << np.uint32(8 * j)
        if place >= 0:
            halves[1] = halves[1] | byte << np.uint32(place)
        elif place > -8:
            halves[1] = halves[1] | byte >> np.uint32(-place)
    # A byte that both halves share leaves bits above the first, which `_expand` drops.
    return jnp.concatenate(
        [lax.bitcast_convert_type(_expand(half, bits), jnp.uint8) for half in halves], axis=1
    )


def _first_columns(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns the first columns of an array."""
    # NumPy copies columns far faster than short rows.
    columns = np.empty((len(rows), count), rows.dtype)
    for j in range(count):
        columns[:, j] = rows[:, j]
    return columns


def _compact(word: np.ndarray, bits: int) -> np.ndarray:
    """Returns words with a code in each byte, overwritten by the codes in their lowest bits."""
    for field, place, mask in _steps(word.dtype, bits):
        upper = word >> (place - field)
        upper &= mask << field
        word &= mask
        word |= upper
    return word


def _expand(word: _Array, bits: int) -> _Array:
    """Returns the words that `_compact` overwrote, also for jax; higher bits are dropped."""
    for field, place, mask in reversed(_steps(word.dtype, bits)):
        upper = word & mask << field
        upper <<= place - field
        word &= mask
        word |= upper
    return word


@functools.lru_cache(maxsize=64)
def _steps(dtype: np.dtype, bits: int) -> tuple[tuple[np.unsignedinteger, ...], ...]:
    """Returns, for each doubling: bits of a field, bits of its place, mask of every other."""
    as_word = dtype.type
    steps, width = [], 8 * dtype.itemsize
    for place in (8, 16, 32):
        if place < width:
            field = bits * place // 8
            mask = sum((1 << field) - 1 << shift for shift in range(0, width, 2 * place))
            steps.append((as_word(field), as_word(place), as_word(mask)))
    return tuple(steps)


def _reinterpret(array: _Array, dtype: DTypeLike) -> _Array:
    if isinstance(array, np.ndarray):
        return array.view(dtype)
    return lax.bitcast_convert_type(jnp.asarray(array), dtype)
