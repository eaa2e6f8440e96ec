"""Files that ask for more time or memory than their bytes are worth, and large ones that do not."""

import json
import pathlib
import sys
import tracemalloc

import numpy as np
import pytest

from jaxclip import checkpoints
from jaxclip._core.grids import Grid
from jaxclip.checkpoints import CheckpointError, reading
from jaxclip.checkpoints.format import codes, parsing
from jaxclip.lowbit.arrays import QuantizedArray
from oracles.made_up_files import header_of


def write_sparse(path: pathlib.Path, start: bytes, size: int) -> None:
    """A file that begins with some bytes and goes on as a hole."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def plain_header(sizes: list[int]) -> bytes:
    """A header of one-dimensional float32 tensors."""
    entries, start = {}, 0
    for i, size in enumerate(sizes):
        offsets = [start, start + 4 * size]
        entries[f"layers.{i}.weight"] = {"dtype": "F32", "shape": [size], "data_offsets": offsets}
        start = offsets[1]
    return header_of(entries)


def peak_of(function) -> int:
    """The most memory that a call takes, in bytes."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- Many tensors -------------------------------------------------------------------------


def steps_of(function, *args) -> int:
    """The number of lines that a call runs and of functions that it calls, those in C included."""
    count = 0

    def on_call(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    def on_line(frame, event, arg):
        nonlocal count
        count += event == "line"
        return on_line

    old = sys.getprofile(), sys.gettrace()
    sys.setprofile(on_call)
    sys.settrace(on_line)
    try:
        function(*args)
    finally:
        sys.settrace(old[1])
        sys.setprofile(old[0])
    return count


@pytest.mark.parametrize("read", [checkpoints.load, checkpoints.inspect])
@pytest.mark.parametrize("kind", ["foreign", "low-bit"])
def test_a_further_tensor_takes_the_same_number_of_steps(kind, read, path):
    """Of 100, 200 and 300; a loop over pairs would take a number of its own for each."""
    steps = []
    for count in (100, 200, 300):
        if kind == "foreign":
            path.write_bytes(plain_header([1] * count) + bytes(4 * count))
        else:
            checkpoints.save(path, constants(count, 40), overwrite=True)
        read(path)  # what is done once in a process
        steps.append(steps_of(read, path))
    first, second = np.diff(steps) / 100
    assert abs(second - first) < 0.1 * first


@pytest.mark.parametrize("read", [checkpoints.load, checkpoints.inspect])
def test_what_leaves_of_one_description_have_in_common_is_done_once(read, path):
    steps = []
    for different in (False, True):
        sizes = [40 + different * i for i in range(100)]
        leaves = {f"{i:02}": constants(1, size)["00"] for i, size in enumerate(sizes)}
        checkpoints.save(path, leaves, overwrite=True)
        read(path)  # what is done once in a process
        steps.append(steps_of(read, path))
    # Reading and checking of the bytes remains for each leaf.
    assert steps[0] < 0.8 * steps[1]


def test_names_and_spaces_of_every_kind_are_parsed_as_json_has_them():
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    names = ["a", "", 'q"\\\n\t', "\u00fc\U0001f600", "{[,]}", "x" * 5000, "__metadata"]
    entries = {name: entry | {"data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    texts = [
        json.dumps({"__metadata__": {"a}": '"{', "b": ""}, **entries}, **options)
        for options in ({}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")})
    ]
    texts.append(json.dumps({**entries, "__metadata__": {}}, sort_keys=True))
    for text in texts:
        found = parsing.parse_header(header_of({}, text=text + "  "), len(names))
        assert {name: tensor.start for name, tensor in found.tensors.items()} == {
            name: i for i, name in enumerate(names)
        }


@pytest.mark.parametrize(
    "text",
    [
        '{"a":[]}',
        '{"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"U8","shape":[1,],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}]',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]} "b":1}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"dtype":"U8"}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"a":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}',
        '{"__metadata__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"__metadata__":{"a":"b","a":"b"}}',
        '{"__metadata__":{},"__metadata__":{}}',
        '{"__metadata__":{"a":"b",}}',
        "{a:1}",
    ],
)
def test_a_header_that_is_not_json_is_refused(text):
    with pytest.raises(ValueError, match="not valid JSON"):
        parsing.parse_header(header_of({}, text=text), 1)


# --- Memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b"[]," * 2**20 + b"[]]",
        b'{"a":[' + b"[]," * 2**20 + b"[]]}",
        b'{"__metadata__":[' + b"[]," * 2**20 + b"[]]}",
        b'{"__metadata__":{"a":"b","c":[' + b"[]," * 2**20 + b"[]]}}",
        b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(2**18)) + b"}}",
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 2**20 + b'1],"data_offsets":[0,4]}}',
    ],
    ids=lambda text: text[:28].decode(),
)
def test_a_header_of_many_values_takes_a_small_multiple_of_its_bytes(text, path):
    path.write_bytes(header_of({}, text=text) + bytes(4))

    def load():
        with pytest.raises(CheckpointError, match="not valid JSON"):
            checkpoints.load(path)

    assert peak_of(load) < 8 * len(text)


def test_our_own_metadata_of_many_values_is_refused_before_it_is_parsed(path):
    inner = {"version": 1, "tree": [[]] * 2**20, "leaves": {}, "crc": {}}
    header = header_of({}, inner)
    path.write_bytes(header)

    def load():
        with pytest.raises(CheckpointError, match="made to exhaust memory"):
            checkpoints.load(path)

    assert peak_of(load) < 8 * len(header)


@pytest.mark.parametrize("name", ["x.safetensors", "x.npy"])
def test_a_sparse_terabyte_is_refused_before_memory_is_allocated(name, tmp_path):
    path = tmp_path / name
    start = plain_header([2**38])
    if name == "x.npy":
        np.save(path, np.zeros(0, np.float32))
        start = path.read_bytes().replace(b"(0,), }" + b" " * 11, b"(274877906944,), }")
    write_sparse(path, start, len(start) + 2**40)
    assert checkpoints.inspect(path).raw_bytes == 2**40
    reads = [checkpoints.load, checkpoints.describe_file]
    reads.append(lambda path: checkpoints.verify_file(path, progress=False))
    reads.append(lambda path: checkpoints.compress_checkpoint(path, tmp_path / "y.safetensors"))
    for read in reads:
        with pytest.raises(
            CheckpointError, match="1,099,511,627,776 bytes, more than max_ratio=64"
        ):
            read(path)
    # Memory for it there is none either.
    with pytest.raises(CheckpointError, match=r"1,099,511,627,776 bytes do not fit into memory"):
        checkpoints.load(path, max_ratio=float("inf"))


def test_a_sparse_file_is_read_where_the_caller_allows_it(path, monkeypatch):
    monkeypatch.setattr(reading, "ALWAYS_ALLOWED_BYTES", 0)
    start = plain_header([2**20])
    write_sparse(path, start, len(start) + 2**22)
    with pytest.raises(CheckpointError, match="4,194,304 bytes, more than max_ratio=64"):
        checkpoints.load(path)
    assert not checkpoints.load(path, max_ratio=2000)["layers.0.weight"].any()
    path.write_bytes(path.read_bytes())  # without holes
    assert not checkpoints.load(path)["layers.0.weight"].any()
    for ratio, error in ((-1, ValueError), (float("nan"), ValueError), ("9", TypeError)):
        with pytest.raises(error, match="max_ratio"):
            checkpoints.load(path, max_ratio=ratio)


def constants(num_leaves: int, num_codes: int) -> dict:
    """Leaves whose codes are all equal, which take no bits in asymmetric numeral systems."""
    grid = Grid(4, axis=None)
    array = QuantizedArray(np.zeros(num_codes, np.int8), np.ones(1, np.float32), grid, np.float32)
    return {f"{i:02}": array for i in range(num_leaves)}


def test_coded_constants_beyond_the_allowance_are_refused_before_they_are_decoded(
    path, monkeypatch
):
    pytest.importorskip("constriction")
    monkeypatch.setattr(codes, "ALWAYS_ALLOWED_BYTES", 2**40)  # of a writer who wants to harm
    checkpoints.save(path, constants(20, 2**16), coding="ans")
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(reading, "ALWAYS_ALLOWED_BYTES", 2**17)
    with pytest.raises(CheckpointError, match="bytes, more than max_ratio=64 times"):
        checkpoints.load(path)
    assert len(checkpoints.load(path, max_ratio=1000)) == 20


def test_what_is_written_is_read_without_lifting_a_limit(path, monkeypatch):
    pytest.importorskip("constriction")
    for module in (reading, codes):
        monkeypatch.setattr(module, "ALWAYS_ALLOWED_BYTES", 2**17)
    tree = constants(20, 2**16)
    checkpoints.save(path, tree, coding="ans")
    assert len(checkpoints.load(path)) == 20
    assert checkpoints.inspect(path).total_bytes == path.stat().st_size
    report = checkpoints.size_report(tree, "ans")
    assert report.total_bytes == path.stat().st_size
    stored = [leaf.stored_bytes for leaf in report.leaves]
    assert sum(size < 2**14 for size in stored) == 2  # coded; the others are packed
