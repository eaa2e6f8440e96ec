"""Rounding with feedback against its definition in float64, and against rounding without data."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import Grid, dequantize, max_abs, mse_optimal, quantize
from jaxclip.lowbit.coding.trellis import chain_length, levels_of, path_of
from jaxclip.lowbit.rounding import feedback
from jaxclip.lowbit.rounding.feedback import (
    InputFactor,
    importance_of,
    output_energy,
    output_error,
    path_with_feedback,
    round_with_feedback,
)
from jaxclip.lowbit.rounding.moments import InputMoments, MatrixView
from jaxclip.lowbit.rounding.paths import cheapest_path, model_lengths


def inputs(num, size, seed=0):
    """Correlated inputs with a few large ones, as activations have them."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(size, size)) * rng.lognormal(size=size)
    return (rng.normal(size=(num, size)) @ mix / size**0.5).astype(np.float32)


def moments_of(x, view):
    """Moments of inputs (stack, samples, inputs)."""
    second = np.einsum("sni,snj->sij", x, x, dtype=np.float64).astype(np.float32)
    return InputMoments(
        jnp.asarray(second), jnp.asarray(x.sum(1)), jnp.full(len(x), x.shape[1]), view
    )


def factor_moments(moments):
    return feedback.factor_moments(moments, moments.view.shape, "w")


def dense(x, num_outputs):
    return moments_of(x[None], MatrixView((x.shape[1], num_outputs), (), (0,), (1,)))


def weights(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_definition(w, scale, moments, low, high):
    """The codes of one matrix in float64, input by input, without blocks."""
    factor = factor_moments(moments).factors[0]
    w, scale = w[factor.order].astype(np.float64), scale[factor.order].astype(np.float64)
    codes, errors = np.zeros(w.shape), np.zeros(w.shape)
    for i in reversed(range(len(w))):
        wanted = w[i] + factor.unit[i + 1 :, i] @ errors[i + 1 :]
        codes[i] = np.clip(np.round(wanted / scale[i]), low, high)
        errors[i] = w[i] - codes[i] * scale[i]
    restored = np.empty_like(codes)
    restored[factor.order] = codes
    return restored


def test_the_factor_gives_back_the_damped_moments():
    x = inputs(500, 20)
    moments = dense(x, 3)
    factor = factor_moments(moments).factors[0]
    h = np.asarray(moments.second[0], np.float64)
    h = h + 0.01 * np.diagonal(h).mean() * np.eye(20)
    u = factor.unit.astype(np.float64)
    np.testing.assert_allclose(
        u * factor.weights @ u.T, h[np.ix_(factor.order, factor.order)], rtol=1e-5, atol=1e-3
    )
    assert np.diagonal(h)[factor.order[-1]] == np.diagonal(h).max()


@pytest.mark.parametrize("shape", [(5, 3), (64, 10), (130, 700)])
def test_codes_are_those_of_the_definition(shape):
    x, w = inputs(1000, shape[0]), weights(*shape)
    moments = dense(x, shape[1])
    q = quantize(w, Grid(4, axis=-1), threshold=max_abs)
    found = round_with_feedback(w, q, factor_moments(moments))
    scale = np.broadcast_to(q.scale, shape)
    expected = by_definition(w, scale, moments, *q.grid.code_range)
    # Sums in another order move codes that lie between two.
    assert np.mean(np.asarray(found.qvalue) != expected) < 2e-3
    np.testing.assert_array_equal(found.scale, q.scale)


def test_a_matrix_of_four_entries_is_rounded_as_by_hand():
    # H = [[1, .9], [.9, 1]] * 2, damped by .02: the second input is rounded first, as 1 (error
    # -.4), and .9 / 1.01 of its error moves the first from .4 to .0436, which rounds to 0.
    w = np.array([[0.4], [0.6]], np.float32)
    view = MatrixView((2, 1), (), (0,), (1,))
    moments = InputMoments(
        jnp.array([[[2, 1.8], [1.8, 2]]]), jnp.zeros((1, 2)), jnp.full(1, 2), view
    )
    q = quantize(w, Grid(4, axis=None, levels="narrow"), threshold=7.0)
    assert q.scale == 1
    factored = factor_moments(moments)
    assert round_with_feedback(w, q, factored).qvalue.tolist() == [[0], [1]]
    expected = 2.02 * (0.4**2 + 0.4**2) - 2 * 1.8 * 0.4 * 0.4  # errors .4 and -.4
    found = output_error(w, round_with_feedback(w, q, factored), factored)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


GRIDS = [
    Grid(1, axis=-1),
    Grid("ternary", axis=-1),
    Grid(2, axis=-1, group_size=16),
    Grid(3, axis=0),
    Grid(4, axis=None, levels="narrow"),
    Grid(4, axis=-1, zero_point=True),
    Grid(8, axis=-1, scale_dtype="log8"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_outputs_are_nearer_on_every_grid(grid):
    x, w = inputs(2000, 96), weights(96, 40)
    factored = factor_moments(dense(x, 40))
    q = quantize(w, grid, threshold=max_abs)
    found = round_with_feedback(w, q, factored)
    found.validate()

    def error(q):
        return np.square(x @ (w - np.asarray(dequantize(q)))).sum()

    assert error(found) < (0.9 if grid.bits == 1 else 0.7) * error(q)


def test_output_error_is_that_of_the_inputs():
    x, w = inputs(2000, 30), weights(30, 8)
    factored = factor_moments(dense(x, 8))
    q = quantize(w, Grid(3, axis=-1), threshold=max_abs)
    e = (w - np.asarray(dequantize(q))).astype(np.float64)
    damping = 0.01 * np.square(x, dtype=np.float64).sum(0).mean()
    expected = np.square(x @ e).sum() + damping * np.square(e).sum()
    np.testing.assert_allclose(output_error(w, q, factored), expected, rtol=1e-4)


def test_each_matrix_of_a_stack_is_rounded_by_its_own_moments():
    view = MatrixView((3, 20, 40), (0,), (2,), (1,))  # three matrices, outputs first
    x = np.stack([inputs(500, 40, seed) for seed in range(3)])
    w = weights(3, 20, 40)
    q = quantize(w, Grid(4, axis=(0, 1)), threshold=max_abs)
    found = round_with_feedback(w, q, factor_moments(moments_of(x, view)))
    for i in range(3):
        alone = quantize(w[i].T, Grid(4, axis=-1), threshold=max_abs)
        alone = round_with_feedback(w[i].T, alone, factor_moments(dense(x[i], 20)))
        np.testing.assert_array_equal(found.qvalue[i], alone.qvalue.T)


def test_few_of_all_codes_are_better_than_those_found():
    x, w = inputs(300, 5, seed=3), weights(5, 1)
    factored = factor_moments(dense(x, 1))
    q = quantize(w, Grid(2, axis=None), threshold=mse_optimal)
    levels = range(q.grid.code_range[0], q.grid.code_range[1] + 1)
    errors = []
    for codes in itertools.product(levels, repeat=5):
        other = q.qvalue.at[:, 0].set(jnp.array(codes, jnp.int8))
        errors.append(output_error(w, type(q)(other, q.scale, q.grid, q.dtype), factored))
    found = output_error(w, round_with_feedback(w, q, factored), factored)
    assert found <= output_error(w, q, factored)
    assert np.mean(np.array(errors) < found * (1 - 1e-5)) < 0.01


def test_diagonal_moments_and_inputs_that_are_all_zero_change_no_code():
    w = weights(20, 6)
    q = quantize(w, Grid(4, axis=-1))
    view = MatrixView((20, 6), (), (0,), (1,))
    counts = InputMoments(jnp.arange(20.0)[None], jnp.arange(20.0)[None], jnp.full(1, 190), view)
    diagonal = InputMoments(counts.second, counts.first / 2, counts.count, view)
    zeros = dense(np.zeros((10, 20), np.float32), 6)
    for moments in (counts, diagonal, zeros):
        found = round_with_feedback(w, q, factor_moments(moments))
        np.testing.assert_array_equal(found.qvalue, q.qvalue)
    importance = importance_of(factor_moments(diagonal), (20, 6))
    np.testing.assert_allclose(importance[:, 2], np.arange(20) + 0.095, rtol=1e-6)
    importance = importance_of(factor_moments(counts), (20, 6))
    np.testing.assert_allclose(importance[:, 2], np.arange(20) + 1, rtol=1e-6)


def test_a_price_makes_more_zeros():
    x, w = inputs(2000, 96), weights(96, 40)
    factored = factor_moments(dense(x, 40))
    q = quantize(w, Grid(8, axis=None), threshold=127.0)  # a step of 1
    zeros = [
        np.mean(np.asarray(round_with_feedback(w, q, factored, price=price).qvalue) == 0)
        for price in (0.0, 0.1, 0.3)
    ]
    assert zeros[0] < zeros[1] < zeros[2]


def test_output_energy_is_that_of_the_outputs():
    x, w = inputs(2000, 30), weights(30, 8)
    damping = 0.01 * np.square(x, dtype=np.float64).sum(0).mean()
    expected = np.square(x @ w, dtype=np.float64).sum()
    expected += damping * np.square(w, dtype=np.float64).sum()
    np.testing.assert_allclose(output_energy(w, factor_moments(dense(x, 8))), expected, rtol=1e-4)


def test_moments_of_another_array_and_those_that_are_not_finite_are_refused():
    moments = dense(inputs(10, 4), 6)
    with pytest.raises(ValueError, match=r"for params at 'a', an array of shape \(6, 4\), got"):
        feedback.factor_moments(moments, (6, 4), "params at 'a'")
    with pytest.raises(ValueError, match="moments of w must be finite"):
        factor_moments(dense(np.full((10, 4), np.nan, np.float32), 6))


@pytest.mark.parametrize("num_outputs", [10, 512, 700])
def test_a_path_with_feedback_is_on_the_trellis_and_nearer_than_nearest_codes(num_outputs):
    x, w = inputs(2000, 70), weights(70, num_outputs)
    factor = factor_moments(dense(x, num_outputs)).factors[0]
    scale = np.full((70, 1), 0.5, np.float32)
    levels = path_with_feedback(w, scale, factor, price=0.0)
    length = chain_length(num_outputs)
    for start in range(0, num_outputs, length):
        assert path_of(levels[:, start : start + length]) is not None

    def error(levels):
        return np.square(x @ (w - levels * scale)).sum()

    # As many bits as codes of twice the step.
    assert error(levels) < 0.5 * error(2 * np.round(w / (2 * scale)))


def test_a_path_with_feedback_is_the_path_of_what_feedback_makes_of_each_row():
    x, w = inputs(2000, 5), weights(5, 40)
    factor = factor_moments(dense(x, 40)).factors[0]
    scale = np.linspace(0.3, 0.7, 5, dtype=np.float32)[:, None]
    levels = path_with_feedback(w, scale, factor, price=0.3)
    lengths = model_lengths(np.sqrt(np.mean(np.square(w / scale), axis=1) + 0.2), 64)
    errors = np.zeros((5, 40))
    for i in reversed(range(5)):  # in the factor's order
        row = factor.order[i]
        wanted = w[row] + factor.unit[i + 1 :, i] @ errors[i + 1 :]
        codes = cheapest_path(wanted / scale[row], lengths[row], price=0.3)
        np.testing.assert_array_equal(levels[row], levels_of(codes))
        errors[i] = w[row] - levels[row] * scale[row]


def test_a_path_without_feedback_is_the_cheapest_of_each_row():
    w = weights(6, 30)
    factor = InputFactor(np.arange(6), None, np.ones(6))
    scale = np.full((6, 1), 0.4, np.float32)
    levels = path_with_feedback(w, scale, factor, price=0.3)
    lengths = model_lengths(np.sqrt(np.mean(np.square(w / scale), axis=1) + 0.2), 64)
    codes = cheapest_path(w / scale, lengths, price=0.3)
    np.testing.assert_array_equal(levels, levels_of(codes))
