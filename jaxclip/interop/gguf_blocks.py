"""GGUF blocks of 32 weights: a float16 scale, for Q4_1 an offset, and 32 codes.

    Q4_0   w' = d * (q - 8)    q in 0..15     18 bytes per block
    Q4_1   w' = d * q + m      q in 0..15     20 bytes
    Q8_0   w' = d * q          q in int8      34 bytes

d may be negative. d and m are rounded to float16 before codes are chosen, so the codes fit the
stored values.
"""

import functools
import itertools
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._core.floats import rounded
from jaxclip._core.grids import Grid
from jaxclip.interop.leaves import check_held
from jaxclip.lowbit.quantizer import quantize

BlockKind: TypeAlias = Literal["Q4_0", "Q4_1", "Q8_0"]
BLOCK_SIZE = 32
BYTES_PER_BLOCK = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_LOWEST = -8  # code that is stored as 0
_CODES = {"Q4_0": (_LOWEST, 7), "Q4_1": (0, 15), "Q8_0": (-128, 127)}
# Starts of the affine fit: fractions of a block's range that are cut off below and above. The
# coarse ones are tried for all blocks, the fine ones are steps from the best coarse one.
_COARSE = np.array(list(itertools.product((-0.03, 0.01, 0.06, 0.12, 0.2), repeat=2)), np.float32)
_FINE = np.array(list(itertools.product((-0.025, -0.01, 0.01, 0.025), repeat=2)), np.float32)
# Blocks encoded at once: this bounds memory, and one compilation serves all chunks.
_CHUNK = 2**14


def encode_blocks(array: np.ndarray, kind: str) -> np.ndarray:
    """Returns the rows of an array as blocks of small squared error, uint8 along the last axis."""
    blocks = np.ascontiguousarray(array, np.float32).reshape(-1, BLOCK_SIZE)
    encode = _encode_affine if kind == "Q4_1" else functools.partial(_encode_scaled, kind=kind)
    chunks = [encode(blocks[i : i + _CHUNK]) for i in range(0, len(blocks), _CHUNK)]
    packed = np.concatenate([*chunks, np.empty((0, BYTES_PER_BLOCK[kind]), np.uint8)])
    num_bytes = array.shape[-1] // BLOCK_SIZE * BYTES_PER_BLOCK[kind]
    return packed.reshape(*array.shape[:-1], num_bytes)


def blocks_of_codes(
    codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray | None, kind: str
) -> np.ndarray:
    """Returns codes (blocks, 32) with scales and zero codes (blocks, 1) as the bytes of blocks."""
    header = header_of_codes(codes, scale, zeros)
    if zeros is not None:
        codes = codes.astype(np.int16) - _LOWEST
    return _packed(codes, header, kind)


def are_usual(scale: np.ndarray) -> bool:
    """Returns True if float16 surely holds scales, and offsets of up to 16 of them."""
    size = np.abs(scale.astype(np.float32))
    smallest, largest = np.finfo(np.float16).smallest_subnormal, np.finfo(np.float16).max
    return bool(size.min(initial=1) >= smallest and size.max(initial=0) <= largest / 16)


def header_of_codes(
    codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray | None
) -> list[np.ndarray]:
    """Returns [d] or [d, m] of blocks of codes; raises if float16 lacks that of non-zero codes."""
    is_zero = np.all(codes == (0 if zeros is None else zeros), axis=1, keepdims=True)
    d = rounded(scale, np.float16)
    is_held = np.isfinite(d) & (d != 0)
    check_held("a scale", scale, np.dtype(np.float16), is_held | is_zero)
    header = [d]
    if zeros is not None:
        # The zero code must give 0 with the scale as stored, not as given.
        offset = d.astype(np.float32) * (_LOWEST - zeros)
        header = [d, rounded(offset, np.float16)]
        is_held &= np.isfinite(header[1])
        check_held("an offset", offset, np.dtype(np.float16), is_held | is_zero)
    return [np.where(is_held, part, np.float16(0)) for part in header]


def _packed(codes: np.ndarray, header: list[np.ndarray], kind: str) -> np.ndarray:
    """Returns blocks: float16 headers, then a byte per code, or codes j and j + 16 in one byte."""
    if kind == "Q8_0":
        data = codes.astype(np.int8).view(np.uint8)
    else:
        unsigned = (codes + (8 if kind == "Q4_0" else 0)).astype(np.uint8)
        data = unsigned[:, : BLOCK_SIZE // 2] | (unsigned[:, BLOCK_SIZE // 2 :] << 4)
    return np.concatenate([*(h.astype("<f2").view(np.uint8) for h in header), data], axis=1)


def _as_float16(x: np.ndarray) -> np.ndarray:
    """Returns scales in float16; raises if one is too large."""
    result = rounded(x, np.float16)
    if not np.all(np.isfinite(result)):
        raise ValueError(f"a scale of {np.max(np.abs(x)):.3g} is too large for float16.")
    return result


# --- Choosing scales ------------------------------------------------------------------
#
# `quantize` with float16 scales alone is not enough: one block of 4 bits in fifty would be worse
# than the gguf package's, and whole zero codes would cost Q4_1 a quarter of its error.


def _encode_scaled(blocks: np.ndarray, kind: str) -> np.ndarray:
    """Returns Q4_0 or Q8_0 blocks, none worse than with the scale of the largest entry."""
    low, high = _CODES[kind]
    grid = Grid(4 if kind == "Q4_0" else 8, axis=0)
    searched = quantize(jnp.asarray(_padded(blocks)), grid).scale
    searched = _as_float16(np.asarray(searched)[: len(blocks)])
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    candidates = [
        searched,
        # Rounding to float16 may have moved the scale to the worse side of the best one.
        np.nextafter(searched, np.float16(0)),
        np.nextafter(searched, np.copysign(np.float16(65504), searched)),
        _as_float16(largest / low),
        _as_float16(np.abs(largest) / high),
    ]
    (d,), codes = _best_of(blocks, [[d] for d in candidates], low, high)
    return _packed(codes, [d], kind)


def _encode_affine(blocks: np.ndarray) -> np.ndarray:
    """Returns Q4_1 blocks, none worse than with a grid from the least to the largest entry."""
    d, m = (np.asarray(a)[: len(blocks), None] for a in _affine_fit(_padded(blocks).T))
    lowest, highest = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    candidates = [[d, m], [(highest - lowest) / 15, lowest]]
    header, codes = _best_of(
        blocks, [[_as_float16(part) for part in pair] for pair in candidates], *_CODES["Q4_1"]
    )
    return _packed(codes, header, "Q4_1")


def _best_of(
    blocks: np.ndarray, candidates: list[list[np.ndarray]], low: int, high: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the [d] or [d, m] of least squared error for each block, and its codes."""
    least = np.full((len(blocks), 1), np.inf, np.float32)
    best, best_codes = candidates[0], np.zeros_like(blocks)
    for candidate in candidates:
        d, *m = (part.astype(np.float32) for part in candidate)
        offset = m[0] if m else np.float32(0)
        codes = np.clip(np.rint((blocks - offset) / np.where(d == 0, 1, d)), low, high)
        difference = blocks - (d * codes + offset)
        error = np.einsum("bi,bi->b", difference, difference)[:, None]
        is_better = error < least
        least = np.where(is_better, error, least)
        best_codes = np.where(is_better, codes, best_codes)
        best = [np.where(is_better, a, b) for a, b in zip(candidate, best, strict=True)]
    return best, best_codes


def _padded(blocks: np.ndarray) -> np.ndarray:
    """Returns blocks padded with zeros to a power of two, so that few shapes are compiled."""
    size = max(1 << (len(blocks) - 1).bit_length(), 64)
    return np.pad(blocks, ((0, size - len(blocks)), (0, 0)))


class _AffineFit(NamedTuple):
    """d and m, the sum of squares that they explain, and the start from which they came."""

    d: jax.Array
    m: jax.Array
    gain: jax.Array
    below: jax.Array
    above: jax.Array


@jax.jit
def _affine_fit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns d and m of `d * q + m`, q in 0..15, of small squared error over axis 0."""
    # From every start codes are rounded once, and d and m are fitted to them by least squares; the
    # best fit is refined further.
    mean = jnp.mean(x, axis=0)
    x = x - mean[None]
    lowest = jnp.min(x, axis=0)
    span = jnp.max(x, axis=0) - lowest

    def refit(d: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        inverse = 1 / jnp.where(d > 0, d, 1)
        codes, squares, products = (jnp.zeros_like(d) for _ in range(3))
        # Sums are written out, so that XLA makes one vectorized loop over the blocks of them.
        for row in x:
            q = jnp.clip(jnp.round((row - m) * inverse), 0, 15)
            codes, squares, products = codes + q, squares + q * q, products + q * row
        variance = squares - codes * codes / BLOCK_SIZE
        d = jnp.where(variance > 0, products / jnp.where(variance > 0, variance, 1), 0)
        return d, -d * codes / BLOCK_SIZE, d * products

    def search(best: _AffineFit, starts: np.ndarray, centre: _AffineFit) -> _AffineFit:
        def try_start(best: _AffineFit, start: jax.Array) -> tuple[_AffineFit, None]:
            below, above = centre.below + start[0], centre.above + start[1]
            d, m = span * (1 - below - above) / 15, lowest + span * below
            new = _AffineFit(*refit(d, m), below, above)
            is_better = new.gain > best.gain
            pairs = zip(new, best, strict=True)
            return _AffineFit(*(jnp.where(is_better, *pair) for pair in pairs)), None

        return lax.scan(try_start, best, jnp.asarray(starts))[0]

    no_fit = _AffineFit(*(jnp.zeros_like(span) for _ in _AffineFit._fields))
    best = search(no_fit, _COARSE, no_fit)
    best = search(best, _FINE, best)
    d, m, _ = lax.fori_loop(0, 3, lambda _, fit: refit(fit[0], fit[1]), best[:3])
    return d, m + mean
