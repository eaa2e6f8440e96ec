"""Averages of weights against float64 NumPy, inside boxes exactly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.sparsity import keep_sparse
from jaxclip.training import average_weights, averaged_weights


def walk(tx: Any, points: jax.Array) -> tuple[Any, jax.Array]:
    """The state after a run through given weights, the first of them where it starts."""

    def step(state: Any, pair: Any) -> tuple[Any, None]:
        before, after = pair
        _, state = tx.update(after - before, state, before)
        return state, None

    state, _ = jax.lax.scan(step, tx.init(points[0]), (points[:-1], points[1:]))
    return state, points[-1]


def draw(num_points: int = 30, size: int = 50) -> jax.Array:
    points = np.random.default_rng(0).standard_normal((num_points, size))
    return jnp.asarray(points, jnp.float32)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("start_step", [0, 10])
def test_it_is_the_weighted_mean_of_the_weights_after_each_step(decay: float, start_step: int):
    points = draw()
    found = averaged_weights(*walk(average_weights(decay, start_step=start_step), points))
    counted = np.asarray(points, np.float64)[1 + start_step :]
    coefficients = decay ** np.arange(len(counted))[::-1]
    expected = coefficients @ counted / coefficients.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_debiased_average_of_optax_is_the_same():
    points, ema = draw(), optax.ema(0.9)
    state = ema.init(points[0])
    with jax.numpy_dtype_promotion("standard"):  # it takes powers with integers
        for w in points[1:]:
            expected, state = ema.update(w, state)
    found = averaged_weights(*walk(average_weights(0.9), points))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("decay", [0.3, 0.9, 1.0])
def test_averages_of_weights_in_a_box_are_in_the_box_exactly(decay: float, dtype: Any):
    bound = jnp.asarray(0.1, dtype)
    sides = np.random.default_rng(1).choice([1, 1, 1, 0.999], (40, 200))
    points = jnp.minimum(jnp.asarray(sides, dtype) * bound, bound).astype(dtype)
    state, last = walk(average_weights(decay), points)
    found = averaged_weights(state, last)
    assert found.dtype == dtype
    assert bool(jnp.all(found <= bound))
    assert bool(jnp.all(state.average <= bound.astype(jnp.float32)))
    # Weights that never moved have themselves as their average.
    still = jnp.broadcast_to(points[0], points.shape)
    np.testing.assert_array_equal(
        averaged_weights(*walk(average_weights(decay), still)), last * 0 + points[0]
    )


def test_half_precision_is_averaged_in_float32():
    points = jnp.asarray(np.where(np.arange(2000) < 1000, 1, 2)[:, None], jnp.bfloat16)
    state, last = walk(average_weights(0.999), points)
    expected = 1 + (1 - 0.999**1000) / (1 - 0.999**1999)
    np.testing.assert_allclose(state.average, expected, rtol=1e-3)  # bfloat16 would stay at 1
    assert averaged_weights(state, last).dtype == jnp.bfloat16


def test_a_train_step_with_a_box_averages_the_clipped_weights_and_skips_bad_steps():
    tx = optax.chain(jaxclip.sign_sgd(0.4), average_weights(1.0))
    step = jaxclip.make_train_step(lambda w, x: jnp.sum(w * x), tx, weight_threshold=0.5)
    state, seen = jaxclip.TrainState.create(jnp.zeros(3), tx), []
    for x in (1.0, 1.0, jnp.nan, 1.0):
        before = jax.device_get(state.opt_state)
        state, _ = step(state, jnp.full(3, x, jnp.float32))
        if np.isfinite(x):
            seen.append(np.asarray(state.params))
        else:
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), before)
    found = averaged_weights(state.opt_state, state.params)
    np.testing.assert_allclose(found, np.mean(seen, 0), rtol=1e-6)
    np.testing.assert_allclose(seen[-1], -0.5)


def test_fit_evaluates_and_keeps_the_averages():
    tx = optax.chain(jaxclip.sign_sgd(0.25), average_weights(1.0))
    step = jaxclip.make_train_step(lambda w, x: jnp.sum((w - x) ** 2), tx, weight_threshold=0.5)
    batches, seen = [jnp.asarray([x, -x]) for x in (1.0, 1.0, -1.0, 1.0, -1.0)], []

    def evaluate(w):
        seen.append(np.asarray(w))
        return {"largest": jnp.max(jnp.abs(w))}

    result = jaxclip.fit(
        step,
        jaxclip.TrainState.create(jnp.zeros(2), tx),
        batches,
        stop=jaxclip.max_steps(5),
        evaluate=evaluate,
        evaluate_every=1,
        keep_best="largest",
        progress=False,
    )
    state = jaxclip.TrainState.create(jnp.zeros(2), tx)
    by_hand = []
    for batch in batches:
        state, _ = step(state, batch)
        by_hand.append(averaged_weights(state.opt_state, state.params))
    np.testing.assert_array_equal(seen, by_hand)
    best = int(np.argmax(np.abs(by_hand).max(1)))
    assert 0 < best < 4
    assert result.best is not None
    assert result.best.step == best + 1
    np.testing.assert_array_equal(result.best.params, by_hand[best])
    np.testing.assert_array_equal(result.params, by_hand[-1])
    assert np.any(result.params != result.state.params)


def test_fit_refuses_averages_of_some_of_the_parameters_before_it_trains():
    tx = optax.partition(
        {"a": optax.chain(optax.sgd(0.1), average_weights()), "b": optax.sgd(0.1)},
        {"a": "a", "b": "b"},
    )
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = jaxclip.TrainState.create(params, tx)
    with pytest.raises(ValueError, match="average"):
        jaxclip.fit(
            lambda *_: pytest.fail("a step was taken"),
            state,
            [0.0],
            stop=jaxclip.max_steps(1),
            evaluate=lambda p: {"m": 0.0},
            progress=False,
        )


def test_pruned_weights_are_zero_in_the_average():
    tx = keep_sparse(optax.chain(optax.sgd(0.1), average_weights(1.0)), 0.5, every=3)
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4)), jnp.float32)
    state = tx.init(w)
    for _ in range(5):
        updates, state = tx.update(w, state, w)
        w = optax.apply_updates(w, updates)
    found = averaged_weights(state, w)
    np.testing.assert_array_equal(found == 0, w == 0)
    assert np.sum(w == 0) == 8


def test_entries_that_are_not_finite_do_not_count():
    points = draw(6, 4).at[3, 1].set(jnp.nan).at[4, 2].set(jnp.inf)
    found = averaged_weights(*walk(average_weights(1.0), points))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], points[1:, 0].mean(), rtol=1e-5)


def test_before_the_average_begins_it_is_the_weights_and_other_leaves_pass():
    params = {"w": jnp.ones(3), "n": jnp.arange(2), "none": None}
    tx = average_weights(start_step=5)
    state = tx.init(params)
    shapes = jax.tree.map(jnp.shape, state)
    _, state = tx.update(params, state, params)
    assert jax.tree.map(jnp.shape, state) == shapes
    found = averaged_weights({"deep": (state,)}, jax.tree.map(lambda x: 2 * x, params))
    np.testing.assert_array_equal(found["w"], 2 * jnp.ones(3))
    np.testing.assert_array_equal(found["n"], 2 * jnp.arange(2))


def test_wrong_arguments_are_refused():
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="decay must be in"):
            average_weights(bad)
    with pytest.raises(ValueError, match="start_step"):
        average_weights(start_step=-1)
    tx, w = average_weights(), jnp.ones(2)
    state = tx.init(w)
    with pytest.raises(ValueError, match="average_weights needs the parameters"):
        tx.update(w, state)
    with pytest.raises(ValueError, match="one average_weights, got 0"):
        averaged_weights(optax.EmptyState(), w)
    with pytest.raises(ValueError, match="one average_weights, got 2"):
        averaged_weights((state, state), w)
    with pytest.raises(ValueError, match="same shapes"):
        averaged_weights(state, jnp.ones(3))
