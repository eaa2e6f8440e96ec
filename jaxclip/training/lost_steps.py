"""Updates lost to rounding: w + u == w in the dtype of the weights.

An update below half the distance from a weight to its next number changes nothing, however
often it is applied. The fraction depends on the weights, so it is measured.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import trees
from jaxclip._core.trees import PyTree

# Schedules are tried at these steps, gradients at these sizes; the lowest fraction counts.
_STEPS = (0, 10, 100, 1000, 10_000, 100_000)
_SIZES = (1.0, 4096.0)
# Steps until there is an update, for optimizers that first collect gradients.
_MAX_STEPS = 8
# States of optax and jaxclip that hold only the step of a schedule.
_SCHEDULE_STATES = (
    "ScaleByScheduleState",
    "WrappedScheduleState",
    "WeightDecaySchedule",
    "_StepState",
    "_StepSizeState",
)


class LostUpdates(NamedTuple):
    """Fractions of the nonzero updates that are lost to rounding.

    Attributes:
      total: Of all weights; 0 if there is no update.
      leaves: For each floating leaf that has an update, by its path.
      dtypes: The dtype of each floating leaf, by its path.
    """

    total: float
    leaves: dict[str, float]
    dtypes: dict[str, jnp.dtype]


def measure_lost_updates(
    links: Sequence[optax.GradientTransformation],
    params: optax.Params,
    *,
    enough: tuple[float, float] = (0.0, 0.0),
) -> LostUpdates:
    """Takes one step of a chain with random gradients; returns how many updates are lost."""
    # At two sizes of the gradient: if the step grows with the gradient, a small one proves
    # nothing. The search ends when the lost fractions, of the total and of the worst leaf, are at
    # most `enough`.
    leaves = jax.tree.leaves(params)
    named = zip(_names(params), leaves, strict=True)
    dtypes = {name: jnp.result_type(x) for name, x in named if trees.is_clippable(x)}
    if any(isinstance(x, (jax.ShapeDtypeStruct, jax.core.Tracer)) for x in leaves):
        return LostUpdates(0.0, {}, dtypes)
    total, best = 1.0, {}
    try:
        with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("ignore")
            for counts in _count_lost(optax.chain(*links), params):
                moved = sum(n for _, n in counts.values())
                if moved:
                    total = min(total, sum(n for n, _ in counts.values()) / moved)
                    new = {name: lost / n for name, (lost, n) in counts.items() if n}
                    best |= {name: min(best.get(name, 1.0), x) for name, x in new.items()}
                    if total <= enough[0] and max(best.values()) <= enough[1]:
                        break
    except Exception:  # the optimizer may need arguments or axes that it does not get here
        return LostUpdates(0.0, {}, dtypes)
    return LostUpdates(total if best else 0.0, best, dtypes)


def _count_lost(
    tx: optax.GradientTransformation, params: optax.Params
) -> Iterator[dict[str, tuple[int, int]]]:
    """Yields, for each floating leaf, the numbers of lost and of nonzero updates."""
    start, step = tx.init(params), jax.jit(tx.update)
    has_schedule = any(map(_is_schedule, jax.tree.leaves(start, is_leaf=_is_schedule)))
    for count in _STEPS if has_schedule else _STEPS[:1]:
        for size in _SIZES:
            state, gradients = _with_schedules_at(start, count), _random_like(params, size)
            counts: dict[str, tuple[int, int]] = {}
            for _ in range(_MAX_STEPS):
                updates, state = step(gradients, state, params)
                counts = _count_unchanged(params, updates)
                if any(n for _, n in counts.values()):
                    break
            yield counts


def _names(params: PyTree) -> list[str]:
    return trees.unique_names([path for path, _ in jax.tree_util.tree_leaves_with_path(params)])


def _is_schedule(node: object) -> bool:
    return type(node).__name__ in _SCHEDULE_STATES


def _with_schedules_at(state: PyTree, count: int) -> PyTree:
    """Returns the state with its schedules, and only these, at another step."""

    def move(node: PyTree) -> PyTree:
        if not _is_schedule(node):
            return node
        return jax.tree.map(lambda n: jnp.full_like(n, count), node)

    return jax.tree.map(move, state, is_leaf=_is_schedule)


def _random_like(params: PyTree, size: float) -> PyTree:
    key = iter(jax.random.split(jax.random.key(0), max(len(jax.tree.leaves(params)), 1)))
    return trees.map_clippable(
        lambda p: jax.random.normal(next(key), p.shape, p.dtype) * jnp.asarray(size, p.dtype),
        params,
    )


def _count_unchanged(params: PyTree, updates: PyTree) -> dict[str, tuple[int, int]]:
    # Outside of jit, where XLA would keep half-precision sums in float32.
    new = optax.apply_updates(params, updates)
    counts = {}
    columns = (_names(params), *map(jax.tree.leaves, (params, updates, new)))
    for name, old, u, w in zip(*columns, strict=True):
        if trees.is_clippable(old):
            has_update = np.asarray((u != 0) & jnp.isfinite(u))
            is_lost = has_update & np.asarray(w == old)
            counts[name] = (int(is_lost.sum()), int(has_update.sum()))
    return counts
