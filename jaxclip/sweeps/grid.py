"""Which step size, which box, how many bits? All of them, in one compiled program.

    result = sweep(loss_fn, init_fn, optimizer, batches, step_sizes=..., thresholds=..., ...)
    print(result.recommend(max_loss=0.01))

Every setting is trained with every seed, compressed at every width, and evaluated as a reader
of the file would see it.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxclip._core import checks
from jaxclip._core.extras import progress_bar
from jaxclip._core.grids import Bits
from jaxclip.lowbit.trees import compress as compress_tree
from jaxclip.sweeps.chunks import ChunkStore, Shipper, Trainer
from jaxclip.sweeps.results import SweepResult
from jaxclip.sweeps.tasks import Task, checked_seeds, checked_task
from jaxclip.training.stopping import StopRule


def sweep(
    loss_fn: Callable[..., Any],
    init_fn: Callable[[jax.Array], Any],
    optimizer: Callable[[Any], Any],
    batches: Callable[[jax.Array], Any],
    *,
    step_sizes: Sequence[float],
    thresholds: Sequence[float] = (math.inf,),
    seeds: int | Sequence[int] = 5,
    stop: StopRule,
    evaluate: Callable[[Any], dict[str, Any]],
    metric: str,
    train_metric: str | None = None,
    mode: str = "max",
    weight_threshold: Callable[[Any], Any] | None = None,
    bits: Sequence[Bits | None] = (None, 4, 3, 2, "ternary", 1),
    compress: Callable[[Any, Bits], Any] = compress_tree,
    coding: str | None = None,
    evaluate_every: int | None = None,
    record_every: int | None = None,
    loop: str | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    directory: str | os.PathLike | None = None,
    devices: Sequence[Any] | None = None,
    keep_params: bool = False,
    progress: bool = True,
) -> SweepResult:
    """Trains step sizes x thresholds x seeds in one compiled program, and ships each at low bits.

    A row is what `make_train_step(loss_fn, optimizer(step_size),
    weight_threshold=weight_threshold(threshold))` trains. Seed s gives the keys
    `init, data, loss = split(key(s), 3)`; step i, from 0, gets `batches(fold_in(data, i))`.

    Args:
      loss_fn: As in `make_train_step`, without `aux`.
      init_fn: `init_fn(key)` gives initial parameters.
      optimizer: `optimizer(step_size)` gives an optax transformation. The step size is traced:
        it may go into a schedule, but not into a Python `if`.
      batches: `batches(key)` gives the batch of a step; pure. See `jaxclip.sweeps.random_batches`.
      step_sizes: Positive numbers.
      thresholds: Numbers in [0, inf], each to make a box of; inf for no box.
      seeds: How many, counted from 0, or which integers.
      stop: A stop rule with a `max_steps` in it and no `max_seconds`, such as
        `max_steps(1000) | plateau("loss", 50)`. It sees the numbers of every step; a row that
        it stops is frozen.
      evaluate: `evaluate(params)` gives scalars by name; pure, as it is compiled.
      metric: Name of the one that settings are judged by.
      train_metric: Name of the same on what was trained on, for the generalisation gap.
      mode: "max" if a larger metric is better, "min" if a smaller one is.
      weight_threshold: `weight_threshold(threshold)` gives what `make_train_step` takes: `fan_in`
        for multiples of the initial scale, or a function that makes a schedule of the number.
        None for the number itself, a bound for all weights.
      bits: Widths at which each row is tested; None for the weights as they were trained.
      compress: `compress(params, bits)`; for other rules or groups, a function around
        `jaxclip.compress`. It is compiled.
      coding: As in `checkpoints.save`, for the bytes.
      evaluate_every: After how many steps `stop` sees what `evaluate` gives, if it asks for it.
      record_every: After how many steps the history gets a record; a fiftieth of the steps by
        default.
      loop: "compiled" for a loop over the steps inside the program, "host" for one outside.
        By default outside where the loss has convolutions and runs on CPU, where XLA's loops
        around them are slow.
      chunk_size: Settings that are trained at once, rounded up to a multiple of the number of
        devices; None for all that fit `memory_budget`.
      memory_budget: Bytes that the program may hold on each device; None for any number. What
        the program takes is known once it is compiled, so a chunk made smaller by this
        compiles it a second time.
      directory: Where finished chunks are kept. A sweep that was interrupted goes on behind
        them when it is called again; with other arguments or data it is refused.
      devices: Among which the settings are shared out; None for all of this process.
      keep_params: Whether the result has the trained parameters.
      progress: Whether to show a bar where there is a terminal or a notebook, and rich.

    Returns:
      A `SweepResult`. A diverged row is marked and changes no other.

    Raises:
      TypeError: If `stop` is not a stop rule, or `evaluate` gives no dict.
      ValueError: If a number is out of range, a metric is not among those that `evaluate`
        gives, `stop` has no last step or looks at the clock, at something that nothing
        measures or that both a step and `evaluate` give, one setting is too much for
        `memory_budget`, or `directory` has chunks of another sweep.
      CheckpointError: If a file in `directory` is damaged.

    Example:
      >>> import jax.numpy as jnp, jaxclip
      >>> goal = jnp.linspace(-0.3, 0.5, 512).reshape(64, 8)
      >>> result = sweep(
      ...     lambda w, noise: jnp.mean((w - goal + noise) ** 2),
      ...     lambda key: jnp.zeros((64, 8)),
      ...     jaxclip.sign_sgd,
      ...     lambda key: 0.1 * jax.random.normal(key, (64, 8)),
      ...     step_sizes=[0.1, 0.01],
      ...     thresholds=[0.25, 1.0],
      ...     seeds=2,
      ...     stop=jaxclip.max_steps(60),
      ...     evaluate=lambda w: {"error": jnp.mean((w - goal) ** 2)},
      ...     metric="error",
      ...     mode="min",
      ...     bits=(None, 4, 2),
      ... )
      >>> best = result.recommend(max_loss=0.001)
      >>> best.step_size, best.threshold, best.bits
      (0.01, 1.0, 4)
    """
    step_size_axis = _numbers("step_sizes", step_sizes, checks.check_positive)
    threshold_axis = _numbers("thresholds", thresholds, checks.check_threshold)
    seed_list, widths = checked_seeds(seeds), _widths(bits)
    if devices is not None and not len(devices):
        raise ValueError("devices must have at least one device, got none.")
    counts = {"evaluate_every": evaluate_every, "record_every": record_every}
    counts |= {"chunk_size": chunk_size, "memory_budget": memory_budget}
    for name, count in counts.items():
        if count is not None:
            checks.check_count(name, count)
    checks.check_choice("mode", mode, ("max", "min"))
    checks.check_choice("loop", loop, (None, "compiled", "host"))
    task = Task(
        loss_fn, init_fn, optimizer, batches, weight_threshold, evaluate, stop, evaluate_every
    )
    task = checked_task(task, [metric] if train_metric is None else [metric, train_metric])
    shipper = Shipper(evaluate, compress, coding, widths)
    axes = np.meshgrid(step_size_axis, threshold_axis, indexing="ij")
    settings = np.stack(axes, axis=-1).reshape(-1, 2)
    trainer = Trainer(
        task,
        min(chunk_size or len(settings), len(settings)),
        seed_list,
        shipper,
        devices=devices,
        loop=loop,
        record_every=record_every,
        memory_budget=memory_budget,
    )
    chunk_size = trainer.program.num_settings
    store = None
    if directory is not None:
        identity = {"settings": [[str(x) for x in setting] for setting in settings]}
        identity |= {"seeds": seed_list, "bits": widths, "coding": coding}
        identity |= {"keep_params": keep_params, "recorded_at": trainer.program.recorded_at}
        identity |= {"chunk_size": chunk_size, "program": trainer.program.fingerprint}
        shapes = jax.eval_shape(jax.vmap(init_fn), jax.random.split(jax.random.key(0), 2))
        identity["evaluation"] = shipper.fingerprint(shapes)
        store = ChunkStore(directory, identity)

    chunks = []
    with progress_bar(len(settings), progress) as advance:
        for start in range(0, len(settings), chunk_size):
            part = settings[start : start + chunk_size]
            chunk = store.load(start) if store else None
            if chunk is None:
                chunk = trainer.chunk(part, keep_params)
                if store:
                    store.save(start, chunk)
            chunks.append(chunk)
            advance(len(part))
    shape = (len(step_size_axis), len(threshold_axis))
    arrays = {
        name: np.concatenate([chunk[name] for chunk in chunks]).reshape(*shape, *x.shape[1:])
        for name, x in chunks[0].items()
    }
    structure = jax.tree.structure(jax.eval_shape(init_fn, jax.random.key(0)))
    kept = [arrays[name] for name in sorted(arrays) if name.startswith("params/")]
    return SweepResult(
        step_sizes=step_size_axis,
        thresholds=threshold_axis,
        seeds=np.asarray(seed_list),
        bits=tuple(widths),
        metrics=_under("metrics/", arrays),
        **{name: arrays[name] for name in _FIELDS},
        recorded_at=np.asarray(trainer.program.recorded_at),
        history=_under("history/", arrays),
        metric=metric,
        train_metric=train_metric,
        mode=mode,
        params=structure.unflatten(kept) if keep_params else None,
    )


_FIELDS = (
    "file_bytes",
    "loss",
    "weight_clip_rate",
    "is_diverged",
    "steps",
    "reason_codes",
    "seconds_per_step",
)


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}
    return {k: x.astype(np.float64) for k, x in found.items()}


# --- Arguments ------------------------------------------------------------------------


def _numbers(name: str, values: Sequence[float], check: Callable[[str, Any], None]) -> np.ndarray:
    values = [x.item() if isinstance(x, jax.Array) and not x.ndim else x for x in values]
    for i, value in enumerate(values):
        check(f"{name}[{i}]", value)
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} must have at least one number, and none twice, got {values}.")
    return np.asarray(values, np.float64)


def _widths(bits: Sequence[Bits | None]) -> list[Bits | None]:
    if isinstance(bits, (int, str)):
        raise TypeError(f"bits must be widths, such as (None, 4, 'ternary'), got {bits!r}.")
    return [int(width) if isinstance(width, np.integer) else width for width in bits]
