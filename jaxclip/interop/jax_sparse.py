"""Pruned weights as the sparse arrays of `jax.experimental.sparse`, and back.

BCOO   a value and its index along every axis, for arrays of any number of axes
BCSR   a value and its column, and the place where each row begins, for matrices
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks
from jaxclip._core.trees import PyTree, path_name
from jaxclip.checkpoints.format.layout import check_has_values
from jaxclip.lowbit.arrays import dequantize, is_quantized

Kind: TypeAlias = Literal["bcoo", "bcsr"]


def to_jax_sparse(tree: PyTree, kind: Kind = "bcoo", *, max_density: float = 0.5) -> PyTree:
    """Replaces pruned leaves by sparse arrays of jax.

    They multiply like the arrays that they stand for: `x @ m` and `m @ x` for BCOO, `m @ x` for
    BCSR. Gradients are with respect to the values, so pruned weights stay at zero.

    Args:
      tree: Pytree of arrays. Floating leaves of two or more dimensions become sparse, for "bcsr"
        those of exactly two, and low-bit leaves as what `dequantize` makes of them.
      kind: "bcoo" or "bcsr".
      max_density: Largest fraction of entries other than 0 that a sparse leaf may have, at least
        0. Other leaves stay as they are. A float32 matrix of a density of 1/2 takes as many bytes
        in BCSR as it does dense, and 1.5 times as many in BCOO.

    Returns:
      A tree of the same structure with `BCOO` or `BCSR` nodes for these leaves. Values have the
      dtype of the leaf, indices are int32, sorted and unique; -0.0 is a 0.

    Raises:
      TypeError: If a leaf is traced, because the number of values is a shape.
      ValueError: If `kind` or `max_density` is not allowed, or a leaf is partly on other processes.

    Example:
      >>> from jaxclip import sparsity
      >>> kernel = jnp.arange(-8.0, 8.0).reshape(4, 4)
      >>> pruned = sparsity.prune({"kernel": kernel}, 1 / 4)
      >>> converted = to_jax_sparse(pruned)
      >>> converted["kernel"]
      BCOO(float32[4, 4], nse=4)
      >>> x = jnp.ones((2, 4))
      >>> bool(jnp.array_equal(x @ converted["kernel"], x @ pruned["kernel"]))
      True
      >>> bool(jnp.array_equal(from_jax_sparse(converted)["kernel"], pruned["kernel"]))
      True
    """
    checks.check_choice("kind", kind, ("bcoo", "bcsr"))
    checks.check_threshold("max_density", max_density)

    def convert(path: tuple, leaf: PyTree) -> PyTree:
        ndim = jnp.ndim(leaf)
        is_in = ndim >= 2 if kind == "bcoo" else ndim == 2
        if not is_in or not jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            return leaf
        name = path_name(path)
        for part in jax.tree.leaves(leaf):
            check_has_values(name, part)
        array = np.asarray(dequantize(leaf) if is_quantized(leaf) else leaf)
        is_value = array != 0
        if np.count_nonzero(is_value) > max_density * array.size:
            return leaf
        return _sparse_array(array, is_value, kind)

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=is_quantized)


def from_jax_sparse(tree: PyTree) -> PyTree:
    """Replaces the sparse arrays of jax in a tree by the dense arrays that they stand for.

    Args:
      tree: Pytree with nodes of `jax.experimental.sparse`.

    Returns:
      A tree with an array for each of these nodes, for `compress` or `checkpoints.save`.

    Example:
      >>> from jax.experimental import sparse
      >>> from_jax_sparse({"kernel": sparse.BCOO.fromdense(jnp.eye(2))})
      {'kernel': Array([[1., 0.],
             [0., 1.]], dtype=float32)}
    """

    from jax.experimental import sparse  # on use: it is slow to import

    def is_sparse(node: PyTree) -> bool:
        return isinstance(node, sparse.JAXSparse)

    return jax.tree.map(lambda x: x.todense() if is_sparse(x) else x, tree, is_leaf=is_sparse)


def _sparse_array(array: np.ndarray, is_value: np.ndarray, kind: Kind) -> PyTree:
    from jax.experimental import sparse

    places = np.nonzero(is_value)
    values, shape = jnp.asarray(array[places]), array.shape
    options = {"indices_sorted": True, "unique_indices": True}
    if kind == "bcoo":
        indices = jnp.asarray(np.stack(places, axis=-1).astype(np.int32))
        return sparse.BCOO((values, indices), shape=shape, **options)
    starts = np.concatenate([[0], np.cumsum(is_value.sum(axis=1))])
    columns, starts = (jnp.asarray(x.astype(np.int32)) for x in (places[1], starts))
    return sparse.BCSR((values, columns, starts), shape=shape, **options)
