"""The scale of a low-bit grid that has the least squared error: a search in a few passes.

For the codes l that a scale s gives, the best scale is `s + s * R / B` with the residuals
r = w / s - l, R = sum r l and B = sum l^2, and its error is `s^2 (sum r^2 - R^2 / B)`. So a
pass that sums r^2 and r l for some candidates gives each the error of its refined scale, and
the least of these over all scales is the optimum. Where r is small beside w / s these sums do
not cancel, as those of the closed form A^2 / B would at 8 bits.

The error has many dips. A pass over a geometric bracket finds the neighbourhoods of the best
two candidates, a second looks into both, a third around the best of all; a finer grid has
narrower dips and takes more candidates. The bracket's ends hold for every distribution: a
threshold above the largest weight only wastes levels, one below the root mean square costs
about as much as the weights are worth, and the largest weight alone must not cost more than
all that rounding inside the threshold does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip import _checks

__all__ = ["BlockStats", "best_scale"]

_LANES = 8
"""Candidates of a pass: one vector register of float32."""
_PIECE = 64
"""Entries that one unrolled loop body sums."""
_COARSE_PASSES = {1: 1, 3: 1, 7: 1, 15: 2, 31: 4, 127: 8}
"""Passes over the whole bracket, by highest code."""
_SLAB = 2**18
"""Entries that are read at a time, and whose blocks are worked on between the passes."""


class BlockStats(NamedTuple):
    """What a search knows about each block before it begins; arrays of one shape.

    Attributes:
      factor: A power of two; the search runs on weights times it, of a size near 1.
      largest: The largest magnitude, times `factor`.
      energy: The sum of squares, times `factor**2`.
      num_entries: Number of entries, padding left out.
    """

    factor: jax.Array
    largest: jax.Array
    energy: jax.Array
    num_entries: jax.Array


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def best_scale(
    blocks: jax.Array, axes: tuple[int, ...], counts: jax.Array, low: int, high: int
) -> jax.Array:
    """Returns the scale of least squared error for each block.

    Args:
      blocks: Real floating array, split as `Granularity.split` does.
      axes: Axes that a block spans.
      counts: Entries of each block without padding; broadcasts against the result.
      low: Lowest code, `-high` or `-high - 1`.
      high: Highest code.

    Returns:
      float32, dims kept. Negative where the level `low` helps on the positive side, which
      only happens if `low < -high`; 0 for blocks of zeros.

    Example:
      >>> best_scale(jnp.array([[0.5, -2.0, 1.0]]), (1,), 3, -4, 3)
      Array([[0.5]], dtype=float32)
    """
    x = blocks if blocks.dtype.itemsize < 4 else blocks.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0).astype(jnp.float32)
    _, exponent = jnp.frexp(largest)
    factor = jnp.ldexp(jnp.ones_like(largest), -jnp.clip(exponent, -126, 126))
    energy = jnp.sum(jnp.square(x.astype(jnp.float32) * factor), axis=axes, keepdims=True)
    count = jnp.broadcast_to(jnp.asarray(counts, jnp.float32), largest.shape)
    stats = BlockStats(factor, largest * factor, energy, count)
    if x.size == 0 or _checks.is_sharded(x):
        scale = _search(
            functools.partial(_sums_of_whole, x, axes, factor, low, high), stats, low, high
        )
    else:
        blocked = _in_three_axes(x, axes)
        flat = BlockStats(*(s.reshape(blocked.shape[0], -1) for s in stats))
        scale = _search_in_chunks(blocked, flat, low, high).reshape(largest.shape)
    return scale / factor


def _in_three_axes(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns `x` as (blocks, entries, blocks), without the last if it would be 1 long.

    A trailing axis of length 1 would make XLA copy the whole array on CPU.
    """
    first, last = min(axes, default=x.ndim), max(axes, default=x.ndim - 1)
    if len(axes) != last - first + 1:
        x = jnp.moveaxis(x, axes, tuple(range(-len(axes), 0)))
        first, last = x.ndim - len(axes), x.ndim - 1
    parts = x.shape[:first], x.shape[first : last + 1], x.shape[last + 1 :]
    rows, length, columns = (int(np.prod(part)) for part in parts)
    return x.reshape((rows, length, columns) if columns > 1 else (rows, length))


# --- Sums over a block ----------------------------------------------------------------


def _codes(unit: jax.Array, low: int, high: int) -> jax.Array:
    return jnp.clip(jnp.round(unit), low, high)


def _sums_of_whole(
    x: jax.Array, axes: tuple[int, ...], factor: jax.Array, low: int, high: int, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two sums of each candidate by plain reductions, which run on sharded arrays."""

    def sums(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        unit = x.astype(jnp.float32) * factor * inverse
        code = _codes(unit, low, high)
        residual = unit - code
        squares = jnp.sum(residual * residual, axis=axes, keepdims=True)
        return squares, jnp.sum(residual * code, axis=axes, keepdims=True)

    squares, products = lax.map(sums, jnp.moveaxis(inverse, -1, 0))
    return jnp.moveaxis(squares, 0, -1), jnp.moveaxis(products, 0, -1)


def _sums_of_piece(y: jax.Array, inverse: jax.Array, low: int, high: int) -> jax.Array:
    """Sums r^2 and r l over axis 2 of (b, r, piece, c), for each of (b, 1, c, candidates).

    Written out, with candidates last and both sums in one complex number, it compiles on CPU
    to one vectorized loop that reads each weight once; a reduction would not be vectorized,
    nor would two sums share a loop.
    """
    total = jnp.zeros((), jnp.complex64)
    for j in range(y.shape[2]):
        unit = y[:, :, j, :, None] * inverse
        code = _codes(unit, low, high)
        residual = unit - code
        total = total + lax.complex(residual * residual, residual * code)
    return total


def _search_in_chunks(x: jax.Array, stats: BlockStats, low: int, high: int) -> jax.Array:
    """The search over (blocks, entries, blocks), with bounded memory between the passes."""
    (rows, length), columns = x.shape[:2], stats.factor.shape[1]
    chunk = min(rows, max(_SLAB // (length * columns), 1))

    def search_chunk(start: jax.Array) -> jax.Array:
        part = BlockStats(*(lax.dynamic_slice_in_dim(s, start, chunk) for s in stats))
        is_short = length <= _PIECE and chunk > 1
        sums = _sums_of_short if is_short else _sums_of_long
        return _search(functools.partial(sums, x, start, part.factor, low, high), part, low, high)

    if chunk == rows:
        return search_chunk(jnp.zeros((), jnp.int32))

    def body(i: jax.Array, scales: jax.Array) -> jax.Array:
        start = jnp.minimum(i * chunk, rows - chunk)
        return lax.dynamic_update_slice_in_dim(scales, search_chunk(start), start, 0)

    return lax.fori_loop(0, -(-rows // chunk), body, 0 * stats.factor)


def _rows_of(x: jax.Array, start: Any, rows: int, first: Any, length: int) -> jax.Array:
    """Some rows and entries as float32, with the axis of columns that `x` may lack."""
    starts = tuple(jnp.asarray(i, jnp.int32) for i in (start, first, 0)[: x.ndim])
    y = lax.dynamic_slice(x, starts, (rows, length, *x.shape[2:])).astype(jnp.float32)
    return y if x.ndim == 3 else y[:, :, None]


# Both kinds of sums loop at least twice, if only over halves: a loop is what keeps the
# compiler from computing the sums again for each of their readers. A loop's start is made
# from data, since inside shard_map it must vary over the mesh as what is added does.


def _sums_of_short(
    x: jax.Array, start: jax.Array, factor: jax.Array, low: int, high: int, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two sums of each candidate, for some rows that are one piece long."""
    length = x.shape[1]
    chunk, columns, lanes = inverse.shape
    half = -(-chunk // 2)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        first = jnp.minimum(i * half, chunk - half)
        y = _rows_of(x, start + first, half, 0, length)
        y = y * lax.dynamic_slice_in_dim(factor, first, half)[:, None]
        part = lax.dynamic_slice_in_dim(inverse, first, half)
        sums = _sums_of_piece(y[:, None], part[:, None], low, high)
        return lax.dynamic_update_slice_in_dim(total, sums[:, 0], first, 0)

    zero = 0 * factor[0, 0]
    zeros = jnp.broadcast_to(lax.complex(zero, zero), (chunk, columns, lanes))
    total = lax.fori_loop(0, 2, body, zeros)
    return jnp.real(total), jnp.imag(total)


def _sums_of_long(
    x: jax.Array, start: jax.Array, factor: jax.Array, low: int, high: int, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The two sums of each candidate, for some rows of any length, a slab at a time."""
    length = x.shape[1]
    chunk, columns, lanes = inverse.shape
    piece = max(min(-(-length // 2), _PIECE), 1)
    pieces = max(min(_SLAB // (chunk * piece * columns), length // piece // 2), 1)
    step = piece * pieces

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        first = jnp.minimum(i * step, length - step)
        y = _rows_of(x, start, chunk, first, step) * factor[:, None]
        if length % step:  # the last slab begins in the one before
            y = jnp.where((jnp.arange(step) + first >= i * step)[None, :, None], y, 0)
        y = y.reshape(chunk, pieces, piece, columns)
        return total + _sums_of_piece(y, inverse[:, None], low, high)

    zero = 0 * factor[0, 0]
    zeros = jnp.broadcast_to(lax.complex(zero, zero), (chunk, pieces, columns, lanes))
    total = lax.fori_loop(0, -(-length // step), body, zeros)
    return jnp.sum(jnp.real(total), axis=1), jnp.sum(jnp.imag(total), axis=1)


# --- The search -----------------------------------------------------------------------


class _Found(NamedTuple):
    """The best two candidates so far, and the refined scale of the best."""

    error: jax.Array
    start: jax.Array
    scale: jax.Array
    second_error: jax.Array
    second_start: jax.Array


def _bracket(stats: BlockStats, low: int, high: int) -> tuple[jax.Array, jax.Array]:
    """The least and the largest scale that a search looks at."""
    top = stats.largest / high
    # What rounding at the scale of max_abs costs if residuals are uniform, and a margin.
    rounding = jnp.minimum(1.15 / 12 * stats.num_entries * jnp.square(top), 0.6 * stats.energy)
    by_largest = (stats.largest - jnp.sqrt(rounding)) / max(high, -low)
    by_rms = jnp.sqrt(stats.energy / stats.num_entries) / (high + 0.5)
    # Weights piled on a bound may sit on the level below the highest.
    most = top * (1 + min(high - 1, 6) / 36)
    return jnp.minimum(jnp.maximum(by_largest, by_rms), 0.8 * most), most


def _search(
    sums: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    stats: BlockStats,
    low: int,
    high: int,
) -> jax.Array:
    """The scale of least error, from sums of r^2 and r l for inverse scales (last axis)."""

    def consider(starts: jax.Array, found: _Found, favour: jax.Array | float = 0.0) -> _Found:
        squares, products = sums(1 / starts)
        energy = stats.energy[..., None] / jnp.square(starts)
        code_energy = energy - 2 * products - squares
        # Below that the difference is rounding; such a candidate clips nearly everything.
        is_known = code_energy > 1e-3 * energy
        change = jnp.where(is_known, products / jnp.where(is_known, code_energy, 1), 0)
        errors = jnp.maximum(squares - change * products, 0) * jnp.square(starts) - favour
        return _better_of(found, errors, starts, starts * (1 + change))

    def around(start: jax.Array, width: jax.Array, places: np.ndarray) -> jax.Array:
        last = places.astype(np.float32).reshape((1,) * width.ndim + (-1,))
        return start[..., None] * jnp.exp(width[..., None] * last)

    nonzero = jnp.where(stats.largest > 0, stats.largest, 1)
    stats = stats._replace(largest=nonzero)
    least, most = _bracket(stats, low, high)
    top = nonzero / high
    inf = jnp.where(top > 0, jnp.inf, top)
    found = _Found(inf, top, top, inf, top)

    signs = (1, -1) if low < -high else (1,)
    num_coarse = _LANES * _COARSE_PASSES[high] // len(signs)
    places = np.linspace(0, 1, num_coarse)
    span = jnp.log(least / most)
    coarse = around(most, span, places)
    if high > 7:
        # Weights piled on a bound make a dip where the bound is on a level or half way, so
        # that it is looked for there, as near as the spacing of the candidates allows.
        levels = nonzero[..., None] / coarse
        spacing = (levels[..., -1:] - levels[..., :1]) / (num_coarse - 1)
        unit = jnp.exp2(jnp.clip(jnp.floor(jnp.log2(1.5 * spacing)), -4, 0))
        coarse = nonzero[..., None] / (unit * jnp.round(levels / unit))
    coarse = jnp.concatenate([sign * coarse for sign in signs], axis=-1)
    passes = jnp.moveaxis(coarse.reshape(*top.shape, _COARSE_PASSES[high], _LANES), -2, 0)
    if len(passes) == 1:
        found = consider(passes[0], found)
    else:
        found, _ = lax.scan(lambda found, starts: (consider(starts, found), None), found, passes)

    width = span / (num_coarse - 1)
    four = _between_neighbours(4)
    both = [around(start, width, four) for start in (found.start, found.second_start)]
    found = consider(jnp.concatenate(both, axis=-1), found)
    for _ in range(1 if high <= 31 else 2):
        width = width * 2 / 5
        # The scale of max_abs is among them, so that the result is never worse. A tie is its,
        # since it is exact for weights on the grid.
        last = [around(found.start, width, _between_neighbours(7)), top[..., None]]
        is_top = np.reshape(np.arange(_LANES) == _LANES - 1, (1,) * top.ndim + (-1,))
        favour = 1e-12 * stats.energy[..., None] * is_top.astype(np.float32)
        found = consider(jnp.concatenate(last, axis=-1), found, favour)
    return jnp.where(stats.energy > 0, found.scale, 0)


def _between_neighbours(count: int) -> np.ndarray:
    """Places in (-1, 1), evenly spaced, none at 0: there the error is known."""
    places = (np.arange(count) - (count - 1) / 2) * 2 / (count + 1)
    return np.where(places == 0, 0.25 / (count + 1), places)


def _better_of(found: _Found, errors: jax.Array, starts: jax.Array, scales: jax.Array) -> _Found:
    error, start, scale, second_error, second_start = found
    for k in range(errors.shape[-1]):
        e, s = errors[..., k], starts[..., k]
        is_first, is_second = e < error, e < second_error
        second_error = jnp.where(is_first, error, jnp.where(is_second, e, second_error))
        second_start = jnp.where(is_first, start, jnp.where(is_second, s, second_start))
        error, start = jnp.where(is_first, e, error), jnp.where(is_first, s, start)
        scale = jnp.where(is_first, scales[..., k], scale)
    return _Found(error, start, scale, second_error, second_start)
