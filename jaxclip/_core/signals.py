"""Signals taken as a flag, so that a command or a training loop ends between two of its parts.

An exception that a handler raises may surface inside XLA, where it crashes the process or is lost.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_NUMBERS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
# These two cannot be handled; Windows has neither.
_NEVER = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")}
_received: int | None = None  # the first signal in `taken_as_flag`


class Stopped(KeyboardInterrupt):
    """A signal came, and the work has ended between two parts; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number


def check_stop() -> None:
    """Raises `Stopped` if a signal has come; does nothing outside of `taken_as_flag`."""
    if _received is not None:
        raise Stopped(_received)


def set_handlers(
    handler: Callable[[int, Any], object], numbers: Iterable[int] | None = None
) -> dict[int, Any]:
    """Sets the handler of signals, or of those that end a process; returns the ones it replaces."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    old: dict[int, Any] = {
        n: signal.getsignal(n) for n in (_NUMBERS if numbers is None else numbers)
    }
    if numbers is None:
        # What was ignored stays ignored: nohup and shells ask for that. None is not Python's.
        old = {n: h for n, h in old.items() if h not in (signal.SIG_IGN, None)}
    for number in old:
        signal.signal(number, handler)
    return old


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


class FirstSignal:
    """Context that records the first of some signals; after it they have their usual effect."""

    def __init__(self, numbers: Iterable[int]):
        self.has_come = False
        self._numbers = tuple(numbers)
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "FirstSignal":
        self._old_handlers = set_handlers(self._record, self._numbers)
        return self

    def _record(self, number: int, frame: object) -> None:
        self.has_come = True
        self.__exit__()

    def __exit__(self, *error: object) -> None:
        while self._old_handlers:
            number, handler = self._old_handlers.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def taken_as_flag(at_second: Callable[[int], None]) -> Iterator[None]:
    """Context in which a signal only makes `check_stop` raise; a second one calls `at_second`."""
    global _received
    old_handlers = set_handlers(_receive)
    try:
        with _watch_for_second(at_second) if old_handlers else contextlib.nullcontext():
            yield
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        received, _received = _received, None
        if received is not None:  # it may have come after the last part
            raise Stopped(received)


def _receive(number: int, frame: object) -> None:
    global _received
    _received = _received or number


@contextlib.contextmanager
def _watch_for_second(at_second: Callable[[int], None]) -> Iterator[None]:
    """Calls `at_second` in a thread; a handler would wait until XLA returns to Python."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def watch() -> None:
        num_signals = 0
        while number := os.read(read_end, 1):
            num_signals += number[0] in _NUMBERS
            if num_signals == 2:
                at_second(number[0])
        os.close(read_end)

    old_end = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_end)
        os.close(write_end)
