"""The header of a file, made from its plan: an 8-byte length, then JSON.

To the safetensors header it adds one metadata entry with the tree, the grids of low-bit leaves
and a CRC-32 for each tensor and for the header. `docs/format.md` documents every key.
"""

import json
import math
import struct
import zlib
from typing import Any

import jax.numpy as jnp

from jaxclip.checkpoints.format.layout import DTYPE_CODES, FilePlan, Leaf, native_dtype
from jaxclip.checkpoints.format.masks import Mask
from jaxclip.lowbit.arrays import QuantizedArray, is_quantized
from jaxclip.lowbit.coding.entropy_coding import codings_tried

MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no more
# Bytes of arrays that a byte of a file may stand for, unless the reader allows more: those of
# one-bit codes are 8, and of coded ones at most 64. So many bytes are allowed in any case.
MAX_RATIO = 64.0
ALWAYS_ALLOWED_BYTES = 2**28
VERSIONS = (1, 2, 3, 4, 5, 6)
# Every version begins like this, so the header's checksum has a fixed place.
PREFIX = b'{"__metadata__":{"jaxclip":"{\\"header_crc\\":\\"'
CRC_PLACE = slice(8 + len(PREFIX), 16 + len(PREFIX))


def make_header(
    plan: FilePlan,
    checksums: dict[str, int] | None = None,
    codings: dict[str, str | None] | None = None,
    min_bytes: int = 0,
) -> bytes:
    """Returns length and header of a file, padded with spaces to `min_bytes`."""
    # Without checksums they are zeros: the size is the same. Codes are packed unless `codings`
    # has the name of their leaf.
    crc = {t.name: f"{checksums[t.name] if checksums else 0:08x}" for t in plan.tensors}
    quantized = {n: leaf for n, leaf in plan.leaves.items() if is_quantized(leaf)}
    codings = codings or {}
    version = 6 if plan.masks else _version_for(quantized, codings)
    inner = {
        "header_crc": "00000000",
        "version": version,
        "tree": plan.tree,
        "leaves": {
            name: _quantized_info(leaf, version, codings.get(name))
            for name, leaf in quantized.items()
        }
        | {name: _masked_info(plan.leaves[name], mask) for name, mask in plan.masks.items()},
        "crc": crc,
    }
    outer: dict[str, Any] = {"__metadata__": {"jaxclip": _to_json(inner), **plan.metadata}}
    for t in plan.tensors:
        offsets = [t.start, t.stop]
        outer[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}
    text = _to_json(outer).encode("ascii")
    text += b" " * max(-len(text) % 8, min_bytes - 8 - len(text))
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the tree has {len(plan.leaves):,} leaves, whose names and shapes take {len(text):,} "
            f"bytes; a safetensors header may have {MAX_HEADER_BYTES:,}."
        )
    raw = bytearray(struct.pack("<Q", len(text)) + text)
    raw[CRC_PLACE] = f"{zlib.crc32(raw):08x}".encode("ascii")
    return bytes(raw)


def header_size(plan: FilePlan, coding: str | None) -> int:
    """Returns the bytes reserved for a header: its largest size, whatever the coded sizes are."""
    # The offsets are those of packed codes, and each leaf has the longest name of a coding.
    quantized = (n for n, leaf in plan.leaves.items() if is_quantized(leaf))
    longest = max(codings_tried(coding), key=len, default=None)
    return len(make_header(plan, codings=dict.fromkeys(quantized, longest)))


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _version_for(quantized: dict[str, QuantizedArray], codings: dict[str, str | None]) -> int:
    """Returns the lowest version that holds all leaves: older readers read it if they can."""
    if any(leaf.grid.levels == "balanced" for leaf in quantized.values()):
        return 5
    if "lanes" in codings.values():
        return 4
    if any(_has_groups_along_many_axes(leaf) for leaf in quantized.values()):
        return 3
    needs_version_2 = any(
        leaf.zero is not None or leaf.grid.scale_dtype != "float32" or codings.get(name) is not None
        for name, leaf in quantized.items()
    )
    return 2 if needs_version_2 else 1


def _has_groups_along_many_axes(leaf: QuantizedArray) -> bool:
    """Returns True if groups run along more than the last of their axes."""
    axes = leaf.fitted_grid.group_axes(leaf.ndim)
    return math.prod(leaf.shape[a] for a in axes[:-1]) != 1


def _quantized_info(leaf: QuantizedArray, version: int, coding: str | None) -> dict[str, Any]:
    axis = leaf.fitted_grid.axis
    levels = leaf.grid.levels
    info = {
        "bits": leaf.bits,
        **({"levels": levels} if version >= 5 else {"full_signed": levels == "full"}),
        "axis": [int(a) for a in axis] if isinstance(axis, tuple) else _int_or_none(axis),
        "group_size": _int_or_none(leaf.grid.group_size),
        "shape": list(leaf.shape),
        "dtype": DTYPE_CODES[jnp.dtype(leaf.dtype)],
    }
    if version >= 2:
        info |= {"zero_point": leaf.zero is not None, "scale_dtype": leaf.grid.scale_dtype}
        info |= {"coding": coding}
    return info


def _masked_info(leaf: Leaf, mask: Mask) -> dict[str, Any]:
    dtype = DTYPE_CODES[native_dtype(leaf.dtype)]
    return {"shape": list(leaf.shape), "dtype": dtype, "coding": mask.coding}


def _int_or_none(value: Any) -> int | None:
    return None if value is None else int(value)
