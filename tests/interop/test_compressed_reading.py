"""Files of compressed-tensors read into trees: recorded ones, our own, and damaged ones."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxclip
from jaxclip import Grid, checkpoints, interop, sparsity
from jaxclip.checkpoints import CheckpointError
from oracles.exported_trees import random_weights

FOLDER = pathlib.Path(__file__).parents[1] / "peers" / "recorded"
RECORD = json.loads((FOLDER / "compressed_tensors.json").read_text())


def saved(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({k: np.ascontiguousarray(x) for k, x in tensors.items()}, path)
    return path


def packed_layer(bits=4, shape=(3, 32), name="a.weight"):
    """Tensors of a layer, packed code by code, and its weights."""
    per_word = 32 // bits
    rng = np.random.default_rng(0)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    words = np.zeros((shape[0], -(-shape[1] // per_word)), np.uint32)
    for (i, j), code in np.ndenumerate(codes):
        place = bits * (j % per_word)
        words[i, j // per_word] |= np.uint32((int(code) + 2 ** (bits - 1)) << place)
    scale = rng.uniform(1, 2, (shape[0], 1)).astype(np.float32)
    tensors = {
        f"{name}_packed": words.view(np.int32),
        f"{name}_scale": scale,
        f"{name}_shape": np.array(shape),
    }
    return tensors, codes * scale


@pytest.mark.parametrize(
    "case", RECORD["cases"], ids=lambda c: f"{c['num_bits']}, {c['group_size']}"
)
def test_what_compressed_tensors_packed_is_read_to_the_weights_that_it_unpacked(tmp_path, case):
    tensors = {
        "weight_packed": np.array(case["weight_packed"], np.int32),
        "weight_shape": np.array(case["weight_shape"]),
        "weight_scale": np.float32(case["scale"]),
    }
    if case["zero"] is not None:
        tensors["weight_zero_point"] = np.array(case["weight_zero_point"], np.int32)
    leaf = interop.from_compressed_tensors(saved(tmp_path, tensors))["weight"]
    assert leaf.bits == case["num_bits"]
    np.testing.assert_array_equal(jaxclip.dequantize(leaf), np.float32(case["weight"]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_width_is_told_by_the_shapes(tmp_path, bits):
    tensors, expected = packed_layer(bits, (3, 60))
    leaf = interop.from_compressed_tensors(saved(tmp_path, tensors))["a.weight"]
    assert leaf.bits == bits
    np.testing.assert_allclose(jaxclip.dequantize(leaf), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, axis=0, group_size=16),
        Grid(8, axis=0, scale_dtype="bfloat16"),
        Grid(3, axis=0, group_size=16, zero_point=True),
    ],
    ids=str,
)
def test_codes_survive_the_way_there_and_back(tmp_path, grid):
    w = random_weights(6, 64)
    w[2] = 0
    tree = {
        "a": {"weight": jaxclip.quantize(jnp.asarray(w), grid, threshold=jaxclip.max_abs)},
        "b": {"weight": w, "bias": w[0]},
    }
    interop.to_compressed_tensors(tmp_path / "model.safetensors", tree)
    read = interop.from_compressed_tensors(tmp_path)
    assert set(read) == {"a.weight", "b.weight", "b.bias"}
    np.testing.assert_array_equal(
        np.asarray(jaxclip.dequantize(read["a.weight"]), np.float32),
        np.asarray(jaxclip.dequantize(tree["a"]["weight"])),
    )
    np.testing.assert_array_equal(read["b.weight"], w)
    interop.to_compressed_tensors(tmp_path / "again.safetensors", read)
    again = safetensors.numpy.load_file(tmp_path / "again.safetensors")
    first = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(again) == set(first)
    np.testing.assert_array_equal(again["a.weight_packed"][:2], first["a.weight_packed"][:2])


@pytest.mark.parametrize("scale_shape", [(3, 1), (1,), (3, 4)])
def test_codes_that_are_not_packed_are_read_too(tmp_path, scale_shape):
    rng = np.random.default_rng(1)
    codes = rng.integers(-128, 128, (3, 32)).astype(np.int8)
    scale = rng.uniform(1, 2, scale_shape).astype(np.float16)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "a.weight_zero_point": np.zeros((3, 1))}
    leaf = interop.from_compressed_tensors(saved(tmp_path, tensors))["a.weight"]
    wide = np.repeat(
        np.broadcast_to(scale, (3, scale.size // 3 or 1)), 32 // (scale.size // 3 or 1), 1
    )
    np.testing.assert_array_equal(jaxclip.dequantize(leaf), wide * codes.astype(np.float16))


def test_sparse_weights_become_dense(tmp_path):
    tree = {"a": {"weight": random_weights(6, 64)}, "b": {"bias": random_weights(3)}}
    pruned = sparsity.prune(tree, 1 / 2, pattern=4)
    path = tmp_path / "model.safetensors"
    interop.to_compressed_tensors(path, pruned, kind="sparse-24-bitmask")
    read = interop.from_compressed_tensors(path)
    assert set(read) == {"a.weight", "b.bias"}
    np.testing.assert_array_equal(read["a.weight"], pruned["a"]["weight"])


def test_what_was_read_is_saved_as_a_low_bit_file(tmp_path):
    tensors, expected = packed_layer()
    read = interop.from_compressed_tensors(saved(tmp_path, tensors))
    checkpoints.save(tmp_path / "own.safetensors", read)
    loaded = checkpoints.load(tmp_path / "own.safetensors")["a.weight"]
    np.testing.assert_allclose(jaxclip.dequantize(loaded), expected, rtol=1e-6)


def without(part):
    return lambda tensors: tensors.pop(f"a.weight_{part}")


def with_part(part, array):
    return lambda tensors: tensors.update({f"a.weight_{part}": array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("shape"), "needs a.weight_shape, which is missing"),
        (without("scale"), "needs a.weight_scale, which is missing"),
        (with_part("shape", np.array([3, 200])), "holds \\(3, 200\\) codes at no width"),
        (with_part("shape", np.array([4, 32])), "holds \\(4, 32\\)"),
        (with_part("scale", np.ones((3, 5), np.float32)), "scales of shape \\(3, 5\\)"),
        (with_part("scale", np.full((3, 1), np.inf, np.float32)), "finite"),
        (with_part("scale", np.ones((3, 1), np.int32)), "floating scales"),
        (with_part("g_idx", np.arange(32)), "order of activations"),
        (with_part("packed", np.ones((3, 4))), "needs int32 of 2 dimensions"),
        (with_part("zero_point", np.ones((3, 1), np.int32)), "zero points of"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    tensors, _ = packed_layer()
    change(tensors)
    with pytest.raises(CheckpointError, match=f"tensor 'a.weight_packed' .*{message}"):
        interop.from_compressed_tensors(saved(tmp_path, tensors))


def test_float8_codes_are_refused_by_name_and_type(tmp_path):
    tree = {"a.weight": jnp.ones((4, 8), jnp.float8_e4m3fn), "a.weight_scale": jnp.ones((4, 1))}
    path = tmp_path / "model.safetensors"
    interop.to_safetensors(path, tree)
    with pytest.raises(CheckpointError, match=r"'a.weight' needs int8 .* got float8_e4m3fn"):
        interop.from_compressed_tensors(path)
