"""The scale of a low-bit grid that has the least squared error: a search in one pass or a few.

The error has many local minima. A first pass over a geometric bracket finds the neighborhoods of
the best few candidates, and a second one searches between the neighbors of each. Short blocks need
none with ternary codes, narrow grids of up to 4 bits and the full one of 4. If the grid has one
more level on one side, the largest weights get it; where that may be wrong, with few bits or in
long blocks, both signs of the scale are tried.

The ends of the levels may be traced, so that one compiled search serves all widths.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core.compiling import WideJit
from jaxclip._core.grids import LevelRange
from jaxclip.thresholds.search.candidates import (
    BATCH,
    BlockStats,
    Candidates,
    Evaluate,
    along_last,
    geometric,
    in_lanes,
    is_hard,
    lowest,
    places_between_neighbors,
    search_arrays,
    search_blocks,
    with_last,
)


@functools.partial(WideJit, static_argnums=(1, 3))
def best_scale(
    blocks: jax.Array,
    axes: tuple[int, ...],
    counts: jax.Array,
    levels: LevelRange,
    importance: jax.Array | None = None,
) -> jax.Array:
    """Returns the scale of least squared error for each block, dims kept; 0 for zeros."""
    # It is negative where the level `low < -high` helps on the positive side, and NaN for NaN.
    length = math.prod(blocks.shape[a] for a in axes)
    is_weighted = importance is not None
    is_refined = is_weighted | is_hard(length) | needs_refining(levels)
    search = functools.partial(search_scale, levels, is_refined, is_weighted)
    scale, factor = search_blocks(blocks, axes, counts, search, importance)
    return scale / factor


def best_common_scale(arrays: Sequence[jax.Array], levels: LevelRange) -> jax.Array:
    """Returns the scale of least squared error for all entries of some arrays together."""
    is_refined = is_hard(sum(x.size for x in arrays)) | needs_refining(levels)
    search = functools.partial(search_scale, levels, is_refined, False)
    scale, factor = search_arrays(arrays, search)
    return scale / factor


def needs_refining(levels: LevelRange) -> jax.Array | np.bool_ | bool:
    """Returns True for grids for which one pass is not enough, whatever the blocks."""
    low, high, _ = levels
    return (high != 7) & ((high > 7) | (low != -high))


def search_scale(
    levels: LevelRange,
    is_refined: ArrayLike,
    is_weighted: bool,
    evaluate: Evaluate,
    stats: BlockStats,
) -> jax.Array:
    """Searches for the scale of least error, in one pass or in two that refine it."""
    stats = stats._replace(largest=jnp.where(stats.largest > 0, stats.largest, 1))
    high = jnp.asarray(levels.high, jnp.float32)
    levels = levels._replace(low=jnp.asarray(levels.low, jnp.float32), high=high)
    starts, width = _refined_starts(levels, is_weighted, stats)
    starts = jnp.where(is_refined, starts, _only_starts(levels, stats))
    num_passes = 1 + jnp.asarray(is_refined).astype(jnp.int32)

    # A loop, so that what all passes have in common is compiled once.
    def one_pass(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        error, best, starts = state
        errors, scales = evaluate(Candidates(starts, levels))
        found = lowest(errors, (scales, starts), 4)
        is_better = (found[0][0] < error) | (i == 0)
        error, best = (
            jnp.where(is_better, new, old)
            for new, old in zip(found[0][:2], (error, best), strict=True)
        )
        centers = [start for _, _, start in found]
        starts = jnp.where(high >= 8, _around(centers, width), _around(centers[:2], width))
        # The scale of max_abs is among the last, so that the result is never worse.
        return error, best, with_last(starts, stats.largest / high)

    unknown = jnp.full_like(stats.energy, jnp.inf)
    _, best, _ = lax.fori_loop(0, num_passes, one_pass, (unknown, unknown, starts))
    # 0 for blocks of zeros; NaN, which bounds nothing, for blocks with a NaN.
    return jnp.where(stats.energy > 0, best, 0 * stats.energy)


def _only_starts(levels: LevelRange, stats: BlockStats) -> jax.Array:
    """Returns the scales to try if there is one pass."""
    low, high = (jnp.asarray(end) for end in levels[:2])
    places = np.append(np.linspace(0, 1, BATCH - 1), 0)
    starts, _ = _coarse(stats, levels, high, False, places, BATCH - 2)
    # Weights piled on a bound may sit on the level below the highest.
    starts = with_last(starts, stats.largest / jnp.maximum(high - 1, 1))
    return starts * jnp.where(low < -high, _sign(stats, high), 1)[..., None]


def _refined_starts(
    levels: LevelRange, is_weighted: bool, stats: BlockStats
) -> tuple[jax.Array, jax.Array]:
    """Returns the scales to try in the first of two passes, and the logarithm of their ratio."""
    low, high = (jnp.asarray(end) for end in levels[:2])
    is_full, num_levels = low < -high, jnp.maximum(high, -low)
    half = BATCH // 2
    has_both_signs = is_full & (high < 8)
    places = jnp.where(
        has_both_signs, np.tile(np.linspace(0, 1, half), 2), np.linspace(0, 1, BATCH)
    )
    num_spaces = jnp.where(has_both_signs, half - 1, BATCH - 1)
    least_levels = jnp.where(
        high > 3, num_levels + 1 - 1.3 * jnp.sqrt(num_levels), jnp.maximum(high - 1, 1)
    )
    starts, width = _coarse(stats, levels, least_levels, is_weighted, places, num_spaces)
    one_sign = jnp.where(is_full, _sign(stats, high), 1)[..., None]
    both_signs = along_last(starts, np.repeat([1, -1], half))
    return starts * jnp.where(has_both_signs, both_signs, one_sign), width


def _sign(stats: BlockStats, high: jax.Array) -> jax.Array:
    """Returns the sign of a scale that gives the largest weights the level `low < -high`."""
    # With many levels only the largest weight of all is on the last one.
    difference = stats.highest + stats.lowest
    is_known = (high >= 8) & (difference != 0)
    return jnp.where(jnp.where(is_known, difference > 0, stats.lean > 0), -1, 1)


def _around(centers: list[jax.Array], width: jax.Array) -> jax.Array:
    """Returns scales between the neighbors of some scales, along a last axis."""
    places = np.tile(places_between_neighbors(BATCH // len(centers)), len(centers))
    return in_lanes(centers) * geometric(width, places)


def _coarse(
    stats: BlockStats,
    levels: LevelRange,
    least_levels: jax.Array,
    is_weighted: bool,
    places: np.ndarray | jax.Array,
    num_spaces: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Returns scales at places in the whole bracket, and the logarithm of the ratio of two."""
    low, high = (jnp.asarray(end) for end in levels[:2])
    # The bracket holds for every distribution. A threshold above the largest weight only wastes
    # levels, and one below the root mean square costs about as much as the weights are worth.
    most = stats.largest / least_levels
    least = jnp.sqrt(stats.energy / stats.num_entries) / (high + 0.5)
    if not is_weighted:  # the largest weight may be one of little importance
        # The scale of least error if clipping costs that of the largest weight alone and rounding
        # s^2 / 12 for each, less one level, because the error has dips.
        num_levels = jnp.maximum(high, -low)
        clipped = 1 + stats.num_entries / (12 * jnp.square(num_levels))
        least = jnp.maximum(least, stats.largest / ((num_levels + 1) * clipped))
    least = jnp.minimum(least, 0.9 * most)
    span, num_spaces = jnp.log(least / most), jnp.asarray(num_spaces).astype(jnp.float32)
    starts = most[..., None] * geometric(span, places)
    # Weights piled on a bound make a minimum where the bound is on a level or halfway to one.
    # So many levels are near enough that the candidates move there.
    spacing = (stats.largest / least - least_levels)[..., None] / num_spaces
    rounded_to = jnp.exp2(jnp.clip(jnp.floor(jnp.log2(1.5 * spacing)), -4, 0))
    on_levels = rounded_to * jnp.round(stats.largest[..., None] / starts / rounded_to)
    starts = jnp.where(high >= 8, stats.largest[..., None] / on_levels, starts)
    return starts, span / num_spaces
