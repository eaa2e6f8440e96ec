"""Faults around files: full disks, killed writers, readers beside writers, names from anywhere."""

import os
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxclip import checkpoints
from jaxclip.checkpoints.sizes import size_report

REPOSITORY = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "net.safetensors"


def consistent_tree(i: int) -> dict:
    return {"w": np.full(50_000, i, np.float32), "i": np.int64(i)}


def assert_whole(path: pathlib.Path) -> None:
    loaded = checkpoints.load(path)
    assert (loaded["w"] == loaded["i"]).all()


# --- Names and numbers ------------------------------------------------------------------------

ODD_NAMES = ["", "x" * 10_000, "../x", "/etc/passwd", "a\0b", "a\nb", "C:\\x", "é\u202e", "w:codes"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=lambda name: repr(name[:12]))
def test_names_are_names_and_nothing_more(name, path, tmp_path):
    tree = {name: np.arange(3, dtype=np.int16), "inner": {name: np.ones(2, np.float32)}}
    checkpoints.save(path, tree)
    loaded = checkpoints.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, tree))
    assert size_report(tree).total_bytes == path.stat().st_size
    foreign = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({name: tree[name]}, foreign)
    np.testing.assert_array_equal(checkpoints.load(foreign)[name], tree[name])
    plain = tmp_path / "plain.safetensors"
    checkpoints.clip_checkpoint(foreign, plain, 1.0, progress=False)
    assert list(checkpoints.load(plain)) == [name]
    files = ["foreign.safetensors", "net.safetensors", "plain.safetensors"]
    assert sorted(os.listdir(tmp_path)) == files


@pytest.mark.thorough
def test_a_hundred_thousand_tensors_come_back(path):
    tree = {f"layer_{i}": np.full((), i, np.int32) for i in range(100_000)}
    checkpoints.save(path, tree)
    loaded = checkpoints.load(path)
    assert loaded.keys() == tree.keys()
    assert all(loaded[name] == value for name, value in tree.items())


def test_values_that_are_not_finite_keep_their_bits(path):
    words = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0x7F800000, 0x80000000, 1], np.uint32)
    checkpoints.save(path, {"w": words.view(np.float32)})
    np.testing.assert_array_equal(checkpoints.load(path)["w"].view(np.uint32), words)


# --- Readers and writers ----------------------------------------------------------------------


def test_a_reader_beside_a_writer_sees_the_old_or_the_new_file(path):
    checkpoints.save(path, consistent_tree(0))
    is_done = threading.Event()

    def write():
        for i in range(1, 30):
            checkpoints.save(path, consistent_tree(i), overwrite=True)
        is_done.set()

    writer = threading.Thread(target=write)
    writer.start()
    num_reads = 0
    while not is_done.is_set():
        assert_whole(path)
        num_reads += 1
    writer.join()
    assert num_reads > 1
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("overwrite", [True, False])
def test_of_two_writers_the_last_or_the_first_wins(overwrite, path):
    outcomes = []

    def write(i):
        try:
            checkpoints.save(path, consistent_tree(i), overwrite=overwrite)
            outcomes.append("saved")
        except FileExistsError:
            outcomes.append("refused")

    for _ in range(5):
        outcomes.clear()
        path.unlink(missing_ok=True)
        writers = [threading.Thread(target=write, args=(i,)) for i in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert outcomes.count("saved") == (3 if overwrite else 1)
        assert_whole(path)
        assert os.listdir(path.parent) == [path.name]


# --- Full disks -------------------------------------------------------------------------------

FULL_DISK = """
import contextlib, io, os, sys
import numpy as np
from jaxclip import checkpoints, cli

folder, source = sys.argv[1:]
path = folder + "/net.safetensors"
old = {"w": np.arange(1000, dtype=np.float32)}
checkpoints.save(path, old)
for write in (
    lambda: checkpoints.save(path, np.zeros(1_000_000), overwrite=True),
    lambda: checkpoints.save(folder + "/new.npz", {"w": np.zeros(1_000_000)}),
    lambda: checkpoints.clip_checkpoint(source, path, 1.0, overwrite=True, progress=False),
):
    try:
        write()
    except OSError as error:
        assert "No space left" in str(error), error
        assert "unchanged" in error.__notes__[0]
    else:
        raise SystemExit("the disk is not full")
    assert (checkpoints.load(path)["w"] == old["w"]).all()
    assert os.listdir(folder) == ["net.safetensors"]
with contextlib.redirect_stderr(io.StringIO()) as said:
    assert cli.main(["clip", source, path, "--threshold", "1", "--force"]) == 1
assert "No space left" in said.getvalue(), said.getvalue()
assert (checkpoints.load(path)["w"] == old["w"]).all()
"""


@pytest.mark.thorough
def test_a_disk_of_a_megabyte_that_is_full_keeps_its_old_file(tmp_path):
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk"
    (tmp_path / "disk").mkdir()
    alone = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, mount], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount")
    checkpoints.save(tmp_path / "source.npz", {"a": np.zeros(400_000), "b": np.ones(9)})
    command = f'{mount} && exec "{sys.executable}" -c "$0" {tmp_path}/disk {tmp_path}/source.npz'
    result = subprocess.run(
        [*alone, command, FULL_DISK], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


# --- Killed writers ---------------------------------------------------------------------------


COMPRESSES = """
import sys
import numpy as np
from jaxclip.checkpoints import compress_checkpoint

source, target = sys.argv[1:]
options = {"rule": 3.0, "overwrite": True, "progress": False}
compress_checkpoint(source, target, 4, **options)
print("writing", flush=True)
while True:
    compress_checkpoint(source, target, 4, **options)
"""


@pytest.mark.thorough
def test_a_killed_compression_leaves_a_whole_file_and_its_source(path, tmp_path):
    rng, source = random.Random(0), tmp_path / "source.npz"
    checkpoints.save(source, {f"w{i}": np.full((200, 500), i, np.float32) for i in range(8)})
    before = source.read_bytes()
    for _ in range(5):
        command = [sys.executable, "-c", COMPRESSES, str(source), str(path)]
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"writing\n"
            time.sleep(rng.uniform(0.0, 0.15))
            child.kill()
        loaded = checkpoints.load(path)
        assert [leaf.shape for leaf in loaded.values()] == [(200, 500)] * 8
        assert source.read_bytes() == before
    checkpoints.compress_checkpoint(source, path, 4, rule=3.0, overwrite=True, progress=False)
    assert sorted(os.listdir(tmp_path)) == ["net.safetensors", "source.npz"]
