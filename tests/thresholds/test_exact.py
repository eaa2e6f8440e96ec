"""The enumerated optimum beside an oracle written apart from it, and beside dense searches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip._core.grids import code_range
from jaxclip.thresholds.search import exact
from jaxclip.thresholds.search.exact import optimal_scale
from oracles.exact_scales import distributions, exact_optimum


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


def test_rows_that_are_sorted_in_parts_have_the_scales_they_have_alone(monkeypatch):
    x = np.random.default_rng(0).normal(size=(7, 3, 10))
    whole = optimal_scale(x, (0, 2), -8, 7)
    assert whole.shape == (1, 3, 1)
    monkeypatch.setattr(exact, "_BREAKPOINTS", 1)
    assert np.array_equal(whole, optimal_scale(x, (0, 2), -8, 7))
    alone = [optimal_scale(x[:, i].reshape(1, -1), (1,), -8, 7)[0, 0] for i in range(3)]
    np.testing.assert_allclose(whole[0, :, 0], alone, rtol=1e-12)


def test_degenerate_rows_have_finite_scales():
    x = np.stack([np.zeros(3), np.full(3, -0.3), np.full(3, 1e38), np.full(3, 1e-42)])
    scale = optimal_scale(x, (1,), -8, 7)
    assert scale[0] == 0
    assert np.all(errors_of(x / 0.3, scale / 0.3, -8, 7) <= 1e-25 * np.sum((x / 0.3) ** 2, 1))
    assert optimal_scale(np.zeros((2, 0)), (1,), -8, 7).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("bits", [3, "ternary"])
def test_the_rule_takes_the_optimum_where_the_search_may_miss_it(bits):
    # What the search tries ends a little above max |w| / high; the optimum lies beyond.
    row = np.r_[1.0, 0.25, np.full(30, 1e-3)] if bits == 3 else np.r_[1.0, np.full(9, 0.3)]
    w = jnp.asarray(np.stack([row, np.linspace(-1, 1, row.size)]), jnp.float32)
    low, high = code_range(bits)
    q = jaxclip.quantize(w, jaxclip.Grid(bits, axis=0), threshold=jaxclip.mse_optimal(exact=True))
    x = np.asarray(w, np.float64)
    best = [exact_optimum(r, bits, "full") for r in x]
    np.testing.assert_allclose(errors_of(x, q.scale, low, high), best, rtol=1e-5, atol=1e-12)


def test_under_jit_the_exact_rule_says_that_it_needs_values():
    with pytest.raises(ValueError, match="exact=True needs concrete values"):
        jax.jit(jaxclip.mse_optimal(4, exact=True))(jnp.ones(3))


@pytest.mark.parametrize("option", [{"exact": True}, {"importance": np.ones(3)}])
def test_with_a_zero_point_the_options_of_grids_around_zero_are_refused(option):
    with pytest.raises(ValueError, match="exact and importance are for grids without a zero"):
        jaxclip.quantize(
            jnp.ones(3),
            jaxclip.Grid(4, axis=None, zero_point=True),
            threshold=jaxclip.mse_optimal(**option),
        )
