"""The sparse-24-bitmask layout, decoded by hand and as compressed-tensors recorded it.

`recorded/record_sparse_24.py` made `recorded/sparse_24.json`.
"""

import importlib.util
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxclip
from jaxclip import checkpoints, interop, sparsity
from oracles.exported_trees import drawn, random_weights

FOLDER = pathlib.Path(__file__).parents[1] / "peers" / "recorded"
RECORD = json.loads((FOLDER / "sparse_24.json").read_text())


def exported(tmp_path: pathlib.Path, tree: Any, **arguments: Any) -> tuple[dict, dict]:
    path = tmp_path / "model.safetensors"
    options = {"kind": "sparse-24-bitmask", "overwrite": True} | arguments
    config = interop.to_compressed_tensors(path, tree, **options)
    return safetensors.numpy.load_file(path), config


def pruned(*shape: int) -> np.ndarray:
    tree = {"weight": random_weights(*shape)}
    return np.array(sparsity.prune(tree, 1 / 2, pattern=4)["weight"])


def decoded(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    """The matrix, entry by entry."""
    values, bits, shape = (tensors[f"{module}.{p}"] for p in ("compressed", "bitmask", "shape"))
    (num_rows,), (num_columns,) = shape.tolist()
    array = np.zeros((num_rows, num_columns), values.dtype)
    for i in range(num_rows):
        places = [j for j in range(num_columns) if bits[i, j // 8] >> j % 8 & 1]
        assert [sum(j // 4 == g for j in places) for g in range(num_columns // 4)] == [2] * (
            num_columns // 4
        )
        array[i, places] = values[i]
    return array


def test_a_matrix_is_that_worked_by_hand(tmp_path):
    w = np.array([[0, 5, 0, 6, 0, 0, 0, 7], [1, 2, 0, 0, 0, 0, 0, 0]], np.float32)
    tensors, _ = exported(tmp_path, {"a": {"weight": w}})
    assert tensors.keys() == {"a.compressed", "a.bitmask", "a.shape"}
    np.testing.assert_array_equal(tensors["a.compressed"], [[5, 6, 0, 7], [1, 2, 0, 0]])
    np.testing.assert_array_equal(tensors["a.bitmask"], [[0b10011010], [0b00110011]])
    np.testing.assert_array_equal(tensors["a.shape"], [[2], [8]])
    assert [tensors[f"a.{p}"].dtype for p in ("bitmask", "shape")] == [np.uint8, np.int64]


@pytest.mark.parametrize("dtype", [None, np.float16, np.float32])
@pytest.mark.parametrize("shape", [(6, 8), (3, 12), (1, 100)])
def test_a_pruned_matrix_read_independently_is_the_same(dtype, shape, tmp_path):
    w = pruned(*shape)
    w[0, :4] = 0  # fewer than two values
    tensors, _ = exported(tmp_path, {"a": {"weight": w}}, dtype=dtype)
    np.testing.assert_array_equal(decoded(tensors, "a"), w.astype(dtype or w.dtype))


def test_values_that_a_dtype_rounds_to_zero_are_left_out_alike(tmp_path):
    w = np.float32([[1e-30, 1, 0, 0], [2, 1e-30, 0, 0], [0, 0, 1e-30, 1e-30]])
    tensors, _ = exported(tmp_path, {"a": {"weight": w}}, dtype=np.float16)
    np.testing.assert_array_equal(decoded(tensors, "a"), w.astype(np.float16))


def test_the_configuration_and_the_other_tensors(tmp_path):
    tree = {
        "a": {"weight": pruned(4, 8), "bias": random_weights(4)},
        "b": {"weight": random_weights(4, 8)},
        "norm": {"weight": random_weights(8)},
        "odd": {"weight": np.zeros((4, 6), np.float32)},
        "conv": {"weight": np.zeros((4, 2, 4), np.float32)},
        "ints": {"weight": np.zeros((4, 4), np.int32)},
        "weight": np.zeros((4, 4), np.float32),
    }
    tensors, config = exported(tmp_path, tree)
    num_entries = sum(x.size for x in jax.tree.leaves(tree))
    assert config == {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": RECORD["config"]["format"],
            "targets": ["Linear"],
            "ignore": ["b", "ints", "odd"],
            "global_sparsity": 16 / num_entries,
            "sparsity_structure": RECORD["config"]["sparsity_structure"],
        },
    }
    assert set(config["sparsity_config"]) <= set(RECORD["config"])
    assert json.loads(json.dumps(config)) == config
    names = {f"a.{part}" for part in RECORD["names"]}
    assert tensors.keys() == names | {
        "a.bias", "b.weight", "norm.weight", "odd.weight", "conv.weight", "ints.weight", "weight",
    }  # fmt: skip
    np.testing.assert_array_equal(tensors["b.weight"], tree["b"]["weight"])


def assert_like_theirs(tmp_path: pathlib.Path, case: dict[str, Any]) -> None:
    w = jnp.asarray(case["weight"], case["dtype"])
    tensors, _ = exported(tmp_path, {"a": {"weight": w}})
    for part in ("compressed", "bitmask", "shape"):
        found = tensors[f"a.{part}"]
        assert f"torch.{found.dtype}" == case["dtypes"][f"a.{part}"]
        np.testing.assert_array_equal(found.astype(np.float64), case[part])


@pytest.mark.parametrize("case", RECORD["cases"])
def test_compressed_tensors_made_the_same(tmp_path, case):
    assert_like_theirs(tmp_path, case)


def test_compressed_tensors_makes_the_same_here_and_now(tmp_path):
    reason = "needs compressed-tensors from 0.9.4 to 0.14"
    pytest.importorskip("compressed_tensors.compressors.sparse_compressors", reason=reason)
    file = FOLDER / "record_sparse_24.py"
    spec = importlib.util.spec_from_file_location("record_sparse_24", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for case in module.record()["cases"]:
        assert_like_theirs(tmp_path, case)


def test_a_file_is_exported_as_the_tree_is(tmp_path):
    tree = {"a": {"weight": pruned(8, 16)}, "b": {"weight": random_weights(4, 8)}}
    tensors, config = exported(tmp_path, tree)
    for coding in (None, "huffman"):
        source = tmp_path / "source.safetensors"
        checkpoints.save(source, tree, coding=coding, overwrite=True)
        path = tmp_path / "new.safetensors"
        found = interop.export_checkpoint(source, path, "sparse-24-bitmask", overwrite=True)
        assert found == config
        assert path.read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert set(tensors) == {"a.bitmask", "a.compressed", "a.shape", "b.weight"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"weight": random_weights(4, 8)}}, "no leaf is 2:4 sparse: it must be a floating"),
        ({"a": {"kernel": pruned(4, 8)}}, r"whose name ends in '\.weight'"),
        ({"a": {"weight": drawn(4, (2, 8))}}, "decompress leaf 'a.weight' first"),
        ({"a": {"weight": pruned(4, 8), "shape": random_weights(2)}}, "two tensors would have"),
    ],
)
def test_what_the_layout_lacks_is_refused(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        exported(tmp_path, tree)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kind must be"):
        exported(tmp_path, {"a": {"weight": jaxclip.quantize(jnp.eye(4), 4)}}, kind="marlin-24")
