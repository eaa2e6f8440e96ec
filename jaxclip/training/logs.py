"""Metrics of a training loop: fetched from the device, kept, logged, and warned about."""

import dataclasses
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.trees import PyTree, unique_names
from jaxclip.training.info import StepInfo
from jaxclip.training.telemetry import Statistics

OnLog = Callable[[int, dict[str, float]], None]


class Log:
    """The metrics so far, step by step."""

    def __init__(self, on_log: OnLog | None):
        self.names: Statistics = Statistics()  # as keys, in the order in which they came
        self.evaluated_at: int | None = None
        self._rows: list[dict[str, float]] = []
        self._on_log = on_log

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps the metrics of a step, and hands them on."""
        self.names.update(dict.fromkeys(metrics))
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1].update(metrics)
        else:
            self._rows.append({"step": step} | metrics)
        if self._on_log:
            self._on_log(step, metrics)

    def history(self) -> dict[str, np.ndarray]:
        """Returns a column for each metric, NaN where it was not measured."""
        columns = Statistics(step=np.array([row["step"] for row in self._rows], int))
        for name in self.names:
            columns[name] = np.array([row.get(name, np.nan) for row in self._rows], float)
        return columns


def fetch_metrics(info: StepInfo) -> Statistics:
    """Returns all scalars that a step reports, as Python floats."""
    info = dataclasses.replace(info, aux=_scalars_of(info.aux)).read()
    names = ("loss", "grad_norm", "learning_rate", "weight_clip_rate", "num_skipped")
    named = {name: getattr(info, name) for name in names} | info.stats | info.aux
    return Statistics((name, float(x)) for name, x in named.items() if x is not None)


def _scalars_of(aux: PyTree) -> dict[str, jax.Array]:
    """Returns the real scalars among the auxiliary outputs of the loss, as `aux/name`."""
    found = {}
    named = jax.tree_util.tree_leaves_with_path(aux)
    names = unique_names([path for path, _ in named])
    for name, (_, x) in zip(names, named, strict=True):
        is_number = not jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended)
        if is_number and jnp.ndim(x) == 0 and not jnp.iscomplexobj(x):
            found[f"aux/{name}" if name else "aux"] = x
    return found


def add_metrics(metrics: dict[str, float], evaluated: dict[str, ArrayLike]) -> Statistics:
    """Returns the metrics of the step with those of an evaluation."""
    if not isinstance(evaluated, dict):
        raise TypeError(f"evaluate must return a dict of metrics, got {type(evaluated).__name__}.")
    known = sorted(name for name in evaluated if name in metrics)
    if known:
        raise ValueError(f"evaluate returns {known}, which the step reports already.")
    fetched = jax.device_get(evaluated)
    for name, x in fetched.items():
        if np.shape(x):
            raise ValueError(f"evaluate must return scalars, {name!r} has shape {np.shape(x)}.")
    return Statistics(metrics | {name: float(x) for name, x in fetched.items()})


def check_names(wanted: Iterable[str], names: Statistics) -> None:
    """Raises ValueError if a metric that the stop rule reads is not among the names."""
    missing = sorted(name for name in wanted if name not in names)
    if missing:
        raise ValueError(f"stop reads {missing}, but the metrics are {sorted(names)}.")


class SkipWarnings:
    """Warnings about gradients that are not finite: the first of each kind, and a count at last."""

    def __init__(self, num_skipped: int):
        self._before = self._last = num_skipped
        self._has_warned_of_frozen = False

    def look(self, step: int, info: StepInfo, metrics: dict[str, float], params: PyTree) -> None:
        """Warns of the first skipped step, and of the first bad gradient of a frozen leaf."""
        path, num_skipped = info.nonfinite_path(params), int(metrics["num_skipped"])
        is_first = self._last == self._before
        num_new, self._last = num_skipped - self._last, num_skipped
        if num_new and is_first:
            _warn(
                f"step {step} was skipped, because {_reason(metrics['loss'], path)}: parameters "
                "and optimizer state stay as they were. Further skipped steps are counted in "
                "num_skipped."
            )
        elif not num_new and path is not None and not self._has_warned_of_frozen:
            self._has_warned_of_frozen = True
            _warn(
                f"the gradient of {path!r} is not finite at step {step}. The leaf is frozen, so "
                "training goes on."
            )

    def sum_up(self, num_steps: int) -> None:
        """Warns of the number of skipped steps, if there were more than one."""
        count = self._last - self._before
        if count > 1:
            _warn(f"{count} of {num_steps} steps were skipped, because they were not finite.")


def _reason(loss: float, path: str | None) -> str:
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if path is not None:
        return f"the gradient of {path!r} is not finite"
    return "something was not finite between two checks (check_every=1 shows which)"


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


# --- A file of lines ------------------------------------------------------------------


def log_to_jsonl(path: str | os.PathLike) -> OnLog:
    """Makes an `on_log` that appends one line of JSON per step to a file.

    NaN and infinities, which JSON lacks, are written as null. A record that a crash cut short is
    removed.

    Args:
      path: The file, of the local file system; it is created if it does not exist.

    Returns:
      A function of the step and its metrics.

    Raises:
      ValueError: If `path` has a scheme, such as "gs://...".

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/log.jsonl"
      >>> log_to_jsonl(path)(3, {"loss": 0.5, "pre_norm": float("nan")})
      >>> print(pathlib.Path(path).read_text(), end="")
      {"step": 3, "loss": 0.5, "pre_norm": null}
    """
    checks.check_local_path("path", path)
    path = pathlib.Path(path)

    def write(step: int, metrics: dict[str, float]) -> None:
        row = {name: x if np.isfinite(x) else None for name, x in metrics.items()}
        line = json.dumps({"step": step} | row, allow_nan=False) + "\n"
        with path.open("a+b") as file:
            _end_last_line(file)
            file.write(line.encode())

    return write


def _end_last_line(file: BinaryIO) -> None:
    """Ends the last line of a file; half a record of ours is removed."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if file.read(1) in (b"", b"\n"):
        return
    file.seek(0)
    start = file.read().rfind(b"\n") + 1
    file.seek(start)
    last = file.read()
    try:
        json.loads(last)
    except ValueError:
        if b'{"step": '.startswith(last[:9]):
            file.truncate(start)
            return
    file.write(b"\n")
