"""Signals taken as a flag, so that work ends between two of its parts.

An exception that a handler raises may surface inside XLA, where it crashes the process or is lost.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_NUMBERS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
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


def set_handlers(handler: Callable[[int, Any], object]) -> dict[int, Any]:
    """Sets the handler of the signals that end a process; returns the ones it replaces."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # What was ignored stays ignored: nohup and shells ask for that. None is not Python's handler.
    old: dict[int, Any] = {n: signal.getsignal(n) for n in _NUMBERS}
    old = {n: h for n, h in old.items() if h not in (signal.SIG_IGN, None)}
    for number in old:
        signal.signal(number, handler)
    return old


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
