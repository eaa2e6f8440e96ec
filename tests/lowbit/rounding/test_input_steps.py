"""Entropy-coded weights with a step for each input."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.lowbit.coding.level_coding import encode_levels
from jaxclip.lowbit.coding.trellis import as_chains
from jaxclip.lowbit.rounding.feedback import (
    FactoredMoments,
    factor_moments,
    output_error,
    path_with_feedback,
)
from jaxclip.lowbit.rounding.input_steps import equal_rate_step, quantize_by_inputs
from jaxclip.lowbit.rounding.moments import InputMoments, MatrixView


def factored(view, seed=0):
    """Moments of correlated inputs for each matrix of a view."""
    rng = np.random.default_rng(seed)
    stack, size, _ = view.matrix_shape
    mix = rng.normal(size=(stack, size, size)) * rng.lognormal(size=(stack, 1, size))
    x = rng.normal(size=(stack, 4 * size, size)) @ mix / size**0.5
    second = jnp.asarray(np.einsum("sni,snj->sij", x, x), jnp.float32)
    moments = InputMoments(second, jnp.asarray(x.sum(1)), jnp.full(stack, 4 * size), view)
    return factor_moments(moments, view.shape, "w")


def normal(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def bits(q):
    """Bits an entry of the levels, coded channel by channel, without scales."""
    chains = as_chains(np.asarray(q.qvalue), q.grid.channel_axes(q.ndim))
    return 8 * len(encode_levels(chains, chain=chains.shape[1], num_states=8)) / q.size


DENSE = MatrixView((64, 200), (), (0,), (1,))
OUT_IN = MatrixView((200, 64), (), (1,), (0,))
HEADS = MatrixView((64, 4, 50), (), (0,), (1, 2))
STACK = MatrixView((2, 64, 200), (0,), (1,), (2,))
CONVOLUTION = MatrixView((3, 3, 8, 200), (), (0, 1, 2), (3,))
SPLIT = MatrixView((8, 8, 200), (), (0, 1), (2,))  # of an array (64, 200)


@pytest.mark.parametrize(
    ("view", "shape", "scale_shape"),
    [
        (DENSE, (64, 200), (64, 1)),
        (OUT_IN, (200, 64), (1, 64)),
        (HEADS, (64, 4, 50), (64, 1, 1)),
        (STACK, (2, 64, 200), (2, 64, 1)),
        (CONVOLUTION, (3, 3, 8, 200), (3, 3, 8, 1)),
        (SPLIT, (64, 200), (64, 1)),
    ],
)
def test_each_input_has_a_step_and_paths_beat_uniform_steps_at_equal_bits(view, shape, scale_shape):
    w, moments = normal(*shape), factored(view)
    step = equal_rate_step(w, moments)
    q = quantize_by_inputs(w, moments, 0.4 * step)
    q.validate()
    assert q.scale.shape == scale_shape
    blind = FactoredMoments(view, tuple(f._replace(unit=None) for f in moments.factors))
    uniform = min(
        (quantize_by_inputs(w, None, s) for s in np.geomspace(0.2, 0.8, 12)),
        key=lambda other: abs(bits(other) - bits(q)),
    )
    assert bits(uniform) > bits(q) - 0.25
    errors = [output_error(w, a, moments) for a in (q, uniform)]
    assert errors[0] < 0.5 * errors[1]
    assert errors[0] < output_error(w, quantize_by_inputs(w, blind, 0.4 * step), moments)


def test_the_error_of_outputs_is_about_the_square_of_the_step():
    w, moments = normal(64, 200), factored(DENSE)
    for step in (1.0, 0.3):
        q = quantize_by_inputs(w, moments, step * equal_rate_step(w, moments) / 4, price=0.0)
        squared = (step * equal_rate_step(w, moments) / 4) ** 2
        # Rounding to a step of codes, 2 c, has an error of c^2 / 3; a trellis gains 1.3 dB.
        assert 0.2 < output_error(w, q, moments) / (w.size * squared) < 0.3


def test_a_finer_step_takes_more_bits_and_has_less_error():
    w, moments = normal(64, 200), factored(DENSE)
    step = equal_rate_step(w, moments)
    found = [quantize_by_inputs(w, moments, c * step) for c in (0.1, 0.3, 1.0)]
    sizes, errors = [bits(q) for q in found], [output_error(w, q, moments) for q in found]
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("deviation", "part"), [(4.0, 1.0), (1.1, 1.0), (0.5, 0.25), (0.25, 0.0625)]
)
def test_a_bit_is_worth_a_fraction_of_the_step_or_of_coarser_weights(deviation, part):
    w, (factor,) = normal(64, 200), factored(DENSE).factors
    diagonal = np.square(w[factor.order], dtype=np.float64).mean(1) * factor.weights
    step = np.exp(np.log(diagonal).mean() / 2) / deviation
    q = quantize_by_inputs(w, factored(DENSE), step, price=0.4)
    expected = path_with_feedback(w, np.asarray(q.scale), factor, 0.4 * part)
    np.testing.assert_array_equal(q.qvalue, expected)


def test_no_weight_is_clipped_however_fine_the_step():
    w = normal(64, 200)
    w[3, 5] = 1000.0
    q = quantize_by_inputs(w, factored(DENSE), 1e-6)
    assert abs(float(np.asarray(q)[3, 5]) - 1000) < 10
    assert int(np.abs(q.qvalue).max()) <= 127


def test_weights_whose_groups_share_an_axis_get_one_step():
    view = MatrixView((4, 2, 30), (1,), (0,), (2,))  # of an array (4, 60) in two groups
    w, moments = normal(4, 60), factored(view)
    q = quantize_by_inputs(w, moments, 0.3 * equal_rate_step(w, moments))
    assert q.scale.shape == (1, 1)
    q.validate()
    assert output_error(w, q, moments) > 0


def test_zeros_take_no_bits_and_stay_zeros():
    q = quantize_by_inputs(np.zeros((64, 200), np.float32), factored(DENSE), 0.1)
    assert not np.asarray(q).any()
    assert quantize_by_inputs(np.zeros((0, 4), np.float32), None, 0.1).shape == (0, 4)


def test_the_dtype_is_kept():
    w = jnp.asarray(normal(64, 200), jnp.bfloat16)
    assert quantize_by_inputs(w, factored(DENSE), 0.1).dtype == jnp.bfloat16
