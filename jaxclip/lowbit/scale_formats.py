"""Formats of scales, to which scales are rounded before codes are computed with them.

| format     | bytes | magnitudes                                | relative error, at most |
|------------|-------|-------------------------------------------|-------------------------|
| `float32`  | 4     | 2**-126 .. 3.4e38                         | 0                       |
| `float16`  | 2     | 2**-24 .. 65504                           | 2**-11 from 2**-14 on   |
| `bfloat16` | 2     | 2**-126 .. 3.39e38                        | 2**-8                   |
| `log8`     | 1     | `largest * 2**(-k / 8)`, k = 0 .. 127     | 2**(1/16) - 1 = 4.4 %   |

A magnitude outside of the range becomes the nearest end of it, so no scale is ever 0 or infinite.
Below 2**-14 a float16 is a multiple of 2**-24, with an error of up to 2**-25.

`log8` has one float32 for the array, its largest magnitude. A byte is the sign of the scale in its
highest bit and k in the other seven: a range of 60,000 to 1 in steps of 9 %. In memory such scales
are float32 and have exactly the values of the bytes.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core.floats import FLOAT32_TINY

_STEPS = 8  # of log8, for a factor of two
_LARGEST_CODE = 127
_POWERS = (2.0 ** (-np.arange(_LARGEST_CODE + 1) / _STEPS)).astype(np.float32)
# From here on the smallest magnitude of log8 is a normal float32.
_SMALLEST_LARGEST = 2.0**-110


def dtype_in_memory(scale_dtype: str) -> str:
    """Returns the dtype of the scales of a format in memory."""
    return "float32" if scale_dtype == "log8" else scale_dtype


# Compiled, because single operations take longer to compile, one after the other.
@functools.partial(jax.jit, static_argnames="scale_dtype", inline=True)
def round_scale(scale: ArrayLike, scale_dtype: str, largest: ArrayLike | None = None) -> jax.Array:
    """Returns float32 scales rounded to a format; signs are kept."""
    # log8 needs the largest magnitude of an array's scales: of all these if it is not given.
    scale = jnp.asarray(scale, jnp.float32)
    if scale_dtype == "log8":
        largest = jnp.asarray(largest_log8(scale if largest is None else largest, jnp))
        # Not log2 of a quotient: by a number near the largest float32 it would be subnormal.
        places = jnp.round(_STEPS * (jnp.log2(largest) - jnp.log2(jnp.abs(scale))))
        index = jnp.clip(places, 0, _LARGEST_CODE).astype(jnp.int32)
        return jnp.copysign(jnp.asarray(_POWERS)[index] * largest, scale)
    info = jnp.finfo(scale_dtype)
    smallest = info.smallest_subnormal if scale_dtype == "float16" else info.tiny
    size = jnp.clip(jnp.abs(scale), float(smallest), float(info.max))
    return jnp.copysign(size, scale).astype(scale_dtype)


def encode_log8(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the uint8 codes and the largest magnitude of scales that are rounded to log8."""
    largest = np.asarray(largest_log8(scale, np), np.float32)
    size = np.maximum(np.abs(scale.astype(np.float64)), FLOAT32_TINY)
    index = np.clip(np.round(_STEPS * np.log2(largest / size)), 0, _LARGEST_CODE)
    codes = (index + 128 * np.signbit(scale)).astype(np.uint8)
    if not np.array_equal(decode_log8(codes, largest), scale):
        raise ValueError("scales are not those of log8: quantize with scale_dtype='log8'.")
    return codes, largest


def decode_log8(codes: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Returns the float32 scales of uint8 codes and the largest magnitude."""
    size = _POWERS[codes & np.uint8(127)] * np.float32(largest)
    return np.where(codes >= 128, -size, size)


def largest_log8(scale: Any, xp: ModuleType) -> Any:
    """Returns the largest magnitude of scales as a file has it; `xp` is NumPy or jax.numpy."""
    return xp.maximum(xp.max(xp.abs(scale), initial=0), np.float32(_SMALLEST_LARGEST))
