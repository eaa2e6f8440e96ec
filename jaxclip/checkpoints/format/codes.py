"""Codes of a low-bit leaf: packed or entropy coded on the way out, decoded on the way in."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxclip.checkpoints.format.layout import _CHUNK, Tensor, _log8_parts
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.entropy_coding import codings_tried, decode_codes, encode_codes
from jaxclip.lowbit.packing import num_packed_bytes, pack_codes, unpack_codes
from jaxclip.lowbit.scale_formats import decode_log8


def coded_tensor(tensor: Tensor, leaf: Any, coding: str | None) -> tuple[str, np.ndarray] | None:
    """Returns the codes of a low-bit array entropy coded, if that is smaller than packed.

    Args:
      tensor: A tensor of the plan.
      leaf: The leaf that it belongs to.
      coding: As in `checkpoints.save`; None codes nothing.

    Returns:
      The coding that gives the fewest bytes of those tried, and these. None if the tensor does
      not hold codes, is not smaller when they are coded, or so much smaller that no reader would
      believe it.

    Raises:
      ValueError: If a code is outside the grid.

    Example:
      >>> from jaxclip.lowbit.quantizer import quantize
      >>> plan = plan_file({"w": quantize(jnp.zeros(10_000))})
      >>> coding, data = coded_tensor(plan.tensors[1], plan.leaves["w"], "huffman")
      >>> coding, data.size < 200
      ('huffman', True)
    """
    if coding is None or tensor.name != f"{tensor.leaf}:codes":
        return None
    codes = np.asarray(leaf.qvalue).reshape(-1).astype(np.int8, copy=False)
    leaf.check_codes(codes, tensor.leaf)
    least, smallest = tensor.stop - tensor.start, None
    for tried in codings_tried(coding):
        coded = encode_codes(codes, tried)
        if coded is not None and len(coded) < least:
            least, smallest = len(coded), (tried, np.frombuffer(coded, np.uint8))
    return smallest


# --- Reading --------------------------------------------------------------------------


def restore_leaf(
    name: str,
    like: QuantizedArray,
    scale: np.ndarray,
    stored: np.ndarray,
    coding: str | None = None,
    *,
    zero: np.ndarray | None = None,
    unit: np.ndarray | None = None,
) -> QuantizedArray:
    """Returns a low-bit array from the tensors that a file has for it.

    Args:
      name: The leaf's path, for messages.
      like: The same with shapes for arrays.
      scale: Scales, in the shape of `like.scale`; for log8 their bytes.
      stored: Codes as `pack_codes` packs them, or as `coded_tensor` codes them.
      coding: How they are coded; None if they are packed.
      zero: Zeros, if it has them.
      unit: The unit of log8 scales.

    Returns:
      A `QuantizedArray` of NumPy arrays.

    Raises:
      ValueError: If a scale is 0 or not finite, a code or zero is outside the grid, or codes
        or scales are not packed or coded as the format says.
      ImportError: If `coding` is "ans" and constriction is not installed.

    Example:
      >>> from jaxclip.lowbit.quantizer import quantize
      >>> q = jax.eval_shape(lambda: quantize(jnp.array([0.5, -0.5]), 1))
      >>> restore_leaf("w", q, np.array([0.5], np.float32), np.array([1], np.uint8)).qvalue
      array([ 1, -1], dtype=int8)
    """
    if unit is not None:
        scale = _decoded_log8(name, scale, unit)
    q = dataclasses.replace(like, scale=scale, zero=zero)
    q.check_values(name)
    if coding is None:
        codes = _unpacked(name, stored, like)
    else:
        codes = _decoded(name, stored, like, coding)
    return dataclasses.replace(q, qvalue=codes.reshape(like.shape))


def _decoded_log8(name: str, codes: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """The scales of log8; a unit that `round_scale` never makes is refused."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = decode_log8(codes, unit)
        parts = _log8_parts(name, scale)
    if parts[":unit"] != unit or not np.array_equal(parts[":scale"], codes):
        raise ValueError(f"'{name}': scales are not encoded as the format says.")
    return scale


def _decoded(name: str, stored: np.ndarray, like: QuantizedArray, coding: str) -> np.ndarray:
    try:
        codes = decode_codes(stored.tobytes(), coding, math.prod(like.shape))
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error
    like.check_codes(codes, name)
    return codes


def _unpacked(name: str, packed: np.ndarray, like: QuantizedArray) -> np.ndarray:
    """The codes in `packed`; bytes that `pack_codes` never makes are refused."""
    count, bits, full_signed = math.prod(like.shape), like.bits, like.full_signed
    codes = np.empty(count, np.int8)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        piece = packed[num_packed_bytes(start, bits) : num_packed_bytes(stop, bits)]
        codes[start:stop] = unpack_codes(piece, bits, stop - start, full_signed=full_signed)
        like.check_codes(codes[start:stop], name)
    tail = count - count % 40
    padded = pack_codes(codes[tail:], bits, full_signed=full_signed)
    too_big = bits == "ternary" and packed.max(initial=0) > 242
    if too_big or not np.array_equal(padded, packed[num_packed_bytes(tail, bits) :]):
        raise ValueError(f"'{name}': codes are not packed as the format says.")
    return codes
