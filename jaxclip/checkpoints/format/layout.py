"""The layout of a file: the tensors that hold a tree, their places, and their bytes.

The layout follows from shapes and dtypes alone, so the size of a file is known before any value
is: `data_bytes = sum(tensor.stop - tensor.start)`. `docs/format.md` has the format byte by byte.
Leaves that a file cannot hold raise a TypeError or ValueError that names them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxclip._core import checks
from jaxclip._core.grids import Bits
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints.format.masks import Mask
from jaxclip.checkpoints.format.pytrees import DEPTH_LIMIT, as_plain
from jaxclip.lowbit.arrays import QuantizedArray, is_quantized
from jaxclip.lowbit.packing import CODES_PER_CHUNK, num_packed_bytes, pack_codes, unpack_codes
from jaxclip.lowbit.scale_formats import encode_log8


@dataclasses.dataclass(frozen=True)
class StreamedLeaf:
    """A plain leaf to be written that is never in memory as a whole.

    Attributes:
      shape: Its shape.
      dtype: Its dtype, of whole bytes.
      parts: Makes its rows, in order, some at a time; called once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterator[np.ndarray]]


Array: TypeAlias = np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct
Leaf: TypeAlias = Array | QuantizedArray
StoredLeaf: TypeAlias = np.ndarray | QuantizedArray

DTYPES = {
    "BOOL": jnp.dtype(bool),
    **{f"{s}{8 * n}": jnp.dtype(f"{s.lower()}{n}") for s in "UI" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": jnp.dtype(f"f{n}") for n in (2, 4, 8)},
    "BF16": jnp.dtype(jnp.bfloat16),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Dtypes of other libraries' tensors, which are read, listed and copied, but not made.
COPIED_DTYPES = {
    "C64": jnp.dtype("complex64"),
    "F8_E8M0": jnp.dtype("float8_e8m0fnu"),
    "F8_E4M3FNUZ": jnp.dtype("float8_e4m3fnuz"),
    "F8_E5M2FNUZ": jnp.dtype("float8_e5m2fnuz"),
    "F6_E2M3": jnp.dtype("float6_e2m3fn"),
    "F6_E3M2": jnp.dtype("float6_e3m2fn"),
    "F4": jnp.dtype("float4_e2m1fn"),
}
ALL_DTYPES = DTYPES | COPIED_DTYPES
_ALL_CODES = {dtype: code for code, dtype in ALL_DTYPES.items()}
# Codes of fewer bits than a byte, the first in a byte's lowest bits; NumPy gives each a byte.
_SUB_BYTE_BITS = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_BITS = {code: 8 * dtype.itemsize for code, dtype in ALL_DTYPES.items()} | _SUB_BYTE_BITS
_BYTES_PER_CHUNK = 2**24  # of a plain array that is copied


class Tensor(NamedTuple):  # not a dataclass: a header may have a million
    """A tensor in a file.

    Attributes:
      name: Its name in the file.
      dtype: Its dtype as safetensors writes it, such as "F32".
      shape: Its shape.
      start: Its first byte, counted from the end of the header.
      stop: The byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def leaf(self) -> str:
        """The name of the leaf that it holds, or holds a part of."""
        return self.name.partition(":")[0]

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype that `dtype` stands for."""
        return ALL_DTYPES[self.dtype]

    @property
    def outline(self) -> jax.ShapeDtypeStruct:
        """Its shape and dtype, one object for all tensors that share them."""
        return _outline(self.dtype, self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return self.stop - self.start

    def array_of(self, stored: np.ndarray) -> np.ndarray:
        """Returns the array whose bytes are `stored`, flat and of uint8."""
        bits = _SUB_BYTE_BITS.get(self.dtype)
        if bits is not None:
            codes = unpack_codes(stored, cast(Bits, bits), math.prod(self.shape))
            stored = (codes + np.int8(2 ** (bits - 1))).view(np.uint8)
        return stored.view(self.numpy_dtype).reshape(self.shape)


@functools.lru_cache(maxsize=1024)
def _outline(dtype: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, ALL_DTYPES[dtype])


def num_bits(dtype: str, shape: Sequence[int]) -> int:
    """Returns the bits that a tensor takes in a file."""
    return math.prod(shape) * _BITS[dtype]


@functools.cache  # finding the name of a dtype takes longer than parsing the entry of a tensor
def name_and_bits(dtype: DTypeLike) -> tuple[str, int]:
    """Returns the name of a dtype, and the bits that an entry takes in a file."""
    found = jnp.dtype(dtype)
    bits = _SUB_BYTE_BITS.get(_ALL_CODES.get(native_dtype(found), ""), 8 * found.itemsize)
    return found.name, bits


def is_copied(dtype: DTypeLike) -> bool:
    """Returns True for a dtype that is copied from files, and of no weights to be changed."""
    return jnp.dtype(dtype) in COPIED_DTYPES.values()


@dataclasses.dataclass(frozen=True)
class FilePlan:
    """A file before it is written.

    Attributes:
      tensors: The tensors, in the order of the file.
      leaves: The tree's leaves by name, in the order of the tree.
      tree: The tree's structure in JSON, as the header stores it.
      metadata: Entries of other programs for the header.
      masks: Masks of the leaves whose zeros are left out, by name.
    """

    tensors: tuple[Tensor, ...]
    leaves: dict[str, Leaf]
    tree: Any
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    masks: dict[str, Mask] = dataclasses.field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.tensors[-1].stop if self.tensors else 0

    def resized(self, num_bytes: dict[str, int]) -> "FilePlan":
        """Returns the plan with other sizes for some of the one-byte tensors, by name."""
        if not num_bytes:
            return self
        parts = [
            (t.name, t.dtype, (num_bytes[t.name],) if t.name in num_bytes else t.shape)
            for t in self.tensors
        ]
        return dataclasses.replace(self, tensors=_placed(parts))

    def with_masks(self, masks: dict[str, Mask]) -> "FilePlan":
        """Returns the plan with a mask and its values in place of some float leaves, by name."""
        if not masks:
            return self
        parts: list[tuple[str, str, tuple[int, ...]]] = []
        for t in self.tensors:
            mask = masks.get(t.name)
            if mask is None:
                parts.append((t.name, t.dtype, t.shape))
            else:
                parts.append((f"{t.name}:mask", "U8", (mask.num_bytes,)))
                parts.append((f"{t.name}:values", t.dtype, (mask.num_values,)))
        return dataclasses.replace(self, tensors=_placed(_in_order(parts)), masks=masks)

    def chunks(
        self, tensor: Tensor, leaf: Leaf | StreamedLeaf | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the bytes of a tensor, copied: those of `leaf`, or of the plan's own leaf."""
        # Copies, because another thread may change an array while it is saved: the bytes that are
        # checked and summed up have to be those that are written.
        name, part = tensor.leaf, tensor.name.removeprefix(tensor.leaf)
        leaf = self.leaves[name] if leaf is None else leaf
        mask = self.masks.get(name)
        if mask is not None and part == ":mask":
            yield mask.chunk()
        elif isinstance(leaf, StreamedLeaf):
            yield from map(raw_bytes, leaf.parts())
        elif not is_quantized(leaf):
            flat = raw_bytes(np.asarray(leaf))
            if mask is not None:
                flat = mask.values_of(flat, tensor.numpy_dtype.itemsize)
            for start in range(0, flat.size, _BYTES_PER_CHUNK):
                yield flat[start : start + _BYTES_PER_CHUNK].copy()
        elif part == ":codes":
            yield from _packed_chunks(name, leaf)
        else:
            yield raw_bytes(_side_part(name, leaf, part))


def native_dtype(dtype: np.dtype) -> np.dtype:
    """Returns a dtype in the machine's byte order, the only one that jax and files support."""
    # Not newbyteorder alone: the dtypes of random keys lack that method.
    return dtype if getattr(dtype, "isnative", True) else dtype.newbyteorder("=")


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array in a file, row-major, as a flat array of uint8."""
    bits = _SUB_BYTE_BITS.get(_ALL_CODES.get(array.dtype, ""))
    if bits is not None:
        codes = np.ascontiguousarray(array).reshape(-1).view(np.int8)
        return pack_codes(codes - np.int8(2 ** (bits - 1)), cast(Bits, bits))
    native = array.astype(native_dtype(array.dtype), copy=False)
    return np.ascontiguousarray(native).reshape(-1).view(np.uint8)


def plan_file(
    tree: PyTree, is_copy: bool = False, metadata: Mapping[str, str] | None = None
) -> FilePlan:
    """Lays out a tree as a file; equal structures, shapes and dtypes make equal plans."""
    # A copy of a file may have all dtypes of safetensors.
    leaves: dict[str, Leaf] = {}
    skeleton = _skeleton(as_plain(tree), (), leaves)
    parts: list[tuple[str, str, tuple[int, ...]]] = []
    parts_of: dict[int, Sequence[tuple[str, str, tuple[int, ...]]]] = {}
    for name, leaf in leaves.items():
        # Leaves of one description are one object in the tree of a header: once is enough.
        found = parts_of.get(id(leaf))
        if found is None:
            found = parts_of[id(leaf)] = _leaf_tensors(name, leaf, is_copy)
        parts += [(name + part, code, shape) for part, code, shape in found]
    return FilePlan(_placed(_in_order(parts)), leaves, skeleton, dict(metadata or {}))


def _in_order(parts: list[tuple[str, str, tuple[int, ...]]]) -> list:
    """Returns tensors in the order of a file, in which they are aligned without gaps."""
    return sorted(parts, key=lambda part: (-ALL_DTYPES[part[1]].itemsize, part[0]))


def _placed(parts: list[tuple[str, str, tuple[int, ...]]]) -> tuple[Tensor, ...]:
    """Returns tensors that follow each other without gaps."""
    tensors, start = [], 0
    for name, dtype, shape in parts:
        stop = start + num_bits(dtype, shape) // 8
        tensors.append(Tensor(name, dtype, shape, start, stop))
        start = stop
    return tuple(tensors)


def _skeleton(node: PyTree, path: tuple[str | int, ...], leaves: dict[str, Leaf]) -> Any:
    """Returns the structure of `node` in JSON, 0 for a leaf; adds its leaves to `leaves`."""
    name = leaf_name(path)
    if len(path) > DEPTH_LIMIT:
        raise ValueError(f"the tree is nested deeper than {DEPTH_LIMIT} at {name[:60] + '...'!r}.")
    if node is None:
        return None
    if type(node) is dict:
        kinds = {type(key) for key in node}
        if not (kinds <= {str} or kinds == {int}):
            raise TypeError(
                f"the keys of a dict must be all strings or all integers; at {name!r} got "
                f"{sorted(kind.__name__ for kind in kinds)}."
            )
        children = {str(k): _skeleton(node[k], (*path, k), leaves) for k in sorted(node)}
        return ["int_keys", children] if kinds == {int} else children
    if type(node) in (list, tuple):
        nodes = (_skeleton(child, (*path, i), leaves) for i, child in enumerate(node))
        return [type(node).__name__, *nodes]
    check_leaf(name, node.qvalue if is_quantized(node) else node)
    leaves[name] = key_data(node) if is_random_key(node) else node
    return 0


def is_random_key(leaf: Any) -> bool:
    """Returns True for an array of random keys, or the shape of one."""
    # All other dtypes are NumPy's: that is found faster.
    is_other = is_quantized(leaf) or isinstance(
        getattr(leaf, "dtype", None), (np.dtype, type(None))
    )
    return not is_other and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(keys: Any) -> Any:
    """Returns the uint32 array that a file has for random keys, or its shape."""
    read = jax.random.key_data
    return jax.eval_shape(read, keys) if isinstance(keys, jax.ShapeDtypeStruct) else read(keys)


def leaf_name(path: tuple[str | int, ...]) -> str:
    """Returns the name of the leaf at a path; different paths have different names."""
    return "/".join(_escape(str(key)) for key in path) if path else "array"


def _escape(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the key {text!r} of a dict is not valid Unicode text.") from error
    if text == "__metadata__":  # the key that safetensors reserves
        return "%5F_metadata__"
    return text.replace("%", "%25").replace("/", "%2F").replace(":", "%3A")


def check_leaf(name: str, leaf: Any) -> None:
    """Raises TypeError unless `leaf` is an array of any dtype; the message says what to do."""
    arrays = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)
    if isinstance(leaf, arrays) and not isinstance(leaf, np.ma.MaskedArray):
        return
    if isinstance(leaf, (bool, int, float, complex)):
        raise TypeError(
            f"leaf {name!r} is the Python number {leaf!r}, which has no dtype: wrap it, for "
            f"instance as np.float32({leaf!r})."
        )
    raise TypeError(
        f"{name!r} is of type {type(leaf).__name__}, which is neither an array nor a node that jax "
        "knows: convert it to an array, register its type as a pytree, or leave it out."
    )


def check_has_values(name: str, array: Array) -> None:
    """Raises unless the values of an array can be read in this process."""
    if isinstance(array, jax.ShapeDtypeStruct) or not checks.is_concrete(array):
        raise TypeError(f"leaf {name!r} has no values: it is a {type(array).__name__}.")
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"leaf {name!r} is partly on other processes: gather it first, for instance "
            "with `jax.experimental.multihost_utils.process_allgather`."
        )


def _leaf_tensors(name: str, leaf: Leaf, is_copy: bool) -> list[tuple[str, str, tuple[int, ...]]]:
    """Returns the tensors that hold a leaf: what follows its name in theirs, dtype and shape."""
    if not is_quantized(leaf):
        if is_copy and (code := _ALL_CODES.get(native_dtype(leaf.dtype))):
            return [("", code, tuple(leaf.shape))]
        return [("", _dtype_code(name, leaf.dtype), tuple(leaf.shape))]
    leaf.check_parts(name)
    _dtype_code(name, jnp.dtype(leaf.dtype))
    shape = tuple(leaf.scale.shape)
    num_bytes = num_packed_bytes(math.prod(leaf.shape), leaf.bits)
    tensors: list[tuple[str, str, tuple[int, ...]]] = [(":codes", "U8", (num_bytes,))]
    if leaf.grid.scale_dtype == "log8":
        tensors += [(":scale", "U8", shape), (":unit", "F32", ())]
    else:
        tensors.append((":scale", _dtype_code(name, leaf.scale.dtype), shape))
    if leaf.zero is not None:
        tensors.append((":zero", "I8", shape))
    return tensors


def _dtype_code(name: str, dtype: Any) -> str:
    code = DTYPE_CODES.get(native_dtype(dtype))
    if code is None:
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        hint = " Save real and imaginary parts instead." if is_complex else ""
        raise TypeError(f"leaf {name!r} has dtype {dtype}, which a file cannot hold.{hint}")
    return code


def _packed_chunks(name: str, leaf: QuantizedArray) -> Iterator[np.ndarray]:
    codes = np.asarray(leaf.unpacked().qvalue).reshape(-1)
    for start in range(0, codes.size, CODES_PER_CHUNK):
        chunk = codes[start : start + CODES_PER_CHUNK].astype(np.int8)
        leaf.check_codes(chunk, name)
        yield pack_codes(chunk, leaf.bits, levels=leaf.grid.levels)


def _side_part(name: str, leaf: QuantizedArray, part: str) -> np.ndarray:
    """Returns the scales, the unit of log8 scales, or the zeros of a low-bit leaf for a file."""
    leaf.check_values(name)
    if part == ":zero":
        return np.asarray(leaf.zero)
    scale = np.asarray(leaf.scale)
    return scale if leaf.grid.scale_dtype != "log8" else log8_parts(name, scale)[part]


def log8_parts(name: str, scale: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors of log8 scales: their bytes, and the largest as ":unit"."""
    try:
        codes, largest_scale = encode_log8(scale)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    return {":scale": codes, ":unit": largest_scale}
