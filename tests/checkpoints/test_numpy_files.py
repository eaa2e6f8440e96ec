"""NumPy's own files: read and written as NumPy has them, and refused where they lie."""

import io
import os
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import checkpoints
from jaxclip.checkpoints import CheckpointError, reading
from jaxclip.lowbit.quantizer import quantize
from oracles.saved_trees import assert_same


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
        if descr == "'<U1'" and name == "x.npz":
            continue  # text, which is left out
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


def test_an_archive_larger_than_its_file_can_be_is_refused_unless_the_caller_allows_it(
    tmp_path, monkeypatch
):
    path = tmp_path / "x.npz"
    monkeypatch.setattr(reading, "ALWAYS_ALLOWED_BYTES", 1000)
    np.savez_compressed(path, w=np.zeros(100_000))
    with pytest.raises(CheckpointError, match="800,000 bytes, more than max_ratio=64 times"):
        checkpoints.load(path)
    assert checkpoints.load(path, max_ratio=1000)["w"].shape == (100_000,)
    assert checkpoints.inspect(path).raw_bytes == 800_000


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_whose_unpacking_has_no_limit_are_refused_before_it_begins(tmp_path, packing):
    path, header = tmp_path / "x.npz", io.BytesIO()
    np.save(header, np.zeros(2))
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("w.npy", header.getvalue() + bytes(2**24))
    data = path.read_bytes()
    size = (2**24 + len(header.getvalue())).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (144).to_bytes(4, "little")))  # the declared size
    tracemalloc.start()
    try:
        for read in (checkpoints.load, checkpoints.inspect):
            with pytest.raises(CheckpointError, match="only stored and deflated members are read"):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_header_that_claims_to_be_long_is_not_read(tmp_path, name):
    content = b"\x93NUMPY\x02\x00" + (2**28).to_bytes(4, "little")
    if name == "x.npy":
        with (tmp_path / name).open("wb") as file:
            file.write(content)
            file.truncate(2**29)  # sparse
    else:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", content + bytes(2**26))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="268,435,456 bytes"):
            checkpoints.inspect(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_text_in_an_archive_is_named_and_left_out(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, w=np.arange(3), classes=np.array(["cat", "dog"]), note=np.bytes_(b"hello"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "hello")
    names = r"left out: 'classes\.npy', 'note\.npy', 'readme\.txt'\."
    with pytest.warns(UserWarning, match=names):
        assert list(checkpoints.load(path)) == ["w"]
    with pytest.warns(UserWarning, match=names):
        assert [leaf.path for leaf in checkpoints.inspect(path).leaves] == ["w"]
