"""BitNet layers of transformers, packed and unpacked by hand, code by code."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxclip
from jaxclip import Grid, checkpoints, interop
from jaxclip.checkpoints import CheckpointError
from oracles.exported_trees import quantized, random_weights


def packed_by_hand(codes: np.ndarray) -> np.ndarray:
    """Row i of the codes is in row i mod R, in bits 2k and 2k + 1 with k = i // R."""
    num_rows = len(codes) // 4
    data = np.zeros((num_rows, codes.shape[1]), np.uint8)
    for (i, j), code in np.ndenumerate(codes):
        data[i % num_rows, j] += (int(code) + 1) * 4 ** (i // num_rows)
    return data


def drawn_codes(shape=(12, 7)):
    return np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)


def saved(folder, tensors, linear_class="bitlinear"):
    path = folder / "model.safetensors"
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, path)
    quantization = {"quant_method": "bitnet", "linear_class": linear_class}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return path


def layer(scale=2.5, dtype=np.float32):
    packed = packed_by_hand(drawn_codes())
    return {"up.weight": packed, "up.weight_scale": np.array([scale], dtype)}


def test_the_packing_by_hand_is_that_of_the_documented_example():
    # Of `unpack_weights` in transformers: bytes, and the codes that they hold.
    data = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8)
    codes = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]
    np.testing.assert_array_equal(packed_by_hand(np.array(codes)), data)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_the_scale_divides_in_one_class_of_layers_and_multiplies_in_the_other(
    tmp_path, linear_class, dtype
):
    embed = random_weights(5, 3)
    tensors = layer(2.5, jnp.dtype(dtype)) | {"embed.weight": embed, "up.bias": np.ones(12)}
    path = saved(tmp_path, tensors, linear_class)
    for source in (path, tmp_path):
        read = interop.from_bitnet(source)
        assert read.keys() == {"up.weight", "up.bias", "embed.weight"}
        scale = 1 / 2.5 if linear_class == "bitlinear" else 2.5
        expected = np.float32(drawn_codes() * np.float64(scale))
        np.testing.assert_array_equal(jaxclip.dequantize(read["up.weight"]), expected)
        np.testing.assert_array_equal(read["embed.weight"], embed)
    (tmp_path / "config.json").unlink()
    given = interop.from_bitnet(path, linear_class=linear_class)
    np.testing.assert_array_equal(jaxclip.dequantize(given["up.weight"]), expected)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_ternary_leaves_are_written_as_packed_by_hand(tmp_path, linear_class):
    codes = drawn_codes((8, 5))
    w = random_weights(6, 4)
    tree = {"up": {"weight": quantized(codes, [[0.3]], "ternary", None)}, "embed": {"weight": w}}
    path = tmp_path / "model.safetensors"
    config = interop.to_bitnet(path, tree, linear_class=linear_class)
    found = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(found["up.weight"], packed_by_hand(codes))
    scale = np.float32(0.3)
    scale = scale if linear_class == "autobitlinear" else np.float32(1) / scale
    np.testing.assert_array_equal(found["up.weight_scale"], [scale])
    np.testing.assert_array_equal(found["embed.weight"], w)
    assert config == {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": ["embed"],
    }
    back = interop.from_bitnet(path, linear_class=linear_class)["up.weight"]
    np.testing.assert_array_equal(back.qvalue, codes)
    np.testing.assert_allclose(back.scale, [[0.3]], rtol=2e-7)


def test_what_was_read_is_saved_as_a_low_bit_file_and_never_rounded_again(tmp_path):
    path = saved(tmp_path, layer())
    read = interop.from_bitnet(path)
    checkpoints.save(tmp_path / "own.safetensors", read)
    loaded = checkpoints.load(tmp_path / "own.safetensors")["up.weight"]
    np.testing.assert_array_equal(loaded.qvalue, drawn_codes())
    raw = checkpoints.load(path)
    assert jaxclip.compress(raw | {"w": random_weights(64, 64)}, 4)["up.weight"] is raw["up.weight"]


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_a_scale_of_zero_multiplies_but_does_not_divide(tmp_path, linear_class):
    path = saved(tmp_path, layer(0.0), linear_class)
    if linear_class == "bitlinear":
        with pytest.raises(CheckpointError, match="needs a scale that is finite and not 0"):
            interop.from_bitnet(path)
    else:
        assert not np.any(jaxclip.dequantize(interop.from_bitnet(path)["up.weight"]))


def with_code_3(tensors):
    tensors["up.weight"][1, 4] |= 0b110000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("up.weight_scale"), "needs up.weight_scale, which is missing"),
        (lambda t: t.update({"up.weight": drawn_codes()}), "needs uint8 .* got int8"),
        (lambda t: t.update({"up.weight": np.zeros(8, np.uint8)}), "of 2 dimensions .* of 1"),
        (lambda t: t.update({"up.weight_scale": np.ones(1, np.int32)}), "floating scales"),
        (lambda t: t.update({"up.weight_scale": np.ones(3)}), "floating scales .* float64"),
        (lambda t: t.update({"up.weight_scale": np.ones(3, "f4")}), "one number in .* \\(3,\\)"),
        (lambda t: t.update({"up.weight_scale": np.full(1, np.nan, "f4")}), "finite .* nan"),
        (lambda t: t.update({"up.weight_scale": np.full(1, np.inf, "f4")}), "finite .* inf"),
        (lambda t: t.update({"up.bias": np.ones(11)}), "of 12 outputs, .* bias of shape \\(11,\\)"),
        (with_code_3, r"code 3 in bits 4 and 5 of byte \[1, 4\]"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    tensors = layer()
    change(tensors)
    path = saved(tmp_path, tensors)
    with pytest.raises(
        CheckpointError, match=f"model.safetensors': tensor 'up.weight' .*{message}"
    ):
        interop.from_bitnet(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json beside it: give linear_class"),
        ("{", "config.json"),
        ("[]", "config.json': must have a quantization_config of 'bitnet', got None"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "got 'gptq'"),
        (
            '{"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}}',
            "linear_class must be one of",
        ),
    ],
)
def test_a_model_that_does_not_say_what_its_scales_mean_is_refused(tmp_path, config, message):
    path = saved(tmp_path, layer())
    (tmp_path / "config.json").unlink()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        interop.from_bitnet(path)
    with pytest.raises(ValueError, match="linear_class must be one of"):
        interop.from_bitnet(path, linear_class="linear")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (quantized(drawn_codes(), np.ones((12, 1)), "ternary"), "must have one scale.* got 12"),
        (quantized(drawn_codes((6, 4)), [[1]], "ternary", None), "multiple of 4 outputs, got 6"),
        (quantized(drawn_codes((8, 4)), [[1]], 2, None), "codes of -1, 0 and 1, got bits=2"),
        (quantized(drawn_codes((8,)), [1], "ternary", None), "must be a matrix"),
    ],
)
def test_leaves_that_the_layout_lacks_become_floats_with_a_warning(tmp_path, leaf, message):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=f"no leaf can keep its codes: 'a.weight' .*{message}"):
        interop.to_bitnet(path, {"a": {"weight": leaf}})
    good = jaxclip.compress({"weight": random_weights(8, 8)}, Grid("ternary", axis=None))
    with pytest.warns(UserWarning, match=f"'a.weight' .*{message}"):
        interop.to_bitnet(path, {"a": {"weight": leaf}, "b": good})
    found = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(found["a.weight"], jaxclip.dequantize(leaf))
    assert found["b.weight"].dtype == np.uint8


def test_a_scale_that_the_dtype_lacks_and_a_tree_without_codes_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    tiny = quantized(drawn_codes((8, 4)), [[1e-30]], "ternary", None)
    with pytest.raises(ValueError, match="has a scale of 1e-30, which is 0 in float16"):
        interop.to_bitnet(path, {"a.weight": tiny}, dtype=jnp.float16)
    with pytest.raises(ValueError, match="tree has no QuantizedArray leaf"):
        interop.to_bitnet(path, {"a.weight": random_weights(8, 4)})
    with pytest.raises(ValueError, match="linear_class must be one of"):
        interop.to_bitnet(path, {"a.weight": tiny}, linear_class="x")  # type: ignore[arg-type]
    assert not path.exists()
