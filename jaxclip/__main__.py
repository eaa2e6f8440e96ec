"""`python -m jaxclip` is the command `jaxclip`."""

import sys

from jaxclip.cli import main

sys.exit(main())
