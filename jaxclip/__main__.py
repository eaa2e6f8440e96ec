"""Runs the command line: `python -m jaxclip` is `jaxclip`."""

# Not `signal`, which first imports others for 10 milliseconds: until the handler is set, Python's
# own shows a traceback.
import _signal  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
import os
import sys


def run() -> None:
    """Runs the command of the process, which a signal ends without a traceback at any time."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _end)
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
