"""The loop around a train step: it runs until a stated reason to stop, and survives a kill.

    result = fit(step, state, batches, stop=max_steps(1000) | reached("accuracy", 0.98))

The loop itself lives on the host and does nothing but call the step, look at what it says,
and ask the stop rule. A run that was killed goes on from its last checkpoint bit for bit, if
`batches` gives the same batches again.
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

from jaxclip._core import checks
from jaxclip._core.extras import rich_progress
from jaxclip.training.runs import Run, RunStore
from jaxclip.training.step import StepInfo, TrainState
from jaxclip.training.stopping import Seen, StopReason, StopRule


class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
      state: The last state.
      reason: Why it is the last.
      history: For each number that was seen, its values as a float64 array, and under
        "step" the steps. A number that was not measured at a step is NaN there. After a
        restart it begins at the restart.
      compile_seconds: How long the first step took, compiling included.
    """

    state: TrainState
    reason: StopReason
    history: dict[str, np.ndarray]
    compile_seconds: float


def fit(
    step: Callable[[TrainState, Any], tuple[TrainState, StepInfo]],
    state: TrainState,
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    stop: StopRule,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    evaluate_every: int | None = None,
    check_every: int = 1,
    progress: bool = True,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint_dir: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
) -> FitResult:
    """Trains until a stop rule says so, the data ends, or a signal comes.

    Args:
      step: What `make_train_step` returns. It donates the state that it is given.
      state: Where to begin; if there is a checkpoint, only its structure counts.
      batches: What to iterate over; or a function of how many batches were used up before a
        restart, 0 if there was none, that gives the rest. A plain iterable is skipped
        through.
      stop: A stop rule, such as `max_steps(1000) | reached("accuracy", 0.98)`. It sees how
        many steps this run has skipped, not those that `state` counts already.
      evaluate: `evaluate(params)` gives metrics by name: scalars.
      evaluate_every: After how many steps; None for the end alone.
      check_every: After how many steps the numbers are fetched from the device, looked at by
        the stop rule, and logged. Each time the host waits for the device. Limits by
        `max_steps` are exact in any case.
      progress: Whether to show a bar where there is a terminal or a notebook, and rich.
      on_log: Called with the step and its numbers, as Python floats.
      checkpoint_dir: Where to keep checkpoints; needs orbax. The last two are kept.
      checkpoint_every: After how many steps one is written; None for the end alone. One is
        also written when a signal comes. After a restart, `stop` goes on with what it
        remembered if both rules remember the same things, whatever their limits and
        patience; else it begins anew.

    Returns:
      A `FitResult`. SIGINT and SIGTERM end the loop after the step that is under way; a
      second one does what it did before.

    Raises:
      TypeError: If `stop` is not a stop rule.
      ValueError: If a count is not an integer of at least 1, if the stop rule looks at a
        metric that nothing measures, or if `evaluate` names one that the step has, too.
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

    log, start, compile_seconds = _Log(on_log), time.monotonic(), 0.0
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint_dir:
            store = stack.enter_context(RunStore(checkpoint_dir, stop.remembers))
        run = Run(state, stop.init(), 0, int(state.num_skipped))
        run = store.restore(run) if store else run
        bar = stack.enter_context(_bar(progress, stop.num_steps))
        signals = stack.enter_context(_Signals())
        rest = _rest_of(batches, run.position)
        is_new, num_steps, reason = False, int(run.state.step), None
        waits = True  # for the first step, which is compiled; perhaps for the others
        if stop.num_steps is not None and num_steps >= stop.num_steps:
            reason = StopReason.MAX_STEPS
        while reason is None:
            batch = next(rest, _NO_BATCH)
            if signals.came or batch is _NO_BATCH:
                reason = StopReason.INTERRUPTED if signals.came else StopReason.DATA_ENDED
                break
            begun = time.monotonic()
            new_state, info = step(run.state, batch)
            run = run._replace(state=new_state, position=run.position + 1)
            is_new, num_steps = True, num_steps + 1
            if waits:
                jax.block_until_ready(info)
                compile_seconds = compile_seconds or time.monotonic() - begun
                waits = _shares_threads(new_state)
            is_due = _is_due(num_steps, evaluate_every)
            if is_due or num_steps == stop.num_steps or _is_due(num_steps, check_every):
                numbers = _numbers(info)
                if evaluate is not None and is_due:
                    numbers = _with_metrics(numbers, evaluate(run.state.params))
                    log.evaluated_at = num_steps
                num_skipped = numbers["num_skipped"] - run.num_skipped_before
                seen = Seen(num_steps, time.monotonic() - start, num_skipped, numbers)
                memory, code = stop.update(run.memory, seen)
                run, reason = run._replace(memory=memory), stop.reason(code)
                log.add(num_steps, numbers)
                bar.show(num_steps, numbers)
                if evaluate is None or evaluate_every is None or is_due:
                    _check_names(stop, log.names)
            if store and _is_due(num_steps, checkpoint_every):
                store.save(run)
                is_new = False
        if evaluate is not None and log.evaluated_at != num_steps and num_steps:
            log.add(num_steps, _with_metrics({}, evaluate(run.state.params)))
        if store and is_new:
            store.save(run)
    return FitResult(run.state, reason, log.history(), compile_seconds)


def log_to_jsonl(path: str | os.PathLike) -> Callable[[int, dict[str, float]], None]:
    """Makes an `on_log` that appends one JSON object a line to a file.

    Numbers that JSON does not have (NaN and the infinities) are written as null.

    Args:
      path: The file; it is made if it is not there.

    Returns:
      A function of the step and its numbers.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/log.jsonl"
      >>> log_to_jsonl(path)(3, {"loss": 0.5, "pre_norm": float("nan")})
      >>> print(pathlib.Path(path).read_text(), end="")
      {"step": 3, "loss": 0.5, "pre_norm": null}
    """
    path = pathlib.Path(path)

    def write(step: int, numbers: dict[str, float]) -> None:
        row = {name: x if np.isfinite(x) else None for name, x in numbers.items()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | row, allow_nan=False) + "\n")

    return write


# --- Numbers --------------------------------------------------------------------------


class _Log:
    """The numbers so far, step by step."""

    def __init__(self, on_log: Callable[[int, dict[str, float]], None] | None):
        self.rows: list[dict[str, float]] = []
        self.names: set[str] = set()
        self.evaluated_at: int | None = None
        self._on_log = on_log

    def add(self, step: int, numbers: dict[str, float]) -> None:
        self.names |= set(numbers)
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(numbers)
        else:
            self.rows.append({"step": step} | numbers)
        if self._on_log:
            self._on_log(step, numbers)

    def history(self) -> dict[str, np.ndarray]:
        names = ["step", *sorted(self.names)]
        columns = {n: np.array([row.get(n, np.nan) for row in self.rows], float) for n in names}
        return columns | {"step": columns["step"].astype(int)}


def _numbers(info: StepInfo) -> dict[str, float]:
    names = ("loss", "weight_clip_rate", "num_skipped")
    named = {name: getattr(info, name) for name in names} | info.stats
    return {name: float(x) for name, x in jax.device_get(named).items()}


def _shares_threads(state: TrainState) -> bool:
    """Whether devices of one CPU hold it: two steps under way may stop each other for good."""
    devices = (x.devices() for x in jax.tree.leaves(state.params) if isinstance(x, jax.Array))
    return any(len(d) > 1 and next(iter(d)).platform == "cpu" for d in devices)


def _with_metrics(numbers: dict[str, float], metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, dict):
        raise TypeError(f"evaluate must return a dict of metrics, got {type(metrics).__name__}.")
    known = set(numbers) & set(metrics)
    if known:
        raise ValueError(f"evaluate returns {sorted(known)}, which the step reports already.")
    found = jax.device_get(metrics)
    for name, x in found.items():
        if np.shape(x):
            raise ValueError(f"evaluate must return scalars, {name!r} has shape {np.shape(x)}.")
    return numbers | {name: float(x) for name, x in found.items()}


def _check_names(stop: StopRule, names: set[str]) -> None:
    missing = sorted(stop.metrics - names)
    if missing:
        raise ValueError(f"stop looks at {missing}, which is not among {sorted(names)}.")


def _is_due(num_steps: int, every: int | None) -> bool:
    return every is not None and num_steps % every == 0


# --- Data, signals, progress ----------------------------------------------------------

_NO_BATCH = object()


def _rest_of(batches: Any, position: int) -> Iterator[Any]:
    if callable(batches):
        rest: Any = batches(position)
        return iter(rest)
    return itertools.islice(iter(batches), position, None)


class _Signals:
    """Notes SIGINT and SIGTERM while it is entered; a second one acts as before."""

    def __init__(self):
        self.came = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.came = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(self, *error: Any) -> None:
        self._restore()


class _NoBar:
    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def show(self, num_steps: int, numbers: dict[str, float]) -> None:
        pass


class _RichBar(_NoBar):
    def __init__(self, rich_progress: Any, total: int | None):
        columns = ("{task.completed:,.0f} steps", "{task.fields[speed]}", "{task.fields[text]}")
        self._progress = rich_progress.Progress(
            rich_progress.BarColumn(),
            rich_progress.TimeRemainingColumn(),
            *(rich_progress.TextColumn(c) for c in columns),
        )
        self._task = self._progress.add_task("", total=total, speed="compiling", text="")
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> "_RichBar":
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def show(self, num_steps: int, numbers: dict[str, float]) -> None:
        now = time.monotonic()
        # The first step was compiled: it does not count.
        self._first = self._first or (num_steps, now)
        elapsed, count = now - self._first[1], num_steps - self._first[0]
        speed = f"{count / elapsed:,.1f} steps/s" if count and elapsed > 0 else ""
        names = [n for n in ("loss", "clip_rate", "weight_clip_rate") if n in numbers]
        text = "  ".join(f"{n} {numbers[n]:.4g}" for n in names)
        self._progress.update(self._task, completed=num_steps, speed=speed, text=text)


def _bar(is_wanted: bool, total: int | None) -> _NoBar:
    """A bar if there is somebody to see it."""
    rich = rich_progress(is_wanted)
    return _NoBar() if rich is None else _RichBar(rich, total)
