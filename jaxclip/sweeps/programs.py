"""Many settings trained by compiled programs that serve them all.

A row is a pair of a setting and a seed. All settings of a seed see the same batches and start
from the same parameters. On one CPU the programs are those of a single row, and as many threads as
there are cores run them: its weights stay in the cache, and a row that has stopped costs nothing.
On accelerators and several devices they are those of all rows at once, whose arrays have the
leading axes (settings, seeds), and a row that has stopped no longer changes.
"""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxclip._core.threads import in_threads, num_cores
from jaxclip._core.trees import PyTree
from jaxclip.sweeps.compiled import fingerprint, has_operation, remembered
from jaxclip.sweeps.rows import Row, Rows
from jaxclip.sweeps.tasks import OUTRANKED, Setting, Task
from jaxclip.training.averaging import weights_to_ship
from jaxclip.training.step import backend_options, is_donation_safe

# Ctrl-C waits for the calls that run, so a call is for no more steps than take about this long.
_SECONDS_PER_CALL = 0.25


class Trained(NamedTuple):
    """Trained rows; all arrays have the leading axes (settings, seeds).

    Attributes:
      params: The parameters, or their averages if the optimizer has them: a tree for each row,
        all seeds of a setting after another.
      code: The stop rule's code, int32.
      steps: Steps taken, int32.
      first_loss: The first finite loss, float32; not finite where there was none.
      zero_loss: The loss of weights of 0 for the first batch, float32.
      history: "loss", its mean since the previous record, and "weight_clip_rate": float32 of
        shape (settings, seeds, records). A row that has stopped repeats its last record.
      seconds_per_step: Time of a step of one row, without compilation.
    """

    params: list[PyTree]
    code: np.ndarray
    steps: np.ndarray
    first_loss: np.ndarray
    zero_loss: np.ndarray
    history: dict[str, np.ndarray]
    seconds_per_step: float


class Program:
    """Compiled programs for a number of settings, made once and run for each chunk of them."""

    def __init__(
        self,
        task: Task,
        outline: Setting,
        num_settings: int,
        seeds: Sequence[int],
        devices: Sequence[Any],
        loop: str | None,
        record_every: int,
    ):
        """Compiles for settings with the numbers that `outline` has, whatever their values."""
        self._rows, self.num_settings = Rows(task, record_every), num_settings
        self.recorded_at = self._rows.recorded_at
        self._is_by_row = len(devices) == 1 and devices[0].platform == "cpu"
        self._by_setting, self._everywhere = _shardings(devices)
        self._num_rows, self._steps_per_call = num_settings * len(seeds), 1
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.asarray(seeds))
        self._seed_keys = jax.device_put(keys, self._everywhere)
        self._traced = self._trace(outline, devices[0].platform, loop)
        self._begin, self._advance, *self._record = (
            remembered(program, functools.partial(_compiled, program), devices)
            for program in self._traced
        )

    def _trace(self, outline: Setting, platform: str, loop: str | None) -> list[Any]:
        """Traces what begins rows, advances them and writes a record; chooses the loop."""
        initial, record, shape, keys = self._rows.initial, self._rows.record, (), self._seed_keys[0]
        step, to_end = self._step_row, self._row_to_end
        if not self._is_by_row:
            initial = _over_rows(initial, (0, None), (None, 0))
            record = _over_rows(record, (0, None), (0, None))
            step, to_end = self._step_rows, self._rows_to_end
            shape, keys = (self.num_settings,), self._seed_keys
        number = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._by_setting)
        setting = jax.tree.map(lambda _: number, outline)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._everywhere)
        jit = functools.partial(jax.jit, out_shardings=self._by_setting)
        begin = jit(initial).trace(setting, keys)
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._by_setting),
            begin.out_info,
        )
        jit = functools.partial(jit, donate_argnums=(0,) if is_donation_safe() else ())
        advance = jit(to_end).trace(rows, setting, keys, count)
        if loop is None:
            is_slow = platform == "cpu" and has_operation(advance, "conv_general_dilated")
            loop = "host" if is_slow else "compiled"
        self.loop = loop
        if loop == "compiled":
            return [begin, advance]
        advance = jit(step).trace(rows, setting, keys, count)
        return [begin, advance, jit(record).trace(rows, count)]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the training and its data, equal in all processes."""
        return fingerprint(*self._traced[:2])

    def bytes_needed(self) -> int | None:
        """Returns the bytes that each device holds in a run; None where XLA does not say."""
        sizes = self._advance.memory_analysis()
        if sizes is None:
            return None
        held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
        num_calls = self._num_rows if self._is_by_row else 1
        return num_calls * (held - sizes.alias_size_in_bytes)

    def run(
        self,
        settings: Setting,
        rungs: Sequence[int] = (),
        choose: Callable[[list[PyTree]], np.ndarray] | None = None,
    ) -> Trained:
        """Trains settings, arrays of at most as many as the program was made for.

        After each number of records in `rungs`, `choose(params)` gets the parameters of all rows
        and returns True for the settings that go on.
        """
        shape, seconds = (len(settings.step_size), len(self._seed_keys)), 0.0
        items = self._items(settings)
        rows: list[Any] = [None] * len(items)
        num_threads = min(num_cores(), len(items)) if self._is_by_row else 1
        for end in [*rungs, len(self.recorded_at)]:
            start = time.monotonic()
            train = functools.partial(self._train, end)
            rows = in_threads(train, zip(items, rows, strict=True), num_threads)
            seconds += time.monotonic() - start
            if choose is not None and end < len(self.recorded_at):
                ends = self._split([self._shipped(row) for row in rows], shape)
                params = [row.state.params for row in ends]
                rows = self._outranked(rows, ~choose(params))
        ends = self._split(rows, shape)
        num_steps = [int(row.state.step) for row in ends]
        # Rows that are trained together take the time of the longest.
        num_row_steps = sum(num_steps) if self._is_by_row else max(num_steps) * self._num_rows
        return _gathered(ends, shape, self._rows.record_every, seconds / max(num_row_steps, 1))

    def _items(self, settings: Setting) -> list[tuple]:
        """Returns setting and keys of each row, or those of all rows."""
        settings = jax.tree.map(lambda x: np.asarray(x, np.float32), settings)
        if self._is_by_row:
            each = (
                jax.tree.map(lambda x, i=i: x[i], settings) for i in range(len(settings.step_size))
            )
            return [(setting, keys) for setting in each for keys in self._seed_keys]
        # Fewer settings are padded, so that they run in the same program.
        missing = (0, self.num_settings - len(settings.step_size))
        settings = jax.tree.map(lambda x: np.pad(x, missing, "edge"), settings)
        return [(jax.device_put(settings, self._by_setting), self._seed_keys)]

    def _train(self, end: int, item_and_rows: tuple, is_over: threading.Event) -> Row:
        """Returns a row, or all rows, after `end` records; begins them if they are None."""
        item, rows = item_and_rows
        rows = self._begin(*item) if rows is None else rows
        last = self.recorded_at[end - 1]
        while not is_over.is_set() and (np.asarray(rows.code) == 0).any():
            done = int(np.asarray(rows.state.step).max())
            if done == last:
                break
            index = done // self._rows.record_every
            if self.loop == "host":
                rows = self._step_to_record(rows, item, index, is_over)
            elif self._is_by_row:
                rows = self._call(rows, item, done, last)
            else:
                rows = self._advance(rows, *item, np.int32(self.recorded_at[index]))
        return rows if end < len(self.recorded_at) else self._shipped(rows)

    def _shipped(self, rows: Row) -> Row:
        """Returns a row, or all rows, with the weights to ship and nothing for more training."""
        ship = weights_to_ship if self._is_by_row else _over_rows(weights_to_ship, (0, 0), (0, 0))
        params = ship(rows.state.opt_state, rows.state.params)
        state = rows.state._replace(params=params, opt_state=(), key=None)
        return rows._replace(state=state, memory=(), bounds=[])

    def _call(self, row: Row, item: tuple, done: int, last: int) -> Row:
        """Returns a row after so many further steps as a call should take."""
        start = time.monotonic()
        row = self._advance(row, *item, np.int32(min(done + self._steps_per_call, last)))
        num_steps = max(int(row.state.step) - done, 1)
        seconds = max((time.monotonic() - start) / num_steps, 1e-9)
        self._steps_per_call = max(int(_SECONDS_PER_CALL / seconds), 1)
        return row

    def _step_to_record(self, rows: Row, item: tuple, index: int, is_over: threading.Event) -> Row:
        """Returns rows after step by step has been called from outside, up to a record."""
        for i in range(index * self._rows.record_every, self.recorded_at[index]):
            rows = self._advance(rows, *item, np.int32(i))
            if is_over.is_set() or (self._is_by_row and int(rows.code)):
                break
        return self._record[0](rows, np.int32(index))

    def _split(self, rows: list[Row], shape: tuple[int, int]) -> list[Row]:
        """Returns each row by itself."""
        if self._is_by_row:
            return rows
        many = jax.device_get(rows[0])
        return [jax.tree.map(lambda x, at=at: x[at], many) for at in np.ndindex(shape)]

    def _outranked(self, rows: list[Row], is_outranked: np.ndarray) -> list[Row]:
        """Returns the rows, of which those of some settings have stopped."""
        if self._is_by_row:
            each = np.repeat(is_outranked, len(self._seed_keys))
            return [
                row._replace(code=np.int32(OUTRANKED)) if is_out and not int(row.code) else row
                for row, is_out in zip(rows, each, strict=True)
            ]
        (many,) = rows
        is_out = np.pad(is_outranked, (0, self.num_settings - len(is_outranked)), "edge")[:, None]
        code = np.asarray(many.code)
        code = np.where(is_out & (code == 0), np.int32(OUTRANKED), code)
        return [many._replace(code=jax.device_put(code, self._by_setting))]

    # --- Inside the programs: one row -------------------------------------------------

    def _step_row(self, row: Row, setting: Setting, keys: jax.Array, i: jax.Array) -> Row:
        return self._rows.step(row, setting, self._rows.batch(keys, i), i)

    def _row_to_end(self, row: Row, setting: Setting, keys: jax.Array, end: jax.Array) -> Row:
        """Returns the row after `end` steps, or after it has stopped."""

        def is_on(end: jax.Array, row: Row) -> jax.Array:
            return (row.state.step < end) & (row.code == 0)

        def step(row: Row) -> Row:
            return self._step_row(row, setting, keys, row.state.step)

        def to_record(row: Row) -> Row:
            index = row.state.step // self._rows.record_every
            next_end = jnp.minimum((index + 1) * self._rows.record_every, end)
            row = lax.while_loop(functools.partial(is_on, next_end), step, row)
            return self._rows.record(row, index)

        return lax.while_loop(functools.partial(is_on, end), to_record, row)

    # --- All rows ---------------------------------------------------------------------

    def _step_rows(self, rows: Row, settings: Setting, seed_keys: jax.Array, i: jax.Array) -> Row:
        def unless_stopped(row: Row, *args: Any) -> Row:
            new = self._rows.step(row, *args)
            return jax.tree.map(functools.partial(jnp.where, row.code == 0), new, row)

        batches = jax.vmap(self._rows.batch, (0, None))(seed_keys, i)
        step = _over_rows(unless_stopped, (0, 0, None, None), (0, None, 0, None))
        return step(rows, settings, batches, i)

    def _rows_to_end(
        self, rows: Row, settings: Setting, seed_keys: jax.Array, end: jax.Array
    ) -> Row:
        """Returns all rows after the next record, which is at step `end`."""
        index = (end - 1) // self._rows.record_every

        def body(i: jax.Array, rows: Row) -> Row:
            return self._step_rows(rows, settings, seed_keys, i)

        rows = lax.fori_loop(index * self._rows.record_every, end, body, rows)
        return _over_rows(self._rows.record, (0, None), (0, None))(rows, index)


def _compiled(program: Any) -> Any:
    return program.lower().compile(backend_options())


def _gathered(
    rows: list[Row], shape: tuple[int, int], record_every: int, seconds_per_step: float
) -> Trained:
    """Returns the rows with their histories continued beyond the steps where they stopped."""

    def stacked(leaves: list[Any]) -> np.ndarray:
        return np.stack([np.asarray(x) for x in leaves]).reshape(*shape, *np.shape(leaves[0]))

    steps = stacked([row.state.step for row in rows])
    history = {
        "loss": stacked([row.losses for row in rows]),
        "weight_clip_rate": stacked([row.weight_clip_rates for row in rows]),
    }
    last = np.maximum(-(-steps // record_every) - 1, 0)[..., None]
    index = np.minimum(np.arange(history["loss"].shape[-1]), last)
    return Trained(
        params=[row.state.params for row in rows],
        code=stacked([row.code for row in rows]),
        steps=steps,
        first_loss=stacked([row.first_loss for row in rows]),
        zero_loss=stacked([row.zero_loss for row in rows]),
        history={name: np.take_along_axis(x, index, axis=-1) for name, x in history.items()},
        seconds_per_step=seconds_per_step,
    )


def _shardings(devices: Sequence[Any]) -> tuple[Sharding, Sharding]:
    """Returns the shardings of arrays with an axis of settings, and without."""
    if len(devices) == 1:  # without a mesh: jax 0.7 cannot vmap convolutions on a mesh of one
        return SingleDeviceSharding(devices[0]), SingleDeviceSharding(devices[0])
    mesh = Mesh(np.asarray(devices), ("settings",))
    return NamedSharding(mesh, PartitionSpec("settings")), NamedSharding(mesh, PartitionSpec())


def _over_rows(function: Callable, by_setting: tuple, by_seed: tuple) -> Callable:
    """Returns a function vectorized over settings and seeds; the tuples are its `in_axes`."""
    return jax.vmap(jax.vmap(function, by_seed), by_setting)
