"""Clipping and sign steps for JAX: training in a weight box, and weights of few bits."""

TYPE_CHECKING = False  # that of `typing`, without its import: a command starts with this file

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from jaxclip import calibration as calibration
    from jaxclip import checkpoints as checkpoints
    from jaxclip import gradients as gradients
    from jaxclip import interop as interop
    from jaxclip import lowbit as lowbit
    from jaxclip import norms as norms
    from jaxclip import plots as plots
    from jaxclip import sign as sign
    from jaxclip import sparsity as sparsity
    from jaxclip import sweeps as sweeps
    from jaxclip import thresholds as thresholds
    from jaxclip import training as training
    from jaxclip import weights as weights
    from jaxclip._names import *
else:
    # Wings and names are imported when they are first used, not before: the command line imports
    # this package too, and its help should not wait for jax.
    def __getattr__(name: str) -> object:
        if name == "__all__":
            return _public_names()
        if not name.startswith("_") and name in _wings():
            return _module(f"jaxclip.{name}")
        if not name.startswith("_") and name in _public_names():
            globals()[name] = getattr(_module("jaxclip._names"), name)
            return globals()[name]
        raise AttributeError(f"module 'jaxclip' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_public_names()})

    def _module(name: str):
        from importlib import import_module  # here, so that a command starts in less time

        return import_module(name)

    def _wings() -> set[str]:
        pkgutil = _module("pkgutil")
        return {m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"} - {"cli"}

    def _public_names() -> list[str]:
        names = vars(_module("jaxclip._names"))
        return sorted({*_wings(), *(name for name in names if not name.startswith("_"))})


del TYPE_CHECKING
