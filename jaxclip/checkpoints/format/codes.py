"""The codes of a low-bit leaf: packed or entropy-coded when written, decoded when read.

`codes = unpack(bytes)` is exact, and bytes that no writer makes are refused.
"""

import dataclasses
import math

import numpy as np

from jaxclip.checkpoints.format.headers import ALWAYS_ALLOWED_BYTES, MAX_RATIO
from jaxclip.checkpoints.format.layout import FilePlan, Leaf, StreamedLeaf, Tensor
from jaxclip.checkpoints.format.masks import Mask
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.coding.entropy_coding import codings_tried, decode_codes, encode_codes
from jaxclip.lowbit.coding.trellis import as_chains, chains_shape, from_chains
from jaxclip.lowbit.packing import unpack_codes
from jaxclip.lowbit.scale_formats import decode_log8, largest_log8


class Allowance:
    """Bytes in memory that coded tensors of a file may have beyond 64 a byte, which readers allow.

    The masks of a plan have their part of it already.
    """

    def __init__(self, plan: FilePlan | None = None) -> None:
        self._num_left = ALWAYS_ALLOWED_BYTES
        if plan is not None:
            for name, mask in plan.masks.items():
                self.takes_mask(plan.leaves[name], mask)

    def takes_mask(self, leaf: Leaf, mask: Mask) -> bool:
        """Returns True if a float leaf may be stored with a mask."""
        itemsize = np.dtype(leaf.dtype).itemsize
        num_bytes = mask.num_bytes + mask.num_values * itemsize
        return self.takes(math.prod(leaf.shape) * itemsize, num_bytes)

    def takes(self, num_in_memory: int, num_bytes: int) -> bool:
        """Returns True if readers will not take the file for one made to exhaust memory."""
        num_beyond = max(num_in_memory - int(MAX_RATIO) * num_bytes, 0)
        is_allowed = num_beyond <= self._num_left
        self._num_left -= num_beyond if is_allowed else 0
        return is_allowed


def coded_tensor(
    tensor: Tensor, leaf: Leaf | StreamedLeaf, coding: str | None, allowance: Allowance
) -> tuple[str, np.ndarray] | None:
    """Returns the coding and bytes of a leaf's codes, or None if packed codes are kept.

    They are if they are not larger, or if the allowance of the file, whose tensors come in their
    order, is used up.
    """
    if coding is None or not isinstance(leaf, QuantizedArray):
        return None
    if tensor.name != f"{tensor.leaf}:codes":
        return None
    # A copy: coders read the codes several times, and another thread may change them.
    codes = np.asarray(leaf.unpacked().qvalue).reshape(-1).astype(np.int8)
    leaf.check_codes(codes, tensor.leaf)
    num_bytes, smallest = tensor.num_bytes, None
    for tried in codings_tried(coding):
        # None where the data are so small that a reader would refuse them.
        if tried == "lanes":
            chains = as_chains(codes.reshape(leaf.shape), _channel_axes(leaf))
            coded = encode_codes(chains.reshape(-1), tried, chain=chains.shape[1])
        else:
            coded = encode_codes(codes, tried)
        if coded is not None and len(coded) < num_bytes:
            num_bytes, smallest = len(coded), (tried, np.frombuffer(coded, np.uint8))
    if smallest is None or not allowance.takes(codes.size, num_bytes):
        return None
    return smallest


def restore_leaf(
    name: str,
    like: QuantizedArray,
    scale: np.ndarray,
    stored: np.ndarray,
    coding: str | None = None,
    *,
    zero: np.ndarray | None = None,
    largest_scale: np.ndarray | None = None,
) -> QuantizedArray:
    """Returns a low-bit array from its tensors; `like` has shapes for arrays."""
    if largest_scale is not None:
        scale = _decoded_log8(name, scale, largest_scale)
    if coding is None:
        codes = _unpacked(name, stored, like)
    else:
        codes = _decoded(name, stored, like, coding)
    q = dataclasses.replace(like, qvalue=codes.reshape(like.shape), scale=scale, zero=zero)
    q.check_values(name)
    return q


def _decoded_log8(name: str, codes: np.ndarray, largest_scale: np.ndarray) -> np.ndarray:
    """Returns log8 scales; refuses bytes that `round_scale` never makes."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = decode_log8(codes, largest_scale)
    # Then the codes are those of the scales too: their magnitudes are 2**(1/8) and more apart.
    if largest_log8(scale, np) != largest_scale:
        raise ValueError(f"{name!r}: scales are not encoded as the format requires.")
    return scale


def _decoded(name: str, stored: np.ndarray, like: QuantizedArray, coding: str) -> np.ndarray:
    axes = _channel_axes(like)
    count = math.prod(like.shape)
    if coding == "lanes":
        count = math.prod(chains_shape(like.shape, axes))
    try:
        codes = decode_codes(stored.tobytes(), coding, count)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    if coding == "lanes":
        chains, codes = codes, from_chains(codes, like.shape, axes).reshape(-1)
        if np.count_nonzero(chains) != np.count_nonzero(codes):
            raise ValueError(
                f"{name!r}: its coded data are damaged: entries follow those of a row."
            )
    like.check_codes(codes, name)
    return codes


def _channel_axes(leaf: QuantizedArray) -> tuple[int, ...]:
    return leaf.fitted_grid.channel_axes(leaf.ndim)


def _unpacked(name: str, packed: np.ndarray, like: QuantizedArray) -> np.ndarray:
    """Returns the codes in `packed`; refuses bytes that `pack_codes` never makes."""
    count, bits, levels = math.prod(like.shape), like.bits, like.grid.levels
    codes = unpack_codes(packed, bits, count, levels=levels)
    if levels == "narrow":  # on a full grid whatever bits there are stand for a code
        like.check_codes(codes, name)
    # The last byte may have room for more codes than there are: it is filled with zeros.
    limit = 3 ** (count % 5 or 5) if bits == "ternary" else 2 ** (count * bits % 8 or 8)
    is_too_large = bits == "ternary" and packed.max(initial=0) >= 3**5
    if is_too_large or (limit < 2**8 and packed[-1:].max(initial=0) >= limit):
        raise ValueError(f"{name!r}: codes are not packed as the format requires.")
    return codes
