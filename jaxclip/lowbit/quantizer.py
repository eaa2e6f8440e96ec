"""Quantizing: from floats to codes and scales.

    scale = threshold / high
    code  = clip(round(w / scale), low, high)                  round half to even
    code  = clip(round(w / scale) + zero, low, high)           with a zero point

`scale` is as stored, so each weight takes the level that is nearest to it: between the outermost
levels `|w - w'| <= |scale| / 2`. One bit has no zero: `code = 1 if w >= 0 else -1`, and
`scale = threshold`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import FLOAT32_MAX, FLOAT32_TINY, quotient
from jaxclip._core.grids import Bits, Grid, LevelRange, as_grid
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.distortion import QuantizationError
from jaxclip.lowbit.encoding.concrete import Choice, encode_concrete
from jaxclip.lowbit.encoding.programs import mirror_error, range_scale
from jaxclip.lowbit.rounding.feedback import (
    FactoredMoments,
    factor_moments,
    importance_of,
    output_error,
    round_with_feedback,
)
from jaxclip.lowbit.rounding.moments import InputMoments
from jaxclip.lowbit.scale_formats import round_scale
from jaxclip.thresholds.by_error import importance_for, mse_optimal
from jaxclip.thresholds.by_magnitude import max_abs
from jaxclip.thresholds.rules import ThresholdRule
from jaxclip.thresholds.search.scale_and_zero import best_scale_and_zero
from jaxclip.thresholds.values import is_rule_factory

# A number, an array of one per block, a rule, or the factory of a rule.
Threshold: TypeAlias = ArrayLike | ThresholdRule | Callable[..., ThresholdRule]


def quantize(
    array: ArrayLike,
    bits: Bits | Grid = 4,
    *,
    threshold: Threshold = mse_optimal,
    moments: InputMoments | None = None,
    name: str = "array",
) -> QuantizedArray:
    """Rounds an array to a low-bit grid inside a clip threshold.

    With moments of the inputs that the array is multiplied by, it is rounded so that the products
    are right: input by input, each making up for the errors of those before it (GPTQ, LDLQ).

    Args:
      array: Real floating array of any shape. May be traced.
      bits: A `Grid`; or its width, 1, 2, 3, 4, 5, 6, 8 or "ternary", for one scale for the whole
        array. With a zero point the grid spans the weights and 0, clipped to the threshold, to
        half a step and the rounding of the scale; `mse_optimal` chooses both ends.
      threshold: A rule or a rule's factory (`mse_optimal`, `max_abs`), bound here to the grid; or a
        number in (0, inf), or an array of one per block. In an array 0 is for blocks of zeros.
      moments: Moments of the inputs, from `calibration.measure`; concrete. `mse_optimal` then
        weights errors by them. The squared error of the products is never larger than without
        them.
      name: Name of the array in errors.

    Returns:
      A `QuantizedArray`. Unless there are moments, each entry takes the nearest level of the
      scale as stored, so `|w - dequantize| <= |scale| / 2` between the outermost levels. Rounding
      to float16, bfloat16 or log8 moves these by at most 2**-11, 2**-8 or 4.4 % of themselves; with
      a zero point, of the whole range. Blocks of zeros, and blocks whose scale would underflow, get
      the smallest scale of the format.

    Raises:
      TypeError: If `array` is not real floating, or `threshold` is not a threshold.
      ValueError: If `bits` is not allowed, or a concrete entry is NaN or infinite; if a concrete
        threshold is infinite, or 0 for a block that has other weights; if `mse_optimal` has an
        `importance` and the grid has a zero point; if moments are of another shape.

    Example:
      >>> q = quantize(jnp.array([0.9, -1.1, 1.0, 0.05]), "ternary")
      >>> print(q.qvalue, q.scale.round(3))
      [ 1 -1  1  0] [1.]
      >>> quantize(jnp.ones((8, 4)), Grid(4, axis=-1)).scale.shape
      (1, 4)

    References:
      Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323
      Chee et al., QuIP, 2023, https://arxiv.org/abs/2307.13304
    """
    threshold = threshold() if is_rule_factory(threshold) else threshold  # pyright: ignore
    if moments is not None:
        factored = factor_moments(moments, np.shape(array), name)
        return quantize_with_moments(array, bits, factored, threshold=threshold, name=name)
    on_host = quantize_on_host(array, bits, threshold=threshold, name=name)
    if on_host is not None:
        device = next(iter(array.devices())) if isinstance(array, jax.Array) else None
        # On the default device arrays stay uncommitted, as jax makes them.
        if device == jax.local_devices()[0]:
            device = None
        return jax.tree.map(lambda part: jax.device_put(part, device), on_host[0])
    array = jnp.asarray(array)
    grid = _grid_for(array.dtype, array.ndim, bits, name)
    _check_all_finite(name, array)
    importance = getattr(threshold, "importance", None)
    if not grid.zero_point:
        v = None if importance is None else importance_for(importance, array.shape, name)
        codes, scale = _encode(array, _block_thresholds(array, grid, threshold, name), grid, v)
        return QuantizedArray(codes, scale, grid, array.dtype)
    if importance is not None:
        raise ValueError("importance must be None for a grid with a zero point.")
    is_searched = isinstance(threshold, type(mse_optimal()))
    t = None if is_searched else _block_thresholds(array, grid, threshold, name)
    codes, scale, zero = _encode_with_zero(array, t, grid)
    return QuantizedArray(codes, scale, grid, array.dtype, zero)


def quantize_with_moments(
    array: ArrayLike,
    bits: Bits | Grid,
    moments: FactoredMoments,
    *,
    threshold: Threshold,
    price: float = 0.0,
    name: str,
) -> QuantizedArray:
    """Returns a low-bit array with small errors of the products with its inputs."""
    nearest = weighted = quantize(array, bits, threshold=threshold, name=name)
    if shared_choice(threshold) == "mse_optimal" and not nearest.grid.zero_point:
        rule = mse_optimal(importance=importance_of(moments, np.shape(array)))
        weighted = quantize(array, bits, threshold=rule, name=name)
    found = round_with_feedback(array, weighted, moments, price=price)
    if price:
        return found
    return min(found, nearest, key=lambda q: output_error(array, q, moments))


def quantize_on_host(
    array: ArrayLike, bits: Bits | Grid, *, threshold: Threshold, name: str
) -> tuple[QuantizedArray, QuantizationError] | None:
    """Returns a low-bit array in NumPy and its error, by the programs for arrays of all shapes.

    None if it takes a program for just this array: a traced or sharded one, or by another rule
    than `mse_optimal` without importance and `max_abs`.
    """
    choice, host = shared_choice(threshold), _on_host(array)
    if choice is None or host is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(host.dtype)
    grid = _grid_for(dtype, host.ndim, bits, name)
    if not host.size:
        return None
    found: Any = encode_concrete(host, grid, choice)
    if not math.isfinite(found.squared_norm):
        _raise_not_finite(name, host)
    error = QuantizationError(found.squared_error, found.squared_norm, found.num_clipped)
    return QuantizedArray(found.codes, found.scale, grid, dtype, found.zero), error


def shared_choice(threshold: Threshold) -> Choice | None:
    """Returns how the program for all shapes finds a rule's scales; None if it cannot."""
    has_importance = getattr(threshold, "importance", None) is not None
    return None if has_importance else _CHOICES.get(type(threshold))


_CHOICES: dict[type, Choice] = {type(mse_optimal()): "mse_optimal", type(max_abs()): "max_abs"}


def _on_host(array: ArrayLike) -> np.ndarray | None:
    """Returns an array of NumPy, of Python numbers, or of jax on one CPU device; else None."""
    if isinstance(array, (np.ndarray, np.generic, float, list, tuple)):
        return np.asarray(array)
    if not isinstance(array, jax.Array) or not checks.is_concrete(array):
        return None
    devices = array.devices()
    is_on_host = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    is_number = is_on_host and jnp.issubdtype(array.dtype, jnp.floating)
    return np.asarray(array) if is_number else None


def _grid_for(dtype: Any, ndim: int, bits: Bits | Grid, name: str) -> Grid:
    """Returns the grid for an array, its axes counted from the end."""
    grid = as_grid(bits, axis=None)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be real floating to be quantized, got {dtype}.")
    return grid.from_the_end(ndim)


def _check_all_finite(name: str, array: jax.Array) -> None:
    if not checks.is_concrete(array) or not array.is_fully_addressable:
        return
    with jax.ensure_compile_time_eval():  # for a concrete array inside a caller's jit
        all_finite = bool(jnp.all(jnp.isfinite(array)))
    if not all_finite:
        _raise_not_finite(name, np.asarray(array))


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises with the first entry that is not finite in float32."""
    if not np.isfinite(array).all():
        _raise_not_finite(name, array)


def _raise_not_finite(name: str, array: np.ndarray) -> None:
    """Raises with the first entry that is not finite in float32, or in a wider `array`'s dtype."""
    with np.errstate(over="ignore"):
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        is_finite = np.isfinite(array.astype(np.float32))
    index = tuple(int(i) for i in np.argwhere(~is_finite)[0])
    raise ValueError(f"{name} must be finite to be quantized, got {array[index]} at {index}.")


def _block_thresholds(array: jax.Array, grid: Grid, threshold: Threshold, name: str) -> jax.Array:
    """Returns one threshold per block, in the shape of the scales."""
    if isinstance(threshold, ThresholdRule):
        t = jnp.asarray(threshold.bind(grid).compact(array))
    elif callable(threshold):
        raise TypeError(f"threshold must be a number, an array or a rule, got {threshold!r}.")
    else:
        checks.check_threshold_array("threshold", threshold)
        if np.ndim(threshold) == 0:
            checks.check_positive("threshold", threshold)
        with np.errstate(over="ignore"):  # what is beyond float32 is refused below
            t = jnp.asarray(threshold).astype(jnp.float32)
    shape = grid.scale_shape(array.shape)
    try:
        per_block = jnp.broadcast_to(t.reshape((1,) * (len(shape) - t.ndim) + t.shape), shape)
    except ValueError as error:
        raise ValueError(
            f"threshold must broadcast to one value per block, {shape}, got shape {t.shape}."
        ) from error
    if not isinstance(threshold, ThresholdRule):
        _check_numbers(name, array, grid, threshold)
    return per_block


def _check_numbers(name: str, array: jax.Array, grid: Grid, threshold: ArrayLike) -> None:
    """Raises if a concrete threshold would make zeros of a block that has other weights."""
    is_known = checks.is_concrete(threshold) and getattr(threshold, "is_fully_addressable", True)
    if not is_known:
        return
    values = np.asarray(threshold).astype(np.float64)
    is_in_range = (values >= 0) & (values <= FLOAT32_MAX)
    if not np.all(is_in_range):
        raise ValueError(
            f"threshold of {name} must be finite in float32 and at least 0 everywhere, got "
            f"{values[~is_in_range].flat[0]}: max_abs clips nothing."
        )
    if np.all(values > 0) or not checks.is_concrete(array) or not array.is_fully_addressable:
        return
    with jax.ensure_compile_time_eval():  # for a concrete array inside a caller's jit
        largest = np.asarray(max_abs().bind(grid).compact(array))
    # A rule gives 0 for a block of zeros, and so may an array that a rule made.
    lost = np.argwhere((values == 0) & (largest > 0))
    if lost.size:
        block = tuple(int(i) for i in lost[0])
        raise ValueError(
            f"threshold of {name} must be positive for a block that is not all 0, got 0 for block "
            f"{block}, whose largest weight is {largest[block]}."
        )


# --- Codes ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=2)
def _encode(
    array: jax.Array, t: jax.Array, grid: Grid, importance: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns codes and scales of a grid around 0."""
    low, high = grid.code_range
    x = array.astype(jnp.float32)
    # Rounded first, so the codes and the bound of half a step are those of the stored scale.
    stored = round_scale(jnp.clip(t / high, FLOAT32_TINY, FLOAT32_MAX), grid.scale_dtype)
    scale = stored.astype(jnp.float32)

    if low < -high:  # the sign of the scale puts the longer side where the error is lower
        added = mirror_error(_ratio(x, scale, grid), low, high)
        blocks, axes = grid.split(added if importance is None else added * importance)
        is_mirrored = grid.compact(jnp.sum(blocks, axis=axes, keepdims=True), x.ndim) < 0
        # As a product, because a selection needs scales that are sharded like the errors.
        scale = scale * (1 - 2 * is_mirrored.astype(jnp.float32))
    codes = grid.nearest(_ratio(x, scale, grid)).astype(jnp.int8)
    return codes, scale.astype(stored.dtype)


@functools.partial(jax.jit, static_argnums=2)
def _encode_with_zero(
    array: jax.Array, t: jax.Array | None, grid: Grid
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns codes, scales and zeros; without a threshold both ends are searched for."""
    x = inside = array.astype(jnp.float32)
    search = best_scale_and_zero if t is None else _range_scale
    if t is not None:
        bound = grid.expand(t, x.shape)
        inside = jnp.clip(x, -bound, bound)
    blocks, axes = grid.split(inside)
    counts = jnp.asarray(grid.block_counts(x.shape))
    found = search(blocks, axes, counts, grid.level_range)
    scale, zero = (grid.compact(part, x.ndim) for part in found)
    stored = round_scale(jnp.clip(scale, FLOAT32_TINY, FLOAT32_MAX), grid.scale_dtype)
    codes = grid.nearest(_ratio(x, stored.astype(jnp.float32), grid), grid.expand(zero, x.shape))
    return codes.astype(jnp.int8), stored, zero.astype(jnp.int8)


def _range_scale(
    blocks: jax.Array, axes: tuple[int, ...], counts: jax.Array, levels: LevelRange
) -> tuple[jax.Array, jax.Array]:
    """Returns the least scale whose grid spans each block and 0, and the code for 0."""
    del counts
    top = jnp.max(blocks, axis=axes, keepdims=True, initial=0)
    bottom = jnp.min(blocks, axis=axes, keepdims=True, initial=0)
    return range_scale(bottom, top, levels.low, levels.high)


def _ratio(x: jax.Array, scale: jax.Array, grid: Grid) -> jax.Array:
    """Returns `x` over the scale of its block."""
    return quotient(x, grid.expand(scale, x.shape))
