"""NumPy's own files, `.npy` and `.npz`, without pickles, bombs or surprises."""

import contextlib
import dataclasses
import errno
import functools
import math
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from jaxclip.checkpoints.format.layout import DEPTH_LIMIT, check_has_values, check_leaf
from jaxclip.lowbit.arrays import QuantizedArray

# What compressed members of an .npz may grow to, in total: real weights deflate by less
# than 2:1, a bomb by 1000:1; the fixed part lets small files of zeros through.
_MAX_GROWTH = 64
_ALWAYS_ALLOWED_BYTES = 2**28


def prepare_npy(tree: Any) -> Callable[[Any], None]:
    """Returns a function that writes one array as .npy to a binary file.

    Args:
      tree: The array.

    Raises:
      TypeError: If it is not one array, or of a dtype that NumPy's formats lack.

    Example:
      >>> import io
      >>> file = io.BytesIO()
      >>> prepare_npy(np.zeros(3, np.int8))(file)
      >>> file.tell()
      131
    """
    _check_numpy_leaf("array", tree)
    return lambda file: _write_npy(file, tree)


def prepare_npz(tree: Any) -> Callable[[BinaryIO], None]:
    """Returns a function that writes a dict of arrays as .npz to a binary file.

    Args:
      tree: Dict of arrays and dicts; names are the keys joined by "/".

    Raises:
      TypeError: If a node is no dict, a key no printable string, or a leaf no array of a
        dtype that NumPy's formats have.
      ValueError: If two leaves have the same name, or the dicts are nested too deeply.

    Example:
      >>> prepare_npz({"a/b": np.zeros(1), "a": {"b": np.zeros(1)}})
      Traceback (most recent call last):
      ValueError: two leaves have the same name when keys are joined by '/'.
    """
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
                # Not np.savez: it fails on names such as "file", and fetches all arrays at once.
                info = zipfile.ZipInfo(f"{name}.npy")
                with archive.open(info, "w", force_zip64=True) as member:
                    _write_npy(member, array)

    return write


def _named_arrays(tree: dict, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if len(path) > DEPTH_LIMIT:
        raise ValueError(f"the tree is nested deeper than {DEPTH_LIMIT}.")
    if any(type(key) is not str or "\0" in key or not key.isprintable() for key in tree):
        raise TypeError(f"the keys of a dict must be printable strings, at '{'/'.join(path)}'.")
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
            f"'{name}' is of type {type(leaf).__name__}, which NumPy's formats cannot hold: "
            "save it as .safetensors."
        )
    check_leaf(name, leaf)
    if not _is_numpy_dtype(leaf.dtype):
        raise TypeError(
            f"leaf '{name}' has dtype {leaf.dtype}, which NumPy's formats cannot hold: save it "
            "as .safetensors, or another dtype."
        )
    check_has_values(name, leaf)


def _is_numpy_dtype(dtype: Any) -> bool:
    # ml_dtypes' bfloat16 and float8 are dtypes too, but a .npy file forgets which.
    is_number = isinstance(dtype, np.dtype) and dtype.kind in "biufc"
    return is_number and dtype.type.__module__ == "numpy"


def _write_npy(file: Any, array: Any) -> None:
    # Row-major always, so that equal arrays give equal bytes.
    np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)


def read_array(file: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any = "C") -> np.ndarray:
    """Reads an array's raw bytes.

    Args:
      file: Binary file, at the array's first byte.
      dtype: Its dtype.
      shape: Its shape; the caller has checked it against the size of the file.
      order: "C" or "F".

    Returns:
      A writable NumPy array.

    Raises:
      ValueError: If the file ends early, or a boolean is neither 0 nor 1.

    Example:
      >>> import io
      >>> read_array(io.BytesIO(bytes([1, 0, 2, 0])), np.dtype("<u2"), (2,))
      array([1, 2], dtype=uint16)
    """
    data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    view = data.data
    while len(view):
        count = file.readinto(view[: 2**24])
        if not count:
            raise ValueError("the file ends early.")
        view = view[count:]
    if dtype == np.bool_ and data.max(initial=0) > 1:
        raise ValueError("a boolean is neither 0 nor 1.")
    return data.view(dtype).reshape(shape, order=order)


@dataclasses.dataclass(frozen=True)
class Member:
    """An array in one of NumPy's files, not read yet.

    Attributes:
      shape: Its shape.
      dtype: Its dtype.
      num_bytes: Bytes of its data.
      read: Reads it, while the file is open.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    num_bytes: int
    read: Callable[[], np.ndarray]


def open_npy(file: Any, file_size: int) -> Member:
    """Reads the header of a .npy file.

    Args:
      file: Binary file at its beginning.
      file_size: Its size in bytes.

    Returns:
      The array, to be read once.

    Raises:
      ValueError: If it is not a whole .npy file of numbers and nothing else.

    Example:
      >>> import io
      >>> file = io.BytesIO()
      >>> np.save(file, np.array([None]), allow_pickle=True)
      >>> size = file.tell(); _ = file.seek(0)
      >>> open_npy(file, size)
      Traceback (most recent call last):
      ValueError: its dtype object is not a number (bfloat16 is lost in .npy).
    """
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}
        shape, is_fortran, dtype = getattr(np.lib.format, readers[version])(file)
    except Exception as error:  # NumPy evaluates the header as Python literals
        raise ValueError(f"not a .npy file, or its header is damaged: {error}") from error
    if not _is_numpy_dtype(dtype):
        raise ValueError(f"its dtype {dtype} is not a number (bfloat16 is lost in .npy).")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"its shape {shape} is not valid.")
    num_bytes, num_found = math.prod(shape) * dtype.itemsize, file_size - file.tell()
    if num_bytes != num_found:
        raise ValueError(f"its data must have {num_bytes} bytes, found {num_found}.")
    order = "F" if is_fortran else "C"
    return Member(shape, dtype, num_bytes, lambda: read_array(file, dtype, shape, order))


def open_npz(file: BinaryIO, file_size: int) -> dict[str, Member]:
    """Reads what a .npz file holds.

    Args:
      file: Binary file.
      file_size: Its size in bytes; what is unpacked may be 64 times that, and 256 MiB.

    Returns:
      A flat dict from name to array, to be read while the file is open.

    Raises:
      ValueError: If it is not a whole .npz file of numbers, or a bomb.

    Example:
      >>> import io
      >>> file = io.BytesIO()
      >>> prepare_npz({"w": np.zeros(1, np.int8)})(file)
      >>> open_npz(file, file.tell())["w"].read()
      array([0], dtype=int8)
    """
    with _zip_errors():
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        if len({member.filename for member in members}) != len(members):
            raise ValueError("two members have the same name.")
        total = sum(member.file_size for member in members)
        if total > _ALWAYS_ALLOWED_BYTES + _MAX_GROWTH * file_size:
            raise ValueError(f"{total:,} bytes packed into {file_size:,} are refused as a bomb.")
        arrays = {}
        for member in members:
            if not member.filename.endswith(".npy"):
                raise ValueError(f"member {member.filename!r} is not an array.")
            with _opened_member(archive, member) as array:
                read = functools.partial(_read_member, archive, member)
                name = member.filename.removesuffix(".npy")
                arrays[name] = dataclasses.replace(array, read=read)
        return arrays


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with _zip_errors(), _opened_member(archive, member) as array:
        return array.read()


@contextlib.contextmanager
def _opened_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[Member]:
    with archive.open(member) as opened:
        try:
            yield open_npy(opened, member.file_size)
        except ValueError as error:
            raise ValueError(f"member {member.filename!r}: {error}") from error


@contextlib.contextmanager
def _zip_errors() -> Iterator[None]:
    """Turns what damage raises into ValueError; zipfile has no closed list of it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek out of bounds
            raise
        raise ValueError(str(error) or type(error).__name__) from error
