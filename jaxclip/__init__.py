"""Clipping and sign steps for JAX: train by sign inside a weight box, ship at low bits."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from jaxclip._names import *
else:
    # `_names` is imported when the first name is used, not before: the command line imports
    # this package too, and its help should not wait for jax.

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return _public_names()
        if not name.startswith("_"):
            if importlib.util.find_spec(f"jaxclip.{name}"):
                return importlib.import_module(f"jaxclip.{name}")
            if name in _public_names():
                globals()[name] = getattr(importlib.import_module("jaxclip._names"), name)
                return globals()[name]
        raise AttributeError(f"module 'jaxclip' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_public_names()})

    def _public_names() -> list[str]:
        names = vars(importlib.import_module("jaxclip._names"))
        return [name for name in names if not name.startswith("_")]
