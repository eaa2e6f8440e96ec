"""The rows of a sweep's table, and the front: those that no other beats."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxclip import plots
from jaxclip._core.grids import Bits, Grid


class SweepRow(NamedTuple):
    """One setting in one kind of file, averaged over the seeds.

    Attributes:
      step_size: The step size.
      threshold: The number from which the box was made; inf for no box.
      bits: Width or `Grid` of the weights; None for weights as they were trained, or a budget.
      metric: Mean of the metric over the seeds.
      standard_error: Standard deviation of the metric over the square root of the number of
        seeds; NaN for one seed.
      gap: Generalization gap, by which the metric is better on the training data; NaN without
        a `train_metric`.
      file_bytes: Mean size of the file in bytes; the least that was made if the budget is out of
        reach.
      seconds_per_step: Time of training divided by the steps of all rows, which share the machine.
      weight_clip_rate: Mean fraction of the boxed weights that end on the bound, in [0, 1].
      num_diverged: Number of seeds that diverged, see `SweepResult.is_diverged`.
      is_outranked: True if the schedule of the sweep stopped the setting, because others were
        better; its numbers are those of the weights at that step.
      model: Name of the model; None if there is only one.
      weight_decay: The weight decay; None if the sweep has no weight decays.
      density: The fraction of weights kept; None if the sweep has no densities.
      budget: Largest size of the file in bytes; None for a width.
      is_out_of_reach: True if no file of some seed is within the budget.
      reason: A sentence on why the row is recommended, else "".
    """

    step_size: float
    threshold: float
    bits: Bits | Grid | None
    metric: float
    standard_error: float
    gap: float
    file_bytes: float
    seconds_per_step: float
    weight_clip_rate: float
    num_diverged: int
    is_outranked: bool
    model: str | None = None
    weight_decay: float | None = None
    density: float | None = None
    budget: int | None = None
    is_out_of_reach: bool = False
    reason: str = ""

    @property
    def setting(self) -> tuple:
        """The compared values as a key; the whole row may hold NaN, which equals nothing."""
        compared = (self.model, self.weight_decay, self.density, self.step_size, self.threshold)
        return (*compared, self.bits, self.budget)

    @property
    def net_name(self) -> str:
        """The model and the numbers that it was trained with, in words."""
        numbers = {"weight decay": self.weight_decay, "density": self.density}
        numbers |= {"step size": self.step_size}
        numbers |= {} if math.isinf(self.threshold) else {"threshold": self.threshold}
        names = [f"{name} {x:.3g}" for name, x in numbers.items() if x is not None]
        return ", ".join(names if self.model is None else [self.model, *names])

    @property
    def file_name(self) -> str:
        """The budget of the file, or the width of its weights, in words."""
        return plots.width_name(self.bits) if self.budget is None else f"{self.budget:,} B"

    @property
    def file_kind(self) -> str:
        """The same for all budgets."""
        return self.file_name if self.budget is None else "within a budget"

    @property
    def is_sound(self) -> bool:
        """True if all seeds were trained to the end, and have a file within the budget."""
        return not (self.num_diverged or self.is_outranked or self.is_out_of_reach)


def cells_of(row: SweepRow, num_seeds: int) -> list[str]:
    """Returns the cells of a row, also those that a table may leave out."""
    optional = (row.weight_decay, row.density)
    cells = [row.model or "", *("" if x is None else f"{x:.3g}" for x in optional)]
    cells += [f"{row.step_size:.3g}", f"{row.threshold:.3g}"]
    cells += [row.file_name, "out of reach" if row.is_out_of_reach else f"{row.metric:.4f}"]
    cells += ["" if math.isnan(x) else f"{x:.4f}" for x in (row.standard_error, row.gap)]
    cells += [f"{row.file_bytes:,.0f}", f"{1e3 * row.seconds_per_step:.3f}"]
    cells += [f"{row.weight_clip_rate:.0%}"]
    cells += [f"{row.num_diverged}/{num_seeds}" if row.num_diverged else ""]
    return [*cells, "yes" if row.is_outranked else ""]


def pareto_front(costs: ArrayLike) -> np.ndarray:
    """Returns True for the points that no other point beats.

    A point beats another if none of its costs is larger and one is smaller.

    Args:
      costs: Array of shape (points, objectives); smaller is better. Infinities are compared as
        numbers.

    Returns:
      Bools of shape (points,). Equal points are all on the front or all off it; a point with
      a NaN is off it and beats none.

    Raises:
      ValueError: If `costs` does not have two dimensions, or no objective.

    Example:
      >>> pareto_front([[1, 4], [2, 2], [3, 3], [2, 2], [float("nan"), 0]])
      array([ True,  True, False,  True, False])
    """
    costs = np.array(costs, np.float64)
    if costs.ndim != 2 or costs.shape[1] == 0:
        raise ValueError(f"costs must be of shape (points, objectives), got {costs.shape}.")
    is_known = ~np.any(np.isnan(costs), axis=1)
    is_on_front = is_known.copy()
    # In this order a point comes after all that beat it, so comparing with the front suffices.
    front: list[np.ndarray] = []
    for i in np.lexsort(costs.T[::-1]):
        if not is_known[i]:
            continue
        point = costs[i]
        others = np.asarray(front).reshape(-1, costs.shape[1])
        beaten = (others <= point).all(axis=1) & (others < point).any(axis=1)
        is_on_front[i] = not beaten.any()
        if is_on_front[i]:
            front.append(point)
    return is_on_front
