"""Signals that end a training loop between two steps."""

import signal
import threading
from collections.abc import Iterable
from typing import Any

# These two cannot be handled; Windows has neither.
_NEVER = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")}


def check_signals(name: str, numbers: Iterable[int]) -> tuple[signal.Signals, ...]:
    """Returns the signals; raises ValueError for one that does not exist or cannot be handled."""
    found = []
    for number in numbers:
        try:
            chosen = signal.Signals(number)
        except ValueError as error:
            raise ValueError(f"{name} has {number!r}, which is no signal here.") from error
        if chosen in _NEVER:
            raise ValueError(f"{name} has {chosen.name}, which no program can handle.")
        found.append(chosen)
    return tuple(found)


class Signals:
    """Context that records signals; after the first they all have their usual effect again."""

    def __init__(self, numbers: Iterable[signal.Signals]):
        self.has_come = False
        self._numbers = tuple(numbers)
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                self._old_handlers[number] = signal.signal(number, self._record)
        return self

    def _record(self, number: int, frame: object) -> None:
        self.has_come = True
        self._restore()

    def _restore(self) -> None:
        while self._old_handlers:
            number, handler = self._old_handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(self, *error: object) -> None:
        self._restore()
