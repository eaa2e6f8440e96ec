"""The packing of ternary layers that transformers has for BitNet: four codes a byte.

    weight         uint8   (outputs / 4, inputs): byte [r, c] = sum_k (code[k R + r, c] + 1) << 2k,
                           with R = outputs / 4
    weight_scale   float   (1,)

A weight is `code / weight_scale` in layers of class "bitlinear", and `code * weight_scale` in those
of class "autobitlinear".
"""

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jax.typing import DTypeLike

from jaxclip._core import checks
from jaxclip._core.floats import rounded
from jaxclip._core.grids import Grid
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints.format.json_text import strict_json
from jaxclip.checkpoints.reading import CheckpointError
from jaxclip.interop.destination import Destination, JsonObject, floating_dtype
from jaxclip.interop.layers import (
    Layer,
    Tensors,
    layer_part,
    layer_scale,
    read_layers,
    without_zero_scales,
)
from jaxclip.interop.leaves import (
    ExportTensor,
    NamedLeaf,
    Rename,
    UnfitCodesError,
    check_held,
    codes_of,
    named_leaves,
    plain_tensor,
    warn_of_floats,
)
from jaxclip.lowbit.arrays import QuantizedArray

LinearClass: TypeAlias = Literal["bitlinear", "autobitlinear"]
_CLASSES = ("bitlinear", "autobitlinear")
_PER_BYTE = 4
_SHIFTS = np.arange(0, 2 * _PER_BYTE, 2, dtype=np.uint8)[:, None, None]


def from_bitnet(
    path: str | os.PathLike, *, linear_class: LinearClass | None = None
) -> dict[str, np.ndarray | QuantizedArray]:
    """Reads a BitNet model of transformers, with its ternary codes.

    Matrices of packed codes become low-bit leaves with one float32 scale: 1 / weight_scale for
    "bitlinear", weight_scale for "autobitlinear". All other tensors stay as they are.

    Args:
      path: File or folder that `checkpoints.load` takes.
      linear_class: "bitlinear" or "autobitlinear"; None reads it from the `quantization_config` of
        the `config.json` in the folder, where transformers takes "bitlinear" if none is named.

    Returns:
      A dict by the names in the file. Arrays are NumPy's. Low-bit leaves are float32, with shape
      (outputs, inputs).

    Raises:
      CheckpointError: If the file is damaged; if a layer has no scale, or parts of another dtype or
        shape, or codes other than -1, 0 and 1; if the class is not given and no `config.json`
        tells it. The message names the file and the tensor.
      ValueError: If `linear_class` is none of these.
      OSError: If there is no file, or the disk fails.

    Example:
      >>> import tempfile
      >>> from jaxclip import Grid, compress, interop
      >>> small = compress({"up": {"weight": np.ones((8, 64))}}, Grid("ternary", axis=None))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     config = interop.to_bitnet(folder + "/model.safetensors", small)
      ...     from_bitnet(folder, linear_class=config["linear_class"])
      {'up.weight': QuantizedArray(shape=(8, 64), dtype=float32, bits='ternary', num_bytes=107)}

    References:
      Ma et al., The Era of 1-bit LLMs, 2024, https://arxiv.org/abs/2402.17764
    """
    if linear_class is None:
        linear_class = _class_in_config(Path(path))
    checks.check_choice("linear_class", linear_class, _CLASSES)
    is_divisor = linear_class == "bitlinear"
    return read_layers(path, lambda name, tensors: _layer(name, tensors, is_divisor))


def _class_in_config(path: Path) -> LinearClass:
    """Returns the class of the layers that the model's `config.json` names."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{os.fspath(path)!r} has no config.json beside it: give linear_class, because "
            "weight_scale divides the codes in 'bitlinear' and multiplies them in 'autobitlinear'."
        )
    try:
        config = strict_json(file.read_bytes(), "config.json", fractions=True)
        config = config.get("quantization_config") if type(config) is dict else None
        method = config.get("quant_method") if type(config) is dict else None
        if type(config) is not dict or method != "bitnet":
            raise ValueError(f"must have a quantization_config of 'bitnet', got {method!r}.")
        found = config.get("linear_class", "bitlinear")
        checks.check_choice("linear_class", found, _CLASSES)
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(file)!r}: {error}") from error
    return found


def _layer(name: str, tensors: Tensors, is_divisor: bool) -> Layer | None:
    """Returns the layer of a tensor of codes."""
    has_scale = f"{name}_scale" in tensors
    if not name.endswith("weight") or not (has_scale or tensors[name].dtype == np.uint8):
        return None
    codes = _unpacked(layer_part(name, tensors, "uint8", 2))
    scale = layer_scale(name, tensors).astype(np.float32)
    if scale.size != 1:
        raise ValueError(f"needs one number in {name}_scale, got shape {scale.shape}.")
    if not np.isfinite(scale).all() or (is_divisor and not scale.all()):
        rule = "finite and not 0, because it divides" if is_divisor else "finite"
        raise ValueError(f"needs a scale that is {rule}, got {scale.item()}.")
    bias = tensors.get(f"{name.removesuffix('weight')}bias")
    if bias is not None and bias.shape != codes.shape[:1]:
        raise ValueError(f"has codes of {len(codes)} outputs, but a bias of shape {bias.shape}.")
    scale = scale.reshape(1, 1)
    scale = np.float32(1) / scale if is_divisor else scale
    codes, scale = without_zero_scales(codes, scale)
    parts: dict[str, Any] = {"qvalue": codes, "scale": scale}
    leaf = QuantizedArray(grid=Grid("ternary", axis=None), dtype=np.dtype(np.float32), **parts)
    leaf.validate(name)
    return Layer(name, leaf, {name, f"{name}_scale"})


def _unpacked(data: np.ndarray) -> np.ndarray:
    """Returns the int8 codes of bytes, four times as many rows."""
    places = (data >> _SHIFTS) & np.uint8(3)
    if (places == 3).any():
        k, row, column = (int(i[0]) for i in np.nonzero(places == 3))
        raise ValueError(
            f"has the code 3 in bits {2 * k} and {2 * k + 1} of byte [{row}, {column}], must be "
            "0, 1 or 2."
        )
    return places.reshape(-1, data.shape[1]).astype(np.int8) - np.int8(1)


def to_bitnet(
    path: str | os.PathLike,
    tree: PyTree,
    *,
    linear_class: LinearClass = "autobitlinear",
    dtype: DTypeLike | None = None,
    separator: str = ".",
    rename: Rename = (),
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> JsonObject:
    """Writes ternary weights as the BitNet layers of transformers, four codes a byte.

    A low-bit leaf `layer.weight` becomes `layer.weight` in uint8 and `layer.weight_scale`. Other
    leaves are written as they are, low-bit ones that the layout lacks as floats, with a warning.
    These layers also round the inputs of a product, to 8 bits a row, when transformers runs them.

    Args:
      path: File to write, such as `folder/model.safetensors`, or a new folder if
        `max_shard_bytes` is given.
      tree: Pytree. `QuantizedArray` leaves keep their codes if they are matrices (outputs, inputs)
        named `...weight` with codes of -1, 0 and 1, one scale (`Grid("ternary", axis=None)`), and
        a multiple of four outputs.
      linear_class: "autobitlinear" writes the scale, "bitlinear" its inverse.
      dtype: Floating dtype of scales and of the other floating leaves; None keeps their own.
      separator: String that joins the keys of nested trees to a name.
      rename: Pairs `(regex, replacement)` for names, each applied as in `re.sub`, in order.
      max_shard_bytes: Largest size of a shard, in bytes of tensors; None for one file.
      overwrite: True to replace an existing file. A folder is never replaced.

    Returns:
      The value of `quantization_config` for the model's `config.json`. Matrices without codes are
      in its `modules_to_not_convert`.

    Raises:
      TypeError: If `dtype` is not floating, or a leaf is not an array of a dtype that safetensors
        has.
      ValueError: If no leaf can keep its codes, with the reason for the first; if `linear_class`
        is none of these, a rule of `rename` is wrong or matches no name, or `max_shard_bytes` is
        not an integer of at least 1.
      FileExistsError: If `path` exists, unless it is a file and `overwrite` is set.
      OSError: If the directory of `path` does not exist or cannot be written.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from jaxclip import Grid, compress
      >>> params = {"up": {"weight": jnp.ones((8, 64))}, "embed": {"weight": jnp.ones((9, 8))}}
      >>> small = compress(params, Grid("ternary", axis=None), policy=[("embed", None)])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     config = to_bitnet(folder + "/model.safetensors", small)
      >>> config["modules_to_not_convert"]
      ['embed']

    References:
      Ma et al., The Era of 1-bit LLMs, 2024, https://arxiv.org/abs/2402.17764
    """
    checks.check_choice("linear_class", linear_class, _CLASSES)
    destination = Destination(path, max_shard_bytes, overwrite)
    dtype = floating_dtype(dtype)
    is_divisor = linear_class == "bitlinear"
    tensors: dict[str, dict[str, ExportTensor]] = {}
    lacking: dict[str, str] = {}
    left_out: list[str] = []
    for name, leaf in named_leaves(tree, separator, rename).items():
        tensors[name] = {name: plain_tensor(leaf, dtype)}
        if leaf.is_low_bit:
            try:
                tensors[name] = _packed_tensors(leaf, dtype or np.dtype(np.float32), is_divisor)
            except UnfitCodesError as error:
                lacking[name] = str(error)
        is_matrix = name.endswith("weight") and len(leaf.outline.shape) == 2
        if is_matrix and len(tensors[name]) == 1:
            left_out.append(name.removesuffix("weight").removesuffix(separator))
    if all(len(parts) == 1 for parts in tensors.values()):
        name = min(lacking, default=None)
        reason = "tree has no QuantizedArray leaf" if name is None else f"{name!r} {lacking[name]}"
        raise ValueError(f"no leaf can keep its codes: {reason}.")
    warn_of_floats("BitNet", lacking)
    destination.write(tensors)
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": left_out,
    }


def _packed_tensors(leaf: NamedLeaf, dtype: np.dtype, is_divisor: bool) -> dict[str, ExportTensor]:
    """Returns the tensors of a low-bit leaf; raises with the reason if the layout has none."""
    name, outline = leaf.name, leaf.outline
    if not name.endswith("weight") or len(outline.shape) != 2:
        raise UnfitCodesError(
            f"has codes, so it must be a matrix whose name ends in 'weight', got shape "
            f"{tuple(outline.shape)}"
        )
    if outline.grid.code_range != (-1, 1) or outline.zero is not None:
        raise UnfitCodesError(f"must have codes of -1, 0 and 1, got bits={outline.bits!r}")
    num_rows, num_columns = outline.shape
    if outline.scale.size != 1:
        raise UnfitCodesError(f"must have one scale, as with axis=None, got {outline.scale.size}")
    if num_rows % _PER_BYTE:
        raise UnfitCodesError(f"must have a multiple of {_PER_BYTE} outputs, got {num_rows}")

    exact = np.asarray(leaf.read().scale).astype(np.float32).reshape(1)
    exact = np.float32(1) / exact if is_divisor else exact
    scale = rounded(exact, dtype)
    check_held("a scale", exact, dtype, np.isfinite(scale) & (scale != 0))

    def make_packed() -> np.ndarray:
        codes = codes_of(name, leaf.read()).reshape(_PER_BYTE, -1, num_columns)
        return np.bitwise_or.reduce((codes + np.int8(1)).astype(np.uint8) << _SHIFTS, axis=0)

    packed_shape = (num_rows // _PER_BYTE, num_columns)
    return {
        name: ExportTensor(packed_shape, np.dtype(np.uint8), make_packed),
        f"{name}_scale": ExportTensor((1,), dtype, lambda: scale),
    }
