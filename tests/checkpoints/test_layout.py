"""The layout of files: trees to tensors and headers, and back."""

import collections
import dataclasses
import math
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import checkpoints, compress
from jaxclip._core.grids import Grid
from jaxclip.checkpoints.format import headers, layout, parsing
from jaxclip.checkpoints.format.codes import restore_leaf
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.packing import num_packed_bytes
from jaxclip.lowbit.quantizer import quantize
from oracles.made_up_files import header_of

WIDTHS = [1, "ternary", 2, 3, 4, 5, 6, 8]
DTYPES = [bool, *[f"{s}{n}" for s in "iu" for n in (1, 2, 4, 8)], "f2", "f4", "f8"]
DTYPES += [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2]


def names(tree) -> list[str]:
    return [tensor.name for tensor in layout.plan_file(tree).tensors]


def random_weights(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


# --- Names and structure ----------------------------------------------------------------


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": 1, "a": {"b": 2}},
        {"a:codes": 1, "a": 2, "a%3Acodes": 3},
        {"": {"": 1}, "/": 2, "%2F": 3},
        {"__metadata__": 1, "%5F_metadata__": 2},
        {"a": [1, 2], "a/0": 3},
        {"array": 1, "": 2},
    ],
)
def test_different_paths_have_different_names(tree):
    arrays = jax.tree.map(lambda x: np.full(1, x, np.int8), tree)
    assert len(set(names(arrays))) == len(jax.tree.leaves(tree))


@pytest.mark.thorough
def test_a_low_bit_leaf_is_two_tensors_and_keys_cannot_imitate_them():
    tree = {"w": quantize(random_weights(4, 4), 2), "w:codes": np.zeros(1, np.uint8)}
    assert sorted(names(tree)) == ["w%3Acodes", "w:codes", "w:scale"]


def test_a_bare_array_is_named_array():
    assert names(np.zeros(2)) == ["array"]


@pytest.mark.thorough
def test_tensors_are_aligned_and_fill_the_data():
    tree = {"a": np.zeros(3, bool), "b": np.zeros(5, np.float16), "c": np.zeros(1, np.float64)}
    plan = layout.plan_file({**tree, "d": quantize(random_weights(3, 7), Grid("ternary"))})
    position = 0
    for tensor in plan.tensors:
        assert tensor.start == position
        assert tensor.start % tensor.numpy_dtype.itemsize == 0
        position = tensor.stop
    assert position == plan.data_bytes
    assert len(headers.make_header(plan)) % 8 == 0


@pytest.mark.thorough
def test_a_plan_needs_only_shapes():
    weights = {"w": random_weights(8, 4), "b": jnp.zeros(4)}
    abstract = jax.eval_shape(lambda params: compress(params, bits=3), weights)
    report, planned = size_report(compress(weights, bits=3)), size_report(abstract)
    assert planned.total_bytes == report.total_bytes
    known = tuple(dataclasses.replace(x, threshold=None, density=None) for x in report.leaves)
    assert planned.leaves == known


def test_insertion_order_of_keys_does_not_change_the_header():
    one, two = {"a": np.zeros(1), "b": np.zeros(2)}, {"b": np.zeros(2), "a": np.zeros(1)}
    assert headers.make_header(layout.plan_file(one)) == headers.make_header(layout.plan_file(two))


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": {"lr": 0.1}}, "a/lr"),
        ({"n": 3}, "n"),
        ({"z": np.zeros(2, np.complex64)}, "z"),
        ({"o": np.array([None])}, "o"),
        ({"s": np.array(["text"])}, "s"),
        ({"v": np.zeros(2, "i4,f4")}, "v"),
        ({"i": jnp.zeros(2, jnp.int4)}, "i"),
        ({"m": np.ma.zeros(2)}, "m"),
        ({"x": {1: np.zeros(1), "a": np.zeros(1)}}, "x"),
        ({"x": collections.OrderedDict({1: np.zeros(1), "a": np.zeros(1)})}, "x"),
        ({"x": {(1, 2): np.zeros(1)}}, "x"),
        ({"x": "text"}, "x"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_its_path(tree, path):
    with pytest.raises(TypeError, match=f"'{path}'"):
        layout.plan_file(tree)


def test_depth_is_limited_and_cycles_end():
    deep = np.zeros(1)
    for _ in range(65):
        deep = [deep]
    cycle: dict = {}
    cycle["a"] = cycle
    for tree in (deep, cycle):
        with pytest.raises(ValueError, match="nested deeper than 64"):
            layout.plan_file(tree)


def test_a_lone_surrogate_is_no_key():
    with pytest.raises(ValueError, match="Unicode"):
        layout.plan_file({"\ud800": np.zeros(1)})


@pytest.mark.thorough
def test_parts_of_a_low_bit_array_must_fit():
    good = quantize(random_weights(4, 6), Grid(4))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), good)
    short = QuantizedArray(good.qvalue, good.scale[:, :5], Grid(4), good.dtype)
    wide = QuantizedArray(good.qvalue.astype(jnp.int32), good.scale, Grid(4), good.dtype)
    for bad in (stacked, short, wide):
        with pytest.raises(ValueError, match="'w' of shape"):
            layout.plan_file({"w": bad})


# --- Bytes --------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 39, 40, 41])
def test_packing_in_chunks_equals_packing_at_once(bits, count, monkeypatch):
    array = quantize(random_weights(count), bits)
    plan = layout.plan_file(array)
    codes = next(tensor for tensor in plan.tensors if tensor.name == "array:codes")
    whole = b"".join(chunk.tobytes() for chunk in plan.chunks(codes))
    monkeypatch.setattr(layout, "CODES_PER_CHUNK", 40)
    pieces = [chunk.tobytes() for chunk in plan.chunks(codes)]
    assert b"".join(pieces) == whole
    assert len(pieces) == math.ceil(count / 40)
    assert len(whole) == num_packed_bytes(count, bits) == codes.stop - codes.start
    packed = np.frombuffer(whole, np.uint8)
    restored = restore_leaf("w", array, np.asarray(array.scale), packed)
    np.testing.assert_array_equal(restored.qvalue, array.qvalue)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_arrays_are_stored_raw_in_row_major_little_endian(dtype):
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    for form in (array, np.asfortranarray(array), array[:, ::-1][:, ::-1]):
        plan = layout.plan_file(form)
        assert b"".join(c.tobytes() for c in plan.chunks(plan.tensors[0])) == array.tobytes()


def test_big_endian_arrays_are_stored_little_endian():
    plan = layout.plan_file(np.arange(3, dtype=">i4"))
    assert plan.tensors[0].dtype == "I32"
    stored = b"".join(c.tobytes() for c in plan.chunks(plan.tensors[0]))
    assert stored == np.arange(3, dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("bits", "levels", "codes"),
    [
        (1, "full", [0]),
        ("ternary", "full", [2]),
        (4, "full", [8]),
        (4, "narrow", [-8]),
        (8, "narrow", [-128]),
    ],
)
def test_codes_outside_the_grid_are_not_written(bits, levels, codes):
    scale = np.ones(1, np.float32)
    bad = QuantizedArray(np.int8(codes), scale, Grid(bits, levels=levels, axis=None), np.float32)
    plan = layout.plan_file({"w": bad})
    with pytest.raises(ValueError, match="'w': codes"):
        [list(plan.chunks(tensor)) for tensor in plan.tensors]


@pytest.mark.parametrize("scale", [0.0, -0.0, np.nan, np.inf, -np.inf])
def test_scales_that_are_no_scales_are_not_written(scale):
    good = quantize(random_weights(3), 4)
    bad = QuantizedArray(
        good.qvalue, jnp.full(1, scale, jnp.float32), Grid(4, axis=None), good.dtype
    )
    plan = layout.plan_file({"w": bad})
    with pytest.raises(ValueError, match="'w': scales"):
        [list(plan.chunks(tensor)) for tensor in plan.tensors]


@pytest.mark.parametrize(
    ("bits", "levels", "byte", "count"),
    [
        ("ternary", "full", 243, 5),  # the same as 0 to a careless decoder
        ("ternary", "full", 3 * 1, 1),  # padding trit not 0
        (1, "full", 0b10, 1),  # padding bit not 0
        (4, "full", 0x10, 1),
        (4, "narrow", 0x0F, 1),  # code 8 on a narrow grid
        (8, "narrow", 0xFF, 1),
        (2, "narrow", 0b11, 1),
    ],
)
def test_bytes_that_no_writer_makes_are_refused(bits, levels, byte, count):
    like = jax.eval_shape(lambda: quantize(jnp.ones(count), Grid(bits, levels=levels, axis=None)))
    with pytest.raises(ValueError, match="'w': codes"):
        restore_leaf("w", like, np.ones(1, np.float32), np.array([byte], np.uint8))


# --- Sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree",
    [
        {},
        None,
        {"a": np.zeros((0, 3)), "b": np.float32(1)},
        [({"k": np.zeros((3, 5), np.int8)}, None), {"ключ/": np.zeros(7, np.float16)}],
        {1: {2: np.ones(1)}, -3: np.ones(2)},
    ],
)
def test_reported_size_is_the_files_size_for_plain_trees(tree, tmp_path: pathlib.Path):
    checkpoints.save(tmp_path / "x.safetensors", tree)
    assert size_report(tree).total_bytes == os.path.getsize(tmp_path / "x.safetensors")


@pytest.mark.thorough
@pytest.mark.parametrize("bits", WIDTHS)
def test_reported_size_is_the_files_size_for_low_bit_trees(bits, tmp_path: pathlib.Path):
    params = {"layers": [{"w": random_weights(5, 7), "b": jnp.zeros(7, jnp.float32)}] * 2}
    small = compress(params, Grid(bits, group_size=3))
    checkpoints.save(tmp_path / "x.safetensors", small)
    report = size_report(small)
    assert report.total_bytes == os.path.getsize(tmp_path / "x.safetensors")
    stored = sum(leaf.stored_bytes for leaf in report.leaves)
    assert report.total_bytes == stored + report.overhead_bytes
    assert [leaf.path for leaf in report.leaves][:2] == ["layers/0/b", "layers/0/w"]
    assert report.leaves[1].bits == bits
    assert report.leaves[1].stored_bytes == num_packed_bytes(35, bits) + 4 * 14
    assert report.raw_bytes == 2 * (35 + 7) * 4


# --- Headers that lie -------------------------------------------------------------------------


def entry(dtype="U8", shape=(3,), offsets=(0, 3)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def good_header() -> tuple[dict, dict]:
    outer = {"w:scale": entry("F32", (1, 1), (0, 4)), "w:codes": entry("U8", (2,), (4, 6))}
    grid = {"bits": 4, "full_signed": True, "axis": None, "group_size": None}
    info = {**grid, "shape": [2, 2], "dtype": "F32"}
    crc = {"w:scale": "00000000", "w:codes": "00000000"}
    return outer, {"version": 1, "tree": {"w": 0}, "leaves": {"w": info}, "crc": crc}


def test_the_hand_made_header_is_read():
    contents = parsing.parse_header(header_of(*good_header()), 6)
    assert contents.tree["w"].shape == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "use a jaxclip that reads version 7"),
        ({"version": 2}, "description in the header"),
        ({"version": 3}, "description in the header"),
        ({"version": 4}, "description in the header"),
        ({"version": True}, "version"),
        ({"version": "1"}, "version"),
        ({"tree": {"v": 0}}, "missing"),
        ({"tree": {"w": 0, "v": 0}}, "missing"),
        ({"tree": {}}, "w:"),
        ({"tree": {"w": 1}}, "tree"),
        ({"tree": {"w": False}}, "tree"),
        ({"tree": ["set", 0]}, "tree"),
        ({"tree": ["int_keys", {"01": 0}]}, "tree"),
        ({"tree": ["int_keys", {"\u0664": 0}]}, "tree"),
        ({"tree": "w"}, "tree"),
        ({"crc": {}}, "checksum"),
        ({"crc": {"w:scale": "0000000G", "w:codes": "00000000"}}, "w:scale"),
        ({"crc": {"w:scale": 1, "w:codes": "00000000"}}, "w:scale"),
        ({"crc": None}, "checksums"),
        ({"leaves": []}, "leaves"),
        ({"leaves": {}}, "missing"),
    ],
)
def test_a_wrong_entry_in_our_metadata_is_refused(change, message):
    outer, inner = good_header()
    with pytest.raises(ValueError, match=message):
        parsing.parse_header(header_of(outer, {**inner, **change}), 6)


@pytest.mark.parametrize(
    "change",
    [{"bits": b} for b in (0, 7, 9, True, 2.0, "4", None, [4], 8, "ternary", 1)]
    + [{"shape": s} for s in ([2, 3], [-2, -2], [True, 4], [4.0], "22", None, [2**63, 0], [1] * 65)]
    + [{"axis": a} for a in (2, True, "0", [0, 5], {}, 0)]
    + [{"group_size": g} for g in (0, -1, True, "1", 1)]
    + [{"dtype": d} for d in ("I32", "F31", None, [])]
    + [{"full_signed": 1}, {"extra": 1}],
    ids=str,
)
def test_a_wrong_grid_is_refused_by_the_leafs_name(change):
    outer, inner = good_header()
    info = {**inner["leaves"]["w"], **change}
    with pytest.raises(ValueError, match=r"'w'|'w:|JSON"):
        parsing.parse_header(header_of(outer, {**inner, "leaves": {"w": info}}), 6)


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({"a": entry(offsets=(0, 4))}, 4),
        ({"a": entry(offsets=(1, 4))}, 4),
        ({"a": entry(), "b": entry(offsets=(2, 5))}, 5),
        ({"a": entry(), "b": entry(offsets=(0, 3))}, 3),
        ({"a": entry()}, 4),
        ({"a": entry()}, 2),
        ({"a": entry(shape=(-3,))}, 3),
        ({"a": entry(shape=(True, 3))}, 3),
        ({"a": entry(shape=(2**62, 4), offsets=(0, 0))}, 0),
        ({"a": entry(shape=[1] * 65 + [3])}, 3),
        ({"a": entry(offsets=(3, 0))}, 3),
        ({"a": entry(offsets=(0, 3, 3))}, 3),
        ({"a": entry(dtype="F4")}, 3),
        ({"a": entry(dtype=["U8"])}, 3),
        ({"a": {**entry(), "more": 1}}, 3),
        ({"a": []}, 3),
        ({"__metadata__": {"a": 1}}, 0),
        ({"__metadata__": []}, 0),
        ([], 0),
    ],
)
def test_tensors_that_do_not_fill_the_file_are_refused(entries, size):
    with pytest.raises(ValueError, match=r"tensor|safetensors"):
        parsing.parse_header(header_of(entries), size)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a":1,"a":1}',
        '{"a":NaN}',
        '{"a":1e999}',
        '{"a":-Infinity}',
        '{"a":' + "9" * 5000 + "}",
        "\ufeff{}",
        "{} {}",
        '{"a":\x00}',
    ],
    ids=lambda text: text[:12],
)
def test_json_that_is_not_a_header_is_refused(text):
    with pytest.raises(ValueError, match="not valid JSON"):
        parsing.parse_header(header_of({}, text=text), 0)


def test_bytes_that_are_not_utf8_are_refused():
    with pytest.raises(ValueError, match="not valid JSON"):
        parsing.parse_header(bytes(8) + b'{"\xff":1}', 0)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.sampled_from(["", "w", "F32", "list", 2**64]),
    lambda node: st.lists(node, max_size=3) | st.dictionaries(st.sampled_from(["w", "0"]), node),
    max_leaves=4,
)


@hypothesis.given(data=st.data(), value=json_values)
def test_any_value_anywhere_in_a_header_is_read_or_refused_as_a_value_error(data, value):
    outer, inner = good_header()
    node = {"outer": outer, "inner": inner}
    key = data.draw(st.sampled_from(["outer", "inner"]))
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
        node = node[key]
        places = range(len(node)) if isinstance(node, list) else sorted(node)
        key = data.draw(st.sampled_from(list(places)))
    if key not in ("outer", "inner"):
        node[key] = value
    try:
        contents = parsing.parse_header(header_of(outer, inner), 6)
    except ValueError:
        return
    assert set(contents.tensors) == {"w:scale", "w:codes"}


def test_a_header_larger_than_safetensors_allows_is_not_read():
    with pytest.raises(ValueError, match="100,000,000"):
        parsing.header_length((10**8 + 1).to_bytes(8, "little"), 2 * 10**8)


@pytest.mark.thorough
def test_too_many_leaves_for_a_header_are_refused_when_saving(monkeypatch):
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ValueError, match="100 leaves"):
        size_report([np.zeros(1)] * 100)
