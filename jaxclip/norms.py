"""Norms that are right for every finite input, in one pass over memory.

A sum of squares in float32 overflows from 1.8e19 on and loses small numbers below
1e-19. Both are noticed from the sum itself, and only then is a second pass taken, over
the input times a power of two, so that ordinary gradients pay nothing.

    norm(tree) = norm_of_rescaled / rescale,        rescale in {2**-k, 1, 2**k}

The pair is kept apart where it matters: the norm of finite float32 numbers can itself
exceed float32, and a clip coefficient still has to come out right.

Every leaf's own sum is kept on the way to the norm of the tree, as one vector: it costs
nothing, tells which leaf is to blame for a spike, and is added up in pairs, so that rounding
grows with the logarithm of the number of leaves.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxclip._checks import check_choice, has_nonfinite, is_clippable
from jaxclip.rescaling import (
    RescaledNorm,
    accumulator,
    change_of_norm,
    largest_of,
    over_devices,
    power_of_two,
    rescale_for,
    rescaled_total,
)

__all__ = [
    "MeasuredNorm",
    "MeasuredUnits",
    "global_norm",
    "is_nonfinite",
    "join_units",
    "leaf_norms",
    "measure_norm",
    "measure_units",
    "rescaled_global_norm",
    "rescaled_unit_norm",
    "unit_axes",
    "unit_norms",
]

_ORDERS = (1, 2, 1.0, 2.0, float("inf"))


class MeasuredNorm(NamedTuple):
    """The norm of a tree, to be used again where that same tree comes by.

    Attributes:
      tree: What was measured.
      norm: Its `RescaledNorm`, of scalars.
      leaf_norms: Float32 vector, the norm of each floating leaf in order, at most the largest
        float32; not finite where an entry is not.
      ord: Which norm.
      axis_name: The mapped axis that it was taken over, if any.
    """

    tree: Any
    norm: RescaledNorm
    leaf_norms: jax.Array
    ord: float = 2
    axis_name: str | None = None

    def is_of(self, tree: Any, ord: float, axis_name: str | None) -> bool:
        """Whether this is that norm of the very arrays in `tree`."""
        if (self.ord, self.axis_name) != (ord, axis_name):
            return False
        mine, theirs = jax.tree.leaves(self.tree), jax.tree.leaves(tree)
        pairs = zip(mine, theirs, strict=False)
        return len(mine) == len(theirs) and all(a is b for a, b in pairs)


# --- Of a tree ------------------------------------------------------------------------


def global_norm(tree: Any, *, ord: float = 2, axis_name: str | None = None) -> jax.Array:
    """Returns the norm of all floating entries of a tree taken as one vector.

    `(sum |x|**ord) ** (1 / ord)`, or `max |x|` for `ord=inf`. Every leaf is accumulated in
    float32 (float64 leaves in float64) whatever its dtype, and magnitudes whose squares
    overflow or underflow are rescaled. Integer, bool, float0 and key leaves do not count.

    Args:
      tree: Any pytree of arrays; complex entries count by modulus.
      ord: 1, 2 or inf.
      axis_name: Mapped axis to reduce over inside `shard_map`, `pmap` or `vmap`. Under
        `jit` on sharded arrays leave it None: the norm is global already.

    Returns:
      A float32 scalar (float64 if a leaf is float64). 0 for an empty tree; inf if the norm
      exceeds the dtype or an entry is infinite; NaN if an entry is. Float32 subnormals
      count as 0 where the backend flushes them (XLA on CPU does).

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> global_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)})
      Array(5., dtype=float32)
      >>> global_norm(jnp.full(4, 300.0, jnp.float16))
      Array(600., dtype=float32)

    References:
      James L. Blue, A Portable Fortran Program to Find the Euclidean Norm of a Vector,
      1978, https://doi.org/10.1145/355769.355771
    """
    return rescaled_global_norm(tree, ord=ord, axis_name=axis_name).value()


def rescaled_global_norm(
    tree: Any, *, ord: float = 2, axis_name: str | None = None
) -> RescaledNorm:
    """Returns `global_norm` as a norm and a power-of-two rescale that divides it.

    Args:
      tree: As in `global_norm`.
      ord: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A `RescaledNorm` of scalars: finite whenever every entry of `tree` is.

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> norm, rescale = rescaled_global_norm(jnp.full(16, 3e38))
      >>> bool(jnp.isfinite(norm)), float(rescale) == 2.0**-90
      (True, True)
    """
    return measure_norm(tree, ord=ord, axis_name=axis_name).norm


def measure_norm(tree: Any, *, ord: float = 2, axis_name: str | None = None) -> MeasuredNorm:
    """Returns `global_norm` with what was learned on the way: each leaf's norm.

    Args:
      tree: As in `global_norm`.
      ord: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A `MeasuredNorm`. Only its `norm` has a derivative.

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> measured = measure_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)})
      >>> print(measured.norm.value(), measured.leaf_norms)
      5.0 [4. 3.]
    """
    check_choice("ord", ord, _ORDERS)
    norm, leaf_norms_ = _tree_norm(_floating_leaves(tree), float(ord), axis_name)
    return MeasuredNorm(tree, norm, leaf_norms_, ord, axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _tree_norm(
    leaves: list[jax.Array], ord: float, axis_name: str | None
) -> tuple[RescaledNorm, jax.Array]:
    dtype = accumulator(leaves)
    axes = [tuple(range(x.ndim)) for x in leaves]

    def totals_at(exponent: jax.Array) -> jax.Array:
        rescale, pairs = power_of_two(exponent, dtype), zip(leaves, axes, strict=True)
        totals = [rescaled_total(x, rescale, a, ord).reshape(1) for x, a in pairs]
        return over_devices(jnp.concatenate(totals), ord, axis_name)

    def exponent_for(totals: jax.Array) -> jax.Array:
        return _better_exponent(_add_up(totals, ord), ord)

    if not leaves:
        return RescaledNorm(jnp.zeros((), dtype), jnp.ones((), dtype)), jnp.zeros((0,), jnp.float32)
    zeros = jnp.zeros((len(leaves),), dtype) + _zero_that_varies(leaves, dtype, axis_name)
    totals, exponent = _in_two_rounds(totals_at, exponent_for, zeros)
    rescale, largest = power_of_two(exponent, dtype), jnp.asarray(jnp.finfo(jnp.float32).max, dtype)
    each = jnp.minimum(_root(totals, ord) / rescale, largest)
    each = jnp.where(jnp.isfinite(totals), each, totals).astype(jnp.float32)
    return RescaledNorm(_root(_add_up(totals, ord), ord), rescale), each


@_tree_norm.defjvp
def _tree_norm_jvp(ord: float, axis_name: str | None, primals: Any, tangents: Any) -> tuple:
    """`d norm = sum(x * dx) / norm` for ord 2; 0 at 0, so that a clip there is the identity."""
    leaves, changes = primals[0], tangents[0]
    norm, each = _tree_norm(leaves, ord, axis_name)
    total = jnp.zeros_like(norm.norm)
    for x, dx in zip(leaves, changes, strict=True):
        total += jnp.sum(change_of_norm(x, dx, norm, ord))
    total = total if axis_name is None else lax.psum(total, axis_name)
    change = RescaledNorm(total, jnp.zeros_like(norm.rescale))
    return (norm, each), (change, jnp.zeros_like(each))


def is_nonfinite(tree: Any, given: Any = None) -> jax.Array:
    """Returns whether a floating entry of a tree is not finite.

    Args:
      tree: Any pytree of arrays.
      given: A `MeasuredNorm`, which says so without a pass if it is of this tree; else
        anything, such as None.

    Returns:
      A scalar bool.

    Example:
      >>> print(is_nonfinite({"w": jnp.array([1.0, jnp.inf])}))
      True
    """
    if isinstance(given, MeasuredNorm) and given.is_of(tree, given.ord, given.axis_name):
        return ~jnp.isfinite(given.norm.norm)
    return has_nonfinite(tree)


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


# --- Parts ----------------------------------------------------------------------------


def _floating_leaves(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_clippable(x)]


def _in_two_rounds(totals_at: Any, exponent_for: Any, zeros: jax.Array) -> tuple[Any, Any]:
    """Totals at the rescale that suits them, and the sign of its exponent.

    A loop that ends after its first round for ordinary magnitudes. The program holds the
    reductions once, where a branch for the second round would hold them twice.
    """

    def another_round(carry: tuple) -> tuple:
        exponent, _, num_rounds = carry
        totals = totals_at(exponent)
        better = jnp.where(num_rounds == 0, exponent_for(totals), exponent)
        return better, totals, num_rounds + jnp.where(better == exponent, 2, 1)

    zero = jnp.zeros_like(exponent_for(zeros))  # varies as the totals do
    start = (zero, zeros, zero)
    exponent, totals, _ = lax.while_loop(lambda carry: carry[2] < 2, another_round, start)
    return totals, exponent


def _better_exponent(totals: jax.Array, ord: float) -> jax.Array:
    """-1 for each total that is too large, 1 for each that may have sunk, else 0 (for NaN)."""
    info = jnp.finfo(totals.dtype)
    # Well within the range for the other norms, so that `1 / norm` is normal, too.
    largest = float(info.max) if ord == 2 else 2.0 ** (info.maxexp // 2)
    exponent = jnp.where(totals > largest, jnp.int32(-1), jnp.int32(0))
    if ord != 2:
        return exponent
    smallest = 2.0**-800 if info.bits == 64 else 2.0**-64
    return jnp.where(totals < smallest, jnp.int32(1), exponent)


def _add_up(totals: jax.Array, ord: float) -> jax.Array:
    """The sum of a vector, in pairs, or its largest entry; 0 if it is empty."""
    if ord == np.inf or totals.size == 0:
        return largest_of(totals)
    while totals.size > 1:
        half = totals.size // 2
        rest = totals[2 * half :]
        totals = jnp.concatenate([totals[:half] + totals[half : 2 * half], rest])
    return totals[0]


def _largest_part(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest real or imaginary part; perhaps not NaN where one is, which the sum will be."""
    parts = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
    tops = [jnp.max(jnp.abs(p), axis=axes, keepdims=True, initial=0) for p in parts]
    return tops[0] if len(tops) == 1 else jnp.maximum(*tops)


def _root(total: jax.Array, ord: float) -> jax.Array:
    return jnp.sqrt(total) if ord == 2 else total


def _zero_that_varies(leaves: list[jax.Array], dtype: Any, axis_name: str | None) -> jax.Array:
    """0, which inside `shard_map` varies over the mesh axes that the totals vary over."""
    zero = jnp.zeros((), dtype)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return zero
    for x in leaves:  # from no entries at all, or from one, so that nothing is computed
        one = jnp.sum(x[..., :0]) if x.ndim else jnp.where(x == x, 0, 0)
        zero += jnp.real(one).astype(dtype)
    return zero if axis_name is None else lax.psum(zero, axis_name)
