"""Values that are no threshold, and the error that each raises."""

import jax.numpy as jnp
import numpy as np

NOT_THRESHOLDS = [
    (-1, ValueError),
    (-1.0, ValueError),
    (-np.inf, ValueError),
    (np.float32(-0.5), ValueError),
    (np.asarray(-0.5), ValueError),
    (np.nan, ValueError),
    (np.float16(np.nan), ValueError),
    ("1.0", TypeError),
    (b"1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (np.bool_(True), TypeError),
    (np.asarray(True), TypeError),
    (1j, TypeError),
    (np.complex64(1), TypeError),
    (jnp.asarray(True), TypeError),
    (jnp.asarray(1j), TypeError),
]
