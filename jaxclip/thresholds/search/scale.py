"""The scale of a low-bit grid that has the least squared error: a search in a few passes.

The error has many local minima. A pass over a geometric bracket finds the neighborhoods of the
best two candidates. A second pass searches both, and a third searches around the best of all. A
finer grid has narrower minima and needs more candidates. If the grid has one more level on one
side, both signs of the scale are tried.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip.thresholds.search.candidates import (
    BATCH,
    BestCandidates,
    BlockStats,
    Candidates,
    Evaluate,
    keep_better,
    places_between_neighbors,
    search_arrays,
    search_blocks,
)

# Passes over the whole bracket, for one sign of the scale, by highest code.
_COARSE_PASSES = {1: 1, 3: 1, 7: 1, 15: 1, 31: 2, 127: 6}
SHORT = 256  # entries up to which a block is short: its level `low` may move the optimum far


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def best_scale(
    blocks: jax.Array,
    axes: tuple[int, ...],
    counts: jax.Array,
    low: int,
    high: int,
    importance: jax.Array | None = None,
) -> jax.Array:
    """Returns the scale of least squared error for each block, dims kept; 0 for zeros."""
    # It is negative where the level `low < -high` helps on the positive side, and NaN for NaN.
    is_long = math.prod(blocks.shape[a] for a in axes) > SHORT
    search = functools.partial(search_scale, low, high, is_long, importance is not None)
    scale, factor = search_blocks(blocks, axes, counts, search, importance)
    return scale / factor


def best_common_scale(arrays: Sequence[jax.Array], low: int, high: int) -> jax.Array:
    """Returns the scale of least squared error for all entries of some arrays together."""
    is_long = sum(x.size for x in arrays) > SHORT
    scale, factor = search_arrays(
        arrays, functools.partial(search_scale, low, high, is_long, False)
    )
    return scale / factor


def _bracket(
    stats: BlockStats, low: int, high: int, is_weighted: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest scale that a search tries."""
    # The bracket holds for every distribution. A threshold above the largest weight only wastes
    # levels, and one below the root mean square costs about as much as the weights are worth. Nor
    # may the largest weight alone cost more than all rounding inside the threshold.
    top = stats.largest / high
    # The error of rounding at the scale of max_abs if residuals are uniform, with a margin.
    rounding = jnp.minimum(1.15 / 12 * stats.num_entries * jnp.square(top), 0.6 * stats.energy)
    by_largest = (stats.largest - jnp.sqrt(rounding)) / max(high, -low)
    by_rms = jnp.sqrt(stats.energy / stats.num_entries) / (high + 0.5)
    # Weights piled on a bound may sit on the level below the highest.
    most = top * (1 + min(high - 1, 6) / 36)
    # The largest weight may be one of little importance.
    least = by_rms if is_weighted else jnp.maximum(by_largest, by_rms)
    return jnp.minimum(least, 0.8 * most), most


def search_scale(
    low: int, high: int, is_long: bool, is_weighted: bool, evaluate: Evaluate, stats: BlockStats
) -> jax.Array:
    """Searches for the scale of least error."""

    def consider(starts: jax.Array, so_far: BestCandidates, lowest: int = low) -> BestCandidates:
        errors, scales = evaluate(Candidates(starts, lowest, high))
        return keep_better(so_far, errors, (starts, scales))

    stats = stats._replace(largest=jnp.where(stats.largest > 0, stats.largest, 1))
    top = stats.largest / high
    inf = jnp.where(top > 0, jnp.inf, top)
    so_far = BestCandidates(inf, (top, top), inf, (top,))

    # One more level changes little in a long block with many levels, so there the level `low` and
    # the other sign are first tried in the second pass.
    both_signs = (1, -1) if low < -high else (1,)
    is_late = len(both_signs) == 2 and is_long and high > 3
    signs = (1,) if is_late else both_signs
    lowest = -high if is_late else low
    num_passes = _COARSE_PASSES[high] * (len(signs) if high > 7 else 1)
    coarse, width = _coarse(stats, low, high, is_weighted, num_passes * BATCH // len(signs))
    starts = jnp.concatenate([sign * coarse for sign in signs], axis=-1)
    passes = jnp.moveaxis(starts.reshape(*top.shape, num_passes, BATCH), -2, 0)
    if num_passes == 1:
        so_far = consider(passes[0], so_far, lowest)
    else:
        so_far, _ = lax.scan(lambda so_far, s: (consider(s, so_far, lowest), None), so_far, passes)

    centers = [so_far.best[0], so_far.second[0]]
    if is_late:
        # With the level `low` the best scale is a little less.
        less = np.sqrt(high / (high + 1), dtype=np.float32)
        starts = [less * c for c in (centers if high > 7 else centers[:1])]
        starts = [sign * _around(start, width, 4) for start in starts for sign in both_signs]
    else:
        starts = [_around(center, width, 4) for center in centers]
    so_far = consider(jnp.concatenate(starts, axis=-1), so_far)
    for _ in range(1 if high <= 31 else 2):
        width = width * 2 / 5
        # The scale of max_abs is among the last, so that the result is never worse.
        last = [_around(so_far.best[0], width, 7), top[..., None]]
        so_far = consider(jnp.concatenate(last, axis=-1), so_far)
    # 0 for blocks of zeros; NaN, which bounds nothing, for blocks with a NaN.
    return jnp.where(stats.energy > 0, so_far.best[1], 0 * stats.energy)


def _around(center: jax.Array, width: jax.Array, count: int) -> jax.Array:
    """Returns scales between the neighbors of a scale, along a last axis."""
    places = places_between_neighbors(count).astype(np.float32)
    places = places.reshape((1,) * width.ndim + (-1,))
    return center[..., None] * jnp.exp(width[..., None] * places)


def _coarse(
    stats: BlockStats, low: int, high: int, is_weighted: bool, count: int
) -> tuple[jax.Array, jax.Array]:
    """Returns scales over the whole bracket, on a last axis, and the logarithm of their ratio."""
    least, most = _bracket(stats, low, high, is_weighted)
    span = jnp.log(least / most)
    places = np.linspace(0, 1, count, dtype=np.float32).reshape((1,) * span.ndim + (-1,))
    coarse = most[..., None] * jnp.exp(span[..., None] * places)
    if high > 7:
        # Weights piled on a bound make a minimum where the bound is on a level or halfway to one.
        # So the candidates move there, as near as their spacing allows.
        levels = stats.largest[..., None] / coarse
        spacing = (levels[..., -1:] - levels[..., :1]) / (count - 1)
        rounded_to = jnp.exp2(jnp.clip(jnp.floor(jnp.log2(1.5 * spacing)), -4, 0))
        coarse = stats.largest[..., None] / (rounded_to * jnp.round(levels / rounded_to))
    return coarse, span / (count - 1)
