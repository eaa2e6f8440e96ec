"""Files: whole or not at all, and never wrong data."""

import io
import json
import os
import pathlib
import pickle
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
import tracemalloc
import zipfile

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

from jaxclip import checkpoints
from jaxclip._core import atomic
from jaxclip._core.grids import Grid
from jaxclip.checkpoints import CheckpointError, numpy_files
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.lowbit.quantizer import quantize
from jaxclip.lowbit.trees import compress, decompress
from jaxclip.thresholds.by_magnitude import max_abs

WIDTHS = [1, "ternary", 2, 3, 4, 5, 6, 8]
REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "net.safetensors"


def random_weights(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def small_tree() -> dict:
    return {
        "layer": {
            "kernel": quantize(random_weights(5, 3), Grid("ternary")),
            "bias": np.arange(3, dtype=np.float32),
        },
        "steps": [np.int32(7), None],
    }


def is_quantized(x) -> bool:
    return isinstance(x, QuantizedArray)


def assert_same(left, right) -> None:
    """Same structure, static fields, dtypes, shapes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def leftovers(directory: pathlib.Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".jaxclip-tmp")]


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
                    jnp.zeros(s, jnp.bfloat16), Grid(bits, axis=a, group_size=g)
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


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("levels", ["full", "narrow"])
def test_compressed_params_decompress_the_same_from_a_file(bits, levels, path):
    params = {"w": random_weights(9, 6, dtype=jnp.bfloat16), "b": random_weights(6)}
    small = compress(params, Grid(bits, levels=levels, group_size=4))
    checkpoints.save(path, small)
    assert_same(decompress(checkpoints.load(path)), decompress(small))


def test_a_loaded_low_bit_array_works_inside_jit(path):
    small = quantize(random_weights(4, 4), Grid(4))
    checkpoints.save(path, small)
    product = jax.jit(lambda q, x: dequantize(q) @ x)
    x = random_weights(4)
    assert_same(product(checkpoints.load(path), x), product(small, x))


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


def test_numpys_files_load_and_ours_load_in_numpy(tmp_path):
    arrays = {"file": np.arange(3), "allow_pickle": np.ones((2, 2), order="F")[:, ::-1], "ä": True}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    with zipfile.ZipFile(tmp_path / "numpy.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array)
    assert_same(checkpoints.load(tmp_path / "numpy.npz"), arrays)
    checkpoints.save(tmp_path / "ours.npz", arrays)
    with np.load(tmp_path / "ours.npz") as loaded:
        assert_same(dict(loaded), arrays)
    np.save(tmp_path / "x.npy", np.asfortranarray(np.arange(6).reshape(2, 3)))
    assert_same(checkpoints.load(tmp_path / "x.npy"), np.arange(6).reshape(2, 3))
    checkpoints.save(tmp_path / "y.npy", jnp.arange(3))
    assert_same(np.load(tmp_path / "y.npy"), jnp.arange(3))


def test_npz_joins_the_keys_of_nested_dicts(tmp_path):
    checkpoints.save(tmp_path / "x.npz", {"a": {"b": np.ones(1)}, "c": jnp.zeros(2)})
    assert list(checkpoints.load(tmp_path / "x.npz")) == ["a/b", "c"]


@pytest.mark.parametrize(
    "leaf",
    [
        jnp.ones(2, jnp.bfloat16),
        jnp.ones(2, jnp.float8_e5m2),
        np.array([None]),
        np.array(["a"]),
        quantize(jnp.ones(2), 4),
        [np.ones(1)],
        None,
        1.0,
    ],
    ids=lambda leaf: f"{type(leaf).__name__}-{getattr(leaf, 'dtype', '')}",
)
def test_numpys_formats_refuse_what_they_cannot_hold(leaf, tmp_path):
    for name, tree in (("x.npz", {"w": leaf}), ("x.npy", leaf)):
        with pytest.raises(TypeError, match=r"'w'|'array'"):
            checkpoints.save(tmp_path / name, tree)
    assert os.listdir(tmp_path) == []


def test_npz_refuses_names_that_collide_or_are_no_names(tmp_path):
    one = np.ones(1)
    with pytest.raises(ValueError, match="same name"):
        checkpoints.save(tmp_path / "x.npz", {"a/b": one, "a": {"b": one}})
    for key in ("a\0b", 3, "a\n"):
        with pytest.raises(TypeError, match="keys"):
            checkpoints.save(tmp_path / "x.npz", {key: one})


# --- Entropy coding ---------------------------------------------------------------------------


def drawn_params() -> dict:
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": rng.standard_normal((64, 48)).astype(np.float32)},
        "b": [rng.standard_t(3, (40, 40)).astype(np.float32), np.arange(5, dtype=np.int8)],
        "tiny": np.ones((2, 1), np.float32),
    }


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


def test_coding_makes_files_smaller_and_is_left_out_where_it_would_not(path, tmp_path):
    small = compress(drawn_params(), 8, rule=20.0)  # steps of .16: 4.7 bits of entropy
    checkpoints.save(path, small)
    coded = tmp_path / "coded.safetensors"
    checkpoints.save(coded, small, coding="huffman")
    assert coded.stat().st_size < 0.8 * path.stat().st_size
    sizes = {leaf.path: leaf.stored_bytes for leaf in checkpoints.inspect(coded).leaves}
    assert sizes["tiny"] == 2 + 4  # packed


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


# --- Damage -----------------------------------------------------------------------------------


def new_tree() -> dict:
    """What version 1 of the format could not say."""
    grid = Grid(3, scale_dtype="log8", zero_point=True)
    return {"layer": {"kernel": quantize(random_weights(5, 2), grid)}}


@pytest.fixture(scope="module", params=[small_tree, new_tree])
def saved(request, tmp_path_factory) -> tuple[pathlib.Path, bytes]:
    path = tmp_path_factory.mktemp("damage") / "net.safetensors"
    checkpoints.save(path, request.param())
    return path, path.read_bytes()


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
    monkeypatch.setattr(
        "jaxclip.checkpoints.format.headers._version_for", lambda quantized, codings: 3
    )
    checkpoints.save(path, small_tree())
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"reads version 3 is needed"):
        checkpoints.load(path)


def npy_bytes(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("descr", "shape", "data"),
    [
        ("'<f4'", "(1000000000000,)", b""),
        ("'<f4'", "(2,)", bytes(7)),
        ("'<f4'", "(2,)", bytes(9)),
        ("'<f4'", "(-2,)", bytes(8)),
        ("'<f4'", "(True,)", bytes(4)),
        ("'<f4'", "(2.0,)", bytes(8)),
        ("'|O'", "(1,)", bytes(8)),
        ("'|V2'", "(1,)", bytes(2)),
        ("'<U1'", "(1,)", bytes(4)),
        ("[('a','<f4')]", "(1,)", bytes(4)),
        ("'|b1'", "(1,)", b"\2"),
        ("__import__('os')", "(1,)", bytes(4)),
        ("'<f4'", "(" * 500 + ")" * 500, b""),
        ("'<f4'", "(0, " + "9" * 30 + ")", b""),
    ],
)
def test_npy_headers_that_lie_are_refused(descr, shape, data, tmp_path):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"
    content = npy_bytes(header, data)
    (tmp_path / "x.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", content)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(CheckpointError, match=r"x\.np"):
            checkpoints.load(tmp_path / name)


def test_every_truncated_npz_and_flipped_data_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    checkpoints.save(path, {"w": np.arange(4)})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            checkpoints.load(path)
    start = data.index(np.arange(4).tobytes())
    path.write_bytes(data[:start] + b"\1" + data[start + 1 :])
    with pytest.raises(CheckpointError, match="CRC"):
        checkpoints.load(path)


def test_no_damage_to_an_npz_raises_anything_else(tmp_path):
    path = tmp_path / "x.npz"
    buffer = io.BytesIO()
    np.savez_compressed(buffer, w=np.arange(4))
    data = buffer.getvalue()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            loaded = checkpoints.load(path)
        except CheckpointError:
            continue
        assert all(array.tobytes() == np.arange(4).tobytes() for array in loaded.values())


def test_bombs_and_strange_members_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    monkeypatch.setattr(numpy_files, "_ALWAYS_ALLOWED_BYTES", 1000)
    np.savez_compressed(path, w=np.zeros(100_000))
    with pytest.raises(CheckpointError, match="bomb"):
        checkpoints.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"readme\.txt"):
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


# --- Whole or not at all --------------------------------------------------------------------


def make_special(path: pathlib.Path, kind: str) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "symlink":
        path.with_name("target").write_bytes(b"precious")
        path.symlink_to("target")
    elif kind == "dangling symlink":
        path.symlink_to("nowhere")
    else:
        with socket.socket(socket.AF_UNIX) as sock:
            here = os.getcwd()
            os.chdir(path.parent)  # socket names are short
            try:
                sock.bind(path.name)
            finally:
                os.chdir(here)


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink", "dangling symlink", "socket"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_only_regular_files_are_replaced(kind, overwrite, path):
    make_special(path, kind)
    before = path.lstat()
    with pytest.raises(FileExistsError, match="not a regular file"):
        checkpoints.save(path, small_tree(), overwrite=overwrite)
    assert path.lstat().st_ino == before.st_ino
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket"])
def test_only_regular_files_are_opened_and_nothing_hangs(kind, path):
    make_special(path, kind)
    with pytest.raises(CheckpointError, match=r"not a regular file|the folder holds neither"):
        checkpoints.load(path)


def test_a_device_is_neither_read_nor_replaced(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("needs the right to make device nodes")
    with pytest.raises(CheckpointError, match="not a regular file"):
        checkpoints.load(path)
    with pytest.raises(FileExistsError, match="not a regular file"):
        checkpoints.save(path, {}, overwrite=True)


def test_loading_follows_a_symlink(path):
    real = path.with_name("real.safetensors")
    checkpoints.save(real, small_tree())
    path.symlink_to(real)
    assert_same(checkpoints.load(path), small_tree())


def test_an_existing_file_is_replaced_only_when_asked(path):
    checkpoints.save(path, [np.zeros(1)])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoints.save(path, [np.ones(1)])
    assert checkpoints.load(path)[0] == 0
    checkpoints.save(path, [np.ones(1)], overwrite=True)
    assert checkpoints.load(path)[0] == 1
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_appears_while_saving_is_not_replaced(path, monkeypatch):
    real_sync = os.fsync

    def sync_and_appear(handle):
        path.write_bytes(b"precious")
        real_sync(handle)

    monkeypatch.setattr(os, "fsync", sync_and_appear)
    with pytest.raises(FileExistsError):
        checkpoints.save(path, small_tree())
    assert path.read_bytes() == b"precious"
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_data_are_on_disk_before_the_name_and_the_name_before_the_return(
    overwrite, path, monkeypatch
):
    events = []

    def record(name, real):
        def call(*args):
            is_directory = name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode)
            events.append(f"{name} directory" if is_directory else name)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace"):
        record(name, getattr(os, name))
    checkpoints.save(path, small_tree(), overwrite=overwrite)
    assert events == ["fsync", "replace" if overwrite else "link", "fsync directory"]


def test_a_file_system_without_hard_links_will_do(path, monkeypatch):
    def no_links(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    checkpoints.save(path, small_tree())
    assert_same(checkpoints.load(path), small_tree())
    assert os.listdir(path.parent) == [path.name]


def test_a_missing_directory_is_named_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        checkpoints.save(tmp_path / "missing" / "x.safetensors", object())


def test_a_refused_tree_leaves_the_old_file(path):
    checkpoints.save(path, small_tree())
    scale = jnp.full(1, jnp.nan, jnp.float32)
    bad = quantize(jnp.ones(3), 4)
    bad = QuantizedArray(bad.qvalue, scale, bad.grid, bad.dtype)
    abstract = jax.ShapeDtypeStruct((1,), jnp.float32)
    for tree, kind in (({"w": bad}, ValueError), ({"w": 1.0}, TypeError), (abstract, TypeError)):
        with pytest.raises(kind):
            checkpoints.save(path, tree, overwrite=True)
    with pytest.raises(TypeError, match="no values"):
        jax.jit(lambda x: checkpoints.save(path, x, overwrite=True))(jnp.ones(2))
    assert_same(checkpoints.load(path), small_tree())
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_leaves_the_old_file_and_no_other(path):
    checkpoints.save(path, small_tree())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="large") as caught:
            checkpoints.save(path, np.zeros(1_000_000), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "unchanged" in caught.value.__notes__[0]
    assert_same(checkpoints.load(path), small_tree())
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask_and_are_kept_on_overwrite(mask, path):
    before = os.umask(mask)
    try:
        checkpoints.save(path, {})
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
        path.chmod(0o640)
        checkpoints.save(path, {}, overwrite=True)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_only_dead_temporaries_of_the_same_target_are_removed(path):
    host = atomic._host()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    removed = [
        f".{path.name}.{host}-{dead}-0123abcd.jaxclip-tmp",
        f".{path.name}.00000000-{os.getpid()}-abcdabcd.jaxclip-tmp",
    ]
    kept = [
        f".{path.name}.{host}-{os.getpid()}-0123abcd.jaxclip-tmp",  # alive
        f".{path.name}.00000000-{dead}-0123abcd.jaxclip-tmp",  # may live on another host
        f".other.safetensors.{host}-{dead}-0123abcd.jaxclip-tmp",
        f".{path.name}.{host}-{dead}-0123abcd.jaxclip-tmp.txt",
        f".{path.name}.jaxclip-tmp",
    ]
    for name in removed + kept:
        (path.parent / name).write_bytes(b"")
    old = time.time() - 2 * 24 * 3600
    os.utime(path.parent / removed[1], (old, old))
    checkpoints.save(path, {})
    assert sorted(os.listdir(path.parent)) == sorted([*kept, path.name])


KILL_LOOP = """
import os, random, signal, sys, time
import numpy as np
from jaxclip import checkpoints

path, rng = sys.argv[1], random.Random(0)
tree = lambda i: {"w": np.full(300_000, i, np.float32), "i": np.int64(i)}
checkpoints.save(path, tree(0))
num_leftovers = 0
for round in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        for i in range(1, 10_000):
            checkpoints.save(path, tree(i), overwrite=True)
        os._exit(0)
    time.sleep(rng.uniform(0.01, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = checkpoints.load(path)
    assert (loaded["w"] == loaded["i"]).all()
    num_leftovers += sum(n.endswith(".jaxclip-tmp") for n in os.listdir(os.path.dirname(path)))
checkpoints.save(path, tree(0), overwrite=True)
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print("left behind and removed:", num_leftovers)
"""


@pytest.mark.parametrize("num_kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_writer_leaves_the_old_or_the_new_file(num_kills, path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-c", KILL_LOOP, str(path), str(num_kills)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split(":")[1]) > 0  # at least one kill fell into a save


def test_memory_is_bounded_by_the_largest_tensor_not_the_tree(path):
    """Codes are packed and unpacked in pieces, one tensor after the other."""
    num_codes, num_leaves = 3_000_000, 4
    one = quantize(jnp.ones(8), 6)
    codes = np.ones(num_codes, np.int8)
    leaf = QuantizedArray(codes, np.asarray(one.scale), one.grid, one.dtype)
    tracemalloc.start()
    try:
        checkpoints.save(path, [leaf] * num_leaves)
        _, peak_of_save = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        loaded = checkpoints.load(path)
        _, peak_of_load = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_same(loaded, [leaf] * num_leaves)
    piece = 40 * 2**15 * 6  # bits of a piece, a byte each
    assert peak_of_save < 5 * piece  # all at once would be 18 MB a tensor, twice over
    assert peak_of_load < num_leaves * num_codes + num_codes + 5 * piece
