"""Chunks of a sweep: some settings with all their seeds, trained, compressed and kept in files."""

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core.atomic import locked, replacing
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.threads import in_threads, num_cores
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints import store
from jaxclip.checkpoints.compressing import OutOfReachError
from jaxclip.checkpoints.compressing import compress as compress_to
from jaxclip.checkpoints.reading import checkpoint_errors
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.coding.entropy_coding import Coding, check_coding
from jaxclip.lowbit.rounding.moments import Calibration
from jaxclip.lowbit.trees import decompress
from jaxclip.sweeps.compiled import fingerprint, remembered
from jaxclip.sweeps.programs import Program
from jaxclip.sweeps.tasks import Setting, Task, initial_params, outline_of_params


class Compressor:
    """Parameters of rows, compressed to every width and budget, decompressed and evaluated."""

    def __init__(
        self,
        evaluate: Callable[[optax.Params], dict[str, ArrayLike]],
        compress: Callable[[optax.Params, Bits | Grid], PyTree],
        coding: Coding | None,
        bits: Sequence[Bits | Grid | None],
        budgets: Sequence[int] = (),
        calibration: Callable[[optax.Params], Calibration] | None = None,
    ):
        if not (bits or budgets):
            raise ValueError(
                "bits must name a width, or None for weights as they were trained, if there are "
                "no budgets."
            )
        check_coding(coding)
        self._coding: Coding | None = coding
        self._evaluate = evaluate
        self._budgets, self._calibration = budgets, calibration
        self._num_widths = len(bits)

        def at_width(width: Bits | Grid | None) -> Callable:
            def round_trip(params: optax.Params) -> tuple[PyTree, dict[str, ArrayLike]]:
                small = params if width is None else compress(params, width)
                return small, evaluate(decompress(small))

            return jax.jit(round_trip)

        # The last one is for parameters that were compressed by themselves.
        self._at_widths: list[Any] = [at_width(width) for width in (*bits, None)]
        self._are_remembered = False
        self._sizes: dict[int, int] = {}

    def fingerprint(self, task: Task) -> str:
        """Returns a digest of compression and evaluation, equal in all processes."""
        shapes = outline_of_params(task)
        programs = fingerprint(*(round_trip.trace(shapes) for round_trip in self._at_widths))
        if self._calibration is None:
            return programs
        # It is called, not traced: what it returns for some weights stands for it.
        digest = hashlib.sha256(programs.encode())
        found = self._calibration(initial_params(task, jax.random.key(0)))
        for x in jax.tree.leaves(found.to_tree()):
            digest.update(np.asarray(x).tobytes())
        return digest.hexdigest()

    def __call__(
        self, rows: Sequence[PyTree], is_bad: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns metrics by name, and bytes: float64 of shape (rows, widths and budgets).

        Rows that are bad have no file within a budget: NaN.
        """
        measure = functools.partial(self._measure, range(self._num_widths))
        return self._of_all(measure, list(zip(rows, is_bad.tolist(), strict=True)))

    def at_last_width(self, rows: Sequence[PyTree]) -> dict[str, np.ndarray]:
        """Returns metrics by name, of shape (rows, 1); without widths as the rows were trained."""
        measure = functools.partial(self._measure, [max(self._num_widths - 1, 0)])
        return self._of_all(measure, [(row, None) for row in rows])[0]

    def _of_all(
        self, measure: Callable, rows: Sequence[tuple[PyTree, bool | None]]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        if not self._are_remembered:
            params = rows[0][0]
            self._at_widths = [remembered(f.trace(params), lambda f=f: f) for f in self._at_widths]
            self._are_remembered = True
        found = in_threads(measure, rows, min(num_cores(), len(rows)))
        metrics = {k: np.stack([metrics[k] for metrics, _ in found]) for k in found[0][0]}
        return metrics, np.stack([num_bytes for _, num_bytes in found])

    def _measure(
        self, widths: Sequence[int], row: tuple[PyTree, bool | None], is_over: threading.Event
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns metrics by name, and bytes, of one row: float64 of shape (files,)."""
        params, is_bad = row
        metrics, num_bytes = [], []
        for width in widths:
            if is_over.is_set():  # another row ended with an error
                return {}, np.empty(0)
            small, found = self._at_widths[width](params)
            metrics.append({k: np.float64(x) for k, x in found.items()})
            num_bytes.append(self._num_bytes(width, small))
        if is_bad is not None and self._budgets:
            nothing = dict.fromkeys(jax.eval_shape(self._evaluate, params), np.float64(np.nan))
            for found, size in self._within_budgets(params, is_bad, is_over):
                metrics.append(found or nothing)
                num_bytes.append(size)
        if is_over.is_set():
            return {}, np.empty(0)
        stacked = {k: np.asarray([m[k] for m in metrics]) for k in metrics[0]}
        return stacked, np.asarray(num_bytes, np.float64)

    def _within_budgets(
        self, params: PyTree, is_bad: bool, is_over: threading.Event
    ) -> Iterator[tuple[dict[str, np.float64], float]]:
        """Yields metrics and bytes for each budget; no metrics and the least if out of reach."""
        measured = None if is_bad or self._calibration is None else self._calibration(params)
        for budget in self._budgets:
            if is_bad or is_over.is_set():
                yield {}, np.nan
                continue
            try:
                small = compress_to(params, target_bytes=budget, calibration=measured)
            except OutOfReachError as error:
                yield {}, error.least
                continue
            _, found = self._at_widths[-1](decompress(small))
            yield (
                {k: np.float64(x) for k, x in found.items()},
                size_report(small, "lanes").total_bytes,
            )

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
        settings: Setting,
        seeds: Sequence[int],
        compressor: Compressor,
        *,
        chunk_size: int | None = None,
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
        num_settings = len(settings.step_size)
        num_per_device = -(-min(chunk_size or num_settings, num_settings) // len(devices))
        while True:
            num_rounded = num_per_device * len(devices)
            program = Program(task, settings, num_rounded, seeds, devices, loop, record_every)
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
        if schedule is not None and num_rounded < num_settings:
            raise ValueError(
                f"schedule compares all {num_settings} settings, but chunk_size or memory_budget "
                f"makes chunks of {num_rounded}."
            )
        self.program = program

    def chunk(self, settings: Setting, keep_params: bool = False) -> dict[str, np.ndarray]:
        """Trains settings and returns their arrays, settings leading."""
        num_settings = len(settings.step_size)
        halving = Halving(self._task, self._compressor, num_settings) if self._schedule else None
        rungs = halving_rungs(self.program.recorded_at) if halving else ()
        trained = self.program.run(settings, rungs, halving)
        shape = trained.code.shape
        arrays = {f"history/{k}": x.astype(np.float64) for k, x in trained.history.items()}
        usual = trained.first_loss, trained.zero_loss
        arrays["is_diverged"] = _is_diverged(trained.history["loss"], *usual)
        metrics, file_bytes = self._compressor(trained.params, arrays["is_diverged"].ravel())
        rows = {f"metrics/{name}": x for name, x in metrics.items()} | {"file_bytes": file_bytes}
        if keep_params:
            leaves = zip(*map(jax.tree.leaves, trained.params), strict=True)
            rows |= {f"params/{i:06}": np.stack(row) for i, row in enumerate(leaves)}
        arrays |= {name: x.reshape(*shape, *x.shape[1:]) for name, x in rows.items()}
        for name in ("loss", "weight_clip_rate"):
            arrays[name] = arrays[f"history/{name}"][..., -1]
        arrays["steps"], arrays["reason_codes"] = trained.steps, trained.code
        arrays["seconds_per_step"] = np.full(num_settings, trained.seconds_per_step)
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
        metrics = self._compressor.at_last_width(rows)
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
