"""The pack-quantized layout of compressed-tensors: what a low-bit matrix becomes in it.

    weight_packed   int32    code + 2**(num_bits - 1), the first in the lowest bits of a word
    weight_scale    float    (outputs, 1), or (outputs, groups)
    weight_shape    int64    (outputs, inputs)

A weight is `scale * code`. A grid with a zero point adds, for `scale * (code - zero)`,

    weight_zero_point   int32    zero + 2**(num_bits - 1), packed along the outputs

and has no negative scales.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxclip.exports import ExportTensor, NamedLeaf, cast, codes_of, has_grid_within
from jaxclip.packing import pack_codes

__all__ = ["Scheme", "pack_leaf", "quantization_config"]

# Codes packed at once, which bounds memory.
_CHUNK = 2**20


class Scheme(NamedTuple):
    """How a matrix is packed.

    Attributes:
      num_bits: 4 or 8.
      group_size: Inputs that share a scale; None for one scale an output.
      has_zero_point: Whether its grids have zero points.
    """

    num_bits: int
    group_size: int | None
    has_zero_point: bool


def pack_leaf(
    stored: NamedLeaf, dtype: np.dtype | None = None
) -> tuple[dict[str, ExportTensor], Scheme]:
    """Returns the tensors of a low-bit leaf, and its scheme.

    Args:
      stored: Its name, which must end in "weight", and a matrix (outputs, inputs) with a scale for
        it, for each output, or for each group of inputs.
      dtype: Floating dtype of the scales; None for float32.

    Returns:
      `{name_packed, name_scale, name_shape}` as `ExportTensor`s, and `name_zero_point` if the
      grids have one; and the scheme.

    Raises:
      ValueError: If the name, shape or granularity is one that the layout has not.

    Example:
      >>> from jaxclip.exports import named_leaves
      >>> from jaxclip.quantization import quantize
      >>> q = quantize(np.ones((4, 64), np.float32), 4, axis=0, group_size=32)
      >>> leaves = named_leaves({"proj.weight": q}, ".")
      >>> tensors, scheme = pack_leaf(leaves["proj.weight"])
      >>> [(name, t.shape) for name, t in tensors.items()]
      [('proj.weight_packed', (4, 8)), ('proj.weight_scale', (4, 2)), ('proj.weight_shape', (2,))]
      >>> scheme
      Scheme(num_bits=4, group_size=32, has_zero_point=False)
    """
    name, leaf = stored.name, stored.outline
    if not name.endswith("weight") or len(leaf.shape) != 2:
        raise ValueError(
            f"leaf '{name}' has codes, so it must be a matrix whose name ends in 'weight', got "
            f"shape {leaf.shape}."
        )
    (rows, columns), granularity = leaf.shape, leaf.granularity
    group_size = None
    if granularity.group_axis(2) == 1:
        group_size = min(int(granularity.group_size or columns), columns)
        group_size = None if group_size == columns else group_size
    if leaf.scale.shape[0] not in (1, rows) or 1 in granularity.channel_axes(2):
        raise ValueError(
            f"leaf '{name}' must be (outputs, inputs) with axis=0, or axis=0 and a group_size; "
            f"got axis={granularity.axis}. Transpose the matrix before it is compressed."
        )
    if columns % (group_size or 1):
        raise ValueError(
            f"leaf '{name}' has {columns} inputs, which must be a multiple of its "
            f"group_size={group_size}."
        )
    num_bits = 4 if has_grid_within(leaf, -8, 7) else 8
    scale_shape = (rows, columns // group_size if group_size else 1)
    scale_dtype = dtype or np.dtype(np.float32)

    def make_scale() -> np.ndarray:
        scale = np.asarray(stored.read().scale).astype(np.float32)
        scale = cast(f"{name}_scale", scale, scale_dtype)
        if not np.all(scale):
            raise ValueError(f"leaf '{name}' has a scale that is 0 in {scale_dtype}.")
        return np.broadcast_to(scale, scale_shape)

    packed_shape = (rows, -(-columns * num_bits // 32))
    parts = {
        f"{name}_packed": ExportTensor(
            packed_shape,
            np.dtype(np.int32),
            lambda: _packed_rows(codes_of(name, stored.read()), num_bits),
        ),
        f"{name}_scale": ExportTensor(scale_shape, scale_dtype, make_scale),
        f"{name}_shape": ExportTensor((2,), np.dtype(np.int64), lambda: np.array([rows, columns])),
    }

    def make_zero() -> np.ndarray:
        zero = np.broadcast_to(np.asarray(stored.read().zero), scale_shape)
        return _packed_rows(zero.T, num_bits).T

    if leaf.zero is not None:
        parts[f"{name}_zero_point"] = ExportTensor(
            (-(-rows * num_bits // 32), scale_shape[1]),
            np.dtype(np.int32),
            make_zero,
        )
    return parts, Scheme(num_bits, group_size, leaf.zero is not None)


def _packed_rows(codes: np.ndarray, num_bits: int) -> np.ndarray:
    """Codes as int32 words, each row filled up with zeros, the first code lowest."""
    padding = -codes.shape[1] % (32 // num_bits)
    # What packs to zeros is the lowest code.
    codes = np.pad(codes, ((0, 0), (0, padding)), constant_values=-(2 ** (num_bits - 1)))
    step = max(_CHUNK // max(codes.shape[1], 1), 1)
    words = [
        pack_codes(codes[i : i + step], num_bits).view("<i4") for i in range(0, len(codes), step)
    ]
    return np.concatenate([*words, np.empty(0, np.int32)]).reshape(len(codes), -1)


def quantization_config(schemes: dict[Scheme, list[str]], ignored: list[str]) -> dict[str, Any]:
    """Returns the value of `quantization_config` for a model's config.json.

    Args:
      schemes: The modules of each scheme that `pack_leaf` returned.
      ignored: Modules with a matrix that has no codes.

    Returns:
      A dict that JSON can hold.

    Example:
      >>> config = quantization_config({Scheme(4, None, False): ["proj"]}, ["embed"])
      >>> config["config_groups"]["group_0"]["targets"], config["ignore"]
      (['Linear'], ['embed'])
    """
    groups = {}
    for i, (scheme, modules) in enumerate(schemes.items()):
        groups[f"group_{i}"] = {
            # All linear layers that are not ignored, but for those that are named.
            "targets": modules if i else ["Linear"],
            "weights": {
                "num_bits": scheme.num_bits,
                "type": "int",
                "symmetric": not scheme.has_zero_point,
                "strategy": "group" if scheme.group_size else "channel",
                "group_size": scheme.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }
