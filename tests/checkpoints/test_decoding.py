"""Low-bit leaves decoded in parts, against the decoder of whole leaves."""

import ml_dtypes
import numpy as np
import pytest

import jaxclip
from jaxclip import Grid
from jaxclip.checkpoints import decoding
from jaxclip.checkpoints.decoding import decoded_in_parts
from jaxclip.lowbit.arrays import dequantize_stored

GRIDS = [
    Grid(4, axis=-1),
    Grid(4, axis=0),
    Grid(2, axis=None),
    Grid("ternary", axis=0),
    Grid(3, axis=-1, group_size=5),
    Grid(8, axis=0, group_size=4, zero_point=True),
    Grid(2, axis=-1, levels="balanced", scale_dtype="float16"),
    Grid(4, axis=0, group_size=4, scale_dtype="log8"),
    Grid(1, axis=0, scale_dtype="bfloat16"),
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(decoding, "_PART", 40)


def decoded(q, dtype=None):
    streamed = decoded_in_parts(q, dtype, "leaf")
    parts = list(streamed.parts())
    assert len(parts) > 1
    assert all(p.dtype == streamed.dtype for p in parts)
    return np.concatenate(parts)


def assert_same_bytes(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [1e-38, 1.0, 3e38])
def test_values_in_parts_are_those_of_the_whole_leaf(grid, size):
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        array = np.clip(size * rng.normal(size=(23, 9)), -3e38, 3e38).astype(np.float32)
    q = jaxclip.quantize(array, grid, threshold=jaxclip.max_abs)
    assert_same_bytes(decoded(q), dequantize_stored(q, None, "leaf"))


@pytest.mark.parametrize("own", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes_of_parts_are_those_of_the_whole_leaf(own, dtype):
    array = np.random.default_rng(0).normal(size=(31, 2, 4)).astype(own)
    q = jaxclip.quantize(array, Grid(4, axis=-1))
    assert_same_bytes(decoded(q, dtype), dequantize_stored(q, dtype, "leaf"))


def test_a_part_with_a_value_beyond_the_dtype_raises_as_the_whole_leaf_does():
    array = np.ones((30, 4), np.float32)
    array[25] = 1e6
    q = jaxclip.quantize(array, Grid(4, axis=0), threshold=jaxclip.max_abs)
    with pytest.raises(ValueError, match="'leaf' has an entry that is not finite in float16"):
        decoded(q, np.float16)


def test_leaves_that_have_no_rows_apart_are_left_to_the_whole_decoder():
    rng = np.random.default_rng(0)
    scalar = jaxclip.quantize(np.float32(3), 4)
    across = jaxclip.quantize(rng.normal(size=(6, 4, 5)), Grid(4, axis=-1, group_size=8))
    float8 = jaxclip.quantize(rng.normal(size=(6, 4)), 4)
    assert decoded_in_parts(scalar, None, "leaf") is None
    assert decoded_in_parts(across, None, "leaf") is None
    assert decoded_in_parts(float8, ml_dtypes.float8_e4m3fn, "leaf") is None
