"""Packed bytes against plain Python integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip._core.grids import Grid, code_range
from jaxclip.lowbit import packing
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.lowbit.packing import num_packed_bytes, pack_codes, unpack_codes
from jaxclip.lowbit.quantizer import quantize

ALL_BITS = [1, "ternary", 2, 3, 4, 5, 6, 8]
GRIDS = [(b, "full") for b in ALL_BITS] + [(b, "narrow") for b in (2, 3, 4, 5, 6, 8)]
every_grid = pytest.mark.parametrize(("bits", "levels"), GRIDS)


def packed_by_hand(codes, bits, levels):
    """The documented layout in plain Python integers."""
    low, _ = code_range(bits, levels)
    digits = [(c + 1) // 2 if bits == 1 else c - low for c in map(int, codes)]
    if bits == "ternary":
        rows = [digits[i : i + 5] for i in range(0, len(digits), 5)]
        return [sum(d * 3**k for k, d in enumerate(row)) for row in rows]
    stream = sum(d << (i * bits) for i, d in enumerate(digits))
    return list(stream.to_bytes(-(-len(digits) * bits // 8), "little"))


def draw_codes(data, bits, levels, size):
    low, high = code_range(bits, levels)
    values = [-1, 1] if bits == 1 else range(low, high + 1)
    return np.asarray(
        data.draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)), np.int8
    )


@every_grid
@given(data=st.data())
def test_packing_is_the_documented_layout_and_unpacking_its_exact_inverse(bits, levels, data):
    codes = draw_codes(data, bits, levels, data.draw(st.integers(0, 23)))
    packed = pack_codes(codes, bits, levels=levels)
    assert isinstance(packed, np.ndarray)
    assert packed.dtype == np.uint8
    assert packed.tolist() == packed_by_hand(codes, bits, levels)
    assert packed.size == num_packed_bytes(codes.size, bits)
    back = unpack_codes(packed, bits, codes.size, levels=levels)
    assert back.dtype == np.int8
    assert np.array_equal(back, codes)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_every_byte_is_read_as_its_five_lowest_digits_in_base_3(convert):
    packed = np.arange(256, dtype=np.uint8)  # the packer writes none above 242
    expected = [byte // 3**k % 3 - 1 for byte in range(256) for k in range(5)]
    assert unpack_codes(convert(packed), "ternary", 5 * 256).tolist() == expected


def random_codes(bits, levels, size):
    low, high = code_range(bits, levels)
    codes = np.random.default_rng(size).integers(low, high + 1, size).astype(np.int8)
    return np.where(codes == 0, 1, codes).astype(np.int8) if bits == 1 else codes


@every_grid
def test_numpy_and_jit_pack_the_same_bytes_and_unpack_the_same_codes(bits, levels):
    # Odd: the last byte, the last word and the last group of eight are all cut short.
    codes = random_codes(bits, levels, 43)
    packed = pack_codes(codes, bits, levels=levels)
    assert packed.tolist() == packed_by_hand(codes, bits, levels)
    from_jit = jax.jit(lambda c: pack_codes(c, bits, levels=levels))(codes)
    assert from_jit.dtype == jnp.uint8
    assert np.array_equal(from_jit, packed)
    back = jax.jit(lambda p: unpack_codes(p, bits, 43, levels=levels))(packed)
    assert back.dtype == jnp.int8
    assert np.array_equal(back, codes)


@every_grid
def test_long_arrays_are_packed_in_pieces_without_a_seam(bits, levels, monkeypatch):
    monkeypatch.setattr(packing, "CODES_PER_CHUNK", 40)
    codes = random_codes(bits, levels, 131)
    packed = pack_codes(codes, bits, levels=levels)
    assert packed.tolist() == packed_by_hand(codes, bits, levels)
    assert np.array_equal(unpack_codes(packed, bits, 131, levels=levels), codes)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_wider_integers_and_views_that_are_not_contiguous_are_packed_alike(dtype):
    codes = random_codes(5, "full", 60)
    expected = pack_codes(codes, 5)
    assert np.array_equal(pack_codes(codes.astype(dtype), 5), expected)
    assert np.array_equal(pack_codes(np.repeat(codes, 2)[::2], 5), expected)
    packed = np.repeat(expected, 2)[::2]
    assert np.array_equal(unpack_codes(packed, 5, 60), codes)


def test_codes_of_four_bit_integers_are_packed_as_those_of_int8():
    codes = random_codes(4, "full", 9)
    packed = jax.jit(lambda c: pack_codes(c, 4))(jnp.asarray(codes).astype(jnp.int4))
    assert np.array_equal(packed, pack_codes(codes, 4))


@pytest.mark.parametrize("bits", [0, 7, 9, True, "2", None], ids=repr)
def test_unknown_bits_are_refused_with_the_allowed_list(bits):
    for call in (
        lambda: num_packed_bytes(3, bits),
        lambda: pack_codes(np.zeros(3, np.int8), bits),
        lambda: unpack_codes(np.zeros(3, np.uint8), bits, 3),
    ):
        with pytest.raises(ValueError, match="bits must be one of"):
            call()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_arrays_of_any_shape_are_packed_in_row_major_order(bits):
    codes = np.asarray([[1, -1, 1], [-1, -1, 1]], np.int8)
    for c in (codes, np.asfortranarray(codes)):
        assert np.array_equal(pack_codes(c, bits), pack_codes(codes.ravel(), bits))


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_packed_array_of_the_wrong_length_is_refused(length):
    with pytest.raises(ValueError, match="packed must have 2 bytes for 4 codes"):
        unpack_codes(np.zeros(length, np.uint8), 4, 4)


@pytest.mark.thorough
@pytest.mark.parametrize(("bits", "levels"), [(1, "full"), ("ternary", "full"), (3, "full")])
def test_codes_survive_quantize_pack_unpack_bit_for_bit(bits, levels):
    x = np.random.default_rng(10).normal(size=(5, 7)).astype(np.float32)
    q = quantize(jnp.asarray(x), Grid(bits, levels=levels, axis=1))
    packed = pack_codes(np.asarray(q.qvalue), bits, levels=levels)
    codes = unpack_codes(packed, bits, 35, levels=levels).reshape(5, 7)
    assert np.array_equal(codes, q.qvalue)
    rebuilt = QuantizedArray(jnp.asarray(codes), q.scale, q.grid, q.dtype)
    assert np.array_equal(np.asarray(dequantize(rebuilt)), np.asarray(dequantize(q)))
