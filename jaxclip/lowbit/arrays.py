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
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core.dense_methods import DenseMethods
from jaxclip._core.floats import cast, saturate
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.html import can_be_read, html_report, svg_bars
from jaxclip.lowbit.packed_codes import Packing, codes_per_byte, pack_along, unpack_along
from jaxclip.lowbit.packing import count_codes, num_stored_bytes
from jaxclip.lowbit.products import matmul
from jaxclip.lowbit.scale_formats import dtype_in_memory

_CODE_DTYPES = ("int8", "int4", "int2")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("qvalue", "scale", "zero"),
    meta_fields=("grid", "dtype", "packing"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class QuantizedArray(DenseMethods):
    """An array as integer codes and scales, a pytree that passes through jit and vmap.

    jax.numpy and NumPy take it as the array that it stands for, and its operators and methods are
    those of that array: `jnp.dot(x, q)`, `x @ q`, `q * 2`, `q.T`, `q.astype(jnp.bfloat16)`,
    `q[0]`. Results are plain arrays. Functions of `jax.lax` need `jnp.asarray(q)`.
    All decode the whole array, but for `lowbit.matmul(x, q)` and `q @ y`, which decode tiles.
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
      packing: Axis along which `qvalue` has packed bytes (uint8), and its length; None for one
        code an entry.
    """

    qvalue: jax.Array
    scale: jax.Array
    grid: Grid
    dtype: Any
    zero: jax.Array | None = None
    packing: Packing | None = None

    @property
    def bits(self) -> Bits:
        """Width of the codes: 1, 2, 3, 4, 5, 6, 8 or "ternary"."""
        assert self.grid.bits is not None
        return self.grid.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        shape = self.qvalue.shape
        return shape if self.packing is None else self.packing.shape_of(shape)

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

    def __repr__(self) -> str:
        if not all(hasattr(part, "dtype") for part in (self.qvalue, self.scale)):
            # A map over the tree may have put anything in the place of codes and scales.
            return f"QuantizedArray(qvalue={self.qvalue!r}, scale={self.scale!r}, {self.grid!r})"
        text = f"shape={self.shape}, dtype={jnp.dtype(self.dtype).name}, bits={self.bits!r}"
        return f"QuantizedArray({text}, num_bytes={self.num_bytes})"

    def _repr_html_(self) -> str:
        if not can_be_read(self.qvalue):
            return html_report(repr(self))
        low, high = self.grid.code_range
        counts = count_codes(np.asarray(self.unpacked().qvalue), low, high)
        label = f"weights with each code, {low} to {high}: at most {counts.max():,}"
        return html_report(repr(self), svg_bars(counts, label))

    def can_be_cut(self, axis: int, size: int) -> bool:
        """Returns True if parts of so many entries along an axis have whole bytes and blocks."""
        packing, groups = self.packing, self.fitted_grid.group_axes(self.ndim)
        is_packed = packing is not None and packing.axis % self.ndim == axis
        block = self.fitted_grid.group_size_of(self.shape) if axis in groups else 1
        has_blocks = len(groups) < 2 and (size % block == 0 or block % size == 0)
        return has_blocks and (not is_packed or size % codes_per_byte(self.bits) == 0)

    def part(self, axis: int, start: jax.Array, size: int) -> "QuantizedArray":
        """Returns the entries of a matrix from `start` on along an axis, where it can be cut."""

        def blocks_of(array: jax.Array) -> jax.Array:
            count = array.shape[axis]
            if count == 1:
                return array
            block = 1 if count == self.shape[axis] else self.fitted_grid.group_size_of(self.shape)
            return lax.dynamic_slice_in_dim(array, start // block, -(-size // block), axis)

        per_byte, packing = 1, self.packing
        if packing is not None and packing.axis % self.ndim == axis:
            per_byte, packing = codes_per_byte(self.bits), packing._replace(length=size)
        count = -(-size // per_byte)
        codes = lax.dynamic_slice_in_dim(self.qvalue, start // per_byte, count, axis)
        zero = None if self.zero is None else blocks_of(self.zero)
        scale = blocks_of(self.scale)
        return QuantizedArray(codes, scale, self.fitted_grid, self.dtype, zero, packing)

    def as_stack(self) -> "QuantizedArray | None":
        """Returns the array for `lax.map` over its first axis; None if blocks run along it."""
        grid, ndim = self.fitted_grid, self.ndim
        groups = grid.group_axes(ndim)
        apart = [a for a in range(ndim) if a not in groups] if groups else grid.channel_axes(ndim)
        if 0 in groups or (self.packing is not None and self.packing.axis == -ndim):
            return None
        grid = dataclasses.replace(grid, axis=tuple(a - ndim for a in apart if a))

        def stacked(part: jax.Array) -> jax.Array:
            return jnp.broadcast_to(part, (self.shape[0], *part.shape[1:]))

        zero = None if self.zero is None else stacked(self.zero)
        return dataclasses.replace(self, scale=stacked(self.scale), zero=zero, grid=grid)

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
        codes = jnp.asarray(self.unpacked().qvalue).astype(dtype)
        return dataclasses.replace(self, qvalue=codes, packing=None)

    def packed(self) -> "QuantizedArray":
        """Returns the same array with its codes packed in bytes: 2 bits a weight for 2-bit codes.

        Codes that follow each other along one axis share bytes, if possible not along the last, so
        that shifts decode a tile. Ternary codes take 2 bits, those of 3 bits 4; the axis is padded
        to whole bytes. Codes of 5, 6 and 8 bits stay int8. What takes a `QuantizedArray` takes it
        packed, and files are the same. `unpacked` is the inverse.

        Example:
          >>> from jaxclip import quantize
          >>> q = quantize(jnp.ones((128, 10)), 2)
          >>> q.nbytes, q.packed().nbytes  # with a scale of 4 bytes
          (1284, 324)
        """
        if self.packing is not None or codes_per_byte(self.bits) == 1 or not self.ndim:
            return self
        packing = Packing.of(self.shape, self.bits)
        codes = self.qvalue.astype(np.int8)
        pack = pack_along if isinstance(codes, np.ndarray) else _jitted_pack
        codes = pack(codes, packing, self.bits, self.grid.levels)
        return dataclasses.replace(self, qvalue=codes, packing=packing)

    def unpacked(self) -> "QuantizedArray":
        """Returns the same array with one code an entry: int8 if it was packed."""
        if self.packing is None:
            return self
        unpack = unpack_along if isinstance(self.qvalue, np.ndarray) else _jitted_unpack
        codes = unpack(self.qvalue, self.packing, self.bits, self.grid.levels)
        return dataclasses.replace(self, qvalue=codes, packing=None)

    def __matmul__(self, other: ArrayLike) -> jax.Array:
        return matmul(self, other)

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
        self.check_codes(np.asarray(self.unpacked().qvalue), name)

    def check_parts(self, name: str) -> None:
        """Raises unless dtypes and shapes of the parts fit; needs no values."""
        self._check_grid(name)
        if self.packing is not None:
            self._check_packing(name, self.packing)
        elif jnp.dtype(self.qvalue.dtype).name not in _CODE_DTYPES:
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

    def _check_packing(self, name: str, packing: Packing) -> None:
        """Raises unless packed codes have the bytes of the array."""
        rows, found = packing.num_rows(self.bits), self.qvalue.shape[packing.axis]
        if self.qvalue.dtype != np.uint8 or found != rows:
            raise ValueError(
                f"QuantizedArray {name!r} must have packed codes of dtype uint8 and {rows} bytes "
                f"along axis {packing.axis}, got {self.qvalue.dtype} and {found}."
            )

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


_jitted_pack = jax.jit(pack_along, static_argnums=(1, 2, 3), inline=True)
_jitted_unpack = jax.jit(unpack_along, static_argnums=(1, 2, 3), inline=True)


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

    levels = jnp.asarray(quantized.unpacked().qvalue).astype(jnp.float32)
    if quantized.zero is not None:
        levels = levels - expanded(quantized.zero)
    values = expanded(quantized.scale) * levels
    # The largest code times the scale may round past the largest number of the dtype.
    return saturate(values, jnp.finfo(dtype).dtype).astype(dtype)


def dequantize_stored(quantized: QuantizedArray, dtype: DTypeLike | None, name: str) -> np.ndarray:
    """Returns the array in NumPy, which always has float64; raises if a value is beyond `dtype`."""
    own = jnp.dtype(quantized.dtype)
    target = jnp.finfo(own if dtype is None else dtype).dtype  # raises unless it is floating
    if target == own and own != np.float64:
        return np.asarray(dequantize(quantized))
    # As `dequantize` does: a value just beyond the leaf's own dtype is its largest number.
    values = saturate(dequantize(quantized, jnp.float32), own)
    return cast(name, np.asarray(values), target)


def is_quantized(leaf: Any) -> TypeGuard[QuantizedArray]:
    """Returns True if a leaf is low-bit."""
    return isinstance(leaf, QuantizedArray)
