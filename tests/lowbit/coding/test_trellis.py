"""Levels of the trellis, against its definition read aloud in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.lowbit.coding.trellis import (
    NEXT_STATES,
    as_chains,
    chains_shape,
    from_chains,
    levels_of,
    path_of,
)

RNG = np.random.default_rng(0)
SHAPES = [(1,), (7,), (3, 8), (5, 9), (2, 3, 64), (1, 1001), (0, 4), (4, 0)]
states = pytest.mark.parametrize("num_states", [4, 8])


def levels_by_definition(codes: np.ndarray, num_states: int) -> np.ndarray:
    levels = np.zeros(codes.shape, np.int64)
    for chain in np.ndindex(codes.shape[:-1]):
        state = 0
        for i, code in enumerate(map(int, codes[chain])):
            sign = (code > 0) - (code < 0)
            levels[(*chain, i)] = 2 * code - (sign if state % 2 else 0)
            state = int(NEXT_STATES[num_states][state, code % 2])
    return levels


@states
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_levels_are_those_of_the_definition(num_states, shape, dtype):
    codes = RNG.integers(-128, 128, shape).astype(dtype)
    expected = levels_by_definition(codes, num_states)
    found = levels_of(codes, num_states)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, expected)
    compiled = levels_of(jnp.asarray(codes), num_states)
    np.testing.assert_array_equal(compiled, expected)
    traced = jax.jit(lambda k: levels_of(k, num_states))(codes)
    np.testing.assert_array_equal(traced, expected)
    assert compiled.dtype == found.dtype == (np.int16 if dtype == np.int8 else np.int32)


@states
def test_codes_of_levels_come_back(num_states):
    codes = RNG.integers(-63, 64, (6, 250)).astype(np.int8)
    levels = levels_of(codes, num_states).astype(np.int8)
    path = path_of(levels, num_states)
    assert path is not None
    found, is_odd = path
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(levels, 2 * codes - np.sign(codes) * is_odd)
    assert found.dtype == np.int8


@states
def test_levels_on_no_path_have_no_codes(num_states):
    assert path_of(np.array([[1, 0, 0]]), num_states) is None  # state 0 has even levels
    assert path_of(RNG.integers(-4, 5, (4, 100)), num_states) is None


@states
def test_each_state_is_reached_from_two_others(num_states):
    table = NEXT_STATES[num_states]
    assert sorted(table.reshape(-1)) == sorted(2 * list(range(num_states)))
    assert (table[:, 0] != table[:, 1]).all()


def test_other_numbers_of_states_are_refused():
    with pytest.raises(ValueError, match="num_states must be"):
        levels_of(np.zeros((1, 3), np.int8), 16)


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((384, 1536), (), (1152, 512)), ((784, 10), (0,), (784, 10)), ((784, 10), (1,), (20, 392)),
        ((3, 3, 64, 100), (0, 1, 2), (576, 100)), ((5, 1000), (0,), (10, 500)),
        ((5, 1001), (0,), (10, 501)), ((2, 6, 4), (0, 2), (8, 6)), ((7,), (), (1, 7)),
        ((), (), (1, 1)), ((0, 4), (0,), (0, 4)), ((4, 0), (0,), (0, 1)),
    ],
)  # fmt: skip
def test_chains_are_channels_or_equal_parts_of_them(shape, channels, expected):
    array = np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape)
    chains = as_chains(array, channels)
    assert chains.shape == chains_shape(shape, channels) == expected
    assert np.count_nonzero(chains) == array.size
    np.testing.assert_array_equal(from_chains(chains, shape, channels), array)
    np.testing.assert_array_equal(as_chains(jnp.asarray(array), channels), chains)


def test_a_chain_is_a_channel():
    array = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(as_chains(array, (1,))[2], [8, 9, 10, 11, 20, 21, 22, 23])
