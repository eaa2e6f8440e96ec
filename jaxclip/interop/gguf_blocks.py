"""Weights and codes as GGUF blocks: scales of small squared error, which float16 holds.

    w' = d * q        or, for Q4_1,        w' = d * q + m

d and m are rounded to float16 before codes are chosen, so the codes fit the stored values.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._core.floats import rounded
from jaxclip._core.grids import Grid
from jaxclip.interop.gguf_packing import WRITTEN, pack_blocks
from jaxclip.interop.leaves import check_held
from jaxclip.lowbit.quantizer import quantize

_LOWEST = -8  # code of a leaf with zero points that Q4_1 stores as 0
_GRIDS = {"Q4_0": Grid(4, axis=0), "Q8_0": Grid(8, axis=0)}
_GRIDS |= dict.fromkeys(("TQ1_0", "TQ2_0"), Grid("ternary", axis=0))
# Starts of the affine fit: fractions of a block's range that are cut off below and above. The
# coarse ones are tried for all blocks, the fine ones are steps from the best coarse one.
_COARSE = np.array(list(itertools.product((-0.03, 0.01, 0.06, 0.12, 0.2), repeat=2)), np.float32)
_FINE = np.array(list(itertools.product((-0.025, -0.01, 0.01, 0.025), repeat=2)), np.float32)
# Blocks encoded at once: this bounds memory, and one compilation serves all chunks.
_CHUNK = 2**14


def encode_blocks(array: np.ndarray, kind: str) -> np.ndarray:
    """Returns the rows of an array as blocks of small squared error, uint8 along the last axis."""
    form = WRITTEN[kind]
    blocks = np.ascontiguousarray(array, np.float32).reshape(-1, form.size)
    encode = _encode_affine if kind == "Q4_1" else functools.partial(_encode_scaled, kind=kind)
    chunks = [encode(blocks[i : i + _CHUNK]) for i in range(0, len(blocks), _CHUNK)]
    packed = np.concatenate([*chunks, np.empty((0, form.num_bytes), np.uint8)])
    return packed.reshape(*array.shape[:-1], array.shape[-1] // form.size * form.num_bytes)


def blocks_of_codes(
    codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray | None, kind: str
) -> np.ndarray:
    """Returns codes (blocks, size), with scales and zeros (blocks, 1), as the bytes of blocks."""
    header = header_of_codes(codes, scale, zeros)
    if zeros is not None:
        codes = codes.astype(np.int16) - _LOWEST
    return pack_blocks(codes, header, kind)


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
    """Returns blocks without offsets, none worse than with the scale of the largest entry."""
    _, _, low, high = WRITTEN[kind]
    searched = quantize(jnp.asarray(_padded(blocks)), _GRIDS[kind]).scale
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
    return pack_blocks(codes, [d], kind)


def _encode_affine(blocks: np.ndarray) -> np.ndarray:
    """Returns Q4_1 blocks, none worse than with a grid from the least to the largest entry."""
    d, m = (np.asarray(a)[: len(blocks), None] for a in _affine_fit(_padded(blocks).T))
    lowest, highest = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    candidates = [[d, m], [(highest - lowest) / 15, lowest]]
    header, codes = _best_of(
        blocks, [[_as_float16(part) for part in pair] for pair in candidates], 0, 15
    )
    return pack_blocks(codes, header, "Q4_1")


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
        variance = squares - codes * codes / len(x)
        d = jnp.where(variance > 0, products / jnp.where(variance > 0, variance, 1), 0)
        return d, -d * codes / len(x), d * products

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
