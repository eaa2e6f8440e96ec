"""Entropy coding: exact, near the entropy, and safe to read."""

import struct
import sys
import zlib

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxclip.lowbit.coding import entropy_coding
from jaxclip.lowbit.coding.entropy_coding import check_coding, decode_codes, encode_codes

every_coding = pytest.mark.parametrize("kind", ["huffman", "ans", "lanes"])


def entropy(codes: np.ndarray) -> float:
    """Bits a code, in float64."""
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / codes.size
    return float(-(shares * np.log2(shares)).sum())


def rounded(draw: np.ndarray, step: float) -> np.ndarray:
    return np.clip(np.round(draw / step), -128, 127).astype(np.int8)


@every_coding
@hypothesis.given(
    codes=st.one_of(
        hypothesis.extra.numpy.arrays(np.int8, st.integers(0, 200)),
        hypothesis.extra.numpy.arrays(
            np.int8, st.integers(0, 200), elements=st.integers(-2, 1), fill=st.just(0)
        ),
    )
)
def test_codes_come_back(kind, codes):
    coded = encode_codes(codes, kind)
    np.testing.assert_array_equal(decode_codes(coded, kind, codes.size), codes)
    assert encode_codes(codes, kind) == coded


@every_coding
@pytest.mark.parametrize("codes", [[0, 127, 127], [-128, 0, 127], [-128, -128, 127, 0, 0]])
def test_the_outermost_codes_come_back(kind, codes):
    codes = np.array(codes * 50, np.int8)
    np.testing.assert_array_equal(decode_codes(encode_codes(codes, kind), kind, codes.size), codes)


@every_coding
@pytest.mark.parametrize(
    "count", [entropy_coding._CHUNK - 1, entropy_coding._CHUNK, entropy_coding._CHUNK + 41]
)
@pytest.mark.parametrize("step", [0.2, 2.0])
def test_chunks_join(kind, count, step):
    codes = rounded(np.random.default_rng(0).standard_t(2, count), step)
    np.testing.assert_array_equal(decode_codes(encode_codes(codes, kind), kind, count), codes)


@pytest.mark.parametrize(("step", "digits"), [(8, 8), (4, 5), (3, 4), (2, 3), (1, 2), (0.3, 1)])
def test_chunks_join_at_every_number_of_digits_in_a_byte(step, digits):
    codes = rounded(np.random.default_rng(0).standard_normal(2_500_003), step)
    coded = encode_codes(codes, "huffman")
    assert coded is not None
    assert struct.unpack("<bB", coded[:2])[1] == digits
    np.testing.assert_array_equal(decode_codes(coded, "huffman", codes.size), codes)


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("draw", ["gaussian", "student_t", "uniform"])
def test_the_coded_size_is_near_the_entropy(draw, step):
    rng = np.random.default_rng(1)
    values = {
        "gaussian": rng.standard_normal(300_000),
        "student_t": rng.standard_t(3, 300_000),
        "uniform": rng.uniform(-2, 2, 300_000),
    }[draw]
    codes = rounded(values, step)
    bound = entropy(codes) * codes.size / 8
    assert bound <= len(encode_codes(codes, "ans")) <= 1.001 * bound + 600
    assert len(encode_codes(codes, "huffman")) <= 1.035 * bound + 300


def test_huffman_follows_a_spread_that_changes_on_the_way_and_ans_does_not():
    rng = np.random.default_rng(3)
    spread = np.where(np.arange(100_000) < 50_000, 0.5, 8.0)
    codes = rounded(spread * rng.standard_normal(100_000), 1.0)
    mixed = rng.permutation(codes)
    ordered, shuffled = (
        {kind: len(encode_codes(c, kind)) for kind in ("huffman", "ans")} for c in (codes, mixed)
    )
    assert ordered["huffman"] < 0.95 * ordered["ans"]
    assert shuffled["huffman"] > ordered["ans"]
    assert shuffled["ans"] == pytest.approx(ordered["ans"], rel=1e-3)


def test_a_constant_takes_no_room():
    codes = np.full(100_000, 7, np.int8)
    assert len(encode_codes(codes, "ans")) <= 32
    assert len(encode_codes(codes, "huffman")) < 100_000 / 8 / 7 + 16


def test_rare_outliers_cost_only_themselves():
    codes = rounded(np.random.default_rng(2).standard_normal(100_000), 1.0)
    with_outliers = codes.copy()
    with_outliers[::10_000] = 127
    sizes = [len(encode_codes(c, "huffman")) for c in (codes, with_outliers)]
    assert sizes[1] < 1.02 * sizes[0]


@every_coding
@pytest.mark.parametrize("num_codes", [0, 1, 5, 1000])
def test_flipped_bits_are_refused_or_give_as_many_codes(kind, num_codes):
    codes = rounded(np.random.default_rng(3).standard_normal(num_codes), 0.8)
    coded = encode_codes(codes, kind)
    for position in range(min(len(coded), 60)):
        data = bytearray(coded)
        data[position] ^= 1 << (position % 8)
        try:
            decoded = decode_codes(bytes(data), kind, num_codes)
        except ValueError:
            continue
        assert decoded.shape == (num_codes,)


@every_coding
def test_data_of_another_length_are_refused(kind):
    codes = rounded(np.random.default_rng(4).standard_normal(1000), 0.8)
    coded = encode_codes(codes, kind)
    for changed in (coded + bytes(4), coded[:-4], b"", coded * 2, coded[:3]):
        with pytest.raises(ValueError, match="coded data are damaged"):
            decode_codes(changed, kind, 1000)
    for count in (999, 1100, 0):
        with pytest.raises(ValueError, match="coded data are damaged"):
            decode_codes(coded, kind, count)


def test_words_that_are_left_over_are_refused_for_ans(monkeypatch):
    codes = rounded(np.random.default_rng(4).standard_normal(1000), 0.8)
    empty, coder_of = encode_codes(codes, "ans"), entropy_coding._ans_coder
    # A coder that is not empty to begin with: its words lie below those of the codes.
    words = np.array([7, 2**31], np.uint32)
    monkeypatch.setattr(entropy_coding, "_ans_coder", lambda _: coder_of(words))
    coded = encode_codes(codes, "ans")
    monkeypatch.undo()
    assert len(empty) < len(coded) <= len(empty) + 8
    with pytest.raises(ValueError, match="coded data are damaged"):
        decode_codes(coded, "ans", 1000)


def test_no_data_are_codes_beyond_their_growth_and_the_writer_makes_none(monkeypatch):
    codes = np.zeros(4000, np.int8)
    data = encode_codes(codes, "ans")
    monkeypatch.setattr(entropy_coding, "_ALWAYS_ALLOWED", 4000 - 64 * len(data))
    assert encode_codes(codes, "ans") == data
    monkeypatch.setattr(entropy_coding, "_ALWAYS_ALLOWED", 3999 - 64 * len(data))
    assert encode_codes(codes, "ans") is None
    with pytest.raises(ValueError, match=r"4,000 codes in \d+ bytes are refused as a bomb"):
        decode_codes(data, "ans", 4000)


def test_a_header_that_asks_for_a_terabyte_is_refused_for_ans():
    table = zlib.compress(np.array([2**40], "<u8").tobytes(), 9, -15)
    data = struct.pack("<bxHI", 0, 1, len(table)) + table
    with pytest.raises(ValueError, match="refused as a bomb"):
        decode_codes(data, "ans", 2**40)


def test_matches_and_runs_which_the_writer_never_makes_do_not_grow_for_huffman():
    size = 2**20
    data = struct.pack("<bBxxxxxxQ", 0, 8, 0) + zlib.compress(bytes(size), 9, -15)
    with pytest.raises(ValueError, match="too short for their codes"):
        decode_codes(data, "huffman", 8 * size)
    constant = np.zeros(8 * 10_000, np.int8)
    assert (decode_codes(encode_codes(constant, "huffman"), "huffman", constant.size) == 0).all()


def test_a_bomb_is_refused_before_it_grows():
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = bomb.compress(bytes(2**26)) + bomb.flush()
    with pytest.raises(ValueError, match="length is wrong"):
        decode_codes(struct.pack("<bBxxxxxxQ", 0, 1, 0) + data, "huffman", 1000)


@pytest.mark.parametrize(("k", "num_beyond"), [(6, 0), (0, 0), (1, 11), (1, 2**63)])
def test_prefixes_that_no_writer_makes_are_refused_for_huffman(k, num_beyond):
    data = encode_codes(np.zeros(10, np.int8), "huffman")[16:]
    with pytest.raises(ValueError, match="coded data are damaged"):
        decode_codes(struct.pack("<bBxxxxxxQ", 0, k, num_beyond) + data, "huffman", 10)


@pytest.mark.parametrize(
    ("lowest", "counts"),
    [(0, []), (0, [9]), (127, [5, 5]), (-128, [0] * 256 + [10]), (0, [2**64 - 1, 11])],
)
def test_prefixes_that_no_writer_makes_are_refused_for_ans(lowest, counts):
    table = zlib.compress(np.array(counts, "<u8").tobytes(), 9, -15)
    prefix = struct.pack("<bxHI", lowest, len(counts), len(table))
    with pytest.raises(ValueError, match="coded data are damaged"):
        decode_codes(prefix + table, "ans", 10)


def test_an_unknown_coding_is_refused_by_name():
    with pytest.raises(ValueError, match="coding must be one of"):
        check_coding("zip")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    coded = encode_codes(np.zeros(10, np.int8), "ans")
    monkeypatch.setitem(sys.modules, "constriction", None)
    check_coding("smallest")
    assert entropy_coding.codings_tried("smallest") == ("huffman", "lanes")
    with pytest.raises(ImportError, match=r"jaxclip\[coding\]"):
        check_coding("ans")
    with pytest.raises(ImportError, match=r"jaxclip\[coding\]"):
        decode_codes(coded, "ans", 10)
