"""Arrays at 1 to 8 bits: thresholds to scales and codes, and back.

    code = clip(round(w / scale), low, high)        round half to even
    w'   = scale * code

`scale = threshold / high`, one for each tensor, channel or group. Inside the threshold
`|w - w'| <= |scale| / 2`. One bit has no zero: `code = 1 if w >= 0 else -1`, and
`scale = threshold`. A full signed grid has one level more on one side, `low = -high - 1`;
the sign of the scale puts it where it lowers the squared error.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip import _checks
from jaxclip.grids import Bits, Granularity, code_range
from jaxclip.threshold_rules import mse_optimal
from jaxclip.thresholds import ThresholdRule

__all__ = ["QuantizedArray", "dequantize", "quantize"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("qvalue", "scale"),
    meta_fields=("bits", "full_signed", "granularity", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array as integer codes and scales, a pytree that passes through jit and vmap.

    `dequantize(q) == q.scale * q.qvalue`, with one scale per block as `granularity` says.

    Attributes:
      qvalue: int8 codes in `code_range(bits, full_signed)`, in the array's shape.
      scale: float32, not 0 and finite; 1 along shared axes, one a group along a grouped one.
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary".
      full_signed: Whether the level -2**(bits-1) is used.
      granularity: Which entries share a scale.
      dtype: Dtype of the array that was quantized, and of what `dequantize` returns.
    """

    qvalue: jax.Array
    scale: jax.Array
    bits: Bits
    full_signed: bool
    granularity: Granularity
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.qvalue.shape

    @property
    def threshold(self) -> jax.Array:
        """The clip threshold of each block, `|scale| * high`."""
        return jnp.abs(self.scale) * code_range(self.bits, self.full_signed)[1]


def quantize(
    array: ArrayLike,
    bits: Bits = 4,
    *,
    threshold: Any = mse_optimal,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
    full_signed: bool = True,
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
      name: What to call the array in errors.

    Returns:
      A `QuantizedArray`. `|w - dequantize| <= |scale| / 2` inside the threshold. Blocks of
      zeros, and blocks whose scale would underflow, get the smallest normal scale.

    Raises:
      TypeError: If `array` is not real floating, or `threshold` is no threshold.
      ValueError: If `bits` is not allowed, or a concrete entry is NaN or infinite.

    Example:
      >>> q = quantize(jnp.array([0.9, -1.1, 1.0, 0.05]), "ternary")
      >>> print(q.qvalue, q.scale.round(3))
      [ 1 -1  1  0] [1.]
    """
    low, high = code_range(bits, full_signed)
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be real floating to be quantized, got {array.dtype}.")
    _check_all_finite(name, array)
    granularity = Granularity(axis, group_size)
    t = _block_thresholds(array, bits, full_signed, granularity, threshold)
    qvalue, scale = _encode(array, t, bits, low, high, granularity)
    return QuantizedArray(qvalue, scale, bits, full_signed, granularity, array.dtype)


def dequantize(quantized: QuantizedArray, dtype: Any = None) -> jax.Array:
    """Returns `scale * code`, the array that a `QuantizedArray` stands for.

    Args:
      quantized: What `quantize` returned, or a file held.
      dtype: Floating dtype of the result; None for the dtype that was quantized.

    Returns:
      An array in the original shape, multiplied in float32 and cast once. Inside jit it
      fuses into its consumer.

    Example:
      >>> dequantize(quantize(jnp.array([0.9, -1.1, 0.25]), "ternary", threshold=0.5))
      Array([ 0.5, -0.5,  0. ], dtype=float32)
    """
    scale = quantized.granularity.expand(jnp.asarray(quantized.scale), quantized.shape)
    values = scale * jnp.asarray(quantized.qvalue).astype(jnp.float32)
    dtype = quantized.dtype if dtype is None else dtype
    # The largest code times the scale may round past the largest number of the dtype.
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    return jnp.clip(values, -largest, largest).astype(dtype)


def _check_all_finite(name: str, array: jax.Array) -> None:
    if not _checks.is_concrete(array) or not array.is_fully_addressable:
        return
    with jax.ensure_compile_time_eval():  # a concrete array inside somebody's jit
        all_finite = bool(jnp.all(jnp.isfinite(array)))
    if not all_finite:
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array, np.float64)))[0])
        raise ValueError(f"{name} must be finite to be quantized, got {array[index]} at {index}.")


def _block_thresholds(
    array: jax.Array, bits: Bits, full_signed: bool, granularity: Granularity, threshold: Any
) -> jax.Array:
    """One threshold a block, in the compact form of scales."""
    if getattr(threshold, "__annotations__", {}).get("return") is ThresholdRule:
        threshold = threshold()  # a rule's factory
    if isinstance(threshold, ThresholdRule):
        t = jnp.asarray(threshold.bind(bits, full_signed, granularity).compact(array))
    elif callable(threshold):
        raise TypeError(f"threshold must be a number, an array or a rule, got {threshold!r}.")
    else:
        _checks.check_threshold_array("threshold", threshold)
        if np.ndim(threshold) == 0:
            _checks.check_positive("threshold", threshold)
        t = jnp.asarray(threshold).astype(jnp.float32)
    shape = granularity.scale_shape(array.shape)
    try:
        return jnp.broadcast_to(t.reshape((1,) * (len(shape) - t.ndim) + t.shape), shape)
    except ValueError as error:
        raise ValueError(
            f"threshold must broadcast to one value a block, {shape}, got shape {t.shape}."
        ) from error


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _encode(
    array: jax.Array, t: jax.Array, bits: Bits, low: int, high: int, granularity: Granularity
) -> tuple[jax.Array, jax.Array]:
    x = array.astype(jnp.float32)
    info = jnp.finfo(jnp.float32)
    scale = jnp.clip(t / high, info.tiny, info.max)
    if bits == 1:
        return jnp.where(x < 0, -1, 1).astype(jnp.int8), scale

    def ratio(scale: jax.Array) -> jax.Array:
        # Near the top of float32 the reciprocal that XLA may divide by would be subnormal.
        smaller = jnp.where(jnp.abs(scale) > 1, 0.25, jnp.ones_like(scale))
        return (x * granularity.expand(smaller, x.shape)) / granularity.expand(
            scale * smaller, x.shape
        )

    def block_error(scale: jax.Array) -> jax.Array:
        """Squared error of each block in units of the scale, so that it cannot overflow."""
        r = ratio(scale)
        blocks, axes = granularity.split(jnp.square(r - jnp.clip(jnp.round(r), low, high)))
        return granularity.compact(jnp.sum(blocks, axis=axes, keepdims=True), x.ndim)

    if low < -high:
        scale = jnp.where(block_error(-scale) < block_error(scale), -scale, scale)
    return jnp.clip(jnp.round(ratio(scale)), low, high).astype(jnp.int8), scale
