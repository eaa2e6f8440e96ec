"""The exact optimum of a low-bit scale, by enumeration in float64 NumPy.

As the scale falls, weight i moves from level k - 1 to level k at `|w_i| / (k - 1/2)`, and
between two such breakpoints no code changes. For codes l and importances v the best scale is
A / B with `A = sum v |w| l` and `B = sum v l^2`, and it saves `A^2 / B` of the energy; the
largest saving over all breakpoints, in the order in which the scale meets them, is the optimum.
"""

import jax
import numpy as np

from jaxclip._core import checks

_BREAKPOINTS = 2**20
"""Breakpoints that are sorted at a time."""


def optimal_scale(
    blocks: jax.Array,
    axes: tuple[int, ...],
    low: int,
    high: int,
    importance: jax.Array | None = None,
) -> np.ndarray:
    """Returns the scale of least squared error for each block, exactly up to rounding.

    Args:
      blocks: Real floating array with concrete values, split as `Grid.split` does.
      axes: Axes that a block spans.
      low: Lowest code, `-high` or `-high - 1`.
      high: Highest code.
      importance: Non-negative factors of the squared errors, of the shape of `blocks`; None
        for ones. May not be traced.

    Returns:
      float64, dims kept, computed on the host, a million breakpoints at a time or all of a
      block. Negative where the level `low` helps on the positive side; 0 for blocks
      without a weight that counts.

    Raises:
      ValueError: If `blocks` or `importance` is traced.

    Example:
      >>> optimal_scale(np.array([[0.5, -2.0, 1.0]]), (1,), -4, 3).tolist()
      [[0.5]]

    References:
      Idelbayev et al., Optimal Quantization Using Scaled Codebook, 2021,
      https://doi.org/10.1109/CVPR46437.2021.01191
    """
    if not (checks.is_concrete(blocks) and checks.is_concrete(importance)):
        raise ValueError(
            "exact=True needs concrete values, got a traced array: call it outside jit."
        )
    shape = tuple(1 if a in axes else n for a, n in enumerate(blocks.shape))
    x = _as_rows(blocks, axes)
    v = np.ones((1, x.shape[1])) if importance is None else _as_rows(importance, axes)
    v = np.broadcast_to(v, x.shape)
    step = max(_BREAKPOINTS // (max(x.shape[1], 1) * max(high, -low)), 1)
    parts = [slice(i, i + step) for i in range(0, len(x), step)]
    scales = [_scales_of(x[part], v[part], low, high) for part in parts]
    return np.concatenate([np.zeros(0), *scales]).reshape(shape)


def _as_rows(blocks: jax.Array, axes: tuple[int, ...]) -> np.ndarray:
    array = np.moveaxis(np.asarray(blocks, np.float64), axes, range(-len(axes), 0))
    kept = array.shape[: array.ndim - len(axes)]
    return (
        array.reshape(int(np.prod(kept)), -1) if array.size else np.zeros((int(np.prod(kept)), 0))
    )


def _scales_of(x: np.ndarray, v: np.ndarray, low: int, high: int) -> np.ndarray:
    """The scale of each row."""
    gain, scale = _best_of_sign(x, v, -low, high)
    if low < -high:
        mirrored_gain, mirrored = _best_of_sign(-x, v, -low, high)
        scale = np.where(mirrored_gain > gain, -mirrored, scale)
    return scale


def _best_of_sign(
    x: np.ndarray, v: np.ndarray, down: int, up: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the best positive scale of each row saves with codes from `-down` to `up`, and it."""
    largest = np.max(np.abs(x), axis=1, keepdims=True, initial=0)
    unit = np.where(largest > 0, largest, 1)
    size, levels = np.abs(x / unit)[:, :, None], np.arange(1, max(down, up) + 1)
    is_allowed = levels <= np.where(x > 0, up, down)[:, :, None]
    breakpoints = np.where(is_allowed, size / (levels - 0.5), 0).reshape(len(x), -1)
    order = np.argsort(-breakpoints, axis=1)
    counted = np.where(is_allowed, v[:, :, None], 0)
    a, b = ((counted * y).reshape(len(x), -1) for y in (size, 2 * levels - 1))
    a, b = (np.cumsum(np.take_along_axis(y, order, axis=1), axis=1) for y in (a, b))
    a, b = (np.pad(y, ((0, 0), (1, 0))) for y in (a, b))
    safe = np.where(b > 0, b, 1)
    gains = a**2 / safe
    best = np.argmax(gains, axis=1)[:, None]
    gain, scale = (np.take_along_axis(y, best, axis=1) for y in (gains, a / safe))
    return gain[:, 0], (scale * unit)[:, 0]
