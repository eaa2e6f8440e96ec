"""Folders of shards, trees that are asked for, and files read leaf by leaf."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxclip
from jaxclip import checkpoints
from jaxclip.checkpoints import CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def drawn(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two shards and an index, as the Hugging Face hub has them."""
    first = {"a.weight": drawn(4, 3), "a.bias": drawn(4, seed=1, dtype=np.float16)}
    second = {"b.weight": drawn(2, 4, seed=2, dtype=ml_dtypes.bfloat16)}
    for name, tensors in zip(SHARDS, (first, second), strict=True):
        safetensors.numpy.save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    weight_map = dict.fromkeys(first, SHARDS[0]) | dict.fromkeys(second, SHARDS[1])
    write_index(tmp_path, weight_map, total_size=4 * 12 + 2 * 4 + 2 * 8)
    return tmp_path


def write_index(folder: pathlib.Path, weight_map: Any, **metadata: Any) -> None:
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def read_weight_map(folder: pathlib.Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


# --- Folders ----------------------------------------------------------------------------------


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
    with pytest.raises(CheckpointError, match="tensor 'c' is missing in its shard"):
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
    with pytest.raises(CheckpointError, match="says 73 bytes of tensors, the shards hold 72"):
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


# --- What is asked for ------------------------------------------------------------------------


def test_like_gives_its_structure_to_flat_names(folder, tmp_path):
    like = {
        "a": {"weight": np.zeros((4, 3), np.float32), "bias": np.zeros(4, np.float16)},
        "b": {"weight": jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)},
    }
    loaded = checkpoints.load(folder, like=like)
    assert jax.tree.structure(loaded) == jax.tree.structure(like)
    np.testing.assert_array_equal(loaded["a"]["weight"], drawn(4, 3))
    checkpoints.save(tmp_path / "x.npz", {"a": {"w": drawn(2)}})
    np.testing.assert_array_equal(
        checkpoints.load(tmp_path / "x.npz", like={"a": {"w": drawn(2)}})["a"]["w"], drawn(2)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"w": np.zeros((3, 2), np.float32)}, r"'w' has shape \(2, 3\)"),
        (lambda t: t | {"w": np.zeros((2, 3), np.float16)}, "'w' has dtype float32, and float16"),
        (lambda t: t | {"x": np.zeros(1)}, "'x' is wanted"),
        (lambda t: {"w": t["w"]}, "'b/0' is there, but is not wanted"),
    ],
)
def test_like_names_the_first_difference(change, message, tmp_path):
    tree = {"w": drawn(2, 3), "b": [drawn(1)]}
    checkpoints.save(tmp_path / "x.safetensors", tree)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, checkpoints.load(tmp_path / "x.safetensors", like=tree), tree)
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path / "x.safetensors", like=change(tree))


def test_low_bit_leaves_may_stand_for_arrays_and_their_grids_are_compared(tmp_path):
    params = {"kernel": drawn(8, 4), "bias": drawn(4)}
    small = jaxclip.compress(params, 4)
    checkpoints.save(tmp_path / "x.safetensors", small)
    loaded = checkpoints.load(tmp_path / "x.safetensors", like=params)
    np.testing.assert_array_equal(loaded["kernel"].qvalue, small["kernel"].qvalue)
    checkpoints.load(tmp_path / "x.safetensors", like=small)
    with pytest.raises(CheckpointError, match=r"'kernel' has grid Grid\(bits=4.*bits=2"):
        checkpoints.load(tmp_path / "x.safetensors", like=jaxclip.compress(params, 2))


def test_leaves_are_put_where_they_are_wanted(folder):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for place in (jax.devices()[1], replicated):
        loaded = checkpoints.load(folder, device=place)
        assert all(isinstance(leaf, jax.Array) for leaf in loaded.values())
        assert all(leaf.devices() <= set(jax.devices()[:2]) for leaf in loaded.values())
        np.testing.assert_array_equal(loaded["a.weight"], drawn(4, 3))


# --- What there is ----------------------------------------------------------------------------


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
    unread = [dataclasses.replace(leaf, threshold=None) for leaf in saved.leaves]
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
