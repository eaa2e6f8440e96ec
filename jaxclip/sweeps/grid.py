"""Step sizes, boxes and widths compared; what trains one of them trains all.

    result = sweep(task, step_sizes=[1e-3, 1e-2], thresholds=[0.5, 1.0])
    print(result.recommend(max_loss=0.01))

Every setting is trained with every seed, compressed to every width, and evaluated with the weights
that a file would give back.
"""

import itertools
import math
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import numpy as np
import optax

from jaxclip._core import checks
from jaxclip._core.extras import progress_bar
from jaxclip._core.grids import Bits, Grid, code_range
from jaxclip._core.reports import to_json
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints.compressing import compress as default_compress
from jaxclip.lowbit.coding.entropy_coding import Coding
from jaxclip.lowbit.rounding.moments import Calibration
from jaxclip.sparsity.keeping import check_density
from jaxclip.sweeps.chunks import ChunkStore, Compressor, Trainer
from jaxclip.sweeps.results import AXES, SweepResult
from jaxclip.sweeps.tasks import Setting, Task, checked_models, outline_of_params

_RESULT_ARRAYS = (
    "file_bytes",
    "loss",
    "weight_clip_rate",
    "is_diverged",
    "steps",
    "reason_codes",
    "seconds_per_step",
)


def sweep(
    task: Task,
    *,
    step_sizes: Sequence[float],
    thresholds: Sequence[float] = (math.inf,),
    seeds: int | Sequence[int] = 5,
    weight_decays: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    bits: Sequence[Bits | Grid | None] = (None, 4, 3, 2, "ternary", 1),
    compress: Callable[[optax.Params, Any], PyTree] = default_compress,
    coding: Coding | None = None,
    budgets: Sequence[int] = (),
    calibration: Callable[[optax.Params], Calibration] | None = None,
    record_every: int | None = None,
    loop: Literal["compiled", "host"] | None = None,
    schedule: Literal["halving"] | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    directory: str | os.PathLike | None = None,
    devices: Sequence[Any] | None = None,
    keep_params: bool = False,
    progress: bool = True,
) -> SweepResult:
    """Trains a task with every setting and seed, and measures each in files of low bits.

    A row, one setting with one seed, is trained by `make_train_step(task.loss_fn,
    task.optimizer(step_size), weight_threshold=task.weight_threshold(threshold))`. Seed s gives the
    keys `init, data, loss = split(key(s), 3)`, and step i, from 0, gets
    `task.batches(fold_in(data, i))`. Compiled once, the step serves all rows of a model. On one CPU
    as many threads as there are cores train a row each, and a row that has stopped takes no more
    time. On accelerators and several devices all rows are trained together.

    Args:
      task: The problem: loss, data, optimizer, stop rule and evaluation.
      step_sizes: Positive numbers.
      thresholds: Numbers in [0, inf], one for each box; inf for no box.
      seeds: Number of seeds, counted from 0, or the seeds themselves.
      weight_decays: Numbers of at least 0 for `task.optimizer(step_size, weight_decay=...)`;
        None for optimizers of the step size alone.
      densities: Fractions in (0, 1] of the weights to keep: rows are pruned while they are
        trained, by `keep_sparse` along the cubic schedule, over the first three quarters of the
        steps. A row that `task.stop` ends before that keeps more. None does not prune.
      bits: Widths or `Grid`s at which each row is evaluated; None for the weights as they were
        trained.
      compress: `compress(params, bits)`; for other rules or groups, a function around
        `jaxclip.compress`. It is compiled.
      coding: Entropy coding of the files whose bytes are counted: None, "huffman", "ans",
        "lanes" or "smallest". Not for budgets.
      budgets: Largest sizes of files in bytes. Each row is also evaluated as
        `jaxclip.compress(params, target_bytes=budget, calibration=calibration(params))` gives it
        back. Such files are coded by "lanes".
      calibration: `calibration(params)` returns a `Calibration`, as `calibration.measure` and
        `calibration.sensitivities` do for given inputs. It is called once for each row. None
        compresses without data.
      record_every: Steps between two records of the history; by default a fiftieth of all.
      loop: "compiled" for a loop over the steps inside the compiled program, "host" for one
        outside. None is "host" if the loss has convolutions and runs on CPU, where XLA's loops
        around them are slow, otherwise "compiled".
      schedule: "halving" to train only the best settings to the end. After a ninth and a third of
        the steps, at a record, the best third of each model's settings goes on, by the metric at
        the last width of `bits`, or as they were trained if there is none. The others stop with
        the reason `StopReason.OUTRANKED`; those that go on get the same numbers as without. None
        trains all.
      chunk_size: Settings that are trained before their results are measured and stored, rounded
        up to a multiple of the number of devices; None for all that fit `memory_budget`.
      memory_budget: Bytes that the rows of a chunk may use on each device, all in training; None
        for no limit. Memory use is known only after compilation, so where rows are trained
        together, a smaller chunk compiles them again.
      directory: Local folder for finished chunks. An interrupted sweep continues after them when it
        is called again; a call with other arguments or data is refused. Processes that run the
        same sweep on one folder divide its chunks among them.
      devices: Devices over which the settings are divided; None for all of this process.
      keep_params: True to have the trained parameters in the result.
      progress: True to show a bar in a terminal or a notebook, if rich is installed.

    Returns:
      A `SweepResult`. A diverged row is marked and does not affect the others, nor does a budget
      that is out of reach.

    Raises:
      TypeError: If `task.evaluate` does not return a dict, or an argument has a wrong type.
      ValueError: If a number is out of range; if a metric of the task is not among those that
        `evaluate` returns; if `stop` reads a metric that nothing measures, or that a step and
        `evaluate` both report; if one setting exceeds `memory_budget`, or with a schedule all
        together; if a schedule comes with smaller chunks; or if `directory` has chunks of
        another sweep.
      CheckpointError: If a file in `directory` is damaged.

    Example:
      >>> import jax.numpy as jnp, jaxclip
      >>> goal = jnp.linspace(-0.3, 0.5, 512).reshape(64, 8)
      >>> task = Task(
      ...     lambda w, noise: jnp.mean((w - goal + noise) ** 2),
      ...     lambda key: jnp.zeros((64, 8)),
      ...     jaxclip.sign_sgd,
      ...     lambda key: 0.1 * jax.random.normal(key, (64, 8)),
      ...     stop=jaxclip.max_steps(60),
      ...     evaluate=lambda w: {"error": jnp.mean((w - goal) ** 2)},
      ...     metric="error",
      ...     mode="min",
      ... )
      >>> result = sweep(
      ...     task, step_sizes=[0.1, 0.01], thresholds=[0.25, 1.0], seeds=2, bits=(None, 4)
      ... )
      >>> best = result.recommend(max_loss=0.001)
      >>> best.step_size, best.threshold, best.bits
      (0.01, 1.0, 4)
    """
    axes = {
        "weight_decay": _optional("weight_decays", weight_decays, checks.check_nonnegative),
        "density": _optional("densities", densities, check_density),
        "step_size": _axis("step_sizes", step_sizes, checks.check_positive),
        "threshold": _axis("thresholds", thresholds, checks.check_threshold),
    }
    seed_axis, widths, sizes = _seed_axis(seeds), _widths(bits), _budgets(budgets, calibration)
    checks.check_choice("schedule", schedule, (None, "halving"))
    _check_run(loop, devices, record_every, chunk_size, memory_budget)
    if directory is not None:
        checks.check_local_path("directory", directory)
    models = checked_models(task)
    settings, shape = _settings(axes)
    identity = {name: to_json(values) for name, values in axes.items()}
    identity |= {"seeds": seed_axis, "bits": to_json(widths), "coding": coding, "budgets": sizes}
    identity |= {"keep_params": keep_params, "schedule": schedule}
    found, recorded_at = {}, []
    for number, (name, one) in enumerate(models.items()):
        compressor = Compressor(one.evaluate, compress, coding, widths, sizes, calibration)
        trainer = Trainer(
            one,
            settings,
            seed_axis,
            compressor,
            chunk_size=chunk_size,
            devices=devices,
            loop=loop,
            record_every=record_every,
            memory_budget=memory_budget,
            schedule=schedule,
        )
        recorded_at = trainer.program.recorded_at  # the same for all models
        store = None
        if directory is not None:
            folder = directory if name is None else os.path.join(directory, f"model-{number}")
            of_model = _identity_of_model(name, trainer, compressor, one)
            store = ChunkStore(folder, identity | of_model)
        found[name] = _joined(_chunks(trainer, settings, store, keep_params, progress), shape)
    params: dict[str | None, PyTree] = {None: None}
    if keep_params:
        params = {name: _params(one, found[name]) for name, one in models.items()}
    arrays = found[None] if None in found else _stacked(list(found.values()))
    return SweepResult(
        **{AXES[name]: values for name, values in axes.items()},
        models=None if None in found else tuple(map(str, found)),
        seeds=np.asarray(seed_axis),
        bits=tuple(widths),
        budgets=tuple(sizes),
        metrics=_under("metrics/", arrays),
        **{name: arrays[name] for name in _RESULT_ARRAYS},
        recorded_at=np.asarray(recorded_at),
        history=_under("history/", arrays),
        metric=task.metric,
        train_metric=task.train_metric,
        mode=task.mode,
        params=params.get(None, params),
    )


def _settings(axes: dict[str, np.ndarray | None]) -> tuple[Setting, tuple[int, ...]]:
    """Returns all settings of a grid in row-major order, and the grid's shape."""
    swept = {name: values for name, values in axes.items() if values is not None}
    grid = np.meshgrid(*swept.values(), indexing="ij")
    columns = {name: x.ravel() for name, x in zip(swept, grid, strict=True)}
    return Setting(**(dict.fromkeys(Setting._fields) | columns)), grid[0].shape


def _chunks(
    trainer: Trainer,
    settings: Setting,
    store: ChunkStore | None,
    keep_params: bool,
    progress: bool,
) -> list[dict[str, np.ndarray]]:
    """Returns the arrays of all chunks, from the store where it has them."""
    size, num_settings = trainer.program.num_settings, len(settings.step_size)
    chunks = {}
    with progress_bar(num_settings, progress) as advance:
        # First the chunks that no other process is training, then those that one was.
        for wait, start in itertools.product((False, True), range(0, num_settings, size)):
            if start in chunks:
                continue
            some = jax.tree.map(lambda x, at=start: x[at : at + size], settings)
            chunk = _chunk(trainer, some, store, start, keep_params, wait)
            if chunk is not None:
                chunks[start] = chunk
                advance(len(some.step_size))
    return [chunks[start] for start in sorted(chunks)]


def _chunk(
    trainer: Trainer,
    settings: Setting,
    store: ChunkStore | None,
    start: int,
    keep_params: bool,
    wait: bool,
) -> dict[str, np.ndarray] | None:
    """Returns a chunk, loaded or trained; without `wait` None if another process trains it."""
    if store is None:
        return trainer.chunk(settings, keep_params)
    chunk = store.load(start)
    if chunk is not None:
        return chunk
    with store.claimed(start, wait) as is_ours:
        if not is_ours:
            return None
        chunk = store.load(start)  # it may have come while this process waited
        return chunk or store.save(start, trainer.chunk(settings, keep_params))


def _joined(parts: list[dict[str, np.ndarray]], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns the arrays of all chunks, their axis of settings split into `shape`."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: x.reshape(*shape, *x.shape[1:]) for name, x in whole.items()}


def _stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays of all models but their parameters, an axis of models leading."""
    names = [name for name in parts[0] if not name.startswith("params/")]
    return {name: np.stack([part[name] for part in parts]) for name in names}


def _identity_of_model(
    name: str | None, trainer: Trainer, compressor: Compressor, task: Task
) -> dict[str, Any]:
    """Returns further values that must be equal for stored chunks to be of the same sweep."""
    return {
        "model": name,
        "recorded_at": trainer.program.recorded_at,
        "chunk_size": trainer.program.num_settings,
        "program": trainer.program.fingerprint,
        "evaluation": compressor.fingerprint(task),
    }


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}
    return {k: x.astype(np.float64) for k, x in found.items()}


def _params(task: Task, arrays: dict[str, np.ndarray]) -> PyTree:
    structure = jax.tree.structure(outline_of_params(task))
    return structure.unflatten(arrays[k] for k in sorted(arrays) if k.startswith("params/"))


# --- Arguments ------------------------------------------------------------------------


def _optional(
    name: str, values: Sequence[float] | None, check: Callable[[str, Any], None]
) -> np.ndarray | None:
    return None if values is None else _axis(name, values, check)


def _axis(name: str, values: Sequence[float], check: Callable[[str, Any], None]) -> np.ndarray:
    values = [x.item() if isinstance(x, jax.Array) and not x.ndim else x for x in values]
    for i, value in enumerate(values):
        check(f"{name}[{i}]", value)
    if not values or len(set(values)) != len(values):
        raise ValueError(f"{name} must have at least one number, and none twice, got {values}.")
    return np.asarray(values, np.float64)


def _seed_axis(seeds: int | Sequence[int]) -> list[int]:
    if isinstance(seeds, (int, np.integer)):
        checks.check_count("seeds", seeds)
        return list(range(int(seeds)))
    found = []
    for i, seed in enumerate(seeds):
        try:
            found.append(operator.index(seed))
        except TypeError as error:
            raise TypeError(f"seeds[{i}] must be an integer, got {seed!r}.") from error
        # `jax.random.key` drops the higher bits of larger integers: two seeds would be one.
        if not -(2**31) <= found[-1] < 2**31:
            raise ValueError(f"seeds[{i}] must be within 32 bits, got {seed!r}.")
    if not found or len(set(found)) != len(found):
        raise ValueError(f"seeds must have at least one integer, and none twice, got {found}.")
    return found


def _widths(bits: Sequence[Bits | Grid | None]) -> list[Bits | Grid | None]:
    if isinstance(bits, (int, str, Grid)):
        raise TypeError(f"bits must be widths, such as (None, 4, 'ternary'), got {bits!r}.")
    widths = [cast(Bits, int(x)) if isinstance(x, np.integer) else x for x in bits]
    for width in widths:
        if isinstance(width, Grid):
            code_range(width.bits)
        elif width is not None:
            code_range(cast(Bits, width))
    return cast("list[Bits | Grid | None]", widths)


def _budgets(budgets: Sequence[int], calibration: object) -> list[int]:
    if isinstance(budgets, (int, np.integer, str)):
        raise TypeError(f"budgets must be sizes of files, such as (20_000,), got {budgets!r}.")
    for i, budget in enumerate(budgets):
        checks.check_count(f"budgets[{i}]", budget)
    found = [int(budget) for budget in budgets]
    if len(set(found)) != len(found):
        raise ValueError(f"budgets must have no number twice, got {found}.")
    if calibration is not None and not callable(calibration):
        raise TypeError(f"calibration must be a function of parameters, got {calibration!r}.")
    if calibration is not None and not found:
        raise ValueError("calibration is for files within budgets: give budgets.")
    return found


def _check_run(
    loop: str | None,
    devices: Sequence[Any] | None,
    record_every: int | None,
    chunk_size: int | None,
    memory_budget: int | None,
) -> None:
    checks.check_choice("loop", loop, (None, "compiled", "host"))
    if devices is not None and not len(devices):
        raise ValueError("devices must have at least one device, got none.")
    counts = {"record_every": record_every, "chunk_size": chunk_size}
    for name, count in {**counts, "memory_budget": memory_budget}.items():
        if count is not None:
            checks.check_count(name, count)
