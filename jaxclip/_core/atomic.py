"""Files and folders that appear under their name whole or not at all.

They are written next to their destination under a temporary name, synced and renamed. After
a crash at any moment the name holds either the old content or the new.
"""

import contextlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# A temporary file that nobody has written to for this long was abandoned.
_STALE_SECONDS = 24 * 3600


@contextlib.contextmanager
def replacing(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Opens a binary file that gets its name when the block ends without an error."""
    # `file.name` is the temporary path, which another library may write to as well.
    path = Path(path)
    mode = check_destination(path, overwrite)
    _remove_stale(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            if mode is not None:
                os.chmod(temporary, mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path, overwrite)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        error.add_note(f"jaxclip: while saving {path}; a file that was there is unchanged.")
        raise
    _sync_directory(path.parent)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Makes a folder that gets its name when the block ends; its files must be synced by then."""
    path = Path(path)
    _check_new(path)
    # Absolute, because the working directory may change. `realpath` also follows ".." after a link.
    path = Path(os.path.realpath(path.parent), path.name)
    _remove_stale(path)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        _sync_directory(temporary)
        _check_new(path)  # renaming would replace an empty folder
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        error.add_note(f"jaxclip: while writing the folder {path}, which was not made.")
        raise
    _sync_directory(path.parent)


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"'{path}' exists, and folders are not replaced: name a new one.")
    check_destination(path, False)


def _temporary(path: Path) -> Path:
    return path.with_name(
        f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.jaxclip-tmp"
    )


def check_destination(path: Path, overwrite: bool) -> int | None:
    """Raises unless `path` may be written; returns the permissions of a file to be replaced."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory '{path.parent}' to save '{path}' in.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the directory '{path.parent}' cannot be written to.")
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError(f"'{path}' is not a regular file, so it is not replaced.")
    if not overwrite:
        raise FileExistsError(f"'{path}' exists; pass overwrite=True to replace it.")
    return stat.S_IMODE(status.st_mode)


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Gives the finished file its name; without `overwrite` only if the name is free."""
    if overwrite:
        check_destination(path, overwrite)
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        check_destination(path, overwrite)
        raise
    except OSError:  # a file system without hard links: check, then rename
        check_destination(path, overwrite)
        os.replace(temporary, path)
    else:
        with contextlib.suppress(OSError):  # published already; the next save removes it
            temporary.unlink()


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(handle)
    finally:
        os.close(handle)


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _remove_stale(path: Path) -> None:
    """Removes temporary files that killed writers of the same path left."""
    ours = re.compile(
        rf"\.{re.escape(path.name)}\.([0-9a-f]{{8}})-([0-9]{{1,10}})-[0-9a-f]{{8}}\.jaxclip-tmp"
    )
    with os.scandir(path.parent) as entries:
        matches = [(entry, ours.fullmatch(entry.name)) for entry in entries]
    for entry, match in matches:
        with contextlib.suppress(OSError):
            if match is None or entry.is_symlink():
                continue
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            died_here = match[1] == _host() and not _is_alive(int(match[2]))
            if not died_here and age <= _STALE_SECONDS:
                continue
            if entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere `os.kill(pid, 0)` ends the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
