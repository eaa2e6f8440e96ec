"""The two compiled programs of `encoding`: one finds scales, one rounds to codes.

A program is compiled for the shape of a part. Levels are numbers to it, so that it serves all
widths. `max_abs` needs the rounding alone.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core.compiling import WIDE_VECTORS, cpu_options
from jaxclip._core.floats import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    in_whole_bytes,
    inverse_size,
    quotient,
    saturate,
)
from jaxclip._core.grids import Grid, LevelRange
from jaxclip.lowbit.encoding.parts import PartShape
from jaxclip.lowbit.scale_formats import round_scale
from jaxclip.thresholds.search.candidates import BlockStats, Evaluate
from jaxclip.thresholds.search.rows import Rows, scaled, search_rows, sum_entries
from jaxclip.thresholds.search.scale import needs_refining, search_scale
from jaxclip.thresholds.search.scale_and_zero import search_scale_and_zero

# Scales are rounded to float32 or less; entries beyond a level by only that are not clipped.
_ROUNDING = np.float32(2**-20)

_Array: TypeAlias = Any  # of jax inside the program, of NumPy outside
Program: TypeAlias = Callable[..., Any]


class Search(NamedTuple):
    """All that a search for scales depends on."""

    shape: PartShape
    rule: Literal["scale", "scale_and_zero", "range", "mean"]
    has_zero: bool = True  # one of the levels is 0
    is_hard: bool = False  # of a scale and a zero; with a scale alone it is a number


class Rounding(NamedTuple):
    """All that the program for codes depends on: one serves every width and rule."""

    shape: PartShape
    scale_dtype: str
    dtype: str


class Numbers(NamedTuple):
    """Arguments of the program for codes that depend on the grid; scalars, float32 and bool."""

    low: _Array
    high: _Array
    inverse_high: _Array  # of thresholds; 1 where a scale is searched for
    largest: _Array  # of all scales, for log8
    is_searched: _Array
    is_signed: _Array
    is_odd: _Array


class Found(NamedTuple):
    """Result of a search for the row of each piece, and statistics that it needed."""

    size: _Array  # the threshold, or with a zero point the scale; without a sign
    zero: _Array
    norm: _Array  # sum of squares of the row, times the factor squared; 0 but at its first piece
    factor: _Array  # a power of two, near the inverse of the largest magnitude


class Statistics(NamedTuple):
    """One value for each piece, float32."""

    scale: _Array  # of its row
    error: _Array  # sum of squares, in squared units
    error_unit: _Array  # a power of two
    norm: _Array  # sum of squares, in squared units
    norm_unit: _Array  # a power of two
    num_clipped: _Array


def numbers_of(grid: Grid, is_searched: bool) -> Numbers:
    """Returns the numbers of a grid."""
    low, high = (np.float32(end) for end in grid.code_range)
    one = np.float32(1)
    return Numbers(
        low=low,
        high=high,
        inverse_high=one if grid.zero_point else one / high,
        largest=one,
        is_searched=np.bool_(is_searched),
        is_signed=np.bool_(low < -high and not grid.zero_point),
        is_odd=np.bool_(grid.is_odd),
    )


@functools.lru_cache(maxsize=64)
def compiled(plan: Search | Rounding) -> Program:
    """Returns the compiled program for parts of one shape."""
    # Compiled ahead, so that a caller's jit cannot take its calls into another program.
    num_slabs, num_pieces, piece, _ = plan.shape
    pieces = jax.ShapeDtypeStruct((num_slabs, num_pieces, piece), jnp.float32)
    per_piece = jax.ShapeDtypeStruct((num_slabs, num_pieces), jnp.float32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    part = pieces, per_piece, per_piece, count, count, jax.ShapeDtypeStruct((), bool)
    numbers = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), numbers_of(Grid(4), True))
    if isinstance(plan, Search):
        function, inputs = _search_part, (*part, numbers)
    else:
        function, inputs = _round_part, (*part, Found(*[per_piece] * len(Found._fields)), numbers)
    options = cpu_options(WIDE_VECTORS) or None
    program = jax.jit(functools.partial(function, plan), compiler_options=options)
    return program.lower(*inputs).compile()


# --- Inside the programs ----------------------------------------------------------------


def _search_part(plan: Search, *arguments: Any) -> Found:
    """Returns what a search finds for the rows of a part."""
    *arrays, row_pieces, num_used, is_hard, numbers = arguments
    ends = (numbers.low, numbers.high) if plan.has_zero else (numbers.low / 2, numbers.high / 2)
    levels = LevelRange(*ends, has_zero=plan.has_zero)

    def search_slab(x: jax.Array, counts: jax.Array, lengths: jax.Array) -> Found:
        del lengths
        rows = Rows(x, counts, None if plan.shape.is_row else row_pieces)
        found = jax.tree.map(rows.spread, _search_rows(plan, rows, levels, is_hard))
        return found._replace(norm=jnp.where(rows.is_first(), found.norm, 0))

    found = _of_slabs(search_slab, plan.shape, num_used, *arrays)
    return jax.tree.map(lambda a: a.reshape(plan.shape[:2]), found)


def _round_part(plan: Rounding, *arguments: Any) -> tuple[jax.Array, Statistics]:
    """Returns the codes of a part, and statistics."""
    *arrays, row_pieces, num_used, _, found, numbers = arguments

    def round_slab(
        x: jax.Array, counts: jax.Array, lengths: jax.Array, found: Found
    ) -> tuple[jax.Array, Statistics]:
        rows = Rows(x, counts, None if plan.shape.is_row else row_pieces)
        return _round_rows(plan, rows, lengths, found, numbers)

    codes, statistics = _of_slabs(round_slab, plan.shape, num_used, *arrays, found)
    statistics = jax.tree.map(lambda a: a.reshape(plan.shape[:2]), statistics)
    return codes.reshape(plan.shape[:3]), statistics


def _of_slabs(
    function: Callable[..., Any], shape: PartShape, num_used: jax.Array, *arrays: Any
) -> Any:
    """Returns the results of a function of arrays for the slabs of a part that are used."""
    slabs, length, *_ = shape.cut()
    cut = jax.tree.map(lambda a: a.reshape(slabs, length, *a.shape[2:]), arrays)

    def of_slab(i: jax.Array | int) -> Any:
        return function(*jax.tree.map(lambda a: a[i], cut))

    def body(i: jax.Array, results: Any) -> Any:
        return jax.tree.map(
            lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, i, 0),
            results,
            of_slab(i),
        )

    if slabs == 1:
        return jax.tree.map(lambda a: a[None], of_slab(0))
    shapes = jax.eval_shape(of_slab, 0)
    empty = jax.tree.map(lambda a: jnp.zeros((slabs, *a.shape), a.dtype), shapes)
    return lax.fori_loop(0, num_used, body, empty)


def _round_rows(
    plan: Rounding, rows: Rows, lengths: jax.Array, found: Found, numbers: Numbers
) -> tuple[jax.Array, Statistics]:
    """Returns codes and statistics of the pieces of some rows."""
    x, (low, high, *_) = rows.pieces, numbers

    def measured() -> tuple[jax.Array, jax.Array, jax.Array]:
        largest = jnp.max(jnp.abs(x), axis=1)
        factor = inverse_size(largest)
        norm = sum_entries(jnp.square(x * factor[:, None]))
        return rows.spread(rows.largest(largest)), norm, factor

    threshold, norm, factor = lax.cond(
        numbers.is_searched, lambda: (found.size, found.norm, found.factor), measured
    )
    scale = round_scale(scale_of(threshold, numbers, jnp), plan.scale_dtype, numbers.largest)
    scale = scale.astype(jnp.float32)

    def added_error() -> jax.Array:
        added = mirror_error(quotient(x, scale[:, None]), low, high)
        return rows.spread(rows.total(sum_entries(added)))

    # If no weight of a row is beyond its highest level, the sign makes no difference.
    may_clip = numbers.is_searched | jnp.any(jnp.round(quotient(threshold, scale)) > high)
    added = lax.cond(numbers.is_signed & may_clip, added_error, lambda: jnp.zeros_like(scale))
    scale = jnp.where(added < 0, -scale, scale)
    step, zero = scale[:, None], found.zero[:, None]
    ratio = quotient(x, step)
    levels = jnp.clip(jnp.round(ratio), low - zero, high - zero)
    is_entry = jnp.arange(x.shape[1], dtype=jnp.float32)[None] < lengths[:, None]
    odd = jnp.clip(2 * jnp.floor(ratio / 2) + 1, low, high)
    levels = jnp.where(numbers.is_odd & is_entry, odd, levels)
    value = _rounded_to(plan.dtype, saturate(step * levels, plan.dtype), numbers.largest)
    ends = [step * (end - zero) * (1 + _ROUNDING) for end in (low, high)]
    is_clipped = (x < jnp.minimum(*ends)) | (x > jnp.maximum(*ends))
    # Squares of numbers near 1 at most: they do not overflow.
    largest_level = jnp.minimum(jnp.abs(scale) * jnp.maximum(high, -low), FLOAT32_MAX)
    error_factor = jnp.minimum(factor, inverse_size(largest_level))
    statistics = Statistics(
        scale=scale,
        error=sum_entries(jnp.square((x - value) * error_factor[:, None])),
        error_unit=1 / error_factor,
        norm=norm,
        norm_unit=1 / factor,
        num_clipped=sum_entries(is_clipped.astype(jnp.float32)),
    )
    return (levels + zero).astype(jnp.int8), statistics


def scale_of(threshold: Any, numbers: Numbers, xp: ModuleType) -> Any:
    """Returns the scale of a threshold before it is rounded to its format."""
    # As a product, as XLA divides by a constant.
    scale = xp.minimum(threshold, np.float32(FLOAT32_MAX)) * numbers.inverse_high
    return xp.clip(scale, np.float32(FLOAT32_TINY), np.float32(FLOAT32_MAX))


def _rounded_to(dtype: str, x: jax.Array, positive: jax.Array) -> jax.Array:
    """Returns float32 numbers rounded to a floating dtype."""
    if dtype == "float32":
        return x
    # XLA would leave out a cast there and back, but does not see that `positive < 0` is False.
    rounded = in_whole_bytes(x.astype(dtype))
    integers = jnp.dtype(f"uint{8 * rounded.dtype.itemsize}")
    bits = lax.bitcast_convert_type(rounded, integers) | (positive < 0).astype(integers)
    return lax.bitcast_convert_type(bits, rounded.dtype).astype(jnp.float32)


def mirror_error(ratio: jax.Array, low: ArrayLike, high: ArrayLike) -> jax.Array:
    """Returns what each entry adds to the error, in squared steps, if its scale is negated."""

    size = jnp.abs(ratio)
    level = jnp.round(size)
    below, above = size - jnp.minimum(level, jnp.negative(low)), size - jnp.minimum(level, high)
    # Exactly 0 if neither is clipped. Of two squares XLA would round only one.
    added = (below - above) * (below + above)
    return jnp.where(ratio < 0, -added, added)


def _search_rows(plan: Search, rows: Rows, levels: LevelRange, is_hard: jax.Array) -> Found:
    """Returns the threshold (or the scale and the zero) of each row."""
    if plan.rule == "mean":
        _, _, factor, norm = scaled(rows)
        mean = rows.total(sum_entries(jnp.abs(rows.pieces) / rows.spread(rows.counts)[:, None]))
        return Found(mean, jnp.zeros_like(mean), norm, factor)

    def search(evaluate: Evaluate, stats: BlockStats) -> tuple[jax.Array, jax.Array, jax.Array]:
        if plan.rule == "range":
            return *range_scale(stats.lowest, stats.highest, *levels[:2]), stats.energy
        if plan.rule == "scale_and_zero":
            return *search_scale_and_zero(levels, plan.is_hard, evaluate, stats), stats.energy
        is_refined = is_hard | needs_refining(levels)
        scale = levels.high * search_scale(levels, is_refined, False, evaluate, stats)
        return scale, jnp.zeros_like(scale), stats.energy

    (scale, zero, norm), factor = search_rows(rows, search)
    return Found(jnp.abs(scale / factor), zero, norm, factor)


def range_scale(
    bottom: jax.Array, top: jax.Array, low: float | jax.Array, high: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the least scale whose grid spans a range that has 0, and the code for 0."""
    scale = jnp.maximum(top / (high - low) - bottom / (high - low), FLOAT32_TINY)
    return scale, jnp.clip(low - jnp.round(quotient(bottom, scale)), low, high)
