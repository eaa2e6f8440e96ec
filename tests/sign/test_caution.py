"""Cautious steps and cautious decay against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.sign.caution import CautiousState, cautious
from jaxclip.sign.decay import cautious_decay
from jaxclip.sign.directions import scale_by_lion
from jaxclip.sign.optimizers import lion, signum

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def draw(seed: int, dtype: Any = jnp.float32, size: int = 101) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(size), dtype)


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def fixed(updates: Any) -> optax.GradientTransformation:
    """An optimizer that always returns `updates`."""
    return optax.stateless(lambda g, p: updates)


def step(tx: Any, g: Any, w: Any = None) -> tuple[Any, Any]:
    return jax.jit(tx.update)(g, tx.init(g), w)


def oracle(u: np.ndarray, g: np.ndarray) -> np.ndarray:
    kept = u * g < 0
    return np.where(kept, u * (u.size / (kept.sum() + 1)), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_that_go_up_the_gradient_wait_and_the_rest_step_further(dtype: Any):
    u, g = draw(1, dtype), draw(2, dtype)
    updates, state = step(cautious(fixed(u)), g)
    assert updates.dtype == dtype
    expected = oracle(f64(u), f64(g))
    np.testing.assert_allclose(f64(updates), expected, rtol=2 * float(jnp.finfo(dtype).eps))
    assert isinstance(state, CautiousState)
    np.testing.assert_allclose(state.agreement_rate, np.mean(expected != 0), rtol=1e-6)
    # The step is down the gradient, entry by entry.
    assert (f64(updates) * f64(g) <= 0).all()


def test_leaves_are_rescaled_by_their_own_counts():
    u = {"a": draw(1), "b": draw(2, size=7), "c": jnp.asarray(-1.0), "n": jnp.arange(3)}
    g = {"a": draw(3), "b": draw(4, size=7), "c": jnp.asarray(2.0), "n": jnp.arange(3)}
    updates, _ = step(cautious(fixed(u)), g)
    for name in ("a", "b", "c"):
        np.testing.assert_allclose(f64(updates[name]), oracle(f64(u[name]), f64(g[name])), 1e-6)
    assert float(updates["c"]) == -0.5
    np.testing.assert_array_equal(updates["n"], u["n"])


@pytest.mark.thorough
def test_a_direction_is_kept_where_it_points_along_the_gradient():
    g1, g2 = draw(1), draw(2)
    as_direction = optax.chain(cautious(scale_by_lion(), is_direction=True), optax.scale(-0.5))
    as_optimizer = cautious(lion(0.5, weight_decay=0.0))
    states = [tx.init(g1) for tx in (as_direction, as_optimizer)]
    for g in (g1, g2, g1):
        a, states[0] = jax.jit(as_direction.update)(g, states[0])
        b, states[1] = jax.jit(as_optimizer.update)(g, states[1])
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert float(states[1].agreement_rate) < 1


@pytest.mark.thorough
def test_steps_of_plain_sign_descent_all_agree():
    g = draw(1)
    updates, state = step(cautious(jaxclip.sign_sgd(0.1)), g)
    assert float(state.agreement_rate) == 1
    np.testing.assert_allclose(updates, -0.1 * jnp.sign(g) * 101 / 102, rtol=1e-6)


@pytest.mark.thorough
def test_products_that_underflow_or_overflow_still_have_a_sign():
    for size in (1e-30, 1e30):
        u, g = jnp.array([size, size, -size]), jnp.array([-size, size, size])
        updates, _ = step(cautious(fixed(u)), g)
        np.testing.assert_allclose(updates, [size, 0, -size], rtol=1e-6)
    largest = jnp.finfo(jnp.float16).max
    u = jnp.asarray([largest, 1, 1, 1, 1], jnp.float16)
    updates, _ = step(cautious(fixed(u)), jnp.asarray([-1, 1, 1, 1, 1], jnp.float16))
    assert jnp.isfinite(updates).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_zero_and_nan_are_not_kept(bad: float):
    u, g = jnp.array([-1.0, -1.0, jnp.nan, 0.0]), jnp.array([0.0, bad, 1.0, 1.0])
    updates, _ = step(cautious(fixed(u)), g)
    expected = [0, -4 / 2 if bad == jnp.inf else 0, 0, 0]
    np.testing.assert_array_equal(updates, expected)


def test_complex_entries_agree_by_their_angle():
    u = jnp.array([-1 - 1j, 1j, 1 + 0j], jnp.complex64)
    g = jnp.array([1 + 0j, -2j, 1j], jnp.complex64)
    updates, _ = step(cautious(fixed(u)), g)
    np.testing.assert_allclose(updates, [-1 - 1j, 1j, 0], rtol=1e-6)


@pytest.mark.parametrize("tree", [{}, {"a": jnp.zeros((0, 3))}, (None,)])
def test_empty_trees_work(tree: Any):
    updates, state = step(cautious(optax.sgd(0.1)), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    assert float(state.agreement_rate) == 1


@pytest.mark.thorough
def test_inner_statistics_and_extra_arguments_come_through():
    tx = optax.chain(cautious(lion(0.1)), optax.identity())
    g = draw(1).at[3].set(jnp.nan)
    updates, state = tx.update(g, tx.init(g), draw(2), value=1.0)
    assert int(jaxclip.clip_stats(state)["scale_by_lion/num_nonfinite"]) == 1
    assert jnp.isfinite(updates).all()


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="inner"):
        cautious(0.1)
    with pytest.raises(TypeError, match="inner"):
        cautious(lion)
    with pytest.raises(ValueError, match="is_direction"):
        cautious(lion(0.1), is_direction=1)


@pytest.mark.thorough
def test_scan_vmap_and_a_traced_learning_rate_work():
    w, gs = draw(0), jnp.stack([draw(i) for i in range(1, 4)])

    def last(rate: Any) -> jax.Array:
        tx = cautious(lion(rate))

        def body(state: Any, g: Any) -> Any:
            updates, state = tx.update(g, state, w)
            return state, updates

        return jax.lax.scan(body, tx.init(w), gs)[1][-1]

    rates = jnp.array([0.1, 0.2])
    batched = jax.jit(jax.vmap(last))(rates)
    tx = cautious(lion(0.2))
    state = tx.init(w)
    for g in gs:
        updates, state = jax.jit(tx.update)(g, state, w)
    np.testing.assert_allclose(batched[1], updates, rtol=1e-5)


# --- Decay ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lion, signum])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cautious_decay_shrinks_where_step_and_weight_agree_in_sign(make: Any, dtype: Any):
    w, g = draw(1, dtype), draw(2, dtype).at[:3].set(0)
    tx = make(0.5, weight_decay=0.25, cautious_decay=True)
    updates, _ = step(tx, g, w)
    u, x = np.sign(f64(g)), f64(w)  # of the first step, the direction is the sign of g
    expected = -0.5 * (u + 0.25 * np.where(u * x >= 0, x, 0))
    np.testing.assert_allclose(f64(updates), expected, atol=2 * float(jnp.finfo(dtype).eps))


@pytest.mark.thorough
@pytest.mark.parametrize("make", [lion, signum])
def test_cautious_decay_is_off_by_default_and_respects_the_mask(make: Any):
    w, g = {"k": draw(1), "b": draw(2)}, {"k": draw(3), "b": draw(4)}
    plain = step(make(0.5, weight_decay=0.25), g, w)[0]
    off = step(make(0.5, weight_decay=0.25, cautious_decay=False), g, w)[0]
    jax.tree.map(np.testing.assert_array_equal, plain, off)
    tx = make(0.5, weight_decay=0.25, mask={"k": True, "b": False}, cautious_decay=True)
    updates = step(tx, g, w)[0]
    np.testing.assert_allclose(updates["b"], -0.5 * jnp.sign(g["b"]))
    assert not np.array_equal(updates["k"], plain["k"])
    with pytest.raises(ValueError, match="cautious_decay"):
        make(0.1, cautious_decay="yes")


@pytest.mark.thorough
def test_cautious_decay_takes_traced_coefficients_without_recompiling():
    w, g, traces = draw(1), draw(2), []

    @jax.jit
    def update(decay: jax.Array) -> jax.Array:
        traces.append(1)
        tx = lion(0.5, weight_decay=decay, cautious_decay=True)
        return tx.update(g, tx.init(w), w)[0]

    for decay in (0.0, 0.25):
        expected = step(lion(0.5, weight_decay=decay, cautious_decay=True), g, w)[0]
        np.testing.assert_allclose(update(jnp.float32(decay)), expected, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_direction", [False, True])
def test_after_any_optimizer_only_weights_that_it_moves_to_0_decay(dtype: Any, is_direction: bool):
    w, u = draw(1, dtype), draw(2, dtype).at[:3].set(0)
    tx = optax.chain(fixed(u), cautious_decay(0.25, is_direction=is_direction))
    updates = step(tx, draw(3, dtype), w)[0]
    x, v = f64(w), f64(u)
    toward_zero = (v * x >= 0) if is_direction else (v * x <= 0)
    expected = v + (0.25 if is_direction else -0.25) * np.where(toward_zero, x, 0)
    assert updates.dtype == dtype
    np.testing.assert_allclose(f64(updates), expected, atol=4 * float(jnp.finfo(dtype).eps))
    # Without agreement the update keeps its bits.
    np.testing.assert_array_equal(f64(updates)[~toward_zero], v[~toward_zero])


def test_both_places_in_a_chain_and_the_argument_of_lion_give_the_same_step():
    w, g = {"k": draw(1), "b": draw(2)}, {"k": draw(3), "b": draw(4)}
    mask = {"k": True, "b": False}
    before_rate = optax.chain(
        scale_by_lion(), cautious_decay(0.25, mask, is_direction=True), optax.scale(-0.5)
    )
    after_rate = optax.chain(lion(0.5, weight_decay=0.0), cautious_decay(0.125, mask))
    expected = step(lion(0.5, weight_decay=0.25, mask=mask, cautious_decay=True), g, w)[0]
    for tx in (before_rate, after_rate):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), step(tx, g, w)[0], expected
        )


def test_cautious_decay_does_not_move_a_minimum_that_plain_decay_moves():
    goal = jnp.array([1.0, -2.0, 0.5])

    def end(decay: Any) -> jax.Array:
        tx, w = optax.chain(optax.sgd(0.1), decay), jnp.zeros(3)

        def body(carry: Any, _: None) -> Any:
            updates, state = tx.update(carry[0] - goal, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (w, tx.init(w)), None, length=300)[0][0]

    np.testing.assert_allclose(end(cautious_decay(0.05)), goal, rtol=1e-5)
    plain = end(optax.add_decayed_weights(-0.05))
    np.testing.assert_allclose(plain, goal * 0.1 / 0.15, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_late_coefficient_that_is_wrong_decays_nothing(bad: float):
    w, u = draw(1), draw(2)
    for decay in (jnp.float32(bad), lambda count: jnp.float32(bad)):
        updates = step(optax.chain(fixed(u), cautious_decay(decay)), u, w)[0]
        np.testing.assert_array_equal(updates, u)


def test_wrong_arguments_of_cautious_decay_are_refused():
    for bad in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="weight_decay must be"):
            cautious_decay(bad)
    with pytest.raises(TypeError, match="weight_decay must be"):
        cautious_decay("0.1")  # pyright: ignore
    with pytest.raises(ValueError, match="is_direction"):
        cautious_decay(0.1, is_direction=1.0)  # pyright: ignore
    with pytest.raises(TypeError, match="mask must be"):
        cautious_decay(0.1, True)
    tx = cautious_decay(0.1)
    with pytest.raises(ValueError, match="weight_decay needs the parameters"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="same shapes"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(3))
