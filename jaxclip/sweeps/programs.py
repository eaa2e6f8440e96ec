"""Many settings trained at once: one compiled program for a grid of step sizes and boxes.

Rows are the pairs of a setting and a seed; whatever belongs to a row has the leading axes
(settings, seeds). A step of all rows is two `vmap`s of one train step. All settings of a seed
see the same batches and start from the same parameters. A row that has stopped is frozen: its
parameters no longer change, whatever the others do.
"""

import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxclip.sweeps.tasks import STEP_NUMBERS, Task, check_told_apart
from jaxclip.training.step import StepInfo, TrainState, make_train_step
from jaxclip.training.stopping import Seen


class _Row(NamedTuple):
    """A row under way; `code` is that of the stop rule, 0 as long as it goes on."""

    state: TrainState
    memory: Any
    code: jax.Array
    first_loss: jax.Array
    loss_sum: jax.Array
    num_losses: jax.Array
    weight_clip_rate: jax.Array


class Trained(NamedTuple):
    """Rows as they ended, each with leading axes (settings, seeds).

    Attributes:
      params: The parameters.
      code: The stop rule's code, int32.
      steps: Steps taken, int32.
      first_loss: The first finite loss, float32; not finite where there was none.
      history: For "loss", the mean since the record before, and "weight_clip_rate", what was
        recorded: float32 of shape (settings, seeds, records). A row that has stopped repeats
        its last record.
      seconds: Time of the training, without compiling.
    """

    params: Any
    code: np.ndarray
    steps: np.ndarray
    first_loss: np.ndarray
    history: dict[str, np.ndarray]
    seconds: float


class Program:
    """The compiled program for a number of settings; made once, run for each chunk of them.

    Args:
      task: What is trained.
      num_settings: Settings that are trained at once; a multiple of the number of devices.
      seeds: Integers.
      devices: Where: the settings are shared out among them.
      loop: "compiled" for a loop inside the program, "host" for one outside it, or None:
        outside where XLA's loops on CPU are slow, which is for convolutions.
      record_every: After how many steps the history gets a record.
    """

    def __init__(
        self,
        task: Task,
        num_settings: int,
        seeds: Sequence[int],
        devices: Sequence[Any],
        loop: str | None,
        record_every: int,
    ):
        self._task, self._record_every, self.num_settings = task, record_every, num_settings
        num_steps = int(task.stop.num_steps or 0)
        self.recorded_at = [*range(record_every, num_steps, record_every), num_steps]
        self._by_setting, self._everywhere = _shardings(devices)
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.asarray(seeds))
        self._seed_keys = jax.device_put(keys, self._everywhere)
        self._start = jax.jit(self._initial_rows, out_shardings=self._by_setting)

        numbers = jax.ShapeDtypeStruct((num_settings,), jnp.float32, sharding=self._by_setting)
        rows = jax.eval_shape(self._start, numbers, self._seed_keys)
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._by_setting), rows
        )
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._everywhere)
        shapes = (rows, numbers, numbers, self._seed_keys, count, count)
        traced = jax.jit(self._advance_many, out_shardings=self._by_setting).trace(*shapes)
        if loop is None:
            is_slow = "conv_general_dilated" in str(traced.jaxpr)
            loop = "host" if is_slow and devices[0].platform == "cpu" else "compiled"
        self.loop = loop
        if loop == "host":
            traced = jax.jit(self._advance, out_shardings=self._by_setting).trace(*shapes)
        self._traced, self._compiled = traced, traced.lower().compile()
        begin_record = jax.jit(_without_losses, out_shardings=self._by_setting)
        self._begin_record = begin_record.lower(rows).compile()
        self._numbers = numbers

    @functools.cached_property
    def fingerprint(self) -> str:
        """What is the same for the same training on the same data."""
        return fingerprint(self._start.trace(self._numbers, self._seed_keys), self._traced)

    def bytes_needed(self) -> int | None:
        """Bytes that each device holds while the program runs; None where XLA does not say."""
        found = self._compiled.memory_analysis()
        if found is None:
            return None
        return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes

    def run(self, step_sizes: np.ndarray, thresholds: np.ndarray) -> Trained:
        """Trains the settings, as many as the program was made for."""
        numbers = [np.asarray(x, np.float32) for x in (step_sizes, thresholds)]
        numbers = [jax.device_put(x, self._by_setting) for x in numbers]
        rows = jax.block_until_ready(self._start(numbers[0], self._seed_keys))
        records: list[dict[str, np.ndarray]] = []
        begun = time.monotonic()
        for end in self.recorded_at:
            if records and np.all(np.asarray(rows.code) > 0):
                records.append(records[-1])
                continue
            first = end - 1 - (end - 1) % self._record_every
            stride = end - first if self.loop == "compiled" else 1
            for i in range(first, end, stride):
                rows = self._compiled(
                    rows, *numbers, self._seed_keys, np.int32(i), np.int32(i + stride)
                )
            records.append(_record(rows, records))
            rows = self._begin_record(rows)
        jax.block_until_ready(rows)
        return Trained(
            params=rows.state.params,
            code=np.asarray(rows.code),
            steps=np.asarray(rows.state.step),
            first_loss=np.asarray(rows.first_loss),
            history={k: np.stack([r[k] for r in records], axis=-1) for k in records[0]},
            seconds=time.monotonic() - begun,
        )

    # --- Inside the program -----------------------------------------------------------

    def _initial_rows(self, step_sizes: jax.Array, seed_keys: jax.Array) -> _Row:
        def initial(step_size: jax.Array, keys: jax.Array) -> _Row:
            params = self._task.init_fn(keys[0])
            state = TrainState.create(params, self._task.optimizer(step_size), key=keys[2])
            zero = jnp.zeros((), jnp.float32)
            count = jnp.zeros((), jnp.int32)
            no_loss = jnp.full((), jnp.inf, jnp.float32)
            return _Row(state, self._task.stop.init(), count, no_loss, zero, count, zero)

        return _over_rows(initial, (0, None), (None, 0))(step_sizes, seed_keys)

    def _advance_many(
        self, rows: _Row, step_sizes: Any, thresholds: Any, seed_keys: Any, first: Any, end: Any
    ) -> _Row:
        def body(i: jax.Array, rows: _Row) -> _Row:
            return self._advance(rows, step_sizes, thresholds, seed_keys, i, i + 1)

        return lax.fori_loop(first, end, body, rows)

    def _advance(
        self, rows: _Row, step_sizes: Any, thresholds: Any, seed_keys: Any, i: Any, after: Any
    ) -> _Row:
        """All rows after one step, the `after`-th."""
        keys = jax.vmap(lambda keys: jax.random.fold_in(keys[1], i))(seed_keys)
        batches = jax.vmap(self._task.batches)(keys)
        step = _over_rows(self._step, (0, 0, 0, None), (None, None, 0, 0))
        states, infos = step(step_sizes, thresholds, rows.state, batches)
        is_due, metrics = jnp.zeros((), bool), {}
        if self._task.evaluate_every is not None:
            is_due = after % self._task.evaluate_every == 0
            evaluate = _over_rows(self._task.evaluate, (0,), (0,))
            nothing = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(evaluate, states.params)
            )
            metrics = lax.cond(is_due, evaluate, lambda _: nothing, states.params)
        look = functools.partial(self._look, is_due)
        return _over_rows(look, (0, 0, 0, 0), (0, 0, 0, 0))(rows, states, infos, metrics)

    def _step(
        self, step_size: jax.Array, threshold: jax.Array, state: TrainState, batch: Any
    ) -> tuple[TrainState, StepInfo]:
        box = self._task.weight_threshold
        step = make_train_step(
            self._task.loss_fn,
            self._task.optimizer(step_size),
            weight_threshold=threshold if box is None else box(threshold),
        )
        return step(state, batch)

    def _look(
        self, is_due: jax.Array, row: _Row, state: TrainState, info: StepInfo, metrics: Any
    ) -> _Row:
        """The row after a step, unless it has stopped: then as it was."""
        numbers = {n: getattr(info, n) for n in STEP_NUMBERS}
        numbers |= info.stats
        unknown = sorted(self._task.stop.metrics - {*numbers, *metrics})
        if unknown:
            known = sorted({*numbers, *metrics})
            raise ValueError(f"stop looks at {unknown}, which is not among {known}.")
        check_told_apart(self._task.stop, numbers, metrics)
        seen = Seen(state.step, 0.0, info.num_skipped, numbers)
        memory, code = self._task.stop.update(row.memory, seen)
        if metrics:
            seen = seen._replace(metrics={**seen.metrics, **metrics})
            found = self._task.stop.update(row.memory, seen)
            memory, code = jax.tree.map(functools.partial(jnp.where, is_due), found, (memory, code))
        loss = info.loss.astype(jnp.float32)
        new = _Row(
            state=state,
            memory=memory,
            code=code,
            first_loss=jnp.where(jnp.isfinite(row.first_loss), row.first_loss, loss),
            loss_sum=row.loss_sum + loss,
            num_losses=row.num_losses + 1,
            weight_clip_rate=info.weight_clip_rate,
        )
        return jax.tree.map(functools.partial(jnp.where, row.code == 0), new, row)


def _shardings(devices: Sequence[Any]) -> tuple[Sharding, Sharding]:
    """For what has an axis of settings, and for what has none."""
    if len(devices) == 1:  # without a mesh, for jax 0.7 has no batches of convolutions on one
        return SingleDeviceSharding(devices[0]), SingleDeviceSharding(devices[0])
    mesh = Mesh(np.asarray(devices), ("settings",))
    return NamedSharding(mesh, PartitionSpec("settings")), NamedSharding(mesh, PartitionSpec())


def _without_losses(rows: _Row) -> _Row:
    return rows._replace(
        loss_sum=jnp.zeros_like(rows.loss_sum), num_losses=jnp.zeros_like(rows.num_losses)
    )


def _record(rows: _Row, before: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What has been seen since the last record; of a row that had stopped, that one again."""
    num_losses = np.asarray(rows.num_losses)
    loss = np.asarray(rows.loss_sum) / np.maximum(num_losses, 1).astype(np.float32)
    record = {"loss": loss, "weight_clip_rate": np.asarray(rows.weight_clip_rate)}
    if before:
        record = {k: np.where(num_losses > 0, x, before[-1][k]) for k, x in record.items()}
    return record


def _over_rows(function: Callable[..., Any], by_setting: tuple, by_seed: tuple) -> Any:
    return jax.vmap(jax.vmap(function, by_seed), by_setting)


def fingerprint(*programs: Any) -> str:
    """Returns what is the same for the same programs on the same data, in another process too.

    Args:
      programs: Traced functions, as `jax.jit(function).trace(...)` gives them.

    Example:
      >>> double, triple = (jax.jit(lambda x, n=n: n * x).trace(1.0) for n in (2, 3))
      >>> fingerprint(double) == fingerprint(triple)
      False
    """
    digest = hashlib.sha256()
    for program in programs:
        # Names are in the structure alone, for a jaxpr knows its outputs by their places.
        text = f"{program.jaxpr} {jax.tree.structure(program.out_info)}"
        digest.update(re.sub(r"0x[0-9a-f]+", "", text).encode())  # places in memory
        for constant in _constants(program.jaxpr):
            if jnp.issubdtype(getattr(constant, "dtype", np.float32), jax.dtypes.prng_key):
                constant = jax.random.key_data(constant)
            digest.update(np.asarray(constant).tobytes())
    return digest.hexdigest()


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Yields what the text of a jaxpr does not show: its data, and that of all jaxprs in it.

    Jaxprs are known by what they have, for `jax.extend.core` takes long to import.
    """
    yield from getattr(jaxpr, "consts", ())  # an open one has none
    for equation in jaxpr.eqns:
        yield from (x.val for x in equation.invars if hasattr(x, "val"))
        for x in jax.tree.leaves(equation.params):
            if hasattr(x, "eqns"):
                yield from _constants(x)
            elif isinstance(x, (np.ndarray, jax.Array)):
                yield x
