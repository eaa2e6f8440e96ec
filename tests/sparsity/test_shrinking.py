"""The proximal step of an L1 penalty, against its closed form and the solution of the lasso."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.sparsity import soft_threshold


def shrunk(v, t):
    """The closed form, in float64."""
    v = np.asarray(v, np.float64)
    return np.sign(v) * np.maximum(np.abs(v) - t, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weights_after_the_step_are_the_closed_form_and_zeros_are_exact(dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"kernel": jax.random.normal(keys[0], (20, 30), dtype), "bias": jnp.ones(3, dtype)}
    updates = {"kernel": jax.random.normal(keys[1], (20, 30), dtype), "bias": jnp.zeros(3, dtype)}
    tx = soft_threshold(0.5)
    found, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    after = optax.apply_updates(params, found)
    v = np.asarray(params["kernel"], np.float64) + np.asarray(updates["kernel"], np.float64)
    expected = shrunk(v, 0.5)
    np.testing.assert_allclose(
        np.asarray(after["kernel"], np.float64), expected, atol=4 * float(jnp.finfo(dtype).eps)
    )
    np.testing.assert_array_equal(np.asarray(after["kernel"] == 0), expected == 0)
    assert 0.2 < np.mean(expected == 0) < 0.8
    np.testing.assert_array_equal(after["bias"], params["bias"])


def test_with_a_learning_rate_schedule_a_sign_step_is_followed_exactly():
    # Each weight by hand: sign steps of alpha, then towards 0 by alpha * penalty.
    alphas, penalty = np.array([0.25, 0.125, 0.0625]), 0.5
    rate = lambda step: jnp.asarray(alphas, jnp.float32)[step]  # noqa: E731
    tx = optax.chain(jaxclip.sign_sgd(rate), soft_threshold(lambda step: penalty * rate(step)))
    w = jnp.array([[1.0, 0.125, -0.25, 0.0]])
    grads = jnp.array([[1.0, 1.0, -2.0, 0.0]])
    state, expected = tx.init(w), np.asarray(w, np.float64)
    for alpha in alphas:
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        expected = shrunk(expected - alpha * np.sign(grads), alpha * penalty)
        np.testing.assert_array_equal(w, expected)


def test_gradient_descent_with_it_finds_the_lasso():
    # Of an orthogonal design: the least-squares solution, shrunk.
    goal = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    tx = optax.chain(optax.sgd(0.25), soft_threshold(0.25 * 0.6))
    w = jnp.zeros_like(goal)
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(100):
        updates, state = update(w - goal, state, w)
        w = optax.apply_updates(w, updates)
    expected = shrunk(goal, 0.6)
    np.testing.assert_allclose(w, expected, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(w == 0), expected == 0)


def test_complex_weights_keep_their_phase_and_the_mask_chooses_leaves():
    params = {"a": jnp.array([[3 + 4j, 0.1j]], jnp.complex64), "b": jnp.array([2.0])}
    tx = soft_threshold(1.0, mask={"a": True, "b": True})
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = optax.apply_updates(params, tx.update(zeros, tx.init(params), params)[0])
    np.testing.assert_allclose(after["a"], [[2.4 + 3.2j, 0]], rtol=1e-6)
    np.testing.assert_array_equal(after["b"], [1.0])


def test_soft_threshold_names_what_is_wrong():
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^threshold must be"):
            soft_threshold(wrong)
    with pytest.raises(TypeError, match=r"^mask must be"):
        soft_threshold(0.1, mask=True)
    tx, params = soft_threshold(0.1), {"a": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"^soft_threshold needs the parameters"):
        tx.update(params, tx.init(params))
