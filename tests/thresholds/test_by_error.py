"""least_squares: scales refitted to their codes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip._core.grids import code_range
from jaxclip.thresholds.by_error import least_squares
from jaxclip.thresholds.by_magnitude import max_abs

WIDTHS = [1, "ternary", 2, 4, 8]
every_width = pytest.mark.parametrize("bits", WIDTHS)


def refitted(row, low, high, num_refits, step):
    row = row.astype(np.float64)

    def refit(s):
        q = np.clip(np.round(row / s), low, high) if s > 0 else np.zeros_like(row)
        s = (row * q).sum() / (q**2).sum() if q.any() else s
        return s, np.square(row - s * q).sum()

    s = step * np.sqrt(np.mean(row**2))
    if num_refits:
        s = min(refit(np.abs(row).max() / high), refit(s), key=lambda found: found[1])[0]
    for _ in range(num_refits - 1):
        s, _ = refit(s)
    return s * high


@pytest.mark.parametrize("num_refits", [0, 1, 3])
@pytest.mark.parametrize(
    ("bits", "levels", "step"),
    [("ternary", "full", 1.224), (2, "full", 1.048), (4, "full", 0.339), (4, "narrow", 0.353)],
)
def test_least_squares_is_lloyds_alternation_in_float64(bits, levels, step, num_refits):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(9, 50)).astype(np.float32) * np.float32(2.0) ** rng.integers(
        -60, 60, (9, 1)
    )
    w = w.astype(np.float32)
    w[0] = 0
    w[1:3, 7] = 100 * np.abs(
        w[1:3, 7]
    )  # rows for which the scale of the largest weight is the better start
    rule = least_squares(bits, axis=0, num_refits=num_refits, levels=levels)
    got = np.asarray(rule(jnp.asarray(w)))[:, 0]
    expected = [refitted(row, *code_range(bits, levels), num_refits, step) for row in w]
    np.testing.assert_allclose(got, expected, rtol=3e-5)


@every_width
@pytest.mark.parametrize("levels", ["full", "narrow"])
def test_without_a_refit_the_scale_is_the_best_for_a_normal_distribution(bits, levels):
    from scipy.optimize import minimize_scalar
    from scipy.stats import norm

    x = norm.ppf((np.arange(50_000) + 0.5) / 50_000).astype(np.float32)
    low, high = code_range(bits, levels)
    ours = float(least_squares(bits, num_refits=0, levels=levels)(jnp.asarray(x))[0])

    def error(t):
        return sum(
            np.square(y - t / high * np.clip(np.round(y * high / t), low, high)).sum()
            for y in (x, -x)
        )

    if bits == 1:
        assert ours == pytest.approx(np.abs(x).mean(), rel=1e-5)
        return
    found = minimize_scalar(error, bounds=(0.7 * ours, 1.5 * ours), method="bounded").x
    assert abs(found - ours) < 0.01 * ours, (found, ours)


@every_width
@pytest.mark.parametrize("levels", ["full", "narrow"])
def test_the_error_is_never_above_that_of_the_largest_weight(bits, levels):
    rng = np.random.default_rng(3)
    rows = [rng.standard_t(df, (20, 64)) for df in (1, 3)]
    rows += [rng.normal(size=(20, 64)), rng.normal(size=(20, 64)), np.eye(20, 64)]
    rows[-2][:, 5] = 50
    w = jnp.asarray(np.concatenate(rows).astype(np.float32))

    def errors(rule):
        q = jaxclip.quantize(
            w,
            jaxclip.Grid(bits, levels=levels, axis=0),
            threshold=rule(),
        )
        return np.square(np.asarray(jaxclip.dequantize(q)) - np.asarray(w)).sum(axis=1)

    for num_refits in (1, 2):
        ours = errors(functools.partial(least_squares, num_refits=num_refits))
        assert np.all(ours <= errors(max_abs) * (1 + 1e-5))


@every_width
def test_a_refit_never_raises_the_error(bits):
    w = jnp.asarray(np.random.default_rng(2).laplace(size=(400, 6)).astype(np.float32))

    def error(num_refits):
        rule = functools.partial(least_squares, num_refits=num_refits)
        q = jaxclip.quantize(w, jaxclip.Grid(bits, levels="narrow", axis=1), threshold=rule())
        return np.square(np.asarray(jaxclip.dequantize(q)) - np.asarray(w)).sum(axis=0)

    for n in range(3):
        assert np.all(error(n + 1) <= error(n) * (1 + 1e-5))


def test_least_squares_names_what_is_wrong():
    with pytest.raises(ValueError, match="bits"):
        least_squares(7)
    for wrong in (-1, 0.5, True):
        with pytest.raises(ValueError, match="num_refits"):
            least_squares(2, num_refits=wrong)
    with pytest.raises(ValueError, match="needs bits"):
        least_squares()(jnp.ones(3))


@pytest.mark.thorough
@pytest.mark.parametrize("factory", [least_squares, jaxclip.mse_optimal])
def test_a_rule_may_be_made_for_a_grid_instead_of_its_fields(factory):
    w = jnp.asarray(np.random.default_rng(4).normal(size=(6, 8)).astype(np.float32))
    rule = factory(jaxclip.Grid(3, levels="narrow", axis=0, group_size=4))
    np.testing.assert_array_equal(rule(w), factory(3, levels="narrow", axis=0, group_size=4)(w))
    for field in ({"axis": 0}, {"group_size": 4}, {"levels": "narrow"}):
        with pytest.raises(TypeError, match="are fields of a Grid"):
            factory(jaxclip.Grid(3), **field)
