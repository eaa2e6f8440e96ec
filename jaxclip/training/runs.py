"""A training run in a folder: all that a restart needs, by way of orbax."""

import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxclip._core import extras
from jaxclip.training.step import TrainState


class Run(NamedTuple):
    """All that a restart needs.

    Attributes:
      state: The last state.
      memory: What the stop rule remembers.
      position: Batches used up.
      num_skipped_before: Skipped steps that the state had counted when the rule remembered
        nothing yet.
    """

    state: TrainState
    memory: Any
    position: int
    num_skipped_before: int


class RunStore:
    """Checkpoints of a run in a folder; each is written as a whole or not at all.

    Args:
      directory: The folder.
      remembers: What the stop rule's memory is of.
    """

    def __init__(self, directory: str | os.PathLike, remembers: tuple[str, ...]):
        self._remembers = list(remembers)
        self._orbax = extras.import_extra("orbax.checkpoint", "checkpoints")
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        path = pathlib.Path(directory).absolute()
        self._manager = self._orbax.CheckpointManager(path, options=options)

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, *error: Any) -> None:
        self._manager.close()

    def save(self, run: Run) -> None:
        """Writes a checkpoint of the run, at its step.

        Args:
          run: The run.
        """
        memory = jax.tree.leaves(_without_keys(run.memory))
        facts = {"position": run.position, "num_skipped_before": run.num_skipped_before}
        facts |= {"remembers": self._remembers, "memory": _shapes(memory)}
        tree = {"state": _without_keys(run.state), "memory": memory}
        args = self._orbax.args.Composite(
            run=self._orbax.args.StandardSave(tree), facts=self._orbax.args.JsonSave(facts)
        )
        self._manager.save(int(run.state.step), args=args)

    def restore(self, run: Run) -> Run:
        """Returns the run as it was last saved; the one given, if there is none.

        Args:
          run: One of the same structure, with what the stop rule remembers at the start.
        """
        last = self._manager.latest_step()
        if last is None:
            return run
        args = self._orbax.args.Composite(facts=self._orbax.args.JsonRestore())
        facts = self._manager.restore(last, args=args)["facts"]
        # As it was saved, for another rule's memory must be read, too, and is then let go.
        memory = [jnp.zeros(shape, dtype) for shape, dtype in facts["memory"]]
        given = {"state": _without_keys(run.state), "memory": memory}
        args = self._orbax.args.Composite(run=self._orbax.args.StandardRestore(given))
        found = self._manager.restore(last, args=args)["run"]
        state = jax.tree.map(_as_key, run.state, found["state"])
        leaves, structure = jax.tree.flatten(run.memory)
        same_shapes = facts["memory"] == _shapes(_without_keys(leaves))
        if not (same_shapes and facts["remembers"] == self._remembers):
            return Run(state, run.memory, facts["position"], int(state.num_skipped))
        memory = structure.unflatten(map(_as_key, leaves, found["memory"]))
        return Run(state, memory, facts["position"], facts["num_skipped_before"])


def _shapes(leaves: list[Any]) -> list[Any]:
    """Shapes and dtypes, of what JSON has."""
    return [[list(jnp.shape(x)), str(jnp.result_type(x))] for x in leaves]


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _as_key(given: Any, found: Any) -> Any:
    if _is_key(given):
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(given))
    return found
