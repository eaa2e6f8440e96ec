"""Weights followed through a program: which axis of an array holds which factor of which axis.

A factor of an axis is a digit of its index:  index = sum of stride * digit over its factors.
Reshapes split axes into factors, transposes permute them, and broadcasts add some of no axis.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxclip.lowbit.rounding.moments import MatrixView

NO_AXIS, JOINED = -1, -2


class Factor(NamedTuple):
    """A digit of the index along an axis of a weight, or of a part of one.

    The axis is `NO_AXIS` where the weight is repeated, and `JOINED` where it lies beside others.
    """

    axis: int
    stride: int
    size: int
    is_reversed: bool = False


class Part(NamedTuple):
    """A slice of a factor, whose own factors are of a further axis; `start` may be traced."""

    factor: Factor
    start: Any
    width: int


class Join(NamedTuple):
    """An axis along which a weight lies beside others: its own factors, and where they start."""

    factors: tuple[Factor, ...]
    start: int
    total: int

    @property
    def whole(self) -> tuple[Factor, ...]:
        """The factors of the axis."""
        return (Factor(JOINED, 1, self.total),)


class Scan(NamedTuple):
    """A loop that takes an axis apart: its depth, the axis's factors, and their first iteration."""

    depth: int
    factors: tuple[Factor, ...]
    start: int = 0


Axes: TypeAlias = tuple[tuple[Factor, ...], ...]  # factors of each axis, major first


@dataclasses.dataclass(frozen=True)
class View:
    """An array of a program that holds a weight, or a part of one.

    Attributes:
      path: The weight's path in the parameters.
      shape: The weight's shape.
      axes: Factors of each axis of the array.
      parts: Slices that were taken; factors of part k are of axis `len(shape) + k`.
      scale: Scalar that the weight was multiplied by; None for 1.
      join: The axis along which the weight was joined with others, if it was.
      scanned: Loops around the array that take it apart.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    parts: tuple[Part, ...] = ()
    scale: Any = None
    join: Join | None = None
    scanned: tuple[Scan, ...] = ()

    @classmethod
    def of_weight(cls, path: str, shape: tuple[int, ...]) -> "View":
        """Returns the view of a whole weight."""
        axes = tuple((Factor(i, 1, n),) if n > 1 else () for i, n in enumerate(shape))
        return cls(path, shape, axes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(map(size_of, self.axes))

    def with_axes(self, axes: Iterable[Iterable[Factor]]) -> "View":
        """Returns the view of the same weight with other axes."""
        return dataclasses.replace(self, axes=tuple(map(tuple, axes)))

    def reshaped(self, shape: Sequence[int]) -> "View | None":
        """Returns the view after a reshape; None if an axis would join parts of factors."""
        rest = list(itertools.chain(*self.axes))
        axes = []
        for size in shape:
            taken = []
            while size > 1:
                head = rest.pop(0)
                if size % head.size == 0:
                    taken.append(head)
                    size //= head.size
                elif head.size % size == 0:
                    inner = head.size // size
                    taken.append(head._replace(stride=head.stride * inner, size=size))
                    rest.insert(0, head._replace(size=inner))
                    size = 1
                else:
                    return None
            axes.append(taken)
        return self.with_axes(axes)

    def scaled(self, factor: Any) -> "View":
        """Returns the view after a product with a scalar."""
        return dataclasses.replace(
            self, scale=factor if self.scale is None else self.scale * factor
        )

    def taken_apart(self, depth: int) -> "View | None":
        """Returns the view of an iteration of a loop over the first axis; None if in part."""
        factors, start = merged(self.axes[0]), 0
        rest = self.with_axes(self.axes[1:])
        if not factors or all(f.axis == NO_AXIS for f in factors):
            return rest
        if self.join is not None and factors == self.join.whole:
            rest = dataclasses.replace(rest, join=None)
            factors, start = self.join.factors, self.join.start
        if any(not 0 <= f.axis < len(self.shape) or f.is_reversed for f in factors):
            return None
        return dataclasses.replace(rest, scanned=(*self.scanned, Scan(depth, factors, start)))

    def joined(self, axis: int, start: int, total: int) -> "View | None":
        """Returns the view after others were put before and behind it; None if that was done."""
        if self.join is not None or self.sizes[axis] == total:
            return None if self.join is not None else self
        join = Join(self.axes[axis], start, total)
        return dataclasses.replace(
            self.with_axes(_replaced(self.axes, axis, join.whole)), join=join
        )

    def apart(self, axis: int) -> "View":
        """Returns the view of the weight alone along the axis where it is joined with others."""
        assert self.join is not None
        axes = _replaced(self.axes, axis, self.join.factors)
        return dataclasses.replace(self.with_axes(axes), join=None)

    def reversed(self, dimensions: Sequence[int]) -> "View":
        """Returns the view with some axes back to front: so are all digits of their indices."""

        def turned(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
            return tuple(f._replace(is_reversed=not f.is_reversed) for f in factors)

        return self.with_axes(turned(a) if i in dimensions else a for i, a in enumerate(self.axes))

    def transposed(self, order: Sequence[int]) -> "View":
        """Returns the view after a transpose."""
        return self.with_axes(self.axes[i] for i in order)

    def squeezed(self, dimensions: Sequence[int]) -> "View":
        """Returns the view without some axes of size 1."""
        return self.with_axes(a for i, a in enumerate(self.axes) if i not in dimensions)

    def broadcast(self, shape: Sequence[int], positions: Sequence[int]) -> "View":
        """Returns the view after a broadcast that puts axis i at `positions[i]`."""
        axes: list[tuple[Factor, ...]] = [(Factor(NO_AXIS, 1, n),) if n > 1 else () for n in shape]
        for axis, position in zip(self.axes, positions, strict=True):
            axes[position] = axis or axes[position]
        return self.with_axes(axes)

    def tiled(self, repeats: Sequence[int]) -> "View":
        """Returns the view after each axis was repeated as a whole."""
        pairs = zip(repeats, self.axes, strict=True)
        return self.with_axes(((Factor(NO_AXIS, 1, n),) if n > 1 else ()) + a for n, a in pairs)

    def sliced(self, axis: int, start: Any, width: int) -> "View | None":
        """Returns the view of a slice of an axis; None if the axis is not one factor."""
        factors = merged(self.axes[axis])
        if len(factors) != 1 or factors[0].axis == JOINED or factors[0].is_reversed:
            return None
        if factors[0].axis == NO_AXIS:
            new = factors[0]._replace(size=width)
            return self.with_axes(_replaced(self.axes, axis, (new,) if width > 1 else ()))
        new = Factor(len(self.shape) + len(self.parts), 1, width)
        view = self.with_axes(_replaced(self.axes, axis, (new,) if width > 1 else ()))
        return dataclasses.replace(view, parts=(*self.parts, Part(factors[0], start, width)))


def _replaced(axes: Axes, position: int, new: tuple[Factor, ...]) -> list[tuple[Factor, ...]]:
    return [new if i == position else axis for i, axis in enumerate(axes)]


def merged(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """Returns factors with neighbours joined where they are digits of one number."""
    result: list[Factor] = []
    for factor in factors:
        last = result[-1] if result else None
        if last is not None and last.axis == factor.axis == NO_AXIS:
            result[-1] = last._replace(size=last.size * factor.size)
        elif (
            last is not None
            and last.axis == factor.axis
            and last.stride == factor.stride * factor.size
            and last.is_reversed == factor.is_reversed
        ):
            result[-1] = factor._replace(size=last.size * factor.size)
        else:
            result.append(factor)
    return tuple(result)


def in_order(factors: Sequence[Factor]) -> list[int]:
    """Returns the order that sorts factors as the weight's own axes have them."""
    return sorted(range(len(factors)), key=lambda i: (factors[i].axis, -factors[i].stride))


def matrix_view(
    shape: tuple[int, ...], stack: Sequence[Factor], inputs: Sequence[Factor]
) -> MatrixView:
    """Returns the matrices of a weight of which some factors are stacked and some summed over."""
    roles = {**dict.fromkeys(stack, "stack"), **dict.fromkeys(inputs, "inputs")}
    pieces: list[tuple[int, str]] = []
    for axis, size in enumerate(shape):
        rest = size
        for factor in sorted((f for f in roles if f.axis == axis), key=lambda f: -f.stride):
            outer = rest // (factor.stride * factor.size)
            pieces += [(outer, "outputs")] * (outer > 1) + [(factor.size, roles[factor])]
            rest = factor.stride
        pieces += [(rest, "outputs")] * (rest > 1 or size == 1)
    names = [name for _, name in pieces]
    groups = [
        tuple(i for i, name in enumerate(names) if name == group)
        for group in ("stack", "inputs", "outputs")
    ]
    return MatrixView(tuple(n for n, _ in pieces), *groups)


def size_of(factors: Iterable[Factor]) -> int:
    """Returns how many entries an axis of these factors has."""
    return math.prod(factor.size for factor in factors)
