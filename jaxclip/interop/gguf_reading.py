"""GGUF files as trees: blocks that a grid holds keep their codes."""

import os
from typing import Any

import ml_dtypes
import numpy as np

from jaxclip._core import extras
from jaxclip._core.grids import Bits, Grid
from jaxclip.checkpoints.reading import CheckpointError
from jaxclip.interop.gguf_packing import ON_GRIDS, unpack_blocks
from jaxclip.interop.layers import without_zero_scales
from jaxclip.lowbit.arrays import QuantizedArray

_BITS: dict[str, Bits] = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8, "TQ1_0": "ternary", "TQ2_0": "ternary"}
_PLAIN = ("F16", "F32", "F64", "I8", "I16", "I32", "I64")


def from_gguf(path: str | os.PathLike) -> dict[str, np.ndarray | QuantizedArray]:
    """Reads the tensors of a GGUF file, with the codes of blocks that a grid holds.

    Tensors of type Q4_0, Q5_0, Q8_0, TQ1_0 and TQ2_0 become low-bit leaves, which stand for the
    same numbers: blocks are groups of 32 or 256 along the last axis, with scales in float16. All
    other blocks, such as Q4_1 and Q6_K, are decoded to float32 by the gguf package. F32, F16,
    BF16, F64 and integers keep their dtype.

    Args:
      path: File to read.

    Returns:
      A dict by the names in the file, for `compress`, `decompress`, `checkpoints.save` and
      `to_gguf`. Shapes are those of the rows in memory: (outputs, inputs) in llama.cpp's models.

    Raises:
      ImportError: If the gguf package is not installed; the message names the extra.
      FileNotFoundError: If there is no file.
      CheckpointError: If the file is damaged or no GGUF file, a scale is NaN or infinite, or the
        gguf package cannot decode a type; the message names the tensor and the type.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxclip.interop import to_gguf
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "net.gguf")
      ...     to_gguf(path, {"output.weight": np.ones((4, 64))}, "llama", kind="Q8_0")
      ...     from_gguf(path)
      {'Q8_0': 1}
      {'output.weight': QuantizedArray(shape=(4, 64), dtype=float32, bits=8, num_bytes=272)}

    References:
      The GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    gguf = extras.import_extra("gguf", "gguf")
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path!r}.")
    try:
        tensors = gguf.GGUFReader(path).tensors
    except Exception as error:  # whatever NumPy and the package raise for bytes of other kinds
        raise CheckpointError(f"{path!r} cannot be read as GGUF: {error}") from error
    return {tensor.name: _leaf(gguf, path, tensor) for tensor in tensors}


def _leaf(gguf: Any, path: str, tensor: Any) -> np.ndarray | QuantizedArray:
    """Returns a tensor of the gguf package as a leaf."""
    kind = tensor.tensor_type.name
    shape = tuple(int(n) for n in reversed(tensor.shape))
    where = f"{path!r}: tensor {tensor.name!r} of type {kind}"
    if kind in _PLAIN:
        return np.array(tensor.data).reshape(shape)  # a copy, because the file may go
    if kind == "BF16":
        return np.array(tensor.data).view(ml_dtypes.bfloat16).reshape(shape)
    if kind in ON_GRIDS:
        return _low_bit(where, np.array(tensor.data), kind, shape)
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    except NotImplementedError as error:
        raise CheckpointError(f"{where} cannot be decoded by the gguf package.") from error


def _low_bit(where: str, data: np.ndarray, kind: str, shape: tuple[int, ...]) -> QuantizedArray:
    """Returns blocks as a low-bit array."""
    form = ON_GRIDS[kind]
    codes, scale = unpack_blocks(data.reshape(-1, form.num_bytes), kind)
    if not np.all(np.isfinite(scale)):
        raise CheckpointError(f"{where} has a scale that is NaN or infinite.")
    if codes.min(initial=form.low) < form.low or codes.max(initial=form.high) > form.high:
        raise CheckpointError(f"{where} has codes outside of {form.low}..{form.high}.")
    codes, scale = without_zero_scales(codes, scale)
    axis = tuple(range(-len(shape), -1)) or None
    grid = Grid(_BITS[kind], axis=axis, group_size=form.size, scale_dtype="float16")
    qvalue: Any = codes.reshape(shape)  # NumPy's, as from `checkpoints.load`
    block_scale: Any = scale.reshape(*shape[:-1], -1)
    return QuantizedArray(qvalue, block_scale, grid, np.dtype(np.float32))
