"""The exact optimum of a low-bit scale, by enumeration, and shapes of weights to try it on."""

import numpy as np

from jaxclip._core.grids import code_range


def exact_optimum(x: np.ndarray, bits, levels: str) -> float:
    """Least squared error over all scales, by enumeration of the breakpoints.

    For codes l the best scale is A / B, A = sum |x| l, B = sum l**2, and it saves A**2 / B.
    As the scale falls, weight i moves from level k - 1 to k at |x_i| / (k - 1/2).
    """
    x = np.asarray(x, np.float64)
    energy = float(np.sum(x * x))
    if bits == 1:
        return energy - float(np.sum(np.abs(x))) ** 2 / x.size
    low, high = code_range(bits, levels)
    gain = _best_gain(x, -low, high)
    return energy - (max(gain, _best_gain(-x, -low, high)) if low < -high else gain)


def exact_affine_optimum(x: np.ndarray, low: int, high: int) -> float:
    """Least squared error over all scales and all zero points from `low` to `high`."""
    x = np.asarray(x, np.float64)
    gains = [_best_gain(x, zero - low, high - zero) for zero in range(low, high + 1)]
    return float(np.sum(x * x)) - max(gains)


def _best_gain(x: np.ndarray, down: int, up: int) -> float:
    """What the best scale saves with codes from `-down` to `up`."""
    size, levels = np.abs(x)[:, None], np.arange(1, max(down, up) + 1)
    allowed = levels[None] <= np.where(x > 0, up, down)[:, None]
    breakpoints = (size / (levels - 0.5)[None])[allowed]
    in_a = np.broadcast_to(size, allowed.shape)[allowed]
    in_b = np.broadcast_to((2 * levels - 1)[None], allowed.shape)[allowed]
    order = np.argsort(-breakpoints, kind="stable")
    gains = np.cumsum(in_a[order]) ** 2 / np.cumsum(in_b[order])
    return float(np.max(gains, initial=0.0))


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
