"""The scale and zero point of a low-bit grid that have the least squared error.

The grid is `w' = s * (l - z)` with codes l from `low` to `high` and z one of them, so that 0
stays on it. For a given z the refined scales of `jaxclip.block_sums` serve as they do for
grids around 0; only which codes there are on either side differs.

Candidates come from the grid over the whole range, from the least weight to the greatest: a
better one must not spend more on clipping the outermost weight of either side than that one
does on rounding. This bounds z, and for each z the scale. A coarse search over both is
followed by passes around the best two, over the neighbours of the best z, and around the
best of all.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip.thresholds.search.candidates import (
    BATCH,
    BlockStats,
    Candidates,
    Evaluate,
    Found,
    better_of,
    between_neighbours,
    search_blocks,
)

_MOST_ZEROS = 16
"""Zero points of the coarse search, each with a pass of its own."""


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def best_scale_and_zero(
    blocks: jax.Array, axes: tuple[int, ...], counts: jax.Array, low: int, high: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and the zero point of least squared error for each block.

    Searches `min over s, z of sum (w - s * (clip(round(w / s) + z, low, high) - z))**2`. The
    error is never above that of the grid over the whole range of the weights and 0, up to
    rounding.

    Args:
      blocks: Real floating array, split as `Grid.split` does.
      axes: Axes that a block spans.
      counts: Entries of each block without padding; broadcasts against the results.
      low: Lowest code.
      high: Highest code.

    Returns:
      `(scale, zero)`, float32, dims kept. The scale is positive, 0 for blocks of zeros; the
      zero point is an integer in [low, high], for blocks of zeros the one nearest to 0.

    Example:
      >>> scale, zero = best_scale_and_zero(jnp.array([[0.0, 1.5, 3.0, 4.5]]), (1,), 4, 0, 3)
      >>> float(scale[0, 0]), float(zero[0, 0])
      (1.5, 0.0)
    """
    search = functools.partial(_search, low, high)
    (scale, zero), factor = search_blocks(blocks, axes, counts, search)
    return scale / factor, zero


def _whole_range(stats: BlockStats, low: int, high: int) -> tuple[jax.Array, jax.Array]:
    """Scale and zero point of the grid from the least weight to the greatest."""
    scale = (stats.highest - stats.lowest) / (high - low)
    scale = jnp.where(scale > 0, scale, 1)
    return scale, jnp.clip(low + jnp.round(-stats.lowest / scale), low, high)


def _allowed_error(stats: BlockStats, scale: jax.Array) -> jax.Array:
    """What rounding at this scale costs if residuals are uniform, and a margin."""
    rounding = 1.15 / 12 * stats.num_entries * jnp.square(scale)
    return jnp.minimum(rounding, 0.6 * stats.energy)


def _coarse(stats: BlockStats, low: int, high: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales to begin with, their zero points, and the steps between scales.

    The last axis has the scales of one zero point, the one before it the zero points.
    """
    full, _ = _whole_range(stats, low, high)
    clipped = jnp.sqrt(_allowed_error(stats, full))
    highest, lowest = stats.highest[..., None], stats.lowest[..., None]
    above = jnp.maximum(highest - clipped[..., None], 0)
    below = jnp.maximum(-lowest - clipped[..., None], 0)
    # A scale a quarter above that of the whole range costs more in rounding than that one does.
    widest = 1.25 * full[..., None]
    least_zero, most_zero = low + jnp.floor(below / widest), high - jnp.floor(above / widest)
    zeros = jnp.round(
        least_zero + (most_zero - least_zero) * _last(full.ndim, min(high - low + 1, _MOST_ZEROS))
    )

    up, down = high - zeros, zeros - low

    def scale_to_reach(up_to: jax.Array, down_to: jax.Array) -> jax.Array:
        return jnp.maximum(
            jnp.where(up > 0, up_to / jnp.maximum(up, 1), 0),
            jnp.where(down > 0, down_to / jnp.maximum(down, 1), 0),
        )

    most = 1.05 * scale_to_reach(highest, -lowest)
    most = jnp.where(most > 0, most, full[..., None])
    by_rms = jnp.sqrt(stats.energy / stats.num_entries)[..., None] / (jnp.maximum(up, down) + 0.5)
    least = jnp.maximum(scale_to_reach(above, below), by_rms)
    least = jnp.minimum(least, 0.8 * most)
    span = jnp.where(least > 0, jnp.log(jnp.where(least > 0, least, 1) / most), -1)[..., None]
    scales = most[..., None] * jnp.exp(span * _last(full.ndim + 1, BATCH))
    zeros, steps = jnp.broadcast_arrays(zeros[..., None], span / (BATCH - 1), scales)[:2]
    return scales, zeros, steps


def _last(ndim: int, count: int) -> np.ndarray:
    """Places from 0 to 1 along a last axis that follows `ndim` others."""
    return np.linspace(0, 1, count, dtype=np.float32).reshape((1,) * ndim + (-1,))


def _search(
    low: int, high: int, evaluate: Evaluate, stats: BlockStats
) -> tuple[jax.Array, jax.Array]:
    """The scale and zero point of least error, from the errors of candidates."""

    def consider(
        places: Sequence[jax.Array], found: Found, favour: jax.Array | float = 0.0
    ) -> Found:
        starts, zeros, steps = places
        errors, scales = evaluate(Candidates(starts, low - zeros, high - zeros))
        return better_of(found, errors - favour, (starts, zeros, steps, scales))

    def around(
        place: tuple[jax.Array, ...], count: int, width: float, shift: float = 0.0
    ) -> list[jax.Array]:
        """Candidates of one zero point, between the neighbours of a candidate at this width."""
        start, zero, step = (v[..., None] for v in place[:3])
        places = between_neighbours(count).astype(np.float32)
        places = width * places.reshape((1,) * (start.ndim - 1) + (-1,))
        starts = start * jnp.exp(step * places)
        zero = jnp.clip(zero + shift, low, high)
        return [starts, *(jnp.broadcast_to(v, starts.shape) for v in (zero, step))]

    def together(*parts: list[jax.Array]) -> list[jax.Array]:
        return [jnp.concatenate(values, axis=-1) for values in zip(*parts, strict=True)]

    full, zero = _whole_range(stats, low, high)
    inf = jnp.where(full > 0, jnp.inf, full)
    found = Found(inf, (full, zero, 0 * full, full), inf, (full, zero, 0 * full))
    coarse = [jnp.moveaxis(v, -2, 0) for v in _coarse(stats, low, high)]
    found, _ = lax.scan(lambda found, part: (consider(part, found), None), found, coarse)

    found = consider(together(around(found.best, 4, 1.0), around(found.second, 4, 1.0)), found)
    shift = 2.0 ** (high - low).bit_length() / 16
    while shift >= 1:
        sides = around(found.best, 4, 1.5, shift), around(found.best, 4, 1.5, -shift)
        found = consider(together(*sides), found)
        shift /= 2
    # The grid over the whole range is among the last, so that the result is never worse. A tie
    # is its, since it is exact for weights on the grid.
    last = together(around(found.best, 7, 0.4), [full[..., None], zero[..., None], inf[..., None]])
    is_full = np.reshape(np.arange(BATCH) == BATCH - 1, (1,) * full.ndim + (-1,))
    favour = 1e-12 * stats.energy[..., None] * is_full.astype(np.float32)
    found = consider(last, found, favour)
    nearest = jnp.full_like(zero, min(max(0, low), high))
    is_zero = stats.energy <= 0
    return jnp.where(is_zero, 0, found.best[3]), jnp.where(is_zero, nearest, found.best[1])
