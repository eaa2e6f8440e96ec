"""From floats to codes and scales."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    quotient,
)
from jaxclip._core.grids import Bits, Granularity, code_range
from jaxclip.lowbit.arrays import QuantizedArray, _check_zero_point
from jaxclip.lowbit.scale_formats import round_scale, scale_format
from jaxclip.thresholds.by_error import importance_for, mse_optimal
from jaxclip.thresholds.rules import ThresholdRule
from jaxclip.thresholds.search.scale_and_zero import best_scale_and_zero
from jaxclip.thresholds.values import is_rule_factory


def quantize(
    array: ArrayLike,
    bits: Bits = 4,
    *,
    threshold: Any = mse_optimal,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    full_signed: bool = True,
    zero_point: bool = False,
    scale_dtype: Any = "float32",
    name: str = "array",
) -> QuantizedArray:
    """Rounds an array to a low-bit grid inside a clip threshold.

    Args:
      array: Real floating array of any shape. May be traced.
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary".
      threshold: A rule or a rule's factory (`mse_optimal`, `max_abs`), bound here to the
        grid and granularity; or a number in (0, inf), or an array of one a block.
      axis: Channel axis or axes with a scale each; None for one scale.
      group_size: Entries that share a scale along the last non-channel axis.
      full_signed: Whether grids of two bits or more use the level -2**(bits-1).
      zero_point: Whether the grid may lie unevenly around 0, with a zero point a block. The
        range is then that of the weights and 0, inside the threshold if one is given;
        `mse_optimal` chooses both ends. Not for 1 bit.
      scale_dtype: Format of the scales: float32, float16, bfloat16 or "log8", as in
        `jaxclip.scale_formats`.
      name: What to call the array in errors.

    Returns:
      A `QuantizedArray`. `|w - dequantize| <= |scale| / 2` inside the threshold, with the
      scale as stored. Blocks of zeros, and blocks whose scale would underflow, get the
      smallest scale of the format.

    Raises:
      TypeError: If `array` is not real floating, or `threshold` is no threshold.
      ValueError: If `bits` or `scale_dtype` is not allowed, `zero_point` comes with 1 bit, or
        a concrete entry is NaN or infinite; if `mse_optimal` is `exact` or has an
        `importance` and `zero_point` is set.

    Example:
      >>> q = quantize(jnp.array([0.9, -1.1, 1.0, 0.05]), "ternary")
      >>> print(q.qvalue, q.scale.round(3))
      [ 1 -1  1  0] [1.]
    """
    code_range(bits, full_signed)
    _check_zero_point(bits, zero_point)
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be real floating to be quantized, got {array.dtype}.")
    _check_all_finite(name, array)
    granularity = Granularity(axis, group_size).from_the_end(array.ndim)
    if is_rule_factory(threshold):
        threshold = threshold()  # a rule's factory
    scale_dtype = scale_format(scale_dtype)
    grid = (bits, full_signed, granularity, scale_dtype)
    measured = (array, bits, full_signed, granularity, threshold)
    zero = None
    importance = getattr(threshold, "importance", None)
    if zero_point and (importance is not None or getattr(threshold, "exact", False)):
        raise ValueError("exact and importance are for grids without a zero point.")
    if not zero_point:
        v = None if importance is None else importance_for(importance, array.shape, name)
        t = _block_thresholds(*measured)
        qvalue, scale = _encode(array, t, *grid, v)
    else:
        is_searched = isinstance(threshold, type(mse_optimal()))
        t = None if is_searched else _block_thresholds(*measured)
        qvalue, scale, zero = _encode_with_zero(array, t, *grid)
    return QuantizedArray(
        qvalue, scale, bits, full_signed, granularity, array.dtype, zero, scale_dtype
    )


def _check_all_finite(name: str, array: jax.Array) -> None:
    if not checks.is_concrete(array) or not array.is_fully_addressable:
        return
    with jax.ensure_compile_time_eval():  # a concrete array inside somebody's jit
        all_finite = bool(jnp.all(jnp.isfinite(array)))
    if not all_finite:
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array, np.float64)))[0])
        raise ValueError(f"{name} must be finite to be quantized, got {array[index]} at {index}.")


def _block_thresholds(
    array: jax.Array,
    bits: Bits,
    full_signed: bool,
    granularity: Granularity,
    threshold: Any,
) -> jax.Array:
    """One threshold a block, in the compact form of scales."""
    if isinstance(threshold, ThresholdRule):
        t = jnp.asarray(threshold.bind(bits, full_signed, granularity).compact(array))
    elif callable(threshold):
        raise TypeError(f"threshold must be a number, an array or a rule, got {threshold!r}.")
    else:
        checks.check_threshold_array("threshold", threshold)
        if np.ndim(threshold) == 0:
            checks.check_positive("threshold", threshold)
        t = jnp.asarray(threshold).astype(jnp.float32)
    shape = granularity.scale_shape(array.shape)
    try:
        return jnp.broadcast_to(t.reshape((1,) * (len(shape) - t.ndim) + t.shape), shape)
    except ValueError as error:
        raise ValueError(
            f"threshold must broadcast to one value a block, {shape}, got shape {t.shape}."
        ) from error


# --- Codes ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _encode(
    array: jax.Array,
    t: jax.Array,
    bits: Bits,
    full_signed: bool,
    granularity: Granularity,
    scale_dtype: str,
    importance: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of a grid around 0."""
    low, high = code_range(bits, full_signed)
    x = array.astype(jnp.float32)
    stored = round_scale(jnp.clip(t / high, FLOAT32_TINY, FLOAT32_MAX), scale_dtype)
    if bits == 1:
        return jnp.where(x < 0, -1, 1).astype(jnp.int8), stored
    scale = stored.astype(jnp.float32)

    def ratio(scale: jax.Array) -> jax.Array:
        return _ratio(x, scale, granularity)

    def block_error(scale: jax.Array) -> jax.Array:
        """Squared error of each block in units of the scale, so that it cannot overflow."""
        r = ratio(scale)
        squares = jnp.square(r - jnp.clip(jnp.round(r), low, high))
        squares = squares if importance is None else squares * importance
        blocks, axes = granularity.split(squares)
        return granularity.compact(jnp.sum(blocks, axis=axes, keepdims=True), x.ndim)

    if low < -high:
        is_mirrored = block_error(-scale) < block_error(scale)
        # As a product, since a selection would want scales that are sharded as the errors are.
        scale = scale * (1 - 2 * is_mirrored.astype(jnp.float32))
    codes = jnp.clip(jnp.round(ratio(scale)), low, high).astype(jnp.int8)
    return codes, scale.astype(stored.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _encode_with_zero(
    array: jax.Array,
    t: jax.Array | None,
    bits: Bits,
    full_signed: bool,
    granularity: Granularity,
    scale_dtype: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales and zeros; without a threshold both ends are searched for."""
    low, high = code_range(bits, full_signed)
    x = array.astype(jnp.float32)
    search = best_scale_and_zero if t is None else _range_scale
    if t is not None:
        bound = granularity.expand(t, x.shape)
        x = jnp.clip(x, -bound, bound)
    blocks, axes = granularity.split(x)
    counts = jnp.asarray(granularity.block_counts(x.shape))
    scale, zero = (
        granularity.compact(part, x.ndim) for part in search(blocks, axes, counts, low, high)
    )
    stored = round_scale(jnp.clip(scale, FLOAT32_TINY, FLOAT32_MAX), scale_dtype)
    codes = jnp.round(_ratio(x, stored.astype(jnp.float32), granularity))
    codes = jnp.clip(codes + granularity.expand(zero, x.shape), low, high)
    return codes.astype(jnp.int8), stored, zero.astype(jnp.int8)


def _range_scale(
    blocks: jax.Array, axes: tuple[int, ...], counts: jax.Array, low: int, high: int
) -> tuple[jax.Array, jax.Array]:
    """The least scale whose grid spans each block and 0, and the code for 0; dims kept."""
    del counts
    top = jnp.max(blocks, axis=axes, keepdims=True, initial=0)
    bottom = jnp.min(blocks, axis=axes, keepdims=True, initial=0)
    scale = jnp.maximum(top / (high - low) - bottom / (high - low), FLOAT32_TINY)
    zero = jnp.clip(low - jnp.round(quotient(bottom, scale)), low, high)
    return scale, zero


def _ratio(x: jax.Array, scale: jax.Array, granularity: Granularity) -> jax.Array:
    """`x` in units of the scale of its block."""
    return quotient(x, granularity.expand(scale, x.shape))
