"""Scales that are learned together with the weights before rounding (LSQ).

    w = Q(v; s),    d w / d ln s = w - v    inside the range of the grid,    w    outside

At one bit the derivative is `w` everywhere. So the gradient at the rounded weights `w`, the
weights `v` before rounding and their difference are all that the scales need.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core import trees
from jaxclip._core.trees import PyTree
from jaxclip.lowbit.arrays import QuantizedArray, is_quantized
from jaxclip.lowbit.policies import LeafSpec
from jaxclip.lowbit.straight_through import slope_by_scale
from jaxclip.lowbit.trees import FlatTree, compress_tree

Specs = Sequence[LeafSpec | None]


class LearnedScales(NamedTuple):
    """Scales that an optimizer learns.

    Attributes:
      log_scales: Natural logarithms of the scales of each low-bit leaf, float32, by path.
      optimizer_state: State of their optimizer.
    """

    log_scales: dict[str, jax.Array]
    optimizer_state: optax.OptState


def no_log_scales(small: PyTree) -> dict[str, jax.Array]:
    """Returns zeros for the logarithms of the scales of a low-bit tree, which may be shapes.

    Raises if a grid has zero points, which are not learned.
    """
    found = {}
    for name, leaf in low_bit_leaves(small).items():
        if leaf.grid.zero_point:
            raise ValueError(
                f"learn_scales needs grids without zero points, but params at {name!r} has them."
            )
        found[name] = jnp.zeros(leaf.scale.shape, jnp.float32)
    return found


def log_scales_of(small: PyTree) -> dict[str, jax.Array]:
    """Returns the logarithms of the scales of a low-bit tree, by the paths of its leaves."""
    return {name: jnp.log(_first_scale(leaf)) for name, leaf in low_bit_leaves(small).items()}


def compress_at(params: PyTree, specs: Specs, log_scales: dict[str, jax.Array]) -> PyTree:
    """Returns a low-bit tree with given scales."""
    names = _unique_names(params)

    def at_scale(name: str, spec: LeafSpec | None) -> LeafSpec | None:
        if spec is None or name not in log_scales:
            return spec
        threshold = jnp.exp(log_scales[name]) * spec.grid.code_range[1]
        return dataclasses.replace(spec, rule=threshold)

    return compress_tree(params, [at_scale(*pair) for pair in zip(names, specs, strict=True)])


def gradients_of_scales(
    grads: PyTree, before: PyTree, small: PyTree, log_scales: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns the gradients of the logarithms of the scales.

    `grads` are those at the rounded weights, `before` the weights that were rounded to `small`.
    They are divided by sqrt(entries of a block * highest code), as in LSQ.
    """
    gradients, unrounded = (
        dict(zip(_unique_names(tree), FlatTree.of(tree).leaves, strict=True))
        for tree in (grads, before)
    )
    return {
        name: _gradient(gradients[name], unrounded[name], q)
        for name, q in low_bit_leaves(small).items()
        if name in log_scales
    }


def learned(
    optimizer: optax.GradientTransformation, state: LearnedScales, gradients: dict[str, jax.Array]
) -> LearnedScales:
    """Returns the scales after a step; the same if a gradient is not finite."""
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.log_scales)
    log_scales = jax.tree.map(jnp.add, state.log_scales, updates)
    after = LearnedScales(log_scales, optimizer_state)
    is_sound = jnp.asarray(True)
    for gradient in gradients.values():
        is_sound &= jnp.isfinite(gradient).all()
    return jax.tree.map(lambda new, old: jnp.where(is_sound, new, old), after, state)


def low_bit_leaves(small: PyTree) -> dict[str, QuantizedArray]:
    """Returns the low-bit leaves of a tree by path."""
    pairs = zip(_unique_names(small), FlatTree.of(small).leaves, strict=True)
    return {name: leaf for name, leaf in pairs if is_quantized(leaf)}


def _first_scale(q: QuantizedArray) -> jax.Array:
    """Returns the sizes of the scales of a leaf, with something to start from in blocks of zeros.

    Their scales are the least that there are, and no number of relative steps would leave that.
    """
    scale = jnp.abs(q.scale.astype(jnp.float32))
    largest = jnp.max(scale, initial=0.0)
    is_zero = scale <= 2.0**-100
    block_size = max(q.qvalue.size / max(scale.size, 1), 1)
    usual = np.float32(1 / (q.grid.code_range[1] * np.sqrt(block_size)))
    return jnp.where(is_zero, jnp.where(largest <= 2.0**-100, usual, largest), scale)


def _gradient(g: ArrayLike, v: ArrayLike, q: QuantizedArray) -> jax.Array:
    v = jnp.asarray(v)
    slope = jnp.asarray(g).astype(jnp.float32) * slope_by_scale(v, q)
    blocks, axes = q.grid.split(slope)
    divisor = np.sqrt(q.grid.block_counts(v.shape) * q.grid.code_range[1])
    total = jnp.sum(blocks, axis=axes, keepdims=True) / jnp.asarray(divisor, jnp.float32)
    return q.grid.compact(total, v.ndim)


def _unique_names(tree: PyTree) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
    return trees.unique_names([path for path, _ in paths])
