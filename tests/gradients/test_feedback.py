"""What was cut off a gradient is paid back."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.gradients.feedback import error_feedback


def make_tree(seed: int, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    tree = {"w": rng.standard_normal((4, 3)), "b": [rng.standard_normal(5)]}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def scaled_sign() -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda g: jnp.mean(jnp.abs(g)) * jnp.sign(g), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


@pytest.mark.thorough
@pytest.mark.parametrize("inner", [jaxclip.clip_by_value(0.5), scaled_sign()])
def test_updates_sum_to_the_gradients_less_the_residual(inner: Any):
    tx = error_feedback(inner)
    gradients = [make_tree(seed) for seed in range(200)]
    state = tx.init(gradients[0])
    total = jax.tree.map(lambda x: np.zeros(x.shape), gradients[0])
    for grads in gradients:
        updates, state = tx.update(grads, state)
        total = jax.tree.map(lambda t, u: t + np.asarray(u, np.float64), total, updates)
    owed = jax.tree.map(lambda *g: sum(np.asarray(x, np.float64) for x in g), *gradients)
    paid = jax.tree.map(lambda t, e: t + np.asarray(e, np.float64), total, residual_of(state))
    for p, o in zip(jax.tree.leaves(paid), jax.tree.leaves(owed), strict=True):
        np.testing.assert_allclose(p, o, atol=200 * 10 * 2.0**-24)


def residual_of(state: Any) -> Any:
    return state.inner_state.residual


def test_it_converges_where_sign_descent_does_not():
    # Karimireddy et al., counterexample 2: the sign never leaves the line x + y = 2.
    def loss(x: jax.Array) -> jax.Array:
        return 0.5 * jnp.abs(x[0] + x[1]) + jnp.abs(x[0] - x[1])

    def final_loss(direction: Any) -> float:
        tx = optax.chain(
            direction, optax.scale_by_schedule(lambda t: -0.3 / jnp.sqrt(t.astype(jnp.float32) + 1))
        )
        x = jnp.array([1.0, 1.1])

        def body(carry: Any, _: Any) -> Any:
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state)
            return (optax.apply_updates(x, updates), state), None

        (x, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, length=2000))((x, tx.init(x)))
        return float(loss(x))

    assert final_loss(jaxclip.scale_by_sign()) > 1.0
    assert final_loss(error_feedback(scaled_sign())) < 0.05


def test_clipping_with_feedback_is_unbiased_where_clipping_is_not():
    # U-Clip: g = 10 in one step of ten, else -1, with mean 0.1; clipped alone its mean is -0.8.
    draws = np.random.default_rng(0).random((4000, 8)) < 0.1
    gradients = jnp.asarray(np.where(draws, 10.0, -1.0), jnp.float32)

    def mean_update(tx: Any) -> np.ndarray:
        def body(state: Any, g: jax.Array) -> Any:
            updates, state = tx.update(g, state)
            return state, updates

        return np.asarray(jax.lax.scan(body, tx.init(gradients[0]), gradients)[1]).mean()

    true_mean = np.asarray(gradients).mean()
    assert abs(mean_update(error_feedback(jaxclip.clip_by_value(1.0))) - true_mean) < 0.1
    assert mean_update(jaxclip.clip_by_value(1.0)) < -0.7


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_residual_stays_within_its_bound(dtype: Any):
    tx = error_feedback(jaxclip.clip_by_value(0.1), max_residual={"a": 0.3, "b": np.inf})
    grads = {"a": jnp.asarray([9.0, -9.0], dtype), "b": jnp.asarray(9.0, dtype)}
    state = tx.init(grads)
    for _ in range(5):
        _, state = tx.update(grads, state)
    residual = residual_of(state)
    assert (np.abs(np.asarray(residual["a"], np.float64)) <= 0.3).all()
    assert float(residual["b"]) > 40


def test_a_float32_residual_carries_the_rounding_of_bfloat16():
    tx = error_feedback(jaxclip.clip_by_value(1.0), residual_dtype=jnp.float32)
    state = tx.init(jnp.zeros(1, jnp.bfloat16))
    assert residual_of(state).dtype == jnp.float32
    total, g = 0.0, jnp.asarray([1.0 + 2**-7], jnp.bfloat16)
    for _ in range(20):
        updates, state = tx.update(g, state)
        assert updates.dtype == jnp.bfloat16
        total += float(updates[0])
    assert total + float(residual_of(state)[0]) == 20 * float(g[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_the_largest_gradients_leave_a_finite_residual(dtype: Any):
    grads = jnp.full(2, float(jnp.finfo(dtype).max), dtype)
    tx = error_feedback(jaxclip.clip_by_value(1.0))
    state = tx.init(grads)
    for _ in range(3):
        updates, state = tx.update(grads, state)
        assert np.isfinite(np.asarray(updates, np.complex128)).all()
        assert np.isfinite(np.asarray(residual_of(state), np.complex128)).all()
    assert int(state.num_nonfinite) == 0


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: error_feedback(jaxclip.scale_by_sign), TypeError),
        (lambda: error_feedback(optax.identity(), max_residual=-1.0), ValueError),
        (lambda: error_feedback(optax.identity(), residual_dtype=jnp.int8), TypeError),
    ],
)
def test_wrong_arguments_raise_in_the_factory(make: Callable, error: type):
    with pytest.raises(error):
        make()


def test_the_residual_and_the_gradients_must_have_one_structure():
    tx = error_feedback(optax.identity())
    with pytest.raises(ValueError, match="'b'"):
        tx.update({"b": jnp.ones(2)}, tx.init({"a": jnp.ones(2)}))


def test_a_schedule_counts_skipped_steps_too():
    tx = error_feedback(
        jaxclip.clip_by_value(1.0), max_residual=lambda step: jnp.where(step < 2, 9.0, 0.25)
    )
    state, residuals = tx.init(jnp.zeros(1)), []
    for entry in (3.0, np.nan, 3.0):
        _, state = tx.update(jnp.array([entry]), state)
        residuals.append(float(residual_of(state)[0]))
    assert residuals == [2.0, 2.0, 0.25]
    assert int(state.step) == 3
