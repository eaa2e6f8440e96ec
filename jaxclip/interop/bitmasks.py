"""The sparse-24-bitmask layout of compressed-tensors: a 2:4 sparse matrix as three tensors.

    compressed   float    (outputs, inputs / 2), two values of every four inputs
    bitmask      uint8    (outputs, ceil(inputs / 8)), a bit for each input, the first the lowest
    shape        int64    (2, 1), outputs and inputs

In a group with fewer than two values the first zeros take their places.
"""

import math

import jax.numpy as jnp
import numpy as np

from jaxclip.interop.destination import Destination, JsonObject
from jaxclip.interop.leaves import ExportTensor, NamedLeaf, plain_tensor

_CHUNK = 2**20  # groups that are looked at together, which bounds memory


def write_sparse(
    destination: Destination,
    leaves: dict[str, NamedLeaf],
    dtype: np.dtype | None,
    separator: str,
) -> JsonObject:
    """Writes 2:4 sparse matrices as masks and values; returns the `quantization_config`."""
    tensors: dict[str, dict[str, ExportTensor]] = {}
    ignored = []
    num_entries = num_left_out = 0
    for name, leaf in leaves.items():
        if leaf.is_low_bit:
            raise ValueError(
                "sparse-24-bitmask holds floats, because no reader takes masks and codes from one "
                f"file: decompress leaf {name!r} first."
            )
        shape = leaf.outline.shape
        module = name.removesuffix(f"{separator}weight")
        if module != name and is_two_of_four(leaf):
            tensors[name] = _bitmask_tensors(leaf, f"{module}{separator}", dtype)
            num_left_out += math.prod(shape) // 2
        else:
            tensors[name] = {name: plain_tensor(leaf, dtype)}
            ignored += [module] if module != name and len(shape) == 2 else []
        num_entries += math.prod(shape)
    if not num_left_out:
        raise ValueError(
            "no leaf is 2:4 sparse: it must be a floating matrix (outputs, inputs) whose name ends "
            f"in {separator + 'weight'!r}, with at most two of every four inputs other than 0."
        )
    config = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "targets": ["Linear"],
            "ignore": ignored,
            "global_sparsity": num_left_out / num_entries,
            "sparsity_structure": "2:4",
        },
    }
    destination.write(tensors, config)
    return config


def is_two_of_four(leaf: NamedLeaf) -> bool:
    """Returns True for a floating matrix with at most two values of every four inputs."""
    shape = tuple(leaf.outline.shape)
    is_matrix = len(shape) == 2 and shape[1] % 4 == 0 and 0 not in shape
    if not is_matrix or not jnp.issubdtype(leaf.outline.dtype, jnp.floating):
        return False
    groups = np.asarray(leaf.read()).reshape(-1, 4)
    pieces = (groups[i : i + _CHUNK] != 0 for i in range(0, len(groups), _CHUNK))
    return all(piece.sum(axis=1).max() <= 2 for piece in pieces)


def _bitmask_tensors(
    leaf: NamedLeaf, prefix: str, dtype: np.dtype | None
) -> dict[str, ExportTensor]:
    num_rows, num_columns = leaf.outline.shape
    whole = plain_tensor(leaf, dtype)

    def make_compressed() -> np.ndarray:
        array = whole.make()  # in its dtype, in which small values may have become 0
        return array[two_of_four(array)].reshape(num_rows, -1)

    def make_bitmask() -> np.ndarray:
        return np.packbits(two_of_four(whole.make()), axis=-1, bitorder="little")

    def make_shape() -> np.ndarray:
        return np.array([[num_rows], [num_columns]])

    int64, uint8 = np.dtype(np.int64), np.dtype(np.uint8)
    values_shape, bytes_shape = (num_rows, num_columns // 2), (num_rows, -(-num_columns // 8))
    return {
        f"{prefix}compressed": ExportTensor(values_shape, whole.dtype, make_compressed),
        f"{prefix}bitmask": ExportTensor(bytes_shape, uint8, make_bitmask),
        f"{prefix}shape": ExportTensor((2, 1), int64, make_shape),
    }


def two_of_four(array: np.ndarray) -> np.ndarray:
    """Returns the mask of exactly two of every four entries, among them all that are not 0."""
    is_value = array.reshape(-1, 4) != 0
    num_missing = 2 - is_value.sum(axis=1, keepdims=True)
    is_filled = ~is_value & (np.cumsum(~is_value, axis=1) <= num_missing)
    return (is_value | is_filled).reshape(array.shape)
