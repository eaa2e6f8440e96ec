"""Leaves as named tensors for a file of another library, each made when its turn comes.

A leaf is in memory, or on disk and read when it is needed; its shapes are known before.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip.checkpoints.format import layout
from jaxclip.checkpoints.reading import Source
from jaxclip.lowbit.arrays import QuantizedArray, dequantize, is_quantized


class NamedLeaf(NamedTuple):
    """A leaf under the name that it will have.

    Attributes:
      name: The name.
      outline: The leaf, or the same with shapes for arrays.
      read: Returns the leaf with its values.
    """

    name: str
    outline: Any
    read: Callable[[], Any]

    @property
    def is_low_bit(self) -> bool:
        """Whether it has codes."""
        return is_quantized(self.outline)


class ExportTensor(NamedTuple):
    """A tensor before it is written.

    Attributes:
      shape: Its shape.
      dtype: Its dtype.
      make: Returns its values, a NumPy array of that shape and dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def named_leaves(tree: Any, separator: str) -> dict[str, NamedLeaf]:
    """Returns the leaves of a tree by name, after a look at their values.

    Args:
      tree: Pytree of arrays and `QuantizedArray`.
      separator: What joins the keys of nested trees to a name.

    Returns:
      A dict in the order of the tree; a tree that is one leaf has the name "array".

    Raises:
      TypeError: If a leaf is no array, or is traced or abstract.
      ValueError: If two leaves have the same name, a leaf lies on other processes, or the
        parts of a low-bit leaf do not fit.

    Example:
      >>> list(named_leaves({"layers": [{"weight": np.zeros(2)}]}, "."))
      ['layers.0.weight']
    """
    leaves = _by_name(tree, separator)
    for name, leaf in leaves.items():
        for part in jax.tree.leaves(leaf):  # codes, scales and zeros of a low-bit leaf
            layout.check_leaf(name, part)
            layout.check_has_values(name, part)
        if is_quantized(leaf):
            leaf.check_parts(name)
            leaf.check_values(name)
    return {name: NamedLeaf(name, leaf, lambda x=leaf: x) for name, leaf in leaves.items()}


def stored_leaves(source: Source, separator: str) -> dict[str, NamedLeaf]:
    """Returns the leaves of a file by name, each read when it is asked for.

    Args:
      source: An open source; reading checks values. The leaf that was read last is kept.
      separator: As in `named_leaves`; names in files of other libraries stay as they are.

    Raises:
      ValueError: If two leaves have the same name.

    Example:
      >>> leaves = {"w": jax.ShapeDtypeStruct((2,), np.int8)}
      >>> source = Source(leaves, lambda name: np.zeros(2, np.int8), {"w": 2})
      >>> stored_leaves(source, ".")["w"].read()
      array([0, 0], dtype=int8)
    """
    last: list[tuple[str, Any]] = []

    def read(stored: str) -> Any:
        if not last or last[0][0] != stored:
            last.clear()  # before the next is read: one leaf bounds the memory
            last.append((stored, source.read(stored)))
        return last[0][1]

    names = _by_name(source.restore(lambda name: name), separator)
    return {
        name: NamedLeaf(name, source.leaves[stored], functools.partial(read, stored))
        for name, stored in names.items()
    }


def _by_name(tree: Any, separator: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized):
        name = jax.tree_util.keystr(path, simple=True, separator=separator) or "array"
        if name in leaves:
            raise ValueError(
                f"two leaves have the name '{name}' when keys are joined by {separator!r}."
            )
        leaves[name] = leaf
    return leaves


def plain_tensor(leaf: NamedLeaf, dtype: np.dtype | None = None) -> ExportTensor:
    """Returns the tensor of a leaf's values, dequantized if it is low-bit.

    Args:
      leaf: An array or `QuantizedArray`.
      dtype: Floating dtype of the values if they are floating; None for the leaf's own.

    Returns:
      An `ExportTensor`. Its `make` raises ValueError if a finite entry is not finite in
      `dtype`.

    Example:
      >>> leaf = named_leaves({"w": np.array([1, 2])}, ".")["w"]
      >>> tensor = plain_tensor(leaf, np.dtype(np.float16))
      >>> tensor.dtype, tensor.make()
      (dtype('int64'), array([1, 2]))
    """
    is_floating = jnp.issubdtype(leaf.outline.dtype, jnp.floating)
    own = jnp.dtype(leaf.outline.dtype) if is_floating else leaf.outline.dtype
    target = dtype if dtype is not None and is_floating else own
    if isinstance(target, np.dtype) and not target.isnative:
        target = target.newbyteorder("=")

    def make() -> np.ndarray:
        if leaf.is_low_bit:
            # jax has float64 only where that is switched on; the product is float32 anyway.
            values = dequantize(leaf.read(), target if target.itemsize <= 4 else jnp.float32)
            return np.asarray(values).astype(target, copy=False)
        return cast(leaf.name, np.asarray(leaf.read()), target)

    return ExportTensor(tuple(leaf.outline.shape), target, make)


def cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns an array in another dtype, or raises if that loses a finite value.

    Args:
      name: What to call the array in errors.
      array: NumPy array.
      dtype: Dtype of the result.

    Returns:
      A NumPy array.

    Raises:
      ValueError: If a finite entry is not finite in `dtype`.

    Example:
      >>> cast("w", np.array([1e6]), np.dtype(np.float16))
      Traceback (most recent call last):
      ValueError: 'w' has an entry that is not finite in float16: 1000000.0.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(result)
    if np.any(lost):
        raise ValueError(f"'{name}' has an entry that is not finite in {dtype}: {array[lost][0]}.")
    return result


def codes_of(name: str, leaf: QuantizedArray) -> np.ndarray:
    """Returns the codes of a low-bit leaf, or raises if one is outside its grid.

    Args:
      name: The leaf's name, for the message.
      leaf: A low-bit array.

    Returns:
      int8, in the array's shape.

    Raises:
      ValueError: If a code is outside `code_range(bits, levels)`.

    Example:
      >>> from jaxclip.lowbit.quantizer import quantize
      >>> codes_of("w", quantize(jnp.array([0.5, -0.5]), 1))
      array([ 1, -1], dtype=int8)
    """
    codes = np.asarray(leaf.qvalue).astype(np.int8)
    leaf.check_codes(codes, name)
    return codes


def has_grid_within(leaf: QuantizedArray, lowest: int, highest: int) -> bool:
    """Whether all codes that the grid of a low-bit leaf has lie in a range.

    Args:
      leaf: A low-bit array; shapes suffice.
      lowest: The least code of the range.
      highest: The greatest.

    Returns:
      A bool.

    Example:
      >>> from jaxclip.lowbit.quantizer import quantize
      >>> has_grid_within(quantize(jnp.array([0.5, -0.5]), 5), -8, 7)
      False
    """
    low, high = leaf.grid.code_range
    return lowest <= low and high <= highest
