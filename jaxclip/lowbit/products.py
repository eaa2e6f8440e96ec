"""Products with low-bit matrices, decoded a tile at a time.

    x @ w = sum_k x[:, tile_k] @ w[tile_k],    w[tile_k] = scale * (codes[tile_k] - zero)

The whole matrix would take four bytes a weight, and the time to write and read them.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.typing import ArrayLike

from jaxclip._core.dense_methods import DenseMethods
from jaxclip._core.floats import compute_dtype
from jaxclip._core.trees import PyTree

# Measured by benchmarks/lowbit/matmul.py: a tile of 2 MB in float32 stays in the cache of a core's
# neighbours, and products of fewer rows are slow where the other factor has many.
_TILE_ENTRIES, _FEWEST_ROWS = 2**19, 256


class Tileable(Protocol):
    """A low-bit array that can be decoded in parts; jax takes it for the array."""

    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        ...

    def can_be_cut(self, axis: int, size: int) -> bool:
        """Returns True if parts of so many entries along an axis have whole bytes and blocks."""
        ...

    def part(self, axis: int, start: jax.Array, size: int) -> DenseMethods:
        """Returns the entries of a matrix from `start` on along an axis."""
        ...

    def as_stack(self) -> PyTree:
        """Returns the array for `lax.map` over its first axis; None if blocks run along it."""
        ...


def matmul(x: ArrayLike, y: ArrayLike) -> jax.Array:
    """Multiplies with a low-bit matrix, which is decoded a tile at a time.

    The result is that of `jnp.matmul(x, dequantize(q))`, up to the order of additions. Temporary
    memory is a tile, and copies of the other factor and of the result. A tile is about 2 MB in
    float32. It is larger if the shorter side of the matrix has more than 2,048 entries, or `x` more
    than 256 rows. `q @ y` is the same. But `x @ q` of an array `x` decodes all of `q`, because
    jax and NumPy evaluate it: write `matmul(x, q)`.

    Args:
      x: Array, or a `QuantizedArray`, packed or not; of shape (..., n, k) or (k,).
      y: Array, or a `QuantizedArray`; of shape (..., k, m) or (k,).

    Returns:
      The product, in the shape and dtype of `jnp.matmul`, added up in float32 at least. It has
      derivatives with respect to the other factor and to scales, and works under vmap and sharded.
      Whole arrays are decoded for low-bit vectors, for groups that run along several axes of a
      matrix or through a stack of matrices, and on Explicit meshes.

    Raises:
      ValueError: If the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxclip import quantize
      >>> q = quantize(jnp.array([[2.0, -2.0], [0.0, -2.0]]), "ternary", threshold=2.0)
      >>> matmul(jnp.ones(2), q.packed())
      Array([ 2., -4.], dtype=float32)
    """
    if isinstance(y, DenseMethods):
        return _right(jnp.asarray(x), y)
    if isinstance(x, DenseMethods):
        return _left(jnp.asarray(y), x)
    return jnp.matmul(x, y)


def _right(x: jax.Array, q: DenseMethods) -> jax.Array:
    """Returns `x @ q`."""
    _check_shapes(x.shape, q.shape)
    if q.ndim > 2 and (stack := _stack_of(q, x)) is not None:
        return _of_stack(x, stack, q.shape[0], q.ndim, _right)
    if q.ndim != 2 or _is_decoded_whole(q, x):
        return jnp.matmul(x, q)
    product = _by_tiles(x.reshape(-1, x.shape[-1]), q, False)
    return product.reshape(*x.shape[:-1], q.shape[1])


def _left(y: jax.Array, q: DenseMethods) -> jax.Array:
    """Returns `q @ y`."""
    _check_shapes(q.shape, y.shape)
    if q.ndim > 2 and (stack := _stack_of(q, y)) is not None:
        return _of_stack(y, stack, q.shape[0], q.ndim, _left)
    if q.ndim != 2 or _is_decoded_whole(q, y):
        return jnp.matmul(q, y)
    if y.ndim == 1:
        return _by_tiles(y[:, None], q, True)[:, 0]
    columns = jnp.moveaxis(y, -2, 0)
    product = _by_tiles(columns.reshape(len(columns), -1), q, True)
    return jnp.moveaxis(product.reshape(len(product), *columns.shape[1:]), 0, -2)


def _check_shapes(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    if not (left and right) or left[-1] != right[-2:][0]:
        raise ValueError(
            "matmul must have as many entries along the last axis of the first factor as along the "
            f"last but one (or the only one) of the second, got shapes {left} and {right}."
        )


def _is_decoded_whole(q: DenseMethods, other: jax.Array) -> bool:
    """Returns True for a matrix of one tile, and on Explicit meshes, which forbid cutting."""
    meshes = (jax.typeof(array).sharding.mesh for array in (other, *jax.tree.leaves(q)))
    return q.size <= _TILE_ENTRIES or any(AxisType.Explicit in m.axis_types for m in meshes)


def _stack_of(q: DenseMethods, other: jax.Array) -> PyTree:
    """Returns the matrices of a stack for `lax.map`; None if they are decoded all at once."""
    return None if _is_decoded_whole(q, other) else cast(Tileable, q).as_stack()


def _of_stack(
    other: jax.Array,
    stack: PyTree,
    length: int,
    ndim: int,
    product: Callable[[jax.Array, DenseMethods], jax.Array],
) -> jax.Array:
    """Returns the products with the matrices of a stack, as `jnp.matmul` broadcasts them."""
    # Recomputed for derivatives, so that no matrix is kept.
    product = jax.checkpoint(product)
    if other.ndim < ndim:
        return lax.map(lambda q: product(other, q), stack)
    axis = other.ndim - ndim
    others = jnp.moveaxis(other, axis, 0)
    if len(others) == 1:
        products = lax.map(lambda q: product(others[0], q), stack)
    elif length == 1:
        products = product(others, jax.tree.map(lambda part: part[0], stack))
    elif length == len(others):
        products = lax.map(lambda pair: product(*pair), (others, stack))
    else:
        raise ValueError(
            f"matmul must have stacks of equal length, or of length 1, got {length} low-bit "
            f"matrices and {len(others)} others."
        )
    return jnp.moveaxis(products, 0, axis)


# Compiled, because single operations are much slower.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _by_tiles(x: jax.Array, q: DenseMethods, is_left: bool) -> jax.Array:
    """Returns `q @ x` if the low-bit matrix is on the left, or else `x @ q`, of a matrix `x`."""
    dtype = jnp.result_type(x, jax.dtypes.canonicalize_dtype(q.dtype))
    wide = compute_dtype(dtype)
    x, tileable = x.astype(dtype), cast(Tileable, q)
    # The axis of `q` that is summed over; that of `x`, where the result has the other axis of `q`.
    summed, along = int(is_left), int(not is_left)
    axis = int(4 * q.shape[0] < q.shape[1])  # rows lie together in memory; but not of long ones
    size, length = _tile_size(tileable, axis, x.shape[summed]), q.shape[axis]
    count, rest = divmod(length, size)
    starts, stop = jnp.arange(count, dtype=jnp.uint32) * np.uint32(size), count * size

    # Recomputed for derivatives: else the loop would keep all tiles, the whole matrix.
    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
    def product(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
        tile = jnp.asarray(tileable.part(axis, start, size)).astype(dtype)
        factors = (tile, x) if is_left else (x, tile)
        return lax.dot(*factors, preferred_element_type=wide)

    if axis == summed:

        def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return total + product(*part, size), None

        parts = lax.slice_in_dim(x, 0, stop, axis=along)
        parts = parts.reshape(*x.shape[:along], count, size, *x.shape[along + 1 :])
        shape = (q.shape[0], x.shape[1]) if is_left else (x.shape[0], q.shape[1])
        result = jnp.zeros(shape, wide)
        result, _ = lax.scan(add, result, (jnp.moveaxis(parts, along, 0), starts))
        if rest:
            part = lax.slice_in_dim(x, stop, length, axis=along)
            result = result + product(part, jnp.uint32(stop), rest)
        return result.astype(dtype)
    results = lax.map(lambda start: product(x, start, size).astype(dtype), starts)
    shape = (stop, x.shape[1]) if is_left else (x.shape[0], stop)
    result = jnp.moveaxis(results, 0, along).reshape(shape)
    if rest:
        last = product(x, jnp.uint32(stop), rest).astype(dtype)
        result = jnp.concatenate([result, last], axis=along)
    return result


def _tile_size(q: Tileable, axis: int, batch: int) -> int:
    """Returns the entries along an axis that are decoded at a time."""
    length = q.shape[axis]
    wanted = max(_TILE_ENTRIES // q.shape[1 - axis], _FEWEST_ROWS, batch)
    if wanted >= length:
        return length
    sizes = (*range(wanted, wanted // 2, -1), *range(wanted + 1, length))
    return next((size for size in sizes if q.can_be_cut(axis, size)), length)
