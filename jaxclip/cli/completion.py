"""Completion in shells, by scripts that the package shtab writes."""

import argparse
from typing import Any

from jaxclip._core.extras import import_extra

_SHELLS = ("bash", "zsh", "fish")
# How each shell completes the name of a file; shtab tells when a script is asked for.
_FILE_COMPLETION: dict[str, str] = {}


class PrintCompletion(argparse.Action):
    """Option that prints the script for a shell, and ends the program."""

    def __init__(self, option_strings: Any, dest: str, **settings: Any):
        super().__init__(option_strings, dest, metavar="SHELL", choices=_SHELLS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, *__: Any) -> None:
        try:
            shtab = import_extra("shtab", "completion")
        except ImportError as error:
            parser.error(str(error))
        if values not in shtab.SUPPORTED_SHELLS:
            parser.error(f"{values} needs a newer version of shtab, got {shtab.__version__}")
        _FILE_COMPLETION.update(shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def complete_files(action: argparse.Action) -> None:
    """Makes the scripts complete an argument by the names of files."""
    setattr(action, "complete", _FILE_COMPLETION)  # noqa: B010
