"""The cheapest path, against all paths enumerated and against the limits of information theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.lowbit.coding.trellis import levels_of, odd_states
from jaxclip.lowbit.rounding.paths import (
    cheapest_path,
    measured_lengths,
    measured_path,
    model_lengths,
)

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
    monkeypatch.setattr("jaxclip.lowbit.rounding.paths._BLOCK", 4 * 33)
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


@pytest.mark.parametrize("has_odd_zero", [False, True])
@pytest.mark.parametrize("shape", [1.0, 2.0])
def test_lengths_are_those_of_a_code(has_odd_zero, shape):
    model = model_lengths(np.array([0.7, 2.5]), 40, shape=shape, has_odd_zero=has_odd_zero)
    x = (2.5 * RNG.normal(size=(64, 512))).astype(np.float32)
    codes = cheapest_path(x, model[1])
    for table in (*model, measured_lengths(codes, 40)):
        probabilities = 2.0 ** -np.asarray(table, np.float64)
        probabilities[:, 1:] *= 2
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-4)
    assert (np.asarray(codes)[odd_states(np.asarray(codes)) == 1] == 0).any() == has_odd_zero


def bits_of(codes: np.ndarray) -> float:
    """Bits a code of an ideal code that knows if the state is odd, in float64."""
    total = 0.0
    for part in (codes[odd_states(codes) == kind] for kind in (0, 1)):
        _, counts = np.unique(part, return_counts=True)
        total -= np.sum(counts * np.log2(counts / part.size))
    return total / codes.size


@pytest.mark.parametrize(("step", "limit"), [(0.55, 0.1), (0.26, 0.09), (0.13, 0.09)])
def test_a_gaussian_source_is_coded_near_its_limit(step, limit):
    x = RNG.normal(size=(256, 512)).astype(np.float32)
    model = cheapest_path(x / step, model_lengths(1 / step, 64))
    for codes in map(np.asarray, (model, measured_path(x / step))):
        error = np.mean((x - step * levels_of(codes)) ** 2) / np.mean(x**2)
        # The least number of bits at this error; a uniform grid needs a quarter more.
        assert 0.05 < bits_of(codes) - 0.5 * np.log2(1 / error) < limit


def test_measured_lengths_make_a_path_cheaper():
    for scale in (0.7, 3.0):  # with and without a code 0 in odd states
        x = (scale * RNG.laplace(size=(128, 512))).astype(np.float32)

        def cost(codes: np.ndarray, x: np.ndarray = x) -> float:
            return np.mean((x - levels_of(codes)) ** 2) + 0.4 * bits_of(codes)

        first = np.asarray(cheapest_path(x, model_lengths(np.sqrt(2) * scale, 64)))
        found = np.asarray(measured_path(x))
        assert cost(found) < cost(first)
        assert (found[odd_states(found) == 1] == 0).any() == (scale < 1)


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
