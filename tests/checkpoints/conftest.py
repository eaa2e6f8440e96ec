"""Where the tests of files write, and what they read."""

import pathlib

import pytest

from oracles.shard_folders import make_shard_folder


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file that is not there yet, alone in its folder."""
    return tmp_path / "net.safetensors"


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two shards and their index."""
    return make_shard_folder(tmp_path)
