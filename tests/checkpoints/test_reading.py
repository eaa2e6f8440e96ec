"""Files read leaf by leaf: into the tree and onto the devices that are asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip import checkpoints
from jaxclip.checkpoints import CheckpointError
from oracles.shard_folders import drawn


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
        (
            lambda t: t | {"w": np.zeros((2, 3), np.float16)},
            "'w' has dtype float32, but like has float16",
        ),
        (lambda t: t | {"x": np.zeros(1)}, "'x' is in like, but not in the file"),
        (lambda t: {"w": t["w"]}, "'b/0' is in the file, but not in like"),
        (lambda t: t | {"w": object()}, "'w' is an array in the file, but like has a <class 'obj"),
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


@pytest.mark.thorough
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


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_files_of_torch_are_refused_with_the_way_to_convert_them(tmp_path, suffix):
    path = (tmp_path / "model").with_suffix(suffix)
    path.write_bytes(b"PK")
    for read in (checkpoints.load, checkpoints.inspect):
        with pytest.raises(CheckpointError, match=r"pickles.*safetensors\.torch\.save_file"):
            read(path)
