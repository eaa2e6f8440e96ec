"""Checkpoints of a training run in a folder, written by orbax: everything a restart needs."""

import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxclip._core import extras
from jaxclip._core.trees import PyTree
from jaxclip.training.step import TrainState


class Run(NamedTuple):
    """State of a training run, complete for a restart.

    Attributes:
      state: The last state.
      memory: Memory of the stop rule.
      position: Batches used up.
      num_skipped_before: Skipped steps that the state had counted at the rule's `init`.
    """

    state: TrainState
    memory: PyTree
    position: int
    num_skipped_before: int


class RunStore:
    """Checkpoints of a run in a folder; each is written as a whole or not at all."""

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

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    def save(self, run: Run) -> None:
        """Writes a checkpoint of the run, at its step."""
        memory = jax.tree.leaves(_without_keys(run.memory))
        facts = {"position": run.position, "num_skipped_before": run.num_skipped_before}
        facts |= {"remembers": self._remembers, "memory": _shapes(memory)}
        tree = {"state": _without_keys(run.state), "memory": memory}
        args = self._orbax.args.Composite(
            run=self._orbax.args.StandardSave(tree), facts=self._orbax.args.JsonSave(facts)
        )
        self._manager.save(int(run.state.step), args=args)

    def restore(self, run: Run) -> Run:
        """Returns the run as it was last saved, or the given one if there is no checkpoint."""
        last = self._manager.latest_step()
        if last is None:
            return run
        args = self._orbax.args.Composite(facts=self._orbax.args.JsonRestore())
        facts = self._manager.restore(last, args=args)["facts"]
        # In the saved shapes: orbax must read the memory even if it is another rule's.
        memory = [jnp.zeros(shape, dtype) for shape, dtype in facts["memory"]]
        like = {"state": _without_keys(run.state), "memory": memory}
        args = self._orbax.args.Composite(run=self._orbax.args.StandardRestore(like))
        saved = self._manager.restore(last, args=args)["run"]
        state = jax.tree.map(_with_key, run.state, saved["state"])
        leaves, structure = jax.tree.flatten(run.memory)
        has_same_shapes = facts["memory"] == _shapes(_without_keys(leaves))
        if not (has_same_shapes and facts["remembers"] == self._remembers):
            return Run(state, run.memory, facts["position"], int(state.num_skipped))
        memory = structure.unflatten(map(_with_key, leaves, saved["memory"]))
        return Run(state, memory, facts["position"], facts["num_skipped_before"])


def _shapes(leaves: list[jax.Array]) -> list[list]:
    """Returns shapes and dtypes, as JSON gives them back."""
    return [[list(jnp.shape(x)), str(jnp.result_type(x))] for x in leaves]


def _is_key(x: object) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """Returns the tree with the data of PRNG keys, which orbax does not store, in their place."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _with_key(like: PyTree, saved: PyTree) -> PyTree:
    """Returns a saved leaf, made a PRNG key again if `like` is one."""
    if _is_key(like):
        return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(like))
    return saved
