"""The cheapest path, against all paths enumerated and against the limits of information theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.lowbit.trellis import levels_of, odd_states
from jaxclip.lowbit.trellis_rounding import cheapest_path, measured_lengths, model_lengths

RNG = np.random.default_rng(0)
states = pytest.mark.parametrize("num_states", [4, 8])


def costs_of(x, codes, lengths, price, weights, num_states):
    """Costs of paths in float64: `codes` has shape (..., length)."""
    levels = levels_of(codes.astype(np.int32), num_states)
    bits = np.asarray(lengths, np.float64)[odd_states(codes, num_states), np.abs(codes)]
    return np.sum(weights * (x - levels) ** 2 + price * bits, axis=-1)


@states
@pytest.mark.parametrize("price", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("deviation", [0.6, 1.5])
def test_no_path_is_cheaper(num_states, price, deviation):
    every = np.array(list(itertools.product(range(-2, 3), repeat=6)))
    lengths = model_lengths(deviation, 3)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = (deviation * rng.normal(size=6)).astype(np.float32)
        weights = rng.uniform(0.2, 2, 6).astype(np.float32)
        found = cheapest_path(x, lengths, price=price, weights=weights, num_states=num_states)
        cost = costs_of(x, np.asarray(found), lengths, price, weights, num_states)
        least = costs_of(x, every, lengths, price, weights, num_states).min()
        assert least - 1e-9 <= cost <= least * (1 + 1e-5)


@states
def test_chains_are_independent_and_tables_may_be_their_own(num_states):
    x = (3 * RNG.normal(size=(2, 5, 70))).astype(np.float32)
    weights = RNG.uniform(0.5, 2, 70).astype(np.float32)
    lengths = model_lengths(RNG.uniform(1, 4, (2, 5)), 12, shape=1.0)
    assert lengths.shape == (2, 5, 2, 12)
    together = cheapest_path(x, lengths, weights=weights, num_states=num_states)
    assert together.dtype == jnp.int8
    for i, j in np.ndindex(2, 5):
        alone = cheapest_path(x[i, j], lengths[i, j], weights=weights, num_states=num_states)
        np.testing.assert_array_equal(together[i, j], alone)


def test_blocks_of_chains_join(monkeypatch):
    x = (3 * RNG.normal(size=(11, 33))).astype(np.float32)
    lengths = model_lengths(3.0, 12)
    whole = cheapest_path(x, lengths)
    monkeypatch.setattr("jaxclip.lowbit.trellis_rounding._BLOCK", 4 * 33)
    jax.clear_caches()
    np.testing.assert_array_equal(cheapest_path(x, lengths), whole)


def test_without_a_price_the_error_is_far_below_that_of_a_grid_of_twice_the_step():
    x = RNG.uniform(20, 100, (64, 1024)).astype(np.float32)  # 0 is in both grids: stay away
    lengths = np.zeros((2, 64), np.float32)
    paths = {n: np.asarray(cheapest_path(x, lengths, price=0.0, num_states=n)) for n in (4, 8)}
    errors = [np.mean((x - levels_of(codes, n)) ** 2) for n, codes in paths.items()]
    # Granular gains of .99 and 1.09 dB (Marcellin and Fischer, 1990); uniform: 4 / 12.
    gains = 10 * np.log10(4 / 12 / np.array(errors))
    np.testing.assert_allclose(gains, [0.99, 1.09], atol=0.02)


def test_entries_beyond_the_largest_code_are_clipped():
    x = np.array([[1e6, -1e6, 3e5, 0.0]], np.float32)
    for num_codes, largest in ((5, 4), (200, 199)):
        codes = np.asarray(cheapest_path(x, np.zeros((2, num_codes), np.float32)))
        assert np.abs(codes).max() == largest
        assert codes[0, -1] == 0
        assert codes.dtype == (np.int8 if num_codes == 5 else np.int32)


def test_lengths_of_a_model_and_of_codes_are_those_of_a_code():
    x = (2.5 * RNG.normal(size=(64, 512))).astype(np.float32)
    model = np.asarray(model_lengths(2.5, 40), np.float64)
    codes = cheapest_path(x, model)
    measured = np.asarray(measured_lengths(codes, 40), np.float64)
    for table in (model, measured):
        probabilities = 2.0**-table * np.where(np.arange(40) > 0, 2, 1)
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    # The model is near: what is measured saves little.
    place = odd_states(np.asarray(codes)), np.abs(np.asarray(codes))
    assert 0 < model[place].mean() - measured[place].mean() < 0.03


def test_empty_arrays_have_no_codes():
    assert cheapest_path(np.zeros((0, 5)), np.zeros((2, 4))).shape == (0, 5)
    assert cheapest_path(np.zeros((5, 0)), np.zeros((2, 4))).shape == (5, 0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="price"):
        cheapest_path(np.zeros(3), np.zeros((2, 4)), price=-1)
    with pytest.raises(ValueError, match=r"lengths must have shape .* got \(3, 4\)"):
        cheapest_path(np.zeros(3), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="num_states"):
        cheapest_path(np.zeros(3), np.zeros((2, 4)), num_states=5)
