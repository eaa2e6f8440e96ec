"""GGUF blocks: the bytes beside an independent reading, the error beside other codes."""

import numpy as np
import pytest

from jaxclip.interop.gguf_blocks import blocks_of_codes, encode_blocks
from jaxclip.interop.gguf_packing import ON_GRIDS, WRITTEN, pack_blocks, unpack_blocks
from oracles.exact_scales import distributions, exact_optimum

BLOCK_SIZE = 32
KINDS = sorted(kind for kind, form in WRITTEN.items() if form.size == BLOCK_SIZE)
TERNARY = ("TQ1_0", "TQ2_0")
every_kind = pytest.mark.parametrize("kind", KINDS)


def parts(data: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d, m and codes of blocks in float64, read bit by bit as the format describes them."""
    rows = data.reshape(-1, WRITTEN[kind].num_bytes)
    num_scales = 2 if kind == "Q4_1" else 1
    header = rows[:, : 2 * num_scales].copy().view("<f2").astype(np.float64)
    d, m = header[:, :1], header[:, 1:] if kind == "Q4_1" else np.zeros((len(rows), 1))
    codes = np.zeros((len(rows), BLOCK_SIZE))
    for i in range(BLOCK_SIZE):
        if kind == "Q8_0":
            codes[:, i] = rows[:, 2 + i].astype(np.int8)
        else:
            byte = rows[:, 2 * num_scales + i % 16]
            codes[:, i] = (byte & 15 if i < 16 else byte >> 4) - 8.0 * (kind == "Q4_0")
    return d, m, codes


def decoded(data: np.ndarray, kind: str) -> np.ndarray:
    d, m, codes = parts(data, kind)
    return d * codes + m


def block_errors(x: np.ndarray, data: np.ndarray, kind: str) -> np.ndarray:
    return np.sum((x.astype(np.float64).reshape(-1, BLOCK_SIZE) - decoded(data, kind)) ** 2, 1)


def many_blocks() -> np.ndarray:
    rows = [x[:40] for x in distributions(40, BLOCK_SIZE).values()]
    gaussian = rows[0]
    special = [np.zeros((1, BLOCK_SIZE)), np.full((1, BLOCK_SIZE), -0.3), gaussian[:4] * 1e-6]
    special += [gaussian[:4] + 100, gaussian[:4] * 1e3, np.eye(BLOCK_SIZE)[:4], gaussian[:4] * 1e-9]
    return np.concatenate(rows + special).astype(np.float32)


@pytest.mark.thorough
def test_bytes_are_those_worked_by_hand():
    q4_0 = np.array([[i % 16 - 8 for i in range(32)]]) * np.float32(-0.5)
    # Entries j and j + 16 share byte j and are equal here; 0.5 is 0x3800, -0.5 0xB800.
    expected = bytes([0x00, 0xB8, *(17 * j for j in range(16))])
    assert encode_blocks(q4_0, "Q4_0").tobytes() == expected
    q4_1 = np.array([[i % 16 for i in range(32)]]) * np.float32(0.5) + np.float32(2)
    expected = bytes([0x00, 0x38, 0x00, 0x40, *(17 * j for j in range(16))])
    assert encode_blocks(q4_1, "Q4_1").tobytes() == expected
    codes = np.arange(-128, -96)[None]
    data = blocks_of_codes(codes, np.array([[0.5]]), None, "Q8_0")
    assert data.tobytes() == bytes([0x00, 0x38, *range(128, 160)])


@pytest.mark.thorough
@every_kind
def test_the_gguf_package_reads_the_same_numbers(kind):
    gguf = pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")
    x = many_blocks()
    data = encode_blocks(x, kind)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    d, m, _ = parts(data, kind)
    # They compute in float32: two roundings.
    tolerance = 2.0**-22 * (np.abs(d) * 128 + np.abs(m))
    assert np.all(np.abs(theirs - decoded(data, kind)) <= tolerance)


@pytest.mark.parametrize(("kind", "most"), [("Q4_0", 0.93), ("Q4_1", 0.85), ("Q8_0", 0.85)])
def test_no_block_is_worse_than_the_packages_own_and_all_are_better_together(kind, most):
    gguf = pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")
    x = many_blocks()
    ours = block_errors(x, encode_blocks(x, kind), kind)
    theirs = block_errors(x, gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind]), kind)
    # Errors are compared in float32, of entries up to the block's largest.
    slack = 2.0**-20 * np.max(np.square(x.astype(np.float64)), axis=1)
    assert np.all(ours <= theirs * (1 + 2.0**-18) + 2.0**-20 * slack)
    gaussian = slice(0, 40)
    assert np.sum(ours[gaussian]) < most * np.sum(theirs[gaussian])


@pytest.mark.parametrize(("kind", "bits", "most"), [("Q4_0", 4, 1.01), ("Q8_0", 8, 1.08)])
def test_the_error_is_near_the_exact_optimum_of_the_grid(kind, bits, most):
    x = many_blocks()[:400]
    ours = block_errors(x, encode_blocks(x, kind), kind)
    for i, name in enumerate(distributions(1, BLOCK_SIZE)):
        rows = slice(40 * i, 40 * i + 40)
        best = sum(exact_optimum(row, bits, "full") for row in x[rows])
        # The last part is float16's: a scale off by 2^-12 of itself.
        rounding = np.sum(np.square(x[rows].astype(np.float64))) * 2.0**-22
        assert np.sum(ours[rows]) <= most * best + rounding, name


def test_the_affine_fit_is_near_the_best_of_a_dense_search():
    x = np.random.default_rng(3).normal(size=(16, BLOCK_SIZE)).astype(np.float32)
    ours = block_errors(x, encode_blocks(x, "Q4_1"), "Q4_1")
    best = np.full(16, np.inf)
    y = x.astype(np.float64)
    low, span = y.min(1, keepdims=True), np.ptp(y, axis=1, keepdims=True)
    for below in np.linspace(-0.05, 0.3, 36):
        for above in np.linspace(-0.05, 0.3, 36):
            d, m = span * (1 - below - above) / 15, low + below * span
            q = np.clip(np.rint((y - m) / d), 0, 15)
            # The least-squares line through the codes, block by block.
            centred = q - q.mean(1, keepdims=True)
            slope = np.sum(centred * y, 1) / np.sum(centred**2, 1)
            rest = y - y.mean(1, keepdims=True) - slope[:, None] * centred
            best = np.minimum(best, np.sum(rest**2, 1))
    assert np.sum(ours) <= 1.03 * np.sum(best)


@every_kind
def test_codes_are_the_nearest_to_the_scales_that_are_stored(kind):
    x = many_blocks()[:400].astype(np.float64)
    d, m, codes = parts(encode_blocks(x.astype(np.float32), kind), kind)
    low, high = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-128, 127)}[kind]
    unit = np.clip((x - m) / np.where(d == 0, 1, d), low, high)
    assert np.all(np.abs(unit - codes) <= 0.5 + 1e-4)


@pytest.mark.thorough
@every_kind
def test_weights_on_the_grid_come_back_exactly(kind):
    rng = np.random.default_rng(1)
    low, high = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-128, 127)}[kind]
    codes = rng.integers(low, high + 1, (50, BLOCK_SIZE))
    codes[:, 0], codes[:, 1] = low, high
    d = rng.choice([0.25, 0.5, 3.0], (50, 1)) * (1 if kind == "Q4_1" else rng.choice([-1, 1]))
    x = (d * codes + (rng.integers(-20, 20, (50, 1)) if kind == "Q4_1" else 0)).astype(np.float32)
    assert np.array_equal(decoded(encode_blocks(x, kind), kind), x)


@every_kind
def test_rows_stay_rows_and_empty_arrays_are_encoded(kind):
    x = np.random.default_rng(2).normal(size=(2, 3, 64)).astype(np.float32)
    data = encode_blocks(x, kind)
    assert data.shape == (2, 3, 2 * WRITTEN[kind].num_bytes)
    assert np.array_equal(data[1, 2], encode_blocks(x[1, 2], kind))
    assert encode_blocks(np.zeros((0, 32)), kind).shape == (0, WRITTEN[kind].num_bytes)


@every_kind
def test_chunks_are_encoded_independently(kind, monkeypatch):
    x = many_blocks()[:150]
    monkeypatch.setattr("jaxclip.interop.gguf_blocks._CHUNK", 64)
    alone = [encode_blocks(x[i : i + 64], kind) for i in (0, 64, 128)]
    assert np.array_equal(encode_blocks(x, kind), np.concatenate(alone))


@every_kind
def test_blocks_beyond_float16_are_refused(kind):
    x = np.full((1, BLOCK_SIZE), 1e8, np.float32)
    with pytest.raises(ValueError, match=r"a scale of .*e\+0\d is too large for float16"):
        encode_blocks(x * np.linspace(-1, 1, BLOCK_SIZE, dtype=np.float32), kind)


# --- Ternary blocks of 256 -------------------------------------------------------------


@pytest.mark.parametrize("kind", TERNARY)
def test_bytes_of_ternary_codes_are_the_gguf_packages(kind):
    gguf = pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")
    rng = np.random.default_rng(4)
    codes = rng.integers(-1, 2, (20, 256))
    codes[:, 0] = 1  # so that their scale, the largest entry, is ours
    d = rng.choice([0.25, 0.5, 3.0], (20, 1)).astype(np.float32)
    theirs = gguf.quants.quantize((d * codes).astype(np.float32), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(blocks_of_codes(codes.astype(np.int8), d, None, kind), theirs)


@pytest.mark.parametrize("kind", TERNARY)
def test_ternary_scales_are_near_the_exact_optimum_and_beat_the_largest_weight(kind):
    gguf = pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")
    quant_type = gguf.GGMLQuantizationType[kind]
    x = np.random.default_rng(5).normal(size=(40, 256)).astype(np.float32)

    def error(data):
        return np.sum((x.astype(np.float64) - gguf.quants.dequantize(data, quant_type)) ** 2)

    ours = error(encode_blocks(x, kind))
    best = sum(exact_optimum(row, "ternary", "full") for row in x)
    assert ours <= 1.01 * best
    assert ours < 0.4 * error(gguf.quants.quantize(x, quant_type))


# --- Reading ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(ON_GRIDS))
def test_any_bytes_are_read_as_the_gguf_package_reads_them(kind):
    gguf = pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")
    form = ON_GRIDS[kind]
    blocks = np.random.default_rng(6).integers(0, 256, (50, form.num_bytes)).astype(np.uint8)
    # A finite scale, where the kind has it.
    place = slice(-2, None) if kind in TERNARY else slice(2)
    blocks[:, place] = np.random.default_rng(7).normal(size=(50, 1)).astype("<f2").view(np.uint8)
    codes, scale = unpack_blocks(blocks, kind)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(scale.astype(np.float32) * codes, theirs)


@pytest.mark.parametrize("kind", sorted(ON_GRIDS.keys() & WRITTEN.keys()))
def test_blocks_are_unpacked_to_what_was_packed(kind):
    rng = np.random.default_rng(8)
    form = WRITTEN[kind]
    codes = rng.integers(form.low, form.high + 1, (30, form.size)).astype(np.int8)
    scale = rng.normal(size=(30, 1)).astype(np.float16)
    found = unpack_blocks(pack_blocks(codes, [scale], kind), kind)
    assert np.array_equal(found[0], codes)
    assert np.array_equal(found[1], scale)
