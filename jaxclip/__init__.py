"""Clipping and sign steps for JAX: train by sign inside a weight box, ship at low bits."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from jaxclip._names import *
else:
    # The public names, all in `_names`, are imported when the first one is used: the command
    # line imports this package too, and its help should not wait for jax.

    def __getattr__(name: str) -> Any:
        missing = AttributeError(f"module 'jaxclip' has no attribute {name!r}")
        if name.startswith("_") and name != "__all__":
            raise missing
        if importlib.util.find_spec(f"jaxclip.{name}"):
            return importlib.import_module(f"jaxclip.{name}")
        names = importlib.import_module("jaxclip._names")
        if not hasattr(names, name):
            raise missing
        globals()[name] = getattr(names, name)
        return globals()[name]

    def __dir__() -> list[str]:
        return [*globals(), *__getattr__("__all__")]
