"""Low-bit leaves as values, some rows at a time, so that memory is bounded by a few parts.

value = scale * (code - zero)
"""

import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxclip._core import signals
from jaxclip._core.floats import FLOAT32_MAX, FLOAT32_TINY, cast
from jaxclip._core.threads import in_order, num_cores
from jaxclip.checkpoints.format.layout import StreamedLeaf
from jaxclip.lowbit.arrays import QuantizedArray

_PART = 2**19  # entries that are decoded at a time
# To these NumPy rounds as XLA does.
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def decoded_in_parts(q: QuantizedArray, dtype: DTypeLike | None, name: str) -> StreamedLeaf | None:
    """Returns `dequantize_stored` in parts, decoded when they are read; None if that cannot be.

    Reading a part raises if a value is beyond `dtype`.
    """
    own = jnp.dtype(q.dtype)
    target = jnp.finfo(own if dtype is None else dtype).dtype  # raises unless it is floating
    is_empty = not math.prod(q.shape)
    step = q.fitted_grid.rows_of_a_group(q.shape) if q.ndim and not is_empty else None
    if step is None or not {own.name, target.name} <= set(_DTYPES):
        return None
    num_rows = max(_PART // math.prod(q.shape[1:]) // step, 1) * step
    rows = [slice(i, min(i + num_rows, len(q))) for i in range(0, len(q), num_rows)]
    codes = np.asarray(q.unpacked().qvalue)
    scale, zero = (None if x is None else np.asarray(x) for x in (q.scale, q.zero))
    assert scale is not None
    grid = q.fitted_grid
    largest = min(float(jnp.finfo(own).max), FLOAT32_MAX)

    def expanded(blocks: np.ndarray, rows: slice, shape: tuple[int, ...]) -> np.ndarray:
        if len(blocks) > 1 or grid.group_axes(q.ndim) == (0,):
            size = step if grid.group_axes(q.ndim) == (0,) else 1
            blocks = blocks[rows.start // size : -(-rows.stop // size)]
        return grid.expand_with(np, blocks, shape)

    def decode(rows: slice) -> np.ndarray:
        signals.check_stop()
        levels = codes[rows].astype(np.float32)
        if zero is not None:
            levels -= expanded(zero, rows, levels.shape)
        with np.errstate(over="ignore"):
            levels *= expanded(flushed, rows, levels.shape)
        # A value just beyond the leaf's own dtype is its largest number.
        np.clip(levels, -largest, largest, out=levels)
        return levels.astype(own) if target == own else cast(name, levels, target)

    flushed = scale.astype(np.float32)
    # As XLA on CPU does. Then no product is subnormal, because codes are integers.
    flushed = np.where(np.abs(flushed) < FLOAT32_TINY, np.copysign(np.float32(0), flushed), flushed)

    def parts() -> Iterator[np.ndarray]:
        return in_order(decode, rows, num_cores())

    return StreamedLeaf(q.shape, target, parts)
