"""Chunks of a sweep: some settings with all their seeds, trained, shipped and kept in files."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip._core.atomic import replacing
from jaxclip._core.grids import Bits, code_range
from jaxclip.checkpoints import store
from jaxclip.checkpoints.reading import checkpoint_errors
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.entropy_coding import check_coding
from jaxclip.lowbit.trees import decompress
from jaxclip.sweeps.programs import Program, fingerprint
from jaxclip.sweeps.tasks import Task


class Trainer:
    """Trains settings and ships them at every width, all in one compiled program.

    Args:
      task: As `checked_task` returns it.
      num_settings: Settings of a chunk; it gets rounded up to a multiple of the number of
        devices, and smaller if the budget says so.
      seeds: Integers.
      shipper: What is done with the trained parameters.
      devices: As in `sweep`.
      loop: As in `sweep`.
      record_every: As in `sweep`.
      memory_budget: As in `sweep`.

    Raises:
      ValueError: If one setting is too much for the budget, or the stop rule looks at what
        nothing measures.
    """

    def __init__(
        self,
        task: Task,
        num_settings: int,
        seeds: Sequence[int],
        shipper: "Shipper",
        *,
        devices: Sequence[Any] | None = None,
        loop: str | None = None,
        record_every: int | None = None,
        memory_budget: int | None = None,
    ):
        devices = list(jax.local_devices() if devices is None else devices)
        record_every = record_every or -(-int(task.stop.num_steps or 0) // 50)
        self._shipper = shipper
        on_each = -(-num_settings // len(devices))
        while True:
            program = Program(task, on_each * len(devices), seeds, devices, loop, record_every)
            needed = program.bytes_needed()
            if memory_budget is None or needed is None or needed <= memory_budget:
                break
            if on_each == 1:
                raise ValueError(
                    f"memory_budget is {memory_budget:,}, but one setting with all its seeds "
                    f"takes {needed:,}."
                )
            on_each = max(min(on_each * memory_budget // needed, on_each - 1), 1)
        self.program = program

    def chunk(self, settings: np.ndarray, keep_params: bool = False) -> dict[str, np.ndarray]:
        """Returns the arrays of a result for a chunk, with a leading axis of its settings.

        Args:
          settings: Pairs (step size, threshold), no more than the program has room for.
          keep_params: Whether the parameters are among the arrays.
        """
        # A chunk with fewer is filled up, so that it runs in the same program.
        missing = self.program.num_settings - len(settings)
        filled = np.concatenate([settings, np.repeat(settings[-1:], missing, axis=0)])
        trained = self.program.run(filled[:, 0], filled[:, 1])
        trees = [
            jax.tree.map(lambda leaf, i=i: leaf[i], trained.params) for i in range(len(settings))
        ]
        shipped = [self._shipper(tree) for tree in trees]
        arrays = {
            f"metrics/{name}": np.stack([metrics[name] for metrics, _ in shipped])
            for name in shipped[0][0]
        }
        arrays["file_bytes"] = np.stack([file_bytes for _, file_bytes in shipped])
        arrays |= {f"history/{k}": x.astype(np.float64) for k, x in trained.history.items()}
        for name in ("loss", "weight_clip_rate"):
            arrays[name] = arrays[f"history/{name}"][..., -1]
        # The mean over the last steps is not finite if one of them was not.
        loss = arrays["loss"]
        arrays["is_diverged"] = ~(np.isfinite(loss) & (loss <= trained.first_loss))
        arrays["steps"], arrays["reason_codes"] = trained.steps, trained.code
        num_row_steps = max(int(trained.steps.max()), 1) * trained.steps.size
        arrays["seconds_per_step"] = np.full(len(filled), trained.seconds / num_row_steps)
        if keep_params:
            leaves = jax.tree.leaves(trained.params)
            arrays |= {f"params/{i:06}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        return {name: x[: len(settings)] for name, x in arrays.items()}


class Shipper:
    """Compresses, decompresses and evaluates parameters at every width.

    Args:
      evaluate: As in `sweep`.
      compress: As in `sweep`.
      coding: As in `sweep`.
      bits: As in `sweep`.

    Raises:
      ValueError: If `bits` is empty or has a width that is not allowed.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], dict[str, Any]],
        compress: Callable[[Any, Bits], Any],
        coding: str | None,
        bits: Sequence[Bits | None],
    ):
        if not bits:
            raise ValueError("bits must name a width, or None for weights as they were trained.")
        for width in bits:
            if width is not None:
                code_range(width)
        check_coding(coding)
        self._coding = coding

        def at_width(width: Bits | None) -> Callable[[Any], tuple[Any, Any]]:
            def shipped(params: Any) -> tuple[Any, Any]:
                small = params if width is None else compress(params, width)
                return small, evaluate(decompress(small))

            return jax.jit(jax.vmap(shipped))

        self._at_widths: list[Any] = [at_width(width) for width in bits]

    def fingerprint(self, params: Any) -> str:
        """Returns what is the same for the same compression and evaluation.

        Args:
          params: As in a call, or their shapes.
        """
        return fingerprint(*(shipped.trace(params) for shipped in self._at_widths))

    def __call__(self, params: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns metrics by name, and bytes: float64 of axes (seed, bits).

        Args:
          params: Parameters of one setting, with a leading axis of seeds.
        """
        metrics, sizes = [], []
        for shipped in self._at_widths:
            small, found = shipped(params)
            metrics.append({k: np.asarray(x).astype(np.float64) for k, x in found.items()})
            num_seeds = len(jax.tree.leaves(small)[0])
            trees = [jax.tree.map(lambda x, i=i: x[i], small) for i in range(num_seeds)]
            if self._coding is None:  # the shapes say it all
                sizes.append([size_report(trees[0]).total_bytes] * num_seeds)
            else:
                sizes.append([size_report(tree, self._coding).total_bytes for tree in trees])
        stacked = {k: np.stack([m[k] for m in metrics], axis=-1) for k in metrics[0]}
        return stacked, np.asarray(sizes, np.float64).T


class ChunkStore:
    """Finished chunks in a folder, each a file that is there as a whole or not at all.

    Args:
      directory: The folder; it is made if it is not there.
      identity: What says which sweep the chunks are of, of what JSON has.

    Raises:
      ValueError: If the folder has chunks of another sweep.
      CheckpointError: If its `sweep.json` is damaged.
    """

    def __init__(self, directory: str | os.PathLike, identity: dict[str, Any]):
        self._folder = Path(directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "sweep.json"
        if not file.exists():
            with replacing(file) as out:
                out.write(json.dumps(identity).encode())
        with checkpoint_errors(file):
            found = json.loads(file.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("it is not the description of a sweep.")
        identity = json.loads(json.dumps(identity))
        other = [name for name in identity if found.get(name) != identity[name]]
        if other:
            raise ValueError(
                f"directory '{self._folder}' has chunks of another sweep: {', '.join(other)} "
                "differ. Take an empty folder, or the same arguments, data and version of jax."
            )

    def _file(self, start: int) -> Path:
        return self._folder / f"settings-{start:06}.safetensors"

    def load(self, start: int) -> dict[str, np.ndarray] | None:
        """Returns the chunk that begins with a setting, or None if it is not there.

        Raises:
          CheckpointError: If its file is damaged.
        """
        file = self._file(start)
        return dict(store.load(file)) if file.exists() else None

    def save(self, start: int, chunk: dict[str, np.ndarray]) -> None:
        """Writes the chunk that begins with a setting."""
        store.save(self._file(start), chunk)
