"""The result of a sweep: a table, the best trade-offs, a recommendation.

A row beats another if neither its metric nor its bytes are worse, and one of them is better.
"""

import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from jaxclip import plots
from jaxclip._core.grids import Bits
from jaxclip._core.html import html_report, html_table
from jaxclip._core.reports import format_table, to_json
from jaxclip._core.trees import PyTree
from jaxclip.sweeps.tasks import OUTRANKED
from jaxclip.training.stopping import Mode, StopReason


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


class SweepRow(NamedTuple):
    """One setting at one width, averaged over the seeds.

    Attributes:
      step_size: The step size.
      threshold: The number from which the box was made; inf for no box.
      bits: Width of the weights; None for weights as they were trained.
      metric: Mean of the metric over the seeds.
      standard_error: Standard deviation of the metric over the square root of the number of
        seeds; NaN for one seed.
      gap: Generalization gap, by which the metric is better on the training data; NaN without
        a `train_metric`.
      file_bytes: Mean size of the file in bytes.
      seconds_per_step: Time of training divided by the steps of all rows, which share the machine.
      weight_clip_rate: Mean fraction of the boxed weights that end on the bound, in [0, 1].
      num_diverged: Number of seeds that diverged, see `SweepResult.is_diverged`.
      is_outranked: True if the schedule of the sweep stopped the setting, because others were
        better; its numbers are those of the weights at that step.
    """

    step_size: float
    threshold: float
    bits: Bits | None
    metric: float
    standard_error: float
    gap: float
    file_bytes: float
    seconds_per_step: float
    weight_clip_rate: float
    num_diverged: int
    is_outranked: bool


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """Arrays of a sweep with named axes; `print` shows a table.

    Attributes:
      step_sizes: Float64, along the axis "step_size".
      thresholds: Float64, along the axis "threshold".
      seeds: Int64, along the axis "seed".
      bits: Widths along the axis "bits"; None for weights as they were trained.
      metrics: Scalars of `evaluate` by name, float64 of axes (step_size, threshold, seed, bits).
      file_bytes: Sizes of the files, float64 of axes (step_size, threshold, seed, bits).
      loss: Mean loss over the steps of the last record, of axes (step_size, threshold, seed).
      weight_clip_rate: Fraction of the boxed weights that end on the bound, of axes
        (step_size, threshold, seed).
      is_diverged: True where `loss` is not finite, or more than ten times all of these: the first
        finite loss, the smallest of the history, and the loss of weights of 0, which says what is
        bad where training starts from good weights. Of axes (step_size, threshold, seed).
      steps: Steps taken, of axes (step_size, threshold, seed).
      reason_codes: Codes of `StopReason`, of axes (step_size, threshold, seed); see `reason`.
      seconds_per_step: Time of training divided by the steps of all rows, which share the machine;
        of axes (step_size, threshold).
      recorded_at: Steps of the history, along the axis "record".
      history: "loss" and "weight_clip_rate" of axes (step_size, threshold, seed, record).
      metric: Name of the metric by which settings are judged.
      train_metric: Its name on the training data, or None.
      mode: "max" if a larger metric is better, "min" if a smaller one is.
      params: Trained parameters with leaves of axes (step_size, threshold, seed, ...), or None;
        `to_json` leaves them out.
    """

    step_sizes: np.ndarray
    thresholds: np.ndarray
    seeds: np.ndarray
    bits: tuple[Bits | None, ...]
    metrics: dict[str, np.ndarray]
    file_bytes: np.ndarray
    loss: np.ndarray
    weight_clip_rate: np.ndarray
    is_diverged: np.ndarray
    steps: np.ndarray
    reason_codes: np.ndarray
    seconds_per_step: np.ndarray
    recorded_at: np.ndarray
    history: dict[str, np.ndarray]
    metric: str
    train_metric: str | None
    mode: Mode
    params: PyTree = None

    def reason(self, i: int, j: int, seed: int = 0) -> StopReason:
        """Returns why training stopped, by the indices of step size, threshold and seed."""
        return list(StopReason)[int(self.reason_codes[i, j, seed]) - 1]

    def means(self) -> np.ndarray:
        """Returns the mean metric over the seeds, of axes (step_size, threshold, bits)."""
        return self.metrics[self.metric].mean(axis=2)

    def rows(self) -> list[SweepRow]:
        """Returns a row for each setting and width, for instance for `pandas.DataFrame`."""
        values = self.metrics[self.metric]
        mean, error = values.mean(axis=2), _standard_error(values)
        gap = np.full(mean.shape, np.nan)
        if self.train_metric is not None:
            sign = 1 if self.mode == "max" else -1
            with np.errstate(invalid="ignore"):
                gap = sign * (self.metrics[self.train_metric] - values).mean(axis=2)
        return [
            SweepRow(
                step_size=float(self.step_sizes[i]),
                threshold=float(self.thresholds[j]),
                bits=self.bits[b],
                metric=float(mean[i, j, b]),
                standard_error=float(error[i, j, b]),
                gap=float(gap[i, j, b]),
                file_bytes=float(self.file_bytes[i, j, :, b].mean()),
                seconds_per_step=float(self.seconds_per_step[i, j]),
                weight_clip_rate=float(self.weight_clip_rate[i, j].mean()),
                num_diverged=int(self.is_diverged[i, j].sum()),
                is_outranked=bool((self.reason_codes[i, j] == OUTRANKED).any()),
            )
            for i, j, b in np.ndindex(mean.shape)
        ]

    def pareto(self) -> list[SweepRow]:
        """Returns the rows that no other beats in both metric and bytes, smallest file first.

        A setting with a diverged seed is left out, and one that a schedule stopped.
        """
        rows = self._sound_rows()
        costs = [[self._cost(row), row.file_bytes] for row in rows]
        on_front = pareto_front(np.reshape(np.asarray(costs, np.float64), (len(rows), 2)))
        front = [row for row, is_on in zip(rows, on_front, strict=True) if is_on]
        return sorted(front, key=lambda row: (row.file_bytes, self._cost(row)))

    def recommend(self, max_loss: float = 0.01) -> SweepRow:
        """Returns the row with the smallest file among those nearly as good as the best row.

        Among files of one size it takes the one with the best metric. That metric is too
        optimistic, because the row was chosen by it: keep a test set that the sweep has not seen.

        Args:
          max_loss: Largest difference of the mean metric to the best, in its own units, up to
            the rounding of float32.

        Returns:
          A `SweepRow`.

        Raises:
          ValueError: If `max_loss` is negative or NaN, if each setting was outranked or has a
            diverged seed, or if the mean metric of all other settings is NaN.
        """
        if not max_loss >= 0:
            raise ValueError(f"max_loss must be at least 0, got {max_loss!r}.")
        sound = self._sound_rows()
        rows = [row for row in sound if not math.isnan(row.metric)]
        if not rows:
            reason = "each setting has a diverged seed"
            if any(row.is_outranked for row in self.rows()):
                reason = "each setting was outranked or has a diverged seed"
            if sound:
                reason = f"{self.metric!r} is NaN in each row without a diverged seed"
            raise ValueError(f"there is nothing to recommend: {reason}.")
        best = min(self._cost(row) for row in rows)
        # Metrics are usually float32: .97 and .96 must count as .01 apart.
        worst = best + max_loss + 4 * float(np.finfo(np.float32).eps) * abs(best)
        return min(
            (row for row in rows if self._cost(row) <= worst),
            key=lambda row: (row.file_bytes, self._cost(row)),
        )

    def params_of(self, row: SweepRow) -> PyTree:
        """Returns the trained parameters of a row before rounding; leaves have an axis of seeds.

        Raises:
          ValueError: If the sweep did not keep the parameters.
        """
        if self.params is None:
            raise ValueError("the parameters were not kept: sweep(..., keep_params=True).")
        i = int(np.flatnonzero(self.step_sizes == row.step_size)[0])
        j = int(np.flatnonzero(self.thresholds == row.threshold)[0])
        return jax.tree.map(lambda leaf: leaf[i, j], self.params)

    def _sound_rows(self) -> list[SweepRow]:
        return [row for row in self.rows() if not (row.num_diverged or row.is_outranked)]

    def _cost(self, row: SweepRow) -> float:
        return -row.metric if self.mode == "max" else row.metric

    # --- Text and files ---------------------------------------------------------------

    def table(self) -> str:
        """Returns all rows as a text table, a line for each setting and width."""
        return format_table(self._table_cells(), num_left=0)

    def _table_cells(self) -> list[list[str]]:
        """Returns the rows of the table, the titles first."""
        titles = ["step size", "threshold", "bits", self.metric, "+-", "gap", "bytes"]
        titles += ["ms/step", "on bound", "diverged", "outranked"]
        rows = self.rows()
        lines = [titles] + [_cells(row, len(self.seeds)) for row in rows]
        if not any(row.is_outranked for row in rows):
            lines = [cells[:-1] for cells in lines]
        return lines

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        names = ("step sizes", "thresholds", "seeds", "widths")
        sizes = zip((*self.loss.shape, len(self.bits)), names, strict=True)
        text = ", ".join(f"{size} {name}" for size, name in sizes)
        return f"SweepResult({text}, metric={self.metric!r})"

    def _repr_html_(self) -> str:
        front = {row[:3] for row in self.pareto()}  # whole rows may hold NaN, which equals nothing
        bold = {i + 1 for i, row in enumerate(self.rows()) if row[:3] in front}
        note = "In bold: no other row is better in both the metric and the bytes."
        table = html_table(self._table_cells(), num_left=0, bold=bold)
        return html_report(repr(self), table, f"<div>{note}</div>")

    def to_csv(self, path: str | os.PathLike | None = None) -> str:
        """Returns the rows as CSV with a header, and writes them to `path` if it is given."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(SweepRow._fields)
        writer.writerows(self.rows())
        return _written(text.getvalue(), path)

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """Returns all but the parameters as JSON, and writes it to `path` if it is given.

        `from_json` reads it back exactly: NaN and infinities, which JSON lacks, become the
        strings "nan", "inf" and "-inf".
        """
        names = [f.name for f in dataclasses.fields(self) if f.name != "params"]
        fields = {name: to_json(getattr(self, name)) for name in names}
        return _written(json.dumps(fields, allow_nan=False), path)

    @classmethod
    def from_json(cls, text: str) -> "SweepResult":
        """Returns the result that `to_json` wrote.

        Raises:
          ValueError: If `text` is not JSON of a sweep.
        """
        fields = json.loads(text)
        names = {f.name for f in dataclasses.fields(cls)} - {"params"}
        if not isinstance(fields, dict) or set(fields) != names:
            raise ValueError("text must be the result of SweepResult.to_json, with all its fields.")
        kinds = {"seeds": np.int64, "steps": np.int64, "reason_codes": np.int64}
        kinds |= {"recorded_at": np.int64, "is_diverged": np.bool_}
        for name, value in fields.items():
            if isinstance(value, dict):
                fields[name] = {k: np.asarray(x, np.float64) for k, x in value.items()}
            elif isinstance(value, list) and name != "bits":
                fields[name] = np.asarray(value, np.float64).astype(kinds.get(name, np.float64))
        fields["bits"] = tuple(fields["bits"])
        return cls(**fields)

    def plot(self, file: str | os.PathLike | None = None, *, max_loss: float = 0.01) -> Any:
        """Draws the metric against the bytes, with the front and the recommendation.

        Args:
          file: Path to save the picture to, or None.
          max_loss: Largest loss of the recommendation, see `recommend`.

        Returns:
          A matplotlib figure.

        Raises:
          ImportError: If matplotlib is not installed; the message names the extra.
        """
        return plots.front(
            self._sound_rows(), self.pareto(), self.recommend(max_loss), file, metric=self.metric
        )


def _standard_error(values: np.ndarray) -> np.ndarray:
    num_seeds = values.shape[2]
    if num_seeds == 1:
        return np.full((*values.shape[:2], values.shape[3]), np.nan)
    with np.errstate(invalid="ignore"):  # an infinite metric has none
        return values.std(axis=2, ddof=1) / math.sqrt(num_seeds)


def _cells(row: SweepRow, num_seeds: int) -> list[str]:
    cells = [f"{row.step_size:.3g}", f"{row.threshold:.3g}"]
    cells += ["as is" if row.bits is None else str(row.bits), f"{row.metric:.4f}"]
    cells += ["" if math.isnan(x) else f"{x:.4f}" for x in (row.standard_error, row.gap)]
    cells += [f"{row.file_bytes:,.0f}", f"{1e3 * row.seconds_per_step:.3f}"]
    cells += [f"{row.weight_clip_rate:.0%}"]
    cells += [f"{row.num_diverged}/{num_seeds}" if row.num_diverged else ""]
    return [*cells, "yes" if row.is_outranked else ""]


def _written(text: str, path: str | os.PathLike | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
