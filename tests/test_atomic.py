"""Files under their name whole or not at all; `test_checkpoints.py` has what may go wrong."""

import os
import pathlib

import pytest

from jaxclip.atomic import replacing


def test_the_name_appears_when_the_block_ends(tmp_path: pathlib.Path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.seek(0)
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["file"]


def test_what_another_writer_puts_under_the_temporary_name_is_published(tmp_path: pathlib.Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path, overwrite=True) as file:
        pathlib.Path(file.name).write_bytes(b"by name")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"by name"


def test_an_error_in_the_block_leaves_the_old_file_and_no_other(tmp_path: pathlib.Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half():
        with replacing(path, overwrite=True) as file:
            file.write(b"new")
            raise KeyError("x")

    with pytest.raises(KeyError) as caught:
        write_half()
    assert caught.value.__notes__ == [
        f"jaxclip: while saving {path}; a file that was there is unchanged."
    ]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_block_is_not_entered_when_the_name_is_taken(tmp_path: pathlib.Path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite=True"), replacing(path):
        pytest.fail("entered")
    assert os.listdir(tmp_path) == ["file"]
