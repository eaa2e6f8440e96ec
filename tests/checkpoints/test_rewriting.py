"""Checkpoints rewritten leaf by leaf: the same bytes as from memory, and nothing lost."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxclip
from jaxclip import checkpoints, interop
from jaxclip._core.grids import Grid
from jaxclip.checkpoints import CheckpointError, rows
from jaxclip.checkpoints.format.parsing import header_length
from jaxclip.checkpoints.rewriting import (
    clip_checkpoint,
    compress_checkpoint,
    decompress_checkpoint,
)


def drawn(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.1).astype(dtype)


def weights() -> dict[str, np.ndarray]:
    return {
        "embed.weight": drawn(40, 16),
        "layer.weight": drawn(24, 16, seed=1, dtype=ml_dtypes.bfloat16),
        "layer.bias": drawn(24, seed=2),
        "position_ids": np.arange(7, dtype=np.int64),
        "mask": np.array([True, False]),
    }


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    safetensors.numpy.save_file(weights(), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def target(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "small.safetensors"


# --- Compress ---------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("coding", [None, "huffman"])
@pytest.mark.parametrize(
    ("bits", "grid", "rule"),
    [
        (Grid(4, axis=0, group_size=8), Grid(4, axis=0, group_size=8), jaxclip.mse_optimal),
        ("ternary", Grid("ternary", axis=0), jaxclip.mse_optimal),
        (Grid(8, axis=None), Grid(8, axis=None), jaxclip.max_abs),
    ],
)
def test_the_file_is_that_of_the_tree_in_memory(bits, grid, rule, coding, source, target, tmp_path):
    report = compress_checkpoint(source, target, bits, coding=coding, rule=rule)
    in_memory = jaxclip.compress(checkpoints.load(source), grid, rule=rule)
    checkpoints.save(tmp_path / "memory.safetensors", in_memory, coding=coding)
    assert target.read_bytes() == (tmp_path / "memory.safetensors").read_bytes()
    assert report.total_bytes == target.stat().st_size
    assert report.total_bytes == jaxclip.size_report(in_memory, coding).total_bytes
    assert checkpoints.load(target)["position_ids"].dtype == np.int64


@pytest.mark.parametrize(
    ("metadata", "layout"),
    [({"format": "pt"}, "out_in"), ({"format": "flax"}, "in_out"), ({"format": "x"}, "out_in"),
     (None, "out_in")],
)  # fmt: skip
def test_where_no_name_says_the_layout_the_metadata_do(metadata, layout, tmp_path, target):
    safetensors.numpy.save_file({"w": drawn(8, 6)}, tmp_path / "net.safetensors", metadata)
    report = compress_checkpoint(tmp_path / "net.safetensors", target, 4, dry_run=True)
    assert report.layouts == (layout,)
    assert report.leaves[0].axes == ((0,) if layout == "out_in" else (1,))


@pytest.mark.thorough
def test_convolutions_shrink_in_groups_and_what_would_not_stays_and_is_reported(tmp_path, target):
    arrays = {
        "conv.weight": drawn(8, 32, 3, 3),
        "depthwise.weight": drawn(32, 1, 5, 5),
        "a/b.weight": drawn(40, 1),
        "column.weight": drawn(40, 1),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors")
    grid = Grid(4, axis=0, group_size=64)
    report = compress_checkpoint(tmp_path / "net.safetensors", target, grid, rule=jaxclip.max_abs)
    loaded = checkpoints.load(target)
    # 288 inputs of an output make 5 groups, 25 make 1.
    assert loaded["conv.weight"].scale.shape == (8, 1, 1, 5)
    assert loaded["depthwise.weight"].scale.shape == (32, 1, 1, 1)
    assert np.array_equal(loaded["a/b.weight"], arrays["a/b.weight"])
    assert report.kept == ("a%2Fb.weight", "column.weight")
    assert str(report).count("as is: no smaller") == 2
    conv = next(leaf for leaf in report.leaves if leaf.path == "conv.weight")
    assert conv.stored_bytes == 8 * 32 * 9 // 2 + 4 * 8 * 5
    assert all(leaf.stored_bytes <= leaf.raw_bytes for leaf in report.leaves)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "grid",
    [Grid(4, axis=0, group_size=8), Grid(4, axis=0), Grid(4, axis=0, zero_point=True)],
    ids=str,
)
def test_large_leaves_are_compressed_by_rows(grid, source, target, tmp_path, monkeypatch):
    compress_checkpoint(source, tmp_path / "whole.safetensors", grid)
    monkeypatch.setattr(rows, "_PART_BYTES", 7 * 16 * 4)  # 40 rows of 16 in parts of 7
    compress_checkpoint(source, target, grid)
    whole, parts = (checkpoints.load(p) for p in (tmp_path / "whole.safetensors", target))
    for name, w in weights().items():
        if name.endswith("weight"):
            np.testing.assert_allclose(parts[name].scale, whole[name].scale, rtol=1e-6)
            errors = [np.sum((jaxclip.dequantize(q) - w) ** 2) for q in (whole[name], parts[name])]
            np.testing.assert_allclose(*np.asarray(errors, np.float64), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (Grid(8, axis=0), {"rule": jaxclip.thresholds.rate_optimal(3.0)}),
        (Grid(8, axis=0, scale_dtype="log8", group_size=4), {}),
        (Grid(8, axis=0), {"bit_price": 0.3, "rule": jaxclip.max_abs}),
    ],
)
def test_what_looks_at_the_whole_leaf_gets_it(grid, options, source, target, monkeypatch):
    whole = jaxclip.compress(checkpoints.load(source), grid, **options)["embed.weight"]
    monkeypatch.setattr(rows, "_PART_BYTES", 7 * 16 * 4)
    compress_checkpoint(source, target, grid, coding="huffman", **options)
    np.testing.assert_array_equal(checkpoints.load(target)["embed.weight"].qvalue, whole.qvalue)


@pytest.mark.thorough
def test_with_a_price_the_file_is_smaller_and_more_exact_than_one_of_coarser_steps(tmp_path):
    source, target = tmp_path / "net.safetensors", tmp_path / "small.safetensors"
    w = drawn(256, 128)
    safetensors.numpy.save_file({"w": w}, source)
    options: dict = {"coding": "huffman", "overwrite": True}
    grid = Grid(8, axis=None)
    rule = jaxclip.thresholds.rate_optimal
    coarser = compress_checkpoint(source, target, grid, rule=rule(1.9), **options)
    nearest = compress_checkpoint(source, target, grid, rule=rule(2.0), **options)
    found = compress_checkpoint(source, target, grid, rule=rule(2.0), bit_price=0.12, **options)
    assert found.total_bytes == target.stat().st_size < 0.99 * coarser.total_bytes
    assert found.relative_error < 0.95 * coarser.relative_error
    assert found.total_bytes < 0.95 * nearest.total_bytes
    assert nearest.relative_error < found.relative_error < 1.2 * nearest.relative_error
    small = jaxclip.quantize(w, 8, threshold=rule(2.0))
    chosen = jaxclip.lowbit.cheaper_codes(small, w, price=0.12)
    np.testing.assert_array_equal(checkpoints.load(target)["w"].qvalue, chosen.qvalue)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "bit_price": 0.1},
        {"target_bits_per_weight": 4.0, "bit_price": 0.1},
        {"bits": 3, "policy": [("embed", {"bit_price": 0.1})]},
    ],
)
def test_a_price_without_a_coding_is_refused_before_the_work(options, dry_run, source, target):
    with pytest.raises(ValueError, match=r"bit_price needs a coding.* 'embed\.weight'"):
        compress_checkpoint(source, target, dry_run=dry_run, **options)
    assert os.listdir(target.parent) == []


@pytest.mark.thorough
def test_a_price_without_a_coding_that_holds_for_no_leaf_is_none(source, target):
    policy = [("weight", {"bit_price": 0.0})]
    compress_checkpoint(source, target, 3, rule=jaxclip.max_abs, bit_price=0.1, policy=policy)
    found = target.read_bytes()
    compress_checkpoint(source, target, 3, rule=jaxclip.max_abs, overwrite=True)
    assert target.read_bytes() == found


def test_a_dry_run_knows_the_size_and_writes_nothing(source, target):
    for coding in (None, "huffman"):
        planned = compress_checkpoint(source, target, 3, coding=coding, dry_run=True)
        assert os.listdir(target.parent) == []
        written = compress_checkpoint(source, target, 3, coding=coding)
        assert planned.total_bytes == written.total_bytes
        assert [leaf.stored_bytes for leaf in planned.leaves] == [
            leaf.stored_bytes for leaf in written.leaves
        ]
        assert (planned == written) == (coding is not None)  # which reads the weights
        target.unlink()


@pytest.mark.thorough
@pytest.mark.parametrize("part_bytes", [2**24, 7 * 16 * 4])
def test_the_report_has_what_each_leaf_lost(part_bytes, source, target, monkeypatch):
    monkeypatch.setattr(rows, "_PART_BYTES", part_bytes)
    policy = [("embed", {"bits": 2, "group_size": 8, "rule": 0.15}), ("layer.weight", 3)]
    report = compress_checkpoint(source, target, 2, rule=jaxclip.max_abs, policy=policy)
    original, small = checkpoints.load(source), checkpoints.load(target)
    wanted = jaxclip.size_report(small, original=original)
    assert report.relative_error == pytest.approx(wanted.relative_error, rel=1e-7)
    assert report.clip_rate == wanted.clip_rate > 0
    for found, leaf in zip(report.leaves, wanted.leaves, strict=True):
        assert (found.path, found.clip_rate) == (leaf.path, leaf.clip_rate)
        assert (found.relative_error is None) == (leaf.relative_error is None)
        assert found.relative_error is None or found.relative_error == pytest.approx(
            leaf.relative_error, rel=1e-7
        )


@pytest.mark.thorough
def test_specs_of_a_policy_hold_in_the_file_as_in_memory(source, target, tmp_path):
    spec = {"bits": 3, "group_size": 4, "rule": jaxclip.max_abs, "scale_dtype": "log8"}
    policy = [("embed", spec), ("layer.weight", {"axis": None}), ("bias", {"bits": 8})]
    compress_checkpoint(source, target, 5, policy=policy)
    in_memory = jaxclip.compress(checkpoints.load(source), jaxclip.Grid(5, axis=0), policy=policy)
    checkpoints.save(tmp_path / "memory.safetensors", in_memory)
    assert target.read_bytes() == (tmp_path / "memory.safetensors").read_bytes()
    small = checkpoints.load(target)
    assert (small["embed.weight"].grid.scale_dtype, small["embed.weight"].scale.shape) == (
        "log8",
        (40, 4),
    )
    assert small["layer.weight"].scale.shape == (1, 1)
    assert small["layer.bias"].bits == 8


@pytest.mark.thorough
@pytest.mark.parametrize(
    "goal", [{"target_bits_per_weight": 4.0}, {"target_bytes": 2100}], ids=lambda goal: min(goal)
)
def test_a_target_is_kept_and_chooses_as_it_does_in_memory(goal, source, target):
    grid = Grid(None, axis=0, scale_dtype="float16")
    policy = [("position", None), ("layer.bias", 8)]
    options: dict = {**goal, "rule": jaxclip.max_abs, "policy": policy}
    planned = compress_checkpoint(source, target, grid, dry_run=True, **options)
    assert not target.exists()
    report = compress_checkpoint(source, target, grid, **options)
    assert [leaf.bits for leaf in planned.leaves] == [leaf.bits for leaf in report.leaves]
    if "target_bytes" not in goal:  # which a tree in memory does not have
        in_memory = jaxclip.compress(checkpoints.load(source), grid, **options)
        small = checkpoints.load(target)
        for name in ("embed.weight", "layer.weight", "layer.bias"):
            assert small[name].bits == in_memory[name].bits
            np.testing.assert_array_equal(small[name].qvalue, in_memory[name].qvalue)
    assert report.total_bytes == target.stat().st_size <= goal.get("target_bytes", 10**9)
    assert report.bits_per_weight <= goal.get("target_bits_per_weight", 8)


@pytest.mark.thorough
def test_a_target_out_of_reach_or_beside_bits_is_refused_before_the_writing(source, target):
    with pytest.raises(ValueError, match="target_bytes=200 is out of reach"):
        compress_checkpoint(source, target, target_bytes=200, rule=jaxclip.max_abs)
    with pytest.raises(TypeError, match="only one of bits and the targets"):
        compress_checkpoint(source, target, 4, target_bytes=2000)
    assert os.listdir(target.parent) == []
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        compress_checkpoint(source, target, target_bytes=10**6)


@pytest.mark.thorough
def test_the_policy_names_leaves_of_the_file(source, target):
    policy = [("embed", 8), (r"bias$", 4)]
    compress_checkpoint(source, target, 2, rule=jaxclip.max_abs, policy=policy)
    small = checkpoints.load(target)
    assert small["embed.weight"].bits == 8
    assert small["layer.weight"].bits == 2
    assert small["layer.bias"].bits == 4
    with pytest.raises(ValueError, match=r"match no leaf: \['head'\]"):
        compress_checkpoint(source, target, 2, policy=[("head", 8)], overwrite=True)
    assert checkpoints.load(target)["embed.weight"].bits == 8


@pytest.mark.thorough
def test_shards_become_one_file(tmp_path, target):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = weights()
    weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensors[key] for key, shard in weight_map.items() if shard == name}
        safetensors.numpy.save_file(part, tmp_path / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    compress_checkpoint(tmp_path, target, 8)
    assert sorted(checkpoints.load(target)) == sorted(tensors)


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_names_with_slashes_and_colons_are_compressed_and_come_back(suffix, tmp_path, target):
    names = ["layer/kernel", "layer/kernel:0", "../x", "%2F"]
    arrays = {name: drawn(8, 4, seed=seed) for seed, name in enumerate(names)}
    if suffix == ".npz":
        checkpoints.save(tmp_path / "net.npz", arrays)
    else:
        safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors")
    report = compress_checkpoint(tmp_path / f"net{suffix}", target, 4, policy=[("kernel$", 2)])
    expected = jaxclip.compress(arrays, 4, policy=[("kernel$", 2)])
    loaded = checkpoints.load(target)
    assert sorted(loaded) == sorted(names)
    for name in names:
        np.testing.assert_array_equal(loaded[name].qvalue, expected[name].qvalue)
    assert report.total_bytes == target.stat().st_size
    decompress_checkpoint(target, tmp_path / "plain.safetensors")
    plain = checkpoints.load(tmp_path / "plain.safetensors")
    assert all((plain[n] == jaxclip.dequantize(expected[n])).all() for n in names)


@pytest.mark.thorough
def test_a_tree_of_ours_keeps_its_structure_and_its_low_bit_leaves(tmp_path, target):
    tree = {"a": [drawn(8, 4), jaxclip.quantize(drawn(8, 4), 2)], "b": (drawn(3),)}
    checkpoints.save(tmp_path / "tree.safetensors", tree)
    compress_checkpoint(tmp_path / "tree.safetensors", target, Grid(4))
    small = checkpoints.load(target)
    assert [q.bits for q in small["a"]] == [4, 2]
    np.testing.assert_array_equal(small["b"][0], drawn(3))


@pytest.mark.thorough
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(tmp_path, target):
    bad = weights() | {"layer.weight": np.full((2, 2), np.nan, np.float32)}
    safetensors.numpy.save_file(bad, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"layer\.weight.* must be finite"):
        compress_checkpoint(tmp_path / "bad.safetensors", target)
    assert os.listdir(target.parent) == []


@pytest.mark.thorough
def test_damage_that_shows_late_leaves_the_old_file(source, target, tmp_path):
    tree = {"a": drawn(8, 4), "b": drawn(8, 4, seed=1)}
    checkpoints.save(tmp_path / "tree.safetensors", tree)
    data = bytearray((tmp_path / "tree.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "tree.safetensors").write_bytes(data)
    compress_checkpoint(source, target)
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match=r"tree\.safetensors: tensor 'b'"):
        compress_checkpoint(tmp_path / "tree.safetensors", target, overwrite=True)
    assert target.read_bytes() == before
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("link", ["same", "hard", "symbolic"])
def test_what_is_read_is_never_written(link, source, tmp_path):
    before = source.read_bytes()
    target = source if link == "same" else tmp_path / "link.safetensors"
    if link == "hard":
        os.link(source, target)
    elif link == "symbolic":
        target.symlink_to(source)
    with pytest.raises(FileExistsError, match="is a file that is read"):
        compress_checkpoint(source, target, overwrite=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "model-00003-of-00003.safetensors"])
def test_a_folder_that_is_read_still_loads(name, tmp_path):
    folder = tmp_path / "net"
    tree = {name: np.ones((8, 8), np.float32) for name in "ab"}
    interop.to_safetensors(folder, tree, max_shard_bytes=256)
    rewrites = [
        compress_checkpoint,
        functools.partial(compress_checkpoint, dry_run=True),
        decompress_checkpoint,
        functools.partial(clip_checkpoint, threshold=0.5),
    ]
    for rewrite in rewrites:
        with pytest.raises(ValueError, match="would change the content of the folder"):
            rewrite(folder, folder / name)
    assert sorted(checkpoints.load(folder)) == ["a", "b"]


def test_existing_files_and_other_suffixes_are_refused_before_the_work(source, target):
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        compress_checkpoint(source, target)
    assert target.read_bytes() == b"mine"
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        compress_checkpoint(source, target.with_suffix(".npz"))
    with pytest.raises(FileNotFoundError, match="no directory"):
        compress_checkpoint(source, target / "sub" / "x.safetensors")


# --- Decompress and clip ----------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [None, np.float16, ml_dtypes.bfloat16])
def test_decompressed_files_are_read_by_others(dtype, source, target, tmp_path):
    compress_checkpoint(source, target, 4)
    decompress_checkpoint(target, tmp_path / "plain.safetensors", dtype)
    wanted = jaxclip.decompress(checkpoints.load(target), dtype)
    found = safetensors.numpy.load_file(tmp_path / "plain.safetensors")
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.thorough
def test_clipping_is_the_projection_and_leaves_the_rest(source, target):
    clip_checkpoint(source, target, 0.1, include="weight$")
    clipped, original = checkpoints.load(target), weights()
    np.testing.assert_array_equal(
        clipped["embed.weight"], np.asarray(jaxclip.clip_weights(original["embed.weight"], 0.1))
    )
    assert np.abs(clipped["layer.weight"].astype(np.float64)).max() <= 0.1
    for name in ("layer.bias", "position_ids", "mask"):
        np.testing.assert_array_equal(clipped[name], original[name])
        assert clipped[name].dtype == original[name].dtype


def test_float64_weights_are_clipped_as_float64(tmp_path, target):
    w = drawn(10, 10, dtype=np.float64)
    np.save(tmp_path / "w.npy", w)
    clip_checkpoint(tmp_path / "w.npy", target, 0.1)
    np.testing.assert_array_equal(checkpoints.load(target), np.clip(w, -0.1, 0.1))


@pytest.mark.thorough
def test_a_rule_clips_each_leaf_by_its_own_threshold(source, target):
    clip_checkpoint(source, target, jaxclip.mse_optimal(2))
    for name, w in weights().items():
        if name.endswith("weight"):
            t = float(np.max(jaxclip.mse_optimal(2)(w)))
            assert np.abs(checkpoints.load(target)[name].astype(np.float32)).max() <= t


def test_a_wrong_clip_is_refused_before_the_work(source, target):
    with pytest.raises(ValueError, match=r"threshold must be in \[0, inf\]"):
        clip_checkpoint(source, target, -1.0)
    with pytest.raises(ValueError, match="include='head' matches no leaf"):
        clip_checkpoint(source, target, 1.0, include="head")
    assert not target.exists()


ODD_NAMES = ["layer/kernel:0", "100%", "a%2Fb", "x:codes", "../up", "dense.weight"]


@pytest.mark.parametrize("kind", ["safetensors", "npz", "folder"])
def test_names_of_others_stay_as_they_are_for_others(kind, tmp_path, target):
    arrays = {name: drawn(6, 4, seed=seed) for seed, name in enumerate(ODD_NAMES)}
    path = tmp_path / f"net.{kind}"
    if kind == "npz":
        checkpoints.save(path, arrays)
    elif kind == "safetensors":
        safetensors.numpy.save_file(arrays, path)
    else:
        path.mkdir()
        shard = "model-00001-of-00001.safetensors"
        safetensors.numpy.save_file(arrays, path / shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(arrays, shard)}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    clipped, plain = tmp_path / "clipped.safetensors", tmp_path / "plain.safetensors"
    report = clip_checkpoint(path, clipped, 0.05)
    assert sorted(leaf.path for leaf in report.leaves) == sorted(ODD_NAMES)
    assert report.total_bytes == clipped.stat().st_size
    compress_checkpoint(path, target, 8, rule=jaxclip.max_abs)
    report = decompress_checkpoint(target, plain)
    assert report.total_bytes == plain.stat().st_size
    small = checkpoints.load(target)
    for file, wanted in (
        (
            clipped,
            {name: np.clip(w, -np.float32(0.05), np.float32(0.05)) for name, w in arrays.items()},
        ),
        (plain, {name: jaxclip.dequantize(small[name]) for name in ODD_NAMES}),
    ):
        found = safetensors.numpy.load_file(file)
        assert sorted(found) == sorted(ODD_NAMES) == sorted(checkpoints.load(file))
        for name in ODD_NAMES:
            np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-8)


@pytest.mark.thorough
def test_names_without_such_characters_keep_their_checksums_and_trees_their_structure(
    source, target, tmp_path
):
    clip_checkpoint(source, target, 0.1)
    assert b"header_crc" in target.read_bytes()[:200]
    tree = {"a/b": {"w": drawn(4, 4)}, "c": drawn(3)}
    checkpoints.save(tmp_path / "tree.safetensors", tree)
    clip_checkpoint(tmp_path / "tree.safetensors", target, 1.0, overwrite=True)
    assert sorted(safetensors.numpy.load_file(target)) == ["a%2Fb/w", "c"]
    np.testing.assert_array_equal(checkpoints.load(target)["a/b"]["w"], tree["a/b"]["w"])


def test_a_directory_that_cannot_be_written_to_is_named_before_the_work(
    source, target, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for write in (
        lambda: compress_checkpoint(source, target, target_bytes=10**6),
        lambda: clip_checkpoint(source, target, 1.0),
        lambda: checkpoints.save(target, {}),
    ):
        with pytest.raises(PermissionError, match=f"'{target.parent}' cannot be written to"):
            write()
    assert os.listdir(target.parent) == []


@pytest.mark.thorough
def test_big_endian_arrays_become_little_endian(tmp_path, target):
    arrays = {"a/b": drawn(4, 3).astype(">f4"), "n": np.arange(3, dtype=">i2")}
    np.savez(tmp_path / "net.npz", **arrays)
    clip_checkpoint(tmp_path / "net.npz", target, 10.0)
    found = safetensors.numpy.load_file(target)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert checkpoints.load(tmp_path / "net.npz")[name].dtype == array.dtype.newbyteorder("=")
    np.save(tmp_path / "net.npy", arrays["a/b"])
    compress_checkpoint(tmp_path / "net.npy", target, 8, rule=jaxclip.max_abs, overwrite=True)
    values = jaxclip.dequantize(checkpoints.load(target))
    np.testing.assert_allclose(values, arrays["a/b"], atol=2e-3)


def test_too_many_tensors_for_a_header_are_refused_when_saving(tmp_path, target, monkeypatch):
    safetensors.numpy.save_file(
        {f"a/{i}": drawn(1) for i in range(9)}, tmp_path / "net.safetensors"
    )
    monkeypatch.setattr(
        "jaxclip.checkpoints.format.writing.header_length", functools.partial(limited, 500)
    )
    with pytest.raises(ValueError, match="header is larger"):
        clip_checkpoint(tmp_path / "net.safetensors", target, 1.0)
    assert os.listdir(target.parent) == []


def limited(limit: int, prefix: bytes, file_size: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxclip.checkpoints.format.parsing.MAX_HEADER_BYTES", limit)
        return header_length(prefix, file_size)


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(
    "goal",
    ["Grid(4, ", "target_bits_per_weight=4.0, rule=jaxclip.max_abs, bits=Grid(None, "],
    ids=["a width", "a target"],
)
def test_memory_is_bounded_by_the_largest_leaf(goal, tmp_path):
    script = textwrap.dedent(
        """
        import sys, numpy as np, jaxclip
        from jaxclip import Grid, checkpoints
        folder, count = sys.argv[1], int(sys.argv[2])
        w = np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32)
        checkpoints.save(folder + "/net.npz", {f"w{i}": w for i in range(count)}, overwrite=True)
        checkpoints.compress_checkpoint(
            folder + "/net.npz",
            folder + "/small.safetensors",
            GOALaxis=0, group_size=64),
            overwrite=True,
        )
        # Not ru_maxrss, which begins at the peak of the parent.
        print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        """
    ).replace("GOAL", goal)

    def peak(count: int) -> int:
        command = [sys.executable, "-c", script, str(tmp_path), str(count)]
        environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as a user has it
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        return int(result.stdout) * 1024

    # 48 leaves more are 384 MiB; what grows is what malloc keeps.
    assert peak(56) - peak(8) < 16 * 1024 * 2048 * 4


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["a.weight", "a/weight"])
def test_rewriting_keeps_the_metadata_of_the_source(name, tmp_path):
    metadata = {"format": "tf", "license": 'é \\ "quoted"', "step": "7"}
    path = {n: tmp_path / f"{n}.safetensors" for n in ("src", "small", "clipped", "back", "again")}
    weights = {name: np.ones((64, 64), np.float32)}
    safetensors.numpy.save_file(weights, path["src"], metadata=metadata)
    fast = {"rule": jaxclip.max_abs}
    report = checkpoints.compress_checkpoint(path["src"], path["small"], 4, **fast)
    assert report.total_bytes == path["small"].stat().st_size
    planned = checkpoints.compress_checkpoint(path["src"], path["again"], 4, dry_run=True, **fast)
    assert planned.total_bytes == report.total_bytes
    limit = report.total_bytes + 100
    bounded = checkpoints.compress_checkpoint(
        path["src"], path["again"], target_bytes=limit, **fast
    )
    assert bounded.total_bytes <= limit
    checkpoints.decompress_checkpoint(path["small"], path["back"])
    checkpoints.clip_checkpoint(path["src"], path["clipped"], 0.5)
    for each in ("small", "clipped", "back", "again"):
        with safetensors.safe_open(path[each], "np") as file:
            kept = {k: v for k, v in file.metadata().items() if k != "jaxclip"}
            assert kept == metadata, each
    assert checkpoints.load(path["small"]).keys() == {name}
    back = checkpoints.load(path["back"])[name]
    np.testing.assert_allclose(back, weights[name], rtol=1e-6)


@pytest.mark.thorough
def test_metadata_of_all_shards_are_kept(folder, tmp_path):
    shards = sorted(folder.glob("model-*.safetensors"))
    for i, shard in enumerate(shards):
        tensors = safetensors.numpy.load_file(shard)
        safetensors.numpy.save_file(tensors, shard, metadata={"format": "pt", f"own {i}": "x"})
    checkpoints.clip_checkpoint(folder, tmp_path / "new.safetensors", 1.0)
    with safetensors.safe_open(tmp_path / "new.safetensors", "np") as file:
        assert file.metadata().keys() - {"jaxclip"} == {"format", "own 0", "own 1"}


@pytest.mark.thorough
def test_moments_of_an_optimizer_are_no_weights(tmp_path):
    src, dst = tmp_path / "src.safetensors", tmp_path / "dst.safetensors"
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    moments = {
        "optimizer.state.0.exp_avg": weights,
        "fc.weight.exp_avg_sq": weights,
        "opt_state/0/mu/kernel": weights,
        "dense/kernel/Adam_1": weights,
        "fc.momentum_buffer": weights,
        "first_moment.fc": weights,
    }
    others = {"fc.weight": weights, "momentum_encoder.weight": weights, "adamant.w": weights}
    safetensors.numpy.save_file(moments | others, src)
    report = checkpoints.compress_checkpoint(src, dst, 4, progress=False)
    widths = {leaf.path.replace("%2F", "/"): leaf.bits for leaf in report.leaves}
    assert widths == dict.fromkeys(moments) | dict.fromkeys(others, 4)
    reasons = {name.replace("%2F", "/"): why for name, why in report.no_weights.items()}
    assert reasons == dict.fromkeys(moments, "optimizer state")
    assert str(report).count("as is: optimizer state") == len(moments)
    # A policy that names them decides.
    policy = [("exp_avg$", 8), ("mu", {"group_size": 16})]
    report = checkpoints.compress_checkpoint(src, dst, 4, policy=policy, overwrite=True)
    widths = {leaf.path: leaf.bits for leaf in report.leaves}
    assert widths["optimizer.state.0.exp_avg"] == 8
    assert widths["opt_state%2F0%2Fmu%2Fkernel"] == 4
    assert widths["fc.weight.exp_avg_sq"] is None
    # Nor are they clipped, unless they are asked for.
    for include, clipped in (("", set(others)), ("weight", {*others, "fc.weight.exp_avg_sq"})):
        checkpoints.clip_checkpoint(src, dst, 0.5, include=include, overwrite=True)
        loaded = checkpoints.load(dst)
        got = {name for name, array in loaded.items() if abs(array).max() <= 0.5}
        assert got == {name for name in clipped if not include or include in name}


@pytest.mark.thorough
def test_a_float64_leaf_is_reported_as_float64(tmp_path):
    src, dst = tmp_path / "src.npz", tmp_path / "dst.safetensors"
    params = {"a": np.random.default_rng(0).normal(size=(64, 64))}
    checkpoints.save(src, params)
    small = jaxclip.compress(params, 4)
    reports = [
        checkpoints.compress_checkpoint(src, dst, 4),
        checkpoints.compress_checkpoint(src, dst, 4, dry_run=True),
        jaxclip.size_report(small, original=params),
    ]
    for report in reports:
        assert report.leaves[0].dtype == "float64"
        assert report.raw_bytes == report.leaves[0].raw_bytes == 8 * 64 * 64


def test_a_file_compressed_from_float64_stands_for_float64(tmp_path):
    src, small, back = (tmp_path / f"{name}.safetensors" for name in ("src", "small", "back"))
    w = np.random.default_rng(0).normal(size=(64, 64))
    checkpoints.save(src, {"w": w})
    checkpoints.compress_checkpoint(src, small, 4)
    assert checkpoints.inspect(small).leaves[0].dtype == "float64"
    q = checkpoints.load(small, like={"w": w})["w"]
    values = jaxclip.dequantize(q)  # no warning, though jax has no float64 here
    assert values.dtype == np.float32
    for dtype, wanted in ((None, np.float64), (np.float64, np.float64), (np.float16, np.float16)):
        checkpoints.decompress_checkpoint(small, back, dtype, overwrite=True)
        read = checkpoints.load(back)["w"]
        assert read.dtype == wanted
        assert np.array_equal(read, np.asarray(values).astype(wanted))
