"""Files written leaf by leaf: a tree, or plain tensors for other readers.

Memory is bounded by one leaf. The header of a tree precedes the data that it describes, and the
size of coded codes is known only when they are written. So bytes are reserved for the largest
header possible.
"""

import dataclasses
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxclip._core import signals
from jaxclip.checkpoints.format.codes import Allowance, coded_tensor
from jaxclip.checkpoints.format.headers import header_size, make_header
from jaxclip.checkpoints.format.layout import (
    ALL_DTYPES,
    FilePlan,
    Leaf,
    StreamedLeaf,
    Tensor,
    native_dtype,
    plan_file,
    raw_bytes,
)
from jaxclip.checkpoints.format.parsing import header_length
from jaxclip.lowbit.arrays import is_quantized


def write_tree(
    file: BinaryIO,
    plan: FilePlan,
    produce: Callable[[str], Leaf | StreamedLeaf],
    coding: str | None,
) -> FilePlan:
    """Writes a tree to an empty file; returns its plan with the sizes of coded codes."""
    # `produce` returns a leaf by name. It is called once per leaf, and each leaf is dropped before
    # the next one.
    reserved = header_size(plan, coding)
    file.write(bytes(reserved))
    checksums: dict[str, int] = {}
    coded_sizes: dict[str, int] = {}
    codings: dict[str, str | None] = {}
    allowance = Allowance(plan)
    # Where the next one-byte tensor starts: coded ones are smaller than planned.
    byte_start = min((t.start for t in plan.tensors if _is_of_bytes(t)), default=0)
    for name, tensors in _tensors_by_leaf(plan).items():
        leaf = _with_own_scales(produce(name))
        for tensor in tensors:
            chunks = plan.chunks(tensor, leaf)
            coded = coded_tensor(tensor, leaf, coding, allowance)
            if coded is not None:
                codings[name], data = coded
                coded_sizes[tensor.name] = data.size
                chunks = iter([data])
            file.seek(reserved + (byte_start if _is_of_bytes(tensor) else tensor.start))
            size, checksums[tensor.name] = _write_chunks(file, chunks)
            if coded is None and size != tensor.num_bytes:
                raise ValueError(f"leaf {name!r} is not of the shape and dtype that were planned.")
            if _is_of_bytes(tensor):
                byte_start += size
        del leaf
    final = plan.resized(coded_sizes)
    file.seek(0)
    file.write(make_header(final, checksums, codings, reserved))
    return final


def _with_own_scales(leaf: Leaf | StreamedLeaf) -> Leaf | StreamedLeaf:
    """Returns a leaf whose scales and zeros nobody else can change."""
    # They are checked, and log8 scales are read for two tensors.
    if not is_quantized(leaf):
        return leaf
    zero = None if leaf.zero is None else np.array(leaf.zero)
    return dataclasses.replace(leaf, scale=np.array(leaf.scale), zero=zero)


def _write_chunks(file: BinaryIO, chunks: Iterator[np.ndarray]) -> tuple[int, int]:
    """Writes chunks of bytes; returns their size and CRC-32."""
    size = checksum = 0
    for chunk in chunks:
        signals.check_stop()
        checksum = zlib.crc32(chunk.data, checksum)
        file.write(chunk.data)
        size += chunk.size
    return size, checksum


def _is_of_bytes(tensor: Tensor) -> bool:
    """Returns True for tensors of single bytes: the last ones, including coded codes."""
    return ALL_DTYPES[tensor.dtype].itemsize == 1


def _tensors_by_leaf(plan: FilePlan) -> dict[str, list[Tensor]]:
    """Returns the tensors of each leaf, ordered so that one-byte tensors follow each other."""
    tensors: dict[str, list[Tensor]] = {}
    for tensor in reversed(plan.tensors):
        tensors.setdefault(tensor.leaf, []).insert(0, tensor)
    return dict(reversed(tensors.items()))


def write_plain(
    file: BinaryIO,
    specs: dict[str, jax.ShapeDtypeStruct],
    produce: Callable[[str], np.ndarray | StreamedLeaf],
    is_copy: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes tensors under their own names, for other readers; returns the bytes of the header."""
    if "__metadata__" in specs:
        raise ValueError("a leaf has the name '__metadata__', which safetensors reserves.")
    plan = plan_file(specs, is_copy)
    # A plan escapes names, but here they stay as they are. Both are sorted alike.
    names = dict(zip(plan.leaves, sorted(specs), strict=True))
    # transformers refuses files that do not name the framework for which they were saved.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    for t in plan.tensors:
        offsets = [t.start, t.stop]
        header[names[t.name]] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text))
    header_length(prefix, 8 + len(text))  # raises if it is longer than readers accept
    file.write(prefix + text)
    for t in plan.tensors:
        array = produce(names[t.name])
        if (array.shape, native_dtype(array.dtype)) != (t.shape, t.numpy_dtype):
            raise ValueError(f"tensor {names[t.name]!r} is not of its shape and dtype.")
        for part in array.parts() if isinstance(array, StreamedLeaf) else (array,):
            file.write(raw_bytes(part).data)
        del array
    return 8 + len(text)
