"""Lengths of codes: the frequencies of a source in a few bytes, as exact whole numbers.

    frequency(code) ~ 2 ** -length(|code|)

Lengths are stored at the magnitudes 0, 1, 2, 3, 4, 6, 8, 12, 16, ... and are linear in between. The
arithmetic is that of whole numbers, so every machine makes the same table of the same bytes.
"""

import functools
import math

import numpy as np

# Magnitudes whose lengths are stored, from 0 to some node of the list.
NODES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128])
LARGEST = int(NODES[-1])
TOTAL_BITS = 13
TOTAL = 2**TOTAL_BITS
NEVER = 255  # length of an escape that does not occur
_UNIT = 8  # lengths are stored in eighths of a bit
_FINE = 32  # and interpolated in 32nds of that: the greatest distance of two nodes
# Bits of an escaped code beside its place in the table.
_ESCAPE_BITS = 10
_NUM_STEPS = 30


@functools.cache
def _powers_of_half() -> np.ndarray:
    """Returns 2**(30 - i / 256) for i from 0 to 255, rounded down."""
    powers = []
    for i in range(256):
        power = 1 << (30 * 256 - i)
        for _ in range(8):  # the 256th root
            power = math.isqrt(power)
        powers.append(power)
    return np.array(powers, np.int64)


def num_nodes_of(largest: int) -> int:
    """Returns the number of nodes up to the magnitude `largest`, which is one."""
    return int(np.searchsorted(NODES, largest)) + 1


def _interpolated(lengths: np.ndarray) -> np.ndarray:
    """Returns lengths of all magnitudes up to the last node, in units of 1 / 256 bit."""
    nodes = NODES[: len(lengths)]
    magnitudes = np.arange(nodes[-1] + 1)
    right = np.searchsorted(nodes, magnitudes)
    left = np.maximum(right - 1, 0)
    distance = np.maximum(nodes[right] - nodes[left], 1)
    fine = lengths.astype(np.int64) * _FINE
    return fine[right] - (fine[right] - fine[left]) * (nodes[right] - magnitudes) // distance


def frequencies(lengths: np.ndarray, escape: int) -> np.ndarray:
    """Returns the frequencies of codes -n to n and of the two escapes; they sum to `TOTAL`.

    Args:
      lengths: uint8 at the first nodes, in eighths of a bit beyond some constant.
      escape: Length of an escape; `NEVER` for a frequency of 0.
    """
    of_magnitudes = _interpolated(lengths)
    of_symbols = np.concatenate(
        [of_magnitudes[:0:-1], of_magnitudes, np.full(2, escape * _FINE, np.int64)]
    )
    weights = _powers_of_half()[of_symbols % 256] >> np.minimum(of_symbols // 256, 62)
    is_used = np.ones(weights.shape, bool)
    is_used[-2:] = escape != NEVER
    weights[~is_used] = 0
    # One for each, the rest by weight, and what rounding leaves for the most frequent.
    num_left = TOTAL - int(is_used.sum())
    found = is_used + weights * num_left // max(int(weights.sum()), 1)
    found[int(weights.argmax())] += TOTAL - int(found.sum())
    return found


def fit_lengths(counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the lengths and the escape's length that code a source in the fewest bits.

    Args:
      counts: How often each magnitude from 0 to `LARGEST` occurs, and at the end those beyond.
    """
    total = max(int(counts.sum()), 1)
    num_nodes = _best_num_nodes(counts, total)
    nodes = NODES[:num_nodes]
    inside = counts[: nodes[-1] + 1] / total
    beyond = 1 - float(inside.sum()) if counts[nodes[-1] + 1 :].any() else 0.0
    features = np.stack(
        [np.interp(np.arange(nodes[-1] + 1), nodes, row) for row in np.eye(num_nodes)]
    )
    multiplicity = np.where(np.arange(nodes[-1] + 1) > 0, 2.0, 1.0)
    lengths = -np.log(np.maximum(inside / multiplicity, 1 / (4 * total)))[nodes]
    share = max(float(inside.sum()), 1 / total)
    for _ in range(_NUM_STEPS):  # Newton's method, for the likelihood
        modelled = multiplicity * np.exp(-(lengths @ features))
        modelled *= share / modelled.sum()
        slope = features @ (modelled - inside)
        mean = features @ modelled / share
        curvature = (features * modelled) @ features.T - share * np.outer(mean, mean)
        step = np.linalg.solve(curvature + 1e-7 * np.eye(num_nodes), slope)
        step /= max(float(np.abs(step).max()), 1.0)
        lengths = lengths + step
        if np.abs(step).max() < 1e-3:
            break
    # Relative to a code, the probability of each escape is half of all beyond.
    modelled = multiplicity * np.exp(-(lengths @ features))
    escape = math.log(2 * share / (beyond * modelled.sum())) if beyond else 0.0
    lowest = min(float(lengths.min()), escape if beyond else math.inf)
    stored = np.round((np.append(lengths, escape) - lowest) / math.log(2) * _UNIT)
    stored = np.clip(stored, 0, NEVER - 1).astype(np.uint8)
    return stored[:-1], int(stored[-1]) if beyond else NEVER


def _best_num_nodes(counts: np.ndarray, total: int) -> int:
    """Returns the number of nodes beyond which codes are so rare that escapes are cheaper."""
    for i, node in enumerate(NODES[:-1]):
        num_beyond = int(counts[node + 1 :].sum())
        # Each further magnitude takes two of the places of the table, at least.
        taken = 2 * (NODES[i + 1] - node) / TOTAL * total / math.log(2)
        if num_beyond * _ESCAPE_BITS <= taken:
            return i + 1
    return len(NODES)
