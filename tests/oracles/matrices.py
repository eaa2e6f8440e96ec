"""Matrices of given singular values, and exact caps in float64."""

import jax.numpy as jnp
import numpy as np

SPECTRA = {
    "linear": lambda k: np.linspace(0.01, 1, k),
    "condition 1e7": lambda k: np.geomspace(1, 1e-7, k),
    "rank one": lambda k: np.eye(k)[0],
    "half rank": lambda k: np.where(np.arange(k) < (k + 1) // 2, 1.0, 0.0),
    "flat": lambda k: np.ones(k),
    "near the cap": lambda k: np.r_[1.0, 0.1 + 1e-4 * np.linspace(-1, 1, k - 1)],
}


def wide(x) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def make_matrix(shape, spectrum="linear", dtype=np.float32, size=1.0, seed=0) -> np.ndarray:
    """A matrix with the given singular values times `size`, up to the rounding of `dtype`."""
    rng, k = np.random.default_rng(seed), min(shape)
    draw = [rng.normal(size=(n, k)) for n in shape]
    if np.dtype(dtype).kind == "c":
        draw = [x + 1j * rng.normal(size=x.shape) for x in draw]
    u, v = (np.linalg.qr(x)[0] for x in draw)
    return ((u * SPECTRA[spectrum](k)) @ v.conj().T * size).astype(dtype)


def exact_cap(matrix, cap) -> np.ndarray:
    u, s, vh = np.linalg.svd(wide(matrix), full_matrices=False)
    return (u * np.minimum(s, cap)) @ vh


def spectral_norm(matrix) -> float:
    return float(np.linalg.norm(wide(matrix), 2))


def eps_of(dtype) -> float:
    return float(jnp.finfo(dtype).eps)
