"""The bytes of GGUF blocks: a float16 scale, for some an offset, and 32 or 256 codes.

    Q4_0    w' = d * (q - 8)     q in 0..15      32 weights in 18 bytes
    Q4_1    w' = d * q + m       q in 0..15      32 in 20
    Q5_0    w' = d * (q - 16)    q in 0..31      32 in 22; only read
    Q8_0    w' = d * q           q in int8       32 in 34
    TQ1_0   w' = d * (q - 1)     q in 0..2       256 in 54, five codes a byte
    TQ2_0   w' = d * (q - 1)     q in 0..2       256 in 66, four codes a byte

d may be negative.
"""

from typing import Literal, NamedTuple, TypeAlias

import numpy as np

BlockKind: TypeAlias = Literal["Q4_0", "Q4_1", "Q8_0", "TQ1_0", "TQ2_0"]


class BlockFormat(NamedTuple):
    """A kind of block.

    Attributes:
      size: Weights in a block.
      num_bytes: Its bytes.
      low: Lowest code.
      high: Highest code.
    """

    size: int
    num_bytes: int
    low: int
    high: int


WRITTEN: dict[str, BlockFormat] = {
    "Q4_0": BlockFormat(32, 18, -8, 7),
    "Q4_1": BlockFormat(32, 20, 0, 15),
    "Q8_0": BlockFormat(32, 34, -128, 127),
    "TQ1_0": BlockFormat(256, 54, -1, 1),
    "TQ2_0": BlockFormat(256, 66, -1, 1),
}
# Blocks that a grid holds: those with an offset lack a code for 0.
ON_GRIDS = {kind: form for kind, form in WRITTEN.items() if kind != "Q4_1"}
ON_GRIDS["Q5_0"] = BlockFormat(32, 22, -16, 15)

# TQ1_0: by part of a block, bytes and codes a byte; code k of byte j is code k * bytes + j.
_TRIT_PARTS = ((32, 5), (16, 5), (4, 4))


def pack_blocks(codes: np.ndarray, header: list[np.ndarray], kind: str) -> np.ndarray:
    """Returns codes (blocks, size) with [d] or [d, m] as the bytes of blocks."""
    head = [part.astype("<f2").view(np.uint8) for part in header]
    places = (codes - WRITTEN[kind].low).astype(np.uint8)
    if kind == "Q8_0":
        data = codes.astype(np.int8).view(np.uint8)
    elif kind == "TQ1_0":
        data = _packed_trits(places)
    elif kind == "TQ2_0":
        data = _shifted(places, 2)
    else:
        data = places[:, :16] | (places[:, 16:] << 4)
    # Scales of blocks of 256 are at the end.
    return np.concatenate([data, *head] if kind.startswith("TQ") else [*head, data], axis=1)


def unpack_blocks(blocks: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes, int8 (blocks, size), and scales, float16 (blocks, 1), of blocks on a grid."""
    form = ON_GRIDS[kind]
    is_last = kind.startswith("TQ")
    head, data = (blocks[:, -2:], blocks[:, :-2]) if is_last else (blocks[:, :2], blocks[:, 2:])
    scale = np.ascontiguousarray(head).view("<f2").astype(np.float16)
    if kind == "Q8_0":
        return data.view(np.int8).copy(), scale
    if kind == "TQ1_0":
        places = _unpacked_trits(data)
    elif kind == "TQ2_0":
        parts = data.reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & np.uint8(3)
        places = parts.reshape(-1, form.size)
    else:
        places = np.concatenate([data[:, -16:] & np.uint8(15), data[:, -16:] >> 4], axis=1)
        if kind == "Q5_0":
            fifth = np.unpackbits(data[:, :4], axis=1, bitorder="little")
            places |= fifth << np.uint8(4)
    return places.astype(np.int8) + np.int8(form.low), scale


def _shifted(places: np.ndarray, num_bits: int) -> np.ndarray:
    """Returns four codes a byte: in each half of a block those of 32 entries side by side."""
    parts = places.reshape(-1, 2, 4, 32) << (num_bits * np.arange(4, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(parts, axis=2).reshape(len(places), -1)


def _packed_trits(places: np.ndarray) -> np.ndarray:
    """Returns five codes of 0..2 a byte, and four in each of the last four bytes."""
    columns, start = [], 0
    for num_bytes, count in _TRIT_PARTS:
        part = places[:, start : start + num_bytes * count].reshape(-1, count, num_bytes)
        powers = 3 ** np.arange(4, 4 - count, -1)
        columns.append(np.tensordot(part.astype(np.int64), powers, (1, 0)))
        start += num_bytes * count
    # A byte is the fraction number / 243, rounded up: readers multiply by 3 and take the carry.
    return -(-np.concatenate(columns, axis=1) * 256 // 243).astype(np.uint8)


def _unpacked_trits(data: np.ndarray) -> np.ndarray:
    """Returns the codes of `_packed_trits`."""
    parts, start = [], 0
    for num_bytes, count in _TRIT_PARTS:
        powers = (3 ** np.arange(count)).astype(np.uint8)
        part = data[:, None, start : start + num_bytes] * powers[:, None]
        parts.append((part.astype(np.uint16) * 3 >> 8).reshape(len(data), -1))
        start += num_bytes
    return np.concatenate(parts, axis=1)
