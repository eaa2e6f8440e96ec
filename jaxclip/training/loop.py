"""The loop around a train step, which runs until a stop rule is met and survives a kill.

    result = fit(step, state, batches, stop=max_steps(1000) | reached("accuracy", 0.98))

The loop runs on the host: it calls the step, fetches its metrics, and asks the stop rule. A
killed run continues from its last checkpoint bit for bit, if `batches` gives the same batches
again.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.html import html_report, html_table, number_text, svg_line
from jaxclip._core.signals import FirstSignal, check_signals
from jaxclip._core.trees import PyTree
from jaxclip.training.averaging import weights_to_ship
from jaxclip.training.bars import ProgressBar, make_bar
from jaxclip.training.info import StepInfo
from jaxclip.training.logs import Log, SkipWarnings, add_metrics, check_names, fetch_metrics
from jaxclip.training.runs import Best, BestRule, Run, RunStore
from jaxclip.training.step import TrainState
from jaxclip.training.stopping import Mode, Progress, StopReason, StopRule


class FitResult(NamedTuple):
    """Result of `fit`.

    Attributes:
      state: The last state.
      reason: Why training ended.
      history: For each metric its values as a float64 array, and under "step" the steps. A
        metric that was not measured at a step is NaN there. After a restart the history
        begins at the restart.
      compile_seconds: Seconds that the first step took, compiling included.
      best: The step, value and parameters with the best metric of `keep_best`; None without it.
    """

    state: TrainState
    reason: StopReason
    history: dict[str, np.ndarray]
    compile_seconds: float
    best: Best | None = None

    @property
    def params(self) -> optax.Params:
        """The last weights, or with `average_weights` in the optimizer their averages."""
        return weights_to_ship(self.state.opt_state, self.state.params)

    def __repr__(self) -> str:
        numbers = [("step", number_text(self.state.step)), *self._last_metrics()]
        text = ", ".join(f"{name}={x}" for name, x in numbers)
        return f"FitResult({text}, reason={self.reason.name})"

    def _repr_html_(self) -> str:
        rows = [("steps", number_text(self.state.step)), ("why it ended", str(self.reason))]
        rows += self._last_metrics()
        if self.best is not None:
            rows.append(("best", f"{self.best.value:.4g}, after step {self.best.step:,}"))
        loss = self.history.get("loss", np.zeros(0))
        curve = svg_line(loss, "loss over the steps") if np.isfinite(loss).any() else ""
        return html_report("FitResult", html_table(rows, has_head=False), curve)

    def _last_metrics(self) -> list[tuple[str, str]]:
        """Returns the name and the last value of each metric of the history."""
        values = {name: x[~np.isnan(x)] for name, x in self.history.items() if name != "step"}
        return [(name, number_text(float(x[-1]))) for name, x in values.items() if len(x)]


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
    keep_best: str | None = None,
    best_mode: Mode = "max",
    stop_signals: Iterable[int] = (signal.SIGINT, signal.SIGTERM),
) -> FitResult:
    """Trains until a stop rule is met, the data ends, or a signal arrives.

    Args:
      step: The result of `make_train_step`. It donates the state that it is given.
      state: The state to start from; if there is a checkpoint, only its structure is used.
      batches: An iterable of batches; a restart skips those used before. Or a function of the
        number of batches used before (0 without a restart) that returns the remaining ones.
      stop: A stop rule, such as `max_steps(1000) | reached("accuracy", 0.98)`. It counts the
        steps that this run skips, not those that `state` has counted already.
      evaluate: `evaluate(params)` returns a dict of scalar metrics by name. It gets the averages
        of the weights if the optimizer has `average_weights`.
      evaluate_every: Steps between evaluations; None for one at the end only.
      check_every: Steps between checks: the metrics are fetched from the device, given to the
        stop rule, and logged. Each time the host waits for the device. Limits by
        `max_steps` are exact in any case.
      progress: True to show a bar, if there is a terminal or a notebook, and rich.
      on_log: Called with the step and its metrics, as Python floats: "loss", "grad_norm",
        "learning_rate" if the optimizer's state has one, "weight_clip_rate" (as counted last, see
        `telemetry_every` of `make_train_step`), "num_skipped", the statistics of `clip_stats`, the
        real scalars of `aux` as "aux/name", and what `evaluate` returns.
      checkpoint_dir: Folder for checkpoints, of which the last two are kept; needs orbax. A
        path with a scheme, such as "gs://...", is opened as orbax does. One that is damaged is
        put aside, with a warning, and the one before it is used.
      checkpoint_every: Steps between checkpoints; None for one at the end only. A signal
        also writes one, and so does an error or an interrupt in the data, `evaluate` or `on_log`.
        After a restart, `stop` continues from its memory if the saved rule remembers the same
        things, whatever its limits and patience; otherwise it starts anew.
      keep_best: A metric of `evaluate`. The parameters or averages with its best value are kept,
        a copy of them, and are part of every checkpoint.
      best_mode: "max" if a larger value is better, "min" if a smaller one is.
      stop_signals: Signals that end the loop after the current step, for instance also
        `signal.SIGUSR1`. After the first, all have their usual effect again.

    Returns:
      A `FitResult`. Its reason is `INTERRUPTED` whenever a signal came, even in the last
      evaluation.

    Raises:
      TypeError: If `stop` is not a stop rule.
      ValueError: If a count is not an integer of at least 1; if the stop rule or `keep_best`
        reads a metric that nothing measures; if `evaluate` returns one that the step has, too;
        if the optimizer has two `average_weights`, or one of only some of the parameters;
        if a signal cannot be handled; or if `checkpoint_dir` has checkpoints of another
        training state, or none that can be read.
      ImportError: If there is a `checkpoint_dir` and no orbax.

    Warns:
      RuntimeWarning: At the first skipped step, with the leaf whose gradient was not finite; of
        the number of skipped steps at the end; of a frozen leaf with such a gradient.

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
    _check_arguments(stop, evaluate, evaluate_every, check_every, checkpoint_dir, checkpoint_every)
    best_rule = _checked_best_rule(keep_best, best_mode, evaluate)
    if evaluate is not None:
        jax.eval_shape(weights_to_ship, state.opt_state, state.params)  # before the first step
    signals = FirstSignal(check_signals("stop_signals", stop_signals))

    start, run = time.monotonic(), Run(state, stop.init(), 0, int(state.num_skipped))
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint_dir:
            store = stack.enter_context(RunStore(checkpoint_dir, stop.remembers, best_rule))
            run = store.restore(run)
        bar = stack.enter_context(make_bar(progress, stop.num_steps))
        stack.enter_context(signals)
        evaluation = _Evaluation(evaluate, evaluate_every, best_rule)
        loop = _Loop(step, run, stop, evaluation, check_every, Log(on_log), bar, start)
        try:
            remaining = _remaining_batches(batches, run.position)
            reason = loop.run_all(remaining, signals, store, checkpoint_every)
            if store and signals.has_come:
                store.save(loop.run)  # an evaluation might outlast the time that is left
            loop.evaluate_last()
            if store:
                store.save(loop.run)
        except BaseException as error:  # also a second Ctrl-C, while the data hang
            if store:
                store.rescue(loop.run, error)
            raise
    if signals.has_come:
        reason = StopReason.INTERRUPTED
    loop.warnings.sum_up(loop.num_steps - loop.first_step)
    return FitResult(
        loop.run.state, reason, loop.log.history(), loop.compile_seconds, loop.run.best
    )


def _check_arguments(
    stop: StopRule,
    evaluate: Callable | None,
    evaluate_every: int | None,
    check_every: int,
    checkpoint_dir: str | os.PathLike | None,
    checkpoint_every: int | None,
) -> None:
    """Raises if an argument of `fit` is out of range, or lacks another."""
    if not isinstance(stop, StopRule):
        raise TypeError(f"stop must be a stop rule, such as max_steps(1000), got {stop!r}.")
    counts = {"evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}
    for name, count in (counts | {"check_every": check_every}).items():
        if count is not None:
            checks.check_count(name, count)
    if checkpoint_every is not None and checkpoint_dir is None:
        raise ValueError("checkpoint_every needs a checkpoint_dir.")
    if evaluate_every is not None and evaluate is None:
        raise ValueError("evaluate_every needs an evaluate.")


def _checked_best_rule(
    keep_best: str | None, best_mode: Mode, evaluate: Callable | None
) -> BestRule | None:
    """Returns the rule for the best parameters, or None if they are not kept."""
    checks.check_choice("best_mode", best_mode, ("max", "min"))
    if keep_best is None:
        return None
    if not isinstance(keep_best, str):
        raise TypeError(f"keep_best must be the name of a metric, got {keep_best!r}.")
    if evaluate is None:
        raise ValueError(f"keep_best is {keep_best!r}, a metric of evaluate: give evaluate.")
    return BestRule(keep_best, best_mode)


# --- Steps ----------------------------------------------------------------------------


class _Evaluation(NamedTuple):
    """The user's `evaluate`, the steps between two calls, and how the best is told."""

    function: Callable[[optax.Params], dict[str, ArrayLike]] | None
    every: int | None
    best_rule: BestRule | None


class _Loop:
    """Steps of one run, with their metrics, log and bar."""

    def __init__(
        self,
        step: Callable[[TrainState, PyTree], tuple[TrainState, StepInfo]],
        run: Run,
        stop: StopRule,
        evaluation: _Evaluation,
        check_every: int,
        log: Log,
        bar: ProgressBar,
        start: float,
    ):
        self.run, self.log = run, log
        self.num_steps = self.first_step = int(run.state.step)
        self.compile_seconds = 0.0
        self.warnings = SkipWarnings(int(run.state.num_skipped))
        self._step, self._stop, self._bar = step, stop, bar
        self._evaluation, self._check_every = evaluation, check_every
        self._must_wait = True  # for the first step, to time its compilation
        self._start = start

    def run_all(
        self,
        batches: Iterator[PyTree],
        signals: FirstSignal,
        store: RunStore | None,
        checkpoint_every: int | None,
    ) -> StopReason:
        """Takes steps until there is a reason to stop, which it returns."""
        if self._stop.num_steps is not None and self.num_steps >= self._stop.num_steps:
            return StopReason.MAX_STEPS
        while True:
            batch = next(batches, _NO_BATCH)
            if signals.has_come:
                return StopReason.INTERRUPTED
            if batch is _NO_BATCH:
                return StopReason.DATA_ENDED
            reason = self.take_step(batch)
            if store and _is_due(self.num_steps, checkpoint_every):
                store.save(self.run)
            if reason is not None:
                return reason

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
        metrics = fetch_metrics(info)
        self.warnings.look(self.num_steps, info, metrics, self.run.state.params)
        evaluate = self._evaluation.function
        if evaluate is not None and is_evaluated:
            metrics = self._evaluated(metrics)
            self.log.evaluated_at = self.num_steps
        num_skipped = metrics["num_skipped"] - self.run.num_skipped_before
        seconds = time.monotonic() - self._start
        progress = Progress(self.num_steps, seconds, num_skipped, metrics)
        memory, code = self._stop.update(self.run.memory, progress)
        self.run = self.run._replace(memory=memory)
        self.log.add(self.num_steps, metrics)
        self._bar.show(self.num_steps, metrics)
        if evaluate is None or self._evaluation.every is None or is_evaluated:
            check_names(self._stop.metrics, self.log.names)
        return self._stop.reason(code)

    def evaluate_last(self) -> None:
        """Evaluates the last parameters, unless that was done at their step."""
        has_function = self._evaluation.function is not None
        if has_function and self.num_steps and self.log.evaluated_at != self.num_steps:
            self.log.add(self.num_steps, self._evaluated({}))

    def _evaluated(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns the metrics with those of an evaluation; keeps the parameters if best so far."""
        function, _, rule = self._evaluation
        params = weights_to_ship(self.run.state.opt_state, self.run.state.params)
        metrics = add_metrics(metrics, function(params) if function else {})
        if rule is None:
            return metrics
        if rule.metric not in metrics:
            raise ValueError(f"keep_best is {rule.metric!r}, but the metrics are {[*metrics]}.")
        if rule.is_better(metrics[rule.metric], self.run.best):
            # A copy, because the next step takes the memory of the state.
            copy = jax.tree.map(jnp.copy, params)
            best = Best(self.num_steps, metrics[rule.metric], copy)
            self.run = self.run._replace(best=best)
        return metrics


def _may_deadlock(state: TrainState) -> bool:
    """Returns True if two steps in flight may deadlock: on several devices of one CPU."""
    # Those share one pool of threads, which the collectives of both steps may fill.
    devices = (x.devices() for x in jax.tree.leaves(state.params) if isinstance(x, jax.Array))
    return any(len(d) > 1 and next(iter(d)).platform == "cpu" for d in devices)


def _is_due(num_steps: int, every: int | None) -> bool:
    return every is not None and num_steps % every == 0


# --- Data -----------------------------------------------------------------------------

_NO_BATCH = object()


def _remaining_batches(
    batches: Iterable[PyTree] | Callable[[int], Iterable[PyTree]], position: int
) -> Iterator[PyTree]:
    if callable(batches):
        return iter(batches(position))
    return itertools.islice(iter(batches), position, None)
