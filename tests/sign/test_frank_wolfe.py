"""Steps to the corner of the box: the formula in float64, the box to the bit, the way in."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import jaxclip
from jaxclip.sign import frank_wolfe, soft_sign
from jaxclip.thresholds.values import resolve_threshold
from oracles.exact_sets import DTYPES, drawn

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@functools.partial(jax.jit, static_argnames="tx")
def step(tx, w, g, state):
    updates, state = tx.update(g, state, w)
    return optax.apply_updates(w, updates), state


def test_it_is_the_step_to_the_corner_of_the_formula_in_float64():
    tx, w, m = frank_wolfe(0.1, 0.5), drawn(0, (20,), np.float32, 0.2), np.zeros(20)
    expected, state = w.astype(np.float64), tx.init(w)
    for i in range(30):
        g = drawn(i + 1, (20,), np.float32)
        w, state = step(tx, w, g, state)
        m = 0.9 * m + 0.1 * g.astype(np.float64)
        expected = 0.9 * expected - 0.1 * 0.5 * np.sign(m)
    np.testing.assert_allclose(w, expected, atol=1e-5)


def test_it_is_lion_with_the_weight_decay_of_the_box():
    # w - alpha * (sign + w / t) with alpha = gamma * t
    one = frank_wolfe(0.02, 0.5, jaxclip.scale_by_lion())
    two = jaxclip.lion(0.02 * 0.5, weight_decay=1 / 0.5)
    w = v = jnp.asarray(drawn(1, (30,), np.float32))
    states = one.init(w), two.init(v)
    for i in range(20):
        g = drawn(i + 2, (30,), np.float32)
        (w, first), (v, second) = step(one, w, g, states[0]), step(two, v, g, states[1])
        states = first, second
    np.testing.assert_allclose(w, v, atol=2e-6)


@functools.partial(jax.jit, static_argnums=4)
def step_from(w, g, gamma, bound, dtype_of_updates):
    tx = frank_wolfe(gamma, bound, optax.identity())
    updates, _ = tx.update(g.astype(dtype_of_updates), tx.init(w), w)
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(w, updates)


@every_dtype
@given(
    seed=st.integers(0, 2**32 - 1),
    gamma=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 0.3, 0.5, 0.9, 0.999, 1 - 2**-24, 1.0]),
    power=st.integers(-12, 10),
    bound=st.floats(1.0, 2.0),
)
@example(seed=0, gamma=1.0, power=0, bound=1.1)
def test_weights_in_the_box_are_in_it_after_the_step_to_the_bit(dtype, seed, gamma, power, bound):
    bound, rng = np.float32(bound * 2.0**power), np.random.default_rng(seed)
    w = np.asarray(jaxclip.clip_weights(drawn(seed, (512,), dtype, float(bound)), bound))
    d = np.sign(rng.normal(size=512)) * rng.choice([1.0, 0.3, 1.7], size=512)
    for updates in {np.dtype(dtype), np.dtype(np.float32)}:
        got = step_from(w, jnp.asarray(d, jnp.float32), np.float32(gamma), bound, updates)
        assert got.dtype == dtype
        assert np.abs(np.asarray(got).astype(np.float64)).max() <= float(bound)
        wide = w.astype(np.float64)
        exact = wide - gamma * (float(bound) * np.clip(d, -1, 1) + wide)
        eps = float(ml_dtypes.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=8 * eps * float(bound))


def test_weights_outside_come_in_exponentially_fast_even_against_the_gradient():
    tx, w = frank_wolfe(0.1, 0.5), jnp.asarray([4.0, -3.0, 0.1])
    state, excess = tx.init(w), [3.5, 2.5]
    g = jnp.asarray([-1.0, 1.0, 1.0])  # outwards: the slowest way in
    for _ in range(100):
        w, state = step(tx, w, g, state)
        excess = [0.9 * e for e in excess]
        np.testing.assert_allclose(np.abs(w[:2]), np.asarray(excess) + 0.5, rtol=1e-5)
    inwards, _ = step(frank_wolfe(0.1, 0.5), w, -g, frank_wolfe(0.1, 0.5).init(w))
    assert np.all(np.abs(inwards) <= 0.5)


def test_boxes_may_be_rules_and_trees_and_leaves_without_one_take_gamma_itself():
    params = {"dense": {"kernel": jnp.full((4, 2), 0.1), "bias": jnp.full(2, 0.1)}}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = frank_wolfe(0.5, jaxclip.fan_in(1.0))
    got, _ = step(tx, params, grads, tx.init(params))
    bound = resolve_threshold(jaxclip.fan_in(1.0), params)["dense"]["kernel"]
    np.testing.assert_allclose(
        got["dense"]["kernel"], 0.05 - 0.5 * np.full((4, 2), bound), rtol=1e-5
    )
    np.testing.assert_allclose(got["dense"]["bias"], 0.1 - 0.5, rtol=2e-6)
    traced = step_from(jnp.ones(2), jnp.ones(2), 0.5, jnp.float32(np.nan), np.dtype(np.float32))
    np.testing.assert_allclose(traced, 0.5, rtol=1e-6)


def test_soft_signs_step_a_part_of_the_way_and_complex_ones_stay_in_their_disc():
    direction = jaxclip.scale_by_signum(0.0, sign=soft_sign(1.0))
    tx, w = frank_wolfe(0.5, 1.0, direction), jnp.zeros(2)
    got, _ = step(tx, w, jnp.asarray([0.5, 30.0]), tx.init(w))
    soft, _ = direction.update(jnp.asarray([0.5, 30.0]), direction.init(w))
    assert 0 < soft[0] < 0.9
    np.testing.assert_allclose(got, -0.5 * soft, rtol=2e-6)
    rng = np.random.default_rng(0)
    z = jnp.asarray(np.exp(2j * np.pi * rng.random(200)), jnp.complex64)
    tx = frank_wolfe(0.7, 1.0)
    got, _ = step(tx, z, jnp.conj(z) * (1 + 0.1j), tx.init(z))
    assert np.abs(np.asarray(got, np.complex128)).max() <= 1 + 1e-6


def test_gammas_gone_wrong_make_no_step_or_the_whole_one():
    w, g = jnp.asarray([0.25, -0.25]), jnp.ones(2)
    for gamma, expected in [(np.nan, w), (-1.0, w), (2.0, [-0.5, -0.5]), (np.inf, [-0.5, -0.5])]:
        got = step_from(w, g, jnp.float32(gamma), jnp.float32(0.5), np.dtype(np.float32))
        np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1.5, 1.0), "learning_rate"),
        ((-0.1, 1.0), "learning_rate"),
        ((np.nan, 1.0), "learning_rate"),
        (("1", 1.0), "learning_rate"),
        ((0.1, -1.0), "threshold"),
        ((0.1, None), "threshold"),
        ((0.1, 1.0, "lion"), "direction"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(arguments, name):
    with pytest.raises((TypeError, ValueError), match=name):
        frank_wolfe(*arguments)


def test_it_needs_the_parameters():
    tx = frank_wolfe(0.1, 1.0)
    with pytest.raises(ValueError, match="frank_wolfe needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
