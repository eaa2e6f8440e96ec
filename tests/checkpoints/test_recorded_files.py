"""Files of every version of the format, recorded when it was new, are read as they were saved."""

import dataclasses
import json
import shutil
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxclip import checkpoints
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.trees import decompress
from oracles import recorded_trees

TREES = {
    1: recorded_trees.version_1,
    2: recorded_trees.version_2,
    3: recorded_trees.version_3,
    4: recorded_trees.version_4,
    5: recorded_trees.version_5,
    6: recorded_trees.version_6,
}
every_version = pytest.mark.parametrize("version", TREES)


def recorded(version):
    return recorded_trees.RECORDED / f"version_{version}.safetensors"


@pytest.mark.thorough
@every_version
def test_a_recorded_file_is_read_bit_for_bit(version):
    loaded, expected = checkpoints.load(recorded(version)), TREES[version]()
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert all(
        np.isfinite(x.astype(np.float64)).all()
        for x in map(np.asarray, jax.tree.leaves(decompress(loaded)))
    )


@pytest.mark.parametrize("version", [1, 2, 3])
def test_what_is_written_today_is_what_was_recorded(version, tmp_path):
    # What version 1 can say is still written as version 1. Lanes are as the machine rounds.
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, TREES[version]())
    assert path.read_bytes() == recorded(version).read_bytes()
    assert size_report(TREES[version]()).total_bytes == path.stat().st_size


def test_the_tensors_of_version_2_are_those_of_the_documented_layout():
    """The bytes, read by another library and decoded by hand."""
    tensors = safetensors.numpy.load_file(recorded(2))
    tree = recorded_trees.version_2()
    assert tensors["zeros/log8:zero"].dtype == np.int8
    assert tensors["scales/float16:scale"].dtype == np.float16
    unit, code = tensors["scales/log8:unit"], tensors["scales/log8:scale"].astype(int)
    assert (unit.dtype, unit.shape) == (np.float32, ())
    by_hand = np.where(code >= 128, -1, 1) * float(unit) * 2.0 ** (-(code % 128) / 8)
    np.testing.assert_array_equal(by_hand, tree["scales"]["log8"].scale)
    packed = sum(int(byte) << 8 * i for i, byte in enumerate(tensors["zeros/log8:codes"]))
    codes = [(packed >> 3 * i) % 8 - 4 for i in range(45)]
    assert codes == tree["zeros"]["log8"].qvalue.ravel().tolist()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_recorded_file_does_not_change_when_it_is_loaded_and_saved(version, tmp_path):
    path = tmp_path / "net.safetensors"
    shutil.copy(recorded(version), path)
    checkpoints.save(path, checkpoints.load(path), overwrite=True)
    assert path.read_bytes() == recorded(version).read_bytes()


@every_version
def test_a_recorded_file_is_read_as_what_quantize_makes_today(version):
    """Axes counted from the front, as files may have them, are those counted from the end."""

    def spelled_from_the_end(leaf):
        if not isinstance(leaf, QuantizedArray):
            return leaf
        return dataclasses.replace(leaf, grid=leaf.grid.from_the_end(leaf.ndim))

    tree = TREES[version]()
    is_low_bit = lambda x: isinstance(x, QuantizedArray)  # noqa: E731
    like = jax.tree.map(spelled_from_the_end, tree, is_leaf=is_low_bit)
    assert jax.tree.structure(like) != jax.tree.structure(tree)
    loaded = checkpoints.load(recorded(version), like=like)
    assert jax.tree.structure(loaded) == jax.tree.structure(like)
    for a, b in zip(*map(jax.tree.leaves, map(decompress, (loaded, tree))), strict=True):
        assert np.array_equal(a, b)


def weights_by_hand(leaf, along, size):
    """scale * code, with groups of `size` entries along the axes `along` together."""
    order = (*(a for a in range(leaf.ndim) if a not in along), *along)
    length = int(np.prod([leaf.shape[a] for a in along]))
    codes = np.transpose(leaf.qvalue, order).reshape(-1, length).astype(np.float32)
    scale = np.transpose(leaf.scale, order).reshape(len(codes), -1)
    spread = np.repeat(scale, size, 1)[:, :length]
    shape = [leaf.shape[a] for a in order]
    return np.transpose((spread * codes).reshape(shape), np.argsort(order))


def test_groups_of_version_3_run_along_all_inputs_together():
    loaded = checkpoints.load(recorded(3))
    groups = {"flax": ((0, 1, 2), 8), "torch": ((1, 2, 3), 16), "middle": ((0, 2), 4)}
    groups |= {"rows": ((1, 2), 4), "matrix": ((1,), 4)}
    for name, leaf in loaded.items():
        assert np.array_equal(decompress(leaf), weights_by_hand(leaf, *groups[name])), name


@pytest.mark.thorough
def test_groups_of_version_1_run_along_one_axis_of_a_convolution():
    """Recorded by the code that wrote them: axis -1, 0 and None, in groups of 3."""
    path = recorded_trees.RECORDED / "version_1_convolutions.safetensors"
    loaded = checkpoints.load(path)
    along = {"flax": 2, "torch": 3, "tensor": 2}
    assert loaded.keys() == along.keys()
    for name, leaf in loaded.items():
        codes = recorded_trees.codes_of(leaf.shape, -8, 7)
        assert np.array_equal(leaf.qvalue, codes)
        assert np.array_equal(leaf.scale.ravel(), np.arange(1, 1 + leaf.scale.size))
        assert np.array_equal(decompress(leaf), weights_by_hand(leaf, (along[name],), 3)), name


def test_a_file_of_version_1_that_is_loaded_and_saved_means_the_same(tmp_path):
    path = recorded_trees.RECORDED / "version_1_convolutions.safetensors"
    before = checkpoints.load(path)
    checkpoints.save(tmp_path / "net.safetensors", before)
    after = checkpoints.load(tmp_path / "net.safetensors")
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert all(map(np.array_equal, *map(jax.tree.leaves, map(decompress, (after, before)))))


def test_every_kind_of_low_bit_leaf_is_recorded():
    leaves = [
        leaf
        for make in TREES.values()
        for leaf in jax.tree.leaves(make(), is_leaf=lambda x: isinstance(x, QuantizedArray))
        if isinstance(leaf, QuantizedArray)
    ]
    for leaf in leaves:
        leaf.validate()
    assert {leaf.bits for leaf in leaves} == {1, "ternary", 2, 3, 4, 5, 6, 8}
    assert {leaf.grid.scale_dtype for leaf in leaves if leaf.zero is not None} == {
        "float32", "float16", "bfloat16", "log8",
    }  # fmt: skip


def test_the_codes_of_version_4_are_in_lanes_with_classes_and_escapes(tmp_path):
    file = safetensors.safe_open(recorded(4), "np")
    leaves = json.loads(file.metadata()["jaxclip"])["leaves"]
    assert leaves.pop("packed")["coding"] is None
    assert {info["coding"] for info in leaves.values()} == {"lanes"}
    prefixes = {
        name: struct.unpack("<BBHIII", file.get_tensor(f"{name}:codes")[:16].tobytes())
        for name in leaves
    }
    for name, num_states in (("8 states", 8), ("4 states", 4), ("1 state", 1)):
        states, num_classes, num_lanes, chain, _, num_escaped = prefixes[name]
        assert (states, chain, num_escaped) == (num_states, 300, 0)
        assert min(num_classes, num_lanes) > 1
    assert prefixes["escaped"][0] == prefixes["escaped"][-1] == 1
    # Lengths of codes may round to the next eighth of a bit on another machine.
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, recorded_trees.version_4(), coding="lanes")
    assert abs(path.stat().st_size - recorded(4).stat().st_size) < 100
