"""Reading what the transforms saw: norms, clip rates and counters from optimizer states."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["clip_stats"]

_FIELDS = (
    "pre_norm",
    "post_norm",
    "clip_coef",
    "clip_rate",
    "threshold",
    "num_nonfinite",
    "num_skipped",
    "num_consecutive",
)


def clip_stats(opt_state: Any) -> dict[str, jax.Array]:
    """Returns what jaxclip's transforms measured, as a flat dict of scalars.

    Costs nothing: the transforms keep these numbers in their states. Works through
    `optax.chain`, `masked`, `partition`, `inject_hyperparams` and `MultiSteps`, and inside
    jit, scan and vmap.

    Args:
      opt_state: State of any optimizer that has jaxclip transforms in it.

    Returns:
      Keys are `transform/field`, such as `clip_by_global_norm/pre_norm`, in the order of
      the chain; a second transform of the same kind is `clip_by_global_norm_2/...`. Empty
      if there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxclip
      >>> import optax
      >>> tx = optax.chain(jaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> _, state = tx.update(params, tx.init(params))
      >>> float(jaxclip.clip_stats(state)["clip_by_global_norm/pre_norm"])
      5.0
    """
    stats: dict[str, jax.Array] = {}
    seen: dict[str, int] = {}
    for state in _states(opt_state):
        name = _transform_name(type(state))
        seen[name] = seen.get(name, 0) + 1
        prefix = name if seen[name] == 1 else f"{name}_{seen[name]}"
        fields = [f for f in _FIELDS if hasattr(state, f)]
        # As arrays: flax nnx keeps its own variables in optimizer states.
        stats |= {f"{prefix}/{field}": jnp.asarray(getattr(state, field)) for field in fields}
    return stats


def _has_stats(node: Any) -> bool:
    is_ours = type(node).__module__.startswith("jaxclip.")
    return is_ours and any(hasattr(node, field) for field in _FIELDS)


def _states(tree: Any) -> Iterator[Any]:
    """All states with statistics, outermost first."""
    for node in jax.tree.leaves(tree, is_leaf=_has_stats):
        if _has_stats(node):
            yield node
            yield from _states(tuple(node))


def _transform_name(state_type: type) -> str:
    words = re.findall(r"[A-Z][a-z0-9]*", state_type.__name__.removesuffix("State"))
    return "_".join(words).lower()
