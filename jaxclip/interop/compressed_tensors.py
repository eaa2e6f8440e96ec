"""The pack-quantized layout of compressed-tensors: what a low-bit matrix becomes in it.

    weight_packed   int32    code + 2**(num_bits - 1), the first in the lowest bits of a word
    weight_scale    float    (outputs, 1), or (outputs, groups)
    weight_shape    int64    (outputs, inputs)

A weight is `scale * code`. A grid with a zero point adds, for `scale * (code - zero)`,

    weight_zero_point   int32    zero + 2**(num_bits - 1), packed along the outputs

and has no negative scales.
"""

import os
from typing import Any, NamedTuple

import numpy as np

from jaxclip.interop.destination import _floating_dtype, _Place
from jaxclip.interop.leaves import (
    ExportTensor,
    NamedLeaf,
    cast,
    codes_of,
    has_grid_within,
    named_leaves,
    plain_tensor,
)
from jaxclip.lowbit.packing import pack_codes

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
      ValueError: If the name, shape or grid is one that the layout has not.

    Example:
      >>> from jaxclip.interop.leaves import named_leaves
      >>> from jaxclip.lowbit.quantizer import quantize
      >>> from jaxclip._core.grids import Grid
      >>> q = quantize(np.ones((4, 64), np.float32), Grid(4, axis=0, group_size=32))
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
    (rows, columns), grid = leaf.shape, leaf.grid
    group_size = None
    if grid.group_axis(2) == 1:
        group_size = min(int(grid.group_size or columns), columns)
        group_size = None if group_size == columns else group_size
    if leaf.scale.shape[0] not in (1, rows) or 1 in grid.channel_axes(2):
        raise ValueError(
            f"leaf '{name}' must be (outputs, inputs) with axis=0, or axis=0 and a group_size; "
            f"got axis={grid.axis}. Transpose the matrix before it is compressed."
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


def to_compressed_tensors(
    path: str | os.PathLike,
    tree: Any,
    *,
    dtype: Any = None,
    separator: str = ".",
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes low-bit weights in the pack-quantized layout, and returns its configuration.

    A low-bit leaf `layer.weight` becomes `layer.weight_packed` (int32, codes packed along the
    inputs), `layer.weight_scale` and `layer.weight_shape`, with zero points also
    `layer.weight_zero_point`: of 4 bits if its codes are in -8..7, else of 8. Other leaves stay
    as they are.

    Args:
      path: Where to, such as `folder/model.safetensors`.
      tree: Pytree whose `QuantizedArray` leaves are matrices (outputs, inputs) named
        `...weight`, with a scale for the matrix, for each output (`axis=0`), or for each
        group of inputs (`Grid(bits, axis=0, group_size=g)`).
      dtype: Floating dtype of scales and of the other floating leaves; None for their own.
        A reader that computes in half precision rounds float32 scales.
      separator: What joins the keys of nested trees to a name.
      max_shard_bytes: As in `to_safetensors`.
      overwrite: Whether an existing file may be replaced; a folder is not.

    Returns:
      The value of `quantization_config` for the model's `config.json`. Matrices without
      codes are in its `ignore`.

    Raises:
      TypeError: If `dtype` is not floating, or a leaf is no array of a dtype that
        safetensors has.
      ValueError: If no leaf is low-bit, or one is of a shape, name or grid that the
        layout has not; the message names it.
      OSError: As `checkpoints.save`.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from jaxclip import Grid, compress
      >>> small = compress({"layer": {"weight": jnp.ones((4, 64))}}, Grid(4, axis=0, group_size=32))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     config = to_compressed_tensors(folder + "/model.safetensors", small)
      >>> config["config_groups"]["group_0"]["weights"]["strategy"]
      'group'

    References:
      The compressed-tensors package, https://github.com/vllm-project/compressed-tensors
    """
    place = _Place(path, max_shard_bytes, overwrite)
    return _write_packed(place, named_leaves(tree, separator), _floating_dtype(dtype), separator)


def _write_packed(
    place: _Place, leaves: dict[str, NamedLeaf], dtype: np.dtype | None, separator: str
) -> dict[str, Any]:
    tensors: dict[str, dict[str, ExportTensor]] = {}
    schemes: dict[Scheme, list[str]] = {}
    ignored = []
    for name, leaf in leaves.items():
        module = name.removesuffix("weight").removesuffix(separator)
        if leaf.is_low_bit:
            tensors[name], scheme = pack_leaf(leaf, dtype)
            schemes.setdefault(scheme, []).append(module)
        else:
            tensors[name] = {name: plain_tensor(leaf, dtype)}
            is_matrix = name.endswith("weight") and len(leaf.outline.shape) == 2
            ignored += [module] if is_matrix else []
    if not schemes:
        raise ValueError("tree has no QuantizedArray leaf: compress it first.")
    config = quantization_config(schemes, ignored)
    place.write(tensors, config)
    return config
