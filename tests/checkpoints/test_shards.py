"""Folders of shards: one flat dict, and nothing outside the folder is read."""

import json
import os
import resource

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxclip import checkpoints
from jaxclip.checkpoints import CheckpointError, reading, shards
from oracles.shard_folders import INDEX, SHARDS, drawn, read_weight_map, write_index


def test_a_folder_of_shards_is_one_flat_dict(folder):
    for path in (folder, folder / INDEX):
        loaded = checkpoints.load(path)
        assert sorted(loaded) == ["a.bias", "a.weight", "b.weight"]
        np.testing.assert_array_equal(loaded["a.weight"], drawn(4, 3))
        assert loaded["b.weight"].dtype == ml_dtypes.bfloat16
        assert loaded["a.bias"].dtype == np.float16


def test_a_folder_with_one_file_is_that_file(tmp_path):
    safetensors.numpy.save_file({"w": drawn(3)}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(checkpoints.load(tmp_path)["w"], drawn(3))
    write_index(tmp_path, {"w": "model.safetensors"})
    with pytest.raises(CheckpointError, match="both"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "",
        "a\nb.safetensors",
        "a\0.safetensors",
        "x" * 300 + ".safetensors",
        "é" * 130 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_only_bare_names_are_followed(folder, shard):
    write_index(folder, read_weight_map(folder) | {"b.weight": shard})
    with pytest.raises(CheckpointError, match=r"'b\.weight'.*not a bare"):
        checkpoints.load(folder)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / SHARDS[1]
    (folder / SHARDS[1]).rename(outside)
    (folder / SHARDS[1]).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        checkpoints.load(folder)


def test_links_from_a_snapshot_to_its_blobs_are_followed(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    (root / "blobs").mkdir()
    (root / "snapshots" / "abc").mkdir(parents=True)
    for name in (*SHARDS, INDEX):
        (folder / name).rename(root / "blobs" / f"hash-{name}")
        (root / "snapshots" / "abc" / name).symlink_to(f"../../blobs/hash-{name}")
    assert len(checkpoints.load(root / "snapshots" / "abc")) == 3


def test_a_missing_shard_is_named(folder):
    (folder / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"shard '{SHARDS[1]}' is missing"):
        checkpoints.load(folder)


def test_a_shard_that_the_index_does_not_list_is_left_out_with_a_warning(folder):
    extra = "model-00003-of-00003.safetensors"
    safetensors.numpy.save_file({"c": drawn(1)}, folder / extra)
    with pytest.warns(UserWarning, match=f"shard '{extra}' is in the folder but not"):
        assert sorted(checkpoints.load(folder)) == ["a.bias", "a.weight", "b.weight"]


def test_a_tensor_that_is_not_in_the_shard_of_the_index_is_named(folder):
    weight_map = read_weight_map(folder)
    for change in ({"c": SHARDS[0]}, {"a.bias": SHARDS[1]}):
        write_index(folder, weight_map | change)
        with pytest.raises(CheckpointError, match=f"{next(iter(change))!r} is missing from its"):
            checkpoints.load(folder)


def test_tensors_that_the_index_leaves_out_are_left_out_with_a_warning(folder):
    weight_map = read_weight_map(folder)
    write_index(folder, {k: v for k, v in weight_map.items() if k != "a.bias"})
    with pytest.warns(UserWarning, match=r"1 tensors .* left out, such as 'a\.bias' in") as caught:
        assert sorted(checkpoints.load(folder)) == ["a.weight", "b.weight"]
    assert len(caught) == 1


def test_of_a_tensor_in_two_shards_the_index_says_which_is_read(folder):
    wrong = {"b.weight": drawn(2, 4, dtype=ml_dtypes.bfloat16), "a.bias": drawn(4)}
    safetensors.numpy.save_file(wrong, folder / SHARDS[1])
    with pytest.warns(UserWarning, match=r"left out, such as 'a\.bias'"):
        loaded = checkpoints.load(folder)
    assert loaded["a.bias"].dtype == np.float16


@pytest.mark.parametrize(
    "total", [73, 72.5, -1, "72", None, [], float("nan"), 1e999, 10**30, 10**400]
)
def test_a_total_size_that_is_wrong_is_a_warning(folder, total):
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": read_weight_map(folder)})
    (folder / INDEX).write_text(text)
    if total is None:
        assert len(checkpoints.load(folder)) == 3
        return
    with pytest.warns(UserWarning, match=r"gives a total_size of .*, but its tensors take 72"):
        assert len(checkpoints.load(folder)) == 3


@pytest.mark.parametrize("metadata", [None, [], 0.5, "text", {"format": None, "a": [1.5, 10**30]}])
def test_other_metadata_of_an_index_may_be_anything(folder, metadata):
    index = {"metadata": metadata, "weight_map": read_weight_map(folder), "version": 0.1}
    (folder / INDEX).write_text(json.dumps(index))
    assert len(checkpoints.load(folder)) == 3


def test_a_folder_of_more_shards_than_files_may_be_open_is_loaded(tmp_path):
    weight_map = {}
    for i in range(60):
        name = f"model-{i + 1:05d}-of-00060.safetensors"
        safetensors.numpy.save_file({f"w{i}": np.full(3, i)}, tmp_path / name)
        weight_map[f"w{i}"] = name
    # In the order of the index a shard is read again after many others.
    safetensors.numpy.save_file(
        {"w0": np.full(3, 0), "x": np.full(3, -1)}, tmp_path / weight_map["w0"]
    )
    write_index(tmp_path, weight_map | {"x": weight_map["w0"]})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 30, limits[1]))
    try:
        loaded = checkpoints.load(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [loaded[f"w{i}"][0] for i in range(60)] == list(range(60))
    assert loaded["x"].tolist() == [-1] * 3
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_shard_that_is_replaced_while_others_are_read_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(reading, "_MAX_OPEN_FILES", 1)
    with reading.open_source(folder) as source:
        safetensors.numpy.save_file(
            {"a.weight": drawn(4, 3), "a.bias": drawn(4)}, folder / SHARDS[0]
        )
        with pytest.raises(CheckpointError, match=f"shard '{SHARDS[0]}': it was changed"):
            source.read("a.weight")


def test_an_index_too_large_to_be_one_is_not_read(folder):
    with (folder / INDEX).open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CheckpointError, match="larger than 100,000,000 bytes"):
        checkpoints.load(folder)
    (folder / INDEX).write_text('{"weight_map": [' + "[]," * 2**20 + "[]]}")
    with pytest.raises(CheckpointError, match="made to exhaust memory"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1e999}}',
     '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "[" * 10_000,
     '{"metadata": {}, "weight_map": {"a.weight": "x.safetensors"}}'],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index|missing"):
        checkpoints.load(folder)


def test_damage_in_a_shard_names_the_shard(folder):
    data = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"shard '{SHARDS[1]}'"):
        checkpoints.load(folder)


def test_a_fifo_as_shard_is_refused_without_waiting(folder):
    (folder / SHARDS[1]).unlink()
    os.mkfifo(folder / SHARDS[1])
    with pytest.raises(CheckpointError, match="not a regular file"):
        checkpoints.load(folder)


def test_shards_are_filled_in_order_and_a_large_part_has_one_to_itself():
    sizes = {"a": 3, "b": 2, "c": 9, "d": 1}
    assert shards.split_shards(sizes, 5) == [["a", "b"], ["c"], ["d"]]
    assert shards.split_shards({}, 5) == [[]]


def test_shards_are_numbered_a_single_one_is_not_and_there_is_a_limit():
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert shards.shard_names(2) == names
    assert shards.shard_names(1) == ["model.safetensors"]
    with pytest.raises(ValueError, match="at most 99,999 shards, these would be 100,000"):
        shards.shard_names(100_000)


def test_an_index_that_is_made_is_read(folder):
    inside = {SHARDS[0]: ["a.weight", "a.bias"], SHARDS[1]: ["b.weight"]}
    (folder / INDEX).write_bytes(shards.make_index(inside, 72))
    assert sorted(checkpoints.load(folder)) == ["a.bias", "a.weight", "b.weight"]


def test_files_of_a_model_are_neither_weights_nor_hidden_nor_folders(folder):
    for name in ("config.json", "tokenizer.model", "weights.bin", ".gitattributes"):
        (folder / name).write_text("")
    (folder / "onnx").mkdir()
    found = [file.name for file in shards.model_files(folder)]
    assert found == ["config.json", "tokenizer.model"]
