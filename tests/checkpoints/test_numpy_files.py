"""NumPy's own files: read and written as NumPy has them, and refused where they lie."""

import io
import os
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import checkpoints
from jaxclip.checkpoints import CheckpointError, numpy_files
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
