"""Entropy coded codes in files: exact, never larger than packed, and of the reported size."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jaxclip import checkpoints, compress
from jaxclip._core.grids import Grid
from jaxclip.checkpoints import CheckpointError
from jaxclip.checkpoints.format.codes import restore_leaf
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.coding.trellis import levels_of
from jaxclip.lowbit.packing import num_packed_bytes
from jaxclip.lowbit.scale_formats import decode_log8, encode_log8


def drawn_params() -> dict:
    rng = np.random.default_rng(0)
    return {
        "a": {"kernel": rng.standard_normal((64, 48)).astype(np.float32)},
        "b": [rng.standard_t(3, (40, 40)).astype(np.float32), np.arange(5, dtype=np.int8)],
        "tiny": np.ones((2, 1), np.float32),
    }


@pytest.mark.thorough
@pytest.mark.parametrize("coding", [None, "huffman", "ans", "lanes"])
@pytest.mark.parametrize("bits", [1, "ternary", 3, 4, 8])
def test_coded_codes_come_back_and_the_reported_size_is_the_files(coding, bits, path):
    small = compress(drawn_params(), bits)
    checkpoints.save(path, small, coding=coding)
    loaded = checkpoints.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, small))
    assert size_report(small, coding).total_bytes == path.stat().st_size
    inspected = checkpoints.inspect(path)
    assert inspected.total_bytes == path.stat().st_size
    assert inspected.overhead_bytes > 0


@pytest.mark.thorough
def test_coding_makes_files_smaller_and_is_left_out_where_it_would_not(path, tmp_path):
    small = compress(drawn_params(), 8, rule=20.0)  # steps of .16: 4.7 bits of entropy
    checkpoints.save(path, small)
    coded = tmp_path / "coded.safetensors"
    checkpoints.save(coded, small, coding="huffman")
    assert coded.stat().st_size < 0.8 * path.stat().st_size
    sizes = {leaf.path: leaf.stored_bytes for leaf in checkpoints.inspect(coded).leaves}
    assert sizes["tiny"] == 2 + 4  # packed


@pytest.mark.thorough
@pytest.mark.parametrize("coding", ["huffman", "lanes"])
def test_every_flipped_bit_of_a_coded_file_is_refused(coding, path):
    small = compress({"kernel": drawn_params()["a"]["kernel"][:20, :8]}, 8, rule=20.0)
    checkpoints.save(path, small, coding=coding)
    assert codings_in(path) == {"kernel": coding}
    data = path.read_bytes()
    assert len(data) < 1000
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            checkpoints.load(path)


def codes_that_favour_each_coding() -> dict[str, QuantizedArray]:
    rng = np.random.default_rng(0)
    count = 60_000
    # Of few values that are far apart; of stretches as large but not alike; of rows that differ.
    stretches = 2 * rng.integers(-4, 4, count) + np.arange(count) // 15_000 % 2
    rows = np.where(np.arange(count) // 4000 % 2, 0.3, 8.0)
    codes = {
        "even": rng.choice([-90, 7, 20, 77], count),
        "uneven": stretches,
        "rows": rng.standard_normal(count) * rows,
        "uniform": rng.integers(-128, 128, count),
    }
    return {
        name: QuantizedArray(
            np.clip(np.round(values), -128, 127).astype(np.int8),
            np.ones(1, np.float32),
            Grid(8, axis=None),
            np.dtype(np.float32),
        )
        for name, values in codes.items()
    }


def codes_on_a_path() -> QuantizedArray:
    codes = np.round(2 * np.random.default_rng(1).standard_normal((60, 300))).astype(np.int8)
    levels = np.asarray(levels_of(codes)).astype(np.int8)
    scale = np.ones((1, 1), np.float32)
    return QuantizedArray(levels, scale, Grid(8, axis=None), np.dtype(np.float32))


def codings_in(path: pathlib.Path) -> dict[str, str | None]:
    inner = json.loads(safetensors.safe_open(path, "np").metadata()["jaxclip"])
    return {name: info["coding"] for name, info in inner["leaves"].items()}


def sizes_of_codes(path: pathlib.Path) -> dict[str, int]:
    with safetensors.safe_open(path, "np") as file:
        return {n: file.get_tensor(n).size for n in file.keys() if n.endswith(":codes")}  # noqa: SIM118


def test_smallest_takes_the_smallest_of_all_codings_and_packed_for_each_leaf(tmp_path):
    tree, paths = codes_that_favour_each_coding() | {"path": codes_on_a_path()}, {}
    for coding in (None, "huffman", "ans", "lanes", "smallest"):
        paths[coding] = tmp_path / f"{coding}.safetensors"
        checkpoints.save(paths[coding], tree, coding=coding)
        loaded = checkpoints.load(paths[coding])
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, tree))
    smallest = paths.pop("smallest")
    expected = {"even": "ans", "uneven": "huffman", "rows": "lanes", "path": "lanes"}
    assert codings_in(smallest) == expected | {"uniform": None}
    sizes = [sizes_of_codes(path) for path in paths.values()]
    assert sizes_of_codes(smallest) == {n: min(each[n] for each in sizes) for n in sizes[0]}
    assert size_report(tree, "smallest").total_bytes == smallest.stat().st_size


def test_the_header_of_smallest_takes_at_most_4_bytes_a_leaf_more_than_that_of_ans():
    tree = {f"w{i}": codes_that_favour_each_coding()["even"] for i in range(13)}
    huffman, ans, smallest = (size_report(tree, c) for c in ("huffman", "ans", "smallest"))
    assert smallest.leaves == ans.leaves
    assert ans.total_bytes < smallest.total_bytes <= ans.total_bytes + 4 * 13 + 7
    assert smallest.total_bytes < huffman.total_bytes


def test_smallest_does_without_ans_where_its_package_is_missing(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    checkpoints.save(path, codes_that_favour_each_coding(), coding="smallest")
    expected = {"even": "huffman", "uneven": "huffman", "rows": "lanes", "uniform": None}
    assert codings_in(path) == expected


def test_a_path_of_a_trellis_takes_fewer_bits_in_lanes(tmp_path):
    for coding in ("ans", "lanes"):
        checkpoints.save(tmp_path / f"{coding}.safetensors", codes_on_a_path(), coding=coding)
    ans, lanes = (
        8 * sum(sizes_of_codes(tmp_path / f"{n}.safetensors").values()) / (60 * 300)
        for n in ("ans", "lanes")
    )
    assert lanes < ans - 0.75


def test_an_unknown_coding_is_refused_before_the_work(path):
    with pytest.raises(ValueError, match="coding must be one of"):
        checkpoints.save(path, drawn_params(), coding="zip")
    assert not path.exists()


# --- Bytes that no writer makes ---------------------------------------------------------------


def values_in(packed: bytes, bits: int | str, count: int) -> tuple[list[int], bool]:
    """Unsigned values of packed codes, and True if the bytes are theirs, by long division."""
    base, per_byte = (3, 5) if bits == "ternary" else (2**bits, None)
    digits, is_canonical = [], True
    if per_byte:
        for byte in packed:
            for _ in range(per_byte):
                byte, digit = divmod(byte, base)
                digits.append(digit)
            is_canonical &= byte == 0
    else:
        number = int.from_bytes(packed, "little")
        for _ in range(count):
            number, digit = divmod(number, base)
            digits.append(digit)
        digits.append(number)
    return digits[:count], is_canonical and not any(digits[count:])


@pytest.mark.parametrize("levels", ["full", "narrow"])
@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, 5, 6, 8])
def test_packed_bytes_are_read_if_and_only_if_a_writer_makes_them(bits, levels):
    rng = np.random.default_rng(0)
    low, high = Grid(bits, levels=levels).code_range
    verdicts = set()
    for count in range(18):
        grid = Grid(bits, levels=levels, axis=None)
        like = QuantizedArray(jax.ShapeDtypeStruct((count,), np.int8), None, grid, np.float32)
        size = num_packed_bytes(count, bits)
        for kind in range(40):
            packed = rng.integers(0, 256 if kind % 2 else 243, size).astype(np.uint8)
            if kind % 4 < 2 and size:
                packed[-1] %= 2 ** rng.integers(1, 9)
            values, is_canonical = values_in(packed.tobytes(), bits, count)
            wanted = [2 * v - 1 if bits == 1 else v + low for v in values]
            is_canonical &= all(low <= code <= high for code in wanted)
            verdicts.add(is_canonical)
            if is_canonical:
                leaf = restore_leaf("w", like, np.ones(1, np.float32), packed)
                assert leaf.qvalue.tolist() == wanted
            else:
                with pytest.raises(ValueError, match="'w': codes are not"):
                    restore_leaf("w", like, np.ones(1, np.float32), packed)
    assert verdicts == {True, False} or (bits == 8 and levels == "full")


@pytest.mark.parametrize(
    "unit", [1.0, 0.7, 3.4e38, 2.0**-110, 2.0**-111, 0.0, -1.0, np.inf, np.nan]
)
def test_log8_bytes_are_read_if_and_only_if_a_writer_makes_them(unit):
    grid = Grid(4, axis=0, scale_dtype="log8")
    unit = np.float32(unit)
    verdicts = set()
    for lowest, highest in ((0, 256), (0, 1), (1, 2), (127, 129), (129, 256)):
        codes = np.arange(lowest, highest).astype(np.uint8)
        shape = (codes.size, 2)
        like = QuantizedArray(jax.ShapeDtypeStruct(shape, np.int8), None, grid, np.float32)
        stored = np.zeros(codes.size, np.uint8)
        try:
            with np.errstate(all="ignore"):
                again, largest = encode_log8(decode_log8(codes, unit))
            is_made = largest == unit and np.isfinite(unit) and np.array_equal(again, codes)
        except ValueError:
            is_made = False
        verdicts.add(bool(is_made))
        if is_made:
            leaf = restore_leaf("w", like, codes, stored, largest_scale=unit)
            np.testing.assert_array_equal(np.signbit(leaf.scale), codes >= 128)
        else:
            with pytest.raises(ValueError, match="'w': scales "):
                restore_leaf("w", like, codes, stored, largest_scale=unit)
    assert True in verdicts or not 2.0**-110 <= unit < np.inf
