"""Low-bit grids: which integer codes there are, and which entries share a scale.

`axis` and `group_size` say what has a threshold, or a scale, of its own:

    axis=None                 one for the array
    axis=c                    one for each index along the channel axis (or axes) c
    axis=c, group_size=g      one for every g consecutive entries along the last axis that
                              is not a channel axis; all other axes stay apart
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._core import checks

Bits = int | str
"""A code width: 1, 2, 3, 4, 5, 6 or 8 bits, or "ternary" (three levels, 1.58 bits)."""
_ALLOWED_BITS = (1, "ternary", 2, 3, 4, 5, 6, 8)


def code_range(bits: Bits, full_signed: bool = True) -> tuple[int, int]:
    """Returns the lowest and highest integer code of a grid.

    Args:
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary".
      full_signed: Whether two bits or more use the level -2**(bits-1) too; with a signed
        scale the longer side goes where it helps.

    Returns:
      `(lowest, highest)`. One bit is (-1, 1) without 0; ternary (-1, 1) with it.

    Raises:
      ValueError: If `bits` is none of these.

    Example:
      >>> code_range(4), code_range(4, full_signed=False), code_range("ternary")
      ((-8, 7), (-7, 7), (-1, 1))
    """
    checks.check_choice("bits", bits, _ALLOWED_BITS)
    if bits in (1, "ternary"):
        return -1, 1
    half = 2 ** (int(bits) - 1)
    return (-half if full_signed else 1 - half), half - 1


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Which entries of an array share a threshold; see the module's docstring.

    Attributes:
      axis: Channel axis or axes, or None for one threshold for all.
      group_size: Entries that share a threshold along the last non-channel axis, or None.
    """

    axis: int | tuple[int, ...] | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        for a in axes if self.axis is not None else ():
            if isinstance(a, bool) or not isinstance(a, (int, np.integer)):
                raise TypeError(f"axis must be an integer, a tuple of them or None, got {a!r}.")
        if self.group_size is not None:
            checks.check_count("group_size", self.group_size)

    def channel_axes(self, ndim: int) -> tuple[int, ...]:
        """The channel axes of an array of `ndim` dimensions, counted from 0."""
        if self.axis is None:
            return ()
        given = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        for a in given:
            if not -ndim <= a < ndim:
                raise ValueError(f"axis must be in [{-ndim}, {ndim}) for this array, got {a}.")
        return tuple(sorted({a % ndim for a in given}))

    def from_the_end(self, ndim: int) -> "Granularity":
        """The same blocks of an array of `ndim` dimensions, and of those in a batch of such.

        Negative axes are still the same when vmap or a stack puts others in front.
        """
        self.channel_axes(ndim)  # refuses axes that the array does not have
        if self.axis is None:
            return self
        if isinstance(self.axis, tuple):
            axes = tuple(int(a) - ndim if a >= 0 else int(a) for a in self.axis)
            return dataclasses.replace(self, axis=axes)
        axis = int(self.axis)
        return dataclasses.replace(self, axis=axis - ndim if axis >= 0 else axis)

    def group_axis(self, ndim: int) -> int | None:
        """The axis that is split into groups, or None."""
        if self.group_size is None or ndim == 0:
            return None
        free = [a for a in range(ndim) if a not in self.channel_axes(ndim)]
        if not free:
            raise ValueError(
                f"group_size={self.group_size} needs an axis that is not a channel axis; "
                f"axis={self.axis} takes all {ndim}."
            )
        return free[-1]

    def _group_size_of(self, shape: tuple[int, ...]) -> int:
        """Entries of a full group: no more than the axis has, lest one group pads it."""
        axis = self.group_axis(len(shape))
        return 1 if axis is None else max(min(self.group_size or 1, shape[axis]), 1)

    def split(self, x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """Returns `x` with its group axis split in two (zero-padded), and the axes to reduce."""
        axis = self.group_axis(x.ndim)
        if axis is None:
            channels = self.channel_axes(x.ndim)
            return x, tuple(a for a in range(x.ndim) if a not in channels)
        size = self._group_size_of(x.shape)
        groups = -(-x.shape[axis] // size)
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, groups * size - x.shape[axis])
        x = jnp.pad(x, padding) if padding[axis][1] else x
        return x.reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :]), (axis + 1,)

    def block_counts(self, shape: tuple[int, ...]) -> np.ndarray:
        """Entries in each block, padding left out; broadcasts against the kept dims."""
        ndim, axis = len(shape), self.group_axis(len(shape))
        if axis is None:
            channels = self.channel_axes(ndim)
            reduced = [n for a, n in enumerate(shape) if a not in channels]
            return np.asarray(max(int(np.prod(reduced)), 1), np.float32)
        size, length = self._group_size_of(shape), shape[axis]
        counts = np.minimum(size, length - size * np.arange(-(-length // size)))
        kept = [1] * axis + [-1, 1] + [1] * (ndim - axis - 1)
        return counts.astype(np.float32).reshape(kept)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one value a block, in the compact form, for an array of `shape`."""
        axis, channels = self.group_axis(len(shape)), self.channel_axes(len(shape))
        if axis is None:
            return tuple(n if a in channels else 1 for a, n in enumerate(shape))
        groups = -(-shape[axis] // self._group_size_of(shape))
        return (*shape[:axis], groups, *shape[axis + 1 :])

    def compact(self, per_block: jax.Array, ndim: int) -> jax.Array:
        """Drops the group's inner axis: the form in which scales are kept."""
        axis = self.group_axis(ndim)
        return per_block if axis is None else jnp.squeeze(per_block, axis + 1)

    def expand(self, compact: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns the compact form repeated along the group axis, to broadcast with `shape`."""
        axis = self.group_axis(len(shape))
        if axis is None:
            return compact
        if (wanted := self.scale_shape(shape)) != tuple(compact.shape):
            raise ValueError(
                f"an array of shape {shape} with axis={self.axis} and group_size={self.group_size} "
                f"must have scales of shape {wanted}, got {tuple(compact.shape)}. In a batch, "
                "channel axes must be counted from the end."
            )
        repeated = jnp.repeat(compact, self._group_size_of(shape), axis=axis)
        return lax.slice_in_dim(repeated, 0, shape[axis], axis=axis)
