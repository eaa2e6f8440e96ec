"""Optuna as the driver of a sweep, for spaces too large for a grid. Needs the extra `optuna`.

A study asks for trials, which are trained together in one compiled program, and is told the
metric and the bytes of each. What it has been told is in its storage.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxclip._core import checks, extras
from jaxclip._core.grids import Bits
from jaxclip.lowbit.trees import compress as compress_tree
from jaxclip.sweeps.chunks import Shipper, Trainer
from jaxclip.sweeps.tasks import Task, checked_seeds, checked_task
from jaxclip.training.stopping import StopRule


def search_with_optuna(
    study: Any,
    loss_fn: Callable[..., Any],
    init_fn: Callable[[Any], Any],
    optimizer: Callable[[Any], Any],
    batches: Callable[[Any], Any],
    *,
    step_sizes: tuple[float, float],
    thresholds: tuple[float, float],
    num_trials: int,
    trials_at_once: int = 16,
    seeds: int | Sequence[int] = 3,
    stop: StopRule,
    evaluate: Callable[[Any], dict[str, Any]],
    metric: str,
    mode: str = "max",
    weight_threshold: Callable[[Any], Any] | None = None,
    bits: Sequence[Bits | None] = (None, 4, 3, 2, "ternary", 1),
    compress: Callable[[Any, Bits], Any] = compress_tree,
    coding: str | None = None,
    evaluate_every: int | None = None,
    loop: str | None = None,
    memory_budget: int | None = None,
    devices: Sequence[Any] | None = None,
) -> None:
    """Lets an Optuna study choose step sizes, thresholds and widths, for a metric and for bytes.

    Each trial has the parameters "step_size" and "threshold", both searched on a logarithmic
    scale, and "bits", one of the names of the widths ("as trained", "4", "ternary", ...). Its
    values are the metric's mean over the seeds and the mean bytes of the file; the standard
    error is its user attribute "standard_error". A trial with a diverged seed fails.

    Args:
      study: An Optuna study of two directions: "maximize" or "minimize", as `mode` says, and
        "minimize". With a storage it is kept, and goes on when it is loaded again.
      loss_fn: As in `sweep`; so are `init_fn`, `optimizer`, `batches`, `seeds`, `stop`,
        `evaluate`, `metric`, `mode`, `weight_threshold`, `bits`, `compress`, `coding`,
        `evaluate_every`, `loop`, `memory_budget` and `devices`.
      init_fn: As in `sweep`.
      optimizer: As in `sweep`.
      batches: As in `sweep`.
      step_sizes: The least and the largest, positive.
      thresholds: The least and the largest, positive and finite.
      num_trials: How many trials to add.
      trials_at_once: How many are asked for, trained together, and told.
      seeds: As in `sweep`.
      stop: As in `sweep`.
      evaluate: As in `sweep`.
      metric: As in `sweep`.
      mode: As in `sweep`.
      weight_threshold: As in `sweep`.
      bits: As in `sweep`.
      compress: As in `sweep`.
      coding: As in `sweep`.
      evaluate_every: As in `sweep`.
      loop: As in `sweep`.
      memory_budget: As in `sweep`; fewer trials are then trained at once.
      devices: As in `sweep`.

    Raises:
      ImportError: If Optuna is not installed; the message names the extra.
      TypeError: As in `sweep`.
      ValueError: As in `sweep`, or if the study has other directions, or a range is none.

    Example:
      >>> import jax, jax.numpy as jnp, jaxclip, optuna
      >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
      >>> study = optuna.create_study(directions=["minimize", "minimize"])
      >>> goal = jnp.linspace(-0.3, 0.5, 512).reshape(64, 8)
      >>> search_with_optuna(
      ...     study,
      ...     lambda w, noise: jnp.mean((w - goal + noise) ** 2),
      ...     lambda key: jnp.zeros((64, 8)),
      ...     jaxclip.sign_sgd,
      ...     lambda key: 0.1 * jax.random.normal(key, (64, 8)),
      ...     step_sizes=(1e-3, 1e-1),
      ...     thresholds=(0.1, 1.0),
      ...     num_trials=4,
      ...     trials_at_once=4,
      ...     seeds=1,
      ...     stop=jaxclip.max_steps(20),
      ...     evaluate=lambda w: {"error": jnp.mean((w - goal) ** 2)},
      ...     metric="error",
      ...     mode="min",
      ...     bits=(None, 4),
      ... )
      >>> len(study.trials)
      4
    """
    optuna = extras.import_extra("optuna", "optuna")
    checks.check_choice("mode", mode, ("max", "min"))
    wanted = ["MAXIMIZE" if mode == "max" else "MINIMIZE", "MINIMIZE"]
    directions = [direction.name for direction in study.directions]
    if directions != wanted:
        raise ValueError(f"study must have the directions {wanted}, got {directions}.")
    for name, (low, high) in (("step_sizes", step_sizes), ("thresholds", thresholds)):
        checks.check_positive(f"{name}[0]", low)
        checks.check_positive(f"{name}[1]", high)
        if low > high:
            raise ValueError(f"{name} must be (least, largest), got {(low, high)}.")
    checks.check_count("num_trials", num_trials)
    checks.check_count("trials_at_once", trials_at_once)
    task = Task(
        loss_fn, init_fn, optimizer, batches, weight_threshold, evaluate, stop, evaluate_every
    )
    trainer = Trainer(
        checked_task(task, [metric]),
        min(trials_at_once, num_trials),
        checked_seeds(seeds),
        Shipper(evaluate, compress, coding, bits),
        devices=devices,
        loop=loop,
        memory_budget=memory_budget,
    )
    names = ["as trained" if width is None else str(width) for width in bits]
    for start in range(0, num_trials, trainer.program.num_settings):
        count = min(trainer.program.num_settings, num_trials - start)
        trials = [study.ask() for _ in range(count)]
        settings = [
            (
                trial.suggest_float("step_size", *step_sizes, log=True),
                trial.suggest_float("threshold", *thresholds, log=True),
            )
            for trial in trials
        ]
        widths = [names.index(trial.suggest_categorical("bits", names)) for trial in trials]
        chunk = trainer.chunk(np.asarray(settings))
        for i, (trial, width) in enumerate(zip(trials, widths, strict=True)):
            values = chunk[f"metrics/{metric}"][i, :, width]
            num_bytes = chunk["file_bytes"][i, :, width].mean()
            if chunk["is_diverged"][i].any() or not np.isfinite(values).all():
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            if len(values) > 1:
                error = values.std(ddof=1) / np.sqrt(len(values))
                trial.set_user_attr("standard_error", float(error))
            study.tell(trial, [float(values.mean()), float(num_bytes)])
