"""The type of a threshold rule."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core.grids import WHOLE_ARRAY, Grid

# --- Rules ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ThresholdRule:
    """A callable `array -> threshold`, made by a factory.

    Attributes:
      grid: Which entries share a threshold; of rules for a grid, its codes too.
      is_blockwise: Whether each block's threshold follows from its entries alone, so that an
        array may be measured in parts.
      is_leafwise: Whether each leaf's threshold follows from that leaf alone.
      grid_name: The factory's name if it measures errors on a grid, which complex numbers have
        not; None if it goes by magnitudes.
    """

    grid: Grid = WHOLE_ARRAY
    is_blockwise: ClassVar[bool] = True
    is_leafwise: ClassVar[bool] = True
    grid_name: ClassVar[str | None] = None

    def __call__(self, array: ArrayLike) -> jax.Array:
        """Returns thresholds that broadcast against `array`, in float32."""
        array = jnp.asarray(array)
        return self.grid.expand(self.compact(array), array.shape)

    def compact(self, array: jax.Array) -> jax.Array:
        """Returns one threshold a block; 0 for blocks of zeros."""
        array = jnp.asarray(array)
        self.check_leaf("", array)
        blocks, axes = self.grid.split(array)
        counts = self.grid.block_counts(array.shape)
        return self.grid.compact(self.measure(blocks, axes, counts), array.ndim)

    def measure(self, blocks: jax.Array, axes: tuple[int, ...], counts: np.ndarray) -> jax.Array:
        """Returns the threshold of each block, reduced over `axes` with dims kept.

        `counts` is the number of entries of each block without the zeros that pad the
        last group; it broadcasts against the result.
        """
        raise TypeError(f"{type(self).__name__} must define `measure`.")

    def pool(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Returns one threshold for the entries of all arrays; what `per_tree` calls."""
        raise TypeError(f"{type(self).__name__} has no threshold for many arrays.")

    def for_leaves(self, leaves: Sequence[tuple[str, Any]], step: ArrayLike) -> list[Any]:
        """Returns the thresholds of some leaves and their paths; `resolve_threshold` calls it."""
        return [self.for_leaf(path, leaf, step) for path, leaf in leaves]

    def for_leaf(self, path: str, leaf: Any, step: ArrayLike) -> Any:
        """Returns the threshold of the leaf at `path`."""
        del step
        self.check_leaf(path, leaf)
        return self(leaf)

    def check_leaf(self, path: str, leaf: Any) -> None:
        """Raises TypeError if the leaf at `path` is complex and the rule is for a grid."""
        if self.grid_name is not None and jnp.iscomplexobj(leaf):
            where = f"'{path}'" if path else "the array"
            raise TypeError(
                f"{self.grid_name} has no grid for complex numbers, which {where} has: bound it "
                "by a rule for magnitudes, such as std_multiple."
            )

    def at_path(self, path: str) -> "ThresholdRule":
        """Returns this rule for the leaf at `path`; what `compress` calls before it is bound."""
        del path
        return self

    def bind(self, grid: Grid) -> "ThresholdRule":
        """Returns this rule for one grid; what `quantize` calls."""
        return dataclasses.replace(self, grid=grid)
