"""Reports of a file: sizes from headers alone, and statistics of the weights."""

import dataclasses
import json

import numpy as np
import pytest

import jaxclip
from jaxclip import checkpoints
from jaxclip.checkpoints import CheckpointError, inspection
from jaxclip.checkpoints.inspection import describe_weights
from oracles.shard_folders import drawn


@pytest.mark.thorough
def test_inspect_reads_headers_alone(tmp_path):
    params = {"kernel": drawn(64, 4), "bias": drawn(4)}
    small = jaxclip.compress(params, "ternary")
    path = tmp_path / "x.safetensors"
    checkpoints.save(path, small)
    report = checkpoints.inspect(path)
    kernel = {leaf.path: leaf for leaf in report.leaves}["kernel"]
    assert (kernel.shape, kernel.dtype, kernel.bits) == ((64, 4), "float32", "ternary")
    assert kernel.stored_bytes == -(-256 // 5) + 16
    assert report.num_weights == 260
    saved = jaxclip.size_report(small)
    unread = [dataclasses.replace(leaf, threshold=None, density=None) for leaf in saved.leaves]
    assert report == dataclasses.replace(saved, leaves=tuple(unread))
    assert "ternary" in str(report)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoints.inspect(path) == report


def test_inspect_adds_up_folders_and_numpys_files(folder, tmp_path):
    report = checkpoints.inspect(folder)
    assert report.raw_bytes == sum(leaf.stored_bytes for leaf in report.leaves) == 72
    assert report.total_bytes == sum(file.stat().st_size for file in folder.iterdir())
    checkpoints.save(tmp_path / "x.npz", {"a": {"w": drawn(2)}})
    checkpoints.save(tmp_path / "x.npy", drawn(3))
    assert [leaf.path for leaf in checkpoints.inspect(tmp_path / "x.npz").leaves] == ["a/w"]
    assert checkpoints.inspect(tmp_path / "x.npy").num_weights == 3


def test_inspect_needs_no_memory_for_the_weights(tmp_path):
    path = tmp_path / "huge.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}})
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2**40)  # sparse
    assert checkpoints.inspect(path).leaves[0].stored_bytes == 2**40


@pytest.mark.thorough
def test_statistics_are_those_of_the_entries_by_hand():
    found = describe_weights(np.array([0.1, -0.1, 0.1, -2.0], np.float32), outlier=1.5)
    assert (found.num_entries, found.num_nonfinite, found.max_abs) == (4, 0, 2.0)
    assert found.rms == pytest.approx(np.sqrt((3 * 0.01 + 4) / 4))
    assert found.outlier_rate == 0.25
    assert found.sparkline == "▄      ▄█       "
    assert found.thresholds.keys() == {4, 3, 2, "ternary"}


def test_statistics_leave_out_what_is_not_finite_and_take_what_is_empty():
    found = describe_weights(np.array([np.nan, np.inf, 3.0, -3.0], np.float32))
    assert (found.num_entries, found.num_nonfinite) == (4, 2)
    assert (found.max_abs, found.rms, found.outlier_rate) == (3.0, 3.0, 0.0)
    empty = describe_weights(np.zeros((0, 2), np.float32))
    assert (empty.num_entries, empty.rms, sum(empty.histogram)) == (0, 0.0, 0)


def test_the_density_of_statistics_counts_all_that_is_not_zero():
    entries = np.array([np.nan, np.inf, 0, -0.0, 3], np.float32)
    assert describe_weights(entries).density == 0.6
    assert describe_weights(np.zeros((0, 2), np.float32)).density == 1


def test_statistics_in_pieces_are_those_of_the_whole(monkeypatch):
    weights = drawn(1000)
    whole = describe_weights(weights)
    monkeypatch.setattr(inspection, "_CHUNK", 7)
    parts = describe_weights(weights)
    assert parts.histogram == whole.histogram
    assert parts.rms == pytest.approx(whole.rms, rel=1e-12)
    assert parts.outlier_rate == whole.outlier_rate


@pytest.mark.thorough
def test_statistics_of_a_low_bit_leaf_are_those_of_the_weights_it_stands_for(tmp_path):
    small = jaxclip.compress({"kernel": drawn(64, 4), "steps": np.arange(3)}, 4)
    checkpoints.save(tmp_path / "x.safetensors", small)
    found = checkpoints.describe_file(tmp_path / "x.safetensors")
    assert found.keys() == {"kernel"}
    assert found["kernel"] == describe_weights(np.asarray(jaxclip.dequantize(small["kernel"])))


def test_a_verified_file_has_the_report_of_inspect_and_damage_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoints.save(path, {"w": drawn(8, 4)})
    assert checkpoints.verify_file(path, progress=False) == checkpoints.inspect(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="tensor 'w'"):
        checkpoints.verify_file(path, progress=False)
