"""Trying a transform out on small parameters: what it does to gradients of known making.

All of it is done on a stand-in for the parameters: the same tree, in float32, each
dimension at most 3 long. A transform that cannot be run there gives no answer.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import trees

# What has a number of its own: all leaves together, each leaf, or each entry.
Grain = Literal["tree", "leaf", "entry"]


def stand_in(params: optax.Params) -> Any:
    """Returns small parameters of the same structure, for trying links on.

    Args:
      params: Pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The tree with random float32 (or complex64) leaves of at most 3 entries a dimension;
      leaves that are not floating are zeros, keys and Python numbers as given.

    Example:
      >>> small = stand_in({"w": jax.ShapeDtypeStruct((512, 2), jnp.bfloat16)})
      >>> small["w"].shape, small["w"].dtype
      ((3, 2), dtype('float32'))
    """
    rng = np.random.default_rng(0)

    def leaf(p: Any) -> Any:
        if isinstance(p, (bool, int, float, complex)):
            return p
        if jnp.issubdtype(p.dtype, jax.dtypes.extended):
            return p
        shape = tuple(min(n, 3) for n in p.shape)
        if not trees.is_clippable(p):
            return np.zeros(shape, p.dtype)
        is_complex = jnp.issubdtype(p.dtype, jnp.complexfloating)
        return jnp.asarray(rng.standard_normal(shape), jnp.complex64 if is_complex else jnp.float32)

    return jax.tree.map(leaf, params)


def run_transform(tx: Any, gradients: Sequence[Any], params: Any) -> list[Any] | None:
    """Returns the updates of a transform for a row of gradients, or None if it fails.

    Args:
      tx: An optax transformation.
      gradients: Trees like `params`, one a step.
      params: Parameters, the same at each step.

    Returns:
      The updates of each step; None if anything at all goes wrong, for the transform may
      need arguments, axes or shapes that are not there.

    Example:
      >>> run_transform(optax.scale(2.0), [jnp.ones(1)], jnp.zeros(1))
      [Array([2.], dtype=float32)]
    """
    try:
        with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("ignore")
            state, results = tx.init(params), []
            for g in gradients:
                updates, state = tx.update(g, state, params)
                results.append(updates)
            return results
    except Exception:
        return None


def random_like(tree: Any, seed: int) -> Any:
    """Returns random normal numbers in the place of the floating leaves of a tree.

    Args:
      tree: Pytree of arrays.
      seed: Integer; the same seed gives the same numbers.

    Returns:
      A tree of the same structure, shapes and dtypes; other leaves are as they were.

    Example:
      >>> random_like({"w": jnp.zeros(2), "n": 3}, seed=0)["n"]
      3
    """
    rng = np.random.default_rng(seed)
    return trees.map_clippable(
        lambda p: jnp.asarray(rng.standard_normal(p.shape)).astype(p.dtype), tree
    )


def magnitude(tree: Any) -> float:
    """Returns the sum of the moduli of all floating entries.

    Args:
      tree: Pytree of arrays.

    Returns:
      A Python float, 0 if there is no floating leaf.

    Example:
      >>> magnitude([jnp.array([3.0, -4.0]), 7])
      7.0
    """
    return sum(float(np.sum(np.abs(x))) for x in _floating(tree))


def dot(tree: Any, other: Any) -> float:
    """Returns the inner product of two trees over their floating leaves.

    Args:
      tree: Pytree of arrays.
      other: Pytree with the same floating leaves.

    Returns:
      A Python float; the real part if leaves are complex.

    Example:
      >>> dot(jnp.array([3.0, -4.0]), jnp.array([1.0, 1.0]))
      -1.0
    """
    pairs = zip(_floating(tree), _floating(other), strict=True)
    return sum(float(np.real(np.vdot(x, y))) for x, y in pairs)


def is_finite(tree: Any) -> bool:
    """Returns whether all floating entries are finite.

    Args:
      tree: Pytree of arrays.

    Returns:
      A Python bool.

    Example:
      >>> is_finite({"w": jnp.array([0.0, jnp.nan])})
      False
    """
    return all(bool(np.all(np.isfinite(x))) for x in _floating(tree))


def floating_paths(tree: Any) -> set[str]:
    """Returns the paths of the floating leaves.

    Args:
      tree: Pytree of arrays; masked leaves have no path.

    Returns:
      A set of paths such as `layer/kernel`.

    Example:
      >>> floating_paths({"w": jnp.zeros(2), "n": 3, "b": optax.MaskedNode()})
      {'w'}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {trees.path_name(path) for path, x in leaves if trees.is_clippable(x)}


def moving_paths(tx: Any, params: Any) -> set[str]:
    """Returns the paths of the leaves that an optimizer moves within four steps.

    Args:
      tx: An optax transformation.
      params: Parameters, best small ones.

    Returns:
      A set of paths; empty if the optimizer cannot be run.

    Example:
      >>> tx = optax.masked(optax.set_to_zero(), {"w": True, "b": False})
      >>> moving_paths(tx, {"w": jnp.ones(1), "b": jnp.ones(1)})
      {'b'}
    """
    moving: set[str] = set()
    gradients = [random_like(params, seed) for seed in range(1, 5)]
    for updates in run_transform(tx, gradients, params) or []:
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(updates), strict=True
        )
        moving |= {trees.path_name(path) for (path, _), u in pairs if magnitude(u) > 0}
    return moving & floating_paths(params)


def ignores_size(tx: Any, params: Any, grain: Grain) -> bool:
    """Returns whether gradients times positive numbers give the same updates, bit for bit.

    The numbers are powers of two, by which float32 multiplies exactly, and change from step
    to step, by which a momentum gives itself away.

    Args:
      tx: An optax transformation.
      params: Parameters, as `stand_in` gives them.
      grain: Whether one number multiplies all leaves, or each leaf or entry has its own.

    Returns:
      True if six steps give the same updates, not all of them zero; False if the transform
      cannot be run.

    Example:
      >>> w = jnp.zeros(3)
      >>> ignores_size(optax.scale_by_sign(), w, "entry"), ignores_size(optax.lion(1.0), w, "tree")
      (True, False)
    """
    gradients = [random_like(params, seed) for seed in range(1, 7)]
    scaled = [_times_powers(g, grain, seed) for seed, g in enumerate(gradients)]
    plain, other = (run_transform(tx, row, params) for row in (gradients, scaled))
    if plain is None or other is None or not magnitude(plain) > 0:
        return False
    pairs = zip(_floating(plain), _floating(other), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def leaves_box(box: Any, behind: Any, params: Any) -> bool:
    """Returns whether a transform behind a box takes weights on its bound out of it.

    From there updates push outwards, inwards and not at all, each after the box has seen
    it. Where the weights then are is in the box if the box would not change the update.

    Args:
      box: An optax transformation that keeps weights in a box.
      behind: An optax transformation that gets its updates.
      params: Parameters, as `stand_in` gives them.

    Returns:
      A Python bool; False if one of them cannot be run.

    Example:
      >>> from jaxclip import box, project_weights
      >>> leaves_box(project_weights(box(1.0)), optax.scale(-0.1), jnp.zeros(3))
      True
    """
    zeros = trees.map_clippable(jnp.zeros_like, params)
    far = trees.map_clippable(
        lambda g: jnp.sign(g) * jnp.asarray(2.0**20, g.dtype), random_like(params, 1)
    )
    inside = run_transform(box, [far], zeros)
    if inside is None:
        return False
    corner = jax.tree.map(lambda w, u: u if trees.is_clippable(w) else w, zeros, inside[0])
    pushes = [far, zeros, trees.map_clippable(lambda g: -g, far), zeros] * 2
    kept = run_transform(box, pushes, corner)
    moved = kept and run_transform(behind, kept, corner)
    again = moved and run_transform(box, moved, corner)
    if not moved or not again:
        return False

    def is_outside(u: Any, v: Any, w: Any) -> bool:
        if not trees.is_clippable(w):
            return False
        # Above the rounding of float32.
        return bool(jnp.any(jnp.abs(u - v) > 2e-6 * jnp.abs(w)))

    return any(
        is_outside(*leaves)
        for u, v in zip(moved, again, strict=True)
        for leaves in zip(*map(jax.tree.leaves, (u, v, corner)), strict=True)
    )


# --- Parts ----------------------------------------------------------------------------


def _floating(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree) if trees.is_clippable(x)]


def _times_powers(tree: Any, grain: str, step: int) -> Any:
    rng = np.random.default_rng(100 + step)
    common = rng.integers(-12, 13)

    def scale(g: jax.Array) -> jax.Array:
        powers = rng.integers(-12, 13, g.shape if grain == "entry" else ())
        powers = common if grain == "tree" else powers
        return g * jnp.asarray(np.exp2(powers), jnp.finfo(g.dtype).dtype).astype(g.dtype)

    return trees.map_clippable(scale, tree)
