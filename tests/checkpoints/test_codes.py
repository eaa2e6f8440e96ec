"""Entropy coded codes in files: exact, never larger than packed, and of the reported size."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxclip import checkpoints
from jaxclip._core.grids import Grid
from jaxclip.checkpoints import CheckpointError
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.trees import compress


def drawn_params() -> dict:
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": rng.standard_normal((64, 48)).astype(np.float32)},
        "b": [rng.standard_t(3, (40, 40)).astype(np.float32), np.arange(5, dtype=np.int8)],
        "tiny": np.ones((2, 1), np.float32),
    }


@pytest.mark.thorough
@pytest.mark.parametrize("coding", [None, "huffman", "ans"])
@pytest.mark.parametrize("bits", [1, "ternary", 3, 4, 8])
def test_coded_codes_come_back_and_the_reported_size_is_the_files(coding, bits, path):
    small = compress(drawn_params(), bits)
    checkpoints.save(path, small, coding=coding)
    loaded = checkpoints.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, small))
    assert size_report(small, coding).total_bytes == path.stat().st_size
    inspected = checkpoints.inspect(path)
    assert inspected.total_bytes == path.stat().st_size
    assert inspected.overhead_bytes > 0


@pytest.mark.thorough
def test_coding_makes_files_smaller_and_is_left_out_where_it_would_not(path, tmp_path):
    small = compress(drawn_params(), 8, rule=20.0)  # steps of .16: 4.7 bits of entropy
    checkpoints.save(path, small)
    coded = tmp_path / "coded.safetensors"
    checkpoints.save(coded, small, coding="huffman")
    assert coded.stat().st_size < 0.8 * path.stat().st_size
    sizes = {leaf.path: leaf.stored_bytes for leaf in checkpoints.inspect(coded).leaves}
    assert sizes["tiny"] == 2 + 4  # packed


@pytest.mark.thorough
def test_every_flipped_bit_of_a_coded_file_is_refused(path):
    small = compress({"kernel": drawn_params()["a"]["kernel"][:20, :8]}, 8)
    checkpoints.save(path, small, coding="huffman")
    data = path.read_bytes()
    assert len(data) < 1000
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            checkpoints.load(path)


def codes_that_favour_each_coding() -> dict[str, QuantizedArray]:
    rng = np.random.default_rng(0)
    count = 60_000
    spread = np.where(np.arange(count) < count // 2, 0.3, 8.0)  # which differs from place to place
    codes = {
        "even": rng.standard_normal(count) * 3,
        "uneven": rng.standard_normal(count) * spread,
        "uniform": rng.integers(-128, 128, count),
    }
    return {
        name: QuantizedArray(
            np.clip(np.round(values), -128, 127).astype(np.int8),
            np.ones(1, np.float32),
            Grid(8, axis=None),
            np.dtype(np.float32),
        )
        for name, values in codes.items()
    }


def codings_in(path: pathlib.Path) -> dict[str, str | None]:
    inner = json.loads(safetensors.safe_open(path, "np").metadata()["jaxclip"])
    return {name: info["coding"] for name, info in inner["leaves"].items()}


def sizes_of_codes(path: pathlib.Path) -> dict[str, int]:
    with safetensors.safe_open(path, "np") as file:
        return {n: file.get_tensor(n).size for n in file.keys() if n.endswith(":codes")}  # noqa: SIM118


def test_smallest_takes_the_smaller_of_both_codings_and_packed_for_each_leaf(tmp_path):
    tree, paths = codes_that_favour_each_coding(), {}
    for coding in (None, "huffman", "ans", "smallest"):
        paths[coding] = tmp_path / f"{coding}.safetensors"
        checkpoints.save(paths[coding], tree, coding=coding)
        loaded = checkpoints.load(paths[coding])
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, tree))
    smallest = paths.pop("smallest")
    assert codings_in(smallest) == {"even": "ans", "uneven": "huffman", "uniform": None}
    sizes = [sizes_of_codes(path) for path in paths.values()]
    assert sizes_of_codes(smallest) == {n: min(each[n] for each in sizes) for n in sizes[0]}
    assert size_report(tree, "smallest").total_bytes == smallest.stat().st_size


def test_the_header_of_smallest_takes_at_most_4_bytes_a_leaf_more_than_that_of_ans():
    tree = {f"w{i}": codes_that_favour_each_coding()["even"] for i in range(13)}
    huffman, ans, smallest = (size_report(tree, c) for c in ("huffman", "ans", "smallest"))
    assert smallest.leaves == ans.leaves
    assert ans.total_bytes < smallest.total_bytes <= ans.total_bytes + 4 * 13 + 7
    assert smallest.total_bytes < huffman.total_bytes


def test_smallest_is_huffman_or_packed_where_the_package_of_ans_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    tree = codes_that_favour_each_coding()
    for coding in ("huffman", "smallest"):
        checkpoints.save(tmp_path / f"{coding}.safetensors", tree, coding=coding)
    huffman, smallest = ((tmp_path / f"{n}.safetensors") for n in ("huffman", "smallest"))
    assert smallest.read_bytes() == huffman.read_bytes()
    assert codings_in(smallest) == {"even": "huffman", "uneven": "huffman", "uniform": None}


def test_an_unknown_coding_is_refused_before_the_work(path):
    with pytest.raises(ValueError, match="coding must be one of"):
        checkpoints.save(path, drawn_params(), coding="zip")
    assert not path.exists()
