"""Arrays at 1 to 8 bits: thresholds to scales and codes, and back.

    code = clip(round(w / scale), low, high)                   round half to even
    w'   = scale * code

`scale = threshold / high`, one for each tensor, channel or group. Inside the threshold
`|w - w'| <= |scale| / 2`. One bit has no zero: `code = 1 if w >= 0 else -1`, and
`scale = threshold`. A full signed grid has one level more on one side, `low = -high - 1`;
the sign of the scale puts it where it lowers the squared error.

With a zero point the grid is moved by whole codes, so 0 stays on it exactly:

    code = clip(round(w / scale) + zero, low, high)            zero in low .. high
    w'   = scale * (code - zero)

The scale is rounded to its format first and the codes are made with what is stored, so that
the bound of half a step holds for the scale that decoding uses.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip import _checks
from jaxclip.affine_scales import best_scale_and_zero
from jaxclip.grids import Bits, Granularity, code_range
from jaxclip.rescaling import quotient
from jaxclip.scale_formats import round_scale, scale_format
from jaxclip.threshold_rules import importance_for, mse_optimal
from jaxclip.thresholds import ThresholdRule, is_rule_factory

__all__ = ["QuantizedArray", "dequantize", "quantize"]

_CODE_DTYPES = ("int8", "int4", "int2")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("qvalue", "scale", "zero"),
    meta_fields=("bits", "full_signed", "granularity", "dtype", "scale_dtype"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array as integer codes and scales, a pytree that passes through jit and vmap.

    Arrays that `quantize` made stay right when they are stacked or batched along a new first
    axis: their channel axes are counted from the end.

    jax functions take it for the array that it stands for: `x @ q`, `jnp.sin(q)`, `q[0]`; so do
    those of NumPy, and loops.
    What holds, and what `validate` checks, with one scale and one zero for each block:

        array == scale * (qvalue - zero)                   zero None counts as 0
        low <= qvalue <= high, low <= zero <= high         low, high = code_range(bits, ...)
        qvalue != 0                                        for one bit, which has no zero point
        scale != 0 and finite                              scale > 0 with a zero point
        scale.shape == zero.shape == granularity.scale_shape(qvalue.shape)

    Attributes:
      qvalue: Codes in the array's shape: int8, or int4 or int2 after `with_code_dtype`.
      scale: float32, float16 or bfloat16; 1 along shared axes, one a group along a grouped one.
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary".
      full_signed: Whether the level -2**(bits-1) is used.
      granularity: Which entries share a scale; from `quantize` with negative axes.
      dtype: Dtype of the array that was quantized, and of what `dequantize` returns.
      zero: int8, in the shape of `scale`; None for a grid around code 0.
      scale_dtype: Format of the scales, as in `jaxclip.scale_formats`.
    """

    qvalue: jax.Array
    scale: jax.Array
    bits: Bits
    full_signed: bool
    granularity: Granularity
    dtype: Any
    zero: Any = None
    scale_dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions of the array."""
        return len(self.shape)

    @property
    def threshold(self) -> jax.Array:
        """The clip threshold of each block, `|scale| * high`; float32.

        With a zero point, the magnitude of the level that is farthest from 0.
        """
        low, high = code_range(self.bits, self.full_signed)
        step = jnp.abs(jnp.asarray(self.scale).astype(jnp.float32))
        if self.zero is None:
            return step * high
        zero = jnp.asarray(self.zero).astype(jnp.float32)
        return step * jnp.maximum(high - zero, zero - low)

    def __jax_array__(self) -> jax.Array:
        return dequantize(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a QuantizedArray is computed from codes: copy=False cannot be met.")
        return np.array(dequantize(self), dtype, copy=copy)

    def __getitem__(self, index: Any) -> jax.Array:
        return dequantize(self)[index]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(dequantize(self))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a QuantizedArray without dimensions.")
        return self.shape[0]

    def __bool__(self) -> bool:  # else that of the length
        return bool(dequantize(self))

    def with_code_dtype(self, dtype: Any) -> "QuantizedArray":
        """Returns the same array with its codes in int8, int4 or int2.

        Args:
          dtype: `jnp.int8`, `jnp.int4` or `jnp.int2`; int2 needs jax 0.10 or newer, since
            older ones compute wrong numbers from it on CPU.

        Returns:
          A `QuantizedArray` that decodes to the same bits.

        Raises:
          TypeError: If `dtype` is none of these.
          ValueError: If the codes of `bits` do not fit, or jax is too old.
        """
        name = jnp.dtype(dtype).name
        if name not in _CODE_DTYPES:
            raise TypeError(f"dtype must be one of {_CODE_DTYPES}, got {name}.")
        if name == "int2" and jax.__version_info__ < (0, 10):
            raise ValueError(
                f"dtype int2 needs jax 0.10 or newer, got {jax.__version__}, which computes wrong "
                "numbers from it on CPU. Use jnp.int4."
            )
        low, high = code_range(self.bits, self.full_signed)
        half = 2 ** (int(name.removeprefix("int")) - 1)
        if low < -half or high > half - 1:
            raise ValueError(f"dtype {name} does not hold the codes of bits={self.bits!r}.")
        return dataclasses.replace(self, qvalue=jnp.asarray(self.qvalue).astype(dtype))

    def validate(self, name: str = "array") -> None:
        """Raises unless all equations of the class hold.

        Args:
          name: What to call the array in errors.

        Raises:
          TypeError: If `dtype` is not floating.
          ValueError: If a part has a wrong dtype, shape or value; names the part.
        """
        self.check_parts(name)
        self.check_values(name)
        self.check_codes(np.asarray(self.qvalue), name)

    def check_parts(self, name: str) -> None:
        """Raises unless dtypes and shapes of the parts fit; needs no values."""
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(f"QuantizedArray '{name}' must stand for a float, got {self.dtype}.")
        try:
            code_range(self.bits, self.full_signed)
            wanted = self.granularity.scale_shape(self.shape)
            stored = scale_format(self.scale_dtype).replace("log8", "float32")
            _check_zero_point(self.bits, self.zero is not None)
        except ValueError as error:
            raise ValueError(f"QuantizedArray '{name}': {error}") from error
        if jnp.dtype(self.qvalue.dtype).name not in _CODE_DTYPES:
            raise ValueError(
                f"QuantizedArray '{name}' of shape {self.shape} must have codes of a dtype in "
                f"{_CODE_DTYPES}, got {self.qvalue.dtype}."
            )
        parts = {"scale": (self.scale, stored)}
        parts |= {"zero": (self.zero, "int8")} if self.zero is not None else {}
        for part, (array, dtype) in parts.items():
            if (array.dtype, tuple(array.shape)) != (jnp.dtype(dtype), wanted):
                raise ValueError(
                    f"QuantizedArray '{name}' of shape {self.shape} must have {part} of dtype "
                    f"{dtype} and shape {wanted}, got {array.dtype} and {tuple(array.shape)}."
                )

    def check_values(self, name: str) -> None:
        """Raises unless the values of scales and zeros are those of the class's equations."""
        scale = np.asarray(self.scale).astype(np.float32)
        if not np.all(np.isfinite(scale) & (scale != 0)):
            raise ValueError(f"'{name}': scales must be finite and not 0.")
        if self.zero is not None:
            low, high = code_range(self.bits, self.full_signed)
            zero = np.asarray(self.zero)
            if not (np.all(scale > 0) and np.all((low <= zero) & (zero <= high))):
                raise ValueError(
                    f"'{name}': with a zero point scales must be positive and zeros in "
                    f"[{low}, {high}]."
                )

    def check_codes(self, codes: np.ndarray, name: str) -> None:
        """Raises unless `codes`, some of the array's, are in the range of its bits."""
        low, high = code_range(self.bits, self.full_signed)
        codes = codes.astype(np.int8, copy=False)
        inside = low <= codes.min(initial=high) and codes.max(initial=low) <= high
        if not inside or (self.bits == 1 and not codes.all()):
            raise ValueError(f"'{name}': codes are not in the range of bits={self.bits!r}.")


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


def dequantize(quantized: QuantizedArray, dtype: Any = None) -> jax.Array:
    """Returns `scale * (code - zero)`, the array that a `QuantizedArray` stands for.

    Args:
      quantized: What `quantize` returned, or a file held.
      dtype: Floating dtype of the result; None for the dtype that was quantized.

    Returns:
      An array in the original shape, multiplied in float32 and cast once. Inside jit it
      fuses into its consumer.

    Raises:
      ValueError: If groups do not fit the shape: codes and scales were stacked, or one was cut,
        in an array whose channel axes are counted from the front.

    Example:
      >>> dequantize(quantize(jnp.array([0.9, -1.1, 0.25]), "ternary", threshold=0.5))
      Array([ 0.5, -0.5,  0. ], dtype=float32)
    """

    def expanded(part: ArrayLike) -> jax.Array:
        part = quantized.granularity.expand(jnp.asarray(part), quantized.shape)
        return part.astype(jnp.float32)

    levels = jnp.asarray(quantized.qvalue).astype(jnp.float32)
    if quantized.zero is not None:
        levels = levels - expanded(quantized.zero)
    values = expanded(quantized.scale) * levels
    dtype = quantized.dtype if dtype is None else dtype
    # The largest code times the scale may round past the largest number of the dtype.
    largest = min(float(jnp.finfo(dtype).max), float(jnp.finfo(jnp.float32).max))
    return jnp.clip(values, -largest, largest).astype(dtype)


def _check_zero_point(bits: Bits, zero_point: bool) -> None:
    if zero_point and bits == 1:
        raise ValueError("zero_point needs a grid with a code for 0, which bits=1 does not have.")


def _check_all_finite(name: str, array: jax.Array) -> None:
    if not _checks.is_concrete(array) or not array.is_fully_addressable:
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
    x, info = array.astype(jnp.float32), jnp.finfo(jnp.float32)
    stored = round_scale(jnp.clip(t / high, info.tiny, info.max), scale_dtype)
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
    x, info = array.astype(jnp.float32), jnp.finfo(jnp.float32)
    search = best_scale_and_zero if t is None else _range_scale
    if t is not None:
        bound = granularity.expand(t, x.shape)
        x = jnp.clip(x, -bound, bound)
    blocks, axes = granularity.split(x)
    counts = jnp.asarray(granularity.block_counts(x.shape))
    scale, zero = (
        granularity.compact(part, x.ndim) for part in search(blocks, axes, counts, low, high)
    )
    stored = round_scale(jnp.clip(scale, info.tiny, info.max), scale_dtype)
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
    scale = jnp.maximum(top / (high - low) - bottom / (high - low), jnp.finfo(jnp.float32).tiny)
    zero = jnp.clip(low - jnp.round(quotient(bottom, scale)), low, high)
    return scale, zero


def _ratio(x: jax.Array, scale: jax.Array, granularity: Granularity) -> jax.Array:
    """`x` in units of the scale of its block."""
    return quotient(x, granularity.expand(scale, x.shape))
