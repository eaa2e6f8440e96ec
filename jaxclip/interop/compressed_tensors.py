"""The pack-quantized layout of compressed-tensors: a low-bit matrix as three or four tensors.

    weight_packed       int32    code + 2**(num_bits - 1), the first in the lowest bits of a word
    weight_scale        float    (outputs, 1), or (outputs, groups)
    weight_shape        int64    (outputs, inputs)
    weight_zero_point   int32    zero + 2**(num_bits - 1), packed along the outputs

A weight is `scale * code`, or `scale * (code - zero)` with a positive scale.
"""

import os
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jax.typing import DTypeLike

from jaxclip._core import checks
from jaxclip._core.floats import rounded
from jaxclip._core.trees import PyTree
from jaxclip.interop.bitmasks import write_sparse
from jaxclip.interop.destination import Destination, JsonObject, floating_dtype
from jaxclip.interop.leaves import (
    ExportTensor,
    NamedLeaf,
    Rename,
    UnfitCodesError,
    check_held,
    codes_of,
    fits_in_4_bits,
    named_leaves,
    plain_tensor,
    warn_of_floats,
)
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.packing import pack_codes

Kind: TypeAlias = Literal["pack-quantized", "sparse-24-bitmask"]
_CHUNK = 2**20  # codes packed at once, which bounds memory


class Scheme(NamedTuple):
    """The packing of a matrix.

    Attributes:
      num_bits: 4 or 8.
      group_size: Inputs that share a scale; None for one scale per output.
      has_zero_point: True if its blocks have zero points.
    """

    num_bits: Literal[4, 8]
    group_size: int | None
    has_zero_point: bool


def to_compressed_tensors(
    path: str | os.PathLike,
    tree: PyTree,
    *,
    kind: Kind = "pack-quantized",
    dtype: DTypeLike | None = None,
    separator: str = ".",
    rename: Rename = (),
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> JsonObject:
    """Writes low-bit or sparse weights in a layout of compressed-tensors.

    In pack-quantized a low-bit leaf `layer.weight` becomes `layer.weight_packed` (int32, codes
    packed along the inputs), `layer.weight_scale` and `layer.weight_shape`, with zero points also
    `layer.weight_zero_point`. It has 4 bits if its codes are in -8..7, otherwise 8. Other leaves
    are written as they are. Low-bit leaves that the layout lacks, such as convolutions, are
    written as floats, and a warning says how many and why.

    In sparse-24-bitmask a floating leaf `layer.weight` becomes `layer.compressed` (its values),
    `layer.bitmask` and `layer.shape`, if it has at most two of every four inputs. Only versions
    0.9.4 to 0.14 of compressed-tensors read it.

    Args:
      path: File to write, such as `folder/model.safetensors`, or a new folder if
        `max_shard_bytes` is given.
      tree: Pytree. `QuantizedArray` leaves keep their codes if they are matrices (outputs, inputs)
        named `...weight`, with a scale for the matrix (`axis=None`), for each output (`axis=0`),
        or for each group of inputs (`Grid(bits, axis=0, group_size=g)`). For sparse-24-bitmask
        floating matrices (outputs, inputs), such as those of `prune(..., 1 / 2, pattern=4)`.
      kind: "pack-quantized" or "sparse-24-bitmask".
      dtype: Floating dtype of scales and of the other floating leaves; None keeps their own.
        A reader that computes in half precision rounds float32 scales.
      separator: String that joins the keys of nested trees to a name.
      rename: Pairs `(regex, replacement)` for names, each applied as in `re.sub`, in order.
      max_shard_bytes: Largest size of a shard, in bytes of tensors; None for one file. The folder
        gets shards and an index, or one `model.safetensors` if all tensors fit.
      overwrite: True to replace an existing file. A folder is never replaced.

    Returns:
      The value of `quantization_config` for the model's `config.json`. Matrices without
      codes, or without that sparsity, are in its `ignore`.

    Raises:
      TypeError: If `dtype` is not floating, or a leaf is not an array of a dtype that
        safetensors has.
      ValueError: If no leaf is low-bit, or the layout has codes for none of them, with the reason
        for the first; for sparse-24-bitmask, if a leaf is low-bit, or none is that sparse; if
        `kind` is none of the two, a rule of `rename` is wrong or matches no name, or
        `max_shard_bytes` is not an integer of at least 1.
      FileExistsError: If `path` exists, unless it is a file and `overwrite` is set.
      OSError: If the directory of `path` does not exist or cannot be written.

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
    checks.check_choice("kind", kind, ("pack-quantized", "sparse-24-bitmask"))
    destination = Destination(path, max_shard_bytes, overwrite)
    dtype = floating_dtype(dtype)
    write = write_packed if kind == "pack-quantized" else write_sparse
    return write(destination, named_leaves(tree, separator, rename), dtype, separator)


def write_packed(
    destination: Destination,
    leaves: dict[str, NamedLeaf],
    dtype: np.dtype | None,
    separator: str,
) -> JsonObject:
    """Writes leaves in the pack-quantized layout, and returns the `quantization_config`."""
    tensors: dict[str, dict[str, ExportTensor]] = {}
    schemes: dict[Scheme, list[str]] = {}
    ignored = []
    lacking: dict[str, str] = {}
    for name, leaf in leaves.items():
        module = name.removesuffix("weight").removesuffix(separator)
        scheme = None
        if leaf.is_low_bit:
            try:
                scheme = _scheme_of(leaf.outline, name.endswith("weight"))
                if dtype is not None and dtype.itemsize < 4:  # float32 has all scales
                    _scales_in(dtype, leaf.read())
            except UnfitCodesError as error:
                scheme, lacking[name] = None, str(error)
        if scheme is not None:
            tensors[name] = _packed_tensors(leaf, scheme, dtype)
            schemes.setdefault(scheme, []).append(module)
        else:
            tensors[name] = {name: plain_tensor(leaf, dtype)}
            is_matrix = name.endswith("weight") and len(leaf.outline.shape) == 2
            ignored += [module] if is_matrix else []
    if not schemes and lacking:
        name = min(lacking)
        raise ValueError(f"no leaf can keep its codes: leaf {name!r} {lacking[name]}.")
    if not schemes:
        raise ValueError("tree has no QuantizedArray leaf: compress it first.")
    warn_of_floats("compressed-tensors", lacking)
    config = _quantization_config(schemes, ignored)
    destination.write(tensors, config)
    return config


def _scheme_of(leaf: QuantizedArray, is_weight: bool) -> Scheme:
    """Returns the packing of a low-bit leaf; raises with the reason if the layout has none."""
    if not is_weight or len(leaf.shape) != 2:
        raise UnfitCodesError(
            f"has codes, so it must be a matrix whose name ends in 'weight', got shape {leaf.shape}"
        )
    num_rows, num_columns = leaf.shape
    grid = leaf.grid
    group_size = None
    if grid.group_axes(2) == (1,):
        group_size = min(int(grid.group_size or num_columns), num_columns)
        group_size = None if group_size == num_columns else group_size
    if leaf.scale.shape[0] not in (1, num_rows) or 1 in grid.channel_axes(2):
        raise UnfitCodesError(
            f"must be (outputs, inputs) with axis=0, or axis=0 and a group_size; got "
            f"axis={grid.axis}. Transpose the matrix before it is compressed"
        )
    if num_columns % (group_size or 1):
        raise UnfitCodesError(
            f"has {num_columns} inputs, which must be a multiple of its group_size={group_size}"
        )
    return Scheme(4 if fits_in_4_bits(leaf) else 8, group_size, leaf.zero is not None)


def _packed_tensors(
    leaf: NamedLeaf, scheme: Scheme, dtype: np.dtype | None
) -> dict[str, ExportTensor]:
    name, num_bits = leaf.name, scheme.num_bits
    num_rows, num_columns = leaf.outline.shape
    num_groups = num_columns // scheme.group_size if scheme.group_size else 1
    scale_shape = (num_rows, num_groups)
    int32, int64 = np.dtype(np.int32), np.dtype(np.int64)
    scale_dtype = dtype or np.dtype(np.float32)

    def make_packed() -> np.ndarray:
        return _packed_rows(codes_of(name, leaf.read()), num_bits)

    def make_scale() -> np.ndarray:
        return np.broadcast_to(_scales_in(scale_dtype, leaf.read()), scale_shape)

    def make_shape() -> np.ndarray:
        return np.array([num_rows, num_columns])

    def make_zero_point() -> np.ndarray:
        zero = np.broadcast_to(np.asarray(leaf.read().zero), scale_shape)
        return _packed_rows(zero.T, num_bits).T

    packed_shape = (num_rows, -(-num_columns * num_bits // 32))
    tensors = {
        f"{name}_packed": ExportTensor(packed_shape, int32, make_packed),
        f"{name}_scale": ExportTensor(scale_shape, scale_dtype, make_scale),
        f"{name}_shape": ExportTensor((2,), int64, make_shape),
    }
    if scheme.has_zero_point:
        zero_shape = (-(-num_rows * num_bits // 32), num_groups)
        tensors[f"{name}_zero_point"] = ExportTensor(zero_shape, int32, make_zero_point)
    return tensors


def _scales_in(dtype: np.dtype, low_bit: QuantizedArray) -> np.ndarray:
    """Returns the scales in a dtype; raises if it lacks that of non-zero codes."""
    exact = np.asarray(low_bit.scale).astype(np.float32)
    scale = rounded(exact, dtype)
    is_held = np.isfinite(scale) & (scale != 0)
    if not np.all(is_held):
        check_held("a scale", exact, dtype, is_held | ~_has_weights(low_bit))
    return np.where(is_held, scale, np.zeros((), dtype))


def _has_weights(low_bit: QuantizedArray) -> np.ndarray:
    """Returns True for each block that is not all 0; the scale of the others means nothing."""
    zero = np.asarray(0 if low_bit.zero is None else low_bit.zero)
    if low_bit.zero is not None:
        zero = low_bit.grid.expand_with(np, zero, low_bit.shape)
    is_weight = np.asarray(low_bit.unpacked().qvalue).astype(np.int8) != zero
    # The layout's groups divide the inputs, so a row is made of whole blocks.
    return is_weight.reshape(*low_bit.scale.shape, -1).any(axis=-1)


def _packed_rows(codes: np.ndarray, num_bits: Literal[4, 8]) -> np.ndarray:
    """Returns codes as int32 words, the first code in the lowest bits, rows padded with zeros."""
    padding = -codes.shape[1] % (32 // num_bits)
    # The lowest code packs to zero bits.
    codes = np.pad(codes, ((0, 0), (0, padding)), constant_values=-(2 ** (num_bits - 1)))
    step = max(_CHUNK // max(codes.shape[1], 1), 1)
    words = [
        pack_codes(codes[i : i + step], num_bits).view("<i4") for i in range(0, len(codes), step)
    ]
    return np.concatenate([*words, np.empty(0, np.int32)]).reshape(len(codes), -1)


def _quantization_config(schemes: dict[Scheme, list[str]], ignored: list[str]) -> JsonObject:
    """Returns `quantization_config` for the modules of each scheme and those without codes."""
    groups = {}
    for i, (scheme, modules) in enumerate(schemes.items()):
        groups[f"group_{i}"] = {
            # The first scheme applies to all linear layers that are neither named nor ignored.
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
