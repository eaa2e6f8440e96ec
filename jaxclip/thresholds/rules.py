"""The type of a threshold rule: a callable `array -> threshold`, made by a factory."""

import dataclasses
import re
from collections.abc import Hashable, Sequence
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.grids import WHOLE_ARRAY, Grid
from jaxclip._core.layouts import Layout
from jaxclip._core.trees import PyTree

Bound: TypeAlias = float | jax.Array  # a threshold as a leaf gets it


def _hashable(field: object) -> Hashable:
    """Returns an array's contents, or the identity of a traced one; other fields as they are."""
    if not isinstance(field, (np.ndarray, jax.Array)):
        return tuple(map(_hashable, field)) if isinstance(field, (list, tuple)) else field
    if not checks.is_concrete(field):
        return id(field)
    array = np.asarray(field)
    return array.shape, array.dtype.str, array.tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdRule:
    """A callable `array -> threshold`, made by a factory: a value, equal and hashed by its fields.

    Attributes:
      grid: The blocks that share a threshold; for rules that measure errors, the codes too.
      is_blockwise: True if a block's threshold depends on its entries alone, so that an array
        may be measured in parts.
      is_leafwise: True if a leaf's threshold depends on that leaf alone.
      needs_coding: True if the rule is for codes that are entropy-coded.
      grid_name: The factory's name if the rule measures errors on a grid, which complex numbers
        lack; None if it measures magnitudes.
    """

    grid: Grid = WHOLE_ARRAY
    is_blockwise: ClassVar[bool] = True
    is_leafwise: ClassVar[bool] = True
    needs_coding: ClassVar[bool] = False
    grid_name: ClassVar[str | None] = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ThresholdRule) and self._as_value() == other._as_value()

    def __hash__(self) -> int:
        return hash(self._as_value())

    def _as_value(self) -> tuple:
        """Returns the class and the fields, arrays by their contents, to compare and to hash."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self), *map(_hashable, fields)

    def __call__(self, array: ArrayLike) -> jax.Array:
        """Returns thresholds that broadcast against `array`, in float32."""
        self.refuse_step(array)
        array = jnp.asarray(array)
        return self.grid.expand(self.compact(array), array.shape)

    def compact(self, array: jax.Array) -> jax.Array:
        """Returns one threshold for each block; 0 for blocks of zeros."""
        array = jnp.asarray(array)
        self.check_leaf("", array)
        blocks, axes = self.grid.split(array)
        counts = self.grid.block_counts(array.shape)
        return self.grid.compact(self.measure(blocks, axes, counts), array.ndim)

    def measure(self, blocks: jax.Array, axes: tuple[int, ...], counts: np.ndarray) -> jax.Array:
        """Returns the threshold of each block, reduced over `axes` with dims kept."""
        # `counts` has the entries of each block, without the zeros that pad the last group.
        raise TypeError(f"{type(self).__name__} must define `measure`.")

    def pool(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Returns one threshold for the entries of all arrays; `per_tree` calls it."""
        raise TypeError(f"{type(self).__name__} has no threshold for many arrays.")

    def for_leaves(self, leaves: Sequence[tuple[str, ArrayLike]], step: ArrayLike) -> list[Bound]:
        """Returns the thresholds of leaves with their paths; `resolve_threshold` calls it."""
        return [self.for_leaf(path, leaf, step) for path, leaf in leaves]

    def for_leaf(self, path: str, leaf: ArrayLike, step: ArrayLike) -> Bound:
        """Returns the threshold of the leaf at `path`."""
        del step
        self.check_leaf(path, leaf)
        return self(leaf)

    def refuse_step(self, given: PyTree) -> None:
        """Raises TypeError if the rule was called with a step, as a schedule is."""
        factory = re.sub("(?<=[a-z])(?=[A-Z])", "_", type(self).__name__.lstrip("_")).lower()
        checks.refuse_step(f"the rule {factory}", given, "an array of weights")

    def check_leaf(self, path: str, leaf: ArrayLike) -> None:
        """Raises TypeError if the leaf at `path` is complex and the rule is for a grid."""
        if self.grid_name is not None and jnp.iscomplexobj(leaf):
            where = f"{path!r}" if path else "the array"
            raise TypeError(
                f"{self.grid_name} has no grid for complex numbers, but {where} is complex: use a "
                "rule for magnitudes, such as std_multiple."
            )

    def at_path(self, path: str) -> "ThresholdRule":
        """Returns this rule for the leaf at `path`; `compress` calls it before `bind`."""
        del path
        return self

    def in_layout(self, layout: Layout) -> "ThresholdRule":
        """Returns this rule for a leaf of that layout, unless it was made for one."""
        del layout
        return self

    def bind(self, grid: Grid) -> "ThresholdRule":
        """Returns this rule for one grid; `quantize` calls it."""
        return dataclasses.replace(self, grid=grid)
