"""The command line: `jaxclip COMMAND ...`, or `python -m jaxclip COMMAND ...`."""

from jaxclip.cli.program import main as main
