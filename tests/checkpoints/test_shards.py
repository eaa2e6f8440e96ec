"""Folders of shards: one flat dict, and nothing outside the folder is read."""

import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxclip import checkpoints
from jaxclip.checkpoints import CheckpointError, shards
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


def test_a_shard_that_the_index_does_not_list_is_named(folder):
    extra = "model-00003-of-00003.safetensors"
    safetensors.numpy.save_file({"c": drawn(1)}, folder / extra)
    with pytest.raises(CheckpointError, match=f"shard '{extra}' is in the folder but not"):
        checkpoints.load(folder)


def test_index_and_shards_must_agree_on_every_tensor(folder):
    weight_map = read_weight_map(folder)
    write_index(folder, weight_map | {"c": SHARDS[0]})
    with pytest.raises(CheckpointError, match="tensor 'c' is missing from its shard"):
        checkpoints.load(folder)
    write_index(folder, weight_map | {"a.bias": SHARDS[1]})
    with pytest.raises(CheckpointError, match=r"tensor 'a\.bias' is in shard"):
        checkpoints.load(folder)
    write_index(folder, {k: v for k, v in weight_map.items() if k != "a.bias"})
    with pytest.raises(CheckpointError, match=r"tensor 'a\.bias' is in shard"):
        checkpoints.load(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    safetensors.numpy.save_file({"b.weight": drawn(2, 4), "a.bias": drawn(4)}, folder / SHARDS[1])
    with pytest.raises(CheckpointError, match=r"'a\.bias' is in shard"):
        checkpoints.load(folder)


def test_a_wrong_total_size_is_refused(folder):
    write_index(folder, read_weight_map(folder), total_size=73)
    with pytest.raises(CheckpointError, match="gives 73 bytes of tensors, but the shards have 72"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1e999}}',
     '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "[" * 10_000,
     '{"metadata": {"total_size": -1}, "weight_map": {"a.weight": "x.safetensors"}}'],
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
