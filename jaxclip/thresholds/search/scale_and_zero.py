"""The scale and zero point of a low-bit grid that have the least squared error.

The grid is `w' = s * (l - z)` with codes l from `low` to `high`. z is a code, so 0 stays on the
grid. After a coarse search over z and s, passes search around the best two, over the neighbors of
the best z, and around the best of all.
"""

# The grid over the whole range of the weights bounds the search. In a better grid, clipping the
# outermost weight of either side must not cost more than rounding does in that one. This bounds
# z, and for each z the scale.

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip.thresholds.search.candidates import (
    BestCandidates,
    BlockStats,
    Candidates,
    Evaluate,
    keep_better,
    places_between_neighbors,
    search_blocks,
)

_MOST_ZEROS = 16  # zero points of the coarse search, each with a pass of its own
_LANES = 8  # candidates of a pass


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def best_scale_and_zero(
    blocks: jax.Array, axes: tuple[int, ...], counts: jax.Array, low: int, high: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and the zero point of least squared error for each block, dims kept."""
    # For blocks of zeros the scale is 0, and the zero point the code nearest to 0.
    search = functools.partial(search_scale_and_zero, low, high)
    (scale, zero), factor = search_blocks(blocks, axes, counts, search)
    return scale / factor, zero


def _whole_range(stats: BlockStats, low: int, high: int) -> tuple[jax.Array, jax.Array]:
    """Returns scale and zero point of the grid from the least weight to the greatest."""
    scale = (stats.highest - stats.lowest) / (high - low)
    scale = jnp.where(scale > 0, scale, 1)
    return scale, jnp.clip(low + jnp.round(-stats.lowest / scale), low, high)


def _allowed_error(stats: BlockStats, scale: jax.Array) -> jax.Array:
    """Returns the error of rounding at this scale if residuals are uniform, with a margin."""
    rounding = 1.15 / 12 * stats.num_entries * jnp.square(scale)
    return jnp.minimum(rounding, 0.6 * stats.energy)


def _coarse(stats: BlockStats, low: int, high: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns first scales, their zero points, and the logarithmic steps between scales."""
    # The last axis has the scales of one zero point, the one before it the zero points.
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
    scales = most[..., None] * jnp.exp(span * _last(full.ndim + 1, _LANES))
    zeros, steps = jnp.broadcast_arrays(zeros[..., None], span / (_LANES - 1), scales)[:2]
    return scales, zeros, steps


def _last(ndim: int, count: int) -> np.ndarray:
    """Returns places from 0 to 1 along a last axis that follows `ndim` others."""
    return np.linspace(0, 1, count, dtype=np.float32).reshape((1,) * ndim + (-1,))


def _joined(*parts: list[jax.Array]) -> list[jax.Array]:
    return [jnp.concatenate(values, axis=-1) for values in zip(*parts, strict=True)]


def search_scale_and_zero(
    low: int, high: int, evaluate: Evaluate, stats: BlockStats
) -> tuple[jax.Array, jax.Array]:
    """Searches for the scale and zero point of least error."""

    def consider(
        places: Sequence[jax.Array], so_far: BestCandidates, bonus: ArrayLike = 0.0
    ) -> BestCandidates:
        starts, zeros, steps = places
        errors, scales = evaluate(Candidates(starts, low - zeros, high - zeros))
        return keep_better(so_far, errors - bonus, (starts, zeros, steps, scales))

    def around(
        place: tuple[jax.Array, ...], count: int, width: float, shift: float = 0.0
    ) -> list[jax.Array]:
        """Returns candidates of one zero point, between the neighbors of a candidate."""
        start, zero, step = (v[..., None] for v in place[:3])
        places = places_between_neighbors(count).astype(np.float32)
        places = width * places.reshape((1,) * (start.ndim - 1) + (-1,))
        starts = start * jnp.exp(step * places)
        zero = jnp.clip(zero + shift, low, high)
        return [starts, *(jnp.broadcast_to(v, starts.shape) for v in (zero, step))]

    full, zero = _whole_range(stats, low, high)
    inf = jnp.where(full > 0, jnp.inf, full)
    so_far = BestCandidates(inf, (full, zero, 0 * full, full), inf, (full, zero, 0 * full))
    coarse = [jnp.moveaxis(v, -2, 0) for v in _coarse(stats, low, high)]
    so_far, _ = lax.scan(lambda so_far, part: (consider(part, so_far), None), so_far, coarse)

    so_far = consider(_joined(around(so_far.best, 4, 1.0), around(so_far.second, 4, 1.0)), so_far)
    shift = 2.0 ** (high - low).bit_length() / 16
    while shift >= 1:
        sides = around(so_far.best, 4, 1.5, shift), around(so_far.best, 4, 1.5, -shift)
        so_far = consider(_joined(*sides), so_far)
        shift /= 2
    # The grid over the whole range is among the last, so that the result is never worse. It wins
    # a tie, because it is exact for weights on the grid.
    last = _joined(around(so_far.best, 7, 0.4), [full[..., None], zero[..., None], inf[..., None]])
    is_full = np.reshape(np.arange(_LANES) == _LANES - 1, (1,) * full.ndim + (-1,))
    bonus = 1e-12 * stats.energy[..., None] * is_full.astype(np.float32)
    so_far = consider(last, so_far, bonus)
    nearest = jnp.full_like(zero, min(max(0, low), high))
    is_zero = stats.energy <= 0
    return jnp.where(is_zero, 0, so_far.best[3]), jnp.where(is_zero, nearest, so_far.best[1])
