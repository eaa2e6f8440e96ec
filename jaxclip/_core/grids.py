"""Low-bit grids: the integer codes, and the blocks of entries that share a scale.

w ~ scale * code,    low <= code <= high,    one scale per block
"""

import contextlib
import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._core import checks

# A code width: 1, 2, 3, 4, 5, 6 or 8 bits, or "ternary" (three levels, 1.58 bits).
Bits: TypeAlias = int | str
_ALLOWED_BITS = (1, "ternary", 2, 3, 4, 5, 6, 8)
_LEVELS = ("full", "narrow")
_SCALE_DTYPES = ("float32", "float16", "bfloat16", "log8")


def code_range(bits: Bits | None, levels: str = "full") -> tuple[int, int]:
    """Returns the lowest and highest code; 1 bit is -1 and 1, ternary also has 0."""
    checks.check_choice("bits", bits, _ALLOWED_BITS)
    checks.check_choice("levels", levels, _LEVELS)
    if bits in (1, "ternary"):
        return -1, 1
    assert bits is not None
    half = 2 ** (int(bits) - 1)
    return (-half if levels == "full" else 1 - half), half - 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Grid:
    """A low-bit grid: its codes, and the entries that share a scale.

    | `bits`           | `levels="full"`           | `levels="narrow"`         |
    |------------------|---------------------------|---------------------------|
    | 1                | -1, 1                     | the same                  |
    | "ternary"        | -1, 0, 1                  | the same                  |
    | b = 2, 3 ... 8   | -2**(b-1) ... 2**(b-1)-1  | 1-2**(b-1) ... 2**(b-1)-1 |

    On a full grid the sign of the scale puts the longer side where it lowers the error.

    | `axis`, `group_size`      | one scale for                                             |
    |---------------------------|-----------------------------------------------------------|
    | axis=None                 | the whole array                                           |
    | axis=c                    | each index along the channel axis (or axes) c             |
    | axis=c, group_size=g      | g consecutive entries along the last axis that is not     |
    |                           | a channel axis; all other axes stay apart                 |

    Attributes:
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary"; None where a budget chooses the width.
      levels: "full" or "narrow"; the narrow grid is symmetric.
      axis: Channel axis or axes, or None. The last is an output channel in flax's layouts, the
        first in PyTorch's.
      group_size: Entries that share a scale along the last non-channel axis, at least 1; None
        for no groups.
      zero_point: True to shift each block's grid by whole codes, so that its range may lie
        unevenly around 0. Not for 1 bit.
      scale_dtype: Format of the scales: float32, float16, bfloat16 (names or dtypes), or "log8",
        one byte per scale in steps of 9 %.

    Raises:
      TypeError: If `axis` or `zero_point` is of a wrong type.
      ValueError: If a field has a value that is not allowed.

    Example:
      >>> Grid(4).code_range, Grid(4, levels="narrow").code_range, Grid("ternary").code_range
      ((-8, 7), (-7, 7), (-1, 1))
      >>> Grid(4, group_size=64).scale_shape((128, 10))
      (2, 10)
    """

    bits: Bits | None
    _: dataclasses.KW_ONLY
    levels: str = "full"
    axis: int | tuple[int, ...] | None = -1
    group_size: int | None = None
    zero_point: bool = False
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.bits is not None:
            checks.check_choice("bits", self.bits, _ALLOWED_BITS)
        checks.check_choice("levels", self.levels, _LEVELS)
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        for a in axes if self.axis is not None else ():
            if isinstance(a, bool) or not isinstance(a, (int, np.integer)):
                raise TypeError(f"axis must be an integer, a tuple of them or None, got {a!r}.")
        if self.group_size is not None:
            checks.check_count("group_size", self.group_size)
        if not isinstance(self.zero_point, (bool, np.bool_)):
            raise TypeError(f"zero_point must be True or False, got {self.zero_point!r}.")
        if self.zero_point and self.bits == 1:
            raise ValueError(
                "zero_point needs a code for 0, but a 1-bit grid has only -1 and 1: "
                "use bits='ternary' or 2."
            )
        object.__setattr__(self, "scale_dtype", _name_of_scale_dtype(self.scale_dtype))

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return code_range(self.bits, self.levels)

    def channel_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the channel axes of an array of `ndim` dimensions, counted from 0."""
        if self.axis is None:
            return ()
        given = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        for a in given:
            if not -ndim <= a < ndim:
                raise ValueError(f"axis must be in [{-ndim}, {ndim}) for this array, got {a}.")
        return tuple(sorted({a % ndim for a in given}))

    def from_the_end(self, ndim: int) -> "Grid":
        """Returns the same grid with negative axes, for an array of `ndim` dimensions."""
        # Negative axes stay right when vmap or a stack adds leading axes.
        self.channel_axes(ndim)  # refuses axes that the array does not have
        if self.axis is None:
            return self
        if isinstance(self.axis, tuple):
            axes = tuple(int(a) - ndim if a >= 0 else int(a) for a in self.axis)
            return dataclasses.replace(self, axis=axes)
        axis = int(self.axis)
        return dataclasses.replace(self, axis=axis - ndim if axis >= 0 else axis)

    def group_axis(self, ndim: int) -> int | None:
        """Returns the axis that is split into groups, or None."""
        if self.group_size is None or ndim == 0:
            return None
        free = [a for a in range(ndim) if a not in self.channel_axes(ndim)]
        if not free:
            raise ValueError(
                f"group_size={self.group_size} needs an axis that is not a channel axis; "
                f"axis={self.axis} takes all {ndim}."
            )
        return free[-1]

    def group_size_of(self, shape: tuple[int, ...]) -> int:
        """Returns the entries of a full group of an array: at most those of its group axis."""
        axis = self.group_axis(len(shape))
        return 1 if axis is None else max(min(self.group_size or 1, shape[axis]), 1)

    def split(self, x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """Returns `x` with its group axis split in two (zero-padded), and the axes to reduce."""
        axis = self.group_axis(x.ndim)
        if axis is None:
            channels = self.channel_axes(x.ndim)
            return x, tuple(a for a in range(x.ndim) if a not in channels)
        size = self.group_size_of(x.shape)
        groups = -(-x.shape[axis] // size)
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, groups * size - x.shape[axis])
        x = jnp.pad(x, padding) if padding[axis][1] else x
        return x.reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :]), (axis + 1,)

    def block_counts(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the entries of each block without padding; broadcasts against kept dims."""
        ndim, axis = len(shape), self.group_axis(len(shape))
        if axis is None:
            channels = self.channel_axes(ndim)
            reduced = [n for a, n in enumerate(shape) if a not in channels]
            return np.asarray(max(int(np.prod(reduced)), 1), np.float32)
        size, length = self.group_size_of(shape), shape[axis]
        counts = np.minimum(size, length - size * np.arange(-(-length // size)))
        kept = [1] * axis + [-1, 1] + [1] * (ndim - axis - 1)
        return counts.astype(np.float32).reshape(kept)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the scales of an array: 1 for each axis that shares them."""
        axis, channels = self.group_axis(len(shape)), self.channel_axes(len(shape))
        if axis is None:
            return tuple(n if a in channels else 1 for a, n in enumerate(shape))
        groups = -(-shape[axis] // self.group_size_of(shape))
        return (*shape[:axis], groups, *shape[axis + 1 :])

    def compact(self, per_block: jax.Array, ndim: int) -> jax.Array:
        """Returns one value a block, reduced with kept dims, in the shape of the scales."""
        axis = self.group_axis(ndim)
        return per_block if axis is None else jnp.squeeze(per_block, axis + 1)

    def expand(self, compact: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns values in the shape of the scales, repeated to broadcast against `shape`."""
        axis = self.group_axis(len(shape))
        if axis is None:
            return compact
        if (wanted := self.scale_shape(shape)) != tuple(compact.shape):
            raise ValueError(
                f"an array of shape {shape} with axis={self.axis} and group_size={self.group_size} "
                f"must have scales of shape {wanted}, got {tuple(compact.shape)}. In a batch, "
                "channel axes must be counted from the end."
            )
        repeated = jnp.repeat(compact, self.group_size_of(shape), axis=axis)
        return lax.slice_in_dim(repeated, 0, shape[axis], axis=axis)


def _name_of_scale_dtype(scale_dtype: Any) -> str:
    if not isinstance(scale_dtype, str):
        with contextlib.suppress(TypeError):  # not a dtype: the check below names it as given
            scale_dtype = jnp.dtype(scale_dtype).name
    checks.check_choice("scale_dtype", scale_dtype, _SCALE_DTYPES)
    return scale_dtype


WHOLE_ARRAY = Grid(None, axis=None)  # one block, of a width still to be chosen


def as_grid(bits: Bits | Grid, *, axis: int | tuple[int, ...] | None) -> Grid:
    """Returns a grid as it is, and a bare width as a grid with this channel axis."""
    grid = bits if isinstance(bits, Grid) else Grid(bits, axis=axis)
    checks.check_choice("bits", grid.bits, _ALLOWED_BITS)  # None needs a budget, and none is here
    return grid
