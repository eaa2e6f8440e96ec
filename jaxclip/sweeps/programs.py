"""Many settings trained at once, in one compiled program.

A row is a pair of a setting and a seed; its arrays have the leading axes (settings, seeds). A
step of all rows is two `vmap`s of one train step. All settings of a seed see the same batches
and start from the same parameters. A row that has stopped no longer changes.
"""

import collections
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

from jaxclip._core.trees import PyTree
from jaxclip.sweeps.tasks import STEP_METRICS, Task, check_unambiguous
from jaxclip.training.step import StepInfo, TrainState, make_train_step
from jaxclip.training.stopping import Progress
from jaxclip.training.telemetry import Statistics


class _Row(NamedTuple):
    """A row in training; `code` is that of the stop rule, 0 while the row goes on."""

    state: TrainState
    memory: PyTree
    code: jax.Array
    first_loss: jax.Array
    loss_sum: jax.Array
    num_losses: jax.Array
    weight_clip_rate: jax.Array


class Trained(NamedTuple):
    """Trained rows, all arrays with leading axes (settings, seeds).

    Attributes:
      params: The parameters.
      code: The stop rule's code, int32.
      steps: Steps taken, int32.
      first_loss: The first finite loss, float32; not finite where there was none.
      history: "loss", its mean since the previous record, and "weight_clip_rate": float32 of
        shape (settings, seeds, records). A row that has stopped repeats its last record.
      seconds: Time of the training, without compilation.
    """

    params: PyTree
    code: np.ndarray
    steps: np.ndarray
    first_loss: np.ndarray
    history: dict[str, np.ndarray]
    seconds: float


class Program:
    """A compiled program for a number of settings, made once and run for each chunk of them."""

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
        start = jax.jit(self._initial_rows, out_shardings=self._by_setting)

        numbers = jax.ShapeDtypeStruct((num_settings,), jnp.float32, sharding=self._by_setting)
        rows = jax.eval_shape(start, numbers, self._seed_keys)
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
        begin_record = jax.jit(_without_losses, out_shardings=self._by_setting)
        programs = (start.trace(numbers, self._seed_keys), traced, begin_record.trace(rows))
        self._traced = programs[:2]
        self._start, self._compiled, self._begin_record = (
            remembered(program, lambda program=program: program.lower().compile(), devices)
            for program in programs
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the training and its data, equal in all processes."""
        return fingerprint(*self._traced)

    def bytes_needed(self) -> int | None:
        """Returns the bytes that each device holds in a run; None where XLA does not say."""
        sizes = self._compiled.memory_analysis()
        if sizes is None:
            return None
        return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes

    def run(self, step_sizes: np.ndarray, thresholds: np.ndarray) -> Trained:
        """Trains as many settings as the program was made for."""
        numbers = [np.asarray(x, np.float32) for x in (step_sizes, thresholds)]
        numbers = [jax.device_put(x, self._by_setting) for x in numbers]
        rows = jax.block_until_ready(self._start(numbers[0], self._seed_keys))
        records: list[dict[str, np.ndarray]] = []
        start = time.monotonic()
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
            seconds=time.monotonic() - start,
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
        self,
        rows: _Row,
        step_sizes: jax.Array,
        thresholds: jax.Array,
        seed_keys: jax.Array,
        first: jax.Array,
        end: jax.Array,
    ) -> _Row:
        """Returns all rows after the steps from `first` to before `end`."""

        def body(i: jax.Array, rows: _Row) -> _Row:
            return self._advance(rows, step_sizes, thresholds, seed_keys, i, i + 1)

        return lax.fori_loop(first, end, body, rows)

    def _advance(
        self,
        rows: _Row,
        step_sizes: jax.Array,
        thresholds: jax.Array,
        seed_keys: jax.Array,
        i: jax.Array,
        num_steps: jax.Array,
    ) -> _Row:
        """Returns all rows after step `i`, which makes `num_steps` steps in all."""
        keys = jax.vmap(lambda keys: jax.random.fold_in(keys[1], i))(seed_keys)
        batches = jax.vmap(self._task.batches)(keys)
        step = _over_rows(self._step, (0, 0, 0, None), (None, None, 0, 0))
        states, infos = step(step_sizes, thresholds, rows.state, batches)
        is_due, metrics = jnp.zeros((), bool), {}
        if self._task.evaluate_every is not None:
            is_due = num_steps % self._task.evaluate_every == 0
            evaluate = _over_rows(self._task.evaluate, (0,), (0,))
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(evaluate, states.params)
            )
            metrics = lax.cond(is_due, evaluate, lambda _: zeros, states.params)
        next_row = functools.partial(self._next_row, is_due)
        return _over_rows(next_row, (0, 0, 0, 0), (0, 0, 0, 0))(rows, states, infos, metrics)

    def _step(
        self, step_size: jax.Array, threshold: jax.Array, state: TrainState, batch: PyTree
    ) -> tuple[TrainState, StepInfo]:
        box = self._task.weight_threshold
        step = make_train_step(
            self._task.loss_fn,
            self._task.optimizer(step_size),
            weight_threshold=threshold if box is None else box(threshold),
            telemetry_every=1,
        )
        return step(state, batch)

    def _next_row(
        self,
        is_due: jax.Array,
        row: _Row,
        state: TrainState,
        info: StepInfo,
        metrics: dict[str, jax.Array],
    ) -> _Row:
        """Returns the row after a step, or as it was if it has stopped."""
        own = {name: getattr(info, name) for name in STEP_METRICS}
        if info.learning_rate is not None:
            own["learning_rate"] = info.learning_rate
        numbers = Statistics(own | info.stats)
        known = Statistics(numbers | metrics)
        unknown = sorted(name for name in self._task.stop.metrics if name not in known)
        if unknown:
            raise ValueError(f"stop reads {unknown}, but the metrics are {sorted(known)}.")
        check_unambiguous(self._task.stop, numbers, metrics)
        progress = Progress(state.step, 0.0, info.num_skipped, numbers)
        memory, code = self._task.stop.update(row.memory, progress)
        if metrics:
            progress = progress._replace(metrics=known)
            # The rule is updated once per step: on due steps with the metrics of `evaluate`.
            if_due = self._task.stop.update(row.memory, progress)
            memory, code = jax.tree.map(
                functools.partial(jnp.where, is_due), if_due, (memory, code)
            )
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
    """Returns the shardings of arrays with an axis of settings, and without."""
    if len(devices) == 1:  # without a mesh: jax 0.7 cannot vmap convolutions on a mesh of one
        return SingleDeviceSharding(devices[0]), SingleDeviceSharding(devices[0])
    mesh = Mesh(np.asarray(devices), ("settings",))
    return NamedSharding(mesh, PartitionSpec("settings")), NamedSharding(mesh, PartitionSpec())


def _without_losses(rows: _Row) -> _Row:
    return rows._replace(
        loss_sum=jnp.zeros_like(rows.loss_sum), num_losses=jnp.zeros_like(rows.num_losses)
    )


def _record(rows: _Row, earlier: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the metrics since the last record; a row that had stopped repeats that record."""
    num_losses = np.asarray(rows.num_losses)
    loss = np.asarray(rows.loss_sum) / np.maximum(num_losses, 1).astype(np.float32)
    record = {"loss": loss, "weight_clip_rate": np.asarray(rows.weight_clip_rate)}
    if earlier:
        record = {k: np.where(num_losses > 0, x, earlier[-1][k]) for k, x in record.items()}
    return record


def _over_rows(function: Callable, by_setting: tuple, by_seed: tuple) -> Callable:
    """Returns a function vectorized over settings and seeds; the tuples are its `in_axes`."""
    return jax.vmap(jax.vmap(function, by_seed), by_setting)


def fingerprint(*programs: Any) -> str:
    """Returns a digest of traced functions and their data, equal in all processes."""
    digest = hashlib.sha256()
    for program in programs:
        # The structure has the names: a jaxpr identifies its outputs only by position.
        text = f"{program.jaxpr} {jax.tree.structure(program.out_info)}"
        digest.update(re.sub(r"0x[0-9a-f]+", "", text).encode())  # addresses in memory
        for constant in _constants(program.jaxpr):
            if jnp.issubdtype(getattr(constant, "dtype", np.float32), jax.dtypes.prng_key):
                constant = jax.random.key_data(constant)
            digest.update(np.asarray(constant).tobytes())
    return digest.hexdigest()


# The compiled programs of the last sweeps, the latest last. Few, because they hold their data.
_RECENT: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
_NUM_RECENT = 16


def remembered(program: jax.stages.Traced, make: Callable[[], Any], *places: Any) -> Any:
    """Returns what `make()` returned for an equal program at the same places, or returns now."""
    # Equal by what it computes, not by its functions: these may read other data than before.
    if "callback" in str(program.jaxpr):  # functions outside of the program, known by address only
        return make()
    trees = jax.tree.structure((program.args_info, program.out_info))
    precision = str(jax.config.jax_default_matmul_precision)  # pyright: ignore
    key = (fingerprint(program), trees, repr(places), precision)
    if key not in _RECENT:
        _RECENT[key] = make()
    _RECENT.move_to_end(key)
    while len(_RECENT) > _NUM_RECENT:
        _RECENT.popitem(last=False)
    return _RECENT[key]


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Yields the constants of a jaxpr and of all jaxprs in it, which its text omits."""
    # Jaxprs are recognized by their attributes, because `jax.extend.core` is slow to import.
    yield from getattr(jaxpr, "consts", ())  # an open jaxpr has none
    for equation in jaxpr.eqns:
        yield from (x.val for x in equation.invars if hasattr(x, "val"))
        for x in jax.tree.leaves(equation.params):
            if hasattr(x, "eqns"):
                yield from _constants(x)
            elif isinstance(x, (np.ndarray, jax.Array)):
                yield x
