"""Optional packages: imported on use, and progress bars where rich is there."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """Imports an optional module, or raises ImportError naming the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here; install it with: pip install 'jaxclip[{extra}]'"
        ) from error


def rich_progress(is_wanted: bool) -> Any:
    """Returns the module `rich.progress`, or None if no bar can or should be shown.

    Args:
      is_wanted: Whether the user wants one.

    Example:
      >>> rich_progress(False) is None
      True
    """
    if not is_wanted:
        return None
    try:
        from rich import get_console, progress
    except ImportError:
        return None
    console = get_console()
    return progress if console.is_terminal or console.is_jupyter else None


@contextlib.contextmanager
def byte_bar(total: int, is_wanted: bool) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes are done, and how many come in a second.

    Args:
      total: Bytes in all.
      is_wanted: Whether the user wants a bar.

    Returns:
      A context that gives a function: call it with the bytes that were done since.

    Example:
      >>> with byte_bar(10, False) as advance:
      ...     advance(10)
    """
    rich = rich_progress(is_wanted)
    if rich is None:
        yield lambda _: None
        return
    columns = (rich.BarColumn(), rich.DownloadColumn(), rich.TransferSpeedColumn())
    with rich.Progress(*columns, rich.TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda num_bytes: bar.update(task, advance=num_bytes)
