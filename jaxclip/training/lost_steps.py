"""Steps too small for the dtype of the weights: how many are lost.

A step below half the distance from a weight to its next number changes nothing, however
often it is taken. How many weights that is depends on the weights, so it is measured.
"""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import trees

# Schedules are tried at these steps, gradients at these sizes; the best counts.
_STEPS = (0, 10, 100, 1000, 10_000, 100_000)
_SIZES = (1.0, 4096.0)
# Steps until there is an update, for optimizers that first collect gradients.
_PATIENCE = 8
# Of optax, and our own: states that hold nothing but the place in a schedule.
_SCHEDULE_STATES = (
    "ScaleByScheduleState",
    "WrappedScheduleState",
    "WeightDecaySchedule",
    "_StepState",
)


class LostShares(NamedTuple):
    """What share of the weights with an update stays as it was.

    Attributes:
      total: Of all weights; 0 if there is no update.
      leaves: For each floating leaf that has an update, by its path.
      dtypes: The dtype of each floating leaf, by its path.
    """

    total: float
    leaves: dict[str, float]
    dtypes: dict[str, Any]


def lost_shares(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    enough: tuple[float, float] = (0.0, 0.0),
) -> LostShares:
    """Returns what share of the weights a step of the optimizer leaves exactly as they were.

    Takes one step from `params` with random gradients, at two sizes of the gradient (to an
    optimizer whose step is as large as the gradient, a small one says nothing) and, for
    schedules, at six places between steps 0 and 100,000. The lowest shares count. Steps
    without any update, such as at a learning rate of 0, do not.

    Args:
      tx: Any optax transformation that ends in an update for `optax.apply_updates`.
      params: Pytree of arrays.
      enough: Shares of the total and of a leaf at or below which no more is tried.

    Returns:
      A `LostShares`; without leaves if `params` are abstract or traced, if there was no
      update, or if the optimizer could not be run.

    Example:
      >>> weights = {"w": jnp.array([1.0, 0.001], jnp.bfloat16)}
      >>> lost_shares(optax.sign_sgd(1e-3), weights).leaves
      {'w': 0.5}
    """
    leaves = [(trees.path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    dtypes = {name: jnp.result_type(x) for name, x in leaves if trees.is_clippable(x)}
    if any(isinstance(x, (jax.ShapeDtypeStruct, jax.core.Tracer)) for _, x in leaves):
        return LostShares(0.0, {}, dtypes)
    total, best = 1.0, {}
    try:
        with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("ignore")
            for counts in _tries(tx, params):
                moved = sum(n for _, n in counts.values())
                if moved:
                    total = min(total, sum(n for n, _ in counts.values()) / moved)
                    new = {name: stuck / n for name, (stuck, n) in counts.items() if n}
                    best |= {name: min(best.get(name, 1.0), x) for name, x in new.items()}
                    if total <= enough[0] and max(best.values()) <= enough[1]:
                        break
    except Exception:  # it may need arguments or axes that are not there
        return LostShares(0.0, {}, dtypes)
    return LostShares(total if best else 0.0, best, dtypes)


def _tries(tx: Any, params: Any) -> Iterator[dict[str, tuple[int, int]]]:
    """For each floating leaf, how many weights with an update stayed, and how many there are."""
    start, step = tx.init(params), jax.jit(tx.update)
    has_schedule = any(map(_is_schedule, jax.tree.leaves(start, is_leaf=_is_schedule)))
    for count in _STEPS if has_schedule else _STEPS[:1]:
        for size in _SIZES:
            state, gradients = _at_step(start, count), _random_like(params, size)
            counts: dict[str, tuple[int, int]] = {}
            for _ in range(_PATIENCE):
                updates, state = step(gradients, state, params)
                counts = _count_stuck(params, updates)
                if any(n for _, n in counts.values()):
                    break
            yield counts


def _is_schedule(node: Any) -> bool:
    return type(node).__name__ in _SCHEDULE_STATES


def _at_step(state: Any, count: int) -> Any:
    """The state with its schedules, and only these, at another step."""

    def move(node: Any) -> Any:
        if not _is_schedule(node):
            return node
        return jax.tree.map(lambda n: jnp.full_like(n, count), node)

    return jax.tree.map(move, state, is_leaf=_is_schedule)


def _random_like(params: Any, size: float) -> Any:
    key = iter(jax.random.split(jax.random.key(0), max(len(jax.tree.leaves(params)), 1)))
    return trees.map_clippable(
        lambda p: jax.random.normal(next(key), p.shape, p.dtype) * jnp.asarray(size, p.dtype),
        params,
    )


def _count_stuck(params: Any, updates: Any) -> dict[str, tuple[int, int]]:
    # Outside of jit, where XLA would keep half-precision sums in float32.
    new = optax.apply_updates(params, updates)
    counts = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    pairs = zip(leaves, jax.tree.leaves(updates), jax.tree.leaves(new), strict=True)
    for (path, old), u, w in pairs:
        if trees.is_clippable(old):
            has_update = np.asarray((u != 0) & jnp.isfinite(u))
            is_stuck = has_update & np.asarray(w == old)
            counts[trees.path_name(path)] = (int(is_stuck.sum()), int(has_update.sum()))
    return counts
