"""GGUF files: leaves as its tensors, written one by one; gguf is imported on use."""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks, extras
from jaxclip._core.atomic import replacing
from jaxclip.interop.gguf_blocks import BLOCK_SIZE, BYTES_PER_BLOCK, blocks_of_codes, encode_blocks
from jaxclip.interop.leaves import (
    ExportTensor,
    NamedLeaf,
    codes_of,
    has_grid_within,
    named_leaves,
    plain_tensor,
)
from jaxclip.lowbit.arrays import QuantizedArray

_GGUF_DTYPES = {"float16": "F16", "float64": "F64"}
_GGUF_DTYPES |= {f"int{n}": f"I{n}" for n in (8, 16, 32, 64)}


def check_gguf(kind: str | None) -> Any:
    """Returns the gguf package, or raises if it is missing or `kind` is not written.

    Args:
      kind: "Q4_0", "Q4_1", "Q8_0" or None.

    Raises:
      ImportError: If the package is not installed; the message names the extra.
      ValueError: If `kind` is none of these.

    Example:
      >>> check_gguf("Q8_0").__name__
      'gguf'
    """
    gguf = extras.import_extra("gguf", "gguf")
    checks.check_choice("kind", kind, (*BYTES_PER_BLOCK, None))
    return gguf


def write_gguf(
    path: str | os.PathLike,
    leaves: dict[str, NamedLeaf],
    architecture: str,
    kind: str | None,
    metadata: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Writes leaves as GGUF, one by one; `interop.to_gguf` says what they become.

    Args:
      path: Where to.
      leaves: The leaves by name.
      architecture: Value of `general.architecture`.
      kind: What floating leaves become; None to leave them as they are.
      metadata: Further keys.
      overwrite: Whether an existing file may be replaced.

    Example:
      >>> import tempfile
      >>> from jaxclip.interop.leaves import named_leaves
      >>> leaves = named_leaves({"output.weight": np.ones((4, 64), np.float32)}, ".")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_gguf(folder + "/net.gguf", leaves, "llama", "Q8_0", {}, False)
      ...     os.path.getsize(folder + "/net.gguf") > 4 * 68
      True
    """
    gguf = check_gguf(kind)
    tensors = {name: _gguf_tensor(leaf, kind) for name, leaf in leaves.items()}
    with replacing(path, overwrite) as file:
        # The package writes to the temporary file by its name.
        writer = gguf.GGUFWriter(file.name, architecture)
        try:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, value in metadata.items():
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


def _gguf_tensor(stored: NamedLeaf, kind: str | None) -> tuple[str, ExportTensor]:
    """GGUF's type of a leaf and its tensor, blocks counted in bytes."""
    name, leaf = stored.name, stored.outline
    shape: tuple[int, ...] = tuple(leaf.shape) or (1,)
    length = shape[-1]
    if len(shape) > 4 or len(name.encode()) > 63:
        raise ValueError(
            f"leaf '{name}' must have at most 4 dimensions, got {len(shape)}, and a name of at "
            f"most 63 bytes, got {len(name.encode())}."
        )
    is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if stored.is_low_bit:
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
        tensor = plain_tensor(stored, np.dtype(np.float32) if type_name == "F32" else None)
        return type_name, tensor._replace(shape=shape)
    if length % BLOCK_SIZE:
        raise ValueError(f"leaf '{name}' must have rows of a multiple of 32, got {length}.")
    num_bytes = length // BLOCK_SIZE * BYTES_PER_BLOCK[kind]

    def make() -> np.ndarray:
        leaf = stored.read()
        try:
            if stored.is_low_bit:
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
    expanded = leaf.grid.expand(jnp.asarray(values), leaf.shape)
    rows = np.broadcast_to(np.asarray(expanded), leaf.shape).reshape(-1, BLOCK_SIZE)
    if not np.all(rows == rows[:, :1]):
        raise ValueError(
            "its scale must be the same for each 32 entries along the last axis, such as with "
            f"axis=0 or group_size=32; got axis={leaf.grid.axis}, "
            f"group_size={leaf.grid.group_size}."
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
    check_gguf(kind)
    leaves = named_leaves(tree, separator)
    write_gguf(path, leaves, architecture, kind, metadata or {}, overwrite)
