"""The program: runs a command, shows its result or its error, and takes signals."""

import importlib
import json
import os
import pathlib
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from jaxclip._core import atomic, signals
from jaxclip._core.text import encodable, escaped
from jaxclip.cli.arguments import in_flags, is_about_an_argument, make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: Arguments of the command line without the program's name; None for those of the
        process.

    Returns:
      The exit status: 0, 1 after an error (a message on standard error), 130 after an interrupt,
      143 after SIGTERM, 129 after SIGHUP.

    Raises:
      SystemExit: With 2 if the command line is wrong, with 0 after `--help` and the like.

    Example:
      >>> main(["verify", "net.safetensors"])
      1
    """
    try:
        parsed = make_parser().parse_args(arguments)
    except SystemExit:  # it has printed the help, or an error
        _show("")
        raise
    try:
        # First the imports, which take long and which a signal may cut short.
        importlib.import_module("jaxclip.interop")
        if not parsed.no_cache:
            _keep_compiled_programs()
        with signals.taken_as_flag(at_second=_abandon):
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                result = parsed.run(parsed)
            signals.check_stop()
        is_json = parsed.json or isinstance(result, dict)
        return _show(f"{_json_text(result) if is_json else result}\n")
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        _tell(_ended_by(number))
        return 128 + number
    except (OSError, ValueError, TypeError, ImportError) as error:
        message = escaped(in_flags(str(error)))
        if is_about_an_argument(error):
            parsed.parser.error(message)
        _tell(f"jaxclip: error: {message}")
        return 1


def _keep_compiled_programs() -> None:
    """Has jax keep compiled programs in the user's cache folder, unless it keeps them already."""
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore
        return
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxclip"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # such as a home that cannot be written to
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _json_text(result: Any) -> str:
    from jaxclip._core.reports import to_json

    return json.dumps(to_json(result), indent=2)


def _show(text: str) -> int:
    """Prints a result; returns the exit status."""
    if sys.stdout is None:  # it was closed when the process began
        return 0
    try:
        sys.stdout.write(encodable(text, sys.stdout.encoding))
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer must not be tried again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has closed it, as `head` does
            return 1
        raise
    return 0


def _show_warning(
    message: Warning | str, category: type[Warning], *_: object, **__: object
) -> None:
    _tell(f"jaxclip: {category.__name__}: {escaped(in_flags(str(message)))}")


def _tell(message: str) -> None:
    if sys.stderr is not None:
        print(message, file=sys.stderr)


def _ended_by(number: int) -> str:
    is_interrupt = number == signal.SIGINT
    end = "interrupted" if is_interrupt else f"ended by {signal.Signals(number).name}"
    return f"jaxclip: {end}; nothing was left half-written"


def _abandon(number: int) -> None:
    """Ends the process at once, at a second signal."""
    atomic.remove_unfinished()
    os.write(2, _ended_by(number).encode() + b"\n")
    os._exit(128 + number)
