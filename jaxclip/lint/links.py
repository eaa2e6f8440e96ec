"""The structure of an optimizer: which links it is made of, and in which order.

An optax chain is a pair of functions. Its links are read from the closures of these,
through `inspect.getclosurevars`, and named by their states and by the functions that made
them. That reads what Python lets anyone read, but the names in there are optax's own: so
whatever is not exactly as expected is a link without a kind, about which nothing is said.
"""

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class Link:
    """One transform of a chain.

    Attributes:
      kind: Name of the factory in optax or jaxclip; "" if it is not known.
      position: Where in the chain, such as `1.0`; "" if it is the whole optimizer.
      tx: The transform.
      params: The stand-in parameters it sees; masked ones in a group.
      inner: The sequences of links inside it: one, or one a group.
      settings: The variables its update function has closed over.
    """

    kind: str
    position: str
    tx: optax.GradientTransformationExtraArgs
    params: Any
    inner: tuple[tuple["Link", ...], ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        name = self.kind.lstrip("_") or "a transform"
        return f"{name} (link {self.position})" if self.position else name


def links_of(tx: Any, params: Any, position: str = "") -> tuple[Link, ...]:
    """Returns the links of an optimizer in order, chains within chains flattened.

    Args:
      tx: An optax transformation.
      params: Parameters to try it on, best small ones: `jaxclip.probes.stand_in`.
      position: What goes before the position of each link.

    Returns:
      One `Link` for anything that is not a chain; unknown parts are links without a kind.

    Example:
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> print(*links_of(tx, jax.numpy.zeros(2)), sep=", ")
      clip_by_global_norm (link 0), identity (link 1.0), scale (link 1.1)
    """
    try:
        with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("ignore")
            return _read(tx, params, position)
    except Exception:  # anything may be in a closure
        return (_opaque(tx, params, position),)


# --- Parts ----------------------------------------------------------------------------


def _opaque(tx: Any, params: Any, position: str) -> Link:
    return Link("", position, optax.GradientTransformationExtraArgs(tx.init, tx.update), params)


def _read(tx: Any, params: Any, position: str) -> tuple[Link, ...]:
    settings, factory = _settings(tx.update), _factory(tx.update)
    if factory == "with_extra_args_support":
        return _read(settings["tx"], params, position)
    if factory == "chain":
        pairs = zip(_settings(tx.init)["init_fns"], settings["update_fns"], strict=True)
        parts = [optax.GradientTransformationExtraArgs(*pair) for pair in pairs]
        return _sequence(enumerate(parts), params, position)
    if factory == "named_chain":
        return _sequence(settings["transforms"], params, position)

    # Made ready for extra arguments, as a chain does it.
    whole = optax.with_extra_args_support(optax.GradientTransformation(tx.init, tx.update))
    if isinstance(tx, optax.GradientTransformationExtraArgs):
        whole = tx
    kind = _kind(tx, params, factory)
    groups = _groups(tx, kind, settings, params)
    inner = tuple(
        links_of(part, seen, f"{position}{label}" if label else position)
        for label, part, seen in groups
    )
    if kind == "skip_nonfinite" and inner and inner[0][0].kind == "error_feedback":
        return inner[0]  # the guard is part of `error_feedback`
    return (Link(kind, position, whole, params, inner, settings),)


def _sequence(parts: Any, params: Any, position: str) -> tuple[Link, ...]:
    prefix = f"{position}." if position else ""
    links: list[Link] = []
    for name, part in parts:
        links += links_of(part, params, f"{prefix}{name}")
    return tuple(links)


def _settings(function: Callable) -> dict[str, Any]:
    """The variables of an enclosing function; none for what is not a Python function."""
    try:
        return dict(inspect.getclosurevars(function).nonlocals)
    except (TypeError, ValueError):
        return {}


def _factory(function: Any) -> str:
    """The function of optax or jaxclip in which `function` was defined, or ""."""
    package = (getattr(function, "__module__", None) or "").split(".")[0]
    name = getattr(function, "__qualname__", "")
    is_local = package in ("optax", "jaxclip") and ".<locals>." in name
    return name.split(".<locals>.")[0] if is_local else ""


def _kind(tx: Any, params: Any, factory: str) -> str:
    """The name by the state, if that is one of ours, else by the factory."""
    if isinstance(getattr(tx.update, "__self__", tx), optax.MultiSteps):
        return "multi_steps"
    if factory == "inject_hyperparams.<locals>.wrapped_transform" or factory.startswith("inject_"):
        return "inject_hyperparams"
    state = type(jax.eval_shape(tx.init, params))
    is_ours = state.__module__.startswith("jaxclip.") and not state.__name__.startswith("_")
    if is_ours:
        words = re.findall(r"[A-Z][a-z0-9]*", state.__name__.removesuffix("State"))
        return "_".join(words).lower()
    return factory


def _groups(tx: Any, kind: str, settings: dict[str, Any], params: Any) -> list[tuple]:
    """For each sequence inside: what to add to its position, transform, parameters."""
    if kind == "multi_steps":
        return [("", getattr(tx.update, "__self__", tx).inner_opt, params)]
    if kind in ("skip_nonfinite", "apply_if_finite", "skip_or_clip", "error_feedback", "cautious"):
        return [("", settings["inner"], params)]
    if kind == "inject_hyperparams":
        hyperparams = tx.init(params).hyperparams
        part = settings["inner_factory"](**settings["other_hps"], **hyperparams)
        return [("", part, params)]
    if kind == "masked":
        mask = settings["mask"]
        chosen = mask(params) if callable(mask) else mask
        return [("", settings["inner"], _keep(chosen, params))]
    if kind == "partition":
        labels = settings["param_labels"]
        labels = labels(params) if callable(labels) else labels
        return [
            (f"[{name!r}]", part, _keep(jax.tree.map(lambda x, n=name: x == n, labels), params))
            for name, part in settings["transforms"].items()
        ]
    return []


def _keep(mask: Any, params: Any) -> Any:
    return jax.tree.map(lambda m, p: p if m else optax.MaskedNode(), mask, params)
