"""One row of a sweep: a setting and a seed, trained step by step until its stop rule says so."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core.trees import PyTree, is_clippable
from jaxclip._core.updates import bound_in
from jaxclip.sweeps.tasks import (
    STEP_METRICS,
    Setting,
    Task,
    check_unambiguous,
    initial_params,
    optimizer_of,
)
from jaxclip.training.averaging import weights_to_ship
from jaxclip.training.info import StepInfo
from jaxclip.training.step import TrainState, make_step_with_bounds
from jaxclip.training.stopping import Progress
from jaxclip.training.telemetry import Statistics
from jaxclip.weights.clipping import rate_on_bounds


class Row(NamedTuple):
    """A row in training; `code` is that of the stop rule, 0 while the row goes on."""

    state: TrainState
    memory: PyTree
    code: jax.Array
    first_loss: jax.Array
    zero_loss: jax.Array  # that of weights of 0, for the first batch
    loss_sum: jax.Array  # over the steps since the last record
    num_losses: jax.Array
    bounds: list[jax.Array]  # the box of the last step, for each leaf
    losses: jax.Array  # a number for each record, as in `weight_clip_rates`
    weight_clip_rates: jax.Array


class Rows:
    """The pure functions that begin, continue and record a row of a task."""

    def __init__(self, task: Task, record_every: int):
        self._task = task
        num_steps = int(task.stop.num_steps or 0)
        self.record_every = record_every
        self.recorded_at = [*range(record_every, num_steps, record_every), num_steps]

    def initial(self, setting: Setting, keys: jax.Array) -> Row:
        """Returns a row before its first step."""
        params = initial_params(self._task, keys[0])
        state = TrainState.create(params, optimizer_of(self._task, setting), key=keys[2])
        step = self._train_step(setting)
        # Of this step XLA computes only the loss.
        zeros = jax.tree.map(lambda w: jnp.zeros_like(w) if is_clippable(w) else w, params)
        _, info, bounds = step(state._replace(params=zeros), self.batch(keys, 0))
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros(len(self.recorded_at), jnp.float32)
        return Row(
            state=state,
            memory=self._task.stop.init(),
            code=jnp.zeros((), jnp.int32),
            first_loss=jnp.full((), jnp.inf, jnp.float32),
            zero_loss=info.loss.astype(jnp.float32),
            loss_sum=zero,
            num_losses=jnp.zeros((), jnp.int32),
            bounds=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), bounds),
            losses=none,
            weight_clip_rates=none,
        )

    def batch(self, keys: jax.Array, i: jax.Array | int) -> PyTree:
        """Returns the batch of step `i`, from 0, of a seed."""
        return self._task.batches(jax.random.fold_in(keys[1], i))

    def _train_step(self, setting: Setting) -> Callable:
        """Returns a step that also returns the box: an array for each leaf, in its dtype."""
        box = self._task.weight_threshold
        step = make_step_with_bounds(
            self._task.loss_fn,
            optimizer_of(self._task, setting),
            setting.threshold if box is None else box(setting.threshold),
        )

        def with_arrays(state: TrainState, batch: PyTree) -> tuple[TrainState, StepInfo, list]:
            state, info, bounds = step(state, batch)
            pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(bounds), strict=True)
            return state, info, [_bound_array(w, bound) for w, bound in pairs]

        return with_arrays

    def step(self, row: Row, setting: Setting, batch: PyTree, i: jax.Array) -> Row:
        """Returns the row after step `i`, from 0."""
        state, info, bounds = self._train_step(setting)(row.state, batch)
        memory, code = self._stop(row.memory, state, info, i + 1)
        loss = info.loss.astype(jnp.float32)
        return row._replace(
            # Not the new fraction on the bound: XLA need not count it, and a record does.
            state=state._replace(weight_clip_rate=row.state.weight_clip_rate),
            memory=memory,
            code=code,
            first_loss=jnp.where(jnp.isfinite(row.first_loss), row.first_loss, loss),
            loss_sum=row.loss_sum + loss,
            num_losses=row.num_losses + 1,
            bounds=bounds,
        )

    def _stop(
        self, memory: PyTree, state: TrainState, info: StepInfo, num_steps: jax.Array
    ) -> tuple[PyTree, jax.Array]:
        """Returns memory and code of the stop rule after `num_steps` steps."""
        own = {name: getattr(info, name) for name in STEP_METRICS}
        if info.learning_rate is not None:
            own["learning_rate"] = info.learning_rate
        numbers = Statistics(own | info.stats)
        is_due, metrics = self._evaluate(state, num_steps)
        known = Statistics(numbers | metrics)
        unknown = sorted(name for name in self._task.stop.metrics if name not in known)
        if unknown:
            raise ValueError(f"stop reads {unknown}, but the metrics are {sorted(known)}.")
        check_unambiguous(self._task.stop, numbers, metrics)
        progress = Progress(state.step, 0.0, info.num_skipped, numbers)
        stopped = self._task.stop.update(memory, progress)
        if not metrics:
            return stopped
        # The rule is updated once per step: on due steps with the metrics of `evaluate`.
        if_due = self._task.stop.update(memory, progress._replace(metrics=known))
        return jax.tree.map(functools.partial(jnp.where, is_due), if_due, stopped)

    def _evaluate(
        self, state: TrainState, num_steps: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns True if `evaluate` is due for the stop rule, and its metrics, else zeros."""
        evaluate, every = self._task.evaluate, self._task.evaluate_every
        if every is None:
            return jnp.zeros((), bool), {}
        weights = state.opt_state, state.params
        shapes = jax.eval_shape(evaluate, state.params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        is_due = num_steps % every == 0
        return is_due, lax.cond(
            is_due, lambda *x: evaluate(weights_to_ship(*x)), lambda *_: zeros, *weights
        )

    def record(self, row: Row, index: jax.Array) -> Row:
        """Returns the row with a record of the steps since the last at a place of its history."""
        is_whole = row.state.step % self.record_every == 0  # else another call completes it
        loss = row.loss_sum / jnp.maximum(row.num_losses, 1).astype(jnp.float32)
        rate = rate_on_bounds(row.state.params, row.bounds)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=index, axis=0)
        return row._replace(
            losses=put(row.losses, loss),
            weight_clip_rates=put(row.weight_clip_rates, rate),
            loss_sum=jnp.where(is_whole, jnp.zeros_like(row.loss_sum), row.loss_sum),
            num_losses=jnp.where(is_whole, jnp.zeros_like(row.num_losses), row.num_losses),
        )


def _bound_array(w: jax.Array, bound: ArrayLike) -> jax.Array:
    return jnp.asarray(bound_in(bound, w)) if is_clippable(w) else jnp.zeros(())
