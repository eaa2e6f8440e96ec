"""Trees that the tests of exports write, and what is left of them in a folder."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxclip._core.grids import Grid, code_range
from jaxclip.lowbit.arrays import QuantizedArray

CONFIG = {"model_type": "llama", "rms_norm_eps": 1e-06, "rope_theta": 10000.0}


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


def low_bit_tree() -> dict[str, Any]:
    layers = {f"layers.{i}.weight": drawn(4, (8, 64), group_size=32) for i in range(4)}
    return {**layers, "embed.weight": random_weights(40, 64), "norm.weight": random_weights(64)}


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_equal_arrays(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())


def model_folder(folder: pathlib.Path, config: str = json.dumps(CONFIG)) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text('{"größe": 1}')
    (folder / "LICENSE").write_bytes(b"free")
    return folder
