"""One pass over blocks of weights for some candidate grids: the sums that a search needs.

For the codes l that a scale s gives, the best scale is `s + s * R / B` with the residuals
r = w / s - l, R = sum r l and B = sum l^2, and its error is `s^2 (sum r^2 - R^2 / B)`. So a
pass that sums r^2 and r l for some candidates gives each the error of its refined scale, and
the least of these over all scales is the optimum. Where r is small beside w / s these sums do
not cancel, as those of the closed form A^2 / B would at 8 bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip import _checks

__all__ = [
    "BATCH",
    "BlockStats",
    "Candidates",
    "Found",
    "Search",
    "Sums",
    "better_of",
    "between_neighbours",
    "refined",
    "search_blocks",
]

BATCH = 8
"""Candidates of a pass: one vector register of float32."""
_PIECE = 64
"""Entries that one unrolled loop body sums."""
_SLAB = 2**18
"""Entries that are read at a time, and whose blocks are worked on between the passes."""


class BlockStats(NamedTuple):
    """What a search knows about each block before it begins; arrays of one shape.

    Attributes:
      factor: A power of two; the search runs on weights times it, of a size near 1.
      largest: The largest magnitude, times `factor`.
      lowest: The least weight or 0, whichever is lower, times `factor`.
      highest: The greatest weight or 0, whichever is higher, times `factor`.
      energy: The sum of squares, times `factor**2`.
      num_entries: Number of entries, padding left out.
    """

    factor: jax.Array
    largest: jax.Array
    lowest: jax.Array
    highest: jax.Array
    energy: jax.Array
    num_entries: jax.Array


class Candidates(NamedTuple):
    """Grids to try on each block, along the last axis.

    Attributes:
      inverse: The inverse scales.
      low: Lowest code, counted from the code of 0: a number, or an array as `inverse`.
      high: Highest code, likewise.
    """

    inverse: jax.Array
    low: int | jax.Array
    high: int | jax.Array

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Candidates":
        """These candidates with `function` applied to what is an array."""
        low, high = (v if isinstance(v, int) else function(v) for v in (self.low, self.high))
        return Candidates(function(self.inverse), low, high)


Sums = Callable[[Candidates], tuple[jax.Array, jax.Array]]
Search = Callable[[Sums, BlockStats], Any]


def search_blocks(
    blocks: jax.Array, axes: tuple[int, ...], counts: jax.Array, search: Search
) -> tuple[Any, jax.Array]:
    """Runs a search over all blocks, in bounded memory; sharded arrays stay where they are.

    Args:
      blocks: Real floating array, split as `Granularity.split` does.
      axes: Axes that a block spans.
      counts: Entries of each block without padding; broadcasts against the result.
      search: From a function that sums r^2 and r l of each block for some `Candidates`, and
        the blocks' `BlockStats`, to a tree of arrays with one value a block.

    Returns:
      What `search` returned for all blocks, dims kept; scales in it are those of the weights
      times the second value, a power of two for each block.

    Example:
      >>> found, factor = search_blocks(
      ...     jnp.array([[0.5, -4.0]]), (1,), 2, lambda sums, stats: stats.largest
      ... )
      >>> found / factor
      Array([[4.]], dtype=float32)
    """
    x = blocks if blocks.dtype.itemsize < 4 else blocks.astype(jnp.float32)
    stats = _stats_of(x, axes, counts)
    if x.size == 0 or _checks.is_sharded(x):
        return search(functools.partial(_sums_of_whole, x, axes, stats.factor), stats), stats.factor
    blocked = _in_three_axes(x, axes)
    flat = BlockStats(*(s.reshape(blocked.shape[0], -1) for s in stats))
    found = _search_in_chunks(blocked, flat, search)
    shape = stats.factor.shape
    return jax.tree.map(lambda v: v.reshape(shape), found), stats.factor


def _stats_of(x: jax.Array, axes: tuple[int, ...], counts: jax.Array) -> BlockStats:
    largest, lowest, highest = (
        reduce(values, axis=axes, keepdims=True, initial=0).astype(jnp.float32)
        for reduce, values in ((jnp.max, jnp.abs(x)), (jnp.min, x), (jnp.max, x))
    )
    _, exponent = jnp.frexp(largest)
    factor = jnp.ldexp(jnp.ones_like(largest), -jnp.clip(exponent, -126, 126))
    energy = jnp.sum(jnp.square(x.astype(jnp.float32) * factor), axis=axes, keepdims=True)
    count = jnp.broadcast_to(jnp.asarray(counts, jnp.float32), largest.shape)
    return BlockStats(factor, largest * factor, lowest * factor, highest * factor, energy, count)


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


def _codes(unit: jax.Array, candidates: Candidates) -> jax.Array:
    return jnp.clip(jnp.round(unit), candidates.low, candidates.high)


def _sums_of_whole(
    x: jax.Array, axes: tuple[int, ...], factor: jax.Array, candidates: Candidates
) -> tuple[jax.Array, jax.Array]:
    """The two sums of each candidate by plain reductions, which run on sharded arrays."""

    def sums(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = candidates.map(lambda v: lax.dynamic_index_in_dim(v, i, -1, keepdims=False))
        unit = x.astype(jnp.float32) * factor * one.inverse
        code = _codes(unit, one)
        residual = unit - code
        squares = jnp.sum(residual * residual, axis=axes, keepdims=True)
        return squares, jnp.sum(residual * code, axis=axes, keepdims=True)

    squares, products = lax.map(sums, jnp.arange(candidates.inverse.shape[-1], dtype=jnp.int32))
    return jnp.moveaxis(squares, 0, -1), jnp.moveaxis(products, 0, -1)


def _sums_of_piece(y: jax.Array, candidates: Candidates) -> jax.Array:
    """Sums r^2 and r l over axis 2 of (b, r, piece, c), for each of (b, 1, c, candidates).

    Written out, with candidates last and both sums in one complex number, it compiles on CPU
    to one vectorized loop that reads each weight once; a reduction would not be vectorized,
    nor would two sums share a loop.
    """
    total = jnp.zeros((), jnp.complex64)
    for j in range(y.shape[2]):
        unit = y[:, :, j, :, None] * candidates.inverse
        code = _codes(unit, candidates)
        residual = unit - code
        total = total + lax.complex(residual * residual, residual * code)
    return total


def _search_in_chunks(x: jax.Array, stats: BlockStats, search: Search) -> Any:
    """The search over (blocks, entries, blocks), with bounded memory between the passes."""
    (rows, length), columns = x.shape[:2], stats.factor.shape[1]
    chunk = min(rows, max(_SLAB // (length * columns), 1))

    def search_chunk(start: jax.Array) -> Any:
        part = BlockStats(*(lax.dynamic_slice_in_dim(s, start, chunk) for s in stats))
        is_short = length <= _PIECE and chunk > 1
        sums = _sums_of_short if is_short else _sums_of_long
        return search(functools.partial(sums, x, start, part.factor), part)

    if chunk == rows:
        return search_chunk(jnp.zeros((), jnp.int32))

    def body(i: jax.Array, found: Any) -> Any:
        start = jnp.minimum(i * chunk, rows - chunk)
        return jax.tree.map(
            lambda all_of, part: lax.dynamic_update_slice_in_dim(all_of, part, start, 0),
            found,
            search_chunk(start),
        )

    structure = jax.tree.structure(jax.eval_shape(search_chunk, jnp.zeros((), jnp.int32)))
    empty = jax.tree.unflatten(structure, [0 * stats.factor] * structure.num_leaves)
    return lax.fori_loop(0, -(-rows // chunk), body, empty)


def _rows_of(x: jax.Array, start: Any, rows: int, first: Any, length: int) -> jax.Array:
    """Some rows and entries as float32, with the axis of columns that `x` may lack."""
    starts = tuple(jnp.asarray(i, jnp.int32) for i in (start, first, 0)[: x.ndim])
    y = lax.dynamic_slice(x, starts, (rows, length, *x.shape[2:])).astype(jnp.float32)
    return y if x.ndim == 3 else y[:, :, None]


# Both kinds of sums loop at least twice, if only over halves: a loop is what keeps the
# compiler from computing the sums again for each of their readers. A loop's start is made
# from data, since inside shard_map it must vary over the mesh as what is added does.


def _sums_of_short(
    x: jax.Array, start: jax.Array, factor: jax.Array, candidates: Candidates
) -> tuple[jax.Array, jax.Array]:
    """The two sums of each candidate, for some rows that are one piece long."""
    length = x.shape[1]
    chunk, columns, lanes = candidates.inverse.shape
    half = -(-chunk // 2)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        first = jnp.minimum(i * half, chunk - half)
        y = _rows_of(x, start + first, half, 0, length)
        y = y * lax.dynamic_slice_in_dim(factor, first, half)[:, None]
        part = candidates.map(lambda v: lax.dynamic_slice_in_dim(v, first, half)[:, None])
        sums = _sums_of_piece(y[:, None], part)
        return lax.dynamic_update_slice_in_dim(total, sums[:, 0], first, 0)

    zero = 0 * factor[0, 0]
    zeros = jnp.broadcast_to(lax.complex(zero, zero), (chunk, columns, lanes))
    total = lax.fori_loop(0, 2, body, zeros)
    return jnp.real(total), jnp.imag(total)


def _sums_of_long(
    x: jax.Array, start: jax.Array, factor: jax.Array, candidates: Candidates
) -> tuple[jax.Array, jax.Array]:
    """The two sums of each candidate, for some rows of any length, a slab at a time."""
    length = x.shape[1]
    chunk, columns, lanes = candidates.inverse.shape
    piece = max(min(-(-length // 2), _PIECE), 1)
    pieces = max(min(_SLAB // (chunk * piece * columns), length // piece // 2), 1)
    step = piece * pieces

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        first = jnp.minimum(i * step, length - step)
        y = _rows_of(x, start, chunk, first, step) * factor[:, None]
        if length % step:  # the last slab begins in the one before
            y = jnp.where((jnp.arange(step) + first >= i * step)[None, :, None], y, 0)
        y = y.reshape(chunk, pieces, piece, columns)
        return total + _sums_of_piece(y, candidates.map(lambda v: v[:, None]))

    zero = 0 * factor[0, 0]
    zeros = jnp.broadcast_to(lax.complex(zero, zero), (chunk, pieces, columns, lanes))
    total = lax.fori_loop(0, -(-length // step), body, zeros)
    return jnp.sum(jnp.real(total), axis=1), jnp.sum(jnp.imag(total), axis=1)


# --- Choosing between candidates ------------------------------------------------------


class Found(NamedTuple):
    """The best candidate so far and the second best, with their errors.

    Attributes:
      error: The least error.
      best: What belongs to it: a tuple of arrays of one value a block.
      second_error: The second least.
      second: What belongs to that: the first arrays of such a tuple, as many as are of use.
    """

    error: jax.Array
    best: tuple[jax.Array, ...]
    second_error: jax.Array
    second: tuple[jax.Array, ...]


def refined(
    sums: tuple[jax.Array, jax.Array], energy: jax.Array, starts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the error of each candidate's refined scale, and that scale.

    Args:
      sums: The sums of r^2 and of r l, for the scales `starts` along the last axis.
      energy: Sum of squared weights of each block.
      starts: The scales.

    Returns:
      Two arrays of the shape of `starts`.

    Example:
      >>> sums = jnp.array([0.25]), jnp.array([0.5])  # the weight 1.5 on the code 1
      >>> error, scale = refined(sums, jnp.array(2.25), jnp.array([1.0]))
      >>> float(error[0]), float(scale[0])
      (0.0, 1.5)
    """
    squares, products = sums
    energy = energy[..., None] / jnp.square(starts)
    code_energy = energy - 2 * products - squares
    # Below that the difference is rounding; such a candidate clips nearly everything.
    is_known = code_energy > 1e-3 * energy
    change = jnp.where(is_known, products / jnp.where(is_known, code_energy, 1), 0)
    errors = jnp.maximum(squares - change * products, 0) * jnp.square(starts)
    return errors, starts * (1 + change)


def between_neighbours(count: int) -> np.ndarray:
    """Returns places in (-1, 1), evenly spaced, none at 0: there the error is known.

    Args:
      count: How many.

    Returns:
      A float64 NumPy array.

    Example:
      >>> between_neighbours(4).round(1).tolist()
      [-0.6, -0.2, 0.2, 0.6]
    """
    places = (np.arange(count) - (count - 1) / 2) * 2 / (count + 1)
    return np.where(places == 0, 0.25 / (count + 1), places)


def better_of(found: Found, errors: jax.Array, candidates: tuple[jax.Array, ...]) -> Found:
    """Returns the best two of what was found and some candidates.

    Args:
      found: The best two so far.
      errors: Errors of the candidates, along the last axis.
      candidates: What belongs to them, arrays of the shape of `errors`.

    Returns:
      The best two of all; of equals the earlier.

    Example:
      >>> found = Found(jnp.array(3.0), (jnp.array(0.5),), jnp.array(4.0), (jnp.array(0.25),))
      >>> found = better_of(found, jnp.array([5.0, 2.0]), (jnp.array([1.0, 2.0]),))
      >>> float(found.best[0]), float(found.second[0])
      (2.0, 0.5)
    """
    error, best, second_error, second = found
    for k in range(errors.shape[-1]):
        e, values = errors[..., k], [c[..., k] for c in candidates]
        is_first, is_second = e < error, e < second_error
        second_error = jnp.where(is_first, error, jnp.where(is_second, e, second_error))
        second = tuple(
            jnp.where(is_first, old_best, jnp.where(is_second, new, old))
            for old, old_best, new in zip(second, best, values, strict=False)
        )
        error = jnp.where(is_first, e, error)
        best = tuple(jnp.where(is_first, new, old) for old, new in zip(best, values, strict=True))
    return Found(error, best, second_error, second)
