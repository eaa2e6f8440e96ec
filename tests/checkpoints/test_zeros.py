"""Float leaves whose zeros are left out: bit for bit, never larger, of the planned size."""

import json
import pathlib
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxclip import checkpoints, compress
from jaxclip.checkpoints import CheckpointError, reading
from jaxclip.checkpoints.format import codes, layout, parsing, zeros
from jaxclip.checkpoints.sizes import size_report
from oracles.made_up_files import header_of
from oracles.saved_trees import assert_same

CODINGS = ("huffman", "lanes", "smallest")
DTYPES = (
    np.float16, np.float32, np.float64,
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
)  # fmt: skip


def sparse_array(seed: int, shape, density, dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) + np.copysign(1, rng.normal(size=shape))
    return np.where(rng.random(shape) < density, values, 0).astype(dtype)


def groups_of_four(num_kept: int, shape=(256, 128)) -> np.ndarray:
    """`num_kept` of every four entries along the first axis."""
    rng = np.random.default_rng(num_kept)
    order = rng.random((shape[0] // 4, 4, shape[1])).argsort(1)
    kept = (order < num_kept).reshape(shape)
    return np.where(kept, rng.normal(size=shape), 0).astype(np.float32)


def parts_in(path: pathlib.Path) -> tuple[int, dict, Callable[[str], np.ndarray]]:
    """Version and descriptions of leaves, and tensors by name, read by another library."""
    file = safetensors.safe_open(path, "np")
    inner = json.loads(file.metadata()["jaxclip"])
    return inner["version"], inner["leaves"], file.get_tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("coding", CODINGS)
def test_leaves_come_back_bit_for_bit_from_files_of_the_planned_size(coding, dtype, path):
    tree = {
        str(i): sparse_array(i, shape, density, dtype)
        for i, (shape, density) in enumerate(
            [((40, 30), 0.3), ((3, 3, 8, 20), 0.05), ((999,), 0.5), ((1, 800), 0.0), ((7,), 0.1)]
        )
    }
    tree["dense"] = sparse_array(9, (30, 20), 1.0, dtype)
    checkpoints.save(path, tree, coding=coding)
    assert_same(checkpoints.load(path), tree)
    report = checkpoints.inspect(path)
    assert report.total_bytes == path.stat().st_size
    assert size_report(tree, coding).total_bytes == path.stat().st_size
    version, leaves, _ = parts_in(path)
    assert version == 6
    assert {"0", "1", "3"} <= leaves.keys() <= {"0", "1", "2", "3"}
    for leaf in report.leaves:
        density = np.mean(np.asarray(tree[leaf.path], np.float32) != 0)
        assert leaf.density == (density if leaf.path in leaves else None)


def test_zeros_with_a_sign_and_numbers_that_are_none_keep_their_bits(path):
    w = np.zeros((64, 64), np.float32)
    w[3, 5], w[7, 7], w[63, 63] = -0.0, np.inf, 1e-45
    w.view(np.uint32)[1, 2:5] = (0x7FC00001, 0xFFC12345, 0x80000001)
    checkpoints.save(path, {"w": w}, coding="huffman")
    assert parts_in(path)[2]("w:values").size == 6
    assert_same(checkpoints.load(path), {"w": w})


def test_without_a_coding_nothing_is_left_out(path):
    w = sparse_array(0, (64, 64), 0.1)
    checkpoints.save(path, {"w": w})
    version, leaves, tensors = parts_in(path)
    assert (version, leaves) == (1, {})
    np.testing.assert_array_equal(tensors("w"), w)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.thorough
def test_a_file_is_never_larger_than_with_its_zeros(coding, path, monkeypatch):
    """Leaves of every size and density around the point where leaving out zeros pays."""
    rng = np.random.default_rng(3)
    for i in range(25):
        shape = tuple(rng.integers(1, 40, rng.integers(1, 4)))
        dtype = DTYPES[rng.integers(len(DTYPES))]
        tree = {"é" * rng.integers(1, 60): {"w": sparse_array(i, shape, rng.random(), dtype)}}
        small = size_report(tree, coding).total_bytes
        with monkeypatch.context() as patch:
            patch.setattr(zeros, "_may_have_mask", lambda leaf: False)
            large = size_report(tree, coding).total_bytes
        assert small <= large
        checkpoints.save(path, tree, coding=coding, overwrite=True)
        assert path.stat().st_size == small
        assert_same(checkpoints.load(path), tree)


def test_other_dtypes_stay_as_they_are(path):
    tree = {
        "int": np.zeros((64, 64), np.int32),
        "bool": np.zeros((64, 64), bool),
        "scalar": np.float32(0),
        "empty": np.zeros((0, 5), np.float32),
    }
    checkpoints.save(path, tree, coding="huffman")
    assert parts_in(path)[:2] == (1, {})
    assert_same(checkpoints.load(path), tree)


def test_a_mask_is_packed_as_documented_where_no_coding_is_smaller(path):
    w = sparse_array(1, (50, 40), 0.5)
    checkpoints.save(path, {"w": w}, coding="huffman")
    _, leaves, tensors = parts_in(path)
    assert leaves["w"] == {"shape": [50, 40], "dtype": "F32", "coding": None}
    bits = [int(byte) >> i & 1 for byte in tensors("w:mask") for i in range(8)]
    assert bits == (w.ravel() != 0).astype(int).tolist()
    np.testing.assert_array_equal(tensors("w:values"), w[w != 0])


def test_a_coded_mask_is_the_axis_and_the_bits_along_it_deflated(path):
    w = groups_of_four(2)
    checkpoints.save(path, {"w": w}, coding="huffman")
    _, leaves, tensors = parts_in(path)
    stored = tensors("w:mask")
    assert (leaves["w"]["coding"], stored[0]) == ("huffman", 0)
    lowest, num_digits = stored[1:3].view(np.int8).tolist()
    stream = np.frombuffer(zlib.decompress(stored[17:].tobytes(), -15), np.uint8)
    assert num_digits == 1
    bits = np.unpackbits(stream + np.array(lowest).astype(np.uint8), bitorder="little")
    np.testing.assert_array_equal(bits.reshape(128, 256).T, w != 0)


@pytest.mark.parametrize("num_kept", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_masks_of_groups_take_the_entropy_of_a_group_along_any_axis(num_kept, axis, path):
    w = np.moveaxis(groups_of_four(num_kept).reshape(256, 8, 16), 0, axis)
    checkpoints.save(path, {"w": w}, coding="lanes")
    mask = parts_in(path)[2]("w:mask")
    entropy = np.log2([4, 6, 4][num_kept - 1]) / 4
    assert entropy < 8 * mask.size / w.size < 1.06 * entropy
    assert mask[0] == axis


@pytest.mark.parametrize("num_columns", [500, 501])
@pytest.mark.parametrize("densities", [(1 / 64, 1 / 64), (0.005, 0.1)])
def test_masks_of_few_values_and_of_rows_that_differ_are_coded_in_lanes(
    densities, num_columns, path
):
    p = np.random.default_rng(0).choice(densities, 400)
    w = sparse_array(2, (400, num_columns), p[:, None])
    checkpoints.save(path, {"w": w}, coding="lanes")
    _, leaves, tensors = parts_in(path)
    assert leaves["w"]["coding"] == "lanes"
    entropy = np.mean(-p * np.log2(p) - (1 - p) * np.log2(1 - p))
    assert 8 * tensors("w:mask").size / w.size < 1.06 * entropy
    assert_same(checkpoints.load(path), {"w": w})


@pytest.mark.thorough
def test_every_flipped_bit_is_refused(path):
    few = np.zeros((40, 30), np.float32)
    few[::9, 3::7] = 1
    leaves = {None: sparse_array(0, (20, 9), 0.5), "huffman": groups_of_four(1, (80, 9))}
    for coding, w in (leaves | {"lanes": few}).items():
        checkpoints.save(path, {"w": w}, coding=coding or "huffman", overwrite=True)
        data = path.read_bytes()
        assert parts_in(path)[1]["w"]["coding"] == coding
        for position in range(0, len(data), 2):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"net\.safetensors"):
                checkpoints.load(path)
        path.write_bytes(data)


# --- What no writer makes -------------------------------------------------------------


def made_up(info: dict, mask: np.ndarray, values: np.ndarray, version: int = 6) -> bytes:
    """A file of one leaf, with checksums that are right, whatever it says."""
    parts = {"w:values": values, "w:mask": mask}
    outer, crc, stop = {}, {}, 0
    for name, array in parts.items():
        offsets = [stop, stop + array.nbytes]
        outer[name] = {
            "dtype": layout.DTYPE_CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        crc[name] = f"{zlib.crc32(array.tobytes()):08x}"
        stop = offsets[1]
    inner = {"version": version, "tree": {"w": 0}, "leaves": {"w": info}, "crc": crc}
    return header_of(outer, inner) + b"".join(a.tobytes() for a in parts.values())


PACKED = {"shape": [3, 5], "dtype": "F32", "coding": None}
BITS = np.array([0b10010001, 0b01000000], np.uint8)
VALUES = np.array([1, 2, 3, 4], np.float32)


def test_a_hand_made_file_is_read(path):
    path.write_bytes(made_up(PACKED, BITS, VALUES))
    expected = [[1, 0, 0, 0, 2], [0, 0, 3, 0, 0], [0, 0, 0, 0, 4]]
    np.testing.assert_array_equal(checkpoints.load(path)["w"], np.float32(expected))
    assert checkpoints.inspect(path).leaves[0].density == 4 / 15


HOSTILE = {
    "fewer values": (PACKED, BITS, VALUES[:3], 6, "number of its values"),
    "more values": (PACKED, BITS, np.ones(5, np.float32), 6, "number of its values"),
    "more values than entries": (PACKED, BITS, np.ones(16, np.float32), 6, "do not fit its shape"),
    "a bit beyond": (PACKED, BITS | np.uint8(128), VALUES, 6, "number|not packed"),
    "long mask": (PACKED, np.zeros(3, np.uint8), VALUES, 6, "do not fit its shape"),
    "short mask": (PACKED, BITS[:1], VALUES, 6, "does not fit the tree"),
    "mask of floats": (PACKED, np.zeros(2, np.float32), VALUES, 6, "does not fit the tree"),
    "mask of two axes": (PACKED, BITS[None], VALUES, 6, "do not fit its shape"),
    "values of another dtype": (PACKED, BITS, VALUES.astype(np.float64), 6, "does not fit the"),
    "giant shape": (PACKED | {"shape": [2**40, 2**20]}, BITS, VALUES, 6, "does not fit|bytes"),
    "integers": (PACKED | {"dtype": "I32"}, BITS, VALUES, 6, "dtype is not valid"),
    "no dtype": (PACKED | {"dtype": ["F32"]}, BITS, VALUES, 6, "dtype is not valid"),
    "negative shape": (PACKED | {"shape": [-3, -5]}, BITS, VALUES, 6, "description"),
    "further key": (PACKED | {"axis": 1}, BITS, VALUES, 6, "description"),
    "unknown coding": (PACKED | {"coding": "zip"}, BITS, VALUES, 6, "not known"),
    "older version": (PACKED, BITS, VALUES, 5, "description"),
    "coded, no smaller": (PACKED | {"coding": "huffman"}, BITS, VALUES, 6, "do not fit its shape"),
    "coded, empty": (PACKED | {"coding": "huffman"}, BITS[:0], VALUES, 6, "no such axis"),
    "coded, axis 2": (PACKED | {"coding": "lanes"}, np.uint8([2]), VALUES, 6, "no such axis"),
    "coded, cut short": (PACKED | {"coding": "lanes"}, np.uint8([1]), VALUES, 6, "cut short"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_writer_makes_is_refused(case, path):
    *parts, message = HOSTILE[case]
    path.write_bytes(made_up(*parts))
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("place", "code", "message"),
    [
        (7, 3, "none"),
        (7, -2, "none"),
        (249, -1, "none"),
        (0, 2, "number of its values"),
        (7, 1, ""),
    ],
)
def test_lanes_with_codes_that_are_no_pairs_are_refused(place, code, message, path):
    """Codes that are right as codes, and wrong as those of a mask: the last pair has one entry."""
    pairs = np.zeros((200, 250), np.int8)
    pairs[:, 7], pairs[3, place] = 1, code
    data = zeros.encode_codes(pairs.reshape(-1), "lanes", chain=250)
    info = {"shape": [200, 499], "dtype": "F32", "coding": "lanes"}
    stored = np.frombuffer(bytes([1]) + data, np.uint8)
    path.write_bytes(made_up(info, stored, np.ones(200 + (place == 249), np.float32)))
    if not message:
        assert checkpoints.load(path)["w"][3, 14] == 1
        return
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(path)


@pytest.mark.parametrize("coding", [None, "huffman", "lanes"])
def test_damaged_masks_with_right_checksums_are_read_or_refused(coding, path):
    rng = np.random.default_rng(5)
    few = np.zeros((40, 30), np.float32)
    few[::9, 3::7] = 1
    w = {None: sparse_array(0, (20, 9), 0.5), "huffman": groups_of_four(1, (80, 9))}.get(
        coding, few
    )
    checkpoints.save(path, {"w": w}, coding=coding or "huffman")
    _, leaves, tensors = parts_in(path)
    assert leaves["w"]["coding"] == coding
    stored, num_read = tensors("w:mask"), 0
    for _ in range(150):
        mask = stored.copy()
        mask[rng.integers(mask.size)] ^= 1 << rng.integers(8)
        path.write_bytes(made_up(leaves["w"], mask, tensors("w:values")))
        try:
            loaded = checkpoints.load(path)["w"]
        except CheckpointError:
            continue
        num_read += 1
        assert (loaded.shape, loaded.dtype) == (w.shape, w.dtype)
        assert np.count_nonzero(loaded) == np.count_nonzero(w)
    assert num_read < (1 if coding is None else 150)  # packed bits do not fit the values


def test_an_unread_header_names_the_version_that_it_needs(path, monkeypatch):
    checkpoints.save(path, {"w": sparse_array(0, (64, 64), 0.1)}, coding="huffman")
    monkeypatch.setattr(parsing, "VERSIONS", (1, 2, 3, 4, 5))
    with pytest.raises(CheckpointError, match="use a jaxclip that reads version 6"):
        checkpoints.load(path)


# --- Limits ---------------------------------------------------------------------------


@pytest.mark.thorough
def test_what_is_written_is_read_without_lifting_a_limit(path, monkeypatch):
    for module in (reading, codes):
        monkeypatch.setattr(module, "ALWAYS_ALLOWED_BYTES", 2**17)
    tree = {f"{i:02}": np.zeros((256, 100), np.float32) for i in range(6)}
    tree |= {"low": compress(groups_of_four(1), "ternary", rule=1.0)}
    checkpoints.save(path, tree, coding="lanes")
    assert_same(checkpoints.load(path), jax.tree.map(np.asarray, tree))
    report = size_report(tree, "lanes")
    assert report.total_bytes == path.stat().st_size
    assert [leaf.stored_bytes < 1000 for leaf in report.leaves[:6]] == [True, *[False] * 5]


def test_a_few_bytes_do_not_stand_for_gigabytes(path):
    checkpoints.save(path, {"w": np.zeros((2**12, 2**10), np.float32)}, coding="huffman")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer.pop("__metadata__")["jaxclip"])
    inner.pop("header_crc")
    inner["leaves"]["w"]["shape"] = [2**20, 2**10]
    path.write_bytes(header_of(outer, inner) + data[8 + length :])
    with pytest.raises(CheckpointError, match="more than max_ratio"):
        checkpoints.load(path)
    with pytest.raises(CheckpointError, match="too short for their codes"):
        checkpoints.load(path, max_ratio=1e9)


def test_another_thread_may_change_weights_while_they_are_saved(path, monkeypatch):
    tree, real = {"w": sparse_array(0, (64, 64), 0.2)}, zlib.crc32

    def crc32(*args):
        tree["w"][...] = np.roll(tree["w"], 1)
        return real(*args)

    monkeypatch.setattr(zlib, "crc32", crc32)
    checkpoints.save(path, tree, coding="huffman")
    monkeypatch.undo()
    assert checkpoints.load(path)["w"].shape == (64, 64)


# --- Files written anew ---------------------------------------------------------------


@pytest.mark.thorough
def test_a_checkpoint_that_is_compressed_leaves_out_the_zeros_of_what_it_keeps(path, tmp_path):
    tree = {"layer": {"kernel": sparse_array(0, (64, 48), 0.2)}, "kept": groups_of_four(2)}
    checkpoints.save(tmp_path / "plain.safetensors", tree)
    for source in ("plain", "sparse"):
        options = {"policy": [("kept", None)], "coding": "lanes", "progress": False}
        options |= {"overwrite": True}
        checkpoints.save(tmp_path / "sparse.safetensors", tree, coding="lanes", overwrite=True)
        report = checkpoints.compress_checkpoint(
            tmp_path / f"{source}.safetensors", path, 4, **options
        )
        found = {leaf.path: leaf for leaf in report.leaves}
        assert report.total_bytes == path.stat().st_size
        assert found["kept"].density == 0.5
        assert found["kept"].coded_bits < 17
        assert found["layer/kernel"].density == np.mean(
            checkpoints.load(path)["layer"]["kernel"].qvalue != 0
        )
        np.testing.assert_array_equal(checkpoints.load(path)["kept"], tree["kept"])
    checkpoints.decompress_checkpoint(path, tmp_path / "back.safetensors", progress=False)
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(tmp_path / "back.safetensors")["kept"], tree["kept"]
    )


@pytest.mark.thorough
def test_a_target_in_bytes_counts_the_zeros_that_are_left_out(path, tmp_path):
    rng = np.random.default_rng(0)
    tree = {"a": {"kernel": rng.normal(size=(128, 64)).astype(np.float32)}, "b": groups_of_four(1)}
    target = 42_000
    small = compress(tree, target_bytes=target, policy=[("b", None)])
    checkpoints.save(path, small, coding="lanes")
    assert 0.97 * target < path.stat().st_size <= target
    checkpoints.save(tmp_path / "net.npz", tree)
    report = checkpoints.compress_checkpoint(
        tmp_path / "net.npz", path, target_bytes=target, policy=[("b", None)], coding="lanes",
        layout="in_out", overwrite=True, progress=False,
    )  # fmt: skip
    assert 0.97 * target < report.total_bytes == path.stat().st_size <= target


def test_a_sharded_or_jax_leaf_is_stored_alike(path, tmp_path):
    w = groups_of_four(2)
    checkpoints.save(path, {"w": w}, coding="huffman")
    checkpoints.save(tmp_path / "x.safetensors", {"w": jnp.asarray(w)}, coding="huffman")
    assert path.read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    big = w.astype(w.dtype.newbyteorder(">"))
    checkpoints.save(path, {"w": big}, coding="huffman", overwrite=True)
    assert path.read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_shapes_for_arrays_give_sizes_with_the_zeros():
    shapes = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    report = size_report(shapes, "huffman")
    assert (report.leaves[0].stored_bytes, report.leaves[0].density) == (4 * 64**2, None)
