"""Sums over the inputs of a weight, as one product, convolution or lookup gives them."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxclip.calibration.views import (
    JOINED,
    NO_AXIS,
    Factor,
    Scan,
    View,
    in_order,
    matrix_view,
    merged,
    size_of,
)
from jaxclip.lowbit.rounding.moments import InputMoments


class Key(NamedTuple):
    """Says of which weight sums are, and of which of its matrices; sums of equal keys add up.

    Attributes:
      path: The weight's path.
      shape: Its shape.
      stack: Factors with a matrix for each index, one axis of the sums each.
      inputs: Factors that are summed over.
      is_diagonal: True if only the diagonals of the second moments are kept.
      is_lookup: True if the rows are looked up by index.
      scanned: As in `View`.
    """

    path: str
    shape: tuple[int, ...]
    stack: tuple[Factor, ...]
    inputs: tuple[Factor, ...]
    is_diagonal: bool
    is_lookup: bool
    scanned: tuple[Scan, ...]


class Sums(NamedTuple):
    """Sums over inputs, with one leading axis for each factor of the stack."""

    second: jax.Array  # (*stack, inputs, inputs) or (*stack, inputs)
    first: jax.Array  # (*stack, inputs)
    number: jax.Array  # of inputs, (*stack,)


AllSums: TypeAlias = "OrderedDict[Key, Sums]"  # in the order of the program


class Operand(NamedTuple):
    """The other operand of a weight: an array, and its axes that meet axes of the weight.

    `contracted` and `batched` are pairs of axes: of `expand(array)`, and of the weight. Its other
    axes are samples.
    """

    array: jax.Array
    contracted: tuple[tuple[int, int], ...]
    batched: tuple[tuple[int, int], ...]
    expand: Callable[[jax.Array], jax.Array] = lambda x: x


def of_product(view: View, operand: Operand, max_dim: int) -> tuple[Key, Sums] | None:
    """Returns the sums for a weight that is contracted with an operand; None if it is no matrix."""
    found = _apart(view, operand)
    if found is None:
        return None
    view, operand = found
    inputs = [f for _, axis in operand.contracted for f in view.axes[axis]]
    are_stacked = [_is_of_weight(view.axes[axis]) for _, axis in operand.batched]
    if None in are_stacked or any(f.axis == NO_AXIS for f in inputs):
        return None
    if not jnp.issubdtype(operand.array.dtype, jnp.floating):
        return None
    # Axes along which the weight is only repeated hold more samples.
    pairs = zip(operand.batched, are_stacked, strict=True)
    stacked = [pair for pair, is_stacked in pairs if is_stacked]
    stack = [f for _, axis in stacked for f in view.axes[axis]]
    is_diagonal = size_of(inputs) > max_dim
    contracted = [i for i, _ in operand.contracted]
    raw = anywhere(
        lambda x: _contracted(operand.expand(x), contracted, [i for i, _ in stacked], is_diagonal),
        operand.array,
    )
    if view.scale is not None:  # W c x = W (c x)
        scale = jnp.asarray(view.scale).astype(raw.first.dtype)
        raw = Sums(raw.second * scale**2, raw.first * scale, raw.number)
    met = {axis for _, axis in (*operand.contracted, *stacked)}
    has_outputs = any(_is_of_weight(a) for i, a in enumerate(view.axes) if i not in met)
    key = Key(view.path, view.shape, tuple(stack), tuple(inputs), is_diagonal, False, view.scanned)
    return _placed(view, *_sorted(key, raw), has_outputs)


def _apart(view: View, operand: Operand) -> tuple[View, Operand] | None:
    """Returns a weight without others that it was joined with, and the inputs that it meets."""
    join = view.join
    pairs = (*operand.contracted, *operand.batched)
    met = [pair for pair in pairs if any(f.axis == JOINED for f in view.axes[pair[1]])]
    if join is None or not met:  # not joined, or along the outputs
        return view, operand
    own, axis = met[0]
    if len(met) > 1 or merged(view.axes[axis]) != join.whole:
        return None
    end = join.start + size_of(join.factors)

    def expand(x: jax.Array) -> jax.Array:
        return lax.slice_in_dim(operand.expand(x), join.start, end, axis=own)

    return view.apart(axis), operand._replace(expand=expand)


def of_groups(
    view: View, x: jax.Array, group_sizes: jax.Array, axes: tuple[int, int], max_dim: int
) -> tuple[Key, Sums] | None:
    """Returns the sums for a weight of experts, each of which meets so many rows after the others.

    `axes` are those of the experts and of the inputs.
    """
    stack, inputs = (view.axes[axis] for axis in axes)
    if not (_is_plain(view) and _is_of_weight(stack) and _is_of_weight(inputs)):
        return None
    is_diagonal = size_of(inputs) > max_dim
    x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])

    def summed(left: jax.Array, right: jax.Array) -> jax.Array:
        """Returns left^T right over the rows of each group."""
        highest = lax.Precision.HIGHEST
        return lax.ragged_dot_general(left, right, group_sizes, numbers, precision=highest)

    ones = jnp.ones((len(x), 1), x.dtype)
    second = summed(x * x, ones)[..., 0] if is_diagonal else summed(x, x)
    raw = Sums(second, summed(x, ones)[..., 0], group_sizes.astype(x.dtype))
    key = Key(view.path, view.shape, stack, inputs, is_diagonal, False, view.scanned)
    return _sorted(key, raw)


def _is_plain(view: View) -> bool:
    """Returns True for whole weights that were not scaled."""
    return not view.parts and view.scale is None and view.join is None


def of_lookup(
    view: View, axis: int, indices: jax.Array, is_clipped: bool
) -> tuple[Key, Sums] | None:
    """Returns counts for rows of a weight along an axis, which are looked up by index."""
    inputs = view.axes[axis]
    size = size_of(inputs)
    if not inputs or not _is_of_weight(inputs) or not _is_plain(view):
        return None
    if is_clipped:
        indices = jnp.clip(indices, 0, size - 1)
    # Other indices out of bounds read nothing; where they are added they must not wrap around.
    is_in = (indices >= 0) & (indices < size)
    indices = jnp.where(is_in, indices, jnp.full_like(indices, size))
    counts = jnp.zeros(size, jnp.float32).at[indices].add(1.0, mode="drop")
    key = Key(view.path, view.shape, (), inputs, True, True, view.scanned)
    return _sorted(key, Sums(counts, counts, jnp.sum(is_in, dtype=jnp.float32)))


def moments_of(key: Key, sums: Sums) -> InputMoments:
    """Returns sums as the moments of a weight, its matrices in the weight's own order."""
    order = in_order(key.stack)
    num = len(order)

    def flat(x: jax.Array) -> jax.Array:
        x = x.transpose(*order, *range(num, x.ndim))
        return x.reshape(-1, *x.shape[num:])

    view = matrix_view(key.shape, merged([key.stack[i] for i in order]), key.inputs)
    return InputMoments(flat(sums.second), flat(sums.first), flat(sums.number), view)


def with_scan_axis(key: Key, sums: Sums) -> tuple[Key, Sums]:
    """Returns sums that a loop has stacked along a new axis, and their key outside of the loop."""
    (_, factors, start), scanned = key.scanned[-1], key.scanned[:-1]
    end, sizes = start + size_of(factors), [f.size for f in factors]
    sums = Sums(*(x[start:end].reshape(*sizes, *x.shape[1:]) for x in sums))
    return key._replace(stack=(*factors, *key.stack), scanned=scanned), sums


def _is_of_weight(factors: Sequence[Factor]) -> bool | None:
    """Returns False if a weight is repeated along an axis, None if that is so in part."""
    kinds = {f.axis != NO_AXIS for f in factors}
    return None if len(kinds) > 1 else kinds == {True}


def _contracted(
    x: jax.Array, contracted: Sequence[int], stacked: Sequence[int], is_diagonal: bool
) -> Sums:
    """Returns sums over the other axes of an operand; axes of the stack come first."""
    x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    order = (*stacked, *contracted)
    samples = tuple(i for i in range(x.ndim) if i not in order)
    kept = sorted(order)
    places = [kept.index(i) for i in order]
    first = jnp.sum(x, samples).transpose(places)
    stack, inputs = first.shape[: len(stacked)], first.shape[len(stacked) :]
    if is_diagonal:
        second = jnp.sum(x * x, samples).transpose(places)
    else:
        numbers = ((samples, samples), (tuple(stacked), tuple(stacked)))
        # Behind the stack come the contracted axes in the order that they have in the array.
        second = lax.dot_general(x, x, numbers, precision=lax.Precision.HIGHEST)
        rest = [sorted(contracted).index(i) + len(stacked) for i in contracted]
        twice = [i + len(contracted) for i in rest]
        second = second.transpose(*range(len(stacked)), *rest, *twice)
    size = math.prod(inputs)
    second = second.reshape(*stack, *([size] if is_diagonal else [size, size]))
    count = jnp.full(stack, math.prod(x.shape[i] for i in samples), x.dtype)
    return Sums(second, first.reshape(*stack, size), count)


def anywhere(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """Returns `function(x)`, with sharding left to XLA where the type of `x` says how it lies."""
    mesh = jax.typeof(x).sharding.mesh
    if all(kind != jax.sharding.AxisType.Explicit for kind in mesh.axis_types):
        return function(x)
    on_auto_axes: Any = jax.sharding.auto_axes(function, out_sharding=jax.sharding.PartitionSpec())
    return on_auto_axes(x)


def _sorted(key: Key, sums: Sums) -> tuple[Key, Sums]:
    """Returns sums with inputs in the order of the weight, and an axis for each stacked factor."""
    order = in_order(key.inputs)
    sizes = [f.size for f in key.inputs]
    lead = [f.size for f in key.stack]
    num, moved = len(lead), [len(lead) + i for i in order]
    turned = [i for i, f in enumerate((*key.stack, *key.inputs)) if f.is_reversed]

    def sort(x: jax.Array, times: int) -> jax.Array:
        x = x.reshape(*lead, *sizes * times)
        x = lax.rev(x, [*turned, *(i + len(sizes) for i in turned if times == 2 and i >= num)])
        places = [i + k * len(sizes) for k in range(times) for i in moved]
        return x.transpose(*range(num), *places).reshape(*lead, *[math.prod(sizes)] * times)

    second = sort(sums.second, 1 if key.is_diagonal else 2)
    number = lax.rev(sums.number.reshape(lead), [i for i in turned if i < num])
    key = key._replace(
        stack=tuple(f._replace(is_reversed=False) for f in key.stack),
        inputs=merged(key.inputs[i]._replace(is_reversed=False) for i in order),
    )
    return key, Sums(second, sort(sums.first, 1), number)


def _placed(view: View, key: Key, sums: Sums, has_outputs: bool) -> tuple[Key, Sums] | None:
    """Returns sums for whole axes of a weight where an operand met a part of them."""
    num_axes = len(view.shape)
    if any(f.axis >= num_axes for f in key.inputs) or (view.parts and not key.inputs):
        return None  # what is known of a part of the inputs says nothing about the others
    stack = list(key.stack)
    for k, (factor, start, width) in enumerate(view.parts):
        own = [i for i, f in enumerate(stack) if f.axis == num_axes + k]
        if width == 1 and has_outputs and key.inputs:
            own = [0]
            stack.insert(0, factor)
            sums = Sums(*(x[None] for x in sums))
        if not own:  # a part of the outputs: all parts together count once
            sums = Sums(*(x * (width / factor.size) for x in sums))
            continue
        if len(own) > 1 or (width > 1 and stack[own[0]].size != width) or factor.axis >= num_axes:
            return None
        stack[own[0]] = factor
        sums = Sums(*(_within(x, own[0], start, factor.size) for x in sums))
    return key._replace(stack=tuple(stack)), sums


def _within(x: jax.Array, axis: int, start: Any, size: int) -> jax.Array:
    """Returns zeros of a larger size along an axis that hold `x` from `start` on."""
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    return lax.dynamic_update_slice_in_dim(jnp.zeros(shape, x.dtype), x, start, axis)
