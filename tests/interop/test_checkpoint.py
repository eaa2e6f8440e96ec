"""Exports of files: equal to those of the trees in them, one leaf in memory."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jaxclip
from jaxclip import checkpoints, interop
from jaxclip.checkpoints.reading import open_source
from oracles.exported_trees import (
    assert_equal_arrays,
    drawn,
    files_of,
    low_bit_tree,
    model_folder,
    random_weights,
)


def write_by_function(path: pathlib.Path, tree: Any, to: str) -> Any:
    if to == "safetensors":
        return interop.to_safetensors(path, tree, dtype=jnp.bfloat16)
    if to == "compressed-tensors":
        return interop.to_compressed_tensors(path, tree, dtype=jnp.bfloat16)
    return interop.to_gguf(path, tree, "llama", kind=to, metadata={"llama.block_count": 2})


@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors", "Q4_0"])
def test_a_file_is_exported_as_the_tree_that_it_holds(tmp_path, to):
    if to == "Q4_0":
        pytest.importorskip("gguf")
    low_bit = drawn(4, (8, 64), group_size=32)
    tree = {"a": [{"weight": low_bit}, {"weight": random_weights(4, 64)}], "b": np.arange(3.0)}
    checkpoints.save(tmp_path / "tree.safetensors", tree)
    options: dict[str, Any] = (
        {"metadata": {"llama.block_count": 2}} if to == "Q4_0" else {"dtype": jnp.bfloat16}
    )
    wanted = write_by_function(tmp_path / "wanted", tree, to)
    found = interop.export_checkpoint(
        tmp_path / "tree.safetensors", tmp_path / "found", to, **options
    )
    assert found == wanted
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()


@pytest.mark.thorough
def test_names_in_files_of_other_libraries_stay_as_they_are(tmp_path):
    arrays = {name: random_weights(2, 32) for name in ("a/b.weight", "100%", "x:0")}
    safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors")
    interop.export_checkpoint(tmp_path / "net.safetensors", tmp_path / "out", "safetensors")
    checkpoints.compress_checkpoint(
        tmp_path / "net.safetensors", tmp_path / "low.safetensors", 4, rule=jaxclip.max_abs
    )
    interop.export_checkpoint(tmp_path / "low.safetensors", tmp_path / "low", "safetensors")
    for name in ("out", "low"):
        found = safetensors.numpy.load((tmp_path / name).read_bytes())
        assert sorted(found) == sorted(arrays)
    found = safetensors.numpy.load((tmp_path / "out").read_bytes())
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("given", [None, {"format": "mlx", "author": "me"}])
def test_metadata_of_the_source_are_kept(tmp_path, given):
    arrays = {"a.weight": random_weights(2, 32)}
    safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors", given)
    interop.export_checkpoint(tmp_path / "net.safetensors", tmp_path / "out", "safetensors")
    with safetensors.safe_open(tmp_path / "out", "numpy") as file:
        assert file.metadata() == (given or {"format": "pt"})


def test_a_folder_of_shards_is_exported_as_one_file(tmp_path):
    arrays = {f"layer.{i}.weight": random_weights(2, 32) for i in range(3)}
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(arrays)}
    for name in names:
        part = {key: arrays[key] for key, shard in weight_map.items() if shard == name}
        safetensors.numpy.save_file(part, tmp_path / name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    out = tmp_path / "out.safetensors"
    interop.export_checkpoint(tmp_path, out, "safetensors", dtype=jnp.float16)
    found = safetensors.numpy.load_file(out)
    assert sorted(found) == sorted(arrays)
    assert all(np.array_equal(found[n], w.astype(np.float16)) for n, w in arrays.items())


def test_each_leaf_is_read_once_and_one_at_a_time(tmp_path, monkeypatch):
    tree = {f"w{i}.weight": drawn(4, (4, 64)) for i in range(4)}
    checkpoints.save(tmp_path / "tree.safetensors", tree)
    reads = []

    @contextlib.contextmanager
    def recorded(path, max_ratio):
        with open_source(path, max_ratio) as source:

            def read(name):
                reads.append(name)
                return source.read(name)

            yield dataclasses.replace(source, read=read)

    monkeypatch.setattr("jaxclip.interop.checkpoint.open_source", recorded)
    interop.export_checkpoint(tmp_path / "tree.safetensors", tmp_path / "out", "compressed-tensors")
    assert reads == sorted(tree)


def test_a_damaged_file_a_wrong_format_and_itself_are_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    checkpoints.save(path, {"a.weight": random_weights(4, 32), "b.weight": drawn(4, (4, 32))})
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="is a file that is read"):
        interop.export_checkpoint(path, path, "safetensors", overwrite=True)
    with pytest.raises(ValueError, match="to must be one of"):
        interop.export_checkpoint(path, tmp_path / "out", "Q2_K")
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    for to in ("safetensors", "compressed-tensors", "Q8_0"):
        if to != "Q8_0" or importlib.util.find_spec("gguf"):
            with pytest.raises(checkpoints.CheckpointError, match="is damaged"):
                interop.export_checkpoint(path, tmp_path / "out", to)
    assert os.listdir(tmp_path) == ["tree.safetensors"]


@pytest.mark.parametrize("count", [1, 2])
def test_an_export_never_changes_the_content_of_a_folder_that_it_reads(tmp_path, count):
    folder, link = tmp_path / "net", tmp_path / "link"
    tree = {name: np.ones((8, 8), np.float32) for name in "ab"}
    interop.to_safetensors(folder, tree, max_shard_bytes=512 // count)
    link.symlink_to(folder)
    before = files_of(folder)
    sources = [folder, link] + [folder / "model.safetensors.index.json"] * (count > 1)
    names = [
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00003-of-00003.safetensors",
    ]
    for source, name, place in itertools.product(sources, names, [folder, link]):
        if name not in before:
            with pytest.raises(ValueError, match="would change the content of the folder"):
                interop.export_checkpoint(source, place / name, "safetensors")
            with pytest.raises(ValueError, match="would change the content of the folder"):
                interop.export_checkpoint(source, place / name, "safetensors", max_shard_bytes=1)
    assert files_of(folder) == before
    interop.export_checkpoint(folder, folder / "other.safetensors", "safetensors")
    assert_equal_arrays(checkpoints.load(folder), tree)


def test_next_to_a_file_that_is_read_every_name_is_allowed(tmp_path):
    checkpoints.save(tmp_path / "net.safetensors", low_bit_tree())
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        interop.export_checkpoint(tmp_path / "net.safetensors", tmp_path / name, "safetensors")
        assert (tmp_path / name).exists()


def test_gguf_is_one_file(tmp_path):
    pytest.importorskip("gguf")
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    with pytest.raises(ValueError, match="max_shard_bytes is for safetensors, Q4_0 is one file"):
        interop.export_checkpoint(*paths, "Q4_0", max_shard_bytes=100)
    with pytest.raises(ValueError, match="model_files is for safetensors, Q4_0 is one file"):
        interop.export_checkpoint(*paths, "Q4_0", model_files=model_folder(tmp_path / "model"))


@pytest.mark.thorough
@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors", "Q8_0"])
def test_exporting_a_file_takes_the_memory_of_its_largest_leaf(tmp_path, to):
    if to == "Q8_0":
        pytest.importorskip("gguf")
    script = textwrap.dedent(
        """
        import resource, sys, numpy as np
        from jaxclip import checkpoints, interop
        from jaxclip._core.grids import Grid
        from jaxclip.lowbit.arrays import QuantizedArray
        folder, count, to = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        codes = np.random.default_rng(0).integers(-8, 8, (1024, 2048)).astype(np.int8)
        scale = np.full((1024, 1), 0.1, np.float32)
        q = QuantizedArray(codes, scale, Grid(4, axis=0), np.dtype(np.float32))
        tree = {f"w{i}.weight": q for i in range(count)}
        checkpoints.save(folder + "/low.safetensors", tree, overwrite=True)
        interop.export_checkpoint(folder + "/low.safetensors", folder + "/out", to, overwrite=True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
    )

    def peak(count: int) -> int:
        command = [sys.executable, "-c", script, str(tmp_path), str(count), to]
        environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as a user has it
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        return int(result.stdout) * 1024

    # 64 leaves more are 512 MiB as float32, 128 MiB as int8; what grows is what malloc keeps.
    assert peak(72) - peak(8) < 8 * 1024 * 2048 * 4


@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors", "Q4_0"])
def test_names_are_changed_by_rules_in_their_order(tmp_path, to):
    if to == "Q4_0":
        pytest.importorskip("gguf")
    long = "decoder." * 9
    tree = {f"{long}proj.weight": drawn(4, (8, 32)), "head.bias": random_weights(3)}
    checkpoints.save(tmp_path / "net.safetensors", tree)
    rules = [(r"^(decoder\.)+", "d."), (r"^d\.proj", "blk.0"), ("bias$", "b")]
    out = tmp_path / "out"
    interop.export_checkpoint(tmp_path / "net.safetensors", out, to, rename=rules)
    if to == "safetensors":
        assert sorted(checkpoints.load(out.rename(tmp_path / "out.safetensors"))) == [
            "blk.0.weight", "head.b",
        ]  # fmt: skip
    else:
        assert b"blk.0.weight" in out.read_bytes()
        assert b"head.b" in out.read_bytes()
        assert b"decoder" not in out.read_bytes()


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ([("(", "x")], "rename must be pairs"),
        ([("a",)], "rename must be pairs"),
        ([("a", 3)], "rename must be pairs"),
        ([("a", r"\2")], "rename must be pairs"),
        ([("zzz", "x")], r"rename has patterns that match no name: \['zzz'\]"),
        ([(".*weight", "w")], "two leaves have the name 'w' when .* and renamed"),
    ],
    ids=str,
)
def test_wrong_rules_for_names_are_refused(tmp_path, rename, message):
    tree = {"a.weight": random_weights(2, 2), "b.weight": random_weights(2, 2)}
    with pytest.raises(ValueError, match=message):
        interop.to_safetensors(tmp_path / "out.safetensors", tree, rename=rename)
    assert list(tmp_path.iterdir()) == []


def test_a_config_too_large_to_be_one_is_not_read(tmp_path):
    checkpoints.save(tmp_path / "x.safetensors", {"w": np.zeros(2, np.float32)})
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(ValueError, match=r"config\.json is larger than 67,108,864 bytes"):
        interop.export_checkpoint(
            tmp_path / "x.safetensors", tmp_path / "y", "compressed-tensors", model_files=tmp_path
        )
