"""The exact optimum of a low-bit scale, by enumeration in float64, and weights to try it on.

As the scale falls, weight i moves from level k - 1 to level k at `|w_i| / (k - 1/2)`, and
between two such breakpoints no code changes. For codes l and importances v the best scale is
A / B with `A = sum v |w| l` and `B = sum v l**2`, and it saves `A**2 / B` of the energy. The
largest saving over all breakpoints is the optimum.

Idelbayev et al., Optimal Quantization Using Scaled Codebook, 2021,
https://doi.org/10.1109/CVPR46437.2021.01191
"""

import numpy as np

from jaxclip._core.grids import code_range


def exact_optimum(x: np.ndarray, bits, levels: str) -> float:
    """Least squared error of an array over all scales."""
    x = np.asarray(x, np.float64)
    energy = float(np.sum(x * x))
    if bits == 1:
        return energy - float(np.sum(np.abs(x))) ** 2 / x.size
    if levels == "balanced":
        return energy - _best_balanced_gain(np.abs(x), 2 ** (bits - 1) - 1)
    low, high = code_range(bits, levels)
    gain = _best_gain(x, -low, high)
    return energy - (max(gain, _best_gain(-x, -low, high)) if low < -high else gain)


def exact_affine_optimum(x: np.ndarray, low: int, high: int) -> float:
    """Least squared error over all scales and all zero points from `low` to `high`."""
    x = np.asarray(x, np.float64)
    gains = [_best_gain(x, zero - low, high - zero) for zero in range(low, high + 1)]
    return float(np.sum(x * x)) - max(gains)


def _best_balanced_gain(size: np.ndarray, most: int) -> float:
    """What the best scale saves with levels 1/2, 3/2 ... `most` + 1/2 for magnitudes."""
    # All are on the lowest level at first; at |w| / k one moves from k - 1/2 to k + 1/2.
    places = np.arange(1, most + 1)
    order = np.argsort(-(size[:, None] / places), axis=None, kind="stable")
    a = size.sum() / 2 + np.cumsum(np.repeat(size, most)[order])
    b = size.size / 4 + np.cumsum(np.tile(2 * places, size.size)[order])
    gains = np.append(a**2 / b, size.sum() ** 2 / size.size)
    return float(gains.max())


def _best_gain(x: np.ndarray, down: int, up: int) -> float:
    """What the best scale saves with codes from `-down` to `up`."""
    return float(_best_of_sign(x[None], np.ones((1, x.size)), down, up)[0][0])


def optimal_scale(
    blocks, axes: tuple[int, ...], low: int, high: int, importance=None
) -> np.ndarray:
    """The scale of least weighted squared error of each block, dims kept.

    Negative where the level `low` helps on the positive side; 0 for blocks of zeros.
    """
    shape = tuple(1 if a in axes else n for a, n in enumerate(np.shape(blocks)))
    x = _as_rows(blocks, axes)
    v = np.ones((1, x.shape[1])) if importance is None else _as_rows(importance, axes)
    v = np.broadcast_to(v, x.shape)
    gain, scale = _best_of_sign(x, v, -low, high)
    if low < -high:
        mirrored_gain, mirrored = _best_of_sign(-x, v, -low, high)
        scale = np.where(mirrored_gain > gain, -mirrored, scale)
    return scale.reshape(shape)


def _as_rows(blocks, axes: tuple[int, ...]) -> np.ndarray:
    array = np.moveaxis(np.asarray(blocks, np.float64), axes, range(-len(axes), 0))
    num_rows = int(np.prod(array.shape[: array.ndim - len(axes)]))
    return array.reshape(num_rows, -1) if array.size else np.zeros((num_rows, 0))


def _best_of_sign(
    x: np.ndarray, v: np.ndarray, down: int, up: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the best positive scale of each row saves with codes from `-down` to `up`, and it."""
    largest = np.max(np.abs(x), axis=1, keepdims=True, initial=0)
    unit = np.where(largest > 0, largest, 1)
    size, levels = np.abs(x / unit)[:, :, None], np.arange(1, max(down, up) + 1)
    is_allowed = levels <= np.where(x > 0, up, down)[:, :, None]
    breakpoints = np.where(is_allowed, size / (levels - 0.5), 0).reshape(len(x), -1)
    order = np.argsort(-breakpoints, axis=1, kind="stable")
    counted = np.where(is_allowed, v[:, :, None], 0)
    a, b = ((counted * y).reshape(len(x), -1) for y in (size, 2 * levels - 1))
    a, b = (np.cumsum(np.take_along_axis(y, order, axis=1), axis=1) for y in (a, b))
    a, b = (np.pad(y, ((0, 0), (1, 0))) for y in (a, b))
    safe = np.where(b > 0, b, 1)
    gains = a**2 / safe
    best = np.argmax(gains, axis=1)[:, None]
    gain, scale = (np.take_along_axis(y, best, axis=1) for y in (gains, a / safe))
    return (gain * unit**2)[:, 0], (scale * unit)[:, 0]


def distributions(num_rows: int, row: int, seed: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (num_rows, row)
    gaussian = rng.normal(size=shape)
    outlier = gaussian.copy()
    outlier[:, 5] = 30 * rng.choice([-1, 1], num_rows)
    piled = np.where(rng.random(shape) < 0.5, rng.choice([-1, 1], shape), rng.uniform(-1, 1, shape))
    signs = rng.choice([-1, 1], shape)
    return {
        "Gaussian": gaussian,
        "uniform": rng.uniform(-1, 1, shape),
        "Student-t, 3": rng.standard_t(3, shape),
        "Student-t, 1.5": rng.standard_t(1.5, shape),
        "half on +-t": 0.1 * piled,
        "bimodal +-t, sd t/8": 0.1
        * np.clip(signs * (1 - np.abs(rng.normal(0, 0.125, shape))), -1, 1),
        "one outlier of 30": outlier,
        "arcsine": np.sin(rng.uniform(-np.pi, np.pi, shape)),
        "lognormal": rng.lognormal(0, 1, shape) * signs,
        "one-sided": np.abs(gaussian),
    }
