"""Records what compressed-tensors makes of 2:4 sparse matrices, for `test_bitmasks.py`.

    python tests/peers/recorded/record_sparse_24.py

writes `sparse_24.json` beside this file. It installs nothing: it runs where a compressed-tensors
from 0.9.4 to 0.14 is; later versions lack the layout. Numbers are floats that every dtype here has.
"""

import json
import pathlib
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.sparse_compressors import Sparse24BitMaskCompressor
from compressed_tensors.config import Sparse24BitMaskConfig

FILE = pathlib.Path(__file__).with_name("sparse_24.json")
SHAPES = [(3, 8), (2, 12), (5, 20), (1, 4)]
DTYPES = ["float32", "float16", "bfloat16"]


def two_of_four(shape: tuple[int, int]) -> np.ndarray:
    """Two values of every four inputs: multiples of 1/8 up to 8."""
    rng = np.random.default_rng(shape[1])
    values = rng.integers(1, 65, shape) * rng.choice([-1, 1], shape) / 8
    order = rng.random((shape[0], shape[1] // 4, 4)).argsort(-1)
    return np.where(order.reshape(shape) < 2, values, 0)


def record_case(shape: tuple[int, int], dtype: str) -> dict[str, Any]:
    weight = torch.tensor(two_of_four(shape)).to(getattr(torch, dtype))
    compressor = Sparse24BitMaskCompressor(Sparse24BitMaskConfig())
    found = compressor.compress({"a.weight": weight}, compression_targets={"a"})
    restored = dict(compressor.decompress_from_state_dict(found))
    assert torch.equal(restored["a.weight"], weight)
    return {
        "dtype": dtype,
        "weight": weight.double().tolist(),
        "compressed": found["a.compressed"].double().tolist(),
        "bitmask": found["a.bitmask"].tolist(),
        "shape": found["a.shape"].tolist(),
        "dtypes": {name: str(tensor.dtype) for name, tensor in found.items()},
    }


def record() -> dict[str, Any]:
    versions = {name: version(name) for name in ("compressed-tensors", "torch")}
    cases = [record_case(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    return {
        "versions": versions,
        "config": Sparse24BitMaskConfig().model_dump(),
        "names": list(Sparse24BitMaskCompressor(Sparse24BitMaskConfig()).compression_param_names),
        "cases": cases,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(record()) + "\n")
