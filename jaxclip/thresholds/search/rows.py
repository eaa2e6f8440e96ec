"""A search over rows of weights that are cut into pieces of one length.

Arrays of every shape become such pieces, zero-padded, so that one compiled program serves them
all. A row is `row_pieces` consecutive pieces; that number may be traced.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxclip._core import floats
from jaxclip._core.trees import PyTree
from jaxclip.thresholds.search.candidates import (
    BlockStats,
    Candidates,
    Search,
    odd_power,
    refined,
    sums_of_pieces,
)


class Rows(NamedTuple):
    """Weights in pieces, of which some or one make a row.

    Attributes:
      pieces: (pieces, entries) float32, zero-padded.
      counts: (pieces,) float32, the entries of each row without padding; 1 or more.
      row_pieces: Pieces of a row, a scalar int32; None if each piece is a row.
    """

    pieces: jax.Array
    counts: jax.Array
    row_pieces: jax.Array | None

    def row_of_piece(self) -> jax.Array:
        """Returns the row of each piece, int32."""
        position = jnp.arange(self.pieces.shape[0], dtype=jnp.int32)
        return position if self.row_pieces is None else position // self.row_pieces

    def is_first(self) -> jax.Array:
        """Returns True for the first piece of each row."""
        position = jnp.arange(self.pieces.shape[0], dtype=jnp.int32)
        return position % (1 if self.row_pieces is None else self.row_pieces) == 0

    def spread(self, per_row: jax.Array) -> jax.Array:
        """Returns one value for each piece."""
        return per_row if self.row_pieces is None else per_row[self.row_of_piece()]

    def total(self, per_piece: jax.Array) -> jax.Array:
        """Returns the sum over the pieces of each row; 0 behind the last row."""
        return self._combined(per_piece, jax.ops.segment_sum)

    def largest(self, per_piece: jax.Array) -> jax.Array:
        """Returns the maximum over the pieces of each row; -inf behind the last row."""
        return self._combined(per_piece, jax.ops.segment_max)

    def _combined(self, per_piece: jax.Array, combine: Callable) -> jax.Array:
        if self.row_pieces is None:
            return per_piece
        rows = self.row_of_piece()
        return combine(per_piece, rows, self.pieces.shape[0], indices_are_sorted=True)


def sum_entries(x: jax.Array) -> jax.Array:
    """Returns the sums over axis 1 of (pieces, entries)."""
    # As a sum of slices, which XLA on CPU vectorizes, unlike a sum along the last axis.
    lanes = 8
    while x.shape[1] > lanes and x.shape[1] % lanes == 0:
        slices = [x[:, i : i + lanes] for i in range(0, x.shape[1], lanes)]
        x = functools.reduce(operator.add, slices)
    return jnp.sum(x, axis=1)


def scaled(rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the largest magnitudes, pieces of a size near 1, factors, and sums of squares."""
    largest = jnp.maximum(rows.largest(jnp.max(jnp.abs(rows.pieces), axis=1)), 0)
    factor = floats.inverse_size(largest)
    y = rows.pieces * rows.spread(factor)[:, None]
    return largest, y, factor, rows.total(sum_entries(jnp.square(y)))


def search_rows(rows: Rows, search: Search) -> tuple[PyTree, jax.Array]:
    """Runs a search over all rows; returns its results, and the factors of their scales."""
    x = rows.pieces
    largest, y, factor, energy = scaled(rows)
    highest = jnp.maximum(rows.largest(jnp.max(x, axis=1)), 0)
    lowest = -jnp.maximum(rows.largest(jnp.max(-x, axis=1)), 0)
    lean = rows.total(sum_entries(odd_power(y)))
    stats = BlockStats(
        factor, largest * factor, lowest * factor, highest * factor, energy, lean, rows.counts
    )
    stats = jax.tree.map(lambda per_row: per_row[:, None], stats)  # as searches of blocks have it
    results = search(functools.partial(_evaluate, rows, y, stats), stats)
    return jax.tree.map(lambda per_row: per_row[:, 0], results), factor


def _evaluate(
    rows: Rows, y: jax.Array, stats: BlockStats, candidates: Candidates
) -> tuple[jax.Array, jax.Array]:
    """Returns errors and refined scales of the candidates of each row."""
    num_slots = y.shape[1] * (1 if rows.row_pieces is None else rows.row_pieces)

    def in_lanes() -> jax.Array:
        sums = sums_of_pieces(y, None, candidates.map(rows.spread))
        if rows.row_pieces is not None:
            return sums
        sums = jnp.real(sums), jnp.imag(sums)
        return lax.complex(*refined(sums, stats, candidates, num_slots))

    # A conditional, because XLA would fuse the loop into its consumer, where it is not vectorized.
    zero = 0 * stats.factor[0, 0]
    nothing = jnp.broadcast_to(lax.complex(zero, zero), candidates.scale.shape)
    both = lax.cond(jnp.any(stats.energy > 0), in_lanes, lambda: nothing)
    if rows.row_pieces is None:
        return jnp.real(both), jnp.imag(both)
    sums = rows.total(jnp.real(both)), rows.total(jnp.imag(both))
    return refined(sums, stats, candidates, num_slots)
