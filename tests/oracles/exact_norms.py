"""Norms in long double NumPy."""

import numpy as np


def oracle(arrays_, ord=2) -> np.longdouble:
    x = np.concatenate([np.abs(np.asarray(a).astype(np.complex128).ravel()) for a in arrays_])
    x = x.astype(np.longdouble)
    if x.size == 0:
        return np.longdouble(0)
    return np.max(x) if ord == np.inf else np.sum(x**ord) ** (np.longdouble(1) / ord)


def assert_norm(got, expected, size, relative=2e-6, tiny=2.0**-126, largest=3.4028235e38):
    """Equal up to rounding; subnormals may be flushed; beyond the largest number is inf."""
    got = np.longdouble(float(got))
    if expected > largest * (1 - relative) and np.isinf(got):
        return
    assert abs(got - expected) <= relative * expected + tiny * size, (got, expected)
