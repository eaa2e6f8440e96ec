"""GGUF files: leaves as tensors, in blocks of 32 or 256 entries that share a float16 scale.

The blocks are made in `gguf_blocks`; the gguf package writes the file.
"""

import collections
import contextlib
import math
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
from jaxclip.interop.gguf_blocks import are_usual, blocks_of_codes, encode_blocks, header_of_codes
from jaxclip.interop.gguf_packing import WRITTEN, BlockKind
from jaxclip.interop.leaves import (
    ExportTensor,
    NamedLeaf,
    Rename,
    UnfitCodesError,
    codes_of,
    fits_in_4_bits,
    named_leaves,
    plain_tensor,
    warn_of_floats,
)
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.no_weights import reasons_to_keep

_GGUF_DTYPES = {"float16": "F16", "float64": "F64"}
_GGUF_DTYPES |= {f"int{n}": f"I{n}" for n in (8, 16, 32, 64)}
# Other integers are written in the next wider type that GGUF has.
_WIDER = {"bool": "I8", "int2": "I8", "int4": "I8", "uint2": "I8", "uint4": "I8"}
_WIDER |= {"uint8": "I16", "uint16": "I32", "uint32": "I64"}
_MOST_DIMENSIONS = 4
_MOST_NAME_BYTES = 63


def to_gguf(
    path: str | os.PathLike,
    tree: PyTree,
    architecture: str,
    *,
    kind: BlockKind | None = "Q4_0",
    metadata: Mapping[str, Any] | None = None,
    separator: str = ".",
    rename: Rename = (),
    overwrite: bool = False,
) -> dict[str, int]:
    """Writes a tree as GGUF, with codes in blocks of 32 or 256 along the last axis.

    Low-bit leaves keep their codes: as TQ2_0 if they have 1 bit or are ternary, with one scale for
    each 256 entries of a row; else as Q4_0 if they are in -8..7 (Q4_1 with zero points), otherwise
    as Q8_0. Only scales and offsets are rounded, to float16. Those for which GGUF has no blocks
    are written as floats, and a warning says how many and why. In a tree without low-bit leaves,
    floating leaves of two or more dimensions become blocks of `kind`, with scales of small squared
    error. In a tree with some they stay floating, because a policy left them so.

    Leaves of one dimension, with rows whose length is not a multiple of the block's, or under
    names of optimizer states (see `compress_checkpoint`) stay floating: float16 if they are
    float16, float64 if they are float64, else float32. Integers that GGUF lacks get the next wider
    type. Leading axes beyond four are written as one.

    Args:
      path: File to write.
      tree: Pytree of arrays and `QuantizedArray`, with the names and shapes that the reader
        expects; llama.cpp expects (outputs, inputs) under names of its own.
      architecture: Value of `general.architecture`, such as "llama".
      kind: "Q4_0" (4.5 bits per weight), "Q4_1" (5), "Q8_0" (8.5), "TQ1_0" (1.69, ternary),
        "TQ2_0" (2.06, ternary and faster to read), or None to keep floating leaves as they are, as
        in a tree with low-bit leaves. There "TQ1_0" is the kind of ternary codes.
      metadata: Further keys, such as `{"llama.block_count": 12}`: strings, booleans, integers
        (uint32 where they fit, otherwise int64), floats (float32), and lists of one of these.
      separator: String that joins the keys of nested trees to a name.
      rename: Pairs `(regex, replacement)` for names, each applied as in `re.sub`, in order; a name
        in GGUF has at most 63 bytes.
      overwrite: True to replace an existing file.

    Returns:
      The number of tensors of each type, such as `{"F32": 3, "Q4_0": 12}`.

    Raises:
      ImportError: If the gguf package is not installed; the message names the extra.
      TypeError: If GGUF lacks the dtype of a leaf, or the type of an entry of `metadata`.
      ValueError: If `kind` is not one of these; if a weight is NaN, infinite or too large for
        float16 scales; if a name is too long; or if a rule of `rename` is wrong or matches none.
      FileExistsError: If `path` exists and `overwrite` is not set.
      OSError: If the directory of `path` does not exist or cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "net.gguf")
      ...     to_gguf(path, {"output.weight": jnp.ones((4, 64))}, "llama", kind="Q8_0")
      {'Q8_0': 1}

    References:
      The GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    check_gguf(kind)
    leaves = named_leaves(tree, separator, rename)
    return write_gguf(path, leaves, architecture, kind, metadata or {}, overwrite)


def check_gguf(kind: str | None) -> ModuleType:
    """Returns the gguf package; raises if it is not installed or `kind` cannot be written."""
    gguf = extras.import_extra("gguf", "gguf")
    checks.check_choice("kind", kind, (*WRITTEN, None))
    return gguf


def write_gguf(
    path: str | os.PathLike,
    leaves: dict[str, NamedLeaf],
    architecture: str,
    kind: str | None,
    metadata: Mapping[str, Any],
    overwrite: bool,
) -> dict[str, int]:
    """Writes leaves as GGUF, one after the other; returns the number of tensors of each type."""
    gguf = check_gguf(kind)
    ternary_kind = "TQ1_0" if kind == "TQ1_0" else "TQ2_0"
    if any(leaf.is_low_bit for leaf in leaves.values()):
        kind = None  # what a policy left alone stays as it is
    lacking: dict[str, str] = {}
    no_weights = reasons_to_keep(leaves)
    kinds = {name: None if name in no_weights else kind for name in leaves}
    tensors = {
        name: _gguf_tensor(leaf, kinds[name], ternary_kind, lacking)
        for name, leaf in leaves.items()
    }
    warn_of_floats("GGUF", lacking)
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
    counts = collections.Counter(type_name for type_name, _ in tensors.values())
    return dict(sorted(counts.items()))


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


def _gguf_tensor(
    leaf: NamedLeaf, kind: str | None, ternary_kind: str, lacking: dict[str, str]
) -> tuple[str, ExportTensor]:
    """Returns the name of a leaf's GGUF type, and its tensor: blocks are uint8."""
    # The reason why a low-bit leaf has no blocks is put into `lacking`.
    name = leaf.name
    if (num_bytes := len(name.encode())) > _MOST_NAME_BYTES:
        raise ValueError(
            f"leaf {name!r} has a name of {num_bytes} bytes, but GGUF allows {_MOST_NAME_BYTES}: "
            "give a shorter one by `rename`."
        )
    shape = _gguf_shape(leaf.outline.shape)
    *_, length = shape
    if leaf.is_low_bit:
        try:
            kind = _kind_of_codes(leaf.outline, ternary_kind)
            low_bit = leaf.read()
            if not are_usual(np.asarray(low_bit.scale)):
                header_of_codes(*_codes_and_scales(name, low_bit, kind))
        except UnfitCodesError as error:
            kind, lacking[name] = None, str(error)
    elif len(shape) < 2 or (kind and length % WRITTEN[kind].size):
        kind = None
    if kind is None or not jnp.issubdtype(leaf.outline.dtype, jnp.floating):
        type_name, tensor = _plain(leaf)
        return type_name, tensor._replace(shape=shape)
    byte_shape = (*shape[:-1], length // WRITTEN[kind].size * WRITTEN[kind].num_bytes)

    def make() -> np.ndarray:
        values = leaf.read()  # outside of the try: a damaged file is a CheckpointError
        try:
            return _blocks(name, values, kind).reshape(byte_shape)
        except ValueError as error:
            raise ValueError(f"leaf {name!r}: {error}") from error

    return kind, ExportTensor(byte_shape, np.dtype(np.uint8), make)


def _gguf_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape of 1 to 4 dimensions: a scalar has one, leading axes beyond 4 are joined."""
    if len(shape) <= _MOST_DIMENSIONS:
        return tuple(shape) or (1,)
    rest = 1 - _MOST_DIMENSIONS
    return (math.prod(shape[:rest]), *shape[rest:])


def _plain(leaf: NamedLeaf) -> tuple[str, ExportTensor]:
    """Returns the GGUF type and the tensor of a leaf's values, of its own shape."""
    dtype = str(leaf.outline.dtype)
    if dtype in _WIDER:
        wide = np.dtype(f"int{_WIDER[dtype][1:]}")
        make = plain_tensor(leaf).make
        shape = tuple(leaf.outline.shape)
        return _WIDER[dtype], ExportTensor(shape, wide, lambda: make().astype(wide))
    is_floating = jnp.issubdtype(leaf.outline.dtype, jnp.floating)
    type_name = _GGUF_DTYPES.get(dtype, "F32" if is_floating else None)
    if type_name is None:
        raise TypeError(f"leaf {leaf.name!r} has dtype {dtype}, which GGUF lacks.")
    return type_name, plain_tensor(leaf, np.dtype(np.float32) if type_name == "F32" else None)


def _kind_of_codes(leaf: QuantizedArray, ternary_kind: str) -> str:
    """Returns the kind of block that holds the codes of a low-bit leaf; raises if none does."""
    if leaf.bits in (1, "ternary") and leaf.zero is None and _is_of_blocks(leaf, ternary_kind):
        return ternary_kind
    length = leaf.shape[-1] if leaf.shape else 1
    if length % WRITTEN["Q4_0"].size:
        raise UnfitCodesError(f"must have rows of a multiple of 32, got {length}")
    if not _is_of_blocks(leaf, "Q4_0"):
        raise UnfitCodesError(
            "must have the same scale for each 32 entries along the last axis, as with axis=0 or "
            f"group_size=32; got axis={leaf.grid.axis}, group_size={leaf.grid.group_size}"
        )
    if fits_in_4_bits(leaf):
        return "Q4_0" if leaf.zero is None else "Q4_1"
    if leaf.zero is not None:
        raise UnfitCodesError("has zero points, which GGUF has only up to 4 bits")
    return "Q8_0"


def _is_of_blocks(leaf: QuantizedArray, kind: str) -> bool:
    """Returns True if rows are whole blocks, and no two entries of one have other scales."""
    grid, last, size = leaf.fitted_grid, leaf.ndim - 1, WRITTEN[kind].size
    if not leaf.shape or leaf.shape[-1] % size:
        return False
    axes = grid.group_axes(leaf.ndim)
    if not axes:
        return leaf.scale.shape[last] == 1
    if axes[-1] != last:
        return False
    return leaf.scale.shape[last] == 1 or grid.group_size_of(leaf.shape) % size == 0


def _blocks(name: str, leaf: ArrayLike | QuantizedArray, kind: str) -> np.ndarray:
    if isinstance(leaf, QuantizedArray):
        return blocks_of_codes(*_codes_and_scales(name, leaf, kind), kind)
    array = np.asarray(leaf)
    if not np.all(np.isfinite(array)):
        raise ValueError("a weight is NaN or infinite.")
    return encode_blocks(array, kind)


def _codes_and_scales(
    name: str, leaf: QuantizedArray, kind: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Returns codes (blocks, size), and the scales and zero codes of blocks."""
    size = WRITTEN[kind].size

    def per_block(values: ArrayLike) -> np.ndarray:
        expanded = leaf.grid.expand(jnp.asarray(values), leaf.shape)
        rows = np.broadcast_to(np.asarray(expanded), leaf.shape).reshape(-1, size)
        return rows[:, :1].astype(np.float32)

    codes = codes_of(name, leaf).reshape(-1, size)
    return codes, per_block(leaf.scale), None if leaf.zero is None else per_block(leaf.zero)


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
