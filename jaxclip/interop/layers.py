"""Layers of other libraries in files of safetensors: several tensors that make one weight."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxclip.checkpoints.reading import CheckpointError
from jaxclip.checkpoints.store import load
from jaxclip.lowbit.arrays import QuantizedArray

Tensors: TypeAlias = Mapping[str, Any]
_SCALE_DTYPES = ("float32", "float16", "bfloat16")


class Layer(NamedTuple):
    """A weight and the tensors that it was made of.

    Attributes:
      name: Name of the weight.
      leaf: The weight.
      parts: Names of its tensors in the file.
    """

    name: str
    leaf: np.ndarray | QuantizedArray
    parts: set[str]


def read_layers(
    path: str | os.PathLike, layer_of: Callable[[str, Tensors], Layer | None]
) -> dict[str, np.ndarray | QuantizedArray]:
    """Returns the tensors of a file by name, with a leaf in the place of the parts of a layer."""
    tensors = load(path)
    if not isinstance(tensors, dict) or not all(hasattr(x, "shape") for x in tensors.values()):
        raise CheckpointError(f"{os.fspath(path)!r} is not a flat file of named tensors.")
    leaves: dict[str, np.ndarray | QuantizedArray] = {}
    used: set[str] = set()
    for name in tensors:
        try:
            layer = layer_of(name, tensors)
        except ValueError as error:
            raise CheckpointError(f"{os.fspath(path)!r}: tensor {name!r} {error}") from error
        if layer is not None:
            leaves[layer.name] = layer.leaf
            used |= layer.parts
    leaves |= {name: x for name, x in tensors.items() if name not in used}
    return dict(sorted(leaves.items()))


def layer_part(name: str, tensors: Tensors, dtype: str, ndim: int | None) -> np.ndarray:
    """Returns a tensor of a layer; raises if it is missing or of another dtype or dimension."""
    if name not in tensors:
        raise ValueError(f"needs {name}, which is missing.")
    array = np.asarray(tensors[name])
    if str(array.dtype) != dtype or (ndim is not None and array.ndim != ndim):
        expected = dtype if ndim is None else f"{dtype} of {ndim} dimensions"
        raise ValueError(f"needs {expected} in {name}, got {array.dtype} of {array.ndim}.")
    return array


def layer_scale(weight: str, tensors: Tensors) -> np.ndarray:
    """Returns the scales of a layer; raises if they are missing or not floating."""
    if f"{weight}_scale" not in tensors:
        raise ValueError(f"needs {weight}_scale, which is missing.")
    scale = np.asarray(tensors[f"{weight}_scale"])
    if str(scale.dtype) not in _SCALE_DTYPES:
        raise ValueError(f"needs floating scales in {weight}_scale, got {scale.dtype}.")
    return scale


def without_zero_scales(codes: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes of 0 and a scale of 1 where the scale is 0, which a grid lacks."""
    is_zero = scale == 0
    return np.where(is_zero, np.int8(0), codes), np.where(is_zero, np.ones((), scale.dtype), scale)
