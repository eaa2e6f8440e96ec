"""Asymmetric numeral systems, side by side in many lanes.

    encode:  x' = x // frequency * 2**13 + start + x mod frequency
    decode:  slot = x' mod 2**13,    x = x' // 2**13 * frequency(slot) + slot - start(slot)

A lane's number stays in [2**16, 2**32): before it would grow beyond, its low 16 bits move to a
stream of words that all lanes share, and come back. A step is some calls of NumPy for all lanes
together, so more lanes take less time. Each costs about 3 bytes: its last number is half empty.

Reference: Duda, Asymmetric numeral systems, 2013, https://arxiv.org/abs/1311.2540
"""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxclip.lowbit.coding.code_lengths import TOTAL, TOTAL_BITS

_LOWEST = 2**16
# An entry of a decoding table is an int64: slot - start in bits 0-12, the next state in bits 13-15,
# a value in bits 16-31, the frequency above.
_STATE_BITS = 3
_SLOT_MASK = TOTAL - 1
_STATE_MASK = 7 << TOTAL_BITS
MAX_STATES = 2**_STATE_BITS


def symbol_places(frequencies: np.ndarray) -> np.ndarray:
    """Returns frequency and start of each symbol in one number, for `encode`."""
    starts = np.cumsum(frequencies) - frequencies
    return (starts << 16 | frequencies).astype(np.int64)


def decoding_table(
    frequencies: np.ndarray, values: np.ndarray, next_states: np.ndarray
) -> np.ndarray:
    """Returns entries of a decoding table for one state; values are int16."""
    starts = np.cumsum(frequencies) - frequencies
    symbols = np.repeat(np.arange(len(frequencies)), frequencies)
    entries = np.arange(TOTAL) - starts[symbols]
    entries |= next_states.astype(np.int64)[symbols] << TOTAL_BITS
    entries |= (values.astype(np.int64)[symbols] & 0xFFFF) << 16
    return entries | frequencies.astype(np.int64)[symbols] << 32


def encode(places: Iterable[np.ndarray], num_lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lanes' last numbers (uint32) and the words (uint16).

    Args:
      places: From the last step to the first, the `symbol_places` of a symbol of each lane. A step
        with fewer symbols than lanes is one of the first lanes alone.
      num_lanes: Lanes side by side.
    """
    numbers = np.full(num_lanes, _LOWEST, np.int64)
    words = [numbers[:0]]
    for place in places:  # a stack: the last symbol in is the first out
        x = numbers[: len(place)]
        frequency = place & 0xFFFF
        is_full = (x >= frequency << (32 - TOTAL_BITS)).nonzero()[0]
        if is_full.size:
            full = x[is_full]
            words.append(full & 0xFFFF)
            x[is_full] = full >> 16
        x += x // frequency * (TOTAL - frequency)
        x += place >> 16
    return numbers.astype(np.uint32), np.concatenate(words[::-1]).astype(np.uint16)


class Decoder:
    """Lanes of `encode`, decoded step by step."""

    def __init__(self, table: np.ndarray, numbers: np.ndarray, words: np.ndarray) -> None:
        """Starts at the first symbols; `table` has `MAX_STATES` decoding tables for each class."""
        self._table = table
        self._numbers = numbers.astype(np.int64)
        if (self._numbers < _LOWEST).any():
            raise ValueError("its coded data are damaged: a lane is empty.")
        self._words = words.astype(np.int64)
        self._num_read = 0
        self._state = self._numbers[:0]

    def begin(self, num_lanes: int) -> None:
        """Begins chains in state 0, in the first lanes."""
        self._state = np.zeros(num_lanes, np.int64)

    def decode(self, first_places: Sequence[np.ndarray | None]) -> np.ndarray:
        """Returns the next values of the chains: int16, (steps, lanes).

        Args:
          first_places: For each step the first place of each lane's tables; None for 0.
        """
        state, table, words = self._state, self._table, self._words
        num_lanes, position = len(state), self._num_read
        x = self._numbers[:num_lanes]
        out = np.empty((len(first_places), num_lanes), np.int16)
        entry, place, part = (np.empty(num_lanes, np.int64) for _ in range(3))
        values = entry.view(np.int16)[1 if np.little_endian else 2 :: 4]
        for first, row in zip(first_places, out, strict=True):
            np.bitwise_and(x, _SLOT_MASK, out=place)
            place |= state
            if first is not None:
                place += first
            table.take(place, out=entry, mode="clip")
            x >>= TOTAL_BITS
            np.right_shift(entry, 32, out=part)
            x *= part
            np.bitwise_and(entry, _SLOT_MASK, out=part)
            x += part
            np.bitwise_and(entry, _STATE_MASK, out=state)
            row[:] = values
            is_low = (x < _LOWEST).nonzero()[0]
            if is_low.size:
                end = position + is_low.size
                if end > words.size:
                    raise ValueError("its coded data are damaged: words are missing.")
                x[is_low] = x[is_low] << 16 | words[position:end]
                position = end
        self._num_read = position
        return out

    def check_end(self) -> None:
        """Raises unless all words were read and all lanes are as the encoder began."""
        if self._num_read != self._words.size or (self._numbers != _LOWEST).any():
            raise ValueError("its coded data are damaged: they do not end where they should.")
