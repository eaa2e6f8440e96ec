"""Low-bit grids: the integer codes, and the blocks of entries that share a scale.

w ~ scale * code,    low <= code <= high,    one scale per block
"""

import contextlib
import dataclasses
import math
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks

# A code width: 1, 2, 3, 4, 5, 6 or 8 bits, or "ternary" (three levels, 1.58 bits).
Bits: TypeAlias = Literal[1, 2, 3, 4, 5, 6, 8, "ternary"]
Levels: TypeAlias = Literal["full", "narrow", "balanced"]
Axis: TypeAlias = int | tuple[int, ...] | Literal["outputs"] | None
ScaleDtype: TypeAlias = Literal["float32", "float16", "bfloat16", "log8"]
_ALLOWED_BITS = (1, "ternary", 2, 3, 4, 5, 6, 8)
_LEVELS = get_args(Levels)
_BALANCED_BITS = (1, 2, 3, 4)
_SCALE_DTYPES = get_args(ScaleDtype)
_Array: TypeAlias = Any  # of NumPy or of jax; results are of the same kind


def code_range(bits: Bits | None, levels: Levels = "full") -> tuple[int, int]:
    """Returns the lowest and highest code; 1 bit is -1 and 1, ternary also has 0."""
    checks.check_choice("bits", bits, _ALLOWED_BITS)
    checks.check_choice("levels", levels, _LEVELS)
    if levels == "balanced":
        if bits not in _BALANCED_BITS:
            raise ValueError(f"levels='balanced' needs bits to be 1, 2, 3 or 4, got {bits!r}.")
        highest = 2 ** int(bits) - 1
        return -highest, highest
    if bits in (1, "ternary"):
        return -1, 1
    assert bits is not None
    half = 2 ** (int(bits) - 1)
    return (-half if levels == "full" else 1 - half), half - 1


class LevelRange(NamedTuple):
    """The ends of a grid's levels, in units of the distance between two; they may be traced."""

    low: float | jax.Array
    high: float | jax.Array
    has_zero: bool  # else levels are halves


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Grid:
    """A low-bit grid: its codes, and the entries that share a scale.

    | `bits`           | `levels="full"`           | `levels="narrow"`         |
    |------------------|---------------------------|---------------------------|
    | 1                | -1, 1                     | the same                  |
    | "ternary"        | -1, 0, 1                  | the same                  |
    | b = 2, 3 ... 8   | -2**(b-1) ... 2**(b-1)-1  | 1-2**(b-1) ... 2**(b-1)-1 |

    On a full grid the sign of the scale puts the longer side where it lowers the error. A balanced
    grid, `levels="balanced"` with 1 to 4 bits, has the odd codes from 1-2**b to 2**b-1: as many
    levels on both sides of 0, and none at 0. One bit is its smallest case.

    | `axis`, `group_size`      | one scale for                                             |
    |---------------------------|-----------------------------------------------------------|
    | axis=None                 | the whole array                                           |
    | axis=c                    | each index along the channel axis (or axes) c             |
    | axis=c, group_size=g      | g consecutive entries of a channel; its entries are those |
    |                           | along all other axes together, in row-major order         |
    | axis=None, group_size=g   | the same, with the first axis of two or more as c         |

    So a convolution kernel of shape (height, width, in, out) has groups along height * width * in.

    Attributes:
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary"; None where a budget chooses the width.
      levels: "full", "narrow" or "balanced"; narrow and balanced grids are symmetric.
      axis: Channel axis or axes, or None; or "outputs": in a tree or a file the output axes of
        each leaf by its layout, for a single array the last axis, as flax has it.
      group_size: Entries of a channel that share a scale, at least 1; None for no groups.
      zero_point: True to shift each block's grid by whole codes, so that its range may lie
        unevenly around 0. Not for 1 bit or balanced levels.
      scale_dtype: Format of the scales: float32, float16, bfloat16 (names or dtypes), or "log8",
        one byte per scale in steps of 9 %.

    Raises:
      TypeError: If `axis` or `zero_point` is of a wrong type.
      ValueError: If a field has a value that is not allowed.

    Example:
      >>> Grid(4).code_range, Grid(4, levels="narrow").code_range, Grid("ternary").code_range
      ((-8, 7), (-7, 7), (-1, 1))
      >>> Grid(2, levels="balanced").code_range
      (-3, 3)
      >>> Grid(4, group_size=64).scale_shape((128, 10))
      (2, 10)
    """

    bits: Bits | None
    _: dataclasses.KW_ONLY
    levels: Levels = "full"
    axis: Axis = "outputs"
    group_size: int | None = None
    zero_point: bool = False
    scale_dtype: ScaleDtype = "float32"

    if TYPE_CHECKING:  # takes dtypes too, where the field is a name

        def __init__(
            self,
            bits: Bits | None,
            *,
            levels: Levels = "full",
            axis: Axis = "outputs",
            group_size: int | None = None,
            zero_point: bool = False,
            scale_dtype: ScaleDtype | np.dtype | type = "float32",
        ) -> None: ...

    def __post_init__(self) -> None:
        checks.check_choice("levels", self.levels, _LEVELS)
        if self.bits is not None:
            code_range(self.bits, self.levels)
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        for a in axes if self.axis not in (None, "outputs") else ():
            if isinstance(a, bool) or not isinstance(a, (int, np.integer)):
                raise TypeError(
                    f"axis must be an integer, a tuple of them, None or 'outputs', got {a!r}."
                )
        if self.group_size is not None:
            checks.check_count("group_size", self.group_size)
            if self.group_size >= 2**63:  # which no file could hold
                raise ValueError(f"group_size must be at most 2**63 - 1, got {self.group_size}.")
            # Not NumPy's, in whose narrow types sizes would overflow.
            object.__setattr__(self, "group_size", int(self.group_size))
        if not isinstance(self.zero_point, (bool, np.bool_)):
            raise TypeError(f"zero_point must be True or False, got {self.zero_point!r}.")
        if self.zero_point and self.bits == 1:
            raise ValueError(
                "zero_point needs a code for 0, but a 1-bit grid has only -1 and 1: "
                "use bits='ternary' or 2."
            )
        if self.zero_point and self.levels == "balanced":
            raise ValueError("zero_point needs a code for 0, which levels='balanced' lacks.")
        object.__setattr__(self, "scale_dtype", _name_of_scale_dtype(self.scale_dtype))

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return code_range(self.bits, self.levels)

    @property
    def is_odd(self) -> bool:
        """True if the codes are odd numbers, so that none of them stands for 0."""
        return self.bits == 1 or self.levels == "balanced"

    def to_places(self, codes: _Array) -> _Array:
        """Returns the places of int8 codes on the grid, counted from the lowest; 8 bits wrap."""
        places = codes - np.int8(self.code_range[0])
        return places >> np.int8(1) if self.is_odd else places

    def from_places(self, places: _Array) -> _Array:
        """Returns the codes that `to_places` was given, int8."""
        codes = places * np.int8(2) if self.is_odd else places
        return codes + np.int8(self.code_range[0])

    @property
    def level_range(self) -> LevelRange:
        """The lowest and the highest level, in units of the distance between two levels."""
        low, high = self.code_range
        if self.is_odd:
            return LevelRange(low / 2, high / 2, has_zero=False)
        return LevelRange(low, high, has_zero=True)

    def nearest(self, ratio: _Array, zero: ArrayLike = 0) -> _Array:
        """Returns the nearest codes, as floats, for weights over their scales, of NumPy or jax."""
        xp = np if isinstance(ratio, np.ndarray) else jnp
        low, high = self.code_range
        if self.is_odd:
            return xp.clip(2 * xp.floor(ratio / 2) + 1, low, high)
        return xp.clip(xp.round(ratio) + zero, low, high)

    def channel_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the channel axes of an array of `ndim` dimensions, counted from 0."""
        if self.axis is None:
            return ()
        if self.axis == "outputs":
            return (ndim - 1,) if ndim else ()
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
        if self.axis == "outputs":
            return dataclasses.replace(self, axis=-1 if ndim else None)
        if isinstance(self.axis, tuple):
            axes = tuple(int(a) - ndim if a >= 0 else int(a) for a in self.axis)
            return dataclasses.replace(self, axis=axes)
        axis = int(self.axis)
        return dataclasses.replace(self, axis=axis - ndim if axis >= 0 else axis)

    def group_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes along which groups run together, in order; none without groups."""
        if self.group_size is None or ndim == 0:
            return ()
        apart = (0,) if self.axis is None and ndim > 1 else self.channel_axes(ndim)
        axes = tuple(a for a in range(ndim) if a not in apart)
        if not axes:
            raise ValueError(
                f"group_size={self.group_size} needs an axis that is not a channel axis; "
                f"axis={self.axis} takes all {ndim}."
            )
        return axes

    def group_size_of(self, shape: tuple[int, ...]) -> int:
        """Returns the entries of a full group of an array: at most those of a channel."""
        axes = self.group_axes(len(shape))
        length = math.prod(shape[a] for a in axes)
        return max(min(self.group_size or 1, length), 1) if axes else 1

    def rows_of_a_group(self, shape: tuple[int, ...]) -> int | None:
        """Returns how many rows a group runs through; None if groups take parts of many rows."""
        axes = self.group_axes(len(shape))
        if axes == (0,):
            return self.group_size_of(shape)
        return None if 0 in axes else 1

    def fitted(self, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> "Grid":
        """Returns a grid for a stack: leading axes that stack whole arrays become channel axes."""
        # An array of one grid may have been stacked or batched since. Its scales show how often;
        # if a stack has one array, both readings of its shape are the same.
        if self.group_size is None or self.scale_shape(shape) == scale_shape:
            return self
        ndim = len(shape)
        for num_stacked in range(1, ndim):
            try:
                own = self.group_axes(ndim - num_stacked)
            except ValueError:  # too few axes for this grid
                break
            channels = {a for a in range(ndim) if a - num_stacked not in own}
            axis = tuple(a - ndim for a in sorted(channels))
            stacked = dataclasses.replace(self, axis=axis)
            if stacked.scale_shape(shape) == scale_shape:
                return stacked
        return self

    def split(self, x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """Returns `x` cut into groups (zero-padded), and the axes to reduce for one value each."""
        axes = self.group_axes(x.ndim)
        if not axes:
            channels = self.channel_axes(x.ndim)
            return x, tuple(a for a in range(x.ndim) if a not in channels)
        size, place = self.group_size_of(x.shape), axes[-1] - len(axes) + 1
        x = _merged(x, axes)
        groups = -(-x.shape[place] // size)
        padding = [(0, 0)] * x.ndim
        padding[place] = (0, groups * size - x.shape[place])
        x = jnp.pad(x, padding) if padding[place][1] else x
        return x.reshape(*x.shape[:place], groups, size, *x.shape[place + 1 :]), (place + 1,)

    def block_counts(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the entries of each block without padding; broadcasts against kept dims."""
        ndim, axes = len(shape), self.group_axes(len(shape))
        if not axes:
            channels = self.channel_axes(ndim)
            reduced = [n for a, n in enumerate(shape) if a not in channels]
            return np.asarray(max(int(np.prod(reduced)), 1), np.float32)
        size, length = self.group_size_of(shape), math.prod(shape[a] for a in axes)
        counts = np.minimum(size, length - size * np.arange(-(-length // size)))
        kept = [1] * (axes[-1] - len(axes) + 1) + [-1, 1] + [1] * (ndim - axes[-1] - 1)
        return counts.astype(np.float32).reshape(kept)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the scales of an array: 1 for each axis that shares them."""
        # Groups are counted along the last of their axes.
        axes, channels = self.group_axes(len(shape)), self.channel_axes(len(shape))
        if not axes:
            return tuple(n if a in channels else 1 for a, n in enumerate(shape))
        groups = -(-math.prod(shape[a] for a in axes) // self.group_size_of(shape))
        sizes = {a: groups if a == axes[-1] else 1 for a in axes}
        return tuple(sizes.get(a, n) for a, n in enumerate(shape))

    def compact(self, per_block: jax.Array, ndim: int) -> jax.Array:
        """Returns one value a block, reduced with kept dims, in the shape of the scales."""
        axes = self.group_axes(ndim)
        if not axes:
            return per_block
        per_block = jnp.squeeze(per_block, axes[-1] - len(axes) + 2)
        return jnp.expand_dims(per_block, axes[:-1]) if len(axes) > 1 else per_block

    def expand(self, compact: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns values in the shape of the scales, repeated to broadcast against `shape`."""
        return self.expand_with(jnp, compact, shape)

    def expand_with(self, xp: ModuleType, compact: Any, shape: tuple[int, ...]) -> Any:
        """Returns the values of `expand`, made with `jax.numpy` or NumPy."""
        grid = self.fitted(shape, tuple(compact.shape))
        axes = grid.group_axes(len(shape))
        if not axes:
            return compact
        if (wanted := grid.scale_shape(shape)) != tuple(compact.shape):
            raise ValueError(
                f"an array of shape {shape} with axis={self.axis} and group_size={self.group_size} "
                f"must have scales of shape {wanted}, got {tuple(compact.shape)}. In a batch, "
                "channel axes must be counted from the end."
            )
        place, length = axes[-1] - len(axes) + 1, math.prod(shape[a] for a in axes)
        joined = xp.squeeze(compact, axes[:-1])
        repeated = xp.repeat(joined, grid.group_size_of(shape), axis=place)
        repeated = repeated[(slice(None),) * place + (slice(length),)]
        if len(axes) == 1:
            return repeated
        group_shape = (shape[a] for a in axes)
        split = repeated.reshape(*joined.shape[:place], *group_shape, *joined.shape[place + 1 :])
        return xp.transpose(split, np.argsort(_joining_order(axes, len(shape))))


def _joining_order(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Returns the order of axes in which `axes` follow each other and end where their last is."""
    before = [a for a in range(axes[-1]) if a not in axes]
    return (*before, *axes, *range(axes[-1] + 1, ndim))


def _merged(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns `x` with some axes as one, row-major, in the place of their last."""
    if len(axes) == 1:
        return x
    order = _joining_order(axes, x.ndim)
    if order != tuple(range(x.ndim)):
        x = jnp.transpose(x, order)
    place = axes[-1] - len(axes) + 1
    length = math.prod(x.shape[place : axes[-1] + 1])
    return x.reshape(*x.shape[:place], length, *x.shape[axes[-1] + 1 :])


def _name_of_scale_dtype(scale_dtype: Any) -> ScaleDtype:
    if not isinstance(scale_dtype, str):
        with contextlib.suppress(TypeError):  # not a dtype: the check below names it as given
            scale_dtype = jnp.dtype(scale_dtype).name
    checks.check_choice("scale_dtype", scale_dtype, _SCALE_DTYPES)
    return cast(ScaleDtype, scale_dtype)


WHOLE_ARRAY = Grid(None, axis=None)  # one block, of a width still to be chosen


def as_grid(bits: Bits | Grid, *, axis: Axis) -> Grid:
    """Returns a grid as it is, and a bare width as a grid with this channel axis."""
    grid = bits if isinstance(bits, Grid) else Grid(bits, axis=axis)
    checks.check_choice("bits", grid.bits, _ALLOWED_BITS)  # None needs a budget, and none is here
    return grid
