"""Entropy coding: codes in as many bits as they carry, not as they are wide.

    huffman   zlib's Huffman coder over bytes of whole codes, in every Python
    ans       asymmetric numeral systems by the package constriction, at the entropy
    smallest  for each array the smaller of the two

The entropy is that of one table for all codes. Huffman has a new table for every stretch of the
data, so that it is the smaller one where the codes' spread differs from place to place, and "ans"
where it does not.

Huffman spends a whole number of bits on a byte, so several codes share one: with `base` levels
`k` codes are the digits of a byte, `base**k <= 256`. Codes are mostly near 0; those beyond the
levels are written as the last digit and follow, one a byte, after the others. Which k is best
depends on how peaked the codes are, and is found by trying all on a sample.
"""

import dataclasses
import struct
import zlib
from typing import Any

import numpy as np

from jaxclip._core import checks, extras

_BASES = {1: 256, 2: 16, 3: 6, 4: 4, 5: 3, 8: 2}
"""Levels of a digit, by digits that share a byte."""
_CHUNK = 40 * 2**15
"""Codes worked on at a time: a multiple of every number of digits."""
_SAMPLE = 2**17
"""Codes that are tried out."""
_MAX_GROWTH = 64
"""Codes that a byte may stand for: a bit for eight is Huffman's best, more would be a bomb."""
_ALWAYS_ALLOWED = 2**26
"""Codes that any data may stand for in asymmetric numeral systems, where constants are free."""
_RAW_DEFLATE = -15
"""zlib's window bits for a stream with neither header nor checksum."""
_HUFFMAN_PREFIX = "<bBxxxxxxQ"
"""The code of digit 0, the digits that share a byte, and how many codes follow them."""
_ANS_PREFIX = "<bxHI"
"""The lowest code, the number of levels, and the size of the table of their counts."""


def check_coding(coding: Any) -> None:
    """Raises unless `coding` is None, "huffman", "smallest", or "ans" with its package installed.

    Args:
      coding: What was given.

    Raises:
      ValueError: If it is none of these.
      ImportError: If it is "ans" and constriction is not installed; names the extra.

    Example:
      >>> check_coding("zip")
      Traceback (most recent call last):
      ValueError: coding must be one of [None, 'huffman', 'ans', 'smallest'], got 'zip' of type str.
    """
    checks.check_choice("coding", coding, (None, "huffman", "ans", "smallest"))
    if coding == "ans":
        extras.import_extra("constriction", "coding")


def codings_tried(coding: str | None) -> tuple[str, ...]:
    """Returns the codings of which an array gets the smallest, if that is smaller than packed.

    Args:
      coding: What was asked for, as `check_coding` takes it.

    Returns:
      What `encode_codes` takes. "ans" is among those of "smallest" if its package is installed.

    Example:
      >>> codings_tried("huffman"), codings_tried(None)
      (('huffman',), ())
    """
    if coding != "smallest":
        return () if coding is None else (coding,)
    try:
        check_coding("ans")
    except ImportError:
        return ("huffman",)
    return ("huffman", "ans")


def encode_codes(codes: np.ndarray, coding: str) -> bytes | None:
    """Returns codes entropy coded; `docs/format.md` has the bytes.

    Args:
      codes: int8, one dimension.
      coding: "huffman" or "ans".

    Returns:
      What `decode_codes` gives the codes back from; None if it would refuse them as a bomb, as
      more than 2**26 codes that are nearly all equal are for "ans". Equal codes give equal
      bytes, for Huffman with one version of zlib.

    Example:
      >>> codes = np.random.default_rng(0).binomial(4, 0.5, 8000).astype(np.int8)  # 2.03 bits
      >>> 2030 <= len(encode_codes(codes, "huffman")) < 2100
      True
    """
    return (_huffman_encode if coding == "huffman" else _ans_encode)(codes)


def decode_codes(data: bytes, coding: str, count: int) -> np.ndarray:
    """Returns the codes that `encode_codes` coded.

    Args:
      data: What it returned, or what a file claims that it did.
      coding: "huffman" or "ans".
      count: How many codes there are.

    Returns:
      int8, of shape `(count,)`. Memory is bounded by `count` and the data, whatever they hold.

    Raises:
      ValueError: If the data are not `count` codes.
      ImportError: If `coding` is "ans" and constriction is not installed.

    Example:
      >>> codes = np.array([3, -1, 0, 0, 0], np.int8)
      >>> decode_codes(encode_codes(codes, "huffman"), "huffman", 5)
      array([ 3, -1,  0,  0,  0], dtype=int8)
    """
    return (_huffman_decode if coding == "huffman" else _ans_decode)(data, count)


def _counts(codes: np.ndarray) -> tuple[int, np.ndarray]:
    """The lowest code, and how often each occurs from there on."""
    counts = np.roll(np.bincount(codes.view(np.uint8), minlength=256), 128)  # from -128 on
    used = np.flatnonzero(counts) if codes.size else np.array([128])
    return int(used[0]) - 128, counts[used[0] : used[-1] + 1]


# --- Huffman ------------------------------------------------------------------------------


def _huffman_encode(codes: np.ndarray) -> bytes:
    lowest, counts = _counts(codes)
    sample = codes[:: -(-codes.size // _SAMPLE) or 1]
    plans = [_plan(lowest, counts, k) for k in _BASES]
    best = min(plans, key=lambda plan: len(_deflated(sample, plan)))
    prefix = struct.pack(_HUFFMAN_PREFIX, best.lowest, best.k, best.num_beyond)
    return prefix + _deflated(codes, best)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """`k` digits a byte; digit 0 is the code `lowest`; `num_beyond` codes have no digit."""

    k: int
    lowest: int
    num_beyond: int

    @property
    def base(self) -> int:
        return _BASES[self.k]

    @property
    def powers(self) -> np.ndarray:
        return (self.base ** np.arange(self.k)).astype(np.uint8)


def _plan(lowest: int, counts: np.ndarray, k: int) -> _Plan:
    base = _BASES[k]
    if counts.size <= base:
        return _Plan(k, lowest, 0)
    sums = np.cumsum(np.concatenate([[0], counts]))
    inside = sums[base - 1 :] - sums[: 1 - base]  # the last digit is for those beyond
    best = int(inside.argmax())
    return _Plan(k, lowest + best, int(sums[-1] - inside[best]))


def _deflated(codes: np.ndarray, plan: _Plan) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE, 9, zlib.Z_HUFFMAN_ONLY)
    pieces, beyond = [], [codes[:0]]
    for start in range(0, codes.size, _CHUNK):
        chunk = codes[start : start + _CHUNK]
        digits = chunk.astype(np.int16) - np.int16(plan.lowest)
        if plan.num_beyond:
            is_beyond = (digits < 0) | (digits >= plan.base - 1)
            digits[is_beyond] = plan.base - 1
            beyond.append(chunk[is_beyond])
        digits = np.pad(digits, (0, -digits.size % plan.k)).astype(np.uint8)
        grouped = digits.reshape(-1, plan.k)
        packed = grouped[:, 0].copy()
        for i in range(1, plan.k):
            packed += grouped[:, i] * plan.powers[i]
        pieces.append(coder.compress(packed.data))
    pieces += [coder.compress(np.concatenate(beyond).data), coder.flush()]
    return b"".join(pieces)


def _huffman_decode(data: bytes, count: int) -> np.ndarray:
    size = struct.calcsize(_HUFFMAN_PREFIX)
    if len(data) < size:
        raise ValueError("its coded data are damaged: they are cut short.")
    lowest, k, num_beyond = struct.unpack(_HUFFMAN_PREFIX, data[:size])
    if k not in _BASES or num_beyond > count:
        raise ValueError("its coded data are damaged: their prefix is not valid.")
    plan = _Plan(k, lowest, num_beyond)
    num_bytes = -(-count // plan.k)
    if num_bytes + plan.num_beyond > _MAX_GROWTH // 8 * len(data):
        raise ValueError("its coded data are damaged: they are too short for their codes.")
    stream = _inflated(data[size:], num_bytes + plan.num_beyond)
    every_byte = np.arange(256)[:, None] // plan.powers.astype(np.int64) % plan.base
    every_byte = (every_byte + plan.lowest).astype(np.int8)
    codes = np.empty(num_bytes * plan.k, np.int8)
    for start in range(0, num_bytes, _CHUNK // plan.k):
        part = stream[start : start + _CHUNK // plan.k][: num_bytes - start]
        codes[start * plan.k :][: part.size * plan.k] = every_byte[part].reshape(-1)
    codes = codes[:count]
    if plan.num_beyond:
        # Past 127 the last digit wraps to a code that no other digit stands for.
        is_beyond = codes == np.array(plan.lowest + plan.base - 1).astype(np.int8)
        if np.count_nonzero(is_beyond) != plan.num_beyond:
            raise ValueError("its coded data are damaged: codes are missing.")
        codes[is_beyond] = stream[num_bytes:].view(np.int8)
    return codes


def _inflated(data: bytes, num_bytes: int) -> np.ndarray:
    """What a stream holds, which must be as long as it should be, or nothing is believed."""
    decoder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        stream = decoder.decompress(data, num_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"its coded data are damaged: {error}.") from error
    if len(stream) != num_bytes or not decoder.eof or decoder.unused_data:
        raise ValueError("its coded data are damaged: their length is wrong.")
    return np.frombuffer(stream, np.uint8)


# --- Asymmetric numeral systems -------------------------------------------------------------


def _ans_encode(codes: np.ndarray) -> bytes | None:
    lowest, counts = _counts(codes)
    coder, model = _ans_coder(None), _ans_model(counts)
    # A stack: what goes in last comes out first.
    for start in reversed(range(0, codes.size, _CHUNK)):
        levels = codes[start : start + _CHUNK].astype(np.int32) - np.int32(lowest)
        coder.encode_reverse(levels, model)
    table = zlib.compress(counts.astype("<u8").tobytes(), 9, _RAW_DEFLATE)
    prefix = struct.pack(_ANS_PREFIX, lowest, counts.size, len(table))
    data = prefix + table + coder.get_compressed().astype("<u4").tobytes()
    return None if _is_bomb(data, codes.size) else data


def _ans_decode(data: bytes, count: int) -> np.ndarray:
    start = struct.calcsize(_ANS_PREFIX)
    if len(data) < start:
        raise ValueError("its coded data are damaged: they are cut short.")
    lowest, num_levels, table_size = struct.unpack(_ANS_PREFIX, data[:start])
    stop = start + table_size
    if not 1 <= num_levels <= 128 - lowest or (len(data) - stop) % 4 or stop > len(data):
        raise ValueError("its coded data are damaged: their prefix is not valid.")
    counts = _inflated(data[start:stop], 8 * num_levels).view("<u8").astype(np.uint64)
    if sum(counts.tolist()) != count:
        raise ValueError("its coded data are damaged: their counts do not add up.")
    if _is_bomb(data, count):
        raise ValueError(f"its {count:,} codes in {len(data):,} bytes are refused as a bomb.")
    try:
        coder = _ans_coder(np.frombuffer(data[stop:], "<u4").astype(np.uint32))
    except ValueError as error:
        raise ValueError(f"its coded data are damaged: {error}.") from error
    model, codes = _ans_model(counts), np.empty(count, np.int8)
    for start in range(0, count, _CHUNK):
        levels = coder.decode(model, min(_CHUNK, count - start))
        codes[start : start + levels.size] = levels + lowest
    found = np.bincount(codes.astype(np.int16) - lowest, minlength=counts.size)
    if not coder.is_empty() or not np.array_equal(found, counts):
        raise ValueError("its coded data are damaged: they are not what was counted.")
    return codes


def _is_bomb(data: bytes, count: int) -> bool:
    return count > _ALWAYS_ALLOWED + _MAX_GROWTH * len(data)


def _ans_coder(compressed: np.ndarray | None) -> Any:
    stream = extras.import_extra("constriction", "coding").stream
    return stream.stack.AnsCoder(*([] if compressed is None else [compressed]))


def _ans_model(counts: np.ndarray) -> Any:
    """A model of the counts; a second level is made up for one alone, as coders need two."""
    shares = counts / counts.sum() if counts.sum() else np.ones(1)
    shares = np.append(shares, 0.0) if shares.size == 1 else shares
    model = extras.import_extra("constriction", "coding").stream.model
    return model.Categorical(shares, perfect=False)
