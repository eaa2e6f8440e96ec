"""Plain files, read by the safetensors package."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

import jaxclip
from jaxclip import interop
from oracles.exported_trees import quantized, random_weights


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


def test_boxes_and_modules_export_under_the_names_that_save_gives_them(tmp_path):
    path = tmp_path / "net.safetensors"
    state = nnx.State({"a": {0: {"kernel": nnx.Param(np.ones((2, 3)))}}})
    interop.to_safetensors(path, [state, nnx.Linear(2, 3, rngs=nnx.Rngs(0))])
    assert set(safetensors.numpy.load_file(path)) == {"0.a.0.kernel", "1.kernel", "1.bias"}


def test_the_file_names_its_format_for_transformers_and_tensors_are_aligned(tmp_path):
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
    with pytest.raises(ValueError, match="'__metadata__', which safetensors reserves"):
        interop.to_safetensors(tmp_path / "net.safetensors", {"__metadata__": np.zeros(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": {"w": np.full(2, 1e6)}}, ValueError, r"'a\.w' .*not finite in float16: 1000000\.0"),
        ({"w": quantized([[1]], [[1e6]], 4)}, ValueError, "'w' .*not finite in float16: 1000000"),
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
