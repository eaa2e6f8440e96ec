"""Files under their name whole or not at all; `test_checkpoints.py` has what may go wrong."""

import itertools
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import pytest

from jaxclip._core.atomic import new_folder, replacing

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
each_way = pytest.mark.parametrize("overwrite", [True, False])


def test_the_name_appears_when_the_block_ends(tmp_path: pathlib.Path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.seek(0)
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_another_writer_puts_under_the_temporary_name_is_published(
    tmp_path: pathlib.Path,
):
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


# --- Folders ----------------------------------------------------------------------------------


def test_a_folder_appears_when_the_block_ends(tmp_path: pathlib.Path):
    with new_folder(tmp_path / "net") as folder:
        (folder / "a").write_bytes(b"1")
        assert not (tmp_path / "net").exists()
    assert os.listdir(tmp_path) == ["net"]
    assert (tmp_path / "net" / "a").read_bytes() == b"1"
    assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == 0o777 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_a_file_with_the_name_of_a_new_folder_stays(tmp_path: pathlib.Path, kind: str):
    path = tmp_path / "net"
    made = {
        "folder": path.mkdir,
        "file": path.touch,
        "link to nothing": lambda: path.symlink_to("no"),
    }
    made[kind]()
    inode = path.lstat().st_ino
    with pytest.raises(FileExistsError, match="name a new one"), new_folder(path):
        pytest.fail("entered")
    path.rename(tmp_path / "other")
    # It comes back before the block ends.
    with pytest.raises(FileExistsError, match="name a new one"), new_folder(path):
        (tmp_path / "other").rename(path)
    assert path.lstat().st_ino == inode
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.parametrize("name", ["link/../net", "link/../net/", "link/../../else/./net"])
def test_a_new_folder_behind_a_link_lies_where_a_file_would(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.makedirs("else/where")
    os.symlink("else/where", "link")
    with new_folder(name) as folder:
        (folder / "a").touch()
    with replacing(name.rstrip("/") + ".txt"):
        pass
    assert sorted(os.listdir("else")) == ["net", "net.txt", "where"]
    assert sorted(os.listdir()) == ["else", "link"]


@pytest.mark.parametrize("name", [".", "..", "sub/..", "sub/.", "link", "link/", "/"])
def test_a_name_that_stands_for_a_folder_is_taken(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkdir("sub")
    os.symlink("sub", "link")
    with pytest.raises(FileExistsError, match="name a new one"), new_folder(name):
        pytest.fail("entered")
    assert sorted(os.listdir()) == ["link", "sub"]


@pytest.mark.parametrize("name", ["no/net", "no/../net", "no/..", "file/../net"])
def test_a_way_that_leads_nowhere_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").touch()
    with pytest.raises(FileNotFoundError, match="no directory"), new_folder(name):
        pytest.fail("entered")
    with pytest.raises(FileNotFoundError, match="no directory"), replacing(name):
        pytest.fail("entered")
    assert os.listdir() == ["file"]


def test_a_folder_is_made_where_it_was_when_the_block_began(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with new_folder("net"):
        os.chdir("other")
    assert sorted(os.listdir(tmp_path)) == ["net", "other"]


def test_a_folder_that_a_killed_writer_left_is_removed_by_the_next(tmp_path: pathlib.Path):
    script = """
import os, sys
from jaxclip._core.atomic import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "half").touch()
    os._exit(9)
"""
    path = tmp_path / "net"
    command = [sys.executable, "-c", script, str(path)]
    assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == 9
    assert len(os.listdir(tmp_path)) == 1
    assert not path.exists()
    with new_folder(path):
        pass
    assert os.listdir(tmp_path) == ["net"]


# --- Killed writers and lost power ------------------------------------------------------------

SAVES = """
import sys
from jaxclip._core.atomic import replacing

with replacing(sys.argv[1], overwrite=sys.argv[2] == "True") as file:
    file.write(b"new" * 10_000)
"""


@each_way
def test_the_system_calls_of_a_save_are_in_order(tmp_path: pathlib.Path, overwrite: bool):
    path, log = tmp_path / "folder" / "file", tmp_path / "log"
    path.parent.mkdir()
    if overwrite:
        path.write_bytes(b"old")
    calls = "openat,write,fsync,fdatasync,rename,renameat,renameat2,link,linkat,unlink,unlinkat"
    strace = ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", str(log)]
    if (
        not shutil.which("strace")
        or subprocess.run([*strace, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs strace and the right to trace")
    command = [*strace, sys.executable, "-c", SAVES, str(path), str(overwrite)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = []
    for line in log.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if call is None or str(path.parent) not in line:
            continue
        target = "temporary" if "jaxclip-tmp" in line else "folder"
        if call[1] == "openat" and target == "folder":
            continue  # looked at
        kind = re.sub("^(rename|link|unlink|open)at2?$", r"\1", call[1])
        found.append((kind, target))
    found = [event for event, _ in itertools.groupby(found)]
    publish = (
        [("rename", "temporary")] if overwrite else [("link", "temporary"), ("unlink", "temporary")]
    )
    assert found == [
        ("open", "temporary"),
        ("write", "temporary"),
        ("fsync", "temporary"),
        *publish,
        ("fsync", "folder"),
    ]


KILLED = """
import os, pathlib, sys
from jaxclip._core.atomic import replacing

folder, overwrite = pathlib.Path(sys.argv[1]), sys.argv[2] == "True"
path, old, new = folder / "file", b"old", b"new" * 10_000

def save(last):
    count = 0

    def step():
        nonlocal count
        if count == last:
            os._exit(9)
        count += 1

    def dying(call):
        def called(*args, **kwargs):
            result = call(*args, **kwargs)
            step()
            return result
        return called

    for name in ("chmod", "fsync", "replace", "link", "unlink", "open", "close"):
        setattr(os, name, dying(getattr(os, name)))
    with replacing(path, overwrite) as file:
        step()
        file.write(new[:15_000])
        file.flush()
        step()
        file.write(new[15_000:])
        file.flush()
        step()
    os._exit(0)

states = []
while not states or states[-1][0] != 0:
    path.write_bytes(old) if overwrite else path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        save(len(states))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    states.append((status, path.read_bytes() if path.exists() else None))
before = old if overwrite else None
assert {content for _, content in states} == {before, new}, states
assert states[0][1] == before and states[-1] == (0, new)
assert [x for x in os.listdir(folder) if x != "file"] == []  # the last save tidied up
print(len(states))
"""


@each_way
def test_a_writer_that_dies_after_any_call_leaves_the_old_or_the_new_file(tmp_path, overwrite):
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(overwrite)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout) >= 8


@each_way
def test_power_lost_after_any_call_leaves_the_old_or_the_new_file(tmp_path, monkeypatch, overwrite):
    """What a disk may hold: data are sure once synced, names once their folder is."""
    path, old, new = tmp_path / "file", b"old", b"new" * 10_000
    if overwrite:
        path.write_bytes(old)
    events: list[tuple] = []

    def record(name, real):
        def called(*args, **kwargs):
            result = real(*args, **kwargs)
            if name != "fsync":
                events.append((name, *(pathlib.Path(arg).name for arg in args)))
            elif stat.S_ISDIR(os.fstat(args[0]).st_mode):
                events.append(("sync names",))
            else:
                file = next(
                    p for p in tmp_path.iterdir() if p.stat().st_ino == os.fstat(args[0]).st_ino
                )
                events.append(("sync data", file.name, file.read_bytes()))
            return result

        return called

    for name in ("fsync", "replace", "link", "unlink"):
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    with replacing(path, overwrite) as file:
        events.append(("create", pathlib.Path(file.name).name))
        file.write(new)
    monkeypatch.undo()

    before = old if overwrite else None
    for num_done in range(len(events) + 1):
        assert states_after(events[:num_done], before) <= {before, new}, events[:num_done]
    assert states_after(events, before) == {new}


def states_after(events: list[tuple], before: bytes | None) -> set[bytes | None]:
    """What may be under the name after a loss of power, by any choice of names not yet synced."""
    data = {name: content for kind, name, content in (e for e in events if e[0] == "sync data")}
    names = [e for e in events if e[0] in ("create", "replace", "link", "unlink")]
    synced = [i for i, e in enumerate(events) if e[0] == "sync names"]
    num_sure = len([e for e in events[: synced[-1]] if e in names]) if synced else 0
    states = set()
    for kept in itertools.product([True, False], repeat=len(names) - num_sure):
        content = before
        choice = [True] * num_sure + list(kept)
        for (kind, *args), is_kept in zip(names, choice, strict=True):
            if is_kept and kind in ("replace", "link") and args[1] == "file":
                content = data.get(args[0], b"whatever was on the disk")
            elif is_kept and kind == "unlink" and args[0] == "file":
                content = None
        states.add(content)
    return states
