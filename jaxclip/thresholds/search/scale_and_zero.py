"""The scale and zero point of a low-bit grid that have the least squared error.

The grid is `w' = s * (l - z)` with codes l from `low` to `high`. z is a code, so 0 stays on the
grid. A zero point follows from the scale: the middle of the grid is where the middle of the clipped
weights is. A first pass tries both zero points next to that for some scales, and a second one
searches around the best few. In long blocks, where either side may be clipped more than the other,
there are two first passes, and then some more around the best zero point.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
    search_blocks,
    with_last,
)


@functools.partial(WideJit, static_argnums=(1, 3))
def best_scale_and_zero(
    blocks: jax.Array, axes: tuple[int, ...], counts: jax.Array, levels: LevelRange
) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and the zero point of least squared error for each block, dims kept."""
    # For blocks of zeros the scale is 0, and the zero point the code nearest to 0.
    length = math.prod(blocks.shape[a] for a in axes)
    search = functools.partial(search_scale_and_zero, levels, is_hard(length))
    (scale, zero), factor = search_blocks(blocks, axes, counts, search)
    return scale / factor, zero


def search_scale_and_zero(
    levels: LevelRange, is_hard: bool, evaluate: Evaluate, stats: BlockStats
) -> tuple[jax.Array, jax.Array]:
    """Searches for the scale and zero point of least error."""
    low, high = (jnp.asarray(end, jnp.float32) for end in levels[:2])
    levels = levels._replace(low=low, high=high)

    def evaluate_at(starts: jax.Array, zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = levels._replace(low=low - zeros, high=high - zeros)
        return evaluate(Candidates(starts, moved))

    full, zero_of_full = _whole_range(stats, levels)
    starts, width = _coarse(stats, levels)
    middles = [_middle(stats, starts, levels)]
    if is_hard:
        middles.append(_middle_of_longer_side(stats, starts, levels))
    is_second = along_last(starts, np.arange(BATCH) >= BATCH // 2)  # of the zero points beside one
    zeros = [jnp.clip(jnp.floor(middle) + is_second, low, high) for middle in middles]
    passes = [evaluate_at(starts, some) for some in zeros]
    errors, scales = (jnp.concatenate(part, axis=-1) for part in zip(*passes, strict=True))
    values = scales, jnp.concatenate(zeros, axis=-1), jnp.tile(starts, len(zeros))
    centers = lowest(errors, values, 4)
    error, scale, zero, _ = centers[0]

    # A loop, so that what all passes have in common is compiled once.
    def one_pass(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        error, scale, zero, starts, zeros = state
        # The grid over the whole range is among the last, so that the result is never worse. It
        # wins a tie, because it is exact for weights on the grid.
        starts, zeros = with_last(starts, full), with_last(zeros, zero_of_full)
        errors, scales = evaluate_at(starts, zeros)
        errors = with_last(errors, errors[..., -1] - 1e-12 * stats.energy)
        least, new_scale, new_zero = lowest(errors, (scales, zeros))[0]
        is_better = least < error
        scale, zero = jnp.where(is_better, new_scale, scale), jnp.where(is_better, new_zero, zero)
        error = jnp.minimum(least, error)
        # Both neighbors of the best zero point, and twice as near at itself.
        zeros = jnp.clip(in_lanes([zero - 1, zero, zero, zero + 1]), low, high)
        return error, scale, zero, scale[..., None] * geometric(width, nearer), zeros

    own, other = places_between_neighbors(8) / 2, places_between_neighbors(4) * 1.5
    nearer = np.concatenate([other, own, other])
    starts = in_lanes([start for *_, start in centers])
    starts = starts * geometric(width, np.tile(places_between_neighbors(4), 4))
    zeros = in_lanes([zero for _, _, zero, _ in centers])
    first = error, scale, zero, starts, zeros
    _, scale, zero, *_ = lax.fori_loop(0, 3 if is_hard else 1, one_pass, first)
    # A scale of NaN, which bounds nothing, for blocks with a NaN.
    nearest = jnp.full_like(zero, jnp.clip(0, low, high))
    has_error = stats.energy > 0
    return jnp.where(has_error, scale, 0 * stats.energy), jnp.where(has_error, zero, nearest)


def _whole_range(stats: BlockStats, levels: LevelRange) -> tuple[jax.Array, jax.Array]:
    """Returns scale and zero point of the grid from the least weight to the greatest."""
    low, high, _ = levels
    scale = (stats.highest - stats.lowest) / (high - low)
    scale = jnp.where(scale > 0, scale, 1)
    return scale, jnp.clip(low + jnp.round(-stats.lowest / scale), low, high)


def _coarse(stats: BlockStats, levels: LevelRange) -> tuple[jax.Array, jax.Array]:
    """Returns scales over a whole bracket, twice, and the logarithm of the ratio of two."""
    full, _ = _whole_range(stats, levels)
    num_levels = levels.high - levels.low
    most = full * (num_levels / (num_levels + 1 - 1.2 * jnp.sqrt(num_levels)))
    # The scale of least error if clipping costs that of one weight on each side and rounding
    # s^2 / 12 for each, less one level, because the error has dips. A clip below the root mean
    # square costs about as much as the weights are worth.
    clipped = 1 + stats.num_entries / (6 * jnp.square(num_levels))
    by_rms = jnp.sqrt(stats.energy / stats.num_entries) / (num_levels + 0.5)
    least = jnp.maximum(full * (1 - 1 / num_levels) / clipped, by_rms)
    span, places = jnp.log(jnp.minimum(least, 0.9 * most) / most), np.linspace(0, 1, BATCH // 2)
    starts = most[..., None] * geometric(span, np.tile(places, 2))
    return starts, span / (BATCH // 2 - 1)


def _middle(stats: BlockStats, starts: jax.Array, levels: LevelRange) -> jax.Array:
    """Returns zero points, not whole, of grids that clip both sides by the same amount."""
    middle = (levels.low + levels.high) / 2
    return middle - ((stats.highest + stats.lowest) / 2)[..., None] / starts


def _middle_of_longer_side(stats: BlockStats, starts: jax.Array, levels: LevelRange) -> jax.Array:
    """Returns zero points, not whole, of grids that clip the longer side to the other one first."""
    highest, below = stats.highest[..., None], -stats.lowest[..., None]
    reach = (levels.high - levels.low) * starts
    longer, shorter = jnp.maximum(highest, below), jnp.minimum(highest, below)
    kept = jnp.minimum(jnp.maximum(reach - shorter, reach / 2), longer)
    return levels.high - jnp.where(highest >= below, kept, reach - kept) / starts
