"""Writing safetensors files leaf by leaf: a tree of ours, or plain tensors for other readers.

In a file of ours the header comes before the data it describes, so a place is kept for it. It is
as large as the header can get: how small coded tensors turn out is known only when they are
written.
"""

import json
import struct
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxclip.checkpoints.format.codes import coded_tensor
from jaxclip.checkpoints.format.headers import header_size, make_header
from jaxclip.checkpoints.format.layout import DTYPES, FilePlan, Tensor, plan_file
from jaxclip.checkpoints.format.parsing import header_length


def write_tree(
    file: BinaryIO, plan: FilePlan, produce: Callable[[str], Any], coding: str | None
) -> FilePlan:
    """Writes a tree to an empty file.

    Args:
      file: Binary file, to be written and sought in.
      plan: The plan of the tree, which needs no values.
      produce: Gives a leaf by name; called once a leaf, and the leaf is let go before the
        next, so that memory is bounded by one leaf.
      coding: How codes are coded where that makes them smaller; None to pack them.

    Returns:
      The plan with the sizes that coded tensors turned out to have.

    Raises:
      ValueError: If a code or scale is not valid; the message names the leaf.

    Example:
      >>> import io
      >>> tree = {"w": np.zeros(3, np.int8)}
      >>> file = io.BytesIO()
      >>> _ = write_tree(file, plan_file(tree), tree.get, None)
      >>> file.getvalue()[-3:]
      b'\\x00\\x00\\x00'
    """
    reserved = header_size(plan, coding)
    file.write(bytes(reserved))
    checksums: dict[str, int] = {}
    coded_sizes: dict[str, int] = {}
    codings: dict[str, str | None] = {}
    byte_position = min((t.start for t in plan.tensors if _is_bytes(t)), default=0)
    for name, tensors in _by_leaf(plan).items():
        leaf = produce(name)
        for tensor in tensors:
            coded = coded_tensor(tensor, leaf, coding)
            if coded is not None:
                codings[name], data = coded
                coded_sizes[tensor.name] = data.size
            checksum = size = 0
            file.seek(reserved + (byte_position if _is_bytes(tensor) else tensor.start))
            for chunk in [coded[1]] if coded is not None else plan.chunks(tensor, leaf):
                checksum = zlib.crc32(chunk.data, checksum)
                file.write(chunk.data)
                size += chunk.size
            if coded is None and size != tensor.stop - tensor.start:
                raise ValueError(f"leaf '{name}' is not of the shape and dtype that were planned.")
            byte_position += size if _is_bytes(tensor) else 0
            checksums[tensor.name] = checksum
        del leaf
    final = plan.resized(coded_sizes)
    file.seek(0)
    file.write(make_header(final, checksums, codings, reserved))
    return final


def _is_bytes(tensor: Tensor) -> bool:
    """Whether it is among the tensors of single bytes, the last ones and the coded ones."""
    return DTYPES[tensor.dtype].itemsize == 1


def _by_leaf(plan: FilePlan) -> dict[str, list[Tensor]]:
    """The tensors of each leaf, in an order in which those of single bytes follow each other."""
    tensors: dict[str, list[Tensor]] = {}
    for tensor in reversed(plan.tensors):
        tensors.setdefault(tensor.leaf, []).insert(0, tensor)
    return dict(reversed(tensors.items()))


def write_plain(
    file: BinaryIO, specs: dict[str, jax.ShapeDtypeStruct], produce: Callable[[str], np.ndarray]
) -> int:
    """Writes tensors under their names as they are, without anything of ours.

    Args:
      file: Binary file, to be written.
      specs: Shape and dtype of each tensor, by name.
      produce: Gives a tensor by name; called once each.

    Returns:
      The bytes of the header.

    Raises:
      TypeError: If safetensors has not the dtype of a tensor.
      ValueError: If a name is "__metadata__", there are too many of them for a header, or a
        tensor is not of its shape and dtype.

    Example:
      >>> import io
      >>> file = io.BytesIO()
      >>> specs = {"a/b": jax.ShapeDtypeStruct((2,), np.int8)}
      >>> _ = write_plain(file, specs, lambda name: np.array([1, 2], np.int8))
      >>> b'"a/b"' in file.getvalue(), file.getvalue()[-2:]
      (True, b'\\x01\\x02')
    """
    if "__metadata__" in specs:
        raise ValueError("a leaf has the name '__metadata__', which safetensors keeps.")
    plan = plan_file(specs)
    # A plan escapes names, here they are written as they are; both are sorted.
    names = dict(zip(plan.leaves, sorted(specs), strict=True))
    # transformers wants to be told for which framework weights were saved.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for t in plan.tensors:
        offsets = [t.start, t.stop]
        header[names[t.name]] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text))
    header_length(prefix, 8 + len(text))  # no reader takes a longer one
    file.write(prefix + text)
    for t in plan.tensors:
        array = np.asarray(produce(names[t.name]))
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if (array.shape, array.dtype) != (t.shape, t.numpy_dtype):
            raise ValueError(f"tensor '{names[t.name]}' is not of its shape and dtype.")
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        del array
    return 8 + len(text)
