"""Checkpoints of a training run in a folder, written by orbax: everything a restart needs."""

import os
import pathlib
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclip._core import extras
from jaxclip._core.trees import PyTree, path_name
from jaxclip.training.step import TrainState


class Best(NamedTuple):
    """The parameters with the best value of a metric so far.

    Attributes:
      step: The step after which they were evaluated.
      value: Their value of the metric.
      params: The parameters.
    """

    step: int
    value: float
    params: optax.Params


class BestRule(NamedTuple):
    """The metric by which parameters are best, and "max" or "min", its better direction."""

    metric: str
    mode: str

    def is_better(self, value: float, best: Best | None) -> bool:
        """Returns True for a value better than the best so far; NaN never is."""
        if best is None:
            return value == value
        return value > best.value if self.mode == "max" else value < best.value


class Run(NamedTuple):
    """State of a training run, complete for a restart.

    Attributes:
      state: The last state.
      memory: Memory of the stop rule.
      position: Batches used up.
      num_skipped_before: Skipped steps that the state had counted at the rule's `init`.
      best: The best parameters so far, if they are kept.
    """

    state: TrainState
    memory: PyTree
    position: int
    num_skipped_before: int
    best: Best | None = None


class RunStore:
    """Checkpoints of a run in a folder; each is written as a whole or not at all."""

    def __init__(
        self,
        directory: str | os.PathLike,
        remembers: tuple[str, ...] = (),
        best_rule: BestRule | None = None,
    ):
        self._remembers, self._best_rule = list(remembers), best_rule
        self._orbax = extras.import_extra("orbax.checkpoint", "checkpoints")
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        self._path = _folder(directory)
        self._manager = self._orbax.CheckpointManager(self._path, options=options)
        self._saved_position: int | None = None

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    # --- Writing ----------------------------------------------------------------------

    def save(self, run: Run) -> None:
        """Writes a checkpoint of the run at its step, unless that was the last thing done."""
        if run.position == self._saved_position:
            return
        memory = jax.tree.leaves(_without_keys(run.memory))
        facts = {"position": run.position, "num_skipped_before": run.num_skipped_before}
        facts |= {"remembers": self._remembers, "memory": _shapes(memory)}
        facts |= {"state": _description(run.state)}
        tree = {"state": _without_keys(run.state), "memory": memory}
        if run.best is not None and self._best_rule is not None:
            best = {"step": run.best.step, "value": run.best.value}
            facts |= {"best": best | self._best_rule._asdict()}
            tree["best"] = _without_keys(run.best.params)
        args = self._orbax.args.Composite(
            run=self._orbax.args.StandardSave(tree), facts=self._orbax.args.JsonSave(facts)
        )
        self._manager.save(int(run.state.step), args=args)
        self._saved_position = run.position

    def rescue(self, run: Run, error: BaseException) -> None:
        """Saves a run that an error ends, and adds a note to the error."""
        arrays = [x for x in jax.tree.leaves(run.state) if isinstance(x, jax.Array)]
        if run.position == self._saved_position or any(x.is_deleted() for x in arrays):
            return  # nothing new, or the step that failed has taken the arrays
        try:
            self.save(run)
        except Exception as second:  # the first error is the one to show
            error.add_note(f"The run could not be saved in {str(self._path)!r}: {second}")
        else:
            error.add_note(f"The run is saved in {str(self._path)!r}, after step {run.state.step}.")

    # --- Reading ----------------------------------------------------------------------

    def restore(self, run: Run) -> Run:
        """Returns the run as it was last saved, or the given one if there is no checkpoint.

        Raises:
          ValueError: If a checkpoint is of another training state, or none can be read.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                facts = self._facts(step)
                difference = _difference(facts.get("state"), _description(run.state))
                found = self._read(step, facts, run) if difference is None else None
            except (MemoryError, PermissionError):
                raise
            except Exception as error:  # orbax raises many kinds for a damaged file
                damaged[step] = error
                continue
            if found is None:
                raise ValueError(
                    f"checkpoint_dir {str(self._path)!r} has a checkpoint of another training "
                    f"state at step {step}: {difference}. Use another folder, or the same model "
                    "and optimizer."
                )
            self._put_aside(damaged, step)
            self._saved_position = found.position
            return found
        if damaged:
            step, error = next(iter(damaged.items()))
            raise ValueError(
                f"checkpoint_dir {str(self._path)!r} has no checkpoint of `fit` that can be read: "
                f"that of step {step} is damaged or foreign ({_first_line(error)}). Use another "
                "folder."
            ) from error
        self._saved_position = run.position
        return run

    def _facts(self, step: int) -> dict[str, Any]:
        args = self._orbax.args.Composite(facts=self._orbax.args.JsonRestore())
        return self._manager.restore(step, args=args)["facts"]

    def _read(self, step: int, facts: dict[str, Any], run: Run) -> Run:
        # In the saved shapes: orbax must read the memory even if it is another rule's.
        memory = [jnp.zeros(shape, dtype) for shape, dtype in facts["memory"]]
        like = {"state": _without_keys(run.state), "memory": memory}
        best_facts = facts.get("best")
        if best_facts is not None:
            like["best"] = _without_keys(run.state.params)
        args = self._orbax.args.Composite(run=self._orbax.args.StandardRestore(like))
        saved = self._manager.restore(step, args=args)["run"]
        state, best = jax.tree.map(_with_key, run.state, saved["state"]), None
        if best_facts is not None and self._best_rule == tuple(
            best_facts[name] for name in BestRule._fields
        ):
            params = jax.tree.map(_with_key, run.state.params, saved["best"])
            best = Best(best_facts["step"], best_facts["value"], params)
        leaves, structure = jax.tree.flatten(run.memory)
        has_same_shapes = facts["memory"] == _shapes(_without_keys(leaves))
        if not (has_same_shapes and facts["remembers"] == self._remembers):
            return Run(state, run.memory, facts["position"], int(state.num_skipped), best)
        memory = structure.unflatten(map(_with_key, leaves, saved["memory"]))
        return Run(state, memory, facts["position"], facts["num_skipped_before"], best)

    def _put_aside(self, damaged: dict[int, Exception], good: int) -> None:
        """Renames damaged checkpoints, which orbax would otherwise count as the newest."""
        for step, error in damaged.items():
            names = (f"damaged-{step}{f'-{i}' if i else ''}" for i in range(1000))
            new = next(self._path / name for name in names if not (self._path / name).exists())
            if jax.process_index() == 0:
                (self._path / str(step)).rename(new)
            warnings.warn(
                f"the checkpoint of step {step} in {str(self._path)!r} cannot be read "
                f"({_first_line(error)}): it is now {new.name!r}, and the run goes on from step "
                f"{good}.",
                RuntimeWarning,
                stacklevel=2,
            )
        if damaged:
            self._manager.reload()


def _folder(directory: str | os.PathLike) -> Any:
    """Returns the path of a folder that can be written to; of any kind that orbax takes."""
    text = os.fspath(directory)
    if "://" in text:
        epath = extras.import_extra("etils.epath", "checkpoints")
        try:
            path = epath.Path(text)
            path.mkdir(parents=True, exist_ok=True)
        except Exception as error:  # each kind of storage raises its own
            raise ValueError(f"checkpoint_dir {text!r} cannot be opened: {error}") from error
        return path
    path = pathlib.Path(directory).absolute()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"checkpoint_dir must be a folder, but {str(path)!r} is a file.")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"checkpoint_dir {str(path)!r} cannot be written to.")
    return path


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _description(state: TrainState) -> list[list]:
    """Returns path, shape and dtype of each leaf, as JSON gives them back."""
    named = jax.tree_util.tree_leaves_with_path(_without_keys(state))
    return [[path_name(path), *_shapes([x])[0]] for path, x in named]


def _difference(saved: list[list] | None, expected: list[list]) -> str | None:
    """Returns the first difference of two descriptions as words, or None."""
    if saved is None or saved == expected:
        return None
    there, here = ({path: (dtype, shape) for path, shape, dtype in x} for x in (saved, expected))
    for path in [*here, *there]:
        if path not in there:
            return f"it lacks {path!r}"
        if path not in here:
            return f"it has {path!r}, which the state lacks"
        if there[path] != here[path]:
            found, wanted = (f"{dtype} {shape}" for dtype, shape in (there[path], here[path]))
            return f"{path!r} is {found} in it, but {wanted} in the state"
    return "its leaves are in another order"


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
