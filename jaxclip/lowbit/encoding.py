"""Codes, scales and errors of concrete arrays of every shape, by one compiled program.

    array -> parts -> (search for scales, codes, errors) -> codes, scales and error of the array

A program is compiled for the shape of a part, not for that of an array. Threads share the parts.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._core import signals
from jaxclip._core.compiling import WIDE_VECTORS, cpu_options
from jaxclip._core.floats import FLOAT32_MAX, FLOAT32_TINY, inverse_size, quotient, saturate
from jaxclip._core.grids import Grid
from jaxclip._core.threads import in_threads, num_cores
from jaxclip.lowbit.parts import Parts, PartShape, Place, parts_of
from jaxclip.lowbit.scale_formats import dtype_in_memory, round_scale
from jaxclip.thresholds.search.candidates import BlockStats, Evaluate, Search, is_hard
from jaxclip.thresholds.search.rows import Rows, search_rows, sum_entries
from jaxclip.thresholds.search.scale import search_scale
from jaxclip.thresholds.search.scale_and_zero import search_scale_and_zero

# How scales are chosen: for the least squared error, or for the largest weight.
Choice: TypeAlias = Literal["mse_optimal", "max_abs"]
# Scales are rounded to float32 or less; entries beyond a level by only that are not clipped.
_ROUNDING = np.float32(2**-20)


class Encoded(NamedTuple):
    """A low-bit array in NumPy, and its error.

    Attributes:
      codes: int8, in the array's shape.
      scale: One for each block, as the grid stores them.
      zero: int8, in the shape of the scales; None without a zero point.
      squared_error: `sum (w - q)**2`.
      squared_norm: `sum w**2`; not finite if an entry is not.
      num_clipped: Entries beyond the outermost level of their block's grid.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    squared_error: float
    squared_norm: float
    num_clipped: int


class _Plan(NamedTuple):
    """All that a program depends on."""

    shape: PartShape
    is_hard: bool
    grid: Grid
    choice: Choice
    dtype: str


_Array: TypeAlias = Any  # of jax inside the program, of NumPy outside


class _Slab(NamedTuple):
    """The result for a slab: codes for each entry, the rest for each row."""

    codes: _Array
    size: _Array  # the scale before it is rounded to its format, without a sign
    scale: _Array
    zero: _Array
    error: _Array  # squared, times the factor squared
    error_factor: _Array  # a power of two
    norm: _Array  # squared, times the factor squared
    norm_factor: _Array  # a power of two
    num_clipped: _Array


_Program: TypeAlias = Callable[..., _Slab]


def encode_concrete(array: np.ndarray, grid: Grid, choice: Choice) -> Encoded:
    """Returns codes, scales and error of a real floating array that is not empty."""
    parts = parts_of(array.shape, grid)
    plan = _plan(parts, grid, choice, array.dtype)
    matrix, largest = parts.matrix(array), np.float32(1)
    program = _compiled(plan)

    def run(places: Sequence[Place]) -> _Slab:
        return _run(program, parts, matrix, places, largest)

    if grid.scale_dtype == "log8":  # each scale is stored as a fraction of the largest
        sizes = _in_threads(lambda places: _rows_of(run(places).size, places), parts)
        largest = np.float32(max(size.max() for part in sizes for size in part))

    codes, code_matrix = parts.empty_codes()
    shape = parts.num_channels, parts.num_groups
    scale = np.empty(shape, dtype_in_memory(grid.scale_dtype))
    zero = np.empty(shape, np.int8)

    def encode(places: Sequence[Place]) -> tuple[float, float, int]:
        result = run(places)
        for i, place in enumerate(places):
            for target, source in parts.pairs(code_matrix, result.codes[i], place):
                target[...] = source
        for whole, rows in ((scale, result.scale), (zero, result.zero)):
            for place, some in zip(places, _rows_of(rows, places), strict=True):
                target = whole[place.channels, place.groups]
                target[...] = some.reshape(target.shape)
        error = _unscaled_sum(result.error, result.error_factor, places)
        norm = _unscaled_sum(result.norm, result.norm_factor, places)
        return error, norm, sum(int(n.sum()) for n in _rows_of(result.num_clipped, places))

    errors, norms, num_clipped = zip(*_in_threads(encode, parts), strict=True)
    return Encoded(
        codes=codes,
        scale=parts.as_scales(scale),
        zero=parts.as_scales(zero) if grid.zero_point else None,
        squared_error=sum(errors),
        squared_norm=sum(norms),
        num_clipped=sum(num_clipped),
    )


def _plan(parts: Parts, grid: Grid, choice: Choice, dtype: np.dtype) -> _Plan:
    """Returns what the program for an array depends on."""
    # Only what a program reads of the grid, so that equal programs are compiled once.
    read = Grid(
        grid.bits,
        levels=grid.levels,
        axis=None,
        zero_point=grid.zero_point,
        scale_dtype=grid.scale_dtype,
    )
    # float64 is measured in float32, in which codes and scales are computed.
    name = "float32" if dtype.itemsize > 4 else dtype.name
    return _Plan(parts.part_shape, is_hard(parts.size), read, choice, name)


def _rows_of(per_row: np.ndarray, places: Sequence[Place]) -> list[np.ndarray]:
    """Returns the values of the rows that each slab has."""
    return [slab[: place.num_rows] for slab, place in zip(per_row, places, strict=True)]


def _unscaled_sum(squares: np.ndarray, factor: np.ndarray, places: Sequence[Place]) -> float:
    """Returns the sum of squares over all rows, in float64, without their factors."""
    pairs = zip(_rows_of(squares, places), _rows_of(factor, places), strict=True)
    return float(sum(np.sum(x / np.square(f.astype(np.float64))) for x, f in pairs))


def _in_threads(function: Callable[[Sequence[Place]], Any], parts: Parts) -> list[Any]:
    """Returns the results of a function of parts, in their order."""

    def checked(places: Sequence[Place], is_over: threading.Event) -> Any:
        del is_over  # a part takes milliseconds
        signals.check_stop()
        return function(places)

    places = parts.places()
    return in_threads(checked, places, min(num_cores(), len(places)))


def _run(
    program: _Program,
    parts: Parts,
    matrix: np.ndarray,
    places: Sequence[Place],
    largest: np.float32,
) -> _Slab:
    """Returns the results for the slabs of a part, in NumPy."""
    num_slabs, num_pieces, piece, _ = parts.part_shape
    pieces = _aligned_zeros((num_slabs, num_pieces, piece))
    counts = np.ones((num_slabs, num_pieces), np.float32)
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite, and refused later
        for i, place in enumerate(places):
            counts[i, : place.num_rows] = parts.counts(place)
            for source, target in parts.pairs(matrix, pieces[i], place):
                target[...] = source
    cut = parts.part_shape.cut()
    used = -(-places[0].num_rows // cut.num_pieces) if cut.is_row else len(places)
    numbers = np.int32(parts.row_pieces), np.int32(used), largest
    result = jax.tree.map(np.asarray, program(pieces, counts, *numbers))
    return jax.tree.map(lambda x: x[: len(places)], result)


def _aligned_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Returns zeros in float32 that jax on CPU reads where they are, because of their address."""
    alignment, num_bytes = 64, 4 * math.prod(shape)
    memory = np.zeros(num_bytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + num_bytes].view(np.float32).reshape(shape)


@functools.lru_cache(maxsize=64)
def _compiled(plan: _Plan) -> _Program:
    """Returns the compiled program for parts of one shape."""
    # Compiled ahead, so that a caller's jit cannot take its calls into another program.
    num_slabs, num_pieces, piece, _ = plan.shape
    pieces = jax.ShapeDtypeStruct((num_slabs, num_pieces, piece), jnp.float32)
    counts = jax.ShapeDtypeStruct((num_slabs, num_pieces), jnp.float32)
    count, number = (jax.ShapeDtypeStruct((), d) for d in (jnp.int32, jnp.float32))
    options = cpu_options(WIDE_VECTORS) or None
    program = jax.jit(functools.partial(_encode_part, plan), compiler_options=options)
    return program.lower(pieces, counts, count, count, number).compile()


# --- Inside the program -----------------------------------------------------------------


def _encode_part(
    plan: _Plan,
    pieces: jax.Array,
    counts: jax.Array,
    row_pieces: jax.Array,
    num_used: jax.Array,
    largest: jax.Array,
) -> _Slab:
    """Returns the results for the slabs of a part that are used."""
    slabs, length, piece, is_row = plan.shape.cut()
    x, counts = pieces.reshape(slabs, length, piece), counts.reshape(slabs, length)

    def encode_slab(i: jax.Array | int) -> _Slab:
        return _encode_rows(plan, Rows(x[i], counts[i], None if is_row else row_pieces), largest)

    def body(i: jax.Array, results: _Slab) -> _Slab:
        return jax.tree.map(
            lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, i, 0),
            results,
            encode_slab(i),
        )

    if slabs == 1:
        result = jax.tree.map(lambda a: a[None], encode_slab(0))
    else:
        shapes = jax.eval_shape(encode_slab, 0)
        empty = jax.tree.map(lambda a: jnp.zeros((slabs, *a.shape), a.dtype), shapes)
        result = lax.fori_loop(0, num_used, body, empty)
    return jax.tree.map(lambda a: a.reshape(*pieces.shape[:2], *a.shape[2:]), result)


def _encode_rows(plan: _Plan, rows: Rows, largest: jax.Array) -> _Slab:
    """Returns the results for the rows of a slab."""
    grid, (low, high), x = plan.grid, plan.grid.code_range, rows.pieces

    def spread(per_row: jax.Array) -> jax.Array:
        return rows.spread(per_row)[:, None]

    found = _scales(plan, rows)
    stored, zero = round_scale(found.size, grid.scale_dtype, largest), found.zero
    scale = stored.astype(jnp.float32)
    if low < -high and not grid.zero_point:
        added = mirror_error(quotient(x, spread(scale)), low, high)
        scale = jnp.where(rows.total(sum_entries(added)) < 0, -scale, scale)
    if grid.bits == 1:
        levels = jnp.where(x < 0, -1, 1).astype(jnp.float32)
        levels = jnp.where(_is_entry(rows), levels, 0)
    else:
        levels = jnp.round(quotient(x, spread(scale)))
        levels = jnp.clip(levels, low - spread(zero), high - spread(zero))
    step = spread(scale)
    value = _rounded_to(plan.dtype, saturate(step * levels, plan.dtype), largest)
    ends = [step * (end - spread(zero)) * (1 + _ROUNDING) for end in (low, high)]
    is_clipped = (x < jnp.minimum(*ends)) | (x > jnp.maximum(*ends))
    # Squares of numbers near 1 at most: they do not overflow.
    largest_level = jnp.minimum(jnp.abs(scale) * max(high, -low), FLOAT32_MAX)
    factor = inverse_size(jnp.maximum(found.largest, largest_level))
    error = jnp.square((x - value) * spread(factor))
    return _Slab(
        codes=(levels + spread(zero)).astype(jnp.int8),
        size=found.size,
        scale=scale.astype(stored.dtype),
        zero=zero.astype(jnp.int8),
        error=rows.total(sum_entries(error)),
        error_factor=factor,
        norm=found.energy,
        norm_factor=found.factor,
        num_clipped=rows.total(sum_entries(is_clipped.astype(jnp.float32))),
    )


def _rounded_to(dtype: str, x: jax.Array, positive: jax.Array) -> jax.Array:
    """Returns float32 numbers rounded to a floating dtype."""
    if dtype == "float32":
        return x
    # XLA would leave out a cast there and back, but does not see that `positive < 0` is False.
    bits = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    rounded = lax.bitcast_convert_type(x.astype(dtype), bits) | (positive < 0).astype(bits)
    return lax.bitcast_convert_type(rounded, dtype).astype(jnp.float32)


def mirror_error(ratio: jax.Array, low: int, high: int) -> jax.Array:
    """Returns what each entry adds to the error, in squared steps, if its scale is negated."""

    def residual(ratio: jax.Array) -> jax.Array:
        return ratio - jnp.clip(jnp.round(ratio), low, high)

    mirrored, own = residual(-ratio), residual(ratio)
    # Exactly 0 if neither is clipped. Of two squares XLA would round only one.
    return (mirrored - own) * (mirrored + own)


class _Scales(NamedTuple):
    """Scales before they are rounded to their format, and statistics; one value for each row."""

    size: jax.Array  # without a sign
    zero: jax.Array
    largest: jax.Array  # magnitude
    energy: jax.Array  # sum of squares, times the factor squared
    factor: jax.Array  # a power of two


def _scales(plan: _Plan, rows: Rows) -> _Scales:
    """Returns the scale and the zero of each row, by the rule."""
    low, high = plan.grid.code_range

    def search(evaluate: Evaluate, stats: BlockStats) -> tuple[jax.Array, ...]:
        zero = jnp.zeros_like(stats.largest)
        if plan.grid.zero_point:
            scale, zero = _zero_search(plan, low, high)(evaluate, stats)
        elif plan.choice == "max_abs" or plan.grid.bits == 1:
            scale = stats.largest  # a threshold, to be divided once
        else:
            scale = high * search_scale(low, high, plan.is_hard, False, evaluate, stats)
        return scale, zero, stats.largest, stats.energy

    (scale, zero, largest, energy), factor = search_rows(rows, search)
    size = jnp.abs(scale / factor)
    if plan.grid.bits == 1 and plan.choice == "mse_optimal":
        size = rows.total(sum_entries(jnp.abs(rows.pieces) / rows.spread(rows.counts)[:, None]))
    if not plan.grid.zero_point:
        size = jnp.minimum(size, FLOAT32_MAX) / high
    size = jnp.clip(size, FLOAT32_TINY, FLOAT32_MAX)
    return _Scales(size, zero, largest / factor, energy, factor)


def _zero_search(plan: _Plan, low: int, high: int) -> Search:
    """Returns the search for scale and zero point by the rule."""
    if plan.choice == "mse_optimal":
        return functools.partial(search_scale_and_zero, low, high, plan.is_hard)

    def spanning(evaluate: Evaluate, stats: BlockStats) -> tuple[jax.Array, jax.Array]:
        del evaluate
        return range_scale(stats.lowest, stats.highest, low, high)

    return spanning


def range_scale(
    bottom: jax.Array, top: jax.Array, low: int, high: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the least scale whose grid spans a range that has 0, and the code for 0."""
    scale = jnp.maximum(top / (high - low) - bottom / (high - low), FLOAT32_TINY)
    return scale, jnp.clip(low - jnp.round(quotient(bottom, scale)), low, high)


def _is_entry(rows: Rows) -> jax.Array:
    """Returns False for padding."""
    num_pieces, length = rows.pieces.shape
    position = jnp.arange(length, dtype=jnp.float32)[None]
    if rows.row_pieces is not None:
        piece = jnp.arange(num_pieces, dtype=jnp.int32) % rows.row_pieces
        position = position + (piece * length).astype(jnp.float32)[:, None]
    return position < rows.spread(rows.counts)[:, None]
