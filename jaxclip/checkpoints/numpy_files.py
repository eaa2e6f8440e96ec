"""NumPy's own files, `.npy` and `.npz`, written and read without pickles.

`.npz` members are stored or deflated, as NumPy writes them. Errors are ValueErrors; `reading` adds
the file's name.
"""

import contextlib
import dataclasses
import errno
import functools
import io
import math
import types
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO, cast

import numpy as np

from jaxclip._core import signals
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints.format.layout import Array, check_has_values, check_leaf
from jaxclip.checkpoints.format.pytrees import DEPTH_LIMIT, as_plain
from jaxclip.lowbit.arrays import QuantizedArray

_MAX_HEADER_BYTES = 10_000  # NumPy parses no longer ones
# zipfile bounds what these unpack at a time; 500 bytes of bzip2 or LZMA may unpack to gigabytes.
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class _TextError(ValueError):
    """Error of an array of text."""


def prepare_npy(tree: PyTree) -> Callable[[BinaryIO], None]:
    """Checks that a tree is one array; returns a function that writes it to a .npy file."""
    array = as_plain(tree)
    _check_numpy_leaf("array", array)
    return lambda file: _write_npy(file, array)


def prepare_npz(tree: PyTree) -> Callable[[BinaryIO], None]:
    """Checks a (nested) dict of arrays; returns a function that writes it to a .npz file."""
    tree = as_plain(tree)
    if type(tree) is not dict:
        raise TypeError(
            f"a .npz file holds a dict of arrays, got {type(tree).__name__}; save other trees "
            "as .safetensors."
        )
    pairs = list(_named_arrays(tree, ()))
    arrays = dict(pairs)
    if len(arrays) != len(pairs):
        raise ValueError("two leaves have the same name when keys are joined by '/'.")

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                # Not np.savez: it fails on names such as "file" and fetches all arrays at once.
                info = zipfile.ZipInfo(f"{name}.npy")
                with archive.open(info, "w", force_zip64=True) as member:
                    _write_npy(member, array)

    return write


def _named_arrays(tree: dict, path: tuple[str, ...]) -> Iterator[tuple[str, Array]]:
    if len(path) > DEPTH_LIMIT:
        raise ValueError(f"the tree is nested deeper than {DEPTH_LIMIT}.")
    if any(type(key) is not str or "\0" in key or not key.isprintable() for key in tree):
        raise TypeError(f"the keys of a dict must be printable strings, at {'/'.join(path)!r}.")
    for key in sorted(tree):
        name = "/".join((*path, key))
        if type(tree[key]) is dict:
            yield from _named_arrays(tree[key], (*path, key))
        else:
            _check_numpy_leaf(name, tree[key])
            yield name, tree[key]


def _check_numpy_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, (QuantizedArray, list, tuple, dict, type(None))):
        raise TypeError(
            f"{name!r} is of type {type(leaf).__name__}, which NumPy's formats cannot hold: "
            "save it as .safetensors."
        )
    check_leaf(name, leaf)
    if not _is_numpy_dtype(leaf.dtype):
        raise TypeError(
            f"leaf {name!r} has dtype {leaf.dtype}, which NumPy's formats cannot hold: save it "
            "as .safetensors, or another dtype."
        )
    check_has_values(name, leaf)


def _is_numpy_dtype(dtype: Any) -> bool:
    # Not bfloat16 or float8 of ml_dtypes: a .npy file does not say which of them it holds.
    is_number = isinstance(dtype, np.dtype) and dtype.kind in "biufc"
    return is_number and dtype.type.__module__ == "numpy"


def _write_npy(file: IO[bytes], array: Array) -> None:
    # To a real file NumPy writes an array at once, and hides the cause if that fails.
    target = cast(IO[bytes], types.SimpleNamespace(write=file.write))
    # Always row-major, so that equal arrays give equal bytes.
    np.lib.format.write_array(target, np.asarray(array, order="C"), allow_pickle=False)


def read_bytes(file: io.BufferedIOBase, num_bytes: int) -> np.ndarray:
    """Reads bytes whose number the caller has checked against the file's size."""
    try:
        data = np.empty(num_bytes, np.uint8)
    except MemoryError as error:
        raise ValueError(f"its {num_bytes:,} bytes do not fit into memory.") from error
    view = data.data
    while len(view):
        signals.check_stop()
        count = file.readinto(view[: 2**24])
        if not count:
            raise ValueError("the file ends early.")
        view = view[count:]
    return data


def check_booleans(data: np.ndarray) -> None:
    """Raises unless all bytes of booleans are 0 or 1."""
    if data.max(initial=0) > 1:
        raise ValueError("a boolean is neither 0 nor 1.")


def _read_array(
    file: io.BufferedIOBase, dtype: np.dtype, shape: tuple[int, ...], order: Any
) -> np.ndarray:
    data = read_bytes(file, math.prod(shape) * dtype.itemsize)
    if dtype == np.bool_:
        check_booleans(data)
    return data.view(dtype).reshape(shape, order=order)


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array in one of NumPy's files, readable while the file is open.

    Attributes:
      shape: Its shape.
      dtype: Its dtype, of either byte order.
      num_bytes: Bytes that it takes in the file.
      read: Reads it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    num_bytes: int
    read: Callable[[], np.ndarray]


def open_npy(file: io.BufferedIOBase, file_size: int) -> LazyArray:
    """Reads the header of a .npy file of `file_size` bytes; the array can be read once."""
    try:
        shape, is_fortran, dtype = _read_npy_header(file)
    except Exception as error:  # NumPy evaluates the header as Python literals
        raise ValueError(f"not a .npy file, or its header is damaged: {error}") from error
    if not _is_numpy_dtype(dtype):
        kind = _TextError if dtype.kind in "US" else ValueError
        raise kind(f"its dtype {dtype} is not a number (bfloat16 is lost in .npy).")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"its shape {shape} is not valid.")
    num_bytes, num_found = math.prod(shape) * dtype.itemsize, file_size - file.tell()
    if num_bytes != num_found:
        raise ValueError(f"its data must have {num_bytes} bytes, found {num_found}.")
    order = "F" if is_fortran else "C"
    return LazyArray(shape, dtype, num_bytes, lambda: _read_array(file, dtype, shape, order))


def _read_npy_header(file: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    num_digits, read = {
        (1, 0): (2, np.lib.format.read_array_header_1_0),
        (2, 0): (4, np.lib.format.read_array_header_2_0),
    }[version]
    # NumPy reads a header whole before it finds it too long.
    prefix = file.read(num_digits)
    length = int.from_bytes(prefix, "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"it has {length:,} bytes.")
    return read(io.BytesIO(prefix + file.read(length)))


def open_npz(file: io.BufferedIOBase, file_size: int) -> dict[str, LazyArray]:
    """Reads the headers of all arrays in a .npz file, by name; warns of members that are text."""
    del file_size  # every member says its own
    arrays: dict[str, LazyArray] = {}
    left_out = []
    with _zip_errors():
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        if len({member.filename for member in members}) != len(members):
            raise ValueError("two members have the same name.")
        for member in members:
            if not member.filename.endswith(".npy"):
                archive.open(member).close()  # raises if the name is damaged
                left_out.append(member.filename)
                continue
            try:
                with _opened_member(archive, member) as array:
                    read = functools.partial(_read_member, archive, member)
                    name, num_bytes = member.filename.removesuffix(".npy"), member.compress_size
                    arrays[name] = dataclasses.replace(array, num_bytes=num_bytes, read=read)
            except _TextError:
                left_out.append(member.filename)
    if left_out:
        names = ", ".join(map(repr, left_out[:5])) + (", ..." if len(left_out) > 5 else "")
        warnings.warn(f"members that are no arrays of numbers are left out: {names}.", stacklevel=2)
    return arrays


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with _zip_errors(), _opened_member(archive, member) as array:
        return array.read()


@contextlib.contextmanager
def _opened_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[LazyArray]:
    if member.compress_type not in _PACKINGS:
        raise ValueError(
            f"member {member.filename!r} is packed by method {member.compress_type}, but only "
            "stored and deflated members are read: pack it again with np.savez_compressed."
        )
    with archive.open(member) as opened:
        try:
            yield open_npy(cast(io.BufferedIOBase, opened), member.file_size)
        except _TextError:
            raise
        except ValueError as error:
            raise ValueError(f"member {member.filename!r}: {error}") from error


@contextlib.contextmanager
def _zip_errors() -> Iterator[None]:
    """Turns errors of a damaged archive into ValueError; zipfile does not document their kinds."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek out of bounds
            raise
        raise ValueError(str(error) or type(error).__name__) from error
