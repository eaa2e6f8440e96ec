"""The loop around a train step, which runs until a stop rule is met and survives a kill.

    result = fit(step, state, batches, stop=max_steps(1000) | reached("accuracy", 0.98))

The loop runs on the host: it calls the step, fetches its metrics, and asks the stop rule. A
killed run continues from its last checkpoint bit for bit, if `batches` gives the same batches
again.
"""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.trees import PyTree
from jaxclip.training.bars import ProgressBar, make_bar
from jaxclip.training.runs import Run, RunStore
from jaxclip.training.step import StepInfo, TrainState
from jaxclip.training.stopping import Progress, StopReason, StopRule


class FitResult(NamedTuple):
    """Result of `fit`.

    Attributes:
      state: The last state.
      reason: Why training ended.
      history: For each metric its values as a float64 array, and under "step" the steps. A
        metric that was not measured at a step is NaN there. After a restart the history
        begins at the restart.
      compile_seconds: Seconds that the first step took, compiling included.
    """

    state: TrainState
    reason: StopReason
    history: dict[str, np.ndarray]
    compile_seconds: float


def fit(
    step: Callable[[TrainState, PyTree], tuple[TrainState, StepInfo]],
    state: TrainState,
    batches: Iterable[PyTree] | Callable[[int], Iterable[PyTree]],
    *,
    stop: StopRule,
    evaluate: Callable[[optax.Params], dict[str, ArrayLike]] | None = None,
    evaluate_every: int | None = None,
    check_every: int = 1,
    progress: bool = True,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
) -> FitResult:
    """Trains until a stop rule is met, the data ends, or a signal arrives.

    Args:
      step: The result of `make_train_step`. It donates the state that it is given.
      state: The state to start from; if there is a checkpoint, only its structure is used.
      batches: An iterable of batches; a restart skips those used before. Or a function of the
        number of batches used before (0 without a restart) that returns the remaining ones.
      stop: A stop rule, such as `max_steps(1000) | reached("accuracy", 0.98)`. It counts the
        steps that this run skips, not those that `state` has counted already.
      evaluate: `evaluate(params)` returns a dict of scalar metrics by name.
      evaluate_every: Steps between evaluations; None for one at the end only.
      check_every: Steps between checks: the metrics are fetched from the device, given to the
        stop rule, and logged. Each time the host waits for the device. Limits by
        `max_steps` are exact in any case.
      progress: True to show a bar, if there is a terminal or a notebook, and rich.
      on_log: Called with the step and its metrics, as Python floats.
      checkpoint_dir: Folder for checkpoints, of which the last two are kept; needs orbax.
      checkpoint_every: Steps between checkpoints; None for one at the end only. A signal
        also writes one. After a restart, `stop` continues from its memory if the saved rule
        remembers the same things, whatever its limits and patience; otherwise it starts anew.

    Returns:
      A `FitResult`. SIGINT and SIGTERM end the loop after the current step; a second one
      has its usual effect.

    Raises:
      TypeError: If `stop` is not a stop rule.
      ValueError: If a count is not an integer of at least 1, if the stop rule reads a metric
        that nothing measures, or if `evaluate` returns one that the step has, too.
      ImportError: If there is a `checkpoint_dir` and no orbax.

    Example:
      >>> import jax.numpy as jnp, jaxclip
      >>> tx = jaxclip.sign_sgd(0.25)
      >>> step = jaxclip.make_train_step(lambda w, x: jnp.sum((w - x) ** 2), tx)
      >>> state = jaxclip.TrainState.create(jnp.zeros(2), tx)
      >>> stop = jaxclip.max_steps(100) | jaxclip.training.reached("loss", 0.01, mode="min")
      >>> result = fit(step, state, [jnp.ones(2)] * 50, stop=stop, progress=False)
      >>> print(result.reason, result.history["loss"])
      The metric reached its target. [2.    1.125 0.5   0.125 0.   ]
    """
    if not isinstance(stop, StopRule):
        raise TypeError(f"stop must be a stop rule, such as max_steps(1000), got {stop!r}.")
    counts = {"evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}
    for name, count in (counts | {"check_every": check_every}).items():
        if count is not None:
            checks.check_count(name, count)
    if checkpoint_every is not None and checkpoint_dir is None:
        raise ValueError("checkpoint_every needs a checkpoint_dir.")

    start, run = time.monotonic(), Run(state, stop.init(), 0, int(state.num_skipped))
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint_dir:
            store = stack.enter_context(RunStore(checkpoint_dir, stop.remembers))
            run = store.restore(run)
        bar = stack.enter_context(make_bar(progress, stop.num_steps))
        signals = stack.enter_context(_Signals())
        evaluation = _Evaluation(evaluate, evaluate_every)
        loop = _Loop(step, run, stop, evaluation, check_every, _Log(on_log), bar, start)
        remaining, saved_position = _remaining_batches(batches, run.position), run.position
        is_over = stop.num_steps is not None and loop.num_steps >= stop.num_steps
        reason = StopReason.MAX_STEPS if is_over else None
        while reason is None:
            batch = next(remaining, _NO_BATCH)
            if signals.has_come or batch is _NO_BATCH:
                reason = StopReason.INTERRUPTED if signals.has_come else StopReason.DATA_ENDED
                break
            reason = loop.take_step(batch)
            if store and _is_due(loop.num_steps, checkpoint_every):
                store.save(loop.run)
                saved_position = loop.run.position
        loop.evaluate_last()
        if store and loop.run.position != saved_position:
            store.save(loop.run)
    return FitResult(loop.run.state, reason, loop.log.history(), loop.compile_seconds)


def log_to_jsonl(path: str | os.PathLike) -> Callable[[int, dict[str, float]], None]:
    """Makes an `on_log` that appends one line of JSON per step to a file.

    NaN and infinities, which JSON lacks, are written as null.

    Args:
      path: The file; it is created if it does not exist.

    Returns:
      A function of the step and its metrics.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/log.jsonl"
      >>> log_to_jsonl(path)(3, {"loss": 0.5, "pre_norm": float("nan")})
      >>> print(pathlib.Path(path).read_text(), end="")
      {"step": 3, "loss": 0.5, "pre_norm": null}
    """
    path = pathlib.Path(path)

    def write(step: int, metrics: dict[str, float]) -> None:
        row = {name: x if np.isfinite(x) else None for name, x in metrics.items()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | row, allow_nan=False) + "\n")

    return write


# --- Steps ----------------------------------------------------------------------------


class _Evaluation(NamedTuple):
    """The user's `evaluate`, and the steps between two calls."""

    function: Callable[[optax.Params], dict[str, ArrayLike]] | None
    every: int | None


class _Loop:
    """Steps of one run, with their metrics, log and bar."""

    def __init__(
        self,
        step: Callable[[TrainState, PyTree], tuple[TrainState, StepInfo]],
        run: Run,
        stop: StopRule,
        evaluation: _Evaluation,
        check_every: int,
        log: "_Log",
        bar: ProgressBar,
        start: float,
    ):
        self.run, self.log = run, log
        self.num_steps = int(run.state.step)
        self.compile_seconds = 0.0
        self._step, self._stop, self._bar = step, stop, bar
        self._evaluation, self._check_every = evaluation, check_every
        self._must_wait = True  # for the first step, to time its compilation
        self._start = start

    def take_step(self, batch: PyTree) -> StopReason | None:
        """Takes one step; returns the reason to stop after it, if there is one."""
        step_start = time.monotonic()
        state, info = self._step(self.run.state, batch)
        self.run = self.run._replace(state=state, position=self.run.position + 1)
        self.num_steps += 1
        if self._must_wait:
            jax.block_until_ready(info)
            self.compile_seconds = self.compile_seconds or time.monotonic() - step_start
            self._must_wait = _may_deadlock(state)
        is_last = self.num_steps == self._stop.num_steps
        is_evaluated = _is_due(self.num_steps, self._evaluation.every)
        if is_evaluated or is_last or _is_due(self.num_steps, self._check_every):
            return self._check(info, is_evaluated)
        return None

    def _check(self, info: StepInfo, is_evaluated: bool) -> StopReason | None:
        """Fetches the metrics, and gives them to the stop rule, the log and the bar."""
        metrics = _fetch_metrics(info)
        evaluate = self._evaluation.function
        if evaluate is not None and is_evaluated:
            metrics = _add_metrics(metrics, evaluate(self.run.state.params))
            self.log.evaluated_at = self.num_steps
        num_skipped = metrics["num_skipped"] - self.run.num_skipped_before
        seconds = time.monotonic() - self._start
        progress = Progress(self.num_steps, seconds, num_skipped, metrics)
        memory, code = self._stop.update(self.run.memory, progress)
        self.run = self.run._replace(memory=memory)
        self.log.add(self.num_steps, metrics)
        self._bar.show(self.num_steps, metrics)
        if evaluate is None or self._evaluation.every is None or is_evaluated:
            _check_names(self._stop, self.log.names)
        return self._stop.reason(code)

    def evaluate_last(self) -> None:
        """Evaluates the last parameters, unless that was done at their step."""
        evaluate = self._evaluation.function
        if evaluate is not None and self.num_steps and self.log.evaluated_at != self.num_steps:
            self.log.add(self.num_steps, _add_metrics({}, evaluate(self.run.state.params)))


# --- Metrics --------------------------------------------------------------------------


class _Log:
    """The metrics so far, step by step."""

    def __init__(self, on_log: Callable[[int, dict[str, float]], None] | None):
        self.rows: list[dict[str, float]] = []
        self.names: set[str] = set()
        self.evaluated_at: int | None = None
        self._on_log = on_log

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self.names |= set(metrics)
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step} | metrics)
        if self._on_log:
            self._on_log(step, metrics)

    def history(self) -> dict[str, np.ndarray]:
        names = ["step", *sorted(self.names)]
        columns = {n: np.array([row.get(n, np.nan) for row in self.rows], float) for n in names}
        return columns | {"step": columns["step"].astype(int)}


def _fetch_metrics(info: StepInfo) -> dict[str, float]:
    names = ("loss", "weight_clip_rate", "num_skipped")
    named = {name: getattr(info, name) for name in names} | info.stats
    return {name: float(x) for name, x in jax.device_get(named).items()}


def _may_deadlock(state: TrainState) -> bool:
    """Returns True if two steps in flight may deadlock: on several devices of one CPU."""
    # Those share one pool of threads, which the collectives of both steps may fill.
    devices = (x.devices() for x in jax.tree.leaves(state.params) if isinstance(x, jax.Array))
    return any(len(d) > 1 and next(iter(d)).platform == "cpu" for d in devices)


def _add_metrics(metrics: dict[str, float], evaluated: dict[str, ArrayLike]) -> dict[str, float]:
    """Returns the metrics of the step with those of an evaluation."""
    if not isinstance(evaluated, dict):
        raise TypeError(f"evaluate must return a dict of metrics, got {type(evaluated).__name__}.")
    known = set(metrics) & set(evaluated)
    if known:
        raise ValueError(f"evaluate returns {sorted(known)}, which the step reports already.")
    fetched = jax.device_get(evaluated)
    for name, x in fetched.items():
        if np.shape(x):
            raise ValueError(f"evaluate must return scalars, {name!r} has shape {np.shape(x)}.")
    return metrics | {name: float(x) for name, x in fetched.items()}


def _check_names(stop: StopRule, names: set[str]) -> None:
    missing = sorted(stop.metrics - names)
    if missing:
        raise ValueError(f"stop reads {missing}, but the metrics are {sorted(names)}.")


def _is_due(num_steps: int, every: int | None) -> bool:
    return every is not None and num_steps % every == 0


# --- Data and signals -----------------------------------------------------------------

_NO_BATCH = object()


def _remaining_batches(
    batches: Iterable[PyTree] | Callable[[int], Iterable[PyTree]], position: int
) -> Iterator[PyTree]:
    if callable(batches):
        return iter(batches(position))
    return itertools.islice(iter(batches), position, None)


class _Signals:
    """Context that records SIGINT and SIGTERM; a second one has its usual effect."""

    def __init__(self):
        self.has_come = False
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._record)
        return self

    def _record(self, number: int, frame: object) -> None:
        self.has_come = True
        self._restore()

    def _restore(self) -> None:
        while self._old_handlers:
            number, handler = self._old_handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(self, *error: object) -> None:
        self._restore()
