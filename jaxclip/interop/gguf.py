"""GGUF files: leaves as tensors, in blocks of 32 entries that share a float16 scale.

The bytes of the blocks are made in `gguf_blocks`; the gguf package writes the file.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks, extras
from jaxclip._core.atomic import replacing
from jaxclip._core.trees import PyTree
from jaxclip.interop.gguf_blocks import BLOCK_SIZE, BYTES_PER_BLOCK, blocks_of_codes, encode_blocks
from jaxclip.interop.leaves import (
    ExportTensor,
    NamedLeaf,
    codes_of,
    fits_in_4_bits,
    named_leaves,
    plain_tensor,
)
from jaxclip.lowbit.arrays import QuantizedArray

_GGUF_DTYPES = {"float16": "F16", "float64": "F64"}
_GGUF_DTYPES |= {f"int{n}": f"I{n}" for n in (8, 16, 32, 64)}


def to_gguf(
    path: str | os.PathLike,
    tree: PyTree,
    architecture: str,
    *,
    kind: str | None = "Q4_0",
    metadata: Mapping[str, Any] | None = None,
    separator: str = ".",
    overwrite: bool = False,
) -> None:
    """Writes a tree as GGUF, with codes in blocks of 32 along the last axis.

    Floating leaves of two or more dimensions become blocks of `kind`, with scales of small
    squared error. Low-bit leaves keep their codes: as Q4_0 if these are in -8..7 (Q4_1 with
    zero points), otherwise as Q8_0; only scales and offsets are rounded, to float16. Leaves of
    one dimension, or with rows whose length is not a multiple of 32, stay floating: float16 if
    they are float16, else float32.

    Args:
      path: File to write.
      tree: Pytree of arrays and `QuantizedArray`, with the names and shapes that the reader
        expects; llama.cpp expects (outputs, inputs) under names of its own.
      architecture: Value of `general.architecture`, such as "llama".
      kind: "Q4_0" (4.5 bits per weight), "Q4_1" (5), "Q8_0" (8.5), or None to keep floating
        leaves as they are.
      metadata: Further keys, such as `{"llama.block_count": 12}`: strings, booleans, integers
        (uint32 where they fit, otherwise int64), floats (float32), and lists of one of these.
      separator: String that joins the keys of nested trees to a name.
      overwrite: True to replace an existing file.

    Raises:
      ImportError: If the gguf package is not installed; the message names the extra.
      TypeError: If GGUF lacks the dtype of a leaf, or the type of an entry of `metadata`.
      ValueError: If `kind` is not one of these; if a weight is NaN, infinite or too large for
        float16 scales; if the scale of a low-bit leaf varies within a block, or one of more than
        4 bits has zero points; or if a name or shape is longer than GGUF allows.
      FileExistsError: If `path` exists and `overwrite` is not set.
      OSError: If the directory of `path` does not exist or cannot be written.

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


def check_gguf(kind: str | None) -> ModuleType:
    """Returns the gguf package; raises if it is not installed or `kind` cannot be written."""
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
    """Writes leaves as GGUF, one after the other."""
    gguf = check_gguf(kind)
    tensors = {name: _gguf_tensor(leaf, kind) for name, leaf in leaves.items()}
    with replacing(path, overwrite) as file, _system_errors(file):
        # The package opens files by name, so it gets that of the temporary file.
        writer = gguf.GGUFWriter(file.name, architecture)
        try:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for key, value in metadata.items():
                _add_metadata(writer, key, value)
            for name, (type_name, tensor) in tensors.items():
                raw_type = gguf.GGMLQuantizationType[type_name]
                writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.num_bytes, raw_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, tensor in tensors.values():
                writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
        finally:
            writer.close()


@contextlib.contextmanager
def _system_errors(file: BinaryIO) -> Iterator[None]:
    """Raises the system's error, such as that of a full disk, where NumPy hides it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # "100 requested and 50 written": writing again fails, and says why
            file.seek(0, os.SEEK_END)
            file.write(bytes(2**20))
            file.flush()
        raise


def _gguf_tensor(leaf: NamedLeaf, kind: str | None) -> tuple[str, ExportTensor]:
    """Returns the name of a leaf's GGUF type, and its tensor: blocks are uint8."""
    name = leaf.name
    shape: tuple[int, ...] = tuple(leaf.outline.shape) or (1,)
    length = shape[-1]
    if len(shape) > 4 or len(name.encode()) > 63:
        raise ValueError(
            f"leaf '{name}' must have at most 4 dimensions, got {len(shape)}, and a name of at "
            f"most 63 bytes, got {len(name.encode())}."
        )
    is_floating = jnp.issubdtype(leaf.outline.dtype, jnp.floating)
    if leaf.is_low_bit:
        kind = _kind_of_codes(name, leaf.outline)
    elif not is_floating or len(shape) < 2 or length % BLOCK_SIZE:
        kind = None
    if kind is None:
        default = "F32" if is_floating else None
        type_name = _GGUF_DTYPES.get(str(leaf.outline.dtype), default)
        if type_name is None:
            raise TypeError(f"leaf '{name}' has dtype {leaf.outline.dtype}, which GGUF lacks.")
        tensor = plain_tensor(leaf, np.dtype(np.float32) if type_name == "F32" else None)
        return type_name, tensor._replace(shape=shape)
    if length % BLOCK_SIZE:
        raise ValueError(f"leaf '{name}' must have rows of a multiple of 32, got {length}.")
    byte_shape = (*shape[:-1], length // BLOCK_SIZE * BYTES_PER_BLOCK[kind])

    def make() -> np.ndarray:
        values = leaf.read()  # outside of the try: a damaged file is a CheckpointError
        try:
            return _blocks(name, values, kind).reshape(byte_shape)
        except ValueError as error:
            raise ValueError(f"leaf '{name}': {error}") from error

    return kind, ExportTensor(byte_shape, np.dtype(np.uint8), make)


def _kind_of_codes(name: str, leaf: QuantizedArray) -> str:
    """Returns the kind of block that holds the codes of a low-bit leaf."""
    if fits_in_4_bits(leaf):
        return "Q4_0" if leaf.zero is None else "Q4_1"
    if leaf.zero is not None:
        raise ValueError(f"leaf '{name}' has zero points, which GGUF has only up to 4 bits.")
    return "Q8_0"


def _blocks(name: str, leaf: ArrayLike | QuantizedArray, kind: str) -> np.ndarray:
    if isinstance(leaf, QuantizedArray):
        codes = codes_of(name, leaf).reshape(-1, BLOCK_SIZE)
        zeros = None if leaf.zero is None else _per_block(leaf, leaf.zero)
        return blocks_of_codes(codes, _per_block(leaf, leaf.scale), kind, zeros)
    array = np.asarray(leaf)
    if not np.all(np.isfinite(array)):
        raise ValueError("a weight is NaN or infinite.")
    return encode_blocks(array, kind)


def _per_block(leaf: QuantizedArray, values: ArrayLike) -> np.ndarray:
    """Returns the scale or zero point of each 32 entries, float32 of shape (blocks, 1)."""
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
