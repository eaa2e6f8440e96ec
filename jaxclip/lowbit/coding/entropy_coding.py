"""Entropy coding: frequent codes take fewer bits than rare ones.

    huffman   zlib's Huffman coder over bytes of whole codes, in every Python
    ans       asymmetric numeral systems by the package constriction, at the entropy
    lanes     the same in NumPy, .4 % above; classes of rows and columns; paths of a trellis
    smallest  the smallest of them for each array

"ans" has one table for all codes. Huffman has a new table for every stretch of the data, so it is
smaller where the codes' distribution differs from place to place; "lanes" is where it differs from
row to row or column to column, or the codes are on a path of a trellis.
"""

import dataclasses
import struct
import zlib
from typing import Any, Literal, TypeAlias

import numpy as np

from jaxclip._core import checks, extras
from jaxclip.lowbit.coding import level_coding

# Codes processed at a time: a multiple of every number of digits in a byte, so only the very last
# byte is padded.
_CHUNK = 120 * 2**13
# Codes that a byte may decode to: Huffman's best is one bit for eight codes, more would be a bomb.
_MAX_GROWTH = 64
# Codes that any data may decode to in asymmetric numeral systems, where constants take no bits.
_ALWAYS_ALLOWED = 2**26
_MAX_LANES_CODES = 2**30
# zlib's window bits for a stream with neither header nor checksum.
_RAW_DEFLATE = -15

Coding: TypeAlias = Literal["huffman", "ans", "lanes", "smallest"]


def check_coding(coding: str | None) -> None:
    """Raises unless `coding` is a known one, or None, and its package is installed."""
    checks.check_choice("coding", coding, (None, "huffman", "ans", "lanes", "smallest"))
    if coding == "ans":
        extras.import_extra("constriction", "coding")


def codings_tried(coding: str | None) -> tuple[str, ...]:
    """Returns the codings that are tried for an array; packed codes are kept if none is smaller."""
    if coding != "smallest":
        return () if coding is None else (coding,)
    try:
        check_coding("ans")
    except ImportError:
        return ("huffman", "lanes")
    return ("huffman", "ans", "lanes")


def encode_codes(codes: np.ndarray, coding: str, *, chain: int = 4096) -> bytes | None:
    """Returns flat int8 codes entropy-coded; None if a reader would refuse them as a bomb.

    Args:
      codes: Of an array in row-major order.
      coding: "huffman", "ans" or "lanes".
      chain: For "lanes", the length of a row or of a chain of a trellis, at most 2**15.
    """
    # Equal codes give equal bytes, for Huffman with one version of zlib.
    if coding == "lanes":
        return _lanes_encode(codes, chain)
    return (_huffman_encode if coding == "huffman" else _ans_encode)(codes)


def decode_codes(data: bytes, coding: str, count: int) -> np.ndarray:
    """Returns the int8 codes that `encode_codes` coded; raises ValueError if data are damaged."""
    # Memory is bounded by `count` and the size of the data, even if they are malicious.
    decoders = {"huffman": _huffman_decode, "ans": _ans_decode, "lanes": _lanes_decode}
    return decoders[coding](data, count)


def _counts(codes: np.ndarray) -> tuple[int, np.ndarray]:
    """Returns the lowest code, and how often each code from there on occurs."""
    # Some at a time, because NumPy makes an int64 of each code to count it.
    counts = np.zeros(256, np.int64)
    for start in range(0, codes.size, _CHUNK):
        counts += np.bincount(codes[start : start + _CHUNK].view(np.uint8), minlength=256)
    counts = np.roll(counts, 128)  # from -128 on
    used = np.flatnonzero(counts) if codes.size else np.array([128])
    return int(used[0]) - 128, counts[used[0] : used[-1] + 1]


# --- Huffman ------------------------------------------------------------------------------
#
# Huffman spends a whole number of bits on a byte, so several codes share one: with `base` levels,
# k codes are the digits of a byte, base**k <= 256. Codes are mostly near 0. Those beyond the
# levels are written as the last digit, and follow after all others, one per byte. The best k
# depends on the distribution of the codes, and is found by trying all on a sample.

_BASES = {1: 256, 2: 16, 3: 6, 4: 4, 5: 3, 8: 2}  # levels of a digit, by digits in a byte
_SAMPLE = 2**17  # codes that are tried
# The code of digit 0, the digits in a byte, and the number of codes beyond the levels.
_HUFFMAN_PREFIX = "<bBxxxxxxQ"


@dataclasses.dataclass(frozen=True)
class _Digits:
    """Codes as `k` digits per byte; digit 0 is the code `lowest`, `num_beyond` codes have none."""

    k: int
    lowest: int
    num_beyond: int

    @property
    def base(self) -> int:
        return _BASES[self.k]

    @property
    def powers(self) -> np.ndarray:
        return (self.base ** np.arange(self.k)).astype(np.uint8)

    def codes_of_bytes(self) -> np.ndarray:
        """Returns the k codes that each of the 256 bytes stands for."""
        digits = np.arange(256)[:, None] // self.powers.astype(np.int64) % self.base
        return (digits + self.lowest).astype(np.int8)


def _choose_digits(lowest: int, counts: np.ndarray, k: int) -> _Digits:
    """Returns the digits, k per byte, whose levels include the most codes."""
    base = _BASES[k]
    if counts.size <= base:
        return _Digits(k, lowest, 0)
    sums = np.cumsum(np.concatenate([[0], counts]))
    num_inside = sums[base - 1 :] - sums[: 1 - base]  # the last digit is for those beyond
    best = int(num_inside.argmax())
    return _Digits(k, lowest + best, int(sums[-1] - num_inside[best]))


def _huffman_encode(codes: np.ndarray) -> bytes:
    lowest, counts = _counts(codes)
    sample = codes[:: -(-codes.size // _SAMPLE) or 1]
    choices = [_choose_digits(lowest, counts, k) for k in _BASES]
    best = min(choices, key=lambda digits: len(_deflate(sample, digits)))
    prefix = struct.pack(_HUFFMAN_PREFIX, best.lowest, best.k, best.num_beyond)
    return prefix + _deflate(codes, best)


def _deflate(codes: np.ndarray, digits: _Digits) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE, 9, zlib.Z_HUFFMAN_ONLY)
    pieces, beyond = [], [codes[:0]]
    for start in range(0, codes.size, _CHUNK):
        chunk = codes[start : start + _CHUNK]
        values = chunk.astype(np.int16) - np.int16(digits.lowest)
        if digits.num_beyond:
            is_beyond = (values < 0) | (values >= digits.base - 1)
            values[is_beyond] = digits.base - 1
            beyond.append(chunk[is_beyond])
        values = np.pad(values, (0, -values.size % digits.k)).astype(np.uint8)
        columns = values.reshape(-1, digits.k)
        packed = columns[:, 0].copy()
        for i in range(1, digits.k):
            packed += columns[:, i] * digits.powers[i]
        pieces.append(coder.compress(packed.data))
    pieces += [coder.compress(np.concatenate(beyond).data), coder.flush()]
    return b"".join(pieces)


def _huffman_decode(data: bytes, count: int) -> np.ndarray:
    prefix_size = struct.calcsize(_HUFFMAN_PREFIX)
    if len(data) < prefix_size:
        raise ValueError("its coded data are damaged: they are cut short.")
    lowest, k, num_beyond = struct.unpack(_HUFFMAN_PREFIX, data[:prefix_size])
    if k not in _BASES or num_beyond > count:
        raise ValueError("its coded data are damaged: their prefix is not valid.")
    digits = _Digits(k, lowest, num_beyond)
    num_bytes = -(-count // k)
    if num_bytes + num_beyond > _MAX_GROWTH // 8 * len(data):
        raise ValueError("its coded data are damaged: they are too short for their codes.")
    stream = _inflate(data[prefix_size:], num_bytes + num_beyond)
    codes_of_bytes = digits.codes_of_bytes()
    codes = np.empty((num_bytes, k), np.int8)
    for start in range(0, num_bytes, _CHUNK // k):
        stop = min(start + _CHUNK // k, num_bytes)
        codes[start:stop] = codes_of_bytes[stream[start:stop]]
    codes = codes.reshape(-1)[:count]
    if num_beyond:
        # Past 127 the last digit wraps around to a code that no other digit has.
        last_digit = np.array(lowest + digits.base - 1).astype(np.int8)
        is_beyond = codes == last_digit
        if np.count_nonzero(is_beyond) != num_beyond:
            raise ValueError("its coded data are damaged: codes are missing.")
        codes[is_beyond] = stream[num_bytes:].view(np.int8)
    return codes


def _inflate(data: bytes, num_bytes: int) -> np.ndarray:
    """Returns the bytes of a deflate stream; raises ValueError unless there are `num_bytes`."""
    decoder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        # One byte more than is expected shows a stream that is too long, and bounds the memory.
        stream = decoder.decompress(data, num_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"its coded data are damaged: {error}.") from error
    has_ended = decoder.eof and not decoder.unused_data
    if len(stream) != num_bytes or not has_ended:
        raise ValueError("its coded data are damaged: their length is wrong.")
    return np.frombuffer(stream, np.uint8)


# --- Asymmetric numeral systems -------------------------------------------------------------

# The lowest code, the number of levels, and the size of the table of their counts.
_ANS_PREFIX = "<bxHI"


def _ans_encode(codes: np.ndarray) -> bytes | None:
    lowest, counts = _counts(codes)
    coder, model = _ans_coder(None), _ans_model(counts)
    # A stack: the last code in is the first out.
    for start in reversed(range(0, codes.size, _CHUNK)):
        levels = codes[start : start + _CHUNK].astype(np.int32) - np.int32(lowest)
        coder.encode_reverse(levels, model)
    table = zlib.compress(counts.astype("<u8").tobytes(), 9, _RAW_DEFLATE)
    prefix = struct.pack(_ANS_PREFIX, lowest, counts.size, len(table))
    data = prefix + table + coder.get_compressed().astype("<u4").tobytes()
    return None if _is_bomb(data, codes.size) else data


def _ans_decode(data: bytes, count: int) -> np.ndarray:
    prefix_size = struct.calcsize(_ANS_PREFIX)
    if len(data) < prefix_size:
        raise ValueError("its coded data are damaged: they are cut short.")
    lowest, num_levels, table_size = struct.unpack(_ANS_PREFIX, data[:prefix_size])
    table, words = data[prefix_size:][:table_size], data[prefix_size + table_size :]
    if not 1 <= num_levels <= 128 - lowest or len(table) < table_size or len(words) % 4:
        raise ValueError("its coded data are damaged: their prefix is not valid.")
    counts = _inflate(table, 8 * num_levels).view("<u8").astype(np.uint64)
    if sum(counts.tolist()) != count:
        raise ValueError("its coded data are damaged: their counts do not add up.")
    _check_bomb(data, count)
    try:
        coder = _ans_coder(np.frombuffer(words, "<u4").astype(np.uint32))
    except ValueError as error:
        raise ValueError(f"its coded data are damaged: {error}.") from error
    model, codes = _ans_model(counts), np.empty(count, np.int8)
    for start in range(0, count, _CHUNK):
        levels = coder.decode(model, min(_CHUNK, count - start))
        codes[start : start + levels.size] = levels + lowest
    found = np.bincount(codes.astype(np.int16) - lowest, minlength=counts.size)
    if not coder.is_empty() or not np.array_equal(found, counts):
        raise ValueError("its coded data are damaged: their codes do not have the stated counts.")
    return codes


def _is_bomb(data: bytes, count: int) -> bool:
    return count > _ALWAYS_ALLOWED + _MAX_GROWTH * len(data)


def _check_bomb(data: bytes, count: int) -> None:
    if _is_bomb(data, count):
        raise ValueError(f"its {count:,} codes in {len(data):,} bytes are refused as a bomb.")


def _ans_coder(compressed: np.ndarray | None) -> Any:
    stream = extras.import_extra("constriction", "coding").stream
    return stream.stack.AnsCoder(*([] if compressed is None else [compressed]))


def _ans_model(counts: np.ndarray) -> Any:
    """Returns a model of the counts; coders need two levels, so a single one gets a second."""
    probabilities = counts / counts.sum() if counts.sum() else np.ones(1)
    if probabilities.size == 1:
        probabilities = np.append(probabilities, 0.0)
    model = extras.import_extra("constriction", "coding").stream.model
    return model.Categorical(probabilities, perfect=False)


# --- Lanes --------------------------------------------------------------------------------


def _lanes_encode(codes: np.ndarray, chain: int) -> bytes | None:
    data = level_coding.encode_levels(codes, chain=chain) if codes.size < _MAX_LANES_CODES else b""
    return None if not data or _is_bomb(data, codes.size) else data


def _lanes_decode(data: bytes, count: int) -> np.ndarray:
    _check_bomb(data, count)
    return level_coding.decode_levels(data, count, np.int8)
