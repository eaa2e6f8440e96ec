"""The rule `t = kappa * sqrt(2 / fan_in)`, with the fan-in read from a leaf's path and shape."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.grids import WHOLE_ARRAY
from jaxclip._core.layouts import LAYOUTS, Layout, layouts_of, output_axes
from jaxclip.thresholds.by_magnitude import max_abs
from jaxclip.thresholds.rules import Bound, ThresholdRule
from jaxclip.thresholds.values import as_threshold, check_number_or_schedule


@dataclasses.dataclass(frozen=True, eq=False)
class _FanIn(ThresholdRule):
    kappa: ArrayLike | optax.Schedule = 1.0
    stacked_axes: int = 0
    out_axes: tuple[int, ...] | None = None
    layout: Layout | None = None
    path: str = ""
    is_blockwise: ClassVar[bool] = False  # fan-in depends on the shape of the whole array

    def __call__(self, array: ArrayLike) -> Any:  # inf, a number, for an unbounded leaf
        self.refuse_step(array)
        return self.for_leaf(self.path, array, jnp.zeros((), jnp.int32))

    def for_leaves(self, leaves: Sequence[tuple[str, ArrayLike]], step: ArrayLike) -> list[Bound]:
        layouts = layouts_of([path for path, _ in leaves], self.layout)
        return [
            self.in_layout(layout).for_leaf(path, leaf, step)
            for (path, leaf), layout in zip(leaves, layouts, strict=True)
        ]

    def for_leaf(self, path: str, leaf: ArrayLike, step: ArrayLike) -> Bound:
        num_inputs = self.num_inputs(path, np.shape(leaf))
        if num_inputs is None:
            return float("inf")
        kappa = checks.value_at("kappa", self.kappa, step)
        # A number of Python from a schedule is data, too: it may be negative or NaN.
        kappa = jnp.asarray(kappa) if callable(self.kappa) else kappa
        return as_threshold(kappa) * float(np.sqrt(2 / max(num_inputs, 1)))

    def num_inputs(self, path: str, shape: tuple[int, ...]) -> int | None:
        """Returns the number of inputs that each output sums; None for unbounded leaves."""
        names = path.split("/")
        shape = shape[self.stacked_axes :]
        if len(shape) < 2 or names[-1] in ("bias", "scale"):
            return None
        if names[-1] == "embedding" and self.out_axes is None:
            return shape[-1]
        axes = self.out_axes
        if axes is None:
            found = output_axes(path, shape, layouts_of([path], self.layout)[0])
            axes = found if isinstance(found, tuple) else (found,)
        outputs = _axes_within(axes, path, shape)
        return int(np.prod([n for axis, n in enumerate(shape) if axis not in outputs]))

    def in_layout(self, layout: Layout) -> ThresholdRule:
        return self if self.layout is not None else dataclasses.replace(self, layout=layout)

    def at_path(self, path: str) -> ThresholdRule:
        return dataclasses.replace(self, path=path)

    def compact(self, array: jax.Array) -> jax.Array:
        if self.num_inputs(self.path, np.shape(array)) is None:
            if not self.path:
                raise ValueError(f"fan_in needs two dimensions or more, got shape {array.shape}.")
            # An unbounded leaf is not clipped.
            return dataclasses.replace(max_abs(), grid=self.grid).compact(array)
        return jnp.full(self.grid.scale_shape(array.shape), self(array), jnp.float32)


def _axes_within(axes: tuple[int, ...], path: str, shape: tuple[int, ...]) -> set[int]:
    rank = len(shape)
    if any(not -rank <= a < rank for a in axes):
        raise ValueError(
            f"out_axes must be in [{-rank}, {rank}) for {path!r} of shape {shape}, got {axes}."
        )
    return {a % rank for a in axes}


@checks.refuses_step
def fan_in(
    kappa: ArrayLike | optax.Schedule = 1.0,
    *,
    stacked_axes: int = 0,
    out_axes: int | Sequence[int] | None = None,
    layout: Layout | None = None,
) -> ThresholdRule:
    """Makes the rule `t = kappa * sqrt(2 / fan_in)`, kappa times the He standard deviation.

    Fan-in is read from the shape. In flax's layouts it is the product of all axes but the last
    (Dense, Conv HWIO and DHWIO with their groups, DenseGeneral with one output axis, the output
    kernel of attention); the first axis for the query, key and value kernels of attention; the
    last axis for an `embedding`. In the layouts of PyTorch and equinox it is the product of all
    axes but the first. Experts stacked in three or four dimensions are no inputs. Leaves with
    fewer than two dimensions, and those named `bias` or `scale`, get `inf`: they stay free.

    Args:
      kappa: Number in [0, inf], a traced scalar, or a schedule `step -> number`.
      stacked_axes: Leading axes that stack layers (scan over layers), not counted.
      out_axes: Axis or axes of the outputs, counted without the stacked ones; the inputs are
        the others. Give it where the shape is ambiguous: `(-2, -1)` for a DenseGeneral with two
        output axes. None follows the rules above.
      layout: "in_out" (flax) or "out_in" (PyTorch, equinox). None takes it from the names of
        the leaves, as in `compress`: "out_in" for `weight`. There a leaf of three dimensions
        whose last axis is 32 or longer is a stack of matrices; give `out_axes` for a kernel that
        long.

    Returns:
      A rule; on one array it gives a scalar threshold. For layers of different layout, a
      prefix tree of rules. `compress` takes the largest weight of a leaf that stays free.

    Raises:
      TypeError: If `kappa` is not a number or a schedule.
      ValueError: If `kappa` is negative or NaN, `stacked_axes` not a count, `out_axes` not of
        axes, `layout` unknown, or both are given; when it is used, if an axis is out of range,
        with the path.

    Example:
      >>> float(fan_in(1.0)(jnp.zeros((8, 3)))), float(fan_in(1.0, out_axes=0)(jnp.zeros((8, 2))))
      (0.5, 1.0)

    References:
      He et al., Delving Deep into Rectifiers, 2015, https://arxiv.org/abs/1502.01852
      Elsayed et al., Weight Clipping for Deep Continual and Reinforcement Learning, 2024,
      https://arxiv.org/abs/2407.01704
    """
    if out_axes is not None:
        axes: Any = tuple(out_axes) if isinstance(out_axes, (tuple, list)) else (out_axes,)
        are_integers = [isinstance(a, (int, np.integer)) and not isinstance(a, bool) for a in axes]
        if not (axes and all(are_integers)):
            raise ValueError(f"out_axes must be one or more integers, got {out_axes!r}.")
        out_axes = tuple(int(a) for a in axes)
        if layout is not None:
            raise ValueError("out_axes and layout say the same thing: give one of them.")
    checks.check_choice("layout", layout, (None, *LAYOUTS))
    check_number_or_schedule("kappa", kappa)
    checks.check_count("stacked_axes", stacked_axes, at_least=0)
    return _FanIn(WHOLE_ARRAY, kappa, stacked_axes, out_axes, layout)
