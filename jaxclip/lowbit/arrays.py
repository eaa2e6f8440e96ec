"""Low-bit arrays: integer codes and scales, and the array that they stand for.

    w ~ scale * (code - zero)

One scale, and one zero where there is a zero point, for each block of the grid.
"""

import dataclasses
import functools
import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core.dense_methods import DenseMethods
from jaxclip._core.floats import cast, saturate
from jaxclip._core.grids import Bits, Grid
from jaxclip.lowbit.packing import num_packed_bytes
from jaxclip.lowbit.scale_formats import dtype_in_memory

_CODE_DTYPES = ("int8", "int4", "int2")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("qvalue", "scale", "zero"),
    meta_fields=("grid", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray(DenseMethods):
    """An array as integer codes and scales, a pytree that passes through jit and vmap.

    jax.numpy and NumPy take it as the array that it stands for, and its operators and methods are
    those of that array: `jnp.dot(x, q)`, `x @ q`, `q * 2`, `q.T`, `q.astype(jnp.bfloat16)`,
    `q[0]`. Results are plain arrays. Functions of `jax.lax` need `jnp.asarray(q)`.
    Arrays from `quantize` stay right when they are stacked or batched along a new first axis,
    because their channel axes are counted from the end.

    These equations hold, and `validate` checks them:

        array == scale * (qvalue - zero)                   zero None counts as 0
        low <= qvalue <= high, low <= zero <= high         low, high = grid.code_range
        qvalue != 0                                        for one bit
        scale != 0 and finite                              scale > 0 with a zero point
        scale.shape == zero.shape == fitted_grid.scale_shape(qvalue.shape)

    Attributes:
      qvalue: Codes in the array's shape: int8, or int4 or int2 after `with_code_dtype`.
      scale: float32, float16 or bfloat16; of length 1 along shared axes, and one per group along
        the last of the axes that groups run along.
      grid: The codes and the blocks that share a scale; from `quantize` with negative axes.
      dtype: Dtype of the array that was quantized, and of `dequantize`'s result.
      zero: int8, in the shape of `scale`; None without a zero point.
    """

    qvalue: jax.Array
    scale: jax.Array
    grid: Grid
    dtype: Any
    zero: jax.Array | None = None

    @property
    def bits(self) -> Bits:
        """Width of the codes: 1, 2, 3, 4, 5, 6, 8 or "ternary"."""
        assert self.grid.bits is not None
        return self.grid.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions of the array."""
        return len(self.shape)

    @property
    def fitted_grid(self) -> Grid:
        """The grid with the axes along which arrays were stacked as channel axes."""
        return self.grid.fitted(self.shape, tuple(self.scale.shape))

    @property
    def size(self) -> int:
        """Number of entries of the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros in memory; `num_bytes` counts them packed."""
        parts = jax.tree.leaves(self)
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed codes, scales and zeros, as a file stores them."""
        return num_stored_bytes(self.shape, math.prod(self.scale.shape), self.grid)

    @property
    def threshold(self) -> jax.Array:
        """The clip threshold of each block, float32.

        `|scale| * high`; with a zero point, the magnitude of the level that is farthest from 0.
        """
        low, high = self.grid.code_range
        step = jnp.abs(jnp.asarray(self.scale).astype(jnp.float32))
        if self.zero is None:
            return step * high
        zero = jnp.asarray(self.zero).astype(jnp.float32)
        return step * jnp.maximum(high - zero, zero - low)

    def __jax_array__(self) -> jax.Array:
        return dequantize(self)

    def with_code_dtype(self, dtype: DTypeLike) -> "QuantizedArray":
        """Returns the same array with its codes in int8, int4 or int2.

        Args:
          dtype: `jnp.int8`, `jnp.int4` or `jnp.int2`; int2 needs jax 0.10 or newer, because
            older versions compute wrong numbers from it on CPU.

        Returns:
          A `QuantizedArray` that decodes to the same bits.

        Raises:
          TypeError: If `dtype` is none of these.
          ValueError: If the codes do not fit, or jax is too old.
        """
        name = jnp.dtype(dtype).name
        if name not in _CODE_DTYPES:
            raise TypeError(f"dtype must be one of {_CODE_DTYPES}, got {name}.")
        if name == "int2" and jax.__version_info__ < (0, 10):
            raise ValueError(
                f"dtype int2 needs jax 0.10 or newer, got {jax.__version__}, which computes wrong "
                "numbers from it on CPU. Use jnp.int4."
            )
        low, high = self.grid.code_range
        half = 2 ** (int(name.removeprefix("int")) - 1)
        if low < -half or high > half - 1:
            raise ValueError(f"dtype {name} does not hold the codes of bits={self.bits!r}.")
        return dataclasses.replace(self, qvalue=jnp.asarray(self.qvalue).astype(dtype))

    def validate(self, name: str = "array") -> None:
        """Raises unless all equations of the class hold.

        Args:
          name: Name of the array in errors.

        Raises:
          TypeError: If `dtype` is not floating.
          ValueError: If a part has a wrong dtype, shape or value; the message names the part.
        """
        self.check_parts(name)
        self.check_values(name)
        self.check_codes(np.asarray(self.qvalue), name)

    def check_parts(self, name: str) -> None:
        """Raises unless dtypes and shapes of the parts fit; needs no values."""
        self._check_grid(name)
        if jnp.dtype(self.qvalue.dtype).name not in _CODE_DTYPES:
            raise ValueError(
                f"QuantizedArray {name!r} of shape {self.shape} must have codes of a dtype in "
                f"{_CODE_DTYPES}, got {self.qvalue.dtype}."
            )
        self._check_part(name, "scale", self.scale, dtype_in_memory(self.grid.scale_dtype))
        if self.zero is not None:
            self._check_part(name, "zero", self.zero, "int8")

    def _check_grid(self, name: str) -> None:
        """Raises unless the grid fits the array."""
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise TypeError(f"QuantizedArray {name!r} must stand for a float, got {self.dtype}.")
        if self.grid.bits is None or self.grid.zero_point != (self.zero is not None):
            raise ValueError(
                f"QuantizedArray {name!r} must have a grid with bits, and a zero if and only if "
                f"it has a zero point, got {self.grid}."
            )
        try:
            self.grid.scale_shape(self.shape)
        except ValueError as error:
            raise ValueError(f"QuantizedArray {name!r}: {error}") from error

    def _check_part(self, name: str, part: str, array: jax.Array, dtype: str) -> None:
        """Raises unless `array` has the dtype, and one value for each block."""
        shape = self.fitted_grid.scale_shape(self.shape)
        if (array.dtype, tuple(array.shape)) != (jnp.dtype(dtype), shape):
            raise ValueError(
                f"QuantizedArray {name!r} of shape {self.shape} must have {part} of dtype "
                f"{dtype} and shape {shape}, got {array.dtype} and {tuple(array.shape)}."
            )

    def check_values(self, name: str) -> None:
        """Raises unless scales and zeros have values that the class allows."""
        scale = np.asarray(self.scale).astype(np.float32, copy=False)
        # Methods, not functions of NumPy: a file may have a million small leaves.
        if not (np.isfinite(scale).all() and scale.all()):
            raise ValueError(f"{name!r}: scales must be finite and not 0.")
        if self.zero is not None:
            low, high = self.grid.code_range
            zero = np.asarray(self.zero)
            if not (np.all(scale > 0) and np.all((low <= zero) & (zero <= high))):
                raise ValueError(
                    f"{name!r}: with a zero point scales must be positive and zeros in "
                    f"[{low}, {high}]."
                )

    def check_codes(self, codes: np.ndarray, name: str) -> None:
        """Raises unless `codes`, some of the array's, are on the grid."""
        low, high = self.grid.code_range
        codes = codes.astype(np.int8, copy=False)
        inside = low <= codes.min(initial=high) and codes.max(initial=low) <= high
        if not inside or (self.grid.is_odd and not (codes & 1).all()):
            raise ValueError(f"{name!r}: codes are not in the range of bits={self.bits!r}.")


def num_stored_bytes(shape: tuple[int, ...], num_blocks: int, grid: Grid) -> int:
    """Returns the bytes of packed codes, scales and zeros of an array in so many blocks."""
    assert grid.bits is not None
    return num_packed_bytes(math.prod(shape), grid.bits) + num_side_bytes(num_blocks, grid)


def num_side_bytes(num_blocks: int, grid: Grid) -> int:
    """Returns the bytes of scales and zeros."""
    is_log8 = grid.scale_dtype == "log8"
    per_block = 1 if is_log8 else jnp.dtype(grid.scale_dtype).itemsize
    # log8 also stores its largest scale, a float32.
    return num_blocks * (per_block + grid.zero_point) + 4 * is_log8


def dequantize(quantized: QuantizedArray, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns `scale * (code - zero)`, the array that a `QuantizedArray` stands for.

    Args:
      quantized: A low-bit array, from `quantize` or from a file.
      dtype: Floating dtype of the result; None for the dtype that was quantized. Values beyond it
        become its largest number.

    Returns:
      An array in the original shape, multiplied in float32 and cast once. Inside jit it
      fuses into its consumer. It is float32 instead of float64 where jax has no float64.

    Raises:
      ValueError: If groups do not fit the shape. That happens if codes or scales were sliced.

    Example:
      >>> from jaxclip import quantize
      >>> dequantize(quantize(jnp.array([0.9, -1.1, 0.25]), "ternary", threshold=0.5))
      Array([ 0.5, -0.5,  0. ], dtype=float32)
    """
    if dtype is None:  # a file may be compressed from float64, which jax may have disabled
        dtype = jax.dtypes.canonicalize_dtype(quantized.dtype)
    return _dequantize(quantized, jnp.finfo(dtype).dtype)  # raises unless it is floating


# Compiled, because single operations are much slower; inlined, so that it fuses in a program.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def _dequantize(quantized: QuantizedArray, dtype: np.dtype) -> jax.Array:
    """Returns the array in a dtype that jax has."""

    def expanded(part: ArrayLike) -> jax.Array:
        part = quantized.grid.expand(jnp.asarray(part), quantized.shape)
        return part.astype(jnp.float32)

    levels = jnp.asarray(quantized.qvalue).astype(jnp.float32)
    if quantized.zero is not None:
        levels = levels - expanded(quantized.zero)
    values = expanded(quantized.scale) * levels
    # The largest code times the scale may round past the largest number of the dtype.
    return saturate(values, jnp.finfo(dtype).dtype).astype(dtype)


def dequantize_stored(quantized: QuantizedArray, dtype: DTypeLike | None, name: str) -> np.ndarray:
    """Returns the array in NumPy, which always has float64; raises if a value is beyond `dtype`."""
    own = jnp.dtype(quantized.dtype)
    target = own if dtype is None else jnp.dtype(dtype)
    if target == own and own != np.float64:
        return np.asarray(dequantize(quantized))
    # As `dequantize` does: a value just beyond the leaf's own dtype is its largest number.
    values = saturate(dequantize(quantized, jnp.float32), own)
    return cast(name, np.asarray(values), target)


def is_quantized(leaf: Any) -> TypeGuard[QuantizedArray]:
    """Returns True if a leaf is low-bit."""
    return isinstance(leaf, QuantizedArray)
