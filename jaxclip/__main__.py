"""Runs the command line: `python -m jaxclip` is `jaxclip`."""

import sys

from jaxclip.cli import main

sys.exit(main())
