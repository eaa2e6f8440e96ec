"""Trials of the links of a chain, with small random weights and constructed gradients.

Links run on vectors: the floating leaves of the parameters, concatenated.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from numpy.typing import ArrayLike

from jaxclip._core import trees
from jaxclip._core.trees import PyTree

# Clips that learn start after 25 steps by default.
NUM_STEPS = 48


class Link(NamedTuple):
    """A transform of vectors: all floating leaves, concatenated."""

    init: Callable[[ArrayLike], PyTree]
    update: Callable[[ArrayLike, PyTree, ArrayLike], tuple[jax.Array, PyTree]]


class Trial(NamedTuple):
    """The links, small random weights, the leaf of each entry, and the paths of the leaves."""

    links: list[Link]
    weights: np.ndarray
    leaf: np.ndarray
    paths: list[str]

    def gradients(self, num_steps: int = NUM_STEPS, size: float = 1.0) -> np.ndarray:
        """Returns random gradients, one per row."""
        normal = np.random.default_rng(1).normal(size=(num_steps, self.weights.size))
        return (size * normal).astype(self.weights.dtype)

    def powers(self, part: str) -> np.ndarray:
        """Returns random powers of two by step, one for each "tree", "leaf" or "entry"."""
        widths = {"tree": 1, "leaf": len(self.paths), "entry": self.weights.size}
        exponents = np.random.default_rng(2).integers(-12, 13, (NUM_STEPS, widths[part]))
        powers = np.exp2(exponents).astype(np.float32)
        return powers[:, self.leaf] if part == "leaf" else powers

    def run(self, links: Iterable[Link], gradients: np.ndarray) -> np.ndarray:
        """Returns the updates of a chain, one per row."""
        return np.asarray([updates[-1] for updates, _ in self.walk(list(links), gradients)])

    def is_trained(self) -> np.ndarray:
        """Returns True for the entries of leaves that the whole chain moves."""
        is_moved = np.any(self.run(self.links, self.gradients()) != 0, axis=0)
        return np.isin(self.leaf, self.leaf[is_moved])

    def walk(
        self, links: list[Link], gradients: np.ndarray
    ) -> Iterator[tuple[list[np.ndarray], list[PyTree]]]:
        """Yields each gradient with the updates after each link, and the states."""
        states = [link.init(self.weights) for link in links]
        for gradient in gradients:
            updates, states = step(links, gradient, states, self.weights)
            yield updates, states


def step(
    links: list[Link], gradient: np.ndarray, states: list[PyTree], weights: np.ndarray
) -> tuple[list[np.ndarray], list[PyTree]]:
    """Returns the gradient with the updates after each link, and the new states."""
    updates, new_states = [gradient], []
    for link, state in zip(links, states, strict=True):
        update, state = link.update(updates[-1], state, weights)
        updates.append(np.asarray(update))
        new_states.append(state)
    return updates, new_states


def make_trial(transforms: list, params: PyTree) -> Trial:
    """Returns the links on random float32 leaves of at most 3 entries per dimension."""

    def shrink(p: PyTree) -> PyTree:
        if not hasattr(p, "dtype") or jnp.issubdtype(p.dtype, jax.dtypes.extended):
            return p
        is_complex = jnp.issubdtype(p.dtype, jnp.complexfloating)
        dtype = jnp.complex64 if is_complex else jnp.float32
        return jnp.ones([min(n, 3) for n in p.shape], dtype if trees.is_clippable(p) else p.dtype)

    small = jax.tree.map(shrink, params)
    named = jax.tree_util.tree_leaves_with_path(small)
    floating = [jnp.asarray(x) for _, x in named if trees.is_clippable(x)]
    weights, unravel = ravel_pytree(floating)

    def tree_of(vector: ArrayLike) -> PyTree:
        leaves = iter(unravel(jnp.asarray(vector, weights.dtype)))
        return jax.tree.map(lambda x: next(leaves) if trees.is_clippable(x) else x, small)

    def vector_of(tree: PyTree) -> jax.Array:
        leaves = zip(jax.tree.leaves(tree), named, strict=True)
        return ravel_pytree([x for x, (_, p) in leaves if trees.is_clippable(p)])[0]

    def on_vectors(tx: optax.GradientTransformationExtraArgs) -> Link:
        def update(gradient: ArrayLike, state: PyTree, weights: ArrayLike):
            updates, state = tx.update(tree_of(gradient), state, tree_of(weights))
            return vector_of(updates), state

        return Link(lambda weights: tx.init(tree_of(weights)), jax.jit(update))

    return Trial(
        links=[on_vectors(tx) for tx in transforms],
        weights=np.random.default_rng(0).normal(size=weights.size).astype(weights.dtype),
        leaf=np.repeat(np.arange(len(floating)), [x.size for x in floating]),
        paths=[trees.path_name(path) for path, x in named if trees.is_clippable(x)],
    )


def at_count(states: list[PyTree], count: int) -> list[PyTree]:
    """Returns the states with all their counters, which schedules read, set to `count`."""

    def move(x: jax.Array) -> jax.Array:
        is_counter = jnp.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.integer)
        return jnp.full_like(x, count) if is_counter else x

    return jax.tree.map(move, states)
