"""Arrays of every dtype and magnitude for the sets of weights, and NumPy's longdouble norms."""

import ml_dtypes
import numpy as np

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]


def wide(x) -> np.ndarray:
    """An array in longdouble (complex ones too), exactly."""
    x = np.asarray(x)
    return x.astype(np.clongdouble if x.dtype.kind == "c" else np.longdouble)


def norms(x, axis) -> np.ndarray:
    """Norms over some axes, dims kept, to 19 digits; no square over- or underflows."""
    return np.sqrt(np.sum(np.abs(wide(x)) ** 2, axis=axis, keepdims=True))


def drawn(seed: int, shape: tuple[int, ...], dtype, size: float = 1.0) -> np.ndarray:
    """Normal numbers of about a size; finite."""
    largest = float(ml_dtypes.finfo(dtype).max)
    x = np.random.default_rng(seed).normal(size=shape) * size
    return np.clip(x, -largest, largest).astype(dtype)
