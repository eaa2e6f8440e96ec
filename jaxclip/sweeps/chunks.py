"""Chunks of a sweep: some settings with all their seeds, trained, compressed and kept in files."""

import contextlib
import functools
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core.atomic import locked, replacing
from jaxclip._core.grids import Bits, code_range
from jaxclip._core.threads import in_threads, num_cores
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints import store
from jaxclip.checkpoints.reading import checkpoint_errors
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.coding.entropy_coding import Coding, check_coding
from jaxclip.lowbit.trees import decompress
from jaxclip.sweeps.compiled import fingerprint, remembered
from jaxclip.sweeps.programs import Program
from jaxclip.sweeps.tasks import Task


class Compressor:
    """Parameters of rows, compressed to every width, decompressed and evaluated."""

    def __init__(
        self,
        evaluate: Callable[[optax.Params], dict[str, ArrayLike]],
        compress: Callable[[optax.Params, Bits], PyTree],
        coding: Coding | None,
        bits: Sequence[Bits | None],
    ):
        if not bits:
            raise ValueError("bits must name a width, or None for weights as they were trained.")
        for width in bits:
            if width is not None:
                code_range(width)
        check_coding(coding)
        self._coding: Coding | None = coding

        def at_width(width: Bits | None) -> Callable:
            def round_trip(params: optax.Params) -> tuple[PyTree, dict[str, ArrayLike]]:
                small = params if width is None else compress(params, width)
                return small, evaluate(decompress(small))

            return jax.jit(round_trip)

        self._at_widths: list[Any] = [at_width(width) for width in bits]
        self._are_remembered = False
        self._sizes: dict[int, int] = {}

    def fingerprint(self, params: PyTree) -> str:
        """Returns a digest of compression and evaluation, equal in all processes."""
        # Shapes suffice for `params`.
        return fingerprint(*(round_trip.trace(params) for round_trip in self._at_widths))

    def __call__(
        self, rows: Sequence[PyTree], widths: slice = slice(None)
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns metrics by name, and bytes: float64 of shape (rows, widths)."""
        if not self._are_remembered:
            self._at_widths = [remembered(f.trace(rows[0]), lambda f=f: f) for f in self._at_widths]
            self._are_remembered = True
        measure = functools.partial(self._measure, range(len(self._at_widths))[widths])
        found = in_threads(measure, rows, min(num_cores(), len(rows)))
        metrics = {k: np.stack([metrics[k] for metrics, _ in found]) for k in found[0][0]}
        return metrics, np.stack([num_bytes for _, num_bytes in found])

    def _measure(
        self, widths: Sequence[int], params: PyTree, is_over: threading.Event
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns metrics by name, and bytes, of one row: float64 of shape (widths,)."""
        metrics, num_bytes = [], []
        for width in widths:
            if is_over.is_set():  # another row ended with an error
                return {}, np.empty(0)
            small, found = self._at_widths[width](params)
            metrics.append({k: np.float64(x) for k, x in found.items()})
            num_bytes.append(self._num_bytes(width, small))
        stacked = {k: np.asarray([m[k] for m in metrics]) for k in metrics[0]}
        return stacked, np.asarray(num_bytes, np.float64)

    def _num_bytes(self, width: int, small: PyTree) -> int:
        if self._coding is not None:
            return size_report(small, self._coding).total_bytes
        # Without a coding the size follows from the shapes, which all rows have.
        if width not in self._sizes:
            self._sizes[width] = size_report(small).total_bytes
        return self._sizes[width]


class Trainer:
    """A compiled program that trains chunks of settings, and the compressor of its results."""

    def __init__(
        self,
        task: Task,
        num_settings: int,
        seeds: Sequence[int],
        compressor: Compressor,
        *,
        devices: Sequence[Any] | None = None,
        loop: str | None = None,
        record_every: int | None = None,
        memory_budget: int | None = None,
        schedule: str | None = None,
    ):
        self._task, self._schedule = task, schedule
        devices = list(jax.local_devices() if devices is None else devices)
        record_every = record_every or -(-int(task.stop.num_steps or 0) // 50)
        self._compressor = compressor
        num_per_device = -(-num_settings // len(devices))
        while True:
            num_rounded = num_per_device * len(devices)
            program = Program(task, num_rounded, seeds, devices, loop, record_every)
            needed = program.bytes_needed()
            if memory_budget is None or needed is None or needed <= memory_budget:
                break
            if num_per_device == 1:
                raise ValueError(
                    f"memory_budget is {memory_budget:,}, but one setting with all its seeds "
                    f"takes {needed:,}."
                )
            num_that_fit = num_per_device * memory_budget // needed
            num_per_device = max(min(num_that_fit, num_per_device - 1), 1)
        self.program = program

    def chunk(self, settings: np.ndarray, keep_params: bool = False) -> dict[str, np.ndarray]:
        """Trains pairs (step size, threshold) and returns their arrays, settings leading."""
        halving = Halving(self._task, self._compressor, len(settings)) if self._schedule else None
        rungs = halving_rungs(self.program.recorded_at) if halving else ()
        trained = self.program.run(settings[:, 0], settings[:, 1], rungs, halving)
        shape = trained.code.shape
        metrics, file_bytes = self._compressor(trained.params)
        arrays = {f"metrics/{name}": x for name, x in metrics.items()} | {"file_bytes": file_bytes}
        if keep_params:
            leaves = zip(*map(jax.tree.leaves, trained.params), strict=True)
            arrays |= {f"params/{i:06}": np.stack(rows) for i, rows in enumerate(leaves)}
        arrays = {name: x.reshape(*shape, *x.shape[1:]) for name, x in arrays.items()}
        arrays |= {f"history/{k}": x.astype(np.float64) for k, x in trained.history.items()}
        for name in ("loss", "weight_clip_rate"):
            arrays[name] = arrays[f"history/{name}"][..., -1]
        usual = trained.first_loss, trained.zero_loss
        arrays["is_diverged"] = _is_diverged(trained.history["loss"], *usual)
        arrays["steps"], arrays["reason_codes"] = trained.steps, trained.code
        arrays["seconds_per_step"] = np.full(len(settings), trained.seconds_per_step)
        return arrays


def halving_rungs(recorded_at: Sequence[int]) -> list[int]:
    """Returns after how many records, a ninth and a third of the steps, settings are compared."""
    rungs = {int(np.searchsorted(recorded_at, recorded_at[-1] / part)) + 1 for part in (9, 3)}
    return sorted(rungs - {len(recorded_at)})


class Halving:
    """Chooses the third of the settings that goes on, by their metric at the last width."""

    def __init__(self, task: Task, compressor: Compressor, num_settings: int):
        self._task, self._compressor = task, compressor
        self._is_on = np.ones(num_settings, bool)

    def __call__(self, params: Sequence[PyTree]) -> np.ndarray:
        """Returns True for the settings that go on; the seeds of a setting are neighbors."""
        seeds = np.arange(len(params)).reshape(len(self._is_on), -1)
        on = np.flatnonzero(self._is_on)
        rows = [params[int(i)] for i in seeds[on].ravel()]
        metrics, _ = self._compressor(rows, slice(-1, None))
        cost = metrics[self._task.metric].reshape(len(on), -1).mean(axis=1)
        cost = -cost if self._task.mode == "max" else cost
        best = np.argsort(cost, kind="stable")[: -(-len(on) // 3)]
        self._is_on = np.isin(np.arange(len(self._is_on)), on[best])
        return self._is_on


def _is_diverged(losses: np.ndarray, *usual_losses: np.ndarray) -> np.ndarray:
    """Returns True if the last loss is not finite, or ten times the smallest and all usual ones."""
    # Not simply above the first: no setting keeps the loss of good weights while it takes steps.
    # The mean over the last steps is not finite if one of them was not.
    last, is_finite = losses[..., -1], np.isfinite(losses)
    reference = np.where(is_finite, losses, np.inf).min(axis=-1)
    for loss in usual_losses:
        reference = np.maximum(reference, np.where(np.isfinite(loss), loss, -np.inf))
    return ~np.isfinite(last) | (last > reference + 9 * np.abs(reference))


class ChunkStore:
    """Finished chunks in a folder; a file appears whole or not at all."""

    def __init__(self, directory: str | os.PathLike, identity: dict[str, Any]):
        self._folder = Path(directory)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "sweep.json"
        if not file.exists():
            # Another process that runs the same sweep may write it first.
            with contextlib.suppress(FileExistsError), replacing(file) as out:
                out.write(json.dumps(identity).encode())
        with checkpoint_errors(file):
            found = json.loads(file.read_bytes())
            if not isinstance(found, dict):
                raise ValueError("it is not the description of a sweep.")
        identity = json.loads(json.dumps(identity))
        different = [name for name in identity if found.get(name) != identity[name]]
        if different:
            raise ValueError(
                f"directory {str(self._folder)!r} has chunks of another sweep: "
                f"{', '.join(different)} differ. "
                "Use an empty folder, or the same arguments, data and version of jax."
            )

    def _file(self, start: int) -> Path:
        return self._folder / f"settings-{start:06}.safetensors"

    def load(self, start: int) -> dict[str, np.ndarray] | None:
        """Returns the chunk that begins with setting `start`, or None if it is not there."""
        file = self._file(start)
        return dict(store.load(file)) if file.exists() else None

    def claimed(self, start: int, wait: bool) -> contextlib.AbstractContextManager[bool]:
        """Keeps other processes from training a chunk; yields False if one of them does."""
        return locked(self._folder / f"chunk-{start:06}.lock", wait)

    def save(self, start: int, chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Writes the chunk that begins with setting `start`; returns the one that is stored."""
        # Where there are no locks, a second process that runs the same sweep may have stored the
        # chunk while this one was training it. Both then report the same one.
        try:
            store.save(self._file(start), chunk)
        except FileExistsError:
            stored = self.load(start)
            if stored is None:
                raise
            return stored
        return chunk
