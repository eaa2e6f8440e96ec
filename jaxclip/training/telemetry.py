"""Reading norms, clip rates and counters from optimizer states."""

import collections
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core.checks import is_concrete
from jaxclip._core.trees import PyTree, is_clippable, unique_names
from jaxclip.gradients.state import ClipStats, LeafReport

# Further numbers of a state, outside of its `ClipStats`.
_OTHER_STATISTICS = ("threshold", "num_nonfinite", "num_skipped", "num_consecutive")


@jax.tree_util.register_pytree_with_keys_class
class Statistics(dict[str, Any]):
    """`clip_stats`, in which the first clip's are found by their bare names too.

    It shows each number once: `stats["pre_norm"]` is `stats["clip_by_global_norm/pre_norm"]`.
    """

    def __missing__(self, name: str) -> Any:
        first = next((k.split("/")[0] for k in self if k.endswith("/clip_rate")), None)
        full_name = f"{first}/{name}"
        if full_name not in self.keys():
            raise KeyError(name)
        return self[full_name]

    def __contains__(self, name: object) -> bool:
        try:
            self[name]  # pyright: ignore[reportArgumentType]
        except KeyError:
            return False
        return True

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def tree_flatten_with_keys(self) -> tuple[list, tuple[str, ...]]:
        return [(jax.tree_util.DictKey(k), x) for k, x in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], numbers: Iterable[Any]) -> "Statistics":
        return cls(zip(names, numbers, strict=True))


def clip_stats(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Returns the measurements of jaxclip's transforms, as a flat dict of scalars.

    Costs nothing: the transforms keep these numbers in their states. Works through
    `optax.chain`, `masked`, `partition`, `inject_hyperparams` and `MultiSteps`, and inside
    jit, scan and vmap. A transform of your own is found, too, if the class of its state has a
    `transform_name`; it reports the state's `stats`, a `ClipStats`.

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
    return {
        f"{name}/{field}": number
        for name, state in _named_states(opt_state)
        for field, number in _statistics(state).items()
    }


def find_learning_rate(opt_state: optax.OptState) -> jax.Array | None:
    """Returns the first learning rate that a state holds, of the step that it comes from."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: _learning_rate(node) is not None)
    rates = (_learning_rate(node) for node in nodes)
    rate = next((rate for rate in rates if rate is not None), None)
    return None if rate is None else jnp.asarray(rate)


def _learning_rate(node: object) -> Any:
    """Returns the learning rate of a state: of `inject_hyperparams`, or of jaxclip's step size."""
    hyperparams = getattr(node, "hyperparams", None)
    if isinstance(hyperparams, Mapping):
        return hyperparams.get("learning_rate")
    return getattr(node, "learning_rate", None)


class LeafNorms(NamedTuple):
    """Leaf norms that a transform measured; `str` gives them as a sentence.

    Attributes:
      transform: Name of the transform, as in `clip_stats`.
      largest_leaf: Path of the leaf with the largest norm at the last finite step, or None if
        there was none.
      fraction: Its fraction of the squared global norm, in [0, 1].
      nonfinite_leaf: Path of the first leaf that was not finite at the last bad step, or None
        if there was none.
      norms: The norm of each floating leaf at the last finite step, by path.
    """

    transform: str
    largest_leaf: str | None
    fraction: float
    nonfinite_leaf: str | None
    norms: dict[str, float]

    def __str__(self) -> str:
        largest = "no gradient yet"
        if self.largest_leaf is not None:
            norm = self.norms[self.largest_leaf]
            largest = f"{self.largest_leaf!r} has {self.fraction:.0%} of the squared norm"
            largest += f" ({norm:.3g})"
        bad = "no leaf was ever non-finite"
        if self.nonfinite_leaf is not None:
            bad = f"the first non-finite leaf was {self.nonfinite_leaf!r}"
        return f"{self.transform}: {largest}; {bad}"


def explain(opt_state: optax.OptState, params: optax.Params) -> list[LeafNorms]:
    """Returns the leaf with the largest gradient norm, and the first that was not finite.

    The transforms that measure norms (`clip_by_global_norm`, `clip_by_leaf_norm`,
    `clip_by_block_rms`, `adaptive_grad_clip`, `clip_update_relative`, `skip_or_clip`, and the
    clips that learn) keep the norm of each leaf, which they compute anyway. Call it on the
    host, between steps.

    Args:
      opt_state: State of any optimizer that has such transforms in it, with concrete values.
      params: The parameters, or any tree of their structure; only paths are read.

    Returns:
      A `LeafNorms` for each such transform, in the order of the chain. Inside
      `optax.masked` or `partition` a transform sees only some leaves; they are then called
      `leaf 0`, `leaf 1`, ... in its own order.

    Raises:
      TypeError: If `opt_state` is being traced.

    Example:
      >>> import jaxclip
      >>> grads = {"kernel": jnp.array([3.0, 3.0]), "bias": jnp.array([1.0])}
      >>> tx = jaxclip.clip_by_global_norm(1.0)
      >>> print(*explain(tx.update(grads, tx.init(grads))[1], grads))
      clip_by_global_norm: 'kernel' has 95% of the squared norm (4.24); no leaf was ever non-finite
    """
    if not all(map(is_concrete, jax.tree.leaves(opt_state))):
        raise TypeError("explain reads values: call it on the state that a jitted step returned.")
    named = jax.tree_util.tree_leaves_with_path(params)
    paths = unique_names([path for path, x in named if is_clippable(x)])
    reports = []
    for name, state in _named_states(opt_state):
        report = getattr(state, "leaves", None)
        if not isinstance(report, LeafReport):
            continue
        norms = np.asarray(jnp.asarray(report.norms), np.float64)
        known = paths if len(paths) == len(norms) else [f"leaf {i}" for i in range(len(norms))]
        largest, total = norms.max(initial=0), float(np.sum(norms**2))
        bad = int(jnp.asarray(report.nonfinite_leaf))
        reports.append(
            LeafNorms(
                transform=name,
                largest_leaf=known[int(norms.argmax())] if largest > 0 else None,
                fraction=float(largest**2 / total) if largest > 0 else 0.0,
                nonfinite_leaf=known[bad] if bad >= 0 else None,
                norms=dict(zip(known, norms.tolist(), strict=True)),
            )
        )
    return reports


def _named_states(opt_state: optax.OptState) -> Iterator[tuple[str, Any]]:
    """Yields all states with statistics and their names, numbered from the second of a kind on."""
    counts: collections.Counter[str] = collections.Counter()
    for state in _states(opt_state):
        name = state.transform_name
        counts[name] += 1
        yield (name if counts[name] == 1 else f"{name}_{counts[name]}"), state


def _states(tree: PyTree) -> Iterator[Any]:
    """Yields all states with statistics, outermost first."""
    for node in jax.tree.leaves(tree, is_leaf=_has_stats):
        if _has_stats(node):
            yield node
            yield from _states(tuple(node))


def _has_stats(node: object) -> bool:
    """Returns True for a state whose class names its transform, as those with statistics do."""
    return isinstance(node, tuple) and hasattr(type(node), "transform_name")


def _statistics(state: Any) -> dict[str, jax.Array]:
    """Returns the numbers that a state reports: those of its `ClipStats`, then others."""
    stats = getattr(state, "stats", None)
    numbers = stats._asdict() if isinstance(stats, ClipStats) else {}
    numbers |= {f: getattr(state, f) for f in _OTHER_STATISTICS if hasattr(state, f)}
    # As arrays: flax nnx keeps its own variables in optimizer states.
    return {field: jnp.asarray(x) for field, x in numbers.items() if x is not None}
