"""The threshold rule for entropy-coded files, which chooses a step and clips nothing.

An entropy coder makes rare levels cheap, so clipping adds error and saves nothing. The
step of a uniform grid trades bits for error. Bits are those of an ideal order-0 code:

    R = -sum over codes k of p_k log2 p_k,    p_k the fraction of the weights with code k
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks, floats
from jaxclip._core.floats import (
    FLOAT32_MAX,
    inverse_size,
)
from jaxclip._core.grids import Grid, code_range
from jaxclip.thresholds.rules import ThresholdRule

RateAndError: TypeAlias = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # of log2 c

_BITS = 8  # width of the codes before they are coded
_LARGEST_CODE = code_range(_BITS)[1]
_LOG2_SPAN = 24  # the search goes from a step so coarse that all codes are 0 to 2**24 times finer
_TOLERANCE = 5e-4  # bits from the target at which the search stops
_MOST_HALVINGS = 30
_LEAST_RMS = 1e-18  # over the largest weight; below, squares are lost


def code_entropy(codes: ArrayLike) -> jax.Array:
    """Returns the bits per code of an ideal order-0 entropy code of an array.

    `-sum p_k log2 p_k`, where p_k is the fraction of the entries with value k. A Huffman code or
    a range coder with one table comes within a percent or two of it, without the table itself.

    Args:
      codes: Integer array of any shape; entries fit in 8 bits, signed or unsigned. May be
        traced.

    Returns:
      A float32 scalar in [0, 8]; 0 for an empty array.

    Raises:
      TypeError: If `codes` is not of an integer dtype.

    Example:
      >>> float(code_entropy(jnp.array([0, 0, 1, -1])))
      1.5
    """
    codes = jnp.asarray(codes)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes must be integers, got {codes.dtype}.")
    return _entropy(code_counts(codes), max(codes.size, 1))


@jax.jit
def code_counts(codes: jax.Array) -> jax.Array:
    """Returns how often each value modulo 256 occurs, as int32 of shape (256,)."""
    unsigned = codes.astype(jnp.uint8)
    if not floats.is_sharded(codes):
        return jnp.zeros(256, jnp.int32).at[unsigned].add(1)
    # On an explicit mesh scattering is not allowed, but a sum of comparisons is.
    values = jnp.arange(256).astype(jnp.uint8)
    return lax.map(lambda k: jnp.sum(unsigned == k, dtype=jnp.int32), values)


def _entropy(counts: jax.Array, total: int) -> jax.Array:
    fraction = counts.astype(jnp.float32) / total
    return -jnp.sum(fraction * jnp.log2(jnp.where(counts > 0, fraction, 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class _RateOptimal(ThresholdRule):
    grid_name: ClassVar[str] = "rate_optimal"
    goal: str = "bits_per_weight"
    target: ArrayLike = 4.0
    needs_coding: ClassVar[bool] = True
    is_blockwise: ClassVar[bool] = False  # one table of codes for the whole array

    def measure(self, blocks: jax.Array, axes: tuple[int, ...], counts: np.ndarray) -> jax.Array:
        kept = tuple(1 if a in axes else n for a, n in enumerate(blocks.shape))
        num_weights = round(np.sum(np.broadcast_to(counts, kept), dtype=np.float64))
        target = jnp.asarray(self.target, jnp.float32)
        num_weights = min(num_weights, blocks.size)
        step = _best_step(blocks, axes, num_weights, self.goal, target)
        return jnp.minimum(step * _LARGEST_CODE, FLOAT32_MAX)

    def bind(self, grid: Grid) -> ThresholdRule:
        if grid.bits != _BITS:
            raise ValueError(
                f"rate_optimal needs bits={_BITS}, got {grid.bits!r}: the entropy code shortens "
                "codes, so they may be wide before it."
            )
        return super().bind(grid)


@checks.refuses_step
def rate_optimal(
    bits_per_weight: ArrayLike | None = None,
    *,
    error: ArrayLike | None = None,
    lagrangian: ArrayLike | None = None,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> ThresholdRule:
    """Makes the rule that chooses the step of a uniform grid whose codes are entropy-coded.

    The threshold is `t = 127 * step`, for codes of 8 bits. No step is finer than the one of least
    error, which is between `max |w| / 127` and 1 / 32 of that. Give one goal, which holds for
    each array by itself:

        bits_per_weight     R = bits_per_weight
        error               D = |W - Q|^2 / |W|^2 = error
        lagrangian          D + lagrangian * R is least

    R is the `code_entropy` of the array's codes, without scales and tables. The search stops
    within 0.001 bits of R or 0.2 % of D, and 1 % above the least lagrangian. If no step gives the
    value (few weights, few distinct ones), R or D is the next below. If the finest steps do not
    reach the target (one step for an array with an outlier), they are the result.

    Args:
      bits_per_weight: Bits for each entry, in (0, 8). May be traced, like the other goals.
      error: Relative squared error, in (0, 1).
      lagrangian: Relative squared error that one bit for each weight is worth, > 0. At high
        rates D is then `lagrangian / (2 ln 2)`.
      axis: Channel axis or axes with a step each, in proportion to the square root of the
        channel's root mean square; None for one step.
      group_size: Entries of a channel that share a step, as in `Grid`.

    Returns:
      A rule: array -> float32 thresholds that broadcast against the array; 0 for blocks of
      zeros. For `quantize(w, 8, threshold=rule)` and `compress(params, 8, rule=rule)`.

    Raises:
      TypeError: If not exactly one goal is given, a goal is not a number, or `axis` not an
        integer, a tuple of them or None; when it is used, for a complex array.
      ValueError: If a goal is out of range, `group_size` is not a positive integer, or the
        rule is used with other than 8 bits.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> codes = jnp.round(w / (rate_optimal(2.5)(w) / 127)).astype(jnp.int8)
      >>> print(code_entropy(codes).round(2))
      2.5

    References:
      Gish and Pierce, Asymptotically Efficient Quantizing, 1968,
      https://doi.org/10.1109/TIT.1968.1054193
      Wiedemann et al., DeepCABAC, 2019, https://arxiv.org/abs/1905.08318
    """
    goals = {"bits_per_weight": bits_per_weight, "error": error, "lagrangian": lagrangian}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise TypeError(
            "rate_optimal needs exactly one of bits_per_weight, error and lagrangian, "
            f"got {list(given) or 'none'}."
        )
    ((goal, target),) = given.items()
    checks.check_positive(goal, target)
    most = {"bits_per_weight": 8.0, "error": 1.0, "lagrangian": np.inf}[goal]
    if not isinstance(target, jax.Array) and not np.asarray(target) < most:
        raise ValueError(f"{goal} must be in (0, {most:g}), got {target!r}.")
    return _RateOptimal(Grid(None, axis=axis, group_size=group_size), goal, target)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _best_step(
    blocks: jax.Array, axes: tuple[int, ...], num_weights: int, goal: str, target: jax.Array
) -> jax.Array:
    """Returns the step of each block, dims kept; `num_weights` leaves out the padding."""
    # Blocks share one table of codes, and `step_b = c * sqrt(rms_b)` with one c for the array. One
    # step for all blocks would be best if each had its own table. Steps in proportion to the root
    # mean square would make the shared table fit best. Their geometric mean did best on real
    # weights. Temporaries are a few times the array: each step that is tried makes new codes.
    magnitude = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True, initial=0)
    largest = magnitude.astype(jnp.float32)
    factor = inverse_size(jnp.max(largest, initial=0))
    x, largest = blocks.astype(jnp.float32) * factor, largest * factor
    block_energy = jnp.sum(jnp.square(x), axis=axes, keepdims=True)
    block_size = max(blocks.size // max(largest.size, 1), 1)
    energy = jnp.sum(block_energy)
    unit = jnp.sqrt(jnp.maximum(jnp.sqrt(block_energy / block_size), _LEAST_RMS))
    start = 0 * energy  # from data: inside shard_map a loop's values must vary as they will
    most = 2.1 * jnp.max(largest / unit, initial=0)  # all codes are 0

    # No step is finer than the one of least error: it would clip more than it gains, and rate and
    # error would no longer be monotonic in c.
    reaching = largest / _LARGEST_CODE
    halves = start + np.arange(11).astype(np.float32)
    errors = lax.map(lambda n: _codes_and_errors(x, axes, jnp.exp2(-n / 2) * reaching)[1], halves)
    finest = jnp.exp2(-jnp.argmin(errors, axis=0).astype(jnp.float32) / 2) * reaching

    def steps_of(log2_c: jax.Array) -> jax.Array:
        step = jnp.maximum(most * jnp.exp2(log2_c) * unit, finest)
        return jnp.where(largest > 0, step, 0)

    def rate_and_error(log2_c: jax.Array) -> tuple[jax.Array, jax.Array]:
        code, errors = _codes_and_errors(x, axes, steps_of(log2_c))
        error = jnp.sum(errors) / jnp.where(energy > 0, energy, 1)
        counts = code_counts(code.astype(jnp.int8)).at[0].add(num_weights - blocks.size)
        return _entropy(counts, max(num_weights, 1)), error

    if goal == "lagrangian":
        log2_c = _least(rate_and_error, target, start)
    else:
        log2_c = _reached(rate_and_error, goal, target, start)
    return steps_of(log2_c) / factor


def _codes_and_errors(
    x: jax.Array, axes: tuple[int, ...], step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the codes at a step and the squared error of each block, dims kept."""
    ratio = x / jnp.where(step > 0, step, 1)
    code = jnp.clip(jnp.round(ratio), -_LARGEST_CODE, _LARGEST_CODE)
    squares = jnp.sum(jnp.square(ratio - code), axis=axes, keepdims=True)
    return code, squares * jnp.square(step)


def _reached(
    rate_and_error: RateAndError, goal: str, target: jax.Array, start: jax.Array
) -> jax.Array:
    """Returns the log2 c at which rate or error is the target, by halving, or the next below."""

    def surplus(log2_c: jax.Array) -> jax.Array:
        """Returns the bits beyond those needed, which fall as c grows."""
        rate, error = rate_and_error(log2_c)
        if goal == "bits_per_weight":
            return rate - target
        return jnp.log2(target / jnp.maximum(error, 1e-30)) / 2

    def is_unfinished(state: tuple) -> jax.Array:
        low, high, count = state
        return (high > low) & (count < _MOST_HALVINGS)

    def halve(state: tuple) -> tuple:
        low, high, count = state
        middle = (low + high) / 2
        more = surplus(middle)
        is_met = jnp.abs(more) <= _TOLERANCE
        return (
            jnp.where(is_met | (more > 0), middle, low),
            jnp.where(is_met | (more <= 0), middle, high),
            count + 1,
        )

    count = start.astype(jnp.int32)
    low, high, _ = lax.while_loop(is_unfinished, halve, (start - _LOG2_SPAN, start, count))
    return high if goal == "bits_per_weight" else low


def _least(rate_and_error: RateAndError, lagrangian: jax.Array, start: jax.Array) -> jax.Array:
    """Returns the log2 c of the least D + lagrangian * R, by a coarse and a fine search."""

    def cost(log2_c: jax.Array) -> jax.Array:
        rate, error = rate_and_error(log2_c)
        return error + lagrangian * rate

    spacing = 0.25
    places = start - np.arange(0, _LOG2_SPAN, spacing).astype(np.float32)
    best = places[jnp.argmin(lax.map(cost, places))]
    places = best + np.linspace(-spacing, spacing, 17).astype(np.float32)
    return places[jnp.argmin(lax.map(cost, places))]
