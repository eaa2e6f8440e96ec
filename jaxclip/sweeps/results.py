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
from typing import Any

import jax
import numpy as np

from jaxclip import plots
from jaxclip._core import checks
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.html import html_report, html_table
from jaxclip._core.reports import format_table, to_json
from jaxclip._core.trees import PyTree
from jaxclip.sweeps.table import SweepRow, cells_of, pareto_front
from jaxclip.sweeps.tasks import OUTRANKED
from jaxclip.training.stopping import Mode, StopReason

# Axes of settings, in their order, and the fields of a result with their values.
AXES = {
    "model": "models",
    "weight_decay": "weight_decays",
    "density": "densities",
    "step_size": "step_sizes",
    "threshold": "thresholds",
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """Arrays of a sweep with named axes; `print` shows a table.

    The axes of settings are those of model, weight_decay and density that the sweep was given,
    then step_size and threshold. The axis "file" has the widths, and then the budgets.

    Attributes:
      step_sizes: Float64, along the axis "step_size".
      thresholds: Float64, along the axis "threshold".
      seeds: Int64, along the axis "seed".
      bits: Widths and `Grid`s along the axis "file"; None for weights as they were trained.
      metrics: Scalars of `evaluate` by name, float64 of axes (*settings, seed, file). NaN where a
        budget is out of reach, or the row diverged and has none.
      file_bytes: Sizes of the files, float64 of axes (*settings, seed, file). Where a budget is out
        of reach, the least size that was made.
      loss: Mean loss over the steps of the last record, of axes (*settings, seed).
      weight_clip_rate: Fraction of the boxed weights that end on the bound, of axes
        (*settings, seed).
      is_diverged: True where `loss` is not finite, or more than ten times all of these: the first
        finite loss, the smallest of the history, and the loss of weights of 0, which says what is
        bad where training starts from good weights. Of axes (*settings, seed).
      steps: Steps taken, of axes (*settings, seed).
      reason_codes: Codes of `StopReason`, of axes (*settings, seed); see `reason`.
      seconds_per_step: Time of training divided by the steps of all rows, which share the machine;
        of axes (*settings).
      recorded_at: Steps of the history, along the axis "record".
      history: "loss" and "weight_clip_rate" of axes (*settings, seed, record).
      metric: Name of the metric by which settings are judged.
      train_metric: Its name on the training data, or None.
      mode: "max" if a larger metric is better, "min" if a smaller one is.
      params: Trained parameters with leaves of axes (*settings, seed, ...), or None; of several
        models a dict of them by name, without the axis of models. `to_json` leaves them out.
      models: Names along the axis "model", or None if there is only one.
      weight_decays: Float64, along the axis "weight_decay", or None.
      densities: Float64, along the axis "density", or None.
      budgets: Largest sizes of files along the axis "file", after the widths.
    """

    step_sizes: np.ndarray
    thresholds: np.ndarray
    seeds: np.ndarray
    bits: tuple[Bits | Grid | None, ...]
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
    models: tuple[str, ...] | None = None
    weight_decays: np.ndarray | None = None
    densities: np.ndarray | None = None
    budgets: tuple[int, ...] = ()

    def reason(self, *index: int) -> StopReason:
        """Returns why training stopped, by the indices of the setting, and of a seed if not 0."""
        index += (0,) * (self.reason_codes.ndim - len(index))
        return list(StopReason)[int(self.reason_codes[index]) - 1]

    def means(self) -> np.ndarray:
        """Returns the mean metric over the seeds, of axes (*settings, file)."""
        return self.metrics[self.metric].mean(axis=-2)

    def rows(self) -> list[SweepRow]:
        """Returns a row for each setting and file, for instance for `pandas.DataFrame`."""
        values = self.metrics[self.metric]
        mean, error, gap = values.mean(axis=-2), _standard_error(values), np.nan * values[..., 0, :]
        if self.train_metric is not None:
            sign = 1 if self.mode == "max" else -1
            with np.errstate(invalid="ignore"):
                gap = sign * (self.metrics[self.train_metric] - values).mean(axis=-2)
        statistics = {"metric": mean, "standard_error": error, "gap": gap}
        return [
            self._row(at, {name: float(x[at]) for name, x in statistics.items()})
            for at in np.ndindex(mean.shape)
        ]

    def _row(self, at: tuple[int, ...], statistics: dict[str, Any]) -> SweepRow:
        """Returns the row at the indices of a setting and a file."""
        setting, file = at[:-1], at[-1]
        found = dict(zip(self._axes(), setting, strict=True))
        of_model = None if self.models is None else self.models[found.pop("model")]
        numbers = {name: float(self._axes()[name][i]) for name, i in found.items()}
        is_width = file < len(self.bits)
        budget = None if is_width else self.budgets[file - len(self.bits)]
        sizes = self.file_bytes[setting][:, file]
        is_over = budget is not None and bool((sizes > budget).any())
        return SweepRow(
            step_size=numbers.pop("step_size"),
            threshold=numbers.pop("threshold"),
            bits=self.bits[file] if is_width else None,
            file_bytes=float(sizes.max() if is_over else sizes.mean()),
            seconds_per_step=float(self.seconds_per_step[setting]),
            weight_clip_rate=float(self.weight_clip_rate[setting].mean()),
            num_diverged=int(self.is_diverged[setting].sum()),
            is_outranked=bool((self.reason_codes[setting] == OUTRANKED).any()),
            model=of_model,
            weight_decay=numbers.get("weight_decay"),
            density=numbers.get("density"),
            budget=budget,
            is_out_of_reach=is_over,
            **statistics,
        )

    def _axes(self) -> dict[str, Any]:
        """Returns the values along the axes of settings, in their order."""
        found = {name: getattr(self, field) for name, field in AXES.items()}
        return {name: values for name, values in found.items() if values is not None}

    def pareto(self) -> list[SweepRow]:
        """Returns the rows that no other beats in both metric and bytes, smallest file first.

        A setting with a diverged seed is left out, one that a schedule stopped, and a budget that
        is out of reach.
        """
        rows = self._sound_rows()
        costs = [[self._cost(row), row.file_bytes] for row in rows]
        on_front = pareto_front(np.reshape(np.asarray(costs, np.float64), (len(rows), 2)))
        front = [row for row, is_on in zip(rows, on_front, strict=True) if is_on]
        return sorted(front, key=lambda row: (row.file_bytes, self._cost(row)))

    def recommend(self, max_loss: float | None = None, *, max_bytes: int | None = None) -> SweepRow:
        """Returns the row with the smallest file among those nearly as good as the best row.

        With `max_bytes`, rows count whose file is within it for every seed, and by default the
        best of them is recommended. Among files of one size it takes the one with the best
        metric. That metric is too optimistic, because the row was chosen by it: keep a test set
        that the sweep has not seen.

        Args:
          max_loss: Largest difference of the mean metric to the best, in its own units, up to
            the rounding of float32. None is 0 with `max_bytes`, else 0.01.
          max_bytes: Largest size of the file in bytes; None for any.

        Returns:
          A `SweepRow`; its `reason` says in a sentence why it is recommended.

        Raises:
          ValueError: If `max_loss` is negative or NaN, `max_bytes` is not an integer of at least 1
            or below all files (the message has the least), if each setting was outranked or has
            a diverged seed, or if the mean metric of all other settings is NaN.
        """
        if max_bytes is not None:
            checks.check_count("max_bytes", max_bytes)
        if max_loss is None:
            max_loss = 0.01 if max_bytes is None else 0.0
        if not max_loss >= 0:
            raise ValueError(f"max_loss must be at least 0, got {max_loss!r}.")
        rows = self._candidates(max_bytes)
        best, sign = min(self._cost(row) for row in rows), -1 if self.mode == "max" else 1
        # Metrics are usually float32: .97 and .96 must count as .01 apart.
        worst = best + max_loss + 4 * float(np.finfo(np.float32).eps) * abs(best)
        good = [row for row in rows if self._cost(row) <= worst]
        row = min(good, key=lambda row: (row.file_bytes, self._cost(row)))
        size = "" if max_bytes is None else f" of at most {max_bytes:,} bytes"
        reason = f"Of {len(rows)} files{size} it has the best {self.metric}, {row.metric:.4g}."
        if len(good) > 1:
            reason = (
                f"Of {len(rows)} files{size} it is the smallest of {len(good)} whose "
                f"{self.metric} is within {max_loss:g} of the best, {sign * best:.4g}."
            )
        return row._replace(reason=reason)

    def params_of(self, row: SweepRow, seed: int | None = None) -> PyTree:
        """Returns the trained parameters of a row before rounding.

        Args:
          row: A row of this result.
          seed: Index along the axis of seeds; None for leaves with an axis of seeds in front.

        Raises:
          ValueError: If the sweep did not keep the parameters.
        """
        if self.params is None:
            raise ValueError("the parameters were not kept: sweep(..., keep_params=True).")
        params, axes = self.params, self._axes()
        if self.models is not None:
            params = params[row.model]
            axes.pop("model")
        at = tuple(
            int(np.flatnonzero(values == getattr(row, name))[0]) for name, values in axes.items()
        )
        return jax.tree.map(lambda leaf: leaf[at] if seed is None else leaf[at][seed], params)

    def _sound_rows(self) -> list[SweepRow]:
        return [row for row in self.rows() if row.is_sound]

    def _candidates(self, max_bytes: int | None) -> list[SweepRow]:
        """Returns rows that may be recommended; raises if there are none."""
        rows, largest = self.rows(), self.file_bytes.max(axis=-2).ravel()
        pairs = list(zip(rows, largest, strict=True))
        found = [(row, size) for row, size in pairs if row.is_sound]
        known = [(row, size) for row, size in found if not math.isnan(row.metric)]
        within = [row for row, size in known if max_bytes is None or size <= max_bytes]
        if within:
            return within
        reachable = [size for row, size in pairs if not (row.num_diverged or row.is_outranked)]
        least = f"the least of all files is {min(reachable, default=0):,.0f} bytes"
        if known:
            raise ValueError(f"max_bytes={max_bytes:,} is out of reach: {least}.")
        reason = "each setting has a diverged seed"
        if any(row.is_outranked for row in rows):
            reason = "each setting was outranked or has a diverged seed"
        if reachable:
            reason = f"each budget is out of reach, {least}"
        if found:
            reason = f"{self.metric!r} is NaN in each row without a diverged seed"
        raise ValueError(f"there is nothing to recommend: {reason}.")

    def _cost(self, row: SweepRow) -> float:
        return -row.metric if self.mode == "max" else row.metric

    # --- Text and files ---------------------------------------------------------------

    def table(self) -> str:
        """Returns all rows as a text table, a line for each setting and width."""
        return format_table(self._table_cells(), num_left=0)

    def _table_cells(self) -> list[list[str]]:
        """Returns the rows of the table, the titles first."""
        titles = ["model", "decay", "density", "step size", "threshold", "file", self.metric, "+-"]
        titles += ["gap", "bytes", "ms/step", "on bound", "diverged", "outranked"]
        rows = self.rows()
        lines = [titles] + [cells_of(row, len(self.seeds)) for row in rows]
        is_shown = {"model": self.models is not None, "decay": self.weight_decays is not None}
        has_box = bool(np.isfinite(self.thresholds).any())
        is_shown |= {"density": self.densities is not None}
        is_shown |= {"threshold": has_box, "on bound": has_box}
        is_shown |= {"outranked": any(row.is_outranked for row in rows)}
        kept = [i for i, title in enumerate(titles) if is_shown.get(title, True)]
        return [[line[i] for i in kept] for line in lines]

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        sizes = {AXES[name].replace("_", " "): len(x) for name, x in self._axes().items()}
        sizes |= {"seeds": len(self.seeds), "widths": len(self.bits), "budgets": len(self.budgets)}
        text = ", ".join(f"{size} {name}" for name, size in sizes.items() if size)
        return f"SweepResult({text}, metric={self.metric!r})"

    def _repr_html_(self) -> str:
        front = {row.setting for row in self.pareto()}
        bold = {i + 1 for i, row in enumerate(self.rows()) if row.setting in front}
        note = "In bold: no other row is better in both the metric and the bytes."
        table = html_table(self._table_cells(), num_left=0, bold=bold)
        return html_report(repr(self), table, f"<div>{note}</div>")

    def to_csv(self, path: str | os.PathLike | None = None) -> str:
        """Returns the rows as CSV with a header, and writes them to `path` if it is given."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        fields = SweepRow._fields[:-1]  # a reason belongs to a recommendation
        writer.writerow(fields)
        writer.writerows(row[: len(fields)] for row in self.rows())
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
            elif isinstance(value, list) and name not in ("bits", "models", "budgets"):
                fields[name] = np.asarray(value, np.float64).astype(kinds.get(name, np.float64))
        fields["bits"] = tuple(map(_width_of, fields["bits"]))
        fields["budgets"] = tuple(fields["budgets"])
        fields["models"] = None if fields["models"] is None else tuple(fields["models"])
        return cls(**fields)

    def plot(
        self,
        file: str | os.PathLike | None = None,
        *,
        max_loss: float | None = None,
        max_bytes: int | None = None,
    ) -> Any:
        """Draws the metric against the bytes, with the front and the recommendation.

        Models, densities, and settings in a box or without have a colour each, and a line along
        the best of their files; kinds of files have a marker each.

        Args:
          file: Path to save the picture to, or None.
          max_loss: Largest loss of the recommendation, see `recommend`.
          max_bytes: Largest size of the recommendation, see `recommend`.

        Returns:
          A matplotlib figure.

        Raises:
          ImportError: If matplotlib is not installed; the message names the extra.
          ValueError: If there is nothing to recommend.
        """
        best = self.recommend(max_loss, max_bytes=max_bytes)
        rows, front = self._sound_rows(), self.pareto()
        return plots.front(rows, front, best, file, metric=self.metric, mode=self.mode)


def _standard_error(values: np.ndarray) -> np.ndarray:
    num_seeds = values.shape[-2]
    if num_seeds == 1:
        return np.nan * values[..., 0, :]
    with np.errstate(invalid="ignore"):  # an infinite metric has none
        return values.std(axis=-2, ddof=1) / math.sqrt(num_seeds)


def _width_of(value: Any) -> Bits | Grid | None:
    """Returns a width or grid that was read from JSON."""
    if not isinstance(value, dict):
        return value
    fields: dict[str, Any] = dict(value)
    axis = fields["axis"]
    fields["axis"] = tuple(axis) if isinstance(axis, list) else axis
    return Grid(**fields)


def _written(text: str, path: str | os.PathLike | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
