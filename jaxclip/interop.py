"""Exports that other libraries load without this one.

    to_safetensors          plain weights: every reader of safetensors
    to_compressed_tensors   4- and 8-bit codes: compressed-tensors, so transformers and vLLM
    to_gguf                 blocks of 32 at 4 and 8 bits: llama.cpp and the gguf package

Names are the keys of the tree joined by a separator. Files appear whole or not at all, and
are written tensor by tensor. `docs/interop.md` says what was verified, and by what.
"""

import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip import _checks, layout
from jaxclip.atomic import replacing
from jaxclip.exports import ExportTensor, codes_of, has_grid_within, named_leaves, plain_tensor
from jaxclip.gguf_blocks import BLOCK_SIZE, BYTES_PER_BLOCK, blocks_of_codes, encode_blocks
from jaxclip.pack_quantized import Scheme, pack_leaf, quantization_config
from jaxclip.quantization import QuantizedArray

__all__ = ["to_compressed_tensors", "to_gguf", "to_safetensors"]


def to_safetensors(
    path: str | os.PathLike,
    tree: Any,
    *,
    dtype: Any = None,
    separator: str = ".",
    overwrite: bool = False,
) -> None:
    """Writes a tree as plain weights, low-bit leaves dequantized, for any safetensors reader.

    Args:
      path: Where to.
      tree: Pytree of arrays and `QuantizedArray`.
      dtype: Floating dtype of all floating tensors; None for each leaf's own.
      separator: What joins the keys of nested trees to a name.
      overwrite: Whether an existing file may be replaced.

    Raises:
      TypeError: If `dtype` is not floating, or a leaf is no array of a dtype that
        safetensors has.
      ValueError: If two leaves get the same name, or a finite entry is infinite in `dtype`.
      OSError: As `checkpoints.save`.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxclip import checkpoints, compress
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = pathlib.Path(folder.name, "net.safetensors")
      >>> small = compress({"layer": {"kernel": jnp.ones((2, 2))}}, bits="ternary")
      >>> to_safetensors(path, small, dtype=jnp.float16)
      >>> checkpoints.load(path)["layer.kernel"].dtype
      dtype('float16')
      >>> folder.cleanup()
    """
    dtype = _floating_dtype(dtype)
    leaves = named_leaves(tree, separator)
    _write_safetensors(path, {n: plain_tensor(n, v, dtype) for n, v in leaves.items()}, overwrite)


def to_compressed_tensors(
    path: str | os.PathLike,
    tree: Any,
    *,
    dtype: Any = None,
    separator: str = ".",
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
        group of inputs (`axis=0, group_size=g`).
      dtype: Floating dtype of scales and of the other floating leaves; None for their own.
        A reader that computes in half precision rounds float32 scales.
      separator: What joins the keys of nested trees to a name.
      overwrite: Whether an existing file may be replaced.

    Returns:
      The value of `quantization_config` for the model's `config.json`. Matrices without
      codes are in its `ignore`.

    Raises:
      TypeError: If `dtype` is not floating, or a leaf is no array of a dtype that
        safetensors has.
      ValueError: If no leaf is low-bit, or one is of a shape, name or granularity that the
        layout has not; the message names it.
      OSError: As `checkpoints.save`.

    Example:
      >>> import tempfile
      >>> from jaxclip import compress
      >>> small = compress({"layer": {"weight": jnp.ones((4, 64))}}, axis=0, group_size=32)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     config = to_compressed_tensors(folder + "/model.safetensors", small)
      >>> config["config_groups"]["group_0"]["weights"]["strategy"]
      'group'

    References:
      The compressed-tensors package, https://github.com/vllm-project/compressed-tensors
    """
    dtype = _floating_dtype(dtype)
    tensors: dict[str, ExportTensor] = {}
    schemes: dict[Scheme, list[str]] = {}
    ignored = []
    for name, leaf in named_leaves(tree, separator).items():
        module = name.removesuffix("weight").removesuffix(separator)
        if isinstance(leaf, QuantizedArray):
            parts, scheme = pack_leaf(name, leaf, dtype)
            schemes.setdefault(scheme, []).append(module)
        else:
            parts = {name: plain_tensor(name, leaf, dtype)}
            ignored += [module] if name.endswith("weight") and leaf.ndim == 2 else []
        _add(tensors, parts)
    if not schemes:
        raise ValueError("tree has no QuantizedArray leaf: compress it first.")
    _write_safetensors(path, tensors, overwrite)
    return quantization_config(schemes, ignored)


def to_gguf(
    path: str | os.PathLike,
    tree: Any,
    architecture: str,
    *,
    kind: str | None = "Q4_0",
    metadata: Mapping[str, Any] | None = None,
    separator: str = ".",
    overwrite: bool = False,
) -> None:
    """Writes a tree as GGUF, with codes in blocks of 32 along the last axis.

    Floating leaves of two or more dimensions become blocks of `kind`, with scales of little
    squared error. Low-bit leaves keep their codes: as Q4_0 if these are in -8..7 (Q4_1 with
    zero points), else as Q8_0; only scales and offsets are rounded, to float16. What has one
    dimension, or rows that are not a multiple of 32 long, stays float: float16 as it is, else
    float32.

    Args:
      path: Where to.
      tree: Pytree of arrays and `QuantizedArray`; names and shapes as the reader wants them,
        for llama.cpp (outputs, inputs) under its own names.
      architecture: Value of `general.architecture`, such as "llama".
      kind: "Q4_0" (4.5 bits a weight), "Q4_1" (5), "Q8_0" (8.5), or None to leave floating
        leaves as they are.
      metadata: Further keys, such as `{"llama.block_count": 12}`: texts, booleans, integers
        (uint32 where they fit, else int64), floats (float32), and lists of one of these.
      separator: What joins the keys of nested trees to a name.
      overwrite: Whether an existing file may be replaced.

    Raises:
      ImportError: If the gguf package is not installed; the message names the extra.
      TypeError: If a leaf is of a dtype, or an entry of `metadata` of a type, that GGUF has
        not.
      ValueError: If `kind` is none of these, a weight is NaN or infinite or beyond float16
        scales, the scale of a low-bit leaf varies within a block, one of more than 4 bits
        has zero points, or a name or shape is longer than GGUF allows.
      OSError: As `checkpoints.save`.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "net.gguf")
      ...     to_gguf(path, {"output.weight": jnp.ones((4, 64))}, "llama", kind="Q8_0")
      ...     path.read_bytes()[:4]
      b'GGUF'

    References:
      The GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    gguf = _checks.import_extra("gguf", "gguf")
    _checks.check_choice("kind", kind, (*BYTES_PER_BLOCK, None))
    tensors = {n: _gguf_tensor(n, v, kind) for n, v in named_leaves(tree, separator).items()}
    with replacing(path, overwrite) as file:
        # The package writes to the temporary file by its name.
        writer = gguf.GGUFWriter(file.name, architecture)
        try:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, value in (metadata or {}).items():
                _add_metadata(writer, key, value)
            for name, (type_name, tensor) in tensors.items():
                num_bytes = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
                raw_type = gguf.GGMLQuantizationType[type_name]
                writer.add_tensor_info(name, tensor.shape, tensor.dtype, num_bytes, raw_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, tensor in tensors.values():
                writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
        finally:
            writer.close()


def _floating_dtype(dtype: Any) -> np.dtype | None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, got {dtype!r}.")
    return None if dtype is None else jnp.dtype(dtype)


# --- safetensors ------------------------------------------------------------------------


def _write_safetensors(
    path: str | os.PathLike, tensors: dict[str, ExportTensor], overwrite: bool
) -> None:
    with replacing(path, overwrite) as file:
        if "__metadata__" in tensors:
            raise ValueError("a leaf has the name '__metadata__', which safetensors keeps.")
        specs = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in tensors.items()}
        plan = layout.plan_file(specs)
        # A plan escapes names, here they are written as they are; both are sorted.
        names = dict(zip(plan.leaves, sorted(tensors), strict=True))
        # transformers wants to be told for which framework weights were saved.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for t in plan.tensors:
            offsets = [t.start, t.stop]
            header[names[t.name]] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for t in plan.tensors:
            array = np.ascontiguousarray(tensors[names[t.name]].make())
            file.write(array.reshape(-1).view(np.uint8).data)


def _add(tensors: dict[str, ExportTensor], parts: dict[str, ExportTensor]) -> None:
    for name, tensor in parts.items():
        if name in tensors:
            raise ValueError(f"two tensors would have the name '{name}'.")
        tensors[name] = tensor


# --- GGUF -------------------------------------------------------------------------------

_GGUF_DTYPES = {"float16": "F16", "float64": "F64"}
_GGUF_DTYPES |= {f"int{n}": f"I{n}" for n in (8, 16, 32, 64)}


def _gguf_tensor(name: str, leaf: Any, kind: str | None) -> tuple[str, ExportTensor]:
    """GGUF's type of a leaf and its tensor, blocks counted in bytes."""
    shape: tuple[int, ...] = tuple(leaf.shape) or (1,)
    length = shape[-1]
    if len(shape) > 4 or len(name.encode()) > 63:
        raise ValueError(
            f"leaf '{name}' must have at most 4 dimensions, got {len(shape)}, and a name of at "
            f"most 63 bytes, got {len(name.encode())}."
        )
    is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if isinstance(leaf, QuantizedArray):
        kind = "Q8_0"
        if has_grid_within(leaf, -8, 7):
            kind = "Q4_0" if leaf.zero is None else "Q4_1"
        elif leaf.zero is not None:
            raise ValueError(f"leaf '{name}' has zero points, which GGUF has up to 4 bits only.")
    elif not is_floating or len(shape) < 2 or length % BLOCK_SIZE:
        kind = None
    if kind is None:
        fallback = "F32" if is_floating else None
        type_name = _GGUF_DTYPES.get(str(leaf.dtype), fallback)
        if type_name is None:
            raise TypeError(f"leaf '{name}' has dtype {leaf.dtype}, which GGUF has not.")
        tensor = plain_tensor(name, leaf, np.dtype(np.float32) if type_name == "F32" else None)
        return type_name, tensor._replace(shape=shape)
    if length % BLOCK_SIZE:
        raise ValueError(f"leaf '{name}' must have rows of a multiple of 32, got {length}.")
    num_bytes = length // BLOCK_SIZE * BYTES_PER_BLOCK[kind]

    def make() -> np.ndarray:
        try:
            if isinstance(leaf, QuantizedArray):
                codes = codes_of(name, leaf).reshape(-1, BLOCK_SIZE)
                zeros = None if leaf.zero is None else _of_blocks(leaf, leaf.zero)
                blocks = blocks_of_codes(codes, _of_blocks(leaf, leaf.scale), kind, zeros)
            else:
                array = np.asarray(leaf)
                if not np.all(np.isfinite(array)):
                    raise ValueError("a weight is NaN or infinite.")
                blocks = encode_blocks(array, kind)
        except ValueError as error:
            raise ValueError(f"leaf '{name}': {error}") from error
        return blocks.reshape(*shape[:-1], num_bytes)

    return kind, ExportTensor((*shape[:-1], num_bytes), np.dtype(np.uint8), make)


def _of_blocks(leaf: QuantizedArray, values: Any) -> np.ndarray:
    """The scale or zero point of each 32 entries, float32 of shape (blocks, 1)."""
    expanded = leaf.granularity.expand(jnp.asarray(values), leaf.shape)
    rows = np.broadcast_to(np.asarray(expanded), leaf.shape).reshape(-1, BLOCK_SIZE)
    if not np.all(rows == rows[:, :1]):
        raise ValueError(
            "its scale must be the same for each 32 entries along the last axis, such as with "
            f"axis=0 or group_size=32; got axis={leaf.granularity.axis}, "
            f"group_size={leaf.granularity.group_size}."
        )
    return rows[:, :1].astype(np.float32)


def _add_metadata(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        add = writer.add_uint32 if 0 <= value < 2**32 else writer.add_int64
        add(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, (list, tuple)):
        writer.add_array(key, value)
    else:
        raise TypeError(f"metadata has {value!r} under {key!r}, which GGUF cannot hold.")
