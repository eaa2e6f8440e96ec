"""Entropy coding: codes in as many bits as they carry, not as they are wide.

    huffman   zlib's Huffman coder over bytes of whole codes, in every Python
    ans       asymmetric numeral systems by the package constriction, at the entropy

Huffman spends a whole number of bits on a byte, so several codes share one: with `base` levels
`k` codes are the digits of a byte, `base**k <= 256`. Codes are mostly near 0; those beyond the
levels are written as the last digit and follow, one a byte, after the others. Which k is best
depends on how peaked the codes are, and is found by trying all on a sample.
"""

import dataclasses
import zlib
from typing import Any

import numpy as np

from jaxclip import _checks

__all__ = ["CodedArray", "check_coding", "decode_codes", "encode_codes"]

_BASES = {1: 256, 2: 16, 3: 6, 4: 4, 5: 3, 8: 2}
"""Levels of a digit, by digits that share a byte."""
_CHUNK = 40 * 2**15
"""Codes worked on at a time: a multiple of every number of digits."""
_SAMPLE = 2**17
"""Codes that are tried out."""
_RAW_DEFLATE = -15
"""zlib's window bits for a stream with neither header nor checksum."""


@dataclasses.dataclass(frozen=True)
class CodedArray:
    """Codes as a coder leaves them.

    Attributes:
      coding: "huffman" or "ans".
      lowest: The code of digit or level 0.
      numbers: What else the reader must know. For "huffman" the digits that share a byte and
        how many codes follow them; for "ans" how often each level occurs.
      data: The coded bytes.
    """

    coding: str
    lowest: int
    numbers: tuple[int, ...]
    data: bytes


def check_coding(coding: Any) -> None:
    """Raises unless `coding` is None, "huffman", or "ans" with its package installed.

    Args:
      coding: What was given.

    Raises:
      ValueError: If it is none of these.
      ImportError: If it is "ans" and constriction is not installed; names the extra.

    Example:
      >>> check_coding("zip")
      Traceback (most recent call last):
      ValueError: coding must be one of [None, 'huffman', 'ans'], got 'zip' of type str.
    """
    _checks.check_choice("coding", coding, (None, "huffman", "ans"))
    if coding == "ans":
        _checks.import_extra("constriction", "coding")


def encode_codes(codes: np.ndarray, coding: str) -> CodedArray:
    """Returns codes entropy coded.

    Args:
      codes: int8, one dimension.
      coding: "huffman" or "ans".

    Returns:
      What `decode_codes` gives the codes back from. Equal codes give equal bytes, for
      Huffman with one version of zlib.

    Example:
      >>> codes = np.random.default_rng(0).binomial(4, 0.5, 8000).astype(np.int8)  # 2.03 bits
      >>> 2030 <= len(encode_codes(codes, "huffman").data) < 2100
      True
    """
    return (_huffman_encode if coding == "huffman" else _ans_encode)(codes)


def decode_codes(coded: CodedArray, count: int) -> np.ndarray:
    """Returns the codes that `encode_codes` coded.

    Args:
      coded: What it returned, or what a file claims that it did.
      count: How many codes there are.

    Returns:
      int8, of shape `(count,)`. Memory is bounded by `count` and the data, whatever they hold.

    Raises:
      ValueError: If the data are not `count` codes.
      ImportError: If "ans" is asked for and constriction is not installed.

    Example:
      >>> codes = np.array([3, -1, 0, 0, 0], np.int8)
      >>> decode_codes(encode_codes(codes, "huffman"), 5)
      array([ 3, -1,  0,  0,  0], dtype=int8)
    """
    if coded.coding == "huffman":
        return _huffman_decode(coded, count)
    if coded.coding == "ans":
        return _ans_decode(coded, count)
    raise ValueError(f"coding {coded.coding!r} is not known.")


def _counts(codes: np.ndarray) -> tuple[int, np.ndarray]:
    """The lowest code, and how often each occurs from there on."""
    counts = np.roll(np.bincount(codes.view(np.uint8), minlength=256), 128)  # from -128 on
    used = np.flatnonzero(counts) if codes.size else np.array([128])
    return int(used[0]) - 128, counts[used[0] : used[-1] + 1]


# --- Huffman ------------------------------------------------------------------------------


def _huffman_encode(codes: np.ndarray) -> CodedArray:
    lowest, counts = _counts(codes)
    sample = codes[:: -(-codes.size // _SAMPLE) or 1]
    plans = [_plan(lowest, counts, k) for k in _BASES]
    best = min(plans, key=lambda plan: len(_deflated(sample, plan)))
    return CodedArray("huffman", best.lowest, (best.k, best.num_beyond), _deflated(codes, best))


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


def _huffman_decode(coded: CodedArray, count: int) -> np.ndarray:
    if len(coded.numbers) != 2 or coded.numbers[0] not in _BASES or coded.numbers[1] > count:
        raise ValueError("its coding is not valid.")
    plan = _Plan(coded.numbers[0], coded.lowest, coded.numbers[1])
    num_bytes = -(-count // plan.k)
    stream = _inflated(coded.data, num_bytes + plan.num_beyond)
    every_byte = np.arange(256)[:, None] // plan.powers.astype(np.int64) % plan.base
    every_byte = (every_byte + plan.lowest).astype(np.int8)
    codes = np.empty(num_bytes * plan.k, np.int8)
    for start in range(0, num_bytes, _CHUNK // plan.k):
        part = stream[start : start + _CHUNK // plan.k][: num_bytes - start]
        codes[start * plan.k :][: part.size * plan.k] = every_byte[part].reshape(-1)
    codes = codes[:count]
    if plan.num_beyond:
        is_beyond = codes == np.int8(plan.lowest + plan.base - 1)
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


def _ans_encode(codes: np.ndarray) -> CodedArray:
    lowest, counts = _counts(codes)
    coder, model = _ans_coder(None), _ans_model(counts)
    # A stack: what goes in last comes out first.
    for start in reversed(range(0, codes.size, _CHUNK)):
        levels = codes[start : start + _CHUNK].astype(np.int32) - np.int32(lowest)
        coder.encode_reverse(levels, model)
    data = coder.get_compressed().astype("<u4").tobytes()
    return CodedArray("ans", lowest, tuple(counts.tolist()), data)


def _ans_decode(coded: CodedArray, count: int) -> np.ndarray:
    counts = np.array(coded.numbers, np.int64)
    is_valid = 1 <= counts.size <= 128 - coded.lowest and counts.min() >= 0
    if not is_valid or counts.sum() != count or len(coded.data) % 4:
        raise ValueError("its coding is not valid.")
    if not count:
        return np.empty(0, np.int8)
    try:
        coder = _ans_coder(np.frombuffer(coded.data, "<u4").astype(np.uint32))
    except ValueError as error:
        raise ValueError(f"its coded data are damaged: {error}.") from error
    model, codes = _ans_model(counts), np.empty(count, np.int8)
    for start in range(0, count, _CHUNK):
        levels = coder.decode(model, min(_CHUNK, count - start))
        codes[start : start + levels.size] = levels + coded.lowest
    found = np.bincount(codes.astype(np.int16) - coded.lowest, minlength=counts.size)
    if not coder.is_empty() or not np.array_equal(found, counts):
        raise ValueError("its coded data are damaged: they are not what was counted.")
    return codes


def _ans_coder(compressed: np.ndarray | None) -> Any:
    stream = _checks.import_extra("constriction", "coding").stream
    return stream.stack.AnsCoder(*([] if compressed is None else [compressed]))


def _ans_model(counts: np.ndarray) -> Any:
    """A model of the counts; a second level is made up for one alone, as coders need two."""
    shares = counts / counts.sum() if counts.sum() else np.ones(1)
    shares = np.append(shares, 0.0) if shares.size == 1 else shares
    model = _checks.import_extra("constriction", "coding").stream.model
    return model.Categorical(shares, perfect=False)
