"""Files and folders that appear under their name whole or not at all.

They are written next to their destination under a temporary name, synced and renamed. After
a crash at any moment the name holds either the old content or the new. A writer locks its
temporary, so one that can be locked was left by a writer that died.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxclip._core import signals

if sys.platform != "win32":
    import fcntl

# A temporary that nobody has written to for this long was abandoned, wherever its writer ran.
_STALE_SECONDS = 24 * 3600
# What file systems say that lack a call: some of CIFS, FUSE, S3 and HDFS.
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Names may have 255 bytes, on some file systems 143: those of temporaries have to stay below.
_MAX_STEM_BYTES = 100
_unfinished: set[Path] = set()  # temporaries of this process


@contextlib.contextmanager
def replacing(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Opens a binary file that gets its name when the block ends without an error."""
    # `file.name` is the temporary path, which another library may write to as well.
    path = Path(path)
    mode = check_destination(path, overwrite)
    _remove_stale(path)
    temporary = _temporary(path)
    with contextlib.ExitStack() as lock, _listed(temporary):
        try:
            with _open_locked(temporary, lock) as file:
                has_mode = mode is None or _set_mode(temporary, mode)
                yield file
                file.flush()
                is_synced = _sync(file.fileno())
            signals.check_stop()
            _publish(temporary, path, overwrite)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            error.add_note(f"jaxclip: while saving {path}; a file that was there is unchanged.")
            raise
    _sync_directory(path.parent)
    # Warned last: the file is there even where warnings are errors.
    if not is_synced:
        warnings.warn(
            f"{str(path)!r} is saved, but its file system cannot sync: a loss of power in the next "
            "seconds may damage it.",
            stacklevel=3,
        )
    if not has_mode:
        warnings.warn(
            f"{str(path)!r} is saved, but its file system could not keep the permissions of the "
            "file that it replaces.",
            stacklevel=3,
        )


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Makes a folder that gets its name when the block ends; its files must be synced by then."""
    path = Path(path)
    _check_new(path)
    # Absolute, because the working directory may change. `realpath` also follows ".." after a link.
    path = Path(os.path.realpath(path.parent), path.name)
    _remove_stale(path)
    temporary = _temporary(path)
    with contextlib.ExitStack() as lock, _listed(temporary):
        try:
            _make_locked(temporary, lock)
            yield temporary
            _sync_directory(temporary)
            signals.check_stop()
            _check_new(path)  # renaming would replace an empty folder
            os.rename(temporary, path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            error.add_note(f"jaxclip: while writing the folder {path}, which was not made.")
            raise
    _sync_directory(path.parent)


@contextlib.contextmanager
def _listed(temporary: Path) -> Iterator[None]:
    """Lists a temporary for `remove_unfinished` while the context lasts."""
    _unfinished.add(temporary)
    try:
        yield
    finally:
        _unfinished.discard(temporary)


def remove_unfinished() -> None:
    """Removes the temporaries of this process, which is about to end."""
    for temporary in tuple(_unfinished):
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def _check_new(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(
            f"{str(path)!r} exists, and folders are not replaced: name a new one."
        )
    check_destination(path, False)


def check_destination(path: Path, overwrite: bool) -> int | None:
    """Raises unless `path` may be written; returns the permissions of a file to be replaced."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no directory {str(path.parent)!r} to save {str(path)!r} in."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the directory {str(path.parent)!r} cannot be written to.")
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError(f"{str(path)!r} is not a regular file, so it is not replaced.")
    if not overwrite:
        raise FileExistsError(f"{str(path)!r} exists; pass overwrite=True to replace it.")
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


def _set_mode(path: Path, mode: int) -> bool:
    """Gives a file its permissions; returns False if its file system cannot."""
    if stat.S_IMODE(path.stat().st_mode) == mode:
        return True
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in {*_NOT_SUPPORTED, errno.EPERM}:
            raise
        return False
    return True


def _sync(handle: int) -> bool:
    """Syncs an open file; returns False if its file system cannot."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        return False
    return True


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- Whose temporary it is ----------------------------------------------------------------
#
# Numbers of processes and names of hosts say nothing: containers share a folder and have both in
# common. A lock is held as long as its writer lives. It is seen by all who have the same mount of
# the same kernel, which the temporary's name tells. Elsewhere, as on other hosts of a network
# file system, locks may be invisible, and only age counts.


def _temporary(path: Path) -> Path:
    name = f"{_stem(path)}{_mount(path.parent)}-{secrets.token_hex(8)}.jaxclip-tmp"
    return path.with_name(name)


def _stem(path: Path) -> str:
    """Returns how the names of a path's temporaries begin; long names are hashed."""
    name = os.fsencode(path.name)
    is_short = len(name) <= _MAX_STEM_BYTES
    return f".{path.name if is_short else hashlib.blake2b(name, digest_size=16).hexdigest()}."


def _mount(directory: Path) -> str:
    """Returns a digest of the running kernel and of a directory's mount in it."""
    mount = _kernel() + str(directory.stat().st_dev).encode()
    return hashlib.blake2b(mount, digest_size=8).hexdigest()


@functools.cache
def _kernel() -> bytes:
    """Returns an id of the running kernel, or one of this process where kernels have none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return secrets.token_bytes(16)


@contextlib.contextmanager
def _open_locked(temporary: Path, lock: contextlib.ExitStack) -> Iterator[BinaryIO]:
    """Opens a new file, locked until `lock` is closed."""
    is_there = False
    while not is_there:  # or removed as abandoned, just before it was locked
        with open(temporary, "xb") as file:
            # On Windows a file that is open cannot be renamed.
            if sys.platform != "win32":
                # A second handle has the lock, so the file can be closed before it is renamed.
                _lock(lock.enter_context(_closing(os.dup(file.fileno()))), wait=True)
            is_there = temporary.exists()
            if is_there:
                yield file


def _make_locked(temporary: Path, lock: contextlib.ExitStack) -> None:
    """Makes a folder, locked until `lock` is closed."""
    while not temporary.exists():  # removed as abandoned, just before it was locked
        temporary.mkdir()
        if sys.platform != "win32":
            _lock(lock.enter_context(_closing(os.open(temporary, os.O_RDONLY))), wait=True)


@contextlib.contextmanager
def _closing(handle: int) -> Iterator[int]:
    try:
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock by the name of `path`; yields False, without `wait`, if it is held already."""
    with _closing(os.open(path, os.O_RDWR | os.O_CREAT)) as handle:
        is_free = _lock(handle, wait) is not False  # also where there are no locks
        try:
            yield is_free
        finally:
            if is_free:
                with contextlib.suppress(OSError):
                    path.unlink()


def _lock(handle: int, wait: bool) -> bool | None:
    """Locks an open file; returns False if it is locked, None if there are no locks here."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_stale(path: Path) -> None:
    """Removes temporaries that writers of the same path left when they died."""
    ours = re.compile(
        rf"{re.escape(_stem(path))}([0-9a-f]{{16}})-[0-9a-f]{{16}}\.jaxclip-tmp", re.DOTALL
    )
    with os.scandir(path.parent) as entries:
        matches = [(Path(entry.path), ours.fullmatch(entry.name)) for entry in entries]
    for temporary, match in matches:
        with contextlib.suppress(OSError):
            is_plain = not temporary.is_symlink() and (temporary.is_file() or temporary.is_dir())
            if match is None or not is_plain:
                continue
            is_old = time.time() - _last_change(temporary) > _STALE_SECONDS
            if is_old or match[1] == _mount(path.parent):
                _remove_unless_locked(temporary, is_old)


def _last_change(temporary: Path) -> float:
    """Returns when a temporary was written to; for a folder that includes its files."""
    inside = temporary.iterdir() if temporary.is_dir() else ()
    return max(file.lstat().st_mtime for file in (temporary, *inside))


def _remove_unless_locked(temporary: Path, is_old: bool) -> None:
    """Removes a temporary that nobody has locked; where there are no locks, only an old one."""
    with contextlib.ExitStack() as stack:
        is_free = None
        # For writing, because network file systems lock nothing else.
        flags = (os.O_RDONLY if temporary.is_dir() else os.O_RDWR) | getattr(os, "O_NONBLOCK", 0)
        with contextlib.suppress(OSError):  # another user's
            is_free = _lock(stack.enter_context(_closing(os.open(temporary, flags))), wait=False)
        if is_free or (is_free is None and is_old):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
