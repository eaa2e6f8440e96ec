"""Pruning after training: which weights become 0, and what the others make up for.

    tr(E^T H E),    E = W - pruned W,    H = sum of x x^T over the inputs x

With the whole H a weight is pruned by what that costs once the others are fitted anew:
`w_i^2 / [H^-1]_ii`, the saliency of the optimal brain surgeon. Some are pruned at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import compute_dtype
from jaxclip._core.trees import Mask, check_mask_for_leaves, unique_names
from jaxclip.lowbit.arrays import is_quantized
from jaxclip.lowbit.rounding.feedback import (
    FactoredMoments,
    InputFactor,
    factor_moments,
    importance_of,
    output_energy,
)
from jaxclip.lowbit.rounding.moments import Calibration
from jaxclip.sparsity.keeping import check_density
from jaxclip.sparsity.patterns import (
    Chooser,
    Pattern,
    Scope,
    SparseLeaf,
    check_pattern,
    sparse_leaves,
)

_NUM_ROUNDS = 8
# Steps of conjugate gradients: a few where the next round changes the mask anyway.
_NUM_STEPS, _NUM_LAST_STEPS = 10, 30


def prune(
    params: optax.Params,
    density: ArrayLike,
    *,
    pattern: Pattern = "free",
    scope: Scope = "leaf",
    calibration: Calibration | None = None,
    mask: Mask | None = None,
) -> optax.Params:
    """Returns the parameters with all but a fraction of the weights at exactly zero.

    Without a calibration the largest magnitudes are kept. With one, a leaf is pruned for a small
    error of its outputs. Where only the diagonals of its moments are known, the largest
    `w^2 E[x^2]` are kept, as in Wanda. Where the moments are whole, weights are pruned in eight
    rounds of the cubic schedule by `w^2 / [H^-1]_ii`, and after each those that remain are
    fitted anew by conjugate gradients. Outputs ("rows") are kept by their energy.

    Args:
      params: Any pytree of arrays.
      density: The fraction of weights to keep, in (0, 1]. May be traced without a calibration.
      pattern: "free", "rows" or a group size, as in `keep_sparse`.
      scope: "leaf" for the density in every leaf; "tree" for one choice by magnitude among all.
      calibration: Of `calibration.measure` for these parameters. Leaves that it lacks are pruned
        by magnitude.
      mask: The leaves to prune, as in `keep_sparse`; None for those of two or more dimensions.

    Returns:
      New parameters of the same structure, shapes and dtypes, to be compressed or saved. With a
      calibration no leaf has a larger error of its outputs, `tr(E^T H E)` with the damped
      moments, than the one pruned by magnitude.

    Raises:
      TypeError: If an argument is of a wrong type, params are low-bit arrays already, or
        weights are traced that a calibration is given for.
      ValueError: If `density`, `pattern` or `scope` is not allowed, a leaf does not fit the
        pattern, or the calibration is of other parameters.

    Complexity: with whole moments 100 products of the moments and the weights, in NumPy.

    Example:
      >>> prune({"kernel": jnp.array([[0.9, -0.2], [0.1, 0.6]])}, 0.5)
      {'kernel': Array([[0.9, 0. ],
             [0. , 0.6]], dtype=float32)}

    References:
      Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2023,
      https://arxiv.org/abs/2306.11695
      Frantar and Alistarh, SparseGPT, 2023, https://arxiv.org/abs/2301.00774
      Boza, Fast and Effective Weight Update for Pruned Large Language Models, 2024,
      https://arxiv.org/abs/2401.02938
    """
    check_density("density", density)
    check_pattern(pattern, scope)
    check_mask_for_leaves(mask)
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise TypeError("params must be arrays, got low-bit arrays: prune first, then compress.")
    entries, structure = jax.tree_util.tree_flatten_with_path(params)
    names = unique_names([path for path, _ in entries])
    all_leaves = [leaf for _, leaf in entries]
    if calibration is not None:
        _check_calibration(calibration, names, scope)
    chooser, leaves = Chooser(pattern, scope), sparse_leaves(params, mask)
    places = [i for i, leaf in enumerate(leaves) if leaf is not None]
    found = tuple(leaf for leaf in leaves if leaf is not None)
    if not found:
        return params
    for leaf in found:
        chooser.check(leaf)
    weights = [jnp.asarray(all_leaves[i]) for i in places]
    active = [jnp.ones_like(w, bool) for w in weights]
    sizes = [jnp.abs(w.astype(compute_dtype(w.dtype))) for w in weights]
    masks = chooser.choose(found, active, sizes, chooser.counts(found, density))
    pruned = [jnp.where(m, w, jnp.zeros_like(w)) for m, w in zip(masks, weights, strict=True)]
    for i, leaf, w, by_magnitude in zip(places, found, weights, pruned, strict=True):
        moments = None if calibration is None else calibration.moments.get(names[i])
        if moments is not None:
            if not (checks.is_concrete(w) and checks.is_concrete(density)):
                raise TypeError(
                    f"density and params at {names[i]!r} must be concrete: prune outside of jit."
                )
            factored = factor_moments(moments, leaf.shape, f"params at {names[i]!r}")
            by_outputs = _pruned_by_outputs(chooser, leaf, w, float(np.asarray(density)), factored)
            by_magnitude = _better(w, by_magnitude, by_outputs, factored)
        all_leaves[i] = by_magnitude
    return structure.unflatten(all_leaves)


def _check_calibration(calibration: Calibration, names: list[str], scope: Scope) -> None:
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"calibration must be what calibration.measure returns, got {calibration!r}."
        )
    if scope == "tree":
        raise ValueError(
            "scope must be 'leaf' with a calibration, which does not compare the outputs of "
            "different leaves, got 'tree'."
        )
    unknown = sorted(calibration.moments.keys() - set(names))
    if unknown:
        raise ValueError(
            f"calibration must be of these parameters, got moments for {unknown[0]!r}, which is "
            "none of their paths."
        )


def _better(
    w: jax.Array, first: jax.Array, second: jax.Array, moments: FactoredMoments
) -> jax.Array:
    """Returns the leaf with the smaller error of the outputs, the first if they are equal."""
    exact = np.asarray(w, np.float32)
    errors = [output_energy(exact - np.asarray(x, np.float32), moments) for x in (first, second)]
    return second if errors[1] < errors[0] else first


def _pruned_by_outputs(
    chooser: Chooser, leaf: SparseLeaf, w: jax.Array, density: float, moments: FactoredMoments
) -> jax.Array:
    """Returns a leaf pruned for a small error of its outputs."""
    exact, view, shape = np.asarray(w, np.float32), moments.view, leaf.shape

    def chosen(kept: np.ndarray, scores: np.ndarray, density: float) -> np.ndarray:
        counts = chooser.counts((leaf,), density)
        (found,) = chooser.choose((leaf,), [jnp.asarray(kept)], [jnp.asarray(scores)], counts)
        return np.asarray(found)

    kept = np.ones(shape, bool)
    if moments.is_diagonal and chooser.pattern != "rows":
        kept = chosen(kept, np.square(exact) * importance_of(moments, shape), density)
        return jnp.where(kept, w, jnp.zeros_like(w))
    layers = [_Layer.of(factor) for factor in moments.factors]
    if chooser.pattern == "rows":
        matrices = view.unfold(exact)
        energies = [layer.energies(m) for layer, m in zip(layers, matrices, strict=True)]
        wide = np.broadcast_to(np.stack(energies)[:, None, :], view.matrix_shape)
        kept = chosen(kept, view.fold(wide, shape), density)
        return jnp.where(kept, w, jnp.zeros_like(w))
    pruned = exact
    for i in range(1, _NUM_ROUNDS + 1):
        now = density + (1 - density) * (1 - i / _NUM_ROUNDS) ** 3
        scores = [layer.saliencies(m) for layer, m in zip(layers, view.unfold(pruned), strict=True)]
        kept = chosen(kept, view.fold(np.stack(scores), shape), now)
        num_steps = _NUM_LAST_STEPS if i == _NUM_ROUNDS else _NUM_STEPS
        stacks = (view.unfold(x) for x in (exact, pruned, kept))
        fitted = [
            layer.fitted(*parts, num_steps) for layer, *parts in zip(layers, *stacks, strict=True)
        ]
        pruned = view.fold(np.stack(fitted), shape)
    return jnp.asarray(pruned).astype(w.dtype)


class _Layer(NamedTuple):
    """The inputs of one matrix: their damped second moments H, and 1 / diag(H^-1)."""

    second: np.ndarray
    remaining: np.ndarray

    @classmethod
    def of(cls, factor: InputFactor) -> "_Layer":
        unit = np.eye(factor.weights.size) if factor.unit is None else factor.unit
        ordered = (unit.astype(np.float64) * factor.weights) @ unit.T
        second = np.empty_like(ordered)
        second[np.ix_(factor.order, factor.order)] = ordered
        remaining = 1 / np.diagonal(np.linalg.inv(second))
        return cls(second.astype(np.float32), remaining.astype(np.float32))

    def energies(self, matrix: np.ndarray) -> np.ndarray:
        """Returns the squared outputs on all inputs, of each output."""
        return np.maximum((matrix * (self.second @ matrix)).sum(axis=0), 0)

    def saliencies(self, matrix: np.ndarray) -> np.ndarray:
        """Returns what it costs to prune each weight alone, if all others are fitted anew."""
        return np.square(matrix) * self.remaining[:, None]

    def fitted(
        self, exact: np.ndarray, start: np.ndarray, kept: np.ndarray, num_steps: int
    ) -> np.ndarray:
        """Returns the matrix of kept weights with the outputs closest to the exact ones."""
        scale = 1 / np.diagonal(self.second)[:, None]
        start = np.where(kept, start, 0).astype(np.float32)

        def product(x: np.ndarray) -> np.ndarray:
            return np.where(kept, self.second @ x, 0)

        return _conjugate_gradients(product, product(exact - start), scale, start, num_steps)


def _conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray],
    residual: np.ndarray,
    scale: np.ndarray,
    start: np.ndarray,
    num_steps: int,
) -> np.ndarray:
    """Returns approximate solutions, one for each column, from a start with that residual."""
    tiny = np.finfo(np.float32).tiny
    x, direction = start, scale * residual
    rate = (residual * direction).sum(axis=0)
    for _ in range(num_steps):
        moved = product(direction)
        length = rate / np.maximum((direction * moved).sum(axis=0), tiny)
        x = x + length * direction
        residual = residual - length * moved
        new_rate = (residual * scale * residual).sum(axis=0)
        direction = scale * residual + new_rate / np.maximum(rate, tiny) * direction
        rate = new_rate
    return x
