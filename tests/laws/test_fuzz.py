"""Files that somebody made up: each is a tree or one error, and memory is bounded by its size.

Every input follows from a seed, so every run is the same. `JAXCLIP_FUZZ=50` runs 50 times as
many. An attacker can compute checksums, so all of them are right here.
"""

import copy
import dataclasses
import io
import json
import math
import os
import pathlib
import random
import re
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxclip import checkpoints
from jaxclip._core.grids import Grid
from jaxclip.checkpoints import CheckpointError, numpy_files, reading
from jaxclip.checkpoints.format import headers, layout
from jaxclip.checkpoints.format.writing import write_tree
from jaxclip.checkpoints.format.zeros import without_zeros
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.coding import entropy_coding
from oracles import recorded_trees
from oracles.made_up_files import damage_text, damage_value, header_of, nested

TIMES = int(os.environ.get("JAXCLIP_FUZZ", "1"))
CHECKSUM = rb'(\{"__metadata__":\{"jaxclip":"\{\\"header_crc\\":\\")[0-9a-f]{8}'
PATH = pathlib.Path("made-up.safetensors")
BITS = [1, "ternary", 2, 3, 4, 5, 6, 8]
FORMATS = ["float32", "float16", "bfloat16", "log8"]
# Codes that a byte may stand for, in memory and once more where they are put together.
BOMBS = [zlib.compress(bytes(size), 9, -15) for size in (10, 2**20)]
GROWTH, ALLOWANCE = 2 * 64, 2**16


@pytest.fixture
def allocations(monkeypatch) -> list[int]:
    """Bytes of every array that is asked for before there is anything in it."""
    asked, real = [], np.empty

    def empty(shape: Any, dtype: Any = float, *args: Any, **kwargs: Any) -> np.ndarray:
        num_bytes = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
        asked.append(num_bytes)
        assert num_bytes < 2**24, "such files are small"
        return real(shape, dtype, *args, **kwargs)

    monkeypatch.setattr(np, "empty", empty)
    # A constant costs nothing in "ans": here it may be large, but not this large.
    monkeypatch.setattr(entropy_coding, "_ALWAYS_ALLOWED", ALLOWANCE // 4)
    return asked


def read(data: bytes, allocations: list[int]) -> Any:
    """The tree in a file of ours or the flat dict in another's; None if it is refused."""
    allocations.clear()
    try:
        with reading.checkpoint_errors(PATH):
            source = reading._open_safetensors(io.BytesIO(data), len(data))
            tree = source.restore(source.read)
    except CheckpointError:
        tree = None
    else:
        check_values(source, tree)
        length = 8 + int.from_bytes(data[:8], "little")
        assert sum(source.num_bytes.values()) == len(data) - length
    assert max(allocations, default=0) <= GROWTH * len(data) + ALLOWANCE
    return tree


def check_values(source: reading.Source, tree: Any) -> None:
    """Values have the shapes and dtypes that were promised, and codes are of the grid."""
    is_flat = source.structure is None
    leaves = tree.values() if is_flat else jax.tree.leaves(tree, is_leaf=is_low_bit)
    for like, leaf in zip(source.leaves.values(), leaves, strict=True):
        assert type(like) is jax.ShapeDtypeStruct or is_low_bit(leaf)
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        if is_low_bit(leaf):
            leaf.validate()


def is_low_bit(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


# --- Headers ----------------------------------------------------------------------------------


def written(tree: Any, kind: str | None = None) -> tuple[dict, dict, bytes]:
    """The header of a tree, outer and inner part, and its data."""
    file = io.BytesIO()
    leaves = leaves_of(tree)
    plan = without_zeros(layout.plan_file(tree), leaves.__getitem__, kind)
    write_tree(file, plan, leaves.__getitem__, kind)
    data = file.getvalue()
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer.pop("__metadata__")["jaxclip"])
    del inner["header_crc"]
    return outer, inner, data[8 + length :]


def leaves_of(tree: Any) -> dict[str, Any]:
    return layout.plan_file(tree).leaves


def our_trees() -> list[tuple[dict, dict, bytes]]:
    old, new = recorded_trees.version_1(), recorded_trees.version_2()
    zeros = recorded_trees.version_6()
    sparse = dataclasses.replace(new["8"], qvalue=(new["8"].qvalue == 3).astype(np.int8))
    return [
        written({"grouped": old["grouped"], "c": old["channels"], "p": old["plain"], "w": None}),
        written({"s": new["scales"]["log8"], "z": [new["zeros"]["float16"], new["empty"]]}),
        written({"w": sparse, "b": np.arange(3, dtype=np.float32)}, "huffman"),
        written((old["single"], {"w": np.ones((2, 3), bool)})),
        written(np.arange(4, dtype=np.float16)),
        written({"w": zeros["rows"], "g": zeros["groups"][:, :8]}, "lanes"),
        written([zeros["packed"][:8], zeros["few"][:20]], "lanes"),
    ]


def foreign_header() -> tuple[dict, bytes]:
    tensors = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(0), "m": np.array([True])}
    data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.thorough
def test_our_headers_with_other_values_are_read_or_refused(allocations):
    rng, bases, num_read = random.Random(1), our_trees(), 0
    for _ in range(7000 * TIMES):
        outer, inner, data = copy.deepcopy(rng.choice(bases))
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            damage_value(outer if rng.random() < 0.3 else inner, rng)
        num_read += read(header_of(outer, inner) + data, allocations) is not None
    assert num_read > 100 * TIMES  # a key renamed, two of a kind exchanged


@pytest.mark.thorough
def test_our_headers_with_other_bytes_are_read_or_refused(allocations):
    rng, bases, num_read = random.Random(2), our_trees(), 0
    for _ in range(5000 * TIMES):
        outer, inner, data = rng.choice(bases)
        text = damage_text(header_of(outer, inner)[8:], rng)
        raw = header_of({}, {}, text=re.sub(CHECKSUM, rb"\g<1>00000000", text, count=1))
        num_read += read(raw + data, allocations) is not None
    assert num_read > 50 * TIMES


@pytest.mark.thorough
def test_headers_of_other_libraries_with_other_values_are_read_or_refused(allocations):
    rng, num_read = random.Random(3), 0
    for _ in range(5000 * TIMES):
        outer, data = foreign_header()
        if rng.random() < 0.4:
            raw = header_of({}, text=damage_text(header_of(outer)[8:], rng))
        else:
            for _ in range(rng.choice([1, 1, 2, 4])):
                damage_value(outer, rng)
            raw = header_of(outer)
        num_read += read(raw + data, allocations) is not None
    assert num_read > 50 * TIMES


@pytest.mark.parametrize("value", [nested(60, random.Random(0)), {"a": 0}, [0] * 1000])
def test_a_tree_of_one_leaf_many_times_is_refused(value, allocations):
    outer, inner, data = our_trees()[-1]
    assert read(header_of(outer, {**inner, "tree": value}) + data, allocations) is None


# --- Data behind headers that are right -------------------------------------------------------


def any_low_bit(rng: random.Random) -> QuantizedArray:
    """Shapes of a low-bit array of any kind."""
    shape = tuple(rng.choice([0, 1, 2, 3, 7, 40]) for _ in range(rng.randrange(4)))
    axis = rng.choice([None, None, *range(-len(shape), len(shape))])
    group_size = rng.choice([None, 1, 3]) if len(shape) > 1 else None
    bits, scale_dtype = rng.choice(BITS), rng.choice(FORMATS)
    choices = ["full", "full", "narrow"] + ["balanced"] * (bits in (1, 2, 3, 4))
    levels = rng.choice(choices)
    has_zero = bits != 1 and levels != "balanced" and rng.random() < 0.5
    grid = Grid(
        bits,
        levels=levels,
        axis=axis,
        group_size=group_size,
        zero_point=has_zero,
        scale_dtype=scale_dtype,
    )
    scale_shape = grid.scale_shape(shape)
    in_memory = jnp.dtype(scale_dtype.replace("log8", "float32"))
    return QuantizedArray(
        jax.ShapeDtypeStruct(shape, np.int8), jax.ShapeDtypeStruct(scale_shape, in_memory),
        grid, np.dtype(np.float32),
        jax.ShapeDtypeStruct(scale_shape, np.int8) if has_zero else None,
    )  # fmt: skip


def any_bytes(tensor: layout.Tensor, rng: random.Random) -> bytes:
    """Values that a tensor may have more often than not; never left to chance alone."""
    count, kind = math.prod(tensor.shape), rng.randrange(4)
    if kind == 0 or tensor.name.endswith(":codes"):
        return rng.randbytes(tensor.stop - tensor.start)
    if tensor.name.endswith(":zero"):
        return np.array([rng.randrange(-2, 2) for _ in range(count)], np.int8).tobytes()
    odd = [0.0, -1.0, np.nan, np.inf, 1e-45, 3e38, 1.0] if kind == 1 else [1.0]
    if tensor.dtype == "U8":
        return bytes(rng.randrange(256) if kind == 1 else 8 * i % 128 for i in range(count))
    with np.errstate(over="ignore"):
        return (
            np.array([rng.choice(odd) for _ in range(count)]).astype(tensor.numpy_dtype).tobytes()
        )


@pytest.mark.thorough
def test_any_bytes_for_the_tensors_of_a_low_bit_array_are_read_or_refused(allocations):
    rng, num_read = random.Random(4), 0
    for _ in range(2500 * TIMES):
        plan = layout.plan_file({"w": any_low_bit(rng)})
        parts = {tensor.name: any_bytes(tensor, rng) for tensor in plan.tensors}
        num_read += read(file_of(plan, parts, {}), allocations) is not None
    assert num_read > 250 * TIMES


def file_of(plan: layout.FilePlan, parts: dict[str, bytes], codings: dict) -> bytes:
    """A file with these bytes for its tensors."""
    checksums = {name: zlib.crc32(part) for name, part in parts.items()}
    data = b"".join(parts[tensor.name] for tensor in plan.tensors)
    return headers.make_header(plan, checksums, codings) + data


# --- Coded codes ------------------------------------------------------------------------------


def damage_coded(data: bytes, kind: str, rng: random.Random) -> bytes:
    """Another prefix, another table of counts, or other bytes."""
    choice = rng.randrange(5)
    if choice == 0:
        place = rng.randrange(len(data))
        return data[:place] + rng.randbytes(1) + data[place + rng.randrange(2) :]
    if choice == 1:
        return data[: rng.randrange(len(data))] + rng.randbytes(rng.choice([0, 1, 4, 8]))
    numbers = [0, 1, 2, 3, 255, 256, 2**16 - 1, 2**31, 2**32 - 1, len(data)]
    if kind == "huffman":
        beyond = rng.choice([0] * 12 + [*numbers, 2**40, 2**63, 2**64 - 1])
        lowest, k = rng.randrange(-128, 128), rng.choice([0, 1, 2, 3, 4, 5, 6, 8, 255])
        changed = struct.pack("<bBxxxxxxQ", lowest, k, beyond)
        if choice == 2:  # the codes are kept
            changed = data[:8] + changed[8:]
        return changed + (rng.choice(BOMBS) if choice == 3 else data[16:])
    if kind == "lanes":
        header = list(struct.unpack("<BBHIII", data[:16]))
        place = rng.randrange(len(header))
        header[place] = rng.choice(numbers) % 2 ** (8 * (1, 1, 2, 4, 4, 4)[place])
        tables = bytearray(data[16:60])
        for _ in range(choice):
            tables[rng.randrange(len(tables))] = rng.choice([0, 1, 14, 15, 16, 254, 255])
        return (struct.pack("<BBHIII", *header) if choice < 3 else data[:16]) + tables + data[60:]
    lowest, num_levels, size = struct.unpack("<bxHI", data[:8])
    counts = zlib.decompress(data[8 : 8 + size], -15)
    if choice == 2:
        return struct.pack("<bxHI", rng.randrange(-128, 128), num_levels, size) + data[8:]
    if choice == 3:
        return (
            struct.pack("<bxHI", lowest, rng.choice(numbers) % 2**16, rng.choice(numbers))
            + data[8:]
        )
    changed = bytearray(counts)
    for _ in range(2):
        place = 8 * rng.randrange(len(counts) // 8)
        changed[place : place + 8] = rng.choice([*numbers, 2**63, 2**64 - 1]).to_bytes(8, "little")
    table = zlib.compress(changed, 9, -15)
    return struct.pack("<bxHI", lowest, num_levels, len(table)) + table + data[8 + size :]


@pytest.mark.parametrize("kind", ["huffman", "ans", "lanes"])
def test_any_coded_bytes_give_as_many_codes_or_are_refused(kind, allocations):
    if kind == "ans":
        pytest.importorskip("constriction")
    rng, num_read = random.Random(5), 0
    draws = np.random.default_rng(5)
    bases = [np.zeros(0, np.int8), np.full(900, 3, np.int8)]
    bases += [draws.normal(0, s, n).round().astype(np.int8) for s, n in ((0.5, 700), (20, 300))]
    coded = [(codes.size, entropy_coding.encode_codes(codes, kind)) for codes in bases]
    for _ in range((1000 if kind == "lanes" else 3000) * TIMES):  # lanes take longer
        count, data = rng.choice(coded)
        data = damage_coded(data, kind, rng)
        count = rng.choice([count] * 6 + [0, 1, count + 1, 2**20, 2**20, 2**31, 2**40, 2**62])
        allocations.clear()
        try:
            codes = entropy_coding.decode_codes(data, kind, count)
        except ValueError:
            codes = None
        else:
            assert (codes.shape, codes.dtype) == ((count,), np.int8)
        num_read += codes is not None
        assert max(allocations, default=0) <= GROWTH * len(data) + ALLOWANCE
    # Lanes must end as they began, so that nearly all damage is found.
    assert num_read > (0 if kind == "lanes" else 30 * TIMES)


@pytest.mark.parametrize("kind", ["huffman", "ans", "lanes"])
def test_any_coded_bytes_in_a_file_are_read_or_refused(kind, allocations):
    if kind == "ans":
        pytest.importorskip("constriction")
    rng, num_read = random.Random(6), 0
    codes = np.random.default_rng(6).normal(0, 1.5, 600).round().clip(-8, 7).astype(np.int8)
    scale = np.ones((), np.float32)
    leaf = QuantizedArray(codes, scale.reshape(1), Grid(4, axis=None), np.dtype(np.float32))
    plan, coded = layout.plan_file(leaf), entropy_coding.encode_codes(codes, kind)
    for _ in range(500 * TIMES):
        data = damage_coded(coded, kind, rng)[:300]
        parts = {"array:codes": data, "array:scale": scale.tobytes()}
        shorter = plan.resized({"array:codes": len(data)})
        num_read += read(file_of(shorter, parts, {"array": kind}), allocations) is not None
    assert num_read > 0 or kind == "lanes"


# --- Indices ----------------------------------------------------------------------------------


def test_indices_with_other_values_give_the_same_tensors_warn_or_are_refused(tmp_path):
    rng, num_read = random.Random(7), 0
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    tensors = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.int8)}
    for (name, tensor), shard in zip(tensors.items(), shards, strict=True):
        safetensors.numpy.save_file({name: tensor}, tmp_path / shard)
    index = {"metadata": {"total_size": 16}, "weight_map": dict(zip(tensors, shards, strict=True))}
    with (tmp_path / "model.safetensors.index.json").open("wb", buffering=0) as file:
        for _ in range(2000 * TIMES):
            changed = copy.deepcopy(index)
            for _ in range(rng.choice([0, 1, 1, 2])):
                damage_value(changed, rng)
            text = json.dumps(changed).encode()
            file.seek(0)
            file.truncate(file.write(text if rng.random() < 0.6 else damage_text(text, rng)))
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    loaded = checkpoints.load(tmp_path)
            except CheckpointError:
                continue
            num_read += 1
            assert loaded.keys() == tensors.keys() or (loaded.keys() < tensors.keys() and said)
            assert all(np.array_equal(loaded[name], tensors[name]) for name in loaded)
    assert num_read > 100 * TIMES


# --- NumPy's files ----------------------------------------------------------------------------


def read_numpys(data: bytes, opener: Any, allocations: list[int]) -> bool:
    """True if a file of NumPy's is read, False if it is refused."""
    allocations.clear()
    try:
        members = opener(io.BytesIO(data), len(data))
        for member in members.values() if isinstance(members, dict) else [members]:
            array = member.read()
            assert (array.shape, array.dtype) == (member.shape, member.dtype)
    except ValueError:
        members = None
    assert max(allocations, default=0) <= GROWTH * len(data) + ALLOWANCE
    return members is not None


@pytest.mark.thorough
def test_numpys_arrays_with_other_headers_are_read_or_refused(allocations):
    rng, num_read = random.Random(9), 0
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }" + b" " * 9 + b"\n"
    for _ in range(2000 * TIMES):
        header, data = damage_text(text, rng)[:60_000], bytes(range(24))
        magic = rng.choice([b"\x93NUMPY\x01\0"] * 9 + [b"\x93NUMPY\x03\0"])
        content = magic + len(header).to_bytes(2, "little") + header + data
        num_read += read_numpys(content, numpy_files.open_npy, allocations)
        if rng.random() < 0.2:
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("w.npy", content)
            num_read += read_numpys(file.getvalue(), numpy_files.open_npz, allocations)
    assert num_read > 50 * TIMES


@pytest.mark.filterwarnings("ignore:members that are no arrays")
@pytest.mark.parametrize("is_packed", [False, True])
def test_archives_with_other_bytes_are_read_or_refused(
    is_packed, allocations, monkeypatch, tmp_path
):
    monkeypatch.setattr(reading, "ALWAYS_ALLOWED_BYTES", ALLOWANCE)
    rng, file = random.Random(10), io.BytesIO()
    save = np.savez_compressed if is_packed else np.savez
    save(file, w=np.arange(6.0), b=np.zeros((2, 0), np.int8))
    num_read, data, path = 0, file.getvalue(), tmp_path / "weights.npz"
    for _ in range(1000 * TIMES):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(len(changed))
            num_bytes = rng.choice([1, 1, 1, 4])
            changed[place : place + num_bytes] = rng.randbytes(num_bytes + (rng.random() < 0.05))
        path.write_bytes(changed)
        allocations.clear()
        try:
            with reading.open_source(path) as source:
                for name, leaf in source.leaves.items():
                    array = source.read(name)
                    assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype)
        except CheckpointError:
            continue
        finally:
            assert max(allocations, default=0) <= GROWTH * len(changed) + ALLOWANCE
        num_read += 1
    assert num_read > 10 * TIMES


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_memory_of_a_made_up_file_is_bounded_by_its_size(allocations):
    rng, bases = random.Random(8), our_trees()
    tracemalloc.start()
    try:
        for _ in range(150 * TIMES):
            outer, inner, data = copy.deepcopy(rng.choice(bases))
            damage_value(inner, rng)
            content = header_of(outer, inner) + data
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            read(content, allocations)
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before <= GROWTH * len(content) + 2**20
    finally:
        tracemalloc.stop()
