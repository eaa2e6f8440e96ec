"""Leaves compressed from a file some rows at a time, against the same leaves read whole."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxclip
from jaxclip import Grid
from jaxclip.checkpoints import CheckpointError, compress_checkpoint, reading, rewriting, rows
from jaxclip.checkpoints.rows import compress_leaf, compress_stored
from jaxclip.checkpoints.stored_rows import StoredRows
from jaxclip.lowbit.policies import LeafSpec

APART = [
    Grid(4, axis=0),
    Grid(4, axis=0, group_size=8),
    Grid(2, axis=-1, group_size=8),
    Grid("ternary", axis=-1, group_size=16, scale_dtype="float16"),
    Grid(3, axis=None, group_size=4, zero_point=True),
    Grid(4, axis=(0, 1), levels="narrow"),
]
TOGETHER = [Grid(4, axis=-1), Grid(4, axis=None), Grid(4, axis=0, scale_dtype="log8")]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(rows, "_READ_BYTES", 2000)


def weights(shape, dtype=np.float32):
    return np.random.default_rng(0).standard_t(5, shape).astype(dtype)


def in_memory(array, reads):
    data = array.reshape(-1).view(np.uint8)

    def read_bytes(start, num_bytes):
        reads.append(num_bytes)
        return data[start : start + num_bytes].copy()

    return StoredRows(array.shape, array.dtype, read_bytes)


def spec_of(grid, rule=jaxclip.mse_optimal):
    return LeafSpec(grid, rule, None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("grid", APART, ids=str)
def test_rows_apart_have_the_codes_and_scales_of_the_whole_leaf(grid, dtype):
    array, reads = weights((203, 24), dtype), []
    spec = spec_of(grid, jaxclip.max_abs if grid.zero_point else jaxclip.mse_optimal)
    small, error = compress_stored(in_memory(array, reads), spec, "leaf")
    whole, whole_error = compress_leaf(array, spec, "leaf")
    assert len(reads) > 1
    assert max(reads) < array.nbytes / 2
    assert (small.grid, small.dtype) == (whole.grid, whole.dtype)
    for part in ("qvalue", "scale", "zero"):
        a, b = getattr(small, part), getattr(whole, part)
        if b is not None:
            np.testing.assert_array_equal(a, np.asarray(b), strict=True)
    assert error.num_clipped == whole_error.num_clipped
    np.testing.assert_allclose(error.squared_error, whole_error.squared_error, rtol=1e-5)
    np.testing.assert_allclose(error.squared_norm, whole_error.squared_norm, rtol=1e-5)


@pytest.mark.parametrize("grid", TOGETHER, ids=str)
def test_a_leaf_whose_rows_share_a_scale_is_left_whole(grid):
    assert compress_stored(in_memory(weights((203, 24)), []), spec_of(grid), "leaf") is None


def test_a_small_leaf_is_left_whole_and_so_is_one_with_another_rule():
    small = in_memory(weights((20, 24)), [])
    assert compress_stored(small, spec_of(Grid(4, axis=0)), "leaf") is None
    large = in_memory(weights((203, 24)), [])
    other = spec_of(Grid(4, axis=0), jaxclip.thresholds.std_multiple(2.0))
    assert compress_stored(large, other, "leaf") is None


def test_an_entry_that_is_not_finite_is_named_by_its_place_in_the_leaf():
    array = weights((203, 24))
    array[150, 7] = np.nan
    with pytest.raises(ValueError, match=r"'leaf'.*got nan at \(150, 7\)"):
        compress_stored(in_memory(array, []), spec_of(Grid(4, axis=0)), "leaf")


@pytest.mark.parametrize("coding", [None, "huffman"])
@pytest.mark.parametrize("grid", [*APART[:3], TOGETHER[0]], ids=str)
def test_files_are_those_of_leaves_that_were_read_whole(tmp_path, monkeypatch, grid, coding):
    source = tmp_path / "net.safetensors"
    tree = {"a.weight": weights((203, 24)), "b.weight": weights((64, 8)), "c": weights((300,))}
    safetensors.numpy.save_file(tree, source)
    compress_checkpoint(source, tmp_path / "rows.safetensors", grid, coding=coding)
    monkeypatch.setattr(rewriting, "compress_stored", lambda leaf, spec, name: None)
    compress_checkpoint(source, tmp_path / "whole.safetensors", grid, coding=coding)
    contents = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("rows", "whole")]
    assert contents[0] == contents[1]


def test_a_file_that_becomes_shorter_is_refused_by_name(tmp_path):
    source = tmp_path / "net.safetensors"
    safetensors.numpy.save_file({"a.weight": weights((203, 24))}, source)
    with reading.open_source(source) as opened:
        stored = opened.rows("a.weight")
        assert stored[3:5].shape == (2, 24)
        source.write_bytes(source.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"'a\.weight': the file ends early"):
            stored[150:]


def test_only_plain_leaves_without_checksums_are_read_by_rows(tmp_path):
    own = tmp_path / "own.safetensors"
    jaxclip.checkpoints.save(own, {"a": weights((203, 24))})
    foreign = tmp_path / "foreign.safetensors"
    leaves = {"mask": np.ones((9, 4), bool), "scalar": weights(()), "w": weights((9, 4))}
    safetensors.numpy.save_file(leaves, foreign)
    np.save(tmp_path / "array.npy", weights((9, 4)))
    with reading.open_source(own) as opened:
        assert opened.rows("a") is None
    with reading.open_source(tmp_path / "array.npy") as opened:
        assert opened.rows("array") is None
    with reading.open_source(foreign) as opened:
        found = {name for name in opened.leaves if opened.rows(name) is not None}
    assert found == {"w"}
