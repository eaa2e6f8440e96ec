"""The scale of a low-bit grid that has the least squared error: a search in one pass or a few.

The error has many local minima. A first pass over a geometric bracket finds the neighborhoods of
the best few candidates, and a second one searches between the neighbors of each. At 4 bits, short
blocks need no second pass. If the grid has one more level on one side, the largest weights get it;
where that may be wrong, with few bits or in long blocks, both signs of the scale are tried.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._core.compiling import WideJit
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


@functools.partial(WideJit, static_argnums=(1, 3, 4))
def best_scale(
    blocks: jax.Array,
    axes: tuple[int, ...],
    counts: jax.Array,
    low: float,
    high: float,
    importance: jax.Array | None = None,
) -> jax.Array:
    """Returns the scale of least squared error for each block, dims kept; 0 for zeros."""
    # It is negative where the level `low < -high` helps on the positive side, and NaN for NaN.
    length = math.prod(blocks.shape[a] for a in axes)
    is_refined = importance is not None or is_hard(length) or not may_be_one_pass(low, high)
    search = functools.partial(search_scale, low, high, is_refined, importance is not None)
    scale, factor = search_blocks(blocks, axes, counts, search, importance)
    return scale / factor


def best_common_scale(arrays: Sequence[jax.Array], low: float, high: float) -> jax.Array:
    """Returns the scale of least squared error for all entries of some arrays together."""
    length = sum(x.size for x in arrays)
    is_refined = is_hard(length) or not may_be_one_pass(low, high)
    search = functools.partial(search_scale, low, high, is_refined, False)
    scale, factor = search_arrays(arrays, search)
    return scale / factor


def may_be_one_pass(low: float, high: float) -> bool:
    """Returns True for grids for which one pass is enough, but in blocks that are hard."""
    return high == 7 or (high < 8 and low == -high)


def search_scale(
    low: float,
    high: float,
    is_refined: bool | jax.Array,
    is_weighted: bool,
    evaluate: Evaluate,
    stats: BlockStats,
) -> jax.Array:
    """Searches for the scale of least error, in one pass or in two that refine it."""
    stats = stats._replace(largest=jnp.where(stats.largest > 0, stats.largest, 1))
    num_passes, num_centers = 2, 4 if high >= 8 else 2
    starts, width = _refined_starts(low, high, is_weighted, stats)
    if is_refined is not True:
        once = _only_starts(low, high, stats)
        starts = once if is_refined is False else jnp.where(is_refined, starts, once)
        num_passes = 1 + jnp.asarray(is_refined).astype(jnp.int32)

    # A loop, so that what all passes have in common is compiled once.
    def one_pass(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        error, best, starts = state
        errors, scales = evaluate(Candidates(starts, low, high))
        found = lowest(errors, (scales, starts), num_centers)
        is_better = (found[0][0] < error) | (i == 0)
        error, best = (
            jnp.where(is_better, new, old)
            for new, old in zip(found[0][:2], (error, best), strict=True)
        )
        starts = _around([start for _, _, start in found], width)
        # The scale of max_abs is among the last, so that the result is never worse.
        return error, best, with_last(starts, stats.largest / high)

    unknown = jnp.full_like(stats.energy, jnp.inf)
    _, best, _ = lax.fori_loop(0, num_passes, one_pass, (unknown, unknown, starts))
    # 0 for blocks of zeros; NaN, which bounds nothing, for blocks with a NaN.
    return jnp.where(stats.energy > 0, best, 0 * stats.energy)


def _only_starts(low: float, high: float, stats: BlockStats) -> jax.Array:
    """Returns the scales to try if there is one pass."""
    places = np.append(np.linspace(0, 1, BATCH - 1), 0)
    starts, _ = _coarse(stats, low, high, high, False, places)
    # Weights piled on a bound may sit on the level below the highest.
    starts = with_last(starts, stats.largest / max(high - 1, 1))
    return starts * _sign(stats, high)[..., None] if low < -high else starts


def _refined_starts(
    low: float, high: float, is_weighted: bool, stats: BlockStats
) -> tuple[jax.Array, jax.Array]:
    """Returns the scales to try in the first of two passes, and the logarithm of their ratio."""
    is_full, num_levels = low < -high, max(high, -low)
    places = np.linspace(0, 1, BATCH)
    if is_full and high < 8:
        places = np.tile(np.linspace(0, 1, BATCH // 2), 2)
    least_levels = num_levels + 1 - 1.3 * num_levels**0.5 if high > 3 else max(high - 1, 1)
    starts, width = _coarse(stats, low, high, least_levels, is_weighted, places)
    if is_full and high < 8:
        starts = starts * along_last(starts, np.repeat([1, -1], BATCH // 2))
    elif is_full:
        starts = starts * _sign(stats, high)[..., None]
    return starts, width


def _sign(stats: BlockStats, high: float) -> jax.Array:
    """Returns the sign of a scale that gives the largest weights the level `low < -high`."""
    is_positive = stats.lean > 0
    if high >= 8:  # so many levels that only the largest of all is on the last one
        difference = stats.highest + stats.lowest
        is_positive = jnp.where(difference == 0, is_positive, difference > 0)
    return jnp.where(is_positive, -1, 1)


def _around(centers: list[jax.Array], width: jax.Array) -> jax.Array:
    """Returns scales between the neighbors of some scales, along a last axis."""
    places = np.tile(places_between_neighbors(BATCH // len(centers)), len(centers))
    return in_lanes(centers) * geometric(width, places)


def _coarse(
    stats: BlockStats,
    low: float,
    high: float,
    least_levels: float,
    is_weighted: bool,
    places: np.ndarray,
) -> tuple[jax.Array, jax.Array]:
    """Returns scales at places in the whole bracket, and the logarithm of the ratio of two."""
    # The bracket holds for every distribution. A threshold above the largest weight only wastes
    # levels, and one below the root mean square costs about as much as the weights are worth.
    most = stats.largest / least_levels
    least = jnp.sqrt(stats.energy / stats.num_entries) / (high + 0.5)
    if not is_weighted:  # the largest weight may be one of little importance
        # The scale of least error if clipping costs that of the largest weight alone and rounding
        # s^2 / 12 for each, less one level, because the error has dips.
        num_levels = max(high, -low)
        clipped = 1 + stats.num_entries / (12 * num_levels**2)
        least = jnp.maximum(least, stats.largest / ((num_levels + 1) * clipped))
    least = jnp.minimum(least, 0.9 * most)
    span, num_spaces = jnp.log(least / most), np.unique(places).size - 1
    starts = most[..., None] * geometric(span, places)
    if high >= 8:
        # Weights piled on a bound make a minimum where the bound is on a level or halfway to one.
        # So the candidates move there, as near as their spacing allows.
        spacing = (stats.largest / least - least_levels)[..., None] / num_spaces
        rounded_to = jnp.exp2(jnp.clip(jnp.floor(jnp.log2(1.5 * spacing)), -4, 0))
        levels = rounded_to * jnp.round(stats.largest[..., None] / starts / rounded_to)
        starts = stats.largest[..., None] / levels
    return starts, span / num_spaces
