"""Norms of leaves and of units, the rows or channels of a leaf."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxclip._core.checks import check_choice
from jaxclip._core.floats import rescale_for
from jaxclip._core.trees import is_clippable
from jaxclip.norms.magnitudes import (
    _ORDERS,
    RescaledNorm,
    _root,
    accumulator,
    change_of_norm,
    over_devices,
    rescaled_total,
)

# --- Of each leaf and each unit -------------------------------------------------------


def leaf_norms(tree: Any, *, ord: float = 2, axis_name: str | None = None) -> Any:
    """Returns the norm of each leaf of a tree, every one as `global_norm` gives it.

    Args:
      tree: As in `global_norm`.
      ord: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A tree of the same structure: float32 scalars (float64 for float64 leaves), 0 for
      leaves that are not floating.

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> leaf_norms({"w": jnp.array([3.0, 4.0]), "step": jnp.array(7)})
      {'step': Array(0., dtype=float32), 'w': Array(5., dtype=float32)}
    """
    check_choice("ord", ord, _ORDERS)
    leaves, treedef = jax.tree.flatten(tree)

    def norm_of(x: Any) -> jax.Array:
        if not is_clippable(x):
            return jnp.zeros((), jnp.float32)
        axes = tuple(range(np.ndim(x)))
        return _unit_norm(jnp.asarray(x), axes, float(ord), axis_name).norm.value().reshape(())

    return treedef.unflatten(map(norm_of, leaves))


def unit_norms(
    x: jax.Array, axis: int | Sequence[int] | None = None, *, axis_name: str | None = None
) -> jax.Array:
    """Returns the 2-norm of each unit of an array: of the weights into one output.

    `sqrt(sum |x|**2)` over `axis`, dimensions kept, right at every magnitude.

    Args:
      x: Real or complex floating array.
      axis: Axis or axes to take the norm over; negative ones count from the end. None for
        what adaptive gradient clipping takes, by flax's layouts: all entries of a vector
        (and of an array with one axis longer than 1), the first axis of a matrix and of a
        kernel of three dimensions, else all axes but the last.
      axis_name: As in `global_norm`, where the axes reduced over are split over devices.

    Returns:
      Float32 (float64 for float64), with length 1 along the axes reduced over.

    Raises:
      ValueError: If `axis` is out of range for `x`.

    Example:
      >>> print(unit_norms(jnp.array([[3.0, 1.0], [4.0, 0.0]])))
      [[5. 1.]]
    """
    x = jnp.asarray(x)
    return rescaled_unit_norm(x, unit_axes(x.shape, axis), axis_name=axis_name).value()


def unit_axes(shape: tuple[int, ...], axis: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Returns the axes, counted from 0, over which a unit's norm is taken; see `unit_norms`.

    Args:
      shape: Shape of the array.
      axis: As in `unit_norms`.

    Returns:
      A sorted tuple without repetitions.

    Raises:
      ValueError: If `axis` is out of range.

    Example:
      >>> unit_axes((3, 3, 8, 16)), unit_axes((8, 16)), unit_axes((16,)), unit_axes((8, 16), -1)
      ((0, 1, 2), (0,), (0,), (1,))
    """
    rank = len(shape)
    if axis is None:
        if sum(n != 1 for n in shape) <= 1:
            return tuple(range(rank))
        return (0,) if rank in (2, 3) else tuple(range(rank - 1))
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    for a in axes:
        if not -rank <= a < rank:
            raise ValueError(f"axis must be in [{-rank}, {rank}) for shape {shape}, got {a}.")
    return tuple(sorted({a % rank for a in axes}))


def rescaled_unit_norm(
    x: jax.Array, axes: tuple[int, ...], *, axis_name: str | None = None
) -> RescaledNorm:
    """Returns the 2-norm over some axes, dimensions kept, as a norm and its rescale.

    Args:
      x: Floating array.
      axes: What to reduce over, as `unit_axes` gives it.
      axis_name: As in `global_norm`.

    Returns:
      A `RescaledNorm`, finite wherever the entries of a unit are.

    Example:
      >>> rescaled_unit_norm(jnp.array([[3.0, 4.0], [0.0, 2.0]]), (1,)).value()
      Array([[5.],
             [2.]], dtype=float32)
    """
    return measure_units(x, axes, axis_name=axis_name).norm


class MeasuredUnits(NamedTuple):
    """The norms of an array's units, and what they were computed from.

    Attributes:
      norm: `RescaledNorm` of the units, dimensions kept. Only this has a derivative.
      largest: The largest real or imaginary part in each unit, as a vector.
      total: Sum over each unit of the squares, rescaled as `largest` asks for, as a vector.
    """

    norm: RescaledNorm
    largest: jax.Array
    total: jax.Array


def measure_units(
    x: jax.Array, axes: tuple[int, ...], *, axis_name: str | None = None
) -> MeasuredUnits:
    """Returns `rescaled_unit_norm` with the sums, which `join_units` needs.

    Args:
      x: As in `rescaled_unit_norm`.
      axes: As in `rescaled_unit_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A `MeasuredUnits`.

    Example:
      >>> print(measure_units(jnp.array([3.0, 4.0]), (0,)).largest)
      [4.]
    """
    return _unit_norm(jnp.asarray(x), axes, 2.0, axis_name)


def join_units(parts: Sequence[MeasuredUnits]) -> RescaledNorm:
    """Returns the norms of all units of some arrays as one vector, without derivatives.

    The sums are joined and the norms computed again, for XLA would move whatever is done to
    each of a thousand parts into their joining, and be very long about it.

    Args:
      parts: As `measure_units` gives them.

    Returns:
      A `RescaledNorm` of vectors, replicated over the devices.

    Example:
      >>> parts = [measure_units(jnp.array(x), (0,)) for x in ([3.0, 4.0], [2.0])]
      >>> print(join_units(parts).value())
      [5. 2.]
    """
    if len({p.total.dtype for p in parts}) > 1:  # the rescale of each goes by its dtype
        pairs = zip(*(p.norm for p in parts), strict=True)
        vectors = [[_as_vector(x.astype(jnp.float64)) for x in pair] for pair in pairs]
        return RescaledNorm(*map(_join, vectors))
    largest, total = (_join([getattr(p, name) for p in parts]) for name in ("largest", "total"))
    return RescaledNorm(jnp.sqrt(total), rescale_for(largest))


def _join(parts: list[jax.Array]) -> jax.Array:
    return lax.stop_gradient(jnp.concatenate(parts)) if parts else jnp.zeros((0,), jnp.float32)


def _as_vector(x: jax.Array) -> jax.Array:
    """Replicated on an Explicit mesh, where parts split each in its way could not be joined."""
    is_explicit = AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    return (jax.sharding.reshard(x, PartitionSpec()) if is_explicit else x).reshape(-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _unit_norm(
    x: jax.Array, axes: tuple[int, ...], ord: float, axis_name: str | None
) -> MeasuredUnits:
    """Jitted, so that leaves of one shape share one trace.

    The rescale comes from the largest entry, so the array is read twice: a loop such as
    that for the whole tree would carry two arrays for each leaf, slow to compile.
    """
    one = jnp.ones((), accumulator([x]))
    if ord == np.inf:
        largest = over_devices(rescaled_total(x, one, axes, np.inf), np.inf, axis_name)
        flat, one = _as_vector(largest), jnp.ones_like(largest)
        return MeasuredUnits(RescaledNorm(largest, one), flat, flat)
    largest = _largest_part(x, axes).astype(one.dtype)
    largest = largest if axis_name is None else lax.pmax(largest, axis_name)
    rescale = rescale_for(largest)
    total = over_devices(rescaled_total(x, rescale, axes, ord), ord, axis_name)
    norm = RescaledNorm(_root(total, ord), rescale)
    return MeasuredUnits(norm, _as_vector(largest), _as_vector(total))


@_unit_norm.defjvp
def _unit_norm_jvp(
    axes: tuple, ord: float, axis_name: str | None, primals: Any, tangents: Any
) -> tuple:
    (x,), (dx,) = primals, tangents
    units = _unit_norm(x, axes, ord, axis_name)
    change = jnp.sum(change_of_norm(x, dx, units.norm, ord), axis=axes, keepdims=True)
    change = change if axis_name is None else lax.psum(change, axis_name)
    none = jax.tree.map(jnp.zeros_like, units)
    return units, none._replace(norm=RescaledNorm(change, none.norm.rescale))


def _largest_part(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest real or imaginary part; perhaps not NaN where one is, which the sum will be."""
    parts = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
    tops = [jnp.max(jnp.abs(p), axis=axes, keepdims=True, initial=0) for p in parts]
    return tops[0] if len(tops) == 1 else jnp.maximum(*tops)
