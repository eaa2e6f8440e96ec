"""Float leaves with many zeros: a mask of the entries that are not, and their values.

    bytes = mask, packed or entropy-coded + values in their own dtype

An entry is zero if all its bits are, so -0.0 is a value and every leaf comes back bit for bit. The
first byte of a coded mask is the axis along which its entries follow each other: of groups such as
2:4, eight entries along the axis of the groups take few of the 256 bytes possible.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks
from jaxclip.checkpoints.format.codes import Allowance
from jaxclip.checkpoints.format.headers import make_header
from jaxclip.checkpoints.format.layout import (
    DTYPE_CODES,
    FilePlan,
    Leaf,
    Tensor,
    native_dtype,
    raw_bytes,
)
from jaxclip.checkpoints.format.masks import Mask
from jaxclip.lowbit.arrays import is_quantized
from jaxclip.lowbit.coding.entropy_coding import codings_tried, decode_codes, encode_codes
from jaxclip.lowbit.coding.trellis import as_chains, chains_shape, from_chains

_MOST_AXES = 4  # tried, the last ones
_LEAST_SAVED = 64  # bytes, beyond what the header grows by: places in it may have more digits


def without_zeros(plan: FilePlan, read: Callable[[str], Leaf], coding: str | None) -> FilePlan:
    """Returns a plan that leaves out the zeros of float leaves where that takes fewer bytes.

    Args:
      plan: Plan of a whole file.
      read: Returns a leaf by name, as it will be written.
      coding: Entropy coding of the file; without one the plan stays as it is.
    """
    if coding is None:
        return plan
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    masks, allowance = {}, Allowance()
    for name, outline in plan.leaves.items():
        if not _may_have_mask(outline) or tensors[name].num_bytes <= _LEAST_SAVED:
            continue
        leaf = read(name)
        if isinstance(leaf, jax.ShapeDtypeStruct) or not checks.is_concrete(leaf):
            continue
        mask = _mask_of(leaf, tensors[name], coding)
        if mask is not None and allowance.takes_mask(leaf, mask):
            masks[name] = mask
    return plan.with_masks(masks)


def _may_have_mask(leaf: Leaf) -> bool:
    if is_quantized(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.shape:
        return False
    return native_dtype(leaf.dtype) in DTYPE_CODES


def _mask_of(leaf: Leaf, tensor: Tensor, coding: str) -> Mask | None:
    """Returns the mask of a leaf, None if the leaf takes no more bytes as it is."""
    integers = np.dtype(f"u{tensor.numpy_dtype.itemsize}")
    is_value = raw_bytes(np.asarray(leaf)).view(integers) != 0
    num_values = int(np.count_nonzero(is_value))
    saved = (is_value.size - num_values) * integers.itemsize - _LEAST_SAVED
    if saved <= 0:
        return None
    bits = np.packbits(is_value, bitorder="little")
    found, data = _smallest(is_value.reshape(leaf.shape), bits, coding)
    mask = Mask(num_values, data.size, found, bits, data)
    saved -= data.size
    if saved <= 0:
        return None
    alone = FilePlan((tensor._replace(start=0, stop=tensor.num_bytes),), {tensor.name: leaf}, 0)
    growth = len(make_header(alone.with_masks({tensor.name: mask}))) - len(make_header(alone))
    return mask if saved > growth else None


def _smallest(is_value: np.ndarray, bits: np.ndarray, coding: str) -> tuple[str | None, np.ndarray]:
    """Returns the coding that takes the fewest bytes, None for the packed bits, and its bytes."""
    found, smallest = None, bits
    # Huffman as well, whatever is asked for: it alone knows groups, and every Python reads it.
    for tried in dict.fromkeys(("huffman", *codings_tried(coding))):
        last = is_value.ndim - 1
        first = last if tried == "lanes" else max(last + 1 - _MOST_AXES, 0)
        for axis in range(last, first - 1, -1):
            data = _encoded(np.moveaxis(is_value, axis, -1), tried)
            if data is not None and len(data) + 1 < smallest.size:
                found, smallest = tried, np.frombuffer(bytes([axis]) + data, np.uint8)
    return found, smallest


def _encoded(is_value: np.ndarray, coding: str) -> bytes | None:
    if coding == "lanes":
        chains = as_chains(_pairs(is_value), ())
        return encode_codes(chains.reshape(-1), coding, chain=chains.shape[1])
    return encode_codes(np.packbits(is_value, bitorder="little").view(np.int8), coding)


def _pairs(is_value: np.ndarray) -> np.ndarray:
    """Returns a code for two entries along the last axis: 1 or -1 for one value, 2 for both."""
    # Not one for each entry: "lanes" takes codes and their negatives to be as frequent.
    padding = [(0, 0)] * (is_value.ndim - 1) + [(0, is_value.shape[-1] % 2)]
    bits = np.pad(is_value, padding).view(np.int8)
    first, second = bits[..., ::2], bits[..., 1::2]
    return first - second + 2 * (first & second)


# --- Reading --------------------------------------------------------------------------------


def with_zeros(
    name: str, like: Leaf, mask: Mask, stored: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Returns a leaf of the shape and dtype of `like` from the bytes of its mask and its values."""
    try:
        is_value = _decoded(stored, mask.coding, tuple(like.shape))
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    if np.count_nonzero(is_value) != values.size:
        raise ValueError(f"{name!r}: its mask does not have the number of its values.")
    array = np.zeros(like.shape, like.dtype)
    array[is_value] = values
    return array


def _decoded(stored: np.ndarray, coding: str | None, shape: tuple[int, ...]) -> np.ndarray:
    if coding is None:
        return _from_bits(stored, shape)
    axis = int(stored[0]) if stored.size else len(shape)
    if axis >= len(shape):
        raise ValueError("its coded mask is damaged: it has no such axis.")
    moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    data = stored[1:].tobytes()
    if coding == "lanes":
        is_value = _decoded_pairs(data, moved)
    else:
        codes = decode_codes(data, coding, -(-math.prod(shape) // 8))
        is_value = _from_bits(codes.view(np.uint8), moved)
    return np.moveaxis(is_value, -1, axis)


def _decoded_pairs(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    paired = (*shape[:-1], -(-shape[-1] // 2))
    chains = decode_codes(data, "lanes", math.prod(chains_shape(paired, ())))
    codes = from_chains(chains, paired, ())
    bits = np.stack([codes > 0, (codes < 0) | (codes == 2)], axis=-1)
    is_value = bits.reshape(*shape[:-1], -1)[..., : shape[-1]]
    is_full = np.count_nonzero(bits) == np.count_nonzero(is_value)
    is_full &= np.count_nonzero(codes) == np.count_nonzero(chains)
    if not is_full or chains.max(initial=0) > 2 or chains.min(initial=0) < -1:
        raise ValueError("its coded mask is damaged: it has entries that are none.")
    return is_value


def _from_bits(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = math.prod(shape)
    if size % 8 and bits[-1] >> size % 8:
        raise ValueError("its mask is not packed as the format requires.")
    return np.unpackbits(bits, count=size, bitorder="little").view(bool).reshape(shape)
