"""Dtypes that safetensors has and jaxclip does not make: listed, loaded, and copied as bytes."""

import json
import pathlib

import numpy as np
import pytest
import safetensors

from jaxclip import checkpoints, interop
from oracles.made_up_files import header_of

COPIED = {"C64": 64, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
COPIED |= {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


def write_copied_dtypes(path: pathlib.Path, name_of_weights: str) -> dict[str, bytes]:
    """A file of another library with each of them and float32 weights; returns bytes by name."""
    rng = np.random.default_rng(0)
    stored = {code: rng.bytes(4 * bits) for code, bits in COPIED.items()}
    stored[name_of_weights] = rng.standard_normal((4, 8)).astype(np.float32).tobytes()
    entries, start = {}, 0
    for name, data in stored.items():
        offsets = [start, start + len(data)]
        dtype = name if name in COPIED else "F32"
        entries[name] = {"dtype": dtype, "shape": [4, 8], "data_offsets": offsets}
        start = offsets[1]
    path.write_bytes(header_of(entries) + b"".join(stored.values()))
    return stored


def bytes_by_name(path: pathlib.Path) -> dict[str, tuple[str, bytes]]:
    """Dtypes and bytes of the tensors of a file, read with json alone."""
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], data[stop:][slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


@pytest.mark.parametrize(
    "name",
    ["w", "a/b"],  # this format would escape the slash: a plain file is written
)
def test_dtypes_of_other_libraries_are_listed_and_copied_as_bytes(tmp_path, name):
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    stored = write_copied_dtypes(source, name)
    with safetensors.safe_open(source, "np") as file:
        assert {file.get_slice(x).get_dtype() for x in file.keys()} == {"F32", *COPIED}  # noqa: SIM118
    sizes = {leaf.path: leaf for leaf in checkpoints.inspect(source).leaves}
    for code, bits in COPIED.items():
        leaf = sizes[code]
        assert (leaf.shape, leaf.raw_bytes, leaf.stored_bytes) == ((4, 8), 4 * bits, 4 * bits)
    assert checkpoints.verify_file(source, progress=False).leaves
    for rewrite in (
        lambda: checkpoints.decompress_checkpoint(source, target, overwrite=True),
        lambda: checkpoints.clip_checkpoint(source, target, 0.1, overwrite=True),
        lambda: checkpoints.compress_checkpoint(source, target, 4, overwrite=True),
    ):
        report = rewrite()
        assert report.total_bytes == target.stat().st_size
        found = bytes_by_name(target)
        for code in COPIED:
            assert found[code] == (code, stored[code])
        copied = {leaf.path: leaf.raw_bytes for leaf in checkpoints.inspect(target).leaves}
        assert all(copied[code] == 4 * bits for code, bits in COPIED.items())
    interop.export_checkpoint(source, target, "safetensors", overwrite=True)
    assert bytes_by_name(target) == bytes_by_name(source)


def test_codes_of_four_bits_are_read_as_the_numbers_they_stand_for(tmp_path):
    path = tmp_path / "x.safetensors"
    entries = {"w": {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}}
    path.write_bytes(header_of(entries) + bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    found = checkpoints.load(path)["w"].astype(np.float32)
    np.testing.assert_array_equal(found, [values, [-x for x in values]])
