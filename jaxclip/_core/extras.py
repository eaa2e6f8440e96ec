"""Optional packages, imported on use, and progress bars where rich is installed."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """Imports an optional module; the ImportError names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here; install it with: pip install 'jaxclip[{extra}]'"
        ) from error


def rich_progress(is_wanted: bool) -> Any:
    """Returns the module `rich.progress`, or None where no bar is wanted or can be shown."""
    if not is_wanted:
        return None
    try:
        from rich import get_console, progress
    except ImportError:
        return None
    console = get_console()
    return progress if console.is_terminal or console.is_jupyter else None


@contextlib.contextmanager
def progress_bar(
    total: int | None, is_wanted: bool, *, is_in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the context lasts; yields a function that advances it by an amount."""
    rich = rich_progress(is_wanted)
    if rich is None:
        yield lambda _: None
        return
    counts = [rich.MofNCompleteColumn()]
    if is_in_bytes:
        counts = [rich.DownloadColumn(), rich.TransferSpeedColumn()]
    with rich.Progress(rich.BarColumn(), *counts, rich.TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda amount: bar.update(task, advance=amount)
