"""What low-bit arrays lose: against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import Grid, dequantize, max_abs, quantize
from jaxclip.lowbit import distortion
from jaxclip.lowbit.distortion import QuantizationError, quantization_error

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def clipped_rate(w, q) -> float:
    error = quantization_error(w, q)
    assert error is not None
    assert error.num_clipped is not None
    return error.num_clipped / max(w.size, 1)


@DTYPES
def test_squared_error_and_norm_are_those_of_float64(dtype):
    w = jnp.asarray(weights(7, 12)).astype(dtype)
    q = quantize(w, Grid(3, axis=0), threshold=max_abs)
    exact, rounded = (np.asarray(x).astype(np.float64) for x in (w, dequantize(q)))
    assert distortion.squared_error(w, q) == pytest.approx(
        np.sum((exact - rounded) ** 2), rel=1e-12
    )
    assert distortion.squared_norm(w) == pytest.approx(np.sum(exact**2), rel=1e-12)
    assert distortion.squared_norm(q) == pytest.approx(np.sum(rounded**2), rel=1e-12)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_beyond_float32_neither_overflow_nor_vanish(size):
    w = np.full(3, size, np.float32)
    assert distortion.squared_norm(w) == pytest.approx(3 * size**2, rel=1e-6)
    assert distortion.squared_error(w, 2 * w) == pytest.approx(3 * size**2, rel=1e-6)


def test_pieces_add_up(monkeypatch):
    w, v = weights(50), weights(2, 50)[1]
    whole = distortion.squared_error(w, v)
    monkeypatch.setattr(distortion, "_PIECE", 7)
    assert distortion.squared_error(w, v) == pytest.approx(whole, rel=1e-12)


def test_arrays_without_entries_lose_nothing():
    w = np.zeros((0, 3), np.float32)
    assert (distortion.squared_norm(w), distortion.squared_error(w, w)) == (0.0, 0.0)
    assert clipped_rate(w, quantize(w, 4, threshold=1.0)) == 0.0


@pytest.mark.parametrize("bits", [1, "ternary", 2, 4])
@pytest.mark.parametrize(
    "options", [{"axis": None}, {"axis": 1}, {"axis": 0, "group_size": 5}], ids=str
)
def test_clipped_entries_are_those_beyond_the_ends_of_their_blocks_levels(bits, options):
    w = weights(6, 12)
    q = quantize(w, Grid(bits, **options), threshold=0.9)
    low, high = {1: (-1, 1), "ternary": (-1, 1), 2: (-2, 1), 4: (-8, 7)}[bits]
    scale = np.asarray(q.scale)
    if "group_size" in options:
        scale = np.repeat(scale, 5, axis=1)[:, :12]
    ends = np.sort(np.stack([scale * low, scale * high]), axis=0)
    outside = (w < ends[0] * (1 + 1e-6)) | (w > ends[1] * (1 + 1e-6))
    assert 0 < outside.mean() < 1
    assert clipped_rate(w, q) == pytest.approx(outside.mean())


def test_with_a_zero_point_the_ends_are_uneven():
    w = np.linspace(-1, 3, 17, dtype=np.float32)
    q = quantize(w, Grid(4, axis=None, zero_point=True), threshold=2.0)  # reaches from -1 to 2
    assert clipped_rate(w, q) == pytest.approx(np.mean(w > 2.1), abs=1e-9)


@pytest.mark.parametrize("bits", ["ternary", 3, 8])
def test_max_abs_clips_nothing(bits):
    w = weights(40, 9)
    assert clipped_rate(w, quantize(w, Grid(bits, axis=0), threshold=max_abs)) == 0.0


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"axis": 0},
        {"axis": -1, "group_size": 2},
        {"axis": 0, "group_size": 5, "zero_point": True},
        {"axis": (0, 1), "scale_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_rows_decode_to_the_bits_of_dequantize_in_pieces_too(dtype, options, monkeypatch):
    w = jnp.asarray(weights(5, 12)).astype(dtype)
    q = quantize(w, Grid(3, **options), threshold=0.9)
    wanted = np.asarray(dequantize(q))
    for piece in (2**17, 20, 1):
        monkeypatch.setattr(distortion, "_PIECE", piece)
        assert distortion.squared_error(q, wanted) == 0.0
        np.testing.assert_array_equal(
            np.concatenate(list(distortion._pieces(q))), wanted.astype(np.float64).reshape(-1)
        )


def test_levels_beyond_the_dtype_decode_to_its_largest_number():
    q = quantize(jnp.array([65504.0, -3.0], jnp.float16), 2, threshold=65504.0)
    assert distortion.squared_error(q, dequantize(q)) == 0.0


@pytest.mark.thorough
def test_the_loss_of_parts_adds_up_to_that_of_the_whole():
    w = weights(6, 8)
    q = quantize(w, Grid(2, axis=0), threshold=0.8)
    rows = [slice(0, 2), slice(2, 6)]
    parts = [quantization_error(w[r], jax.tree.map(lambda x, r=r: x[r], q)) for r in rows]
    whole, added = quantization_error(w, q), parts[0] + parts[1]
    assert added.num_clipped == whole.num_clipped > 0
    assert added.squared_error == pytest.approx(whole.squared_error, rel=1e-12)
    assert quantization_error(np.arange(3), np.arange(3)) is None
    assert quantization_error(w, w) == QuantizationError(0.0, distortion.squared_norm(w), None)
