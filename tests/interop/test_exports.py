"""Exports, read by the libraries they are for, and by readings that share no code with ours.

`recorded/record_compressed_tensors.py` made `recorded/compressed_tensors.json`.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jaxclip
from jaxclip import checkpoints, interop
from jaxclip._core.grids import Grid, code_range
from jaxclip.interop import destination
from jaxclip.lowbit.arrays import QuantizedArray

FOLDER = pathlib.Path(__file__).parents[1] / "peers" / "recorded"


def random_weights(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def quantized(codes: Any, scale: Any, bits: Any, axis: Any = 0, group_size=None, zero=None):
    """A low-bit array with the codes and scales given."""
    return QuantizedArray(
        qvalue=jnp.asarray(codes, jnp.int8),
        scale=jnp.asarray(scale, jnp.float32),
        grid=Grid(bits, axis=axis, group_size=group_size, zero_point=zero is not None),
        dtype=jnp.dtype(jnp.float32),
        zero=None if zero is None else jnp.asarray(zero, jnp.int8),
    )


def drawn(bits: Any, shape: tuple[int, int], group_size: int | None = None, axis: Any = 0):
    """A low-bit matrix with every kind of code and scales of both signs."""
    rng = np.random.default_rng(1)
    low, high = code_range(bits)
    codes = rng.integers(low, high + 1, shape)
    codes = np.where(codes == 0, 1, codes) if bits == 1 else codes
    scale_shape = Grid(bits, axis=axis, group_size=group_size).scale_shape(shape)
    return quantized(codes, rng.normal(size=scale_shape), bits, axis, group_size)


def expected_values(q: QuantizedArray) -> np.ndarray:
    """code * scale in float64, for a matrix with one scale, one a row or one a group in a row."""
    codes, scale = np.asarray(q.qvalue, np.float64), np.asarray(q.scale, np.float64)
    return codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)


# --- safetensors ------------------------------------------------------------------------


def model() -> dict[str, Any]:
    return {
        "layers": [
            {
                "kernel": jaxclip.quantize(random_weights(6, 4), jaxclip.Grid(4)),
                "bias": np.arange(4),
            },
            {"kernel": jnp.asarray(random_weights(4, 2)), "scale": random_weights(2)},
        ],
        "half": random_weights(3, dtype=ml_dtypes.bfloat16),
    }


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.float16, jnp.bfloat16, np.float64])
def test_safetensors_loads_what_decompress_gives(tmp_path, dtype):
    path = tmp_path / "net.safetensors"
    interop.to_safetensors(path, model(), dtype=dtype)
    loaded = safetensors.numpy.load_file(path)
    first, second = jaxclip.decompress(model())["layers"]
    expected = {
        "layers.0.kernel": first["kernel"],
        "layers.0.bias": first["bias"],
        "layers.1.kernel": second["kernel"],
        "layers.1.scale": second["scale"],
        "half": model()["half"],
    }
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        array = np.asarray(array)
        if dtype is not None and name != "layers.0.bias":
            array = array.astype(dtype)
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array), name


def test_the_file_says_its_format_for_transformers_and_tensors_are_aligned(tmp_path):
    path = tmp_path / "net.safetensors"
    interop.to_safetensors(path, {"a": np.ones(3, np.int8), "b": np.ones(3)})
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header["b"]["data_offsets"] == [0, 24]  # the wider dtype first


def test_names_are_the_keys_as_they_are(tmp_path):
    path = tmp_path / "net.safetensors"
    tree = {"a/b": {"c:d": np.zeros(1)}, "é": np.ones(2), 3: [np.full(1, 2.0)]}
    interop.to_safetensors(path, {str(k): v for k, v in tree.items()}, separator="/")
    assert set(safetensors.numpy.load_file(path)) == {"a/b/c:d", "é", "3/0"}


def test_arrays_that_are_not_in_row_major_order_are_written_in_it(tmp_path):
    path = tmp_path / "net.safetensors"
    w = random_weights(4, 6)
    tree = {"t": w.T, "strided": w[::2, ::3], "big": w.astype(">f4"), "scalar": np.float32(2)}
    interop.to_safetensors(path, tree)
    loaded = safetensors.numpy.load_file(path)
    assert loaded["scalar"].shape == ()
    for name, array in tree.items():
        assert np.array_equal(loaded[name], array), name


def test_leaves_of_one_name_are_refused(tmp_path):
    tree = {"a": {"b": np.zeros(1)}, "a.b": np.ones(1)}
    with pytest.raises(ValueError, match=r"two leaves have the name 'a\.b'"):
        interop.to_safetensors(tmp_path / "net.safetensors", tree)
    with pytest.raises(ValueError, match="'__metadata__', which safetensors keeps"):
        interop.to_safetensors(tmp_path / "net.safetensors", {"__metadata__": np.zeros(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": {"w": np.full(2, 1e6)}}, ValueError, r"'a\.w' .*not finite in float16: 1000000\.0"),
        ({"w": 0.5}, TypeError, "'w' is the Python number"),
        ({"w": jax.ShapeDtypeStruct((2,), np.float32)}, TypeError, "'w' has no values"),
        ({"w": np.zeros(2, complex)}, TypeError, "'w' has dtype complex128"),
        ({"w": jax.random.key(0)}, TypeError, "'w' has dtype key.*key_data"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_leaves_the_old_one(tmp_path, tree, error, message):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        interop.to_safetensors(path, tree, dtype=np.float16, overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_infinite_entries_stay_infinite(tmp_path):
    path = tmp_path / "net.safetensors"
    interop.to_safetensors(path, {"w": np.array([np.inf, -1.0])}, dtype=np.float16)
    assert np.array_equal(safetensors.numpy.load_file(path)["w"], [np.inf, -1])


@pytest.mark.parametrize("dtype", [np.int8, bool, "int32"])
def test_a_dtype_that_is_not_floating_is_refused(tmp_path, dtype):
    with pytest.raises(TypeError, match="dtype must be floating"):
        interop.to_safetensors(tmp_path / "net.safetensors", {}, dtype=dtype)


def every_export(path: pathlib.Path, **arguments: Any) -> list:
    tree = {"weight": drawn(4, (2, 32))}
    return [
        lambda: interop.to_safetensors(path, tree, **arguments),
        lambda: interop.to_compressed_tensors(path, tree, **arguments),
        lambda: interop.to_gguf(path, tree, "llama", **arguments),
    ]


@pytest.mark.parametrize("i", [0, 1, 2], ids=["safetensors", "compressed_tensors", "gguf"])
def test_an_existing_file_is_replaced_only_when_asked(tmp_path, i):
    if i == 2:
        pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        every_export(path)[i]()
    assert path.read_bytes() == b"old"
    path.chmod(0o640)
    every_export(path, overwrite=True)[i]()
    assert path.stat().st_size > 100
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(FileNotFoundError, match="no directory"):
        every_export(tmp_path / "missing" / "file")[i]()
    assert list(tmp_path.iterdir()) == [path]


# --- compressed-tensors -----------------------------------------------------------------


def unpacked(words: np.ndarray, num_bits: int, columns: int) -> np.ndarray:
    """Codes from words: code i of a row is bits [i * num_bits, (i + 1) * num_bits), plus half."""
    per_word = 32 // num_bits
    codes = np.zeros((len(words), columns), np.int64)
    for i in range(columns):
        word = words[:, i // per_word].astype(np.int64) & 0xFFFFFFFF
        codes[:, i] = (word >> (num_bits * (i % per_word))) & (2**num_bits - 1)
    return codes - 2 ** (num_bits - 1)


def exported(tmp_path: pathlib.Path, tree: Any, **arguments: Any) -> tuple[dict, dict]:
    path = tmp_path / "model.safetensors"
    config = interop.to_compressed_tensors(path, tree, overwrite=True, **arguments)
    return safetensors.numpy.load_file(path), config


def test_a_word_is_that_worked_by_hand(tmp_path):
    codes = np.array([[-8, -7, 0, 1, 7, 6, 5, 4, -8]])
    tensors, _ = exported(tmp_path, {"a": {"weight": quantized(codes, [[0.5]], 4)}})
    # Unsigned 0, 1, 8, 9, f, e, d, c, the first lowest: 0xcdef9810; then 0 and padding.
    words = np.array([[0xCDEF9810, 0]], np.uint32).view(np.int32)
    assert np.array_equal(tensors["a.weight_packed"], words)
    assert tensors["a.weight_packed"].dtype == np.int32
    assert np.array_equal(tensors["a.weight_shape"], [1, 9])
    assert tensors["a.weight_shape"].dtype == np.int64
    assert np.array_equal(tensors["a.weight_scale"], [[0.5]])


@pytest.mark.parametrize("group_size", [None, 16, 48, 100], ids=lambda g: f"group {g}")
@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, 5, 6, 8])
def test_codes_and_scales_read_independently_give_the_weights(tmp_path, bits, group_size):
    q = drawn(bits, (5, 48), group_size)
    tensors, config = exported(tmp_path, {"a": {"weight": q}})
    weights = config["config_groups"]["group_0"]["weights"]
    assert weights["num_bits"] == (4 if bits in (1, "ternary", 2, 3, 4) else 8)
    is_grouped = group_size == 16
    assert weights["strategy"] == ("group" if is_grouped else "channel")
    assert weights["group_size"] == (16 if is_grouped else None)
    codes = unpacked(tensors["a.weight_packed"], weights["num_bits"], 48)
    scale = tensors["a.weight_scale"].astype(np.float64)
    assert scale.shape == (5, 3 if is_grouped else 1)
    assert np.array_equal(codes * np.repeat(scale, 48 // scale.shape[1], 1), expected_values(q))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_zero_points_are_packed_along_the_outputs(tmp_path, bits):
    rng = np.random.default_rng(2)
    low, high = code_range(bits)
    codes, zero = (rng.integers(low, high + 1, shape) for shape in [(5, 48), (5, 3)])
    scale = rng.uniform(1, 2, (5, 3)).astype(np.float32)
    q = quantized(codes, scale, bits, 0, 16, zero)
    tensors, config = exported(tmp_path, {"weight": q})
    num_bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    assert np.array_equal(unpacked(tensors["weight_zero_point"].T, num_bits, 5).T, zero)
    assert np.array_equal(unpacked(tensors["weight_packed"], num_bits, 48), codes)
    scales, zeros = np.repeat(scale.astype(float), 16, 1), np.repeat(zero, 16, 1)
    assert np.allclose(jaxclip.dequantize(q), scales * (codes - zeros), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "log8"])
def test_scales_of_other_formats_are_written_as_float32(tmp_path, scale_dtype):
    q = jaxclip.quantize(random_weights(4, 32), jaxclip.Grid(4, axis=0, scale_dtype=scale_dtype))
    tensors, _ = exported(tmp_path, {"weight": q.with_code_dtype(jnp.int4)})
    assert tensors["weight_scale"].dtype == np.float32
    codes = unpacked(tensors["weight_packed"], 4, 32)
    weights = codes.astype(np.float32) * tensors["weight_scale"]
    assert np.array_equal(weights, np.asarray(jaxclip.dequantize(q)))


def test_one_scale_for_a_matrix_is_repeated_for_each_output(tmp_path):
    tensors, config = exported(tmp_path, {"weight": drawn(4, (3, 8), axis=None)})
    assert tensors["weight_scale"].shape == (3, 1)
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"


def test_the_configuration_names_what_is_packed_and_what_is_not(tmp_path):
    tree = {
        "embed": {"weight": random_weights(7, 8)},
        "norm": {"weight": random_weights(8)},
        "a": {"weight": drawn(4, (4, 8)), "bias": random_weights(4)},
        "b": {"weight": drawn(8, (4, 8), 4)},
    }
    tensors, config = exported(tmp_path, tree, dtype=jnp.bfloat16)
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["embed"]
    targets = {k: g["targets"] for k, g in config["config_groups"].items()}
    assert targets == {"group_0": ["Linear"], "group_1": ["b"]}
    assert json.loads(json.dumps(config)) == config
    for name in ("embed.weight", "norm.weight", "a.bias", "a.weight_scale", "b.weight_scale"):
        assert tensors[name].dtype == ml_dtypes.bfloat16
    assert np.array_equal(tensors["a.bias"], tree["a"]["bias"].astype(ml_dtypes.bfloat16))


def record_module() -> Any:
    spec = importlib.util.spec_from_file_location(
        "record_compressed_tensors", FOLDER / "record_compressed_tensors.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = json.loads((FOLDER / "compressed_tensors.json").read_text())


def assert_like_theirs(tmp_path: pathlib.Path, case: dict[str, Any]) -> None:
    group_size, zero = case["group_size"], case["zero"]
    q = quantized(case["codes"], case["scale"], case["num_bits"], 0, group_size, zero)
    tensors, config = exported(tmp_path, {"weight": q})
    weights = config["config_groups"]["group_0"]["weights"]
    assert weights["symmetric"] is (zero is None)
    assert ("weight_zero_point" in tensors) is (zero is not None)
    if zero is not None:
        assert np.array_equal(tensors["weight_zero_point"], case["weight_zero_point"])
    assert np.array_equal(tensors["weight_packed"], case["weight_packed"])
    assert np.array_equal(tensors["weight_shape"], case["weight_shape"])
    assert np.array_equal(tensors["weight_scale"], np.float32(case["scale"]))
    # Their product is rounded to float32, as ours is.
    assert np.array_equal(np.float32(case["weight"]), np.asarray(jaxclip.dequantize(q)))


@pytest.mark.parametrize("case", RECORD["cases"])
def test_compressed_tensors_packed_and_unpacked_the_same(tmp_path, case):
    assert_like_theirs(tmp_path, case)


def test_compressed_tensors_packs_and_unpacks_the_same_here_and_now(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors needs torch")
    for case in record_module().record()["cases"]:
        assert_like_theirs(tmp_path, case)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": drawn(4, (2, 8))}, "'w' has codes, so it must be a matrix whose name ends in"),
        ({"weight": quantized(np.ones((2, 2, 2)), np.ones((2, 1, 1)), 4)}, r"shape \(2, 2, 2\)"),
        ({"a.weight": drawn(4, (2, 8), axis=1)}, r"'a\.weight' must be \(outputs, inputs\)"),
        ({"weight": drawn(4, (8, 8), 4, axis=1)}, r"got axis=1\. Transpose"),
        ({"weight": drawn(4, (2, 8), 3)}, "8 inputs, which must be a multiple of .*group_size=3"),
        ({"weight": random_weights(2, 2)}, "no QuantizedArray leaf: compress it first"),
        ({"weight": quantized([[9]], [[1.0]], 4)}, "'weight': codes are not in the range"),
        ({"weight": quantized([[1]], [[1e-9]], 4)}, "'weight' has a scale that is 0 in float16"),
        ({"weight": quantized([[1]], [[1e9]], 4)}, "'weight_scale' .*not finite in float16"),
        (
            {"weight": drawn(4, (2, 8)), "weight_scale": random_weights(2)},
            "two tensors would have the name 'weight_scale'",
        ),
    ],
)
def test_what_the_layout_has_not_is_refused_by_name(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        exported(tmp_path, tree, dtype=np.float16)
    assert list(tmp_path.iterdir()) == []


# --- GGUF -------------------------------------------------------------------------------


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="the gguf package is in the extra gguf")


def read_gguf(gguf: Any, path: pathlib.Path) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF's type and the values of each tensor, by the gguf package alone."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        is_plain = tensor.tensor_type.name[0] in "FI"
        values = tensor.data if is_plain else gguf.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = (tensor.tensor_type.name, np.array(values).reshape(shape))
    return tensors


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_gguf_package_reads_every_leaf(tmp_path, gguf, kind):
    path = tmp_path / "net.gguf"
    w = random_weights(6, 64)
    tree = {
        "blk": [{"w": jnp.asarray(w), "stack": w.reshape(2, 3, 64), "b": w[0]}],
        "odd": w[:, :33],
        "half": w[:, :5].astype(np.float16),
        "brain": w[:, :64].astype(ml_dtypes.bfloat16),
        "ids": np.arange(5, dtype=np.int32),
        "scalar": np.float32(2.5),
    }
    interop.to_gguf(path, tree, "llama", kind=kind)
    read = read_gguf(gguf, path)
    types = {name: type_name for name, (type_name, _) in read.items()}
    assert types == {
        "blk.0.w": kind,
        "blk.0.stack": kind,
        "blk.0.b": "F32",
        "odd": "F32",
        "half": "F16",
        "brain": kind,
        "ids": "I32",
        "scalar": "F32",
    }
    for name, exact in [("blk.0.b", w[0]), ("odd", w[:, :33]), ("ids", tree["ids"])]:
        assert np.array_equal(read[name][1], exact)
    assert np.array_equal(read["half"][1], tree["half"])
    assert read["scalar"][1].tolist() == [2.5]
    step = np.abs(w).max() / (127 if kind == "Q8_0" else 7)
    assert np.abs(read["blk.0.w"][1] - w).max() <= step
    assert np.array_equal(read["blk.0.stack"][1].reshape(6, 64), read["blk.0.w"][1])


@pytest.mark.parametrize(
    ("bits", "group_size", "axis", "type_name"),
    [
        (4, 32, 0, "Q4_0"),
        (4, None, 0, "Q4_0"),
        (4, None, None, "Q4_0"),
        (4, 64, 0, "Q4_0"),
        ("ternary", None, 0, "Q4_0"),
        (1, 32, 0, "Q4_0"),
        (5, 32, 0, "Q8_0"),
        (8, 32, None, "Q8_0"),
    ],
)
def test_low_bit_leaves_keep_their_codes(tmp_path, gguf, bits, group_size, axis, type_name):
    path = tmp_path / "net.gguf"
    q = drawn(bits, (3, 128), group_size, axis)
    interop.to_gguf(path, {"w": q}, "llama", kind=None)
    read_type, values = read_gguf(gguf, path)["w"]
    assert read_type == type_name
    halved = np.asarray(q.scale).astype(np.float16).astype(np.float64)
    blocks = np.broadcast_to(np.repeat(halved, 128 // halved.shape[1], 1), (3, 128))
    assert np.array_equal(values, blocks * np.asarray(q.qvalue))


@pytest.mark.parametrize("bits", [2, 4])
def test_low_bit_leaves_with_zero_points_keep_their_codes_as_q4_1(tmp_path, gguf, bits):
    path = tmp_path / "net.gguf"
    w = random_weights(3, 64) + 0.5
    q = jaxclip.quantize(w, jaxclip.Grid(bits, axis=0, group_size=32, zero_point=True))
    interop.to_gguf(path, {"w": q}, "llama")
    read_type, values = read_gguf(gguf, path)["w"]
    assert read_type == "Q4_1"
    expected = np.asarray(jaxclip.dequantize(q)).astype(np.float64)
    # The scale and the offset, up to 15 scales, are rounded to float16.
    step = np.repeat(np.asarray(q.scale), 32, 1)
    assert np.all(np.abs(values - expected) <= 2.0**-11 * (np.abs(expected) + 32 * step))
    assert np.abs(values - expected).max() > 0


def test_without_a_kind_floating_leaves_stay_as_they_are(tmp_path, gguf):
    path = tmp_path / "net.gguf"
    w = random_weights(4, 32)
    interop.to_gguf(path, {"w": w, "h": w.astype(np.float16), "d": w.astype(float)}, "x", kind=None)
    read = read_gguf(gguf, path)
    assert {name: t for name, (t, _) in read.items()} == {"w": "F32", "h": "F16", "d": "F64"}
    assert np.array_equal(read["w"][1], w)


def test_metadata_is_read_back(tmp_path, gguf):
    path = tmp_path / "net.gguf"
    metadata = {
        "llama.block_count": 12,
        "x.negative": -5,
        "x.eps": 0.25,
        "x.flag": True,
        "general.name": "a name",
        "tokenizer.ggml.tokens": ["a", "bc"],
        "x.sizes": (1, 2, 3),
    }
    interop.to_gguf(path, {"w": random_weights(2, 32)}, "llama", metadata=metadata)
    fields = gguf.GGUFReader(path).fields

    def value(key: str) -> Any:
        field = fields[key]
        parts = [field.parts[i] for i in field.data]
        if field.types[-1] == gguf.GGUFValueType.STRING:
            texts = [bytes(part).decode() for part in parts]
            return texts if len(field.types) > 1 else texts[0]
        numbers = [part.tolist()[0] for part in parts]
        return numbers if len(field.types) > 1 else numbers[0]

    assert value("general.architecture") == "llama"
    assert value("general.quantization_version") == 2
    assert {key: value(key) for key in metadata} == {**metadata, "x.sizes": [1, 2, 3]}
    assert fields["llama.block_count"].types == [gguf.GGUFValueType.UINT32]
    assert fields["x.flag"].types == [gguf.GGUFValueType.BOOL]


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"w": drawn(4, (2, 64), axis=1)}, ValueError, "'w': its scale must be the same for each"),
        ({"w": drawn(4, (2, 64), 16)}, ValueError, "group_size=16"),
        (
            {"w": quantized(np.ones((1, 32)), [[1]], 8, zero=[[1]])},
            ValueError,
            "'w' has zero points, which GGUF has up to 4 bits only",
        ),
        ({"w": drawn(4, (2, 33))}, ValueError, "'w' must have rows of a multiple of 32, got 33"),
        ({"w": np.full((1, 32), np.nan)}, ValueError, "'w': a weight is NaN or infinite"),
        ({"w": np.full((1, 32), 1e9)}, ValueError, "'w': a scale of .* too large for float16"),
        ({"w": np.zeros((1,) * 5)}, ValueError, "'w' must have at most 4 dimensions, got 5"),
        ({"w" * 64: np.zeros(1)}, ValueError, "a name of at most 63 bytes, got 64"),
        ({"w": np.zeros(3, bool)}, TypeError, "'w' has dtype bool, which GGUF has not"),
        ({"w": quantized(np.full((1, 32), 9), [[1]], 4)}, ValueError, "codes are not in the range"),
        ({"w": drawn(4, (1, 32)), "x": {"y": 0.5}}, TypeError, "'x.y' is the Python number"),
    ],
)
def test_what_gguf_has_not_is_refused_by_name(tmp_path, gguf, tree, error, message):
    with pytest.raises(error, match=message):
        interop.to_gguf(tmp_path / "net.gguf", tree, "llama")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["Q5_0", "q4_0", 4, True])
def test_other_kinds_are_refused(tmp_path, gguf, kind):
    with pytest.raises(ValueError, match="kind must be one of"):
        interop.to_gguf(tmp_path / "net.gguf", {}, "llama", kind=kind)


def test_metadata_of_another_type_is_refused(tmp_path, gguf):
    with pytest.raises(TypeError, match=r"metadata has \{\} under 'a\.b'"):
        interop.to_gguf(tmp_path / "net.gguf", {}, "llama", metadata={"a.b": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gguf_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"jaxclip\[gguf\]"):
        interop.to_gguf(tmp_path / "net.gguf", {}, "llama")


# --- From files --------------------------------------------------------------------------------


def write_by_function(path: pathlib.Path, tree: Any, to: str) -> Any:
    if to == "safetensors":
        return interop.to_safetensors(path, tree, dtype=jnp.bfloat16)
    if to == "compressed-tensors":
        return interop.to_compressed_tensors(path, tree, dtype=jnp.bfloat16)
    return interop.to_gguf(path, tree, "llama", kind=to, metadata={"llama.block_count": 2})


@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors", "Q4_0"])
def test_a_file_is_exported_as_the_tree_that_it_holds(tmp_path, to):
    if to == "Q4_0":
        pytest.importorskip("gguf")
    low_bit = drawn(4, (8, 64), group_size=32)
    tree = {"a": [{"weight": low_bit}, {"weight": random_weights(4, 64)}], "b": np.arange(3.0)}
    checkpoints.save(tmp_path / "tree.safetensors", tree)
    options: dict[str, Any] = (
        {"metadata": {"llama.block_count": 2}} if to == "Q4_0" else {"dtype": jnp.bfloat16}
    )
    wanted = write_by_function(tmp_path / "wanted", tree, to)
    found = interop.export_checkpoint(
        tmp_path / "tree.safetensors", tmp_path / "found", to, **options
    )
    assert found == wanted
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()


def test_names_of_files_of_others_stay_as_they_are(tmp_path):
    arrays = {name: random_weights(2, 32) for name in ("a/b.weight", "100%", "x:0")}
    safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors")
    interop.export_checkpoint(tmp_path / "net.safetensors", tmp_path / "out", "safetensors")
    checkpoints.compress_checkpoint(
        tmp_path / "net.safetensors", tmp_path / "low.safetensors", 4, rule=jaxclip.max_abs
    )
    interop.export_checkpoint(tmp_path / "low.safetensors", tmp_path / "low", "safetensors")
    for name in ("out", "low"):
        found = safetensors.numpy.load((tmp_path / name).read_bytes())
        assert sorted(found) == sorted(arrays)
    found = safetensors.numpy.load((tmp_path / "out").read_bytes())
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_a_folder_of_shards_is_exported_as_one_file(tmp_path):
    arrays = {f"layer.{i}.weight": random_weights(2, 32) for i in range(3)}
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(arrays)}
    for name in names:
        part = {key: arrays[key] for key, shard in weight_map.items() if shard == name}
        safetensors.numpy.save_file(part, tmp_path / name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    out = tmp_path / "out.safetensors"
    interop.export_checkpoint(tmp_path, out, "safetensors", dtype=jnp.float16)
    found = safetensors.numpy.load_file(out)
    assert sorted(found) == sorted(arrays)
    assert all(np.array_equal(found[n], w.astype(np.float16)) for n, w in arrays.items())


def test_each_leaf_is_read_once_and_one_at_a_time(tmp_path, monkeypatch):
    tree = {f"w{i}.weight": drawn(4, (4, 64)) for i in range(4)}
    checkpoints.save(tmp_path / "tree.safetensors", tree)
    reads = []
    open_source = interop.open_source

    @contextlib.contextmanager
    def recorded(path):
        with open_source(path) as source:

            def read(name):
                reads.append(name)
                return source.read(name)

            yield dataclasses.replace(source, read=read)

    monkeypatch.setattr("jaxclip.interop.checkpoint.open_source", recorded)
    interop.export_checkpoint(tmp_path / "tree.safetensors", tmp_path / "out", "compressed-tensors")
    assert reads == sorted(tree)


def test_a_damaged_file_a_wrong_format_and_itself_are_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    checkpoints.save(path, {"a.weight": random_weights(4, 32), "b.weight": drawn(4, (4, 32))})
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="is a file that is read"):
        interop.export_checkpoint(path, path, "safetensors", overwrite=True)
    with pytest.raises(ValueError, match="to must be one of"):
        interop.export_checkpoint(path, tmp_path / "out", "Q2_K")
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(checkpoints.CheckpointError, match="is damaged"):
        interop.export_checkpoint(path, tmp_path / "out", "safetensors")
    assert os.listdir(tmp_path) == ["tree.safetensors"]


# --- Folders of shards -------------------------------------------------------------------------


def low_bit_tree() -> dict[str, Any]:
    layers = {f"layers.{i}.weight": drawn(4, (8, 64), group_size=32) for i in range(4)}
    return {**layers, "embed.weight": random_weights(40, 64), "norm.weight": random_weights(64)}


@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors"])
def test_a_folder_of_shards_holds_what_one_file_does(tmp_path, to):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    one, folder = tmp_path / "one.safetensors", tmp_path / "folder"
    config = interop.export_checkpoint(tmp_path / "tree.safetensors", one, to)
    options: dict[str, Any] = {"max_shard_bytes": 4000}
    for path in (folder, tmp_path / "again"):
        found = interop.export_checkpoint(tmp_path / "tree.safetensors", path, to, **options)
        assert found == config
    wanted, found = checkpoints.load(one), checkpoints.load(folder)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array), name
    assert files_of(folder) == files_of(tmp_path / "again")
    if to == "compressed-tensors":
        interop.to_compressed_tensors(tmp_path / "tree", low_bit_tree(), **options)
    else:
        interop.to_safetensors(tmp_path / "tree", low_bit_tree(), **options)
    assert files_of(folder) == files_of(tmp_path / "tree")


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_index_names_the_shard_of_every_tensor_and_their_bytes(tmp_path):
    # Codes 8 * 64 / 2 bytes, scales 8 * 2 * 4, the shape 2 * 8: 336 a leaf; 10,240 and 256 else.
    interop.to_compressed_tensors(tmp_path / "net", low_bit_tree(), max_shard_bytes=3 * 336)
    index = json.loads((tmp_path / "net" / "model.safetensors.index.json").read_text())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "net")) == [*names, "model.safetensors.index.json"]
    shards = [safetensors.numpy.load_file(tmp_path / "net" / name) for name in names]
    # A tree's keys are in order: the embedding is larger than a shard and alone, then three leaves.
    assert list(shards[0]) == ["embed.weight"]
    assert {name.rpartition(".")[0] for name in shards[1]} == {f"layers.{i}" for i in range(3)}
    assert {name.rpartition(".")[0] for name in shards[2]} == {"layers.3", "norm"}
    assert index["weight_map"] == {
        t: n for n, shard in zip(names, shards, strict=True) for t in shard
    }
    assert index["metadata"] == {"total_size": 4 * 336 + 10_240 + 256}
    for name in names:
        with safetensors.safe_open(tmp_path / "net" / name, "np") as file:
            assert file.metadata() == {"format": "pt"}


def test_what_fits_into_one_shard_has_no_index(tmp_path):
    interop.to_safetensors(tmp_path / "net", low_bit_tree(), max_shard_bytes=10**6)
    interop.to_safetensors(tmp_path / "one", low_bit_tree())
    assert files_of(tmp_path / "net") == {"model.safetensors": (tmp_path / "one").read_bytes()}


def test_a_folder_of_shards_becomes_one_unless_a_file_is_named(tmp_path):
    arrays = {f"layer.{i}.weight": random_weights(2, 32) for i in range(3)}
    interop.to_safetensors(tmp_path / "in", arrays, max_shard_bytes=256)
    assert len(files_of(tmp_path / "in")) == 4
    for options in ({}, {"max_shard_bytes": 512}):
        out = tmp_path / f"out{len(options)}"
        interop.export_checkpoint(tmp_path / "in", out, "safetensors", **options)
        assert len(files_of(out)) == (3 if options else 1)
        assert_equal_arrays(checkpoints.load(out), arrays)
    interop.export_checkpoint(tmp_path / "in", tmp_path / "out.safetensors", "safetensors")
    assert_equal_arrays(safetensors.numpy.load_file(tmp_path / "out.safetensors"), arrays)


def assert_equal_arrays(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "net").mkdir()
    options: dict[str, Any] = {"max_shard_bytes": 100, "overwrite": overwrite}
    with pytest.raises(FileExistsError, match="folders are not replaced"):
        interop.to_safetensors(tmp_path / "net", low_bit_tree(), **options)
    with pytest.raises(FileNotFoundError, match="no directory"):
        interop.to_safetensors(tmp_path / "no" / "net", low_bit_tree(), **options)
    assert files_of(tmp_path / "net") == {}
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_export_that_ends_in_its_last_shard_leaves_nothing(tmp_path, monkeypatch, error):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    written = []
    write_plain = destination.write_plain

    def interrupted(*arguments):
        written.append(write_plain(*arguments))
        if len(written) == 3:
            raise error

    monkeypatch.setattr(destination, "write_plain", interrupted)
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    with pytest.raises(error):
        interop.export_checkpoint(*paths, "compressed-tensors", max_shard_bytes=1008)
    assert os.listdir(tmp_path) == ["tree.safetensors"]


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_size_of_shards_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_bytes must be an integer of at least 1"):
        interop.to_safetensors(tmp_path / "net", low_bit_tree(), max_shard_bytes=size)
    assert list(tmp_path.iterdir()) == []
    interop.to_safetensors(tmp_path / "in", {"w": np.ones(4), "v": np.ones(4)}, max_shard_bytes=32)
    for source in (tmp_path / "in", tmp_path / "in" / "model-00001-of-00002.safetensors"):
        with pytest.raises(ValueError, match="max_shard_bytes must be an integer of at least 1"):
            interop.export_checkpoint(source, tmp_path / "n", "safetensors", max_shard_bytes=size)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_written_that_would_change_what_a_folder_that_is_read_holds(tmp_path, count):
    folder, link = tmp_path / "net", tmp_path / "link"
    tree = {name: np.ones((8, 8), np.float32) for name in "ab"}
    interop.to_safetensors(folder, tree, max_shard_bytes=512 // count)
    link.symlink_to(folder)
    before = files_of(folder)
    sources = [folder, link] + [folder / "model.safetensors.index.json"] * (count > 1)
    names = [
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00003-of-00003.safetensors",
    ]
    for source, name, place in itertools.product(sources, names, [folder, link]):
        if name not in before:
            with pytest.raises(ValueError, match="would change what the folder"):
                interop.export_checkpoint(source, place / name, "safetensors")
            with pytest.raises(ValueError, match="would change what the folder"):
                interop.export_checkpoint(source, place / name, "safetensors", max_shard_bytes=1)
    assert files_of(folder) == before
    interop.export_checkpoint(folder, folder / "other.safetensors", "safetensors")
    assert_equal_arrays(checkpoints.load(folder), tree)


def test_beside_a_file_that_is_read_every_name_is_free(tmp_path):
    checkpoints.save(tmp_path / "net.safetensors", low_bit_tree())
    for name in ("model.safetensors", "model-00001-of-00002.safetensors"):
        interop.export_checkpoint(tmp_path / "net.safetensors", tmp_path / name, "safetensors")
        assert (tmp_path / name).exists()


# --- A model's other files --------------------------------------------------------------


CONFIG = {"model_type": "llama", "rms_norm_eps": 1e-06, "rope_theta": 10000.0}


def model_folder(folder: pathlib.Path, config: str = json.dumps(CONFIG)) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text('{"größe": 1}')
    (folder / "LICENSE").write_bytes(b"free")
    return folder


@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors"])
def test_a_models_other_files_go_along_and_its_weights_do_not(tmp_path, to):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    model = model_folder(tmp_path / "model")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", ".hidden"):
        (model / name).write_bytes(b"left")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "net.ONNX", "a.gguf"):
        (model / name).write_bytes(b"left")
    (model / "1_Pooling").mkdir()
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    quantization = interop.export_checkpoint(*paths, to, model_files=model)
    interop.export_checkpoint(paths[0], tmp_path / "one.safetensors", to)
    found = files_of(tmp_path / "net")
    assert set(found) == {"config.json", "tokenizer.json", "LICENSE", "model.safetensors"}
    assert found["model.safetensors"] == (tmp_path / "one.safetensors").read_bytes()
    for name in ("tokenizer.json", "LICENSE"):
        assert found[name] == (model / name).read_bytes()
    if to == "safetensors":
        assert found["config.json"] == (model / "config.json").read_bytes()
    else:
        assert quantization is not None
        config = json.loads(found["config.json"])
        assert config == CONFIG | {"quantization_config": quantization}


def test_other_files_go_along_with_shards_and_from_a_cache_of_links(tmp_path):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    blobs = model_folder(tmp_path / "hub" / "blobs")
    snapshot = tmp_path / "hub" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    interop.export_checkpoint(
        tmp_path / "tree.safetensors",
        tmp_path / "net",
        "safetensors",
        max_shard_bytes=4000,
        model_files=snapshot,
    )
    found = files_of(tmp_path / "net")
    assert found.items() >= files_of(blobs).items()
    assert not (tmp_path / "net" / "LICENSE").is_symlink()
    assert "model-00002-of-00005.safetensors" in found


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("[]", "config.json holds no object"),
        ('{"quantization_config": {}}', "has a quantization_config: give that of plain weights"),
        (None, "No such file .*config.json"),
    ],
)
def test_a_folder_that_is_no_models_is_refused(tmp_path, config, message):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    model = model_folder(tmp_path / "model", config or "")
    if config is None:
        (model / "config.json").unlink()
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    with pytest.raises(ValueError, match="model_files must be the folder of a model.*" + message):
        interop.export_checkpoint(*paths, "compressed-tensors", model_files=model)
    with pytest.raises(ValueError, match=r"model_files must be .*no/model"):
        interop.export_checkpoint(*paths, "safetensors", model_files=tmp_path / "no" / "model")
    assert not (tmp_path / "net").exists()


def test_links_out_of_the_models_folder_and_pipes_are_refused(tmp_path):
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    (tmp_path / "secret").write_text("secret")
    model = model_folder(tmp_path / "model")
    (model / "notes").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="file 'notes' is a link that leads out of the folder"):
        interop.export_checkpoint(*paths, "safetensors", model_files=model)
    (model / "notes").unlink()
    os.mkfifo(model / "pipe")
    with pytest.raises(ValueError, match="file 'pipe' is neither a regular file nor a folder"):
        interop.export_checkpoint(*paths, "safetensors", model_files=model)
    assert not (tmp_path / "net").exists()


def test_gguf_is_one_file(tmp_path):
    pytest.importorskip("gguf")
    checkpoints.save(tmp_path / "tree.safetensors", low_bit_tree())
    paths = tmp_path / "tree.safetensors", tmp_path / "net"
    with pytest.raises(ValueError, match="max_shard_bytes is for safetensors, Q4_0 is one file"):
        interop.export_checkpoint(*paths, "Q4_0", max_shard_bytes=100)
    with pytest.raises(ValueError, match="model_files is for safetensors, Q4_0 is one file"):
        interop.export_checkpoint(*paths, "Q4_0", model_files=model_folder(tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "compressed-tensors", "Q8_0"])
def test_exporting_a_file_takes_the_memory_of_its_largest_leaf(tmp_path, to):
    if to == "Q8_0":
        pytest.importorskip("gguf")
    script = textwrap.dedent(
        """
        import resource, sys, numpy as np
        from jaxclip import checkpoints, interop
        from jaxclip._core.grids import Grid
        from jaxclip.lowbit.arrays import QuantizedArray
        folder, count, to = sys.argv[1], int(sys.argv[2]), sys.argv[3]
        codes = np.random.default_rng(0).integers(-8, 8, (1024, 2048)).astype(np.int8)
        scale = np.full((1024, 1), 0.1, np.float32)
        q = QuantizedArray(codes, scale, Grid(4, axis=0), np.dtype(np.float32))
        tree = {f"w{i}.weight": q for i in range(count)}
        checkpoints.save(folder + "/low.safetensors", tree, overwrite=True)
        interop.export_checkpoint(folder + "/low.safetensors", folder + "/out", to, overwrite=True)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        """
    )

    def peak(count: int) -> int:
        command = [sys.executable, "-c", script, str(tmp_path), str(count), to]
        environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as a user has it
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        return int(result.stdout) * 1024

    # 64 leaves more are 512 MiB as float32, 128 MiB as int8; what grows is what malloc keeps.
    assert peak(72) - peak(8) < 8 * 1024 * 2048 * 4
