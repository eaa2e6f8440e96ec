"""The oracle of exact scales against the errors of its scales, and against dense searches."""

import numpy as np
import pytest

from jaxclip._core.grids import code_range
from oracles.exact_scales import distributions, exact_optimum, optimal_scale


def errors_of(x, scale, low: int, high: int, importance=1.0) -> np.ndarray:
    """Weighted squared error of each row, in float64."""
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    safe = np.where(scale == 0, 1, scale)
    codes = np.clip(np.round(x / safe), low, high)
    return np.sum(importance * (x - scale * codes) ** 2, axis=-1)


@pytest.mark.parametrize("bits", ["ternary", 2, 4, 6])
@pytest.mark.parametrize("levels", ["full", "narrow"])
def test_every_row_has_the_error_of_the_oracle(bits, levels):
    low, high = code_range(bits, levels)
    rows = np.concatenate(list(distributions(4, 40).values()))
    got = errors_of(rows, optimal_scale(rows, (1,), low, high), low, high)
    best = [exact_optimum(row, bits, levels) for row in rows]
    np.testing.assert_allclose(got, best, rtol=1e-9, atol=1e-12 * np.sum(rows**2, 1).max())


@pytest.mark.thorough
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-7, 7), (-2, 1)])
def test_with_importance_no_scale_of_a_dense_search_is_better(low, high):
    rng = np.random.default_rng(2)
    x, v = rng.standard_t(3, (6, 24)), rng.exponential(size=(6, 24)) ** 2
    v[0, :20] = 0
    got = errors_of(x, optimal_scale(x, (1,), low, high, v), low, high, v)
    scales = np.abs(x).max(1) / high * np.linspace(0.02, 8, 20001)[:, None]
    both = np.concatenate([scales, -scales] if low < -high else [scales])
    dense = np.min([errors_of(x, s[:, None], low, high, v) for s in both], axis=0)
    assert np.all(got <= dense * (1 + 1e-12))
    assert np.all(dense <= got * 1.02 + 1e-12)


def test_blocks_over_several_axes_have_the_scales_they_have_alone():
    x = np.random.default_rng(0).normal(size=(7, 3, 10))
    whole = optimal_scale(x, (0, 2), -8, 7)
    assert whole.shape == (1, 3, 1)
    alone = [optimal_scale(x[:, i].reshape(1, -1), (1,), -8, 7)[0, 0] for i in range(3)]
    np.testing.assert_allclose(whole[0, :, 0], alone, rtol=1e-12)


def test_degenerate_rows_have_finite_scales():
    x = np.stack([np.zeros(3), np.full(3, -0.3), np.full(3, 1e38), np.full(3, 1e-42)])
    scale = optimal_scale(x, (1,), -8, 7)
    assert scale[0] == 0
    assert np.all(errors_of(x / 0.3, scale / 0.3, -8, 7) <= 1e-25 * np.sum((x / 0.3) ** 2, 1))
    assert optimal_scale(np.zeros((2, 0)), (1,), -8, 7).tolist() == [[0.0], [0.0]]
