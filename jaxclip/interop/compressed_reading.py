"""Files of compressed-tensors as trees: packed codes stay codes, 2:4 sparse weights become dense.

weight_packed, weight_scale, weight_shape, weight_zero_point      pack-quantized
weight (int8), weight_scale, weight_zero_point                    int-quantized, naive-quantized
compressed, bitmask, shape                                        sparse-24-bitmask
"""

import os
from typing import Any

import numpy as np

from jaxclip._core.grids import Bits, Grid
from jaxclip.interop.layers import (
    Layer,
    Tensors,
    layer_part,
    layer_scale,
    read_layers,
    without_zero_scales,
)
from jaxclip.lowbit.arrays import QuantizedArray

# Codes a word of int32 of each width; 5 and 6 bits leave bits unused.
_CODES_PER_WORD: dict[Bits, int] = {2: 16, 3: 10, 4: 8, 5: 6, 6: 5, 8: 4}


def from_compressed_tensors(
    path: str | os.PathLike,
) -> dict[str, np.ndarray | QuantizedArray]:
    """Reads the weights of a file or folder of compressed-tensors, with their codes.

    Matrices of pack-quantized and of int-quantized layers become low-bit leaves that stand for the
    same numbers, those of sparse-24-bitmask plain arrays. All other tensors stay as they are.
    The width of packed codes follows from the shapes, and is 4 or 8 bits where few inputs leave a
    choice; no `config.json` is read.

    Args:
      path: File or folder that `checkpoints.load` takes.

    Returns:
      A dict by the names that the weights had before: `layer.weight` for `layer.weight_packed`, and
      for `layer.compressed`. Arrays are NumPy's. Low-bit leaves have the dtype of their scales.

    Raises:
      CheckpointError: If the file is damaged; if parts of a layer are missing, or have shapes or
        values that do not fit; if a layer is of a kind that no grid holds: float8 codes with
        scales, or codes ordered by activations (`weight_g_idx`). The message names the tensor.
      OSError: If there is no file, or the disk fails.

    Example:
      >>> import tempfile
      >>> from jaxclip import Grid, compress, interop
      >>> small = compress({"layer": {"weight": np.ones((4, 64))}}, Grid(4, axis=0, group_size=32))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = interop.to_compressed_tensors(folder + "/model.safetensors", small)
      ...     from_compressed_tensors(folder)
      {'layer.weight': QuantizedArray(shape=(4, 64), dtype=float32, bits=4, num_bytes=160)}

    References:
      The compressed-tensors package, https://github.com/vllm-project/compressed-tensors
    """
    return read_layers(path, _layer)


def _layer(name: str, tensors: Tensors) -> Layer | None:
    """Returns the layer that a tensor tells."""
    weight = name.removesuffix("_packed")
    if weight != name and name.endswith("weight_packed"):
        return Layer(weight, _packed(weight, tensors), _parts(weight, tensors) | {name})
    if name.endswith("weight") and f"{name}_scale" in tensors:
        return Layer(name, _unpacked(name, tensors), _parts(name, tensors) | {name})
    module = name.removesuffix("compressed")
    if module != name and f"{module}bitmask" in tensors:
        parts = {f"{module}{part}" for part in ("compressed", "bitmask", "shape")}
        return Layer(f"{module}weight", _sparse(module, tensors), parts)
    return None


def _parts(weight: str, tensors: Tensors) -> set[str]:
    names = {f"{weight}_{part}" for part in ("scale", "shape", "zero_point")}
    return names & tensors.keys()


def _packed(weight: str, tensors: Tensors) -> QuantizedArray:
    """Returns a matrix of packed codes."""
    if f"{weight}_g_idx" in tensors:
        raise ValueError("has codes in the order of activations (weight_g_idx), which no grid has.")
    words = layer_part(f"{weight}_packed", tensors, "int32", 2)
    shape = layer_part(f"{weight}_shape", tensors, "int64", 1)
    if shape.shape != (2,):
        raise ValueError(f"must have two dimensions in {weight}_shape, got {shape.tolist()}.")
    rows, columns = map(int, shape)
    widths: list[Bits] = [
        b for b, n in _CODES_PER_WORD.items() if -(-columns // n) == words.shape[1]
    ]
    if len(widths) > 1:  # of few columns
        widths = [b for b in widths if b in (4, 8)]
    if rows != len(words) or len(widths) != 1:
        raise ValueError(
            f"has shape {words.shape}, which holds ({rows}, {columns}) codes at "
            f"{'no width' if not widths else 'more than one width'}."
        )
    bits = widths[0]
    codes = _codes_of_words(words, bits, columns)
    zero = None
    if f"{weight}_zero_point" in tensors:
        zero_words = layer_part(f"{weight}_zero_point", tensors, "int32", 2)
        zero = _codes_of_words(zero_words.T, bits, rows).T
    return _low_bit(weight, codes, zero, tensors, bits)


def _unpacked(weight: str, tensors: Tensors) -> QuantizedArray:
    """Returns a matrix with a code an entry."""
    codes = layer_part(weight, tensors, "int8", 2)
    zero = tensors.get(f"{weight}_zero_point")
    if zero is not None and not np.any(zero):
        zero = None  # as symmetric schemes write it
    return _low_bit(weight, codes, zero, tensors, 8)


def _low_bit(
    weight: str, codes: np.ndarray, zero: np.ndarray | None, tensors: Tensors, bits: Bits
) -> QuantizedArray:
    """Returns codes with the scales of a layer as a low-bit array."""
    rows, columns = codes.shape
    scale = layer_scale(weight, tensors)
    scale = scale.reshape(1, 1) if scale.size == 1 else scale
    num_groups = scale.shape[1] if scale.ndim == 2 else 0
    if scale.ndim != 2 or len(scale) not in (1, rows) or not num_groups or columns % num_groups:
        raise ValueError(f"has scales of shape {scale.shape} for a matrix {codes.shape}.")
    scale = np.broadcast_to(scale, (rows, num_groups))
    if zero is not None:
        zero = np.broadcast_to(np.asarray(zero).astype(np.int8), scale.shape)
        zero, _ = without_zero_scales(zero, scale)
    groups = codes.reshape(rows, num_groups, columns // num_groups)
    groups, scale = without_zero_scales(groups, scale[..., None])
    codes, scale = groups.reshape(codes.shape), scale[..., 0]
    group_size = None if num_groups == 1 else columns // num_groups
    grid = Grid(
        bits,
        axis=-2,
        group_size=group_size,
        zero_point=zero is not None,
        scale_dtype=scale.dtype,
    )
    parts: dict[str, Any] = {"qvalue": codes, "scale": scale, "zero": zero}
    leaf = QuantizedArray(grid=grid, dtype=scale.dtype, **parts)
    leaf.validate(weight)
    return leaf


def _codes_of_words(words: np.ndarray, bits: Bits, count: int) -> np.ndarray:
    """Returns codes (rows, count) from int32 words, the first code in the lowest bits."""
    assert isinstance(bits, int)
    per_word = _CODES_PER_WORD[bits]
    if words.shape[1] != -(-count // per_word):
        raise ValueError(f"has zero points of {words.shape[1]} words for {count} outputs.")
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    unsigned = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts
    unsigned = (unsigned & np.uint32(2**bits - 1)).reshape(len(words), -1)[:, :count]
    return (unsigned.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)


def _sparse(module: str, tensors: Tensors) -> np.ndarray:
    """Returns a 2:4 sparse matrix with its zeros."""
    values = np.asarray(tensors[f"{module}compressed"])
    mask = layer_part(f"{module}bitmask", tensors, "uint8", 2)
    shape = tuple(map(int, np.ravel(layer_part(f"{module}shape", tensors, "int64", None))))
    if len(shape) != 2 or mask.shape != (shape[0], -(-shape[1] // 8)):
        raise ValueError(f"has a bitmask of shape {mask.shape} for a matrix {shape}.")
    is_value = np.unpackbits(mask, axis=1, bitorder="little")[:, : shape[1]].view(bool)
    if np.count_nonzero(is_value) != values.size:
        raise ValueError(
            f"has {values.size} values, but {np.count_nonzero(is_value)} bits in its bitmask."
        )
    array = np.zeros(shape, values.dtype)
    array[is_value] = np.ravel(values)
    return array
