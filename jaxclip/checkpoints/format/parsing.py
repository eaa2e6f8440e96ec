"""The header of a file, parsed as untrusted input: anyone can compute a checksum.

All its values are checked before a byte of data is read. The tree that it describes, laid out
again, must give exactly the tensors that it lists. Errors are ValueErrors that name the tensor;
`reading` adds the file's name.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core.grids import Grid, Levels, ScaleDtype, code_range
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints.format.codes import restore_leaf
from jaxclip.checkpoints.format.headers import (
    CRC_PLACE,
    MAX_HEADER_BYTES,
    PREFIX,
    VERSIONS,
)
from jaxclip.checkpoints.format.json_text import header_entries, strict_json
from jaxclip.checkpoints.format.layout import (
    ALL_DTYPES,
    DTYPES,
    Leaf,
    StoredLeaf,
    Tensor,
    leaf_name,
    num_bits,
    plan_file,
)
from jaxclip.checkpoints.format.masks import Mask
from jaxclip.checkpoints.format.pytrees import DEPTH_LIMIT
from jaxclip.checkpoints.format.zeros import with_zeros
from jaxclip.lowbit.arrays import QuantizedArray, is_quantized
from jaxclip.lowbit.scale_formats import dtype_in_memory

_CHECKSUM = re.compile("[0-9a-f]{8}")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclasses.dataclass(frozen=True)
class FileContents:
    """Contents of a file, as its header describes them.

    Attributes:
      tensors: The tensors by name.
      checksums: CRC-32 of each tensor's bytes; empty for a file of another library.
      tree: The tree with shapes for arrays; None for a file of another library.
      leaves: The tree's leaves by name, in its order.
      codings: How the codes of low-bit leaves are coded, by name; None for packed codes.
      masks: Masks of the leaves whose zeros are left out, by name.
      metadata: Entries of other programs.
    """

    tensors: dict[str, Tensor]
    checksums: dict[str, int]
    tree: PyTree = None
    leaves: dict[str, Leaf] | None = None
    codings: dict[str, str | None] = dataclasses.field(default_factory=dict)
    masks: dict[str, Mask] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    def restore_leaf(self, name: str, read: Callable[[Tensor], np.ndarray]) -> StoredLeaf:
        """Returns a leaf of the tree, with `read` called once for each of its tensors."""
        like = (self.leaves or {})[name]
        mask = self.masks.get(name)
        if mask is not None:
            stored, values = (
                read(self.tensors[f"{name}:mask"]),
                read(self.tensors[f"{name}:values"]),
            )
            return with_zeros(name, like, mask, stored, values)
        if not is_quantized(like):
            return read(self.tensors[name])
        scale, stored = read(self.tensors[f"{name}:scale"]), read(self.tensors[f"{name}:codes"])
        zero = None if like.zero is None else read(self.tensors[f"{name}:zero"])
        is_log8 = like.grid.scale_dtype == "log8"
        return restore_leaf(
            name,
            like,
            scale,
            stored,
            self.codings[name],
            zero=zero,
            largest_scale=read(self.tensors[f"{name}:unit"]) if is_log8 else None,
        )


def header_length(prefix: bytes, file_size: int) -> int:
    """Returns the header's length in bytes, read from the first 8 bytes of a file."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= file_size - 8:
        raise ValueError("not a safetensors file, or cut short: its header is incomplete.")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header is larger than {MAX_HEADER_BYTES:,} bytes.")
    return length


def parse_header(raw: bytes, data_bytes: int) -> FileContents:
    """Parses and checks length and header of a file in which `data_bytes` bytes follow them."""
    metadata, tensors = _parse_entries(header_entries(raw[8:]), data_bytes)
    # Our metadata has one key. If damage renamed it, the text still shows that it is ours.
    ours = [text for key, text in metadata.items() if key == "jaxclip" or '"header_crc"' in text]
    if not ours:
        return FileContents(tensors, {}, metadata=metadata)
    zeroed = bytearray(raw)
    zeroed[CRC_PLACE] = b"00000000"
    checksum = f"{zlib.crc32(zeroed):08x}".encode("ascii")
    if not raw.startswith(PREFIX, 8) or raw[CRC_PLACE] != checksum:
        raise ValueError("the header is damaged or was rewritten: its checksum does not match.")
    # A value for each node and each number of a shape, and as many for names with brackets.
    max_values = 2**20 + 128 * len(tensors)
    inner = strict_json(ours[0].encode(), "the header", max_values=max_values)
    version = inner.get("version")
    if version not in VERSIONS or type(version) is not int:
        raise ValueError(
            f"the file has version {version!r} of the format, but this jaxclip reads versions "
            f"1 to {VERSIONS[-1]}: use a jaxclip that reads version {version!r}."
        )
    others = {key: text for key, text in metadata.items() if key != "jaxclip"}
    return dataclasses.replace(_parse_ours(inner, tensors), metadata=others)


def _is_shape(value: Any) -> bool:
    if type(value) is not list or len(value) > 64:  # NumPy's limit of dimensions
        return False
    is_integer = set(map(type, value)) <= {int}  # not a loop: there may be a million shapes
    return is_integer and (not value or (min(value) >= 0 and max(value) < 2**63))


def _parse_entries(
    entries: Iterable[tuple[str, Any]], data_bytes: int
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Returns metadata and tensors of a header; they must fill the data without gap or overlap."""
    metadata: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    names = set()
    for name, entry in entries:
        if name in names:
            raise ValueError(f"the header is not valid JSON: the key {name!r} occurs twice.")
        names.add(name)
        if name == "__metadata__":
            metadata = entry
        else:
            tensors[name] = _tensor_of(name, entry)
    position = 0
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != position:
            raise ValueError(f"tensor {tensor.name!r}: the data has a hole or an overlap there.")
        position = tensor.stop
    if position != data_bytes:
        raise ValueError(
            f"the tensors take {position} bytes by the header, but {data_bytes} bytes follow it."
        )
    return metadata, tensors


def _tensor_of(name: str, entry: Any) -> Tensor:
    """Returns the tensor that an entry of a header describes."""
    if type(entry) is not dict or entry.keys() != _ENTRY_KEYS:
        raise ValueError(f"tensor {name!r}: its entry in the header is not valid.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in ALL_DTYPES:
        raise ValueError(f"tensor {name!r}: its dtype {dtype!r} is not supported.")
    if not _is_shape(shape) or not _is_shape(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: its shape or its data_offsets are not valid.")
    if num_bits(dtype, shape) != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"tensor {name!r}: its shape does not fit its size.")
    return Tensor(name, dtype, tuple(shape), *offsets)


def _parse_ours(inner: dict[str, Any], tensors: dict[str, Tensor]) -> FileContents:
    infos, checksums = inner.get("leaves"), inner.get("crc")
    if type(infos) is not dict or type(checksums) is not dict or "tree" not in inner:
        raise ValueError("the header has no tree, leaves or checksums.")

    described: dict[str, QuantizedArray] = {}
    masks: dict[str, Mask] = {}

    def shapes_of(name: str) -> Leaf:
        if name in infos and _has_mask(infos[name], inner["version"]):
            outline, masks[name] = _masked(name, infos[name], tensors)
            return outline
        if name in infos:
            key = repr(infos[name])
            if key not in described:
                described[key] = _abstract_quantized(name, infos[name], inner["version"])
            return described[key]
        if name not in tensors:
            raise ValueError(f"tensor {name!r}: it is missing.")
        return tensors[name].outline

    codings = {name: _coding_of(name, info, inner["version"]) for name, info in infos.items()}
    tree = _abstract_node(inner["tree"], (), shapes_of)
    # Laid out again, the tree must give the tensors of the file. Coded codes take the bytes that
    # the header says, but never more than packed ones.
    plan = plan_file(tree, is_copy=True).with_masks(masks)
    coded = {f"{name}:codes" for name, coding in codings.items() if coding is not None}
    sizes = {}
    for tensor in plan.tensors:
        stored = tensors.get(tensor.name)
        if tensor.name in coded and stored is not None and stored.shape:
            sizes[tensor.name] = min(tensor.num_bytes, stored.shape[0])
    plan = plan.resized(sizes)
    wanted = {t.name: (t.dtype, t.shape) for t in plan.tensors}
    for name in {**wanted, **tensors, **checksums}:
        tensor, crc = tensors.get(name), checksums.get(name)
        if tensor is None or (tensor.dtype, tensor.shape) != wanted.get(name):
            raise ValueError(f"tensor {name!r}: it does not fit the tree in the header.")
        if type(crc) is not str or not _CHECKSUM.fullmatch(crc):
            raise ValueError(f"tensor {name!r}: it has no checksum.")
    if not infos.keys() <= plan.leaves.keys():
        raise ValueError("the header describes a leaf that is not in the tree.")
    checksums = {name: int(crc, 16) for name, crc in checksums.items()}
    return FileContents(tensors, checksums, tree, plan.leaves, codings, masks)


def _abstract_node(
    node: Any, path: tuple[str | int, ...], shapes_of: Callable[[str], Leaf]
) -> PyTree:
    """Returns the tree that a header describes, with shapes for arrays."""
    if len(path) > DEPTH_LIMIT:
        raise ValueError(f"the tree is nested deeper than {DEPTH_LIMIT}.")
    if node is None:
        return None
    if type(node) is int and node == 0:
        return shapes_of(leaf_name(path))
    kind, children = ("dict", node) if type(node) is dict else _split_node(node)
    if isinstance(children, dict):
        as_key = int if kind == "int_keys" else str
        return {
            as_key(key): _abstract_node(child, (*path, key), shapes_of)
            for key, child in children.items()
        }
    nodes = [_abstract_node(c, (*path, i), shapes_of) for i, c in enumerate(children)]
    return tuple(nodes) if kind == "tuple" else nodes


def _split_node(node: Any) -> tuple[str, Any]:
    if type(node) is list and node[:1] in (["list"], ["tuple"]):
        return node[0], node[1:]
    if type(node) is list and node[:1] == ["int_keys"] and len(node) == 2:
        keys = node[1] if type(node[1]) is dict else ()
        if keys and all(key.lstrip("-").isdecimal() and str(int(key)) == key for key in keys):
            return node[0], node[1]
    raise ValueError("the tree in the header is not valid.")


def _coding_of(name: str, info: Any, version: int) -> str | None:
    """Returns the coding of a leaf's codes; None in version 1, which has only packed codes."""
    coding = info.get("coding") if type(info) is dict else None
    if coding not in (None, "huffman", "ans", *(["lanes"] if version >= 4 else [])):
        raise ValueError(f"tensor {name!r}: its coding {coding!r} is not known.")
    return coding


def _has_mask(info: Any, version: int) -> bool:
    """Returns True for the description of a float leaf whose zeros are left out."""
    return version >= 6 and type(info) is dict and "bits" not in info


def _masked(name: str, info: Any, tensors: dict[str, Tensor]) -> tuple[jax.ShapeDtypeStruct, Mask]:
    """Returns the outline and the mask of a float leaf whose zeros are left out."""
    if set(info) != {"shape", "dtype", "coding"} or not _is_shape(info["shape"]):
        raise ValueError(f"tensor {name!r}: its description in the header is not valid.")
    dtype = DTYPES.get(info["dtype"]) if type(info["dtype"]) is str else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"tensor {name!r}: its dtype is not valid.")
    shape, size = tuple(info["shape"]), math.prod(info["shape"])
    parts = [tensors.get(f"{name}:{part}") for part in ("mask", "values")]
    sizes = [part.shape[0] for part in parts if part is not None and len(part.shape) == 1]
    num_packed = -(-size // 8)
    num_coded = num_packed - (info["coding"] is not None)  # coded ones take fewer
    if len(sizes) < 2 or sizes[1] > size or sizes[0] > num_coded:
        raise ValueError(f"tensor {name!r}: its mask or its values do not fit its shape.")
    num_bytes = num_packed if info["coding"] is None else sizes[0]
    return jax.ShapeDtypeStruct(shape, dtype), Mask(sizes[1], num_bytes, info["coding"])


def _abstract_quantized(name: str, info: Any, version: int) -> QuantizedArray:
    keys = {"bits", "axis", "group_size", "shape", "dtype"}
    keys |= {"levels"} if version >= 5 else {"full_signed"}
    keys |= {"zero_point", "scale_dtype", "coding"} if version >= 2 else set()
    if type(info) is not dict or set(info) != keys or not _is_shape(info["shape"]):
        raise ValueError(f"tensor {name!r}: its description in the header is not valid.")
    axis, shape, dtype = info["axis"], tuple(info["shape"]), info["dtype"]
    stored = DTYPES.get(dtype) if type(dtype) is str else None
    is_float = stored is not None and jnp.issubdtype(stored, jnp.floating)
    has_zero, scale_dtype = info.get("zero_point", False), info.get("scale_dtype", "float32")
    levels = info.get("levels")
    if version < 5 and type(info["full_signed"]) is bool:
        levels = "full" if info["full_signed"] else "narrow"
    if type(levels) is not str or type(has_zero) is not bool or not is_float:
        raise ValueError(f"tensor {name!r}: its grid or dtype is not valid.")
    try:
        if type(scale_dtype) is not str:
            raise TypeError(f"scale_dtype must be a name, got {scale_dtype!r}.")
        code_range(info["bits"])  # raises for None, which a Grid allows but a file does not
        grid = Grid(
            info["bits"],
            levels=cast(Levels, levels),
            axis=tuple(axis) if type(axis) is list else axis,
            group_size=info["group_size"],
            zero_point=has_zero,
            scale_dtype=cast(ScaleDtype, scale_dtype),
        )
        grid = grid if version >= 3 else _with_groups_along_one_axis(grid, shape)
        scale_shape = grid.scale_shape(shape)
        qvalue: Any = jax.ShapeDtypeStruct(shape, np.dtype(np.int8))
        scale: Any = jax.ShapeDtypeStruct(scale_shape, jnp.dtype(dtype_in_memory(scale_dtype)))
        zero: Any = jax.ShapeDtypeStruct(scale_shape, np.dtype(np.int8)) if has_zero else None
        return QuantizedArray(qvalue, scale, grid, stored, zero)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r}: {error}") from error


def _with_groups_along_one_axis(grid: Grid, shape: tuple[int, ...]) -> Grid:
    """Returns the grid whose groups run along the last of their axes alone."""
    # So they did in versions 1 and 2: the other axes were apart, as channel axes are.
    *apart, last = grid.group_axes(len(shape)) or (None,)
    if math.prod(shape[a] for a in apart) == 1:  # both readings are the same
        return grid
    return dataclasses.replace(grid, axis=tuple(a for a in range(len(shape)) if a != last))
