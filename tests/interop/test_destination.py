"""A file or a folder of shards appears whole or not at all, with the model's other files."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxclip import checkpoints, interop
from jaxclip.interop import destination
from oracles.exported_trees import (
    CONFIG,
    assert_equal_arrays,
    drawn,
    files_of,
    low_bit_tree,
    model_folder,
    random_weights,
)


def every_export(path: pathlib.Path, **arguments: Any) -> list:
    tree = {"weight": drawn(4, (2, 32))}
    return [
        lambda: interop.to_safetensors(path, tree, **arguments),
        lambda: interop.to_compressed_tensors(path, tree, **arguments),
        lambda: interop.to_gguf(path, tree, "llama", **arguments),
    ]


@pytest.mark.parametrize("i", [0, 1, 2], ids=["safetensors", "compressed_tensors", "gguf"])
def test_an_existing_file_is_replaced_only_when_asked(tmp_path, i):
    if i == 2:
        pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        every_export(path)[i]()
    assert path.read_bytes() == b"old"
    path.chmod(0o640)
    every_export(path, overwrite=True)[i]()
    assert path.stat().st_size > 100
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError, match="no directory"):
        every_export(tmp_path / "missing" / "file")[i]()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors"])
def test_a_folder_of_shards_holds_what_one_file_does(tmp_path, to):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    one, folder = tmp_path / "one.safetensors", tmp_path / "folder"
    config = interop.export_checkpoint(tmp_path / "tree.safetensors", one, to)
    options: dict[str, Any] = {"max_shard_bytes": 4000}
    for path in (folder, tmp_path / "again"):
        found = interop.export_checkpoint(tmp_path / "tree.safetensors", path, to, **options)
        assert found == config
    wanted, found = checkpoints.load(one), checkpoints.load(folder)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array), name
    assert files_of(folder) == files_of(tmp_path / "again")
    if to == "compressed-tensors":
        interop.to_compressed_tensors(tmp_path / "tree", low_bit_tree(), **options)
    else:
        interop.to_safetensors(tmp_path / "tree", low_bit_tree(), **options)
    assert files_of(folder) == files_of(tmp_path / "tree")


def test_the_index_names_the_shard_of_every_tensor_and_their_bytes(tmp_path):
    # Codes 8 * 64 / 2 bytes, scales 8 * 2 * 4, the shape 2 * 8: 336 a leaf; 10,240 and 256 else.
    interop.to_compressed_tensors(tmp_path / "net", low_bit_tree(), max_shard_bytes=3 * 336)
    index = json.loads((tmp_path / "net" / "model.safetensors.index.json").read_text())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "net")) == [*names, "model.safetensors.index.json"]
    shards = [safetensors.numpy.load_file(tmp_path / "net" / name) for name in names]
    # A tree's keys are in order: the embedding is larger than a shard and alone, then three leaves.
    assert list(shards[0]) == ["embed.weight"]
    assert {name.rpartition(".")[0] for name in shards[1]} == {f"layers.{i}" for i in range(3)}
    assert {name.rpartition(".")[0] for name in shards[2]} == {"layers.3", "norm"}
    assert index["weight_map"] == {
        t: n for n, shard in zip(names, shards, strict=True) for t in shard
    }
    assert index["metadata"] == {"total_size": 4 * 336 + 10_240 + 256}
    for name in names:
        with safetensors.safe_open(tmp_path / "net" / name, "np") as file:
            assert file.metadata() == {"format": "pt"}


def test_what_fits_into_one_shard_has_no_index(tmp_path):
    interop.to_safetensors(tmp_path / "net", low_bit_tree(), max_shard_bytes=10**6)
    interop.to_safetensors(tmp_path / "one", low_bit_tree())
    assert files_of(tmp_path / "net") == {"model.safetensors": (tmp_path / "one").read_bytes()}


def test_a_folder_of_shards_becomes_one_unless_a_file_is_named(tmp_path):
    arrays = {f"layer.{i}.weight": random_weights(2, 32) for i in range(3)}
    interop.to_safetensors(tmp_path / "in", arrays, max_shard_bytes=256)
    assert len(files_of(tmp_path / "in")) == 4
    for options in ({}, {"max_shard_bytes": 512}):
        out = tmp_path / f"out{len(options)}"
        interop.export_checkpoint(tmp_path / "in", out, "safetensors", **options)
        assert len(files_of(out)) == (3 if options else 1)
        assert_equal_arrays(checkpoints.load(out), arrays)
    interop.export_checkpoint(tmp_path / "in", tmp_path / "out.safetensors", "safetensors")
    assert_equal_arrays(safetensors.numpy.load_file(tmp_path / "out.safetensors"), arrays)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "net").mkdir()
    options: dict[str, Any] = {"max_shard_bytes": 100, "overwrite": overwrite}
    with pytest.raises(FileExistsError, match="folders are not replaced"):
        interop.to_safetensors(tmp_path / "net", low_bit_tree(), **options)
    with pytest.raises(FileNotFoundError, match="no directory"):
        interop.to_safetensors(tmp_path / "no" / "net", low_bit_tree(), **options)
    assert files_of(tmp_path / "net") == {}
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_export_that_ends_in_its_last_shard_leaves_nothing(tmp_path, monkeypatch, error):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    written = []
    write_plain = destination.write_plain

    def interrupted(*arguments, **options):
        written.append(write_plain(*arguments, **options))
        if len(written) == 3:
            raise error

    monkeypatch.setattr(destination, "write_plain", interrupted)
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    with pytest.raises(error):
        interop.export_checkpoint(*paths, "compressed-tensors", max_shard_bytes=1008)
    assert os.listdir(tmp_path) == ["tree.safetensors"]


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_an_impossible_size_of_shards_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_bytes must be an integer of at least 1"):
        interop.to_safetensors(tmp_path / "net", low_bit_tree(), max_shard_bytes=size)
    assert list(tmp_path.iterdir()) == []
    interop.to_safetensors(tmp_path / "in", {"w": np.ones(4), "v": np.ones(4)}, max_shard_bytes=32)
    for source in (tmp_path / "in", tmp_path / "in" / "model-00001-of-00002.safetensors"):
        with pytest.raises(ValueError, match="max_shard_bytes must be an integer of at least 1"):
            interop.export_checkpoint(source, tmp_path / "n", "safetensors", max_shard_bytes=size)
    assert os.listdir(tmp_path) == ["in"]


# --- A model's other files --------------------------------------------------------------


@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors"])
def test_a_models_other_files_are_copied_and_its_weights_are_not(tmp_path, to):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    model = model_folder(tmp_path / "model")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", ".hidden"):
        (model / name).write_bytes(b"left")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "net.ONNX", "a.gguf"):
        (model / name).write_bytes(b"left")
    (model / "1_Pooling").mkdir()
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    quantization = interop.export_checkpoint(*paths, to, model_files=model)
    interop.export_checkpoint(paths[0], tmp_path / "one.safetensors", to)
    found = files_of(tmp_path / "net")
    assert set(found) == {"config.json", "tokenizer.json", "LICENSE", "model.safetensors"}
    assert found["model.safetensors"] == (tmp_path / "one.safetensors").read_bytes()
    for name in ("tokenizer.json", "LICENSE"):
        assert found[name] == (model / name).read_bytes()
    if to == "safetensors":
        assert found["config.json"] == (model / "config.json").read_bytes()
    else:
        assert quantization is not None
        config = json.loads(found["config.json"])
        assert config == CONFIG | {"quantization_config": quantization}


def test_other_files_are_copied_with_shards_and_from_a_cache_of_links(tmp_path):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    blobs = model_folder(tmp_path / "hub" / "blobs")
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    interop.export_checkpoint(
        tmp_path / "tree.safetensors",
        tmp_path / "net",
        "safetensors",
        max_shard_bytes=4000,
        model_files=snapshot,
    )
    found = files_of(tmp_path / "net")
    assert found.items() >= files_of(blobs).items()
    assert not (tmp_path / "net" / "LICENSE").is_symlink()
    assert "model-00002-of-00005.safetensors" in found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("[]", "config.json is not a JSON object"),
        ('{"quantization_config": {}}', "has a quantization_config: use that of plain weights"),
        (None, "No such file .*config.json"),
    ],
)
def test_a_folder_without_the_config_of_a_plain_model_is_refused(tmp_path, config, message):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    model = model_folder(tmp_path / "model", config or "")
    if config is None:
        (model / "config.json").unlink()
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    with pytest.raises(ValueError, match="model_files must be the folder of a model.*" + message):
        interop.export_checkpoint(*paths, "compressed-tensors", model_files=model)
    with pytest.raises(ValueError, match=r"model_files must be .*no/model"):
        interop.export_checkpoint(*paths, "safetensors", model_files=tmp_path / "no" / "model")
    assert not (tmp_path / "net").exists()


def test_links_out_of_the_models_folder_and_pipes_are_refused(tmp_path):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    (tmp_path / "secret").write_text("secret")
    model = model_folder(tmp_path / "model")
    (model / "notes").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="file 'notes' is a link that leads out of the folder"):
        interop.export_checkpoint(*paths, "safetensors", model_files=model)
    (model / "notes").unlink()
    os.mkfifo(model / "pipe")
    with pytest.raises(ValueError, match="file 'pipe' is neither a regular file nor a folder"):
        interop.export_checkpoint(*paths, "safetensors", model_files=model)
    assert not (tmp_path / "net").exists()
