"""Scales in fewer bits: what a scale is rounded to before codes are made with it.

| format     | bytes | magnitudes                                | relative error, at most |
|------------|-------|-------------------------------------------|-------------------------|
| `float32`  | 4     | 2**-126 .. 3.4e38                         | 0                       |
| `float16`  | 2     | 2**-24 .. 65504                           | 2**-11 from 2**-14 on   |
| `bfloat16` | 2     | 2**-126 .. 3.39e38                        | 2**-8                   |
| `log8`     | 1     | `unit * 2**(-k / 8)`, k = 0 .. 127        | 2**(1/16) - 1 = 4.4 %   |

A magnitude outside of the range becomes the nearest end of it, so no scale is ever 0 or
infinite. Below 2**-14 a float16 is a multiple of 2**-24, with an error of up to 2**-25.

`log8` has one float32 `unit` for the array, its largest magnitude (2**-110 if that is smaller).
A byte is the sign of the scale in its highest bit and k in the other seven, so a range of
60,000 to 1 in steps of 9 %. In memory such scales are float32 and have exactly the values that
the bytes stand for; in a file they are the bytes and the unit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core.floats import FLOAT32_TINY

_STEPS = 8  # of log8, for a factor of two
_LARGEST_CODE = 127
_POWERS = (2.0 ** (-np.arange(_LARGEST_CODE + 1) / _STEPS)).astype(np.float32)
# From here on the smallest magnitude is a normal float32.
_SMALLEST_UNIT = 2.0**-110


def dtype_in_memory(scale_dtype: str) -> str:
    """Returns the dtype of the scales of a format in memory."""
    return "float32" if scale_dtype == "log8" else scale_dtype


def round_scale(scale: ArrayLike, scale_dtype: str) -> jax.Array:
    """Rounds scales to a format; signs are kept.

    Args:
      scale: float32 scales, finite; may be traced. All of an array's: log8 measures them.
      scale_dtype: "float32", "float16", "bfloat16" or "log8".

    Returns:
      Scales in their dtype, for log8 float32; never 0 and never infinite.

    Example:
      >>> print(round_scale(jnp.array([1.0, 0.3, -1e-9]), "log8"))
      [ 1.0000000e+00  2.9730177e-01 -1.6639828e-05]
      >>> print(round_scale(jnp.array([0.3, 1e-9]), "float16"))
      [3.e-01 6.e-08]
    """
    scale = jnp.asarray(scale, jnp.float32)
    if scale_dtype == "log8":
        unit = _unit(scale, jnp)
        # A quotient by a unit near the top of float32 would go through a subnormal.
        places = jnp.round(_STEPS * (jnp.log2(unit) - jnp.log2(jnp.abs(scale))))
        index = jnp.clip(places, 0, _LARGEST_CODE).astype(jnp.int32)
        return jnp.copysign(jnp.asarray(_POWERS)[index] * unit, scale)
    info = jnp.finfo(scale_dtype)
    smallest = info.smallest_subnormal if scale_dtype == "float16" else info.tiny
    size = jnp.clip(jnp.abs(scale), float(smallest), float(info.max))
    return jnp.copysign(size, scale).astype(scale_dtype)


def encode_log8(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes and the unit of scales that `round_scale` rounded to log8.

    Args:
      scale: float32 scales, NumPy.

    Returns:
      uint8 codes in the shape of `scale`, and a float32 unit of shape ().

    Raises:
      ValueError: If the scales are not exactly those of some bytes and unit.

    Example:
      >>> encode_log8(np.array([0.5, -0.25], np.float32))
      (array([  0, 136], dtype=uint8), array(0.5, dtype=float32))
    """
    unit = np.asarray(_unit(scale, np), np.float32)
    size = np.maximum(np.abs(scale.astype(np.float64)), FLOAT32_TINY)
    index = np.clip(np.round(_STEPS * np.log2(unit / size)), 0, _LARGEST_CODE)
    codes = (index + 128 * np.signbit(scale)).astype(np.uint8)
    if not np.array_equal(decode_log8(codes, unit), scale):
        raise ValueError("scales are not those of log8: quantize with scale_dtype='log8'.")
    return codes, unit


def decode_log8(codes: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Returns the scales that bytes and a unit stand for.

    Args:
      codes: uint8, any shape.
      unit: float32 scalar, at least 2**-110.

    Returns:
      float32 scales in the shape of `codes`.

    Example:
      >>> decode_log8(np.array([0, 136], np.uint8), np.float32(0.5))
      array([ 0.5 , -0.25], dtype=float32)
    """
    size = _POWERS[codes & np.uint8(127)] * np.float32(unit)
    return np.where(codes >= 128, -size, size)


def _unit(scale: Any, xp: Any) -> Any:
    return xp.maximum(xp.max(xp.abs(scale), initial=0), np.float32(_SMALLEST_UNIT))
