"""Coded levels: exact, near the entropy, and safe to read."""

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxclip.lowbit.coding import code_lengths
from jaxclip.lowbit.coding.level_coding import decode_levels, encode_levels
from jaxclip.lowbit.coding.trellis import levels_of, odd_states

states = pytest.mark.parametrize("num_states", [1, 4, 8])
NORMAL = np.random.default_rng(0).normal(size=(64, 300))


def on_path(codes: np.ndarray, num_states: int, chain: int) -> np.ndarray:
    """Levels of a trellis with the given codes."""
    flat = codes.reshape(-1)
    if num_states == 1 or not flat.size:
        return flat
    rows = np.pad(flat, (0, -flat.size % chain)).reshape(-1, chain)
    return np.asarray(levels_of(rows, num_states)).reshape(-1)[: flat.size]


def check(codes: np.ndarray, num_states: int, chain: int) -> bytes:
    levels = on_path(codes, num_states, chain)
    coded = encode_levels(levels, chain=chain, num_states=num_states)
    found = decode_levels(coded, levels.size, np.int32)
    np.testing.assert_array_equal(found, levels)
    assert encode_levels(levels, chain=chain, num_states=num_states) == coded
    return coded


@states
@hypothesis.given(
    codes=st.one_of(
        hypothesis.extra.numpy.arrays(np.int32, st.integers(0, 200), elements=st.integers(-9, 9)),
        hypothesis.extra.numpy.arrays(
            np.int32, st.integers(0, 200), elements=st.integers(-(2**28), 2**28), fill=st.just(0)
        ),
    ),
    chain=st.integers(1, 300),
)
def test_levels_come_back(num_states, codes, chain):
    check(codes, num_states, min(chain, max(codes.size, 1)))


@states
@pytest.mark.parametrize("scale", [0.0, 0.02, 0.4, 3.0, 40.0, 1e6])
@pytest.mark.parametrize("chain", [1, 7, 300, 4800])
def test_codes_of_every_size_come_back(num_states, scale, chain):
    check(np.round(scale * NORMAL[:16]).astype(np.int32), num_states, chain)


@states
def test_one_value_takes_hardly_any_bytes_but_its_sign(num_states):
    for value in (0, 2, -6):
        levels = on_path(np.full(30_000, value), num_states, 300)
        coded = encode_levels(levels, chain=300, num_states=num_states)
        assert len(coded) < 120 + (30_000 // 8 if value else 0)  # both signs have one length
        np.testing.assert_array_equal(decode_levels(coded, levels.size, np.int16), levels)


def entropy(codes: np.ndarray, contexts: np.ndarray) -> float:
    """Bits a code in float64, given the contexts."""
    _, joint = np.unique(1000 * contexts.astype(np.int64) + codes, return_counts=True)
    _, alone = np.unique(contexts, return_counts=True)
    return float(np.sum(alone * np.log2(alone)) - np.sum(joint * np.log2(joint))) / codes.size


@pytest.mark.parametrize("draw", ["normal", "laplace"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 5.0])
def test_bytes_are_near_the_entropy(draw, scale):
    source = getattr(np.random.default_rng(1), draw)(size=(512, 512))
    codes = np.round(scale * source).astype(np.int32)
    for num_states in (1, 8):
        contexts = odd_states(codes, num_states) if num_states > 1 else np.zeros_like(codes)
        bits = 8 * len(check(codes, num_states, 512)) / codes.size
        # Four thousandths for the lanes, the rest for tables of sources with long tails.
        assert bits < 1.008 * entropy(codes, contexts) + 0.003


def test_classes_of_rows_and_columns_are_found():
    rng = np.random.default_rng(2)
    spread = np.exp2(rng.normal(size=(256, 1)) / 2 + rng.normal(size=400) / 2)
    codes = np.round(spread * rng.normal(size=(256, 400))).astype(np.int32)
    for transposed in (False, True):
        array = codes.T.copy() if transposed else codes
        bits = 8 * len(check(array, 8, array.shape[1])) / codes.size
        # Each entry's own deviation known, an ideal code takes this, and one table .25 more.
        ideal = np.mean(np.log2(np.maximum(spread, 0.3) * np.sqrt(2 * np.pi * np.e)))
        assert bits < entropy(codes, np.zeros_like(codes)) - 0.1
        assert bits < ideal + 0.2


@states
def test_damaged_bytes_give_an_error_or_other_levels(num_states):
    rng = np.random.default_rng(3)
    codes = np.where(rng.random((20, 30)) < 0.02, 10**6, np.round(NORMAL[:20, :30]))
    levels = on_path(codes.astype(np.int32), num_states, 30)
    coded = encode_levels(levels, chain=30, num_states=num_states)
    damaged = [coded[:size] for size in range(0, len(coded), 7)]
    damaged += [coded + b"\0", coded + b"\0\0", bytes(16), bytes(len(coded)), b"\xff" * len(coded)]
    for _ in range(200):
        flipped = bytearray(coded)
        for place in rng.integers(0, len(coded) if rng.random() < 0.5 else 60, 2):
            flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    num_errors = 0
    for data in damaged:
        try:
            assert decode_levels(data, levels.size, np.int32).shape == levels.shape
        except ValueError:
            num_errors += 1
    assert num_errors > 0.8 * len(damaged)  # the checksums of a file find the rest


def test_another_count_or_dtype_is_an_error():
    levels = on_path(np.round(40 * NORMAL).astype(np.int32), 8, 300)
    coded = encode_levels(levels, chain=300)
    for count in (0, levels.size - 1, levels.size + 1, levels.size - 300):
        with pytest.raises(ValueError, match="damaged"):
            decode_levels(coded, count, np.int32)
    with pytest.raises(ValueError, match="do not fit in int8"):
        decode_levels(coded, levels.size, np.int8)


def test_levels_that_cannot_be_coded_are_refused():
    with pytest.raises(ValueError, match="path of the trellis of 8 states"):
        encode_levels(np.array([1, 0, 0]), chain=3, num_states=8)
    with pytest.raises(ValueError, match="chain must be at most 32768, got 40000"):
        encode_levels(np.zeros(50_000, np.int8), chain=40_000)
    with pytest.raises(ValueError, match="below"):
        encode_levels(np.array([2**30]), chain=1, num_states=1)


@states
def test_the_trellis_is_found(num_states):
    codes = np.round(NORMAL).astype(np.int8)
    levels = on_path(codes, num_states, 300)
    coded = encode_levels(levels, chain=300)
    assert coded == encode_levels(levels, chain=300, num_states=num_states)
    assert coded[0] == num_states


def test_codes_of_no_bytes_take_few_steps():
    levels = np.zeros(2**22, np.int8)
    coded = encode_levels(levels, chain=256)
    assert len(coded) < 2**22 / 8 / 500
    np.testing.assert_array_equal(decode_levels(coded, levels.size), levels)
    with pytest.raises(ValueError, match="damaged"):
        decode_levels(encode_levels(levels[: 2**16], chain=1), 2**21)


def test_frequencies_sum_to_the_total_for_any_bytes():
    rng = np.random.default_rng(4)
    for size in range(1, len(code_lengths.NODES) + 1):
        for high in (1, 50, 256):
            lengths = rng.integers(0, high, size, dtype=np.uint8)
            for escape in (0, 100, code_lengths.NEVER):
                found = code_lengths.frequencies(lengths, escape)
                assert found.sum() == code_lengths.TOTAL
                assert len(found) == 2 * code_lengths.NODES[size - 1] + 3
                assert (found[:-2] > 0).all()
                assert (found[-2:] > 0).all() == (escape != code_lengths.NEVER)


def test_powers_of_a_half_are_those_of_float64():
    powers = code_lengths._powers_of_half()
    np.testing.assert_allclose(powers, 2.0 ** (30 - np.arange(256) / 256), rtol=2e-9)
