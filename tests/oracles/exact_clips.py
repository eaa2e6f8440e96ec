"""Exact arithmetic for clips: trees in extended precision, entries of every size, bits compared."""

import jax
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

BF16 = ml_dtypes.bfloat16
DTYPES = [np.float16, BF16, np.float32, np.complex64]
TINY = 2.0**-126  # the smallest float32 that XLA on CPU does not flush to zero
# Numbers in [0, inf] and what they stand for in float32.
BOUNDS = [0.0, TINY, 1e-3, 1.0, 3e38, np.inf]


def real_part_of(dtype) -> np.dtype:
    return np.dtype(np.float32) if np.dtype(dtype) == np.complex64 else np.dtype(dtype)


def exact(x) -> np.ndarray:
    """Values in extended precision: no square of a float64 over- or underflows in it."""
    x = np.asarray(x)
    if x.dtype.kind == "c":
        return x.astype(np.clongdouble)
    return x.astype(np.float64).astype(np.longdouble)


def exact_norm(tree) -> np.longdouble:
    total = sum(np.sum(np.abs(exact(x)) ** 2) for x in jax.tree.leaves(tree))
    return np.sqrt(np.longdouble(total))


def bits_of(x) -> bytes:
    return np.asarray(x).tobytes()


def assert_bit_identical(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(e).dtype
        assert bits_of(a) == bits_of(e)


def clip_once(tx, grads, update=None):
    return (update or tx.update)(grads, tx.init(grads))


def finite_entries(dtype, size):
    """Finite numbers drawn by their bits, from the smallest subnormal to the largest."""
    real = real_part_of(dtype)
    parts = 2 * size if np.dtype(dtype).kind == "c" else size
    unsigned = np.dtype(f"uint{8 * real.itemsize}")
    largest = float(ml_dtypes.finfo(real).max)

    def build(bits):
        with np.errstate(invalid="ignore"):  # signalling NaN
            x = np.nan_to_num(
                bits.view(real).astype(np.float64), nan=1.0, posinf=largest, neginf=-largest
            )
        return x.astype(real).view(dtype)

    return hnp.arrays(unsigned, parts).map(build)


def ordinary_entries(dtype, size, power):
    """Entries of one magnitude, 2**power."""
    parts = hnp.arrays(np.float64, (2, size), elements=st.floats(-1, 1, width=16))

    def build(x):
        x = x * 2.0**power
        return (x[0] + 1j * x[1] if np.dtype(dtype).kind == "c" else x[0]).astype(dtype)

    return parts.map(build)


def flush(x):
    """What XLA on CPU computes with: float32 numbers below 2**-126 count as 0."""
    x = exact(x)
    if x.dtype.kind == "c":
        return flush(x.real) + 1j * flush(x.imag)
    return np.where(np.abs(x) < TINY, 0, x)
