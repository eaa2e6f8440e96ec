"""Records what compressed-tensors packs and unpacks, for `test_interop.py`.

    python tests/peers/recorded/record_compressed_tensors.py

writes `compressed_tensors.json` beside this file. It installs nothing: it runs where
compressed-tensors is. Numbers are float32, written so that they read back to the same bits.
"""

import json
import pathlib
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

FILE = pathlib.Path(__file__).with_name("compressed_tensors.json")
SETTINGS = [
    (4, (3, 64), 32, False),
    (4, (3, 13), None, False),
    (8, (3, 19), None, False),
    (8, (2, 32), 16, False),
    (4, (11, 64), 32, True),
    (8, (3, 19), None, True),
]


def record_case(
    num_bits: int, shape: tuple[int, int], group_size: int | None, has_zero_point: bool
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    half = 2 ** (num_bits - 1)
    codes = rng.integers(-half, half, shape).astype(np.int8)
    codes[0, :2] = -half, half - 1
    groups = shape[1] // group_size if group_size else 1
    scale = rng.normal(size=(shape[0], groups)).astype(np.float32)  # of both signs
    zero = np.zeros(scale.shape, np.int8)
    if has_zero_point:
        scale, zero = np.abs(scale), rng.integers(-half, half, scale.shape).astype(np.int8)
    scales, zeros = (np.repeat(x, shape[1] // groups, axis=1) for x in (scale, zero))
    arguments = QuantizationArgs(
        num_bits=num_bits,
        symmetric=not has_zero_point,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    weight = (codes.astype(np.float32) - zeros) * scales
    given = {"weight": torch.tensor(weight), "weight_scale": torch.tensor(scale)}
    if has_zero_point:
        given["weight_zero_point"] = torch.tensor(zero)
    packed = compressor.compress(given, scheme)
    return {
        "num_bits": num_bits,
        "group_size": group_size,
        "codes": codes.tolist(),
        "scale": scale.tolist(),
        "zero": zero.tolist() if has_zero_point else None,
        "weight_zero_point": packed["weight_zero_point"].tolist() if has_zero_point else None,
        "weight_packed": packed["weight_packed"].tolist(),
        "weight_shape": packed["weight_shape"].tolist(),
        "weight": compressor.decompress(packed, scheme)["weight"].tolist(),
    }


def record() -> dict[str, Any]:
    versions = {name: version(name) for name in ("compressed-tensors", "torch")}
    return {"versions": versions, "cases": [record_case(*setting) for setting in SETTINGS]}


if __name__ == "__main__":
    FILE.write_text(json.dumps(record()) + "\n")
