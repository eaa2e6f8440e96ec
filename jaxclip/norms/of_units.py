"""Norms of leaves, and of their units: the weights into one output."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike

from jaxclip._core.checks import check_choice, describe
from jaxclip._core.floats import rescale_for
from jaxclip._core.trees import PyTree, is_clippable
from jaxclip.norms.magnitudes import (
    ORDERS,
    RescaledNorm,
    accumulator,
    change_of_norm,
    over_devices,
    rescaled_total,
    root_of_total,
    root_of_wide_total,
    uses_float64,
    wide_total,
    with_float64,
)


def leaf_norms(tree: PyTree, *, ord: float = 2, axis_name: str | None = None) -> PyTree:
    """Returns the norm of each leaf of a tree: the `global_norm` of that leaf alone.

    Args:
      tree: Pytree of arrays; complex entries count by modulus.
      ord: 1, 2 or inf.
      axis_name: Mapped axis over which the leaves are split, inside `shard_map` or `vmap`.

    Returns:
      A tree of the same structure: float32 scalars (float64 for float64 leaves), 0 for
      leaves that are not floating.

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> leaf_norms({"w": jnp.array([3.0, 4.0]), "step": jnp.array(7)})
      {'step': Array(0., dtype=float32), 'w': Array(5., dtype=float32)}
    """
    check_choice("ord", ord, ORDERS)
    leaves, treedef = jax.tree.flatten(tree)

    def norm_of(x: ArrayLike) -> jax.Array:
        if not is_clippable(x):
            return jnp.zeros((), jnp.float32)
        axes = tuple(range(np.ndim(x)))
        return _unit_norm(jnp.asarray(x), axes, float(ord), axis_name).norm.value().reshape(())

    return treedef.unflatten(map(norm_of, leaves))


def unit_norms(
    x: jax.Array, axis: int | Sequence[int] | None = None, *, axis_name: str | None = None
) -> jax.Array:
    """Returns the 2-norm of each unit of an array; a unit is the weights into one output.

    `sqrt(sum |x|**2)` over `axis`, dimensions kept, right at every magnitude.

    Args:
      x: Real or complex floating array.
      axis: Axis or axes to take the norm over; negative ones count from the end. None takes
        the axes of adaptive gradient clipping, by flax's layouts: all axes of a vector (or of
        an array with one axis longer than 1), the first axis of a matrix or of a kernel of
        three dimensions, otherwise all axes but the last.
      axis_name: Mapped axis, if the axes reduced over are split over devices.

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
    """Returns the sorted axes, counted from 0, over which `unit_norms` takes the norm."""
    rank = len(shape)
    if axis is None:
        if sum(n != 1 for n in shape) <= 1:
            return tuple(range(rank))
        return (0,) if rank in (2, 3) else tuple(range(rank - 1))
    axes = tuple(axis) if np.iterable(axis) else (axis,)
    for a in axes:
        if isinstance(a, bool) or not isinstance(a, (int, np.integer)):
            raise TypeError(f"axis must be an integer, several or None, {describe(a)}.")
        if not -rank <= a < rank:
            raise ValueError(f"axis must be in [{-rank}, {rank}) for shape {shape}, got {a}.")
    return tuple(sorted({a % rank for a in axes}))


def rescaled_unit_norm(
    x: jax.Array, axes: tuple[int, ...], *, axis_name: str | None = None
) -> RescaledNorm:
    """Returns the 2-norm over some axes, dimensions kept; finite wherever the entries are."""
    return measure_units(x, axes, axis_name=axis_name).norm


class MeasuredUnits(NamedTuple):
    """The norms of an array's units, and the numbers that they were computed from.

    Attributes:
      norm: `RescaledNorm` of the units, dimensions kept. Only this has a derivative.
      total: Vector in float64, the sum of the squares of each unit; in the dtype of `norm` that
        of the squares times `rescale_for(largest)`.
      largest: Vector, the largest real or imaginary part in each unit; None if the total
        is in float64 and the entries are not, because nothing is rescaled then.
    """

    norm: RescaledNorm
    total: jax.Array
    largest: jax.Array | None = None


def measure_units(
    x: jax.Array, axes: tuple[int, ...], *, axis_name: str | None = None
) -> MeasuredUnits:
    """Returns the norms of units together with the sums that `join_units` needs."""
    return _unit_norm(jnp.asarray(x), axes, 2.0, axis_name)


def join_units(parts: Sequence[MeasuredUnits]) -> RescaledNorm:
    """Returns the norms of all units of some arrays as one vector."""
    if len({p.norm.norm.dtype for p in parts}) > 1:  # the rescale depends on the dtype
        norms = [_as_vector(p.norm.norm.astype(jnp.float64)) for p in parts]
        rescales = [_as_vector(p.norm.rescale.astype(jnp.float64)) for p in parts]
        return RescaledNorm(_concatenate(norms), _concatenate(rescales))
    return _joined(list(parts))


@jax.custom_jvp
def _joined(parts: list[MeasuredUnits]) -> RescaledNorm:
    # Recompute from the joined sums: XLA would otherwise push each part's arithmetic into the
    # concatenation, and compile times explode with many leaves.
    with with_float64():
        total = _concatenate([p.total for p in parts])
        largest = [p.largest for p in parts if p.largest is not None]
        if len(largest) < len(parts):
            return root_of_wide_total(total, 2)
    return RescaledNorm(jnp.sqrt(total), rescale_for(_concatenate(largest)))


@_joined.defjvp
def _joined_jvp(primals: tuple, tangents: tuple) -> tuple[RescaledNorm, RescaledNorm]:
    norm = _joined(*primals)
    change = _concatenate([_as_vector(part.norm.norm) for part in tangents[0]])
    return norm, RescaledNorm(change, jnp.zeros_like(norm.rescale))


def _concatenate(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts) if parts else jnp.zeros((0,), jnp.float32)


def _as_vector(x: jax.Array) -> jax.Array:
    """Flattens an array, replicated on an Explicit mesh, where split parts cannot be joined."""
    is_explicit = AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types
    return (jax.sharding.reshard(x, PartitionSpec()) if is_explicit else x).reshape(-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # leaves of one shape share one trace
def _unit_norm(
    x: jax.Array, axes: tuple[int, ...], ord: float, axis_name: str | None
) -> MeasuredUnits:
    """Returns the norms of units: by sums in float64, or rescaled by their largest entries."""
    if uses_float64(x.dtype):
        # Apart from the sum over all of the array, with which XLA would share the squares and write
        # them out, 8 bytes an entry.
        x = lax.optimization_barrier(x)
        with with_float64():
            total = over_devices(wide_total(x, axes, ord), ord, axis_name)
            return MeasuredUnits(root_of_wide_total(total, ord), _as_vector(total))
    # The array is read twice. A loop like that of `global_norm` would carry two arrays per leaf,
    # which is slow to compile.
    one = jnp.ones((), accumulator([x]))
    if ord == np.inf:
        largest = over_devices(rescaled_total(x, one, axes, np.inf), np.inf, axis_name)
        flat, one = _as_vector(largest), jnp.ones_like(largest)
        return MeasuredUnits(RescaledNorm(largest, one), flat, flat)
    largest = _largest_part(x, axes).astype(one.dtype)
    largest = largest if axis_name is None else lax.pmax(largest, axis_name)
    rescale = rescale_for(largest)
    total = over_devices(rescaled_total(x, rescale, axes, ord), ord, axis_name)
    norm = RescaledNorm(root_of_total(total, ord), rescale)
    return MeasuredUnits(norm, _as_vector(total), _as_vector(largest))


@_unit_norm.defjvp
def _unit_norm_jvp(
    axes: tuple[int, ...], ord: float, axis_name: str | None, primals: tuple, tangents: tuple
) -> tuple:
    (x,), (dx,) = primals, tangents
    units = _unit_norm(x, axes, ord, axis_name)
    change = jnp.sum(change_of_norm(x, dx, units.norm, ord), axis=axes, keepdims=True)
    change = change if axis_name is None else lax.psum(change, axis_name)
    with with_float64():
        zeros = jax.tree.map(jnp.zeros_like, units)
    return units, zeros._replace(norm=RescaledNorm(change, zeros.norm.rescale))


def _largest_part(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the largest real or imaginary part."""
    # This may lose a NaN; the sum of the squares will not.
    parts = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
    tops = [jnp.max(jnp.abs(p), axis=axes, keepdims=True, initial=0) for p in parts]
    return tops[0] if len(tops) == 1 else jnp.maximum(*tops)
