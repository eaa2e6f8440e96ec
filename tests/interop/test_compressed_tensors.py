"""The pack-quantized layout, read bit by bit and by what compressed-tensors recorded.

`recorded/record_compressed_tensors.py` made `recorded/compressed_tensors.json`.
"""

import importlib.util
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jaxclip
from jaxclip import interop
from jaxclip._core.grids import code_range
from oracles.exported_trees import (
    drawn,
    expected_values,
    quantized,
    random_weights,
)

FOLDER = pathlib.Path(__file__).parents[1] / "peers" / "recorded"


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


@pytest.mark.thorough
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


def test_the_configuration_names_packed_and_unpacked_matrices(tmp_path):
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
        ({"weight": quantized([[1]], [[1e-9]], 4)}, "'weight' has a scale of 1e-09, which is 0"),
        ({"weight": quantized([[1]], [[1e9]], 4)}, "'weight' has a scale of 1e.09, .* too large"),
        (
            {"weight": drawn(4, (2, 8)), "weight_scale": random_weights(2)},
            "two tensors would have the name 'weight_scale'",
        ),
    ],
)
def test_what_the_layout_lacks_is_refused_by_name(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        exported(tmp_path, tree, dtype=np.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_low_bit_leaves_that_the_layout_lacks_are_written_as_floats_and_counted(tmp_path):
    tree = {
        "fc": {"weight": drawn(4, (4, 8))},
        "conv": {"weight": quantized(np.ones((4, 2, 3, 3)), np.ones((4, 1, 1, 1)), 4)},
        "lstm": {"weight_ih_l0": drawn(4, (8, 4))},
        "flax": {"weight": drawn(4, (4, 8), axis=1)},
        "scalar": quantized(np.ones(()), np.ones(()), 8, axis=None),
    }
    with pytest.warns(UserWarning, match="4 low-bit leaves are written as floats") as warned:
        tensors, config = exported(tmp_path, tree)
    assert "fc.weight_packed" in tensors
    for name, leaf in {"conv.weight": tree["conv"]["weight"], "scalar": tree["scalar"],
                       "lstm.weight_ih_l0": tree["lstm"]["weight_ih_l0"]}.items():  # fmt: skip
        assert np.array_equal(tensors[name], jaxclip.dequantize(leaf)), name
    assert config["ignore"] == ["flax"]  # a linear layer without codes
    assert "'flax.weight' must be (outputs, inputs)" in str(warned[0].message)


@pytest.mark.thorough
@pytest.mark.parametrize("meaningless", [1e-30, 1e30])
def test_the_scale_of_a_row_of_zeros_need_not_fit_into_half_precision(tmp_path, meaningless):
    q = quantized([[0, 0], [1, 2]], [[meaningless], [0.5]], 4)
    tensors, _ = exported(tmp_path, {"weight": q}, dtype=np.float16)
    assert tensors["weight_scale"].ravel().tolist() == [0, 0.5]


def test_leaves_whose_scales_half_precision_lacks_are_written_as_floats_and_counted(tmp_path):
    fits, lost = drawn(4, (4, 8)), quantized([[0, 0], [1, 2]], [[1.0], [1e-9]], 4)
    tree = {"a.weight": lost, "b.weight": fits}
    with pytest.warns(UserWarning, match="1 low-bit leaf is .*'a.weight' has a scale of 1e-09, wh"):
        tensors, _ = exported(tmp_path, tree, dtype=np.float16)
    assert np.array_equal(tensors["a.weight"], jaxclip.dequantize(lost, np.float16))
    assert np.array_equal(tensors["b.weight_scale"], np.asarray(fits.scale, np.float16))
