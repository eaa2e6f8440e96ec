"""Threshold rules that minimize the squared error of rounding to a low-bit grid.

min over s of sum (w - s * clip(round(w / s), low, high))**2,        t = s * high
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    FLOAT32_MAX,
    inverse_size,
)
from jaxclip._core.grids import Bits, Grid, LevelRange, Levels
from jaxclip.thresholds.by_magnitude import add_up, count_entries, magnitude
from jaxclip.thresholds.rules import ThresholdRule
from jaxclip.thresholds.search.scale import best_common_scale, best_scale


@dataclasses.dataclass(frozen=True, eq=False)
class _MseOptimal(ThresholdRule):
    grid_name: ClassVar[str] = "mse_optimal"
    importance: ArrayLike | None = None

    def compact(self, array: jax.Array) -> jax.Array:
        if self.importance is None:
            return super().compact(array)
        array = jnp.asarray(array)
        self.check_leaf("", array)
        blocks, axes = self.grid.split(array)
        v, _ = self.grid.split(importance_for(self.importance, array.shape))
        counts = self.grid.block_counts(array.shape)
        return self.grid.compact(self.measure(blocks, axes, counts, v), array.ndim)

    def measure(
        self,
        blocks: jax.Array,
        axes: tuple[int, ...],
        counts: np.ndarray,
        importance: jax.Array | None = None,
    ) -> jax.Array:
        levels = self._level_range()
        v = importance
        if v is not None:
            v = _relative_importance(v, axes)
        if self.grid.bits == 1:
            size = magnitude(blocks)
            if v is None:
                return jnp.sum(size / counts, axis=axes, keepdims=True)
            fraction = v / jnp.sum(v, axis=axes, keepdims=True)
            return jnp.sum(size * fraction, axis=axes, keepdims=True)
        return _as_threshold(best_scale(blocks, axes, counts, levels, v), levels.high)

    def pool(self, arrays: Sequence[jax.Array]) -> jax.Array:
        levels = self._level_range()
        if self.grid.bits == 1:
            count = count_entries(arrays)
            return add_up([jnp.sum(magnitude(x) / count) for x in arrays])
        return _as_threshold(best_common_scale(arrays, levels), levels.high)

    def _level_range(self) -> LevelRange:
        if self.grid.bits is None:
            raise ValueError("mse_optimal needs bits: mse_optimal(4)(array).")
        return self.grid.level_range


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _relative_importance(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns importances relative to the largest of a block; all 1 if that is 0."""
    largest = jnp.max(v, axis=axes, keepdims=True, initial=0)
    return jnp.where(largest > 0, v / jnp.where(largest > 0, largest, 1), 1)


@functools.partial(jax.jit, inline=True)
def _as_threshold(scale: jax.Array, high: ArrayLike) -> jax.Array:
    """Returns the threshold of a scale, at most the largest float32."""
    return jnp.minimum(jnp.abs(scale) * high, FLOAT32_MAX)


def importance_for(
    importance: ArrayLike, shape: tuple[int, ...], name: str = "the array"
) -> jax.Array:
    """Returns an importance for every entry of an array, in float32, with a maximum near 1."""
    given = _with_maximum_near_1(jnp.asarray(importance, jnp.float32))
    padded = given.reshape((1,) * (len(shape) - given.ndim) + given.shape)
    try:
        return jnp.broadcast_to(padded, shape)
    except ValueError as error:
        raise ValueError(
            f"importance must broadcast to {name}, {shape}, got shape {given.shape}."
        ) from error


@functools.partial(jax.jit, inline=True)
def _with_maximum_near_1(x: jax.Array) -> jax.Array:
    """Returns numbers times a power of two."""
    return x * inverse_size(jnp.max(x, initial=0))


def _check_importance(importance: ArrayLike | None) -> None:
    if importance is None or not checks.is_concrete(importance):
        return
    values = np.asarray(importance)
    if values.dtype.kind not in "fiu" and not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"importance must be an array of numbers, got {importance!r}.")
    values = values.astype(np.float64)
    wrong = ~((values >= 0) & (values < np.inf))
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"importance must be in [0, inf), got {values[index]} at {index}.")


def _grid_for(
    bits: Bits | Grid | None,
    axis: int | tuple[int, ...] | None,
    group_size: int | None,
    levels: Levels,
) -> Grid:
    if not isinstance(bits, Grid):
        return Grid(bits, axis=axis, group_size=group_size, levels=levels)
    if (axis, group_size, levels) != (None, None, "full"):
        raise TypeError("axis, group_size and levels are fields of a Grid: give them to the Grid.")
    return bits


@checks.refuses_step
def mse_optimal(
    bits: Bits | Grid | None = None,
    *,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    levels: Levels = "full",
    importance: ArrayLike | None = None,
) -> ThresholdRule:
    """Makes the rule that minimizes the squared error of rounding to a low-bit grid.

    Searches `min over s of sum (w - s * clip(round(w / s), low, high))**2` in a few passes;
    `t = s * high`. The tests compare its error with the exact optimum (boxed, Gaussian and
    heavy-tailed weights, with outliers; 64 entries per block): within 0.5 % up to 4 bits, 3 % at 5
    and 6 bits and 6 % at 8. It is closer in larger blocks, because a fine grid over a few entries
    has more local minima than a search can visit. For one bit the optimum is `t = mean |w|`. The
    rule is never worse than `max_abs`, up to rounding, because that scale is a candidate. That is
    so before scales are rounded to a format. After it either may be ahead: where scales are beyond
    the range of float16 or log8, and where log8 moves the outermost level by more than half a step,
    from 5 bits on (from 4 with a zero point).

    Args:
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary", or a `Grid` instead of all fields of one; None
        where `quantize` or `compress` fills it.
      axis: Channel axis or axes with a threshold each; None for one threshold.
      group_size: Entries of a channel that share a threshold, as in `Grid`.
      levels: As in `Grid`.
      importance: Factors in [0, inf) of the squared errors, broadcastable to the array. The
        mean square of each input makes the error that of the layer's outputs, for uncorrelated
        inputs. A block of zeros counts as a block of ones. May be traced.

    Returns:
      A rule: array -> float32 thresholds that broadcast against the array.

    Raises:
      TypeError: If `axis` is not an integer, a tuple of them or None, or comes with a `Grid`, or
        `importance` is not of numbers; when it is used, for a complex array.
      ValueError: If `bits` or `group_size` is not allowed, or an importance is negative, NaN or
        infinite; when it is used, if `importance` does not broadcast to the array.

    Example:
      >>> w = jnp.array([0.9, -1.1, 1.0, 0.05])
      >>> print(mse_optimal("ternary")(w).round(3))
      [1.]

    References:
      Idelbayev et al., Optimal Quantization Using Scaled Codebook, 2021,
      https://doi.org/10.1109/CVPR46437.2021.01191
    """
    grid = _grid_for(bits, axis, group_size, levels)
    _check_importance(importance)
    return _MseOptimal(grid, importance)


@dataclasses.dataclass(frozen=True, eq=False)
class _LeastSquares(ThresholdRule):
    grid_name: ClassVar[str] = "least_squares"
    num_refits: int = 2

    def measure(self, blocks: jax.Array, axes: tuple[int, ...], counts: np.ndarray) -> jax.Array:
        if self.grid.bits is None:
            raise ValueError("least_squares needs bits: least_squares(4)(array).")
        _, high = self.grid.code_range
        size = magnitude(blocks)
        if self.grid.bits == 1:
            return jnp.sum(size / counts, axis=axes, keepdims=True)

        def total(x: jax.Array) -> jax.Array:
            return jnp.sum(x, axis=axes, keepdims=True)

        # Zeros of padding have the code 1 if there is none for 0.
        num_padded = math.prod(blocks.shape[a] for a in axes) - counts if self.grid.is_odd else 0
        largest = jnp.max(size, axis=axes, keepdims=True, initial=0)
        factor = inverse_size(largest)
        x = blocks.astype(jnp.float32) * factor

        def refit(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Returns the best scale for the codes of a step, and how much error it saves."""
            codes = self.grid.nearest(x / jnp.where(step > 0, step, 1))
            squares, products = total(jnp.square(codes)) - num_padded, total(x * codes)
            refitted = products / jnp.maximum(squares, 1)
            return jnp.where(squares > 0, refitted, step), refitted * products

        step = _STEPS[self.grid.level_range[:2]] * jnp.sqrt(total(jnp.square(x)) / counts)
        if self.num_refits:
            step, gain = refit(step)
            other, other_gain = refit(largest * factor / high)
            step = jnp.where(other_gain > gain, other, step)
        for _ in range(self.num_refits - 1):
            step, _ = refit(step)
        return jnp.minimum(step * np.float32(high) / factor, FLOAT32_MAX)


# The best scale of each grid for the normal distribution, in standard deviations.
_STEPS = {
    (-1.5, 1.5): 0.4979,
    (-3.5, 3.5): 0.2930,
    (-7.5, 7.5): 0.1676,
    (-1, 1): 1.224,
    (-2, 1): 1.048,
    (-3, 3): 0.651,
    (-4, 3): 0.602,
    (-7, 7): 0.353,
    (-8, 7): 0.339,
    (-15, 15): 0.193,
    (-16, 15): 0.189,
    (-31, 31): 0.1055,
    (-32, 31): 0.104,
    (-127, 127): 0.0309,
    (-128, 127): 0.0308,
}


@checks.refuses_step
def least_squares(
    bits: Bits | Grid | None = None,
    *,
    num_refits: int = 2,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    levels: Levels = "full",
) -> ThresholdRule:
    """Makes the rule that refits the scale to the codes a few times.

    Alternates `q = clip(round(w / s), low, high)` and `s = sum w q / sum q**2`, the scale of least
    error for those codes; `t = s * high`. The first refit starts from two scales, the best one
    of a normal distribution and that of the largest weight, and keeps the better result. So the
    squared error is never above that of `max_abs`; further refits never raise it. The rule suits
    grids that are chosen anew at every training step, and is near the optimum for ternary and 2
    bits. From 3 bits on, and for files, the search of `mse_optimal` is better.

    Args:
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary", or a `Grid` instead of all fields of one; None
        where `quantize` or `compress` fills it.
      num_refits: Number of refits, at least 0; 0 takes the scale of a normal distribution. One
        bit needs none: there `t = mean |w|`.
      axis: Channel axis or axes with a threshold each; None for one threshold.
      group_size: Entries of a channel that share a threshold, as in `Grid`.
      levels: As in `Grid`.

    Returns:
      A rule: array -> float32 thresholds that broadcast against the array.

    Raises:
      TypeError: If `axis` is not an integer, a tuple of them or None, or comes with a `Grid`; when
        it is used, for a complex array.
      ValueError: If `bits`, `num_refits` or `group_size` is not allowed.

    Example:
      >>> w = jnp.array([0.9, -1.1, 1.0, 0.05])
      >>> print(least_squares("ternary")(w).round(3))
      [1.]

    References:
      Max, Quantizing for Minimum Distortion, 1960, https://doi.org/10.1109/TIT.1960.1057548
      Lloyd, Least Squares Quantization in PCM, 1982, https://doi.org/10.1109/TIT.1982.1056489
    """
    grid = _grid_for(bits, axis, group_size, levels)
    checks.check_count("num_refits", num_refits, at_least=0)
    return _LeastSquares(grid, int(num_refits))
