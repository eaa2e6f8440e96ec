"""One pass over blocks of weights for some candidate grids: the errors that a search needs.

For the codes l of a scale s, with residuals r = w / s - l, the best scale is `s + s * R / B` and
its error `s^2 (sum r^2 - R^2 / B)`, where R = sum r l and B = sum l^2. So a pass that sums r^2
and r l gives each candidate the error of its refined scale; the least over all s is the optimum.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import floats
from jaxclip._core.grids import LevelRange
from jaxclip._core.trees import PyTree

BATCH = 16  # candidates of a pass: one vector register of float32, or two
_SHORT = range(16, 129)  # entries of a block that needs the fewest passes
_PIECE = 64  # entries that one unrolled loop body sums
_SLAB = 2**18  # entries that are read at a time, and whose blocks go through all passes together


class BlockStats(NamedTuple):
    """Statistics of each block before a search; arrays of one shape."""

    factor: jax.Array  # a power of two; the search runs on weights times this, of a size near 1
    largest: jax.Array  # magnitude, times the factor
    lowest: jax.Array  # of the weights and 0, times the factor
    highest: jax.Array  # of the weights and 0, times the factor
    energy: jax.Array  # sum of squares, times the factor squared
    lean: jax.Array  # sum of an odd power, positive if large weights are mostly positive
    num_entries: jax.Array  # without padding


class Candidates(NamedTuple):
    """Grids to try on each block, along the last axis."""

    scale: jax.Array
    levels: LevelRange  # counted from 0; its ends are numbers, or arrays like the scale

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Candidates":
        """Returns these candidates with `function` applied to every array."""
        low, high, has_zero = self.levels
        low, high = (function(jnp.asarray(v)) if np.ndim(v) else v for v in (low, high))
        return Candidates(function(self.scale), LevelRange(low, high, has_zero))


# From candidates to the errors of their refined scales, and those scales.
Evaluate = Callable[[Candidates], tuple[jax.Array, jax.Array]]
# To a tree of arrays with one value for each block.
Search = Callable[[Evaluate, BlockStats], PyTree]
_Part = tuple[jax.Array, jax.Array | None]  # an array, and the importance of its entries


def search_blocks(
    blocks: jax.Array,
    axes: tuple[int, ...],
    counts: jax.Array,
    search: Search,
    importance: jax.Array | None = None,
) -> tuple[PyTree, jax.Array]:
    """Runs a search over all blocks, in bounded memory, and returns its results and factors."""
    # Scales in the results are those of the weights times a factor, a power of two for each block.
    x = _at_most_32_bits(blocks)
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    counts = jnp.broadcast_to(jnp.asarray(counts, jnp.float32), shape)
    v = importance
    if v is not None:  # weights without importance count as 0
        x, counts = jnp.where(v > 0, x, 0), jnp.sum(v, axis=axes, keepdims=True)
    if x.size == 0 or floats.is_sharded(x):
        stats = _stats_of([(x, v)], axes, counts)
        evaluate = functools.partial(_evaluate_whole, [(x, v)], axes, stats)
        return search(evaluate, stats), stats.factor
    x, v = _in_three_axes(x, axes), None if v is None else _in_three_axes(v, axes)
    results = _search_in_chunks(x, v, counts.reshape(x.shape[0], -1), search)
    return jax.tree.map(lambda v: v.reshape(shape), results)


def search_arrays(arrays: Sequence[jax.Array], search: Search) -> tuple[PyTree, jax.Array]:
    """Runs a search over all entries of some arrays, as if they were one block."""
    parts: list[_Part] = [(_at_most_32_bits(x), None) for x in arrays]
    count = max(sum(x.size for x in arrays), 1)
    stats = _stats_of(parts, None, jnp.asarray(count, jnp.float32))
    return search(functools.partial(_evaluate_whole, parts, None, stats), stats), stats.factor


def _at_most_32_bits(x: jax.Array) -> jax.Array:
    return x if x.dtype.itemsize < 4 else x.astype(jnp.float32)


def _stats_of(
    parts: Sequence[_Part], axes: tuple[int, ...] | None, counts: jax.Array
) -> BlockStats:
    """Returns statistics of blocks along `axes`; None for one block of all parts together."""
    arrays = [x.astype(jnp.float32) for x, _ in parts]
    highest = _reduced(jnp.max, arrays, axes, jnp.maximum)
    lowest = _reduced(jnp.min, arrays, axes, jnp.minimum)
    largest = jnp.maximum(highest, -lowest)
    factor = floats.inverse_size(largest)
    scaled = [x * factor for x in arrays]
    squares = [_times(jnp.square(x), v) for x, (_, v) in zip(scaled, parts, strict=True)]
    powers = [_times(odd_power(x), v) for x, (_, v) in zip(scaled, parts, strict=True)]
    energy, lean = _added(squares, axes), _added(powers, axes)
    stats = BlockStats(
        factor, largest * factor, lowest * factor, highest * factor, energy, lean, lean
    )
    return jax.tree.map(lambda s: jnp.reshape(s, counts.shape), stats._replace(num_entries=counts))


def odd_power(x: jax.Array) -> jax.Array:
    """Returns a power whose sum has the sign of the outermost few."""
    return x * lax.integer_pow(x, 32)


def _reduced(
    reduce: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    axes: tuple[int, ...] | None,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Returns a reduction of all arrays and 0 along `axes`, dims kept; for None one number."""
    parts = [reduce(x, axis=axes, keepdims=axes is not None, initial=0) for x in arrays]
    return functools.reduce(combine, parts)


def _times(x: jax.Array, v: jax.Array | None) -> jax.Array:
    return x if v is None else x * v


def _added(arrays: Sequence[jax.Array], axes: tuple[int, ...] | None) -> jax.Array:
    """Returns the sum of all arrays along `axes`, dims kept; for None one number."""
    return _reduced(jnp.sum, arrays, axes, operator.add)


def _in_three_axes(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns `x` as (blocks, entries, blocks), without the last axis if its length is 1."""
    # A trailing axis of length 1 would make XLA copy the whole array on CPU.
    first, last = min(axes, default=x.ndim), max(axes, default=x.ndim - 1)
    if len(axes) != last - first + 1:
        x = jnp.moveaxis(x, axes, tuple(range(-len(axes), 0)))
        first, last = x.ndim - len(axes), x.ndim - 1
    parts = x.shape[:first], x.shape[first : last + 1], x.shape[last + 1 :]
    rows, length, columns = (int(np.prod(part)) for part in parts)
    return x.reshape((rows, length, columns) if columns > 1 else (rows, length))


# --- Errors of candidates -------------------------------------------------------------


def _codes(unit: jax.Array, candidates: Candidates) -> jax.Array:
    low, high, has_zero = candidates.levels
    return jnp.clip(jnp.round(unit) if has_zero else jnp.floor(unit) + 0.5, low, high)


def _evaluate_whole(
    parts: Sequence[_Part],
    axes: tuple[int, ...] | None,
    stats: BlockStats,
    candidates: Candidates,
) -> tuple[jax.Array, jax.Array]:
    """Returns errors and refined scales by plain reductions, which run on sharded arrays."""

    def sums(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = candidates.map(lambda v: lax.dynamic_index_in_dim(v, i, -1, keepdims=False))
        squares, products = [], []
        for x, v in parts:
            unit = x.astype(jnp.float32) * stats.factor / one.scale
            code = _codes(unit, one)
            residual = unit - code
            counted = _times(residual, v)
            squares.append(counted * residual)
            products.append(counted * code)
        return _added(squares, axes), _added(products, axes)

    squares, products = lax.map(sums, jnp.arange(candidates.scale.shape[-1], dtype=jnp.int32))
    squares, products = (jnp.moveaxis(v, 0, -1) for v in (squares, products))
    num_slots = sum(math.prod(x.shape[a] for a in axes or range(x.ndim)) for x, _ in parts)
    is_weighted = any(v is not None for _, v in parts)
    return refined((squares, products), stats, candidates, None if is_weighted else num_slots)


def sums_of_pieces(y: jax.Array, v: jax.Array | None, candidates: Candidates) -> jax.Array:
    """Sums r^2 and r l over axis 1 of (pieces, entries[, c]) to (pieces, c, candidates)."""
    # Unrolled, with candidates last and both sums in one complex number, this compiles on CPU to
    # one vectorized loop that reads each weight once. A reduction would not be vectorized, and
    # two sums would not share a loop. Additions in two chains do not wait for each other.
    inverse, totals = 1 / candidates.scale, [jnp.zeros((), jnp.complex64)] * 2
    lane = (*inverse.shape[:2], 1)
    for j in range(y.shape[1]):
        unit = y[:, j].reshape(lane) * inverse
        code = _codes(unit, candidates)
        residual = unit - code
        counted = residual if v is None else residual * v[:, j].reshape(lane)
        totals[j % 2] += lax.complex(counted * residual, counted * code)
    return totals[0] + totals[1]


def _search_in_chunks(
    x: jax.Array, v: jax.Array | None, counts: jax.Array, search: Search
) -> PyTree:
    """Runs the search over (blocks, entries, blocks), a chunk of blocks at a time."""
    (rows, length), columns = x.shape[:2], counts.shape[1]
    chunk = min(rows, max(_SLAB // (length * columns), 1))

    def search_chunk(start: jax.Array) -> PyTree:
        some = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk)
        y, w = some(x), None if v is None else some(v)
        stats = _stats_of([(y, w)], (1,), some(counts))
        evaluate = _evaluate_at_once if length * columns <= _SLAB else _evaluate_in_slabs
        return search(functools.partial(evaluate, y, w, stats), stats), stats.factor

    if chunk == rows:
        return search_chunk(jnp.zeros((), jnp.int32))

    def body(i: jax.Array, results: PyTree) -> PyTree:
        start = jnp.minimum(i * chunk, rows - chunk)
        return jax.tree.map(
            lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, 0),
            results,
            search_chunk(start),
        )

    structure = jax.tree.structure(jax.eval_shape(search_chunk, jnp.zeros((), jnp.int32)))
    empty = jax.tree.unflatten(structure, [0 * counts] * structure.num_leaves)
    return lax.fori_loop(0, -(-rows // chunk), body, empty)


def _piece(length: int) -> int:
    """Returns the entries of a piece: pieces of one length leave little padding."""
    return -(-length // -(-length // _PIECE))


def _evaluate_at_once(
    x: jax.Array, v: jax.Array | None, stats: BlockStats, candidates: Candidates
) -> tuple[jax.Array, jax.Array]:
    """Returns errors and refined scales for some blocks that are in cache together."""
    chunk, length = x.shape[:2]
    piece = _piece(length)
    pieces = -(-length // piece)

    def in_pieces(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0), (0, pieces * piece - length), (0, 0)][: x.ndim])
        return a.reshape(chunk * pieces, piece, *x.shape[2:])

    y = in_pieces(x.astype(jnp.float32) * stats.factor.reshape(chunk, 1, *x.shape[2:]))
    v = None if v is None else in_pieces(v)
    num_slots = pieces * piece if v is None else None

    def in_lanes() -> jax.Array:
        sums = sums_of_pieces(y, v, candidates.map(lambda c: jnp.repeat(c, pieces, axis=0)))
        if pieces > 1:
            return sums
        sums = jnp.real(sums), jnp.imag(sums)
        return lax.complex(*refined(sums, stats, candidates, num_slots))

    # A conditional, because XLA would fuse the loop into its consumer, where it is not vectorized.
    zero = 0 * stats.factor[0, 0]
    nothing = jnp.broadcast_to(
        lax.complex(zero, zero), (chunk * pieces, *candidates.scale.shape[1:])
    )
    both = lax.cond(jnp.any(stats.energy > 0), in_lanes, lambda: nothing)
    if pieces > 1:
        both = both.reshape(chunk, pieces, *both.shape[1:])
        sums = jnp.sum(jnp.real(both), axis=1), jnp.sum(jnp.imag(both), axis=1)
        return refined(sums, stats, candidates, num_slots)
    return jnp.real(both), jnp.imag(both)


def _evaluate_in_slabs(
    x: jax.Array, v: jax.Array | None, stats: BlockStats, candidates: Candidates
) -> tuple[jax.Array, jax.Array]:
    """Returns errors and refined scales for a row of long blocks, a slab of entries at a time."""
    length, columns = x.shape[1], stats.factor.shape[1]
    piece = min(length, _PIECE)
    pieces = max(min(_SLAB // columns, length) // piece, 1)
    step = piece * pieces
    lanes = candidates.scale.shape[-1]
    wide = candidates.map(lambda c: jnp.broadcast_to(c, (pieces, columns, lanes)))

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        first = jnp.minimum(i * step, length - step)

        def slab(a: jax.Array, factor: ArrayLike = 1.0) -> jax.Array:
            part = lax.dynamic_slice_in_dim(a[0], first, step).reshape(step, columns)
            part = part.astype(jnp.float32) * factor
            if length % step:  # the last slab begins in the one before
                part = jnp.where((jnp.arange(step) + first >= i * step)[:, None], part, 0)
            return part.reshape(pieces, piece, columns)

        y = slab(x, stats.factor)
        return total + sums_of_pieces(y, None if v is None else slab(v), wide)

    zero = 0 * stats.factor[0, 0]
    zeros = jnp.broadcast_to(lax.complex(zero, zero), (pieces, columns, lanes))
    num_slabs = -(-length // step)
    total = jnp.sum(lax.fori_loop(0, num_slabs, body, zeros), axis=0, keepdims=True)
    num_slots = num_slabs * step if v is None else None
    return refined((jnp.real(total), jnp.imag(total)), stats, candidates, num_slots)


# --- Choosing between candidates ------------------------------------------------------


def refined(
    sums: tuple[jax.Array, jax.Array],
    stats: BlockStats,
    candidates: Candidates,
    num_slots: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the errors of the refined scales and those scales, from the sums of r^2 and r l.

    `num_slots` is the number of entries that were summed, with padding; None if padding counts 0.
    """
    # Where r is small compared with w / s, these sums do not cancel. Those of the closed form
    # A^2 / B would at 8 bits.
    (squares, products), starts = sums, candidates.scale
    if num_slots is not None and not candidates.levels.has_zero:
        # Zeros of padding are half a level away from the nearest.
        num_padded = jnp.asarray(num_slots).astype(jnp.float32) - stats.num_entries
        quarters = 0.25 * num_padded[..., None]
        squares, products = squares - quarters, products + quarters
    energy = stats.energy[..., None] / jnp.square(starts)
    code_energy = energy - 2 * products - squares
    # Below 0.1 the difference loses digits; such a candidate clips nearly everything.
    is_known = code_energy > 0.1 * energy
    change = jnp.where(is_known, products / jnp.where(is_known, code_energy, 1), 0)
    errors = jnp.maximum(squares - change * products, 0) * jnp.square(starts)
    return errors, starts * (1 + change)


def places_between_neighbors(count: int) -> np.ndarray:
    """Returns evenly spaced places in (-1, 1), but none at 0, where the error is known."""
    places = (np.arange(count) - (count - 1) / 2) * 2 / (count + 1)
    return np.where(places == 0, 0.25 / (count + 1), places)


def is_hard(length: int) -> bool:
    """Returns True for blocks that need more passes: long ones, and those of a few entries."""
    # Those of a few entries have the deepest dips. In long ones more of the tails is clipped, so
    # the scales to try are far apart.
    return length not in _SHORT


def lowest(
    errors: jax.Array, values: tuple[jax.Array, ...], count: int = 1
) -> list[tuple[jax.Array, ...]]:
    """Returns errors and values of the best few candidates; of equal errors only the first."""
    # Lane by lane, because XLA on CPU does not vectorize short reductions; and best after best,
    # because it would compute a sorted list many times over, and compile it as slowly.
    nothing = jnp.full_like(errors[..., 0], jnp.inf), *(v[..., 0] for v in values)
    best: list[tuple[jax.Array, ...]] = []
    for _ in range(count):
        found = nothing
        for lane in range(errors.shape[-1]):
            new = (errors[..., lane], *(v[..., lane] for v in values))
            is_less = new[0] < found[0]
            if best:
                is_less &= new[0] > best[-1][0]
            found = tuple(jnp.where(is_less, a, b) for a, b in zip(new, found, strict=True))
        best.append(found)
    return best


def in_lanes(values: Sequence[jax.Array]) -> jax.Array:
    """Returns candidates along a last axis: as many of each value, in turn."""
    # Selected, because XLA on CPU would not vectorize a concatenation.
    lanes = values[-1][..., None]
    for i in reversed(range(len(values) - 1)):
        is_before = along_last(lanes, np.arange(BATCH)) < (i + 1) * BATCH // len(values)
        lanes = jnp.where(is_before, values[i][..., None], lanes)
    return lanes


def with_last(candidates: jax.Array, value: jax.Array) -> jax.Array:
    """Returns the candidates with the last one replaced."""
    is_last = along_last(candidates, np.arange(BATCH)) == BATCH - 1
    return jnp.where(is_last, value[..., None], candidates)


def along_last(like: jax.Array, values: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Returns numbers along the last axis of an array."""
    return values.astype(np.float32).reshape((1,) * (like.ndim - 1) + (-1,))


def geometric(log_ratio: jax.Array, places: np.ndarray | jax.Array) -> jax.Array:
    """Returns nearly `exp(log_ratio * place)` along a last axis, exact at places 0 and 1."""
    # As a power, because XLA on CPU would not vectorize so many exponentials.
    less = jnp.expm1(log_ratio / 64)[..., None]
    return lax.integer_pow(1 + less * along_last(less, places), 64)
