"""Progress bar of a training loop; rich is imported on use."""

import time
from typing import Any

from jaxclip._core.extras import rich_progress


class ProgressBar:
    """Progress bar that shows nothing; the interface of those that do."""

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, num_steps: int, metrics: dict[str, float]) -> None:
        pass


class _RichBar(ProgressBar):
    """Progress bar with the speed and a few metrics."""

    def __init__(self, rich_progress: Any, total: int | None):
        columns = ("{task.completed:,.0f} steps", "{task.fields[speed]}", "{task.fields[text]}")
        self._progress = rich_progress.Progress(
            rich_progress.BarColumn(),
            rich_progress.TimeRemainingColumn(),
            *(rich_progress.TextColumn(c) for c in columns),
        )
        self._task = self._progress.add_task("", total=total, speed="compiling", text="")
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> "_RichBar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, num_steps: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        # The first step does not count, because it includes compilation.
        self._first = self._first or (num_steps, now)
        elapsed, count = now - self._first[1], num_steps - self._first[0]
        speed = f"{count / elapsed:,.1f} steps/s" if count and elapsed > 0 else ""
        names = [n for n in ("loss", "clip_rate", "weight_clip_rate") if n in metrics]
        text = "  ".join(f"{n} {metrics[n]:.4g}" for n in names)
        self._progress.update(self._task, completed=num_steps, speed=speed, text=text)


def make_bar(is_wanted: bool, total: int | None) -> ProgressBar:
    """Returns a bar that is visible if there is a terminal or a notebook."""
    rich = rich_progress(is_wanted)
    return ProgressBar() if rich is None else _RichBar(rich, total)
