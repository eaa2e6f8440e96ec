"""Folders of shards as the Hugging Face hub has them."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def drawn(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make_shard_folder(folder: pathlib.Path) -> pathlib.Path:
    """Two shards and an index."""
    first = {"a.weight": drawn(4, 3), "a.bias": drawn(4, seed=1, dtype=np.float16)}
    second = {"b.weight": drawn(2, 4, seed=2, dtype=ml_dtypes.bfloat16)}
    for name, tensors in zip(SHARDS, (first, second), strict=True):
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = dict.fromkeys(first, SHARDS[0]) | dict.fromkeys(second, SHARDS[1])
    write_index(folder, weight_map, total_size=4 * 12 + 2 * 4 + 2 * 8)
    return folder


def write_index(folder: pathlib.Path, weight_map: Any, **metadata: Any) -> None:
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


def read_weight_map(folder: pathlib.Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]
