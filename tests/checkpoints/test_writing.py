"""Files appear whole or not at all: whatever happens while one is written."""

import errno
import os
import pathlib
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import checkpoints
from jaxclip._core import atomic
from jaxclip._core.grids import Grid
from jaxclip.checkpoints import CheckpointError
from jaxclip.checkpoints.format import codes, layout, writing
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.quantizer import quantize
from oracles.saved_trees import assert_same, leftovers, small_tree

REPOSITORY = pathlib.Path(__file__).parents[2]


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


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".npy"])
def test_a_full_disk_leaves_the_old_file_and_no_other(suffix, path):
    path = path.with_suffix(suffix)
    old = np.arange(3) if suffix == ".npy" else {"w": np.arange(3)}
    checkpoints.save(path, old)
    new = jax.tree.map(lambda _: np.zeros(1_000_000), old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="large") as caught:
            checkpoints.save(path, new, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG  # the limit stands for the end of a disk
    assert "unchanged" in caught.value.__notes__[0]
    assert_same(checkpoints.load(path), old)
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


def test_a_temporary_is_owned_by_its_lock_and_elsewhere_by_its_age(path):
    with atomic.replacing(path.with_name("other")) as file:
        here = pathlib.Path(file.name).name.split(".")[2].split("-")[0]
    number = "0123456789abcdef"
    dead = f".{path.name}.{here}-{number}.jaxclip-tmp"
    elsewhere = f".{path.name}.{number}-{number}.jaxclip-tmp"
    old_elsewhere = f".{path.name}.{number}-abcdefabcdefabcd.jaxclip-tmp"
    others = [
        f".other.safetensors.{here}-{number}.jaxclip-tmp",
        f".{path.name}.{here}-{number}.jaxclip-tmp.txt",
        f".{path.name}.jaxclip-tmp",
    ]
    before = os.listdir(path.parent)
    for name in (dead, elsewhere, old_elsewhere, *others):
        (path.parent / name).write_bytes(b"")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(path.parent / old_elsewhere, (two_days_ago, two_days_ago))
    with atomic.replacing(path, overwrite=True) as file:
        mine = pathlib.Path(file.name).name
        os.utime(file.name, (two_days_ago, two_days_ago))  # alive, however old
        found = sorted(os.listdir(path.parent))
        assert found == sorted([*before, mine, elsewhere, *others])
        checkpoints.save(path, {})
        assert sorted(os.listdir(path.parent)) == sorted([*found, path.name])


def test_where_locks_do_not_work_only_an_old_temporary_is_removed(path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with atomic.replacing(path) as file:
        checkpoints.save(path, {})
        file.write(b"alive")
        two_days_ago = time.time() - 2 * 24 * 3600
        os.utime(file.name, (two_days_ago, two_days_ago))
        checkpoints.save(path, {}, overwrite=True)
        assert os.listdir(path.parent) == [path.name]
        pathlib.Path(file.name).touch()
        path.unlink()


SAVE_LOOP = """
import os, sys
from jaxclip._core.atomic import replacing

# Another container has the same name of the host, and does not see this process.
os.getpid = lambda: 10**7
for _ in range(300):
    with replacing(sys.argv[1], overwrite=True) as file:
        file.write(sys.argv[2].encode() * 100_000)
"""


def test_two_containers_that_share_a_folder_leave_each_others_temporaries_alone(path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE_LOOP, str(path), letter],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for letter in "ab"
    ]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert path.read_bytes() in (b"a" * 100_000, b"b" * 100_000)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_saves_with_a_warning(number, path, monkeypatch):
    def no_sync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no_sync)
    with pytest.warns(UserWarning, match=r"net\.safetensors' is saved, but .* cannot sync"):
        checkpoints.save(path, small_tree())
    assert_same(checkpoints.load(path), small_tree())
    assert os.listdir(path.parent) == [path.name]


def test_a_disk_that_fails_to_sync_is_an_error(path, monkeypatch):
    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        checkpoints.save(path, small_tree())
    assert os.listdir(path.parent) == []


def test_a_file_system_without_permissions_saves_with_a_warning(path, monkeypatch):
    def no_modes(*_):
        raise PermissionError(errno.EPERM, "no modes here")

    checkpoints.save(path, [])
    path.chmod(0o600)
    monkeypatch.setattr(os, "chmod", no_modes)
    with pytest.warns(UserWarning, match="could not keep the permissions"):
        checkpoints.save(path, small_tree(), overwrite=True)
    assert_same(checkpoints.load(path), small_tree())


@pytest.mark.parametrize("letter", ["a", "\N{CYRILLIC SMALL LETTER ZHE}"])
def test_the_longest_names_are_saved(letter, tmp_path):
    for num_bytes in (200, 218, 254):
        name = letter * ((num_bytes - 12) // len(letter.encode())) + ".safetensors"
        for _ in range(2):
            checkpoints.save(tmp_path / name, small_tree(), overwrite=True)
        assert_same(checkpoints.load(tmp_path / name), small_tree())
    assert len(os.listdir(tmp_path)) == 3


def changed_when(monkeypatch, module, name, change):
    """Lets another thread call `change` just before a function of a module does its work."""
    real = getattr(module, name)

    def called(*args, **keywords):
        change()
        return real(*args, **keywords)

    monkeypatch.setattr(module, name, called)


@pytest.mark.thorough
@pytest.mark.parametrize("coding", [None, "huffman"])
def test_the_bytes_that_are_checked_are_those_that_are_written(coding, path, monkeypatch):
    """Another thread changes all arrays before and after each checksum, packing and encoding."""
    grid = Grid(4, scale_dtype="log8", zero_point=True)
    leaf = jax.tree.map(np.array, quantize(jnp.linspace(-1.0, 1.0, 999).reshape(333, 3), grid))
    tree = {"w": np.zeros(1000, np.float32), "q": leaf}

    def change():
        tree["w"] += 1
        leaf.scale[...] *= 0.5
        leaf.zero[...] = (leaf.zero + 1) % 7
        leaf.qvalue[...] = (leaf.qvalue + 1) % 7

    for module, name in ((writing.zlib, "crc32"), (layout, "pack_codes"), (codes, "encode_codes")):
        changed_when(monkeypatch, module, name, change)
    checkpoints.save(path, tree, coding=coding)
    monkeypatch.undo()
    assert set(checkpoints.load(path)) == {"w", "q"}


KILL_LOOP = """
import os, random, signal, sys, time
import numpy as np
from jaxclip import checkpoints

path, rng = sys.argv[1], random.Random(0)
tree = lambda i: {"w": np.full(300_000, i, np.float32), "i": np.int64(i)}
checkpoints.save(path, tree(0))
num_leftovers = num_kills = 0
while num_kills < int(sys.argv[2]) or (not num_leftovers and num_kills < 100):
    num_kills += 1
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


@pytest.mark.parametrize("num_kills", [8, pytest.param(100, marks=pytest.mark.thorough)])
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


@pytest.mark.thorough
def test_memory_is_bounded_by_the_largest_tensor_not_the_tree(path):
    """Codes are packed and unpacked in pieces, one tensor after the other."""
    num_codes, num_leaves = 3_000_000, 4
    one = quantize(jnp.ones(8), 6)
    leaf = QuantizedArray(np.ones(num_codes, np.int8), np.asarray(one.scale), one.grid, one.dtype)
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
