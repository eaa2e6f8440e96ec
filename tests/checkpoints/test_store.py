"""Trees come back from files bit for bit, and damage is never read as data."""

import json
import os
import pathlib
import pickle

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclip import checkpoints, compress, decompress
from jaxclip._core.grids import Grid
from jaxclip.checkpoints import CheckpointError
from jaxclip.checkpoints.format.headers import VERSIONS
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.lowbit.quantizer import quantize
from jaxclip.thresholds.by_magnitude import max_abs
from oracles.saved_trees import assert_same, new_tree, random_weights, small_tree

WIDTHS = [1, "ternary", 2, 3, 4, 5, 6, 8]


# --- Round trips --------------------------------------------------------------------------


SHAPES = [(), (1,), (7,), (0,), (0, 4), (4, 0), (5, 7), (2, 3, 4)]
GRANULARITIES = [(None, None), (-1, None), (0, None), ((0, -1), None), (-1, 3), (None, 4)]


@pytest.mark.parametrize("bits", WIDTHS)
def test_low_bit_leaves_come_back_bit_for_bit(bits, path):
    tree = {}
    for shape in SHAPES:
        for axis, group_size in GRANULARITIES:
            axes = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
            num_channel_axes = len({a % len(shape) for a in axes}) if shape else 0
            if (axes and not shape) or (group_size and num_channel_axes == len(shape)):
                continue  # no such blocks
            if len(axes) == 2 and len(shape) < 2:
                continue
            codes = np.random.default_rng(1).integers(-1, 2, size=shape, dtype=np.int8)
            like = jax.eval_shape(
                lambda s=shape, a=axis, g=group_size: quantize(
                    jnp.zeros(s, jnp.bfloat16), Grid(bits, axis=a, group_size=g), threshold=max_abs
                )
            )
            scale = np.full(like.scale.shape, -0.1, np.float32)
            qvalue = np.where(codes == 0, 1, codes) if bits == 1 else codes
            tree[f"{shape} {axis} {group_size}"] = QuantizedArray(
                qvalue, scale, like.grid, like.dtype
            )
    checkpoints.save(path, tree)
    loaded = checkpoints.load(path)
    assert_same(loaded, tree)
    for name in ("(5, 7) -1 3", "(5, 7) None None", "(0, 4) -1 None"):
        assert_same(dequantize(loaded[name]), dequantize(jax.tree.map(jnp.asarray, tree[name])))
    assert size_report(tree).total_bytes == os.path.getsize(path)


@pytest.mark.thorough
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("levels", ["full", "narrow"])
def test_compressed_params_decompress_the_same_from_a_file(bits, levels, path):
    params = {"w": random_weights(9, 6, dtype=jnp.bfloat16), "b": random_weights(6)}
    small = compress(params, Grid(bits, levels=levels, group_size=4))
    checkpoints.save(path, small)
    assert_same(decompress(checkpoints.load(path)), decompress(small))


@pytest.mark.thorough
def test_a_loaded_low_bit_array_works_inside_jit(path):
    small = quantize(random_weights(4, 4), Grid(4))
    checkpoints.save(path, small)
    product = jax.jit(lambda q, x: dequantize(q) @ x)
    x = random_weights(4)
    assert_same(product(checkpoints.load(path), x), product(small, x))


@pytest.mark.thorough
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("spec", "scale_spec", "grouped_spec"),
    [
        (P("x"), P(None), P("x")),
        (P("x", "y"), P(None, "y"), P("x", "y")),
        (P(("x", "y")), P(None), P(None)),  # three groups over four devices
        (P(), P(), P()),
    ],
)
def test_low_bit_leaves_are_loaded_split_over_devices(
    spec, scale_spec, grouped_spec, axis_type, path
):
    mesh = jax.make_mesh((2, 2), ("x", "y"), (axis_type,) * 2, devices=jax.devices()[:4])
    rows = 16 if spec != P(("x", "y")) else 12
    grouped = Grid(4, group_size=4, zero_point=True)
    tree = {
        "kernel": quantize(random_weights(rows, 4), Grid(3), threshold=max_abs),
        "grouped": quantize(random_weights(rows, 4), grouped, threshold=max_abs),
        "plain": np.arange(32.0, dtype=np.float32).reshape(8, 4),
    }
    checkpoints.save(path, tree)
    for like in (None, tree):
        loaded = checkpoints.load(path, device=NamedSharding(mesh, spec), like=like)
        assert_same(loaded, tree)
        places = [
            (spec, (loaded["kernel"].qvalue, loaded["grouped"].qvalue, loaded["plain"])),
            (scale_spec, (loaded["kernel"].scale,)),
            (grouped_spec, (loaded["grouped"].scale, loaded["grouped"].zero)),
        ]
        for wanted, arrays in places:
            for array in arrays:
                assert array.sharding.is_equivalent_to(NamedSharding(mesh, wanted), array.ndim)
    for name in ("kernel", "grouped"):
        assert_same(dequantize(loaded[name]), dequantize(tree[name]))
    on_one = checkpoints.load(path, device=jax.devices()[3])
    assert jax.tree.leaves(on_one)[0].devices() == {jax.devices()[3]}


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(None, None, "x")])
def test_a_leaf_that_cannot_be_split_is_named(spec, path):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    checkpoints.save(path, {"net": {"kernel": quantize(random_weights(5, 3), Grid(4))}})
    message = rf"'net/kernel' of shape \(5, 3\) cannot be split by .*{spec[-1]!r}.*'x': 2"
    with pytest.raises(ValueError, match=message) as caught:
        checkpoints.load(path, device=NamedSharding(mesh, spec))
    assert not isinstance(caught.value, CheckpointError)  # the file is whole


def test_structure_comes_back_exactly(path):
    one = np.ones(1)
    tree = {
        "": [one, (one, ()), [], {}],
        "a/b": None,
        "a": {"b": one, "c:codes": one},
        'é\n"\\': ({1: one, -2: [one]},),
        "__metadata__": np.zeros((0, 2), np.uint16),
    }
    checkpoints.save(path, tree)
    assert_same(checkpoints.load(path), tree)
    assert checkpoints.load(path).keys() == tree.keys()


@pytest.mark.parametrize("tree", [None, {}, [], (), np.float32(3), np.zeros((2, 0))])
def test_the_smallest_trees_are_trees(tree, path):
    checkpoints.save(path, tree)
    assert_same(checkpoints.load(path), tree)


DTYPES = [bool, "i1", "u2", "i4", "u8", "f2", "f4", "f8"]
DTYPES += [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_writable(dtype, path):
    tree = [np.array([[0, 1, 1], [1, 0, 1]]).astype(jnp.dtype(dtype))]
    if jnp.dtype(dtype).itemsize < 8:  # jax has no 64 bits by default
        tree.append(jnp.zeros((), dtype))
    checkpoints.save(path, tree)
    loaded = checkpoints.load(path)
    assert_same(loaded, tree)
    loaded[0][0] = 1


leaf_arrays = st.tuples(
    st.sampled_from([jnp.dtype(d) for d in DTYPES]), st.lists(st.integers(0, 4), max_size=3)
).map(lambda pair: np.arange(int(np.prod(pair[1]))).reshape(pair[1]).astype(pair[0]))
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.sampled_from(
    ["a", "b", "a/b", "a:codes", "%2F", "__metadata__", "jaxclip"]
)
trees = st.recursive(
    st.none() | leaf_arrays,
    lambda node: (
        st.lists(node, max_size=3)
        | st.lists(node, max_size=3).map(tuple)
        | st.dictionaries(keys, node, max_size=3)
        | st.dictionaries(st.integers(-3, 12), node, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(tree=trees)
def test_any_tree_comes_back_and_has_the_reported_size(tree, path):
    checkpoints.save(path, tree, overwrite=True)
    assert_same(checkpoints.load(path), tree)
    assert size_report(tree).total_bytes == os.path.getsize(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".npy"])
def test_the_same_tree_gives_the_same_bytes(suffix, tmp_path):
    tree = {"b": np.ones(3), "a": np.zeros((2, 2), np.int8)}
    again = {"a": np.asfortranarray(tree["a"])[::1], "b": tree["b"].copy()}
    for name, each in (("x", tree), ("y", again)):
        checkpoints.save(tmp_path / f"{name}{suffix}", each["b"] if suffix == ".npy" else each)
    assert (tmp_path / f"x{suffix}").read_bytes() == (tmp_path / f"y{suffix}").read_bytes()


# --- Other libraries ----------------------------------------------------------------------


@pytest.mark.thorough
def test_the_safetensors_library_reads_our_file(path):
    tree = small_tree()
    checkpoints.save(path, tree)
    with safetensors.safe_open(path, framework="np") as file:
        assert list(file.metadata()) == ["jaxclip"]
        # All that this tree needs: older readers understand it.
        assert json.loads(file.metadata()["jaxclip"])["version"] == 1
        np.testing.assert_array_equal(file.get_tensor("layer/bias"), tree["layer"]["bias"])
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {
        "layer/bias", "layer/kernel:codes", "layer/kernel:scale", "steps/0"
    }  # fmt: skip
    np.testing.assert_array_equal(
        tensors["layer/kernel:scale"], np.asarray(tree["layer"]["kernel"].scale)
    )


def test_the_safetensors_library_reads_odd_names_and_bfloat16(path):
    tree = {"": np.zeros(0), "ü/%": jnp.ones(3, jnp.bfloat16), "__metadata__": np.ones((), bool)}
    checkpoints.save(path, tree)
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {"", "ü%2F%25", "%5F_metadata__"}
    assert tensors["ü%2F%25"].dtype == jnp.bfloat16


def test_files_of_the_safetensors_library_load_flat(path):
    tensors = {
        "a.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.array(True),
        "c": np.asarray(jnp.ones(3, jnp.bfloat16)),
        "empty": np.zeros((0, 2), np.int64),
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "np"})
    assert_same(checkpoints.load(path), tensors)


def test_an_array_that_is_two_leaves_is_stored_twice_and_loaded_as_two(path):
    w = random_weights(40, 30)
    checkpoints.save(path, {"embed": w, "head": w})
    assert path.stat().st_size > 2 * w.nbytes
    loaded = checkpoints.load(path)
    assert_same(loaded, {"embed": w, "head": w})
    loaded["head"][0] = 0
    np.testing.assert_array_equal(loaded["embed"], w)


def test_tensors_that_torch_shared_are_found_by_the_names_in_the_metadata(path):
    w, other = np.asarray(random_weights(6, 4)), np.asarray(random_weights(3, 4))
    # As `safetensors.torch.save_model` writes them: the name that is gone, and the one kept.
    shared = {"format": "pt", "lm_head.weight": "embed.weight"}
    safetensors.numpy.save_file({"embed.weight": w, "up.weight": other}, path, metadata=shared)
    assert checkpoints.load(path).keys() == {"embed.weight", "up.weight"}
    like = {name: {"weight": w} for name in ("embed", "lm_head")} | {"up": {"weight": other}}
    assert_same(checkpoints.load(path, like=like), like)
    with pytest.raises(CheckpointError, match=r"'embed.weight'.*\(6, 4\)"):
        checkpoints.load(path, like=like | {"lm_head": {"weight": other}})
    safetensors.numpy.save_file({"embed.weight": w}, path, metadata={"lm_head.weight": "gone"})
    with pytest.raises(CheckpointError, match="'lm_head/weight' is in like, but not in the file"):
        checkpoints.load(path, like={"embed": {"weight": w}, "lm_head": {"weight": w}})


def test_tensors_that_overlap_in_a_file_are_refused(path):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"embed": entry, "lm_head": entry}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(
        CheckpointError, match="tensor 'lm_head': the data has a hole or an overlap"
    ):
        checkpoints.load(path)


# --- Damage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[small_tree, new_tree])
def saved(request, tmp_path_factory) -> tuple[pathlib.Path, bytes]:
    path = tmp_path_factory.mktemp("damage") / "net.safetensors"
    checkpoints.save(path, request.param())
    return path, path.read_bytes()


@pytest.mark.thorough
def test_every_flipped_bit_is_refused(saved):
    path, data = saved
    assert len(data) < 1500
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:  # in place, which is faster
        for position, byte in enumerate(data):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                with pytest.raises(CheckpointError, match=r"net\.safetensors"):
                    checkpoints.load(path)
            os.pwrite(file.fileno(), bytes([byte]), position)
    checkpoints.load(path)


def test_every_truncation_and_every_addition_is_refused(saved):
    path, data = saved
    for damaged in [data[:n] for n in range(len(data))] + [data + b"\0", data + b" ", data + data]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            checkpoints.load(path)


def test_a_damaged_tensor_is_named(saved):
    path, data = saved
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"net\.safetensors: tensor 'layer/kernel:(codes|zero)'"
    ):
        checkpoints.load(path)


def test_tensors_of_two_files_cannot_be_exchanged(path, tmp_path):
    checkpoints.save(path, [np.zeros(4, np.int8)])
    other = tmp_path / "other.safetensors"
    checkpoints.save(other, [np.ones(4, np.int8)])
    path.write_bytes(path.read_bytes()[:-4] + other.read_bytes()[-4:])
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\0" * 100,
        b"\xff" * 100,
        b"PK\x03\x04" + bytes(100),
        b"\x93NUMPY" + bytes(100),
        pickle.dumps({"w": [1.0] * 100}),
        (2**63).to_bytes(8, "little") + b"{}",
        (10**12).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
        b'{"version": 1}',
    ],
    ids=lambda content: repr(content[:8]),
)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".npy"])
def test_foreign_files_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="net"):
        checkpoints.load(path)


class Bomb:
    def __reduce__(self):
        return os._exit, (99,)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".npy"])
def test_pickles_are_never_run(suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    bomb = np.array([Bomb()])
    with path.open("wb") as file:
        if suffix == ".npz":
            np.savez(file, w=bomb)
        elif suffix == ".npy":
            np.save(file, bomb, allow_pickle=True)
        else:
            pickle.dump(bomb, file)
    with pytest.raises(CheckpointError):
        checkpoints.load(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        checkpoints.load(path)


def test_a_newer_version_is_refused_by_its_number(path, monkeypatch):
    newer = VERSIONS[-1] + 1
    place = "jaxclip.checkpoints.format.headers._version_for"
    monkeypatch.setattr(place, lambda quantized, codings: newer)
    checkpoints.save(path, small_tree())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"use a jaxclip that reads version {newer}"):
        checkpoints.load(path)


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "net.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.safetensors, \.npz or \.npy"):
        checkpoints.save(tmp_path / "new.bin", {})
    with pytest.raises(CheckpointError, match=r"\.safetensors, \.npz or \.npy"):
        checkpoints.load(tmp_path / "net.bin")


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    for name in ("none.safetensors", "none/none.npz"):
        with pytest.raises(FileNotFoundError, match="none"):
            checkpoints.load(tmp_path / name)
