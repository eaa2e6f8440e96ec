"""Runs the command line: `python -m jaxclip` is `jaxclip`."""

import os
import signal
import sys


def run() -> None:
    """Runs the command of the process, which a signal ends without a traceback at any time."""
    # Before anything else is imported, because Python's own handler shows a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from jaxclip._core import signals

    signals.set_handlers(_end)  # until the work begins, and after it
    from jaxclip.cli import main

    status = main()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)  # because Python drops handlers long before it has torn jax down


def _end(number: int, frame: object) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    run()
