"""The scale of a low-bit grid that has the least squared error: a search in a few passes.

A pass, as `jaxclip.block_sums` runs it, gives some candidates each the error of its refined
scale; the least of these over all scales is the optimum.

The error has many dips. A pass over a geometric bracket finds the neighbourhoods of the best
two candidates, a second looks into both, a third around the best of all; a finer grid has
narrower dips and takes more candidates. Where the grid has a level more on one side, both
signs of the scale are tried: at once in short blocks, in long ones after the first pass, which
goes without that level. The bracket's ends hold for every distribution: a
threshold above the largest weight only wastes levels, one below the root mean square costs
about as much as the weights are worth, and the largest weight alone must not cost more than
all that rounding inside the threshold does.
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
    BlockStats,
    Candidates,
    Evaluate,
    Found,
    better_of,
    between_neighbours,
    search_arrays,
    search_blocks,
)

_COARSE_PASSES = {1: 1, 3: 1, 7: 1, 15: 1, 31: 2, 127: 6}
"""Passes over the whole bracket, for one sign of the scale, by highest code."""
_SHORT = 256
"""Entries up to which a block is short: its level `low` may move the optimum far."""


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def best_scale(
    blocks: jax.Array,
    axes: tuple[int, ...],
    counts: jax.Array,
    low: int,
    high: int,
    importance: jax.Array | None = None,
) -> jax.Array:
    """Returns the scale of least squared error for each block.

    Args:
      blocks: Real floating array, split as `Grid.split` does.
      axes: Axes that a block spans.
      counts: Entries of each block without padding; broadcasts against the result.
      low: Lowest code, `-high` or `-high - 1`.
      high: Highest code.
      importance: Factors in [0, 1] of the squared errors, of the shape of `blocks`; None for
        ones.

    Returns:
      float32, dims kept. Negative where the level `low` helps on the positive side, which
      only happens if `low < -high`; 0 for blocks of zeros, NaN for those with a NaN.

    Example:
      >>> best_scale(jnp.array([[0.5, -2.0, 1.0]]), (1,), 3, -4, 3)
      Array([[0.5]], dtype=float32)
    """
    is_long = math.prod(blocks.shape[a] for a in axes) > _SHORT
    search = functools.partial(_search, low, high, is_long, importance is not None)
    scale, factor = search_blocks(blocks, axes, counts, search, importance)
    return scale / factor


def best_common_scale(arrays: Sequence[jax.Array], low: int, high: int) -> jax.Array:
    """Returns the scale of least squared error for all entries of some arrays together.

    Args:
      arrays: Real floating arrays, one or more.
      low: As in `best_scale`.
      high: As in `best_scale`.

    Returns:
      float32 scalar, as `best_scale` has it for one block.

    Example:
      >>> best_common_scale([jnp.array([0.5, -2.0]), jnp.array([[1.0]])], -4, 3)
      Array(0.5, dtype=float32)
    """
    is_long = sum(x.size for x in arrays) > _SHORT
    scale, factor = search_arrays(arrays, functools.partial(_search, low, high, is_long, False))
    return scale / factor


def _bracket(
    stats: BlockStats, low: int, high: int, is_weighted: bool
) -> tuple[jax.Array, jax.Array]:
    """The least and the largest scale that a search looks at."""
    top = stats.largest / high
    # What rounding at the scale of max_abs costs if residuals are uniform, and a margin.
    rounding = jnp.minimum(1.15 / 12 * stats.num_entries * jnp.square(top), 0.6 * stats.energy)
    by_largest = (stats.largest - jnp.sqrt(rounding)) / max(high, -low)
    by_rms = jnp.sqrt(stats.energy / stats.num_entries) / (high + 0.5)
    # Weights piled on a bound may sit on the level below the highest.
    most = top * (1 + min(high - 1, 6) / 36)
    # The largest weight may be one of little importance.
    least = by_rms if is_weighted else jnp.maximum(by_largest, by_rms)
    return jnp.minimum(least, 0.8 * most), most


def _search(
    low: int, high: int, is_long: bool, is_weighted: bool, evaluate: Evaluate, stats: BlockStats
) -> jax.Array:
    """The scale of least error, from those of candidates."""

    def consider(starts: jax.Array, found: Found, lowest: int = low) -> Found:
        errors, scales = evaluate(Candidates(starts, lowest, high))
        return better_of(found, errors, (starts, scales))

    def around(start: jax.Array, width: jax.Array, places: np.ndarray) -> jax.Array:
        last = places.astype(np.float32).reshape((1,) * width.ndim + (-1,))
        return start[..., None] * jnp.exp(width[..., None] * last)

    nonzero = jnp.where(stats.largest > 0, stats.largest, 1)
    stats = stats._replace(largest=nonzero)
    top = nonzero / high
    inf = jnp.where(top > 0, jnp.inf, top)
    found = Found(inf, (top, top), inf, (top,))

    # One level more changes little in a long block with many levels: it waits for the second pass.
    both_signs = (1, -1) if low < -high else (1,)
    is_late = len(both_signs) == 2 and is_long and high > 3
    signs, lowest = ((1,), -high) if is_late else (both_signs, low)
    num_passes = _COARSE_PASSES[high] * (1 if is_late else len(signs) if high > 7 else 1)
    coarse, width = _coarse(stats, low, high, is_weighted, num_passes * BATCH // len(signs))
    starts = jnp.concatenate([sign * coarse for sign in signs], axis=-1)
    passes = jnp.moveaxis(starts.reshape(*top.shape, num_passes, BATCH), -2, 0)
    if num_passes == 1:
        found = consider(passes[0], found, lowest)
    else:
        found, _ = lax.scan(lambda found, s: (consider(s, found, lowest), None), found, passes)

    four = between_neighbours(4)
    if is_late:
        # With that level the best scale is a little less.
        centres = found.best[:1] + (found.second[:1] if high > 7 else ())
        less = np.sqrt(high / (high + 1), dtype=np.float32)
        starts = [sign * around(less * c, width, four) for c in centres for sign in both_signs]
    else:
        starts = [around(start, width, four) for start in (found.best[0], found.second[0])]
    found = consider(jnp.concatenate(starts, axis=-1), found)
    for _ in range(1 if high <= 31 else 2):
        width = width * 2 / 5
        # The scale of max_abs is among them, so that the result is never worse.
        last = [around(found.best[0], width, between_neighbours(7)), top[..., None]]
        found = consider(jnp.concatenate(last, axis=-1), found)
    # 0 for zeros, and NaN, which bounds nothing, where there is one.
    return jnp.where(stats.energy > 0, found.best[1], 0 * stats.energy)


def _coarse(
    stats: BlockStats, low: int, high: int, is_weighted: bool, count: int
) -> tuple[jax.Array, jax.Array]:
    """Scales over the whole bracket, along a last axis, and the logarithm of their ratio."""
    least, most = _bracket(stats, low, high, is_weighted)
    span = jnp.log(least / most)
    places = np.linspace(0, 1, count, dtype=np.float32).reshape((1,) * span.ndim + (-1,))
    coarse = most[..., None] * jnp.exp(span[..., None] * places)
    if high > 7:
        # Weights piled on a bound make a dip where the bound is on a level or half way, so
        # that it is looked for there, as near as the spacing of the candidates allows.
        levels = stats.largest[..., None] / coarse
        spacing = (levels[..., -1:] - levels[..., :1]) / (count - 1)
        unit = jnp.exp2(jnp.clip(jnp.floor(jnp.log2(1.5 * spacing)), -4, 0))
        coarse = stats.largest[..., None] / (unit * jnp.round(levels / unit))
    return coarse, span / (count - 1)
