"""Stochastic rounding against the exact expectation, and training that drifts as it should."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.training.stochastic_rounding import apply_updates_stochastically

HALF = [jnp.bfloat16, jnp.float16]


def rounded(x: Any, dtype: Any, key: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    return apply_updates_stochastically(jnp.zeros(x.shape, dtype), x, key)


round_jitted = jax.jit(rounded, static_argnums=1)


def neighbours(x: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The largest number of `dtype` at most x, and the smallest at least x, in float64."""
    nearest = jnp.asarray(x, jnp.float32).astype(dtype)
    wide = np.asarray(nearest, np.float64)
    below = np.asarray(jnp.nextafter(nearest, jnp.full_like(nearest, -jnp.inf)), np.float64)
    above = np.asarray(jnp.nextafter(nearest, jnp.full_like(nearest, jnp.inf)), np.float64)
    return np.where(wide > x, below, wide), np.where(wide < x, above, wide)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_the_mean_of_many_roundings_is_the_number(dtype: Any, size: float):
    rng = np.random.default_rng(0)
    x = (size * rng.standard_normal(50)).astype(np.float32)
    num_draws = 20_000
    drawn = round_jitted(jnp.broadcast_to(x, (num_draws, 50)), dtype, jax.random.key(1))
    drawn = np.asarray(drawn, np.float64)
    low, high = neighbours(x, dtype)
    assert ((drawn == low) | (drawn == high)).all()
    # A draw has a standard deviation of at most half the distance of the neighbours.
    deviation = (drawn.mean(0) - x.astype(np.float64)) / np.where(high > low, high - low, 1)
    assert np.abs(deviation).max() < 6 * 0.5 / np.sqrt(num_draws)


@pytest.mark.thorough
def test_subnormals_of_float16_are_rounded_without_bias():
    ulp = 2.0**-24
    x = np.float32(ulp) * np.float32([0.25, 1.5, 100.125, 1023.75, 1024.5, -0.25])
    drawn = round_jitted(jnp.broadcast_to(x, (20_000, 6)), jnp.float16, jax.random.key(2))
    drawn = np.asarray(drawn, np.float64)
    assert (np.abs(drawn - x) < ulp).all()
    assert np.abs(drawn.mean(0) - x).max() / ulp < 6 * 0.5 / np.sqrt(20_000)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_exact_infinite_or_nan_stays(dtype: Any):
    info = jnp.finfo(dtype)
    exact = [0.0, -0.0, 1.0, -3.5, float(info.max), -float(info.max), float(info.tiny), 0.15625]
    x = jnp.asarray([*exact, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    for seed in range(20):
        y = round_jitted(x, dtype, jax.random.key(seed))
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(y, np.float32), x)
    assert np.signbit(np.asarray(y, np.float32)[1])


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_finite_stays_finite(dtype: Any):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.full(1000, np.nextafter(np.float32(largest), np.float32(np.inf)), jnp.float32)
    assert jnp.isfinite(round_jitted(x, dtype, jax.random.key(0))).all()
    top = jnp.asarray([jnp.finfo(jnp.float32).max, jnp.finfo(jnp.float32).min])
    np.testing.assert_array_equal(
        np.asarray(round_jitted(top, dtype, jax.random.key(0)), np.float64), [largest, -largest]
    )


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", HALF)
def test_eager_jit_and_vmap_agree(dtype: Any):
    x, keys = jnp.linspace(-1, 1, 24).reshape(3, 8), jax.random.split(jax.random.key(0), 3)
    batched = jax.jit(jax.vmap(lambda x, k: rounded(x, dtype, k)))(x, keys)
    np.testing.assert_array_equal(batched[0], rounded(x[0], dtype, keys[0]))
    for i in range(3):
        np.testing.assert_array_equal(batched[i], round_jitted(x[i], dtype, keys[i]))


@pytest.mark.parametrize("shape", [(4096,), (64, 64), (4, 32, 32)])
def test_entries_steps_and_leaves_are_rounded_independently(shape: tuple[int, ...]):
    def ups(key):
        """1 where an entry exactly between two numbers went up, 0 where it went down."""
        x = jnp.full(shape, 1 + 2.0**-8)
        zeros = jnp.zeros(shape, jnp.bfloat16)
        new = apply_updates_stochastically([zeros, zeros], [x, x], key)
        return jnp.stack([w.reshape(-1) > 1 for w in new])

    num_steps, size = 256, 4096
    keys = jax.random.split(jax.random.key(0), num_steps)
    drawn = 2.0 * np.asarray(jax.jit(jax.vmap(ups))(keys), np.float64) - 1  # steps, leaves, entries
    # A mean of n independent signs has a standard deviation of n ** -0.5.
    assert abs(drawn.mean()) < 5 / np.sqrt(drawn.size)
    assert np.abs(drawn.mean(axis=0)).max() < 6 / np.sqrt(num_steps)
    assert np.abs(drawn.mean(axis=2)).max() < 6 / np.sqrt(size)
    products = {
        f"entries {lag} apart": (drawn[..., lag:], drawn[..., :-lag])
        for lag in (1, 2, 3, 4, 8, 16, 31, 32, 33, 64, 128, 1024, 2048)
    }
    products |= {f"{lag} steps": (drawn[lag:], drawn[:-lag]) for lag in (1, 2, 3, 16)}
    products["leaves"] = drawn[:, 0], drawn[:, 1]
    for name, (a, b) in products.items():
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size), name


@pytest.mark.thorough
def test_a_weight_drifts_by_a_hundred_thousand_small_steps_as_it_should():
    num_steps, num_weights, step = 100_000, 256, 2.0**-16

    def move(carry, _):
        w, key = carry
        key, used = jax.random.split(key)
        return (apply_updates_stochastically(w, jnp.full_like(w, step), used), key), None

    start = jnp.ones(num_weights, jnp.bfloat16), jax.random.key(0)
    after = np.asarray(jax.jit(lambda c: jax.lax.scan(move, c, None, num_steps))(start)[0][0])
    drift = after.astype(np.float64) - 1
    # From 1 to 2 the neighbours are 2**-7 apart, from 2 to 4 2**-6: a step goes up one of these
    # with a probability of step / gap, whose variance is at most step * gap.
    sigma = np.sqrt(num_steps * step * 2.0**-6)
    assert abs(drift.mean() - num_steps * step) < 6 * sigma / np.sqrt(num_weights)
    assert np.abs(drift - num_steps * step).max() < 6 * sigma


# --- Trees ----------------------------------------------------------------------------


@pytest.mark.thorough
def test_float32_leaves_are_as_with_optax_and_others_stay():
    params = {
        "w": jnp.linspace(-1, 1, 7),
        "half": jnp.ones(3, jnp.bfloat16),
        "weak": jnp.asarray(0.5),
        "n": jnp.arange(3),
        "none": None,
        "key": jax.random.key(1),
    }
    updates = params | {"w": jnp.full(7, 1e-3), "half": jnp.zeros(3, jnp.bfloat16)}
    new = apply_updates_stochastically(params, updates, jax.random.key(0))
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_array_equal(new["w"], optax.apply_updates(params["w"], updates["w"]))
    np.testing.assert_array_equal(new["half"], params["half"])
    assert new["weak"].weak_type
    assert float(new["weak"]) == 1.0
    assert new["n"] is params["n"]
    assert new["key"] is params["key"]


@pytest.mark.thorough
def test_leaves_of_one_shape_are_rounded_independently():
    w = jnp.ones(200, jnp.bfloat16)
    step = jnp.full(200, 2.0**-8)
    new = apply_updates_stochastically([w, w], [step, step], jax.random.key(0))
    assert not np.array_equal(new[0], new[1])


def test_trees_that_differ_are_refused_by_path():
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        apply_updates_stochastically({"a": jnp.ones(2)}, {"b": jnp.ones(2)}, jax.random.key(0))


@pytest.mark.thorough
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_sharded_parameters_round_as_on_one_device(axis_type: str):
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    kind = getattr(AxisType, axis_type)
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",), axis_types=(kind,))
    w, u = jnp.linspace(0, 1, 64).astype(jnp.bfloat16), jnp.full(64, 1e-4, jnp.bfloat16)
    apply = jax.jit(apply_updates_stochastically)
    expected = apply(w, u, jax.random.key(3))
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        placed = jax.device_put((w, u), sharding)
        new = apply(*placed, jax.random.key(3))
    assert new.sharding.is_equivalent_to(sharding, 1)
    np.testing.assert_array_equal(jax.device_get(new), jax.device_get(expected))


# --- Training -------------------------------------------------------------------------

NUM_WEIGHTS, STEP_SIZE, NUM_STEPS = 20_000, 3e-5, 20


def drift(stochastic: bool) -> tuple[np.ndarray, np.ndarray, Any]:
    """Weights before and after steps of -STEP_SIZE each, and the state."""
    w = 0.02 * jax.random.normal(jax.random.key(0), (NUM_WEIGHTS,), jnp.float32)
    w = w.astype(jnp.bfloat16)
    tx = jaxclip.sign_sgd(STEP_SIZE)
    step = jaxclip.make_train_step(
        lambda w, batch: jnp.sum(w.astype(jnp.float32) * batch),
        tx,
        stochastic_rounding=stochastic,
    )
    state = jaxclip.TrainState.create(w, tx, key=jax.random.key(1))
    for _ in range(NUM_STEPS):
        state, _ = step(state, jnp.ones((), jnp.float32))
    return np.asarray(w, np.float64), np.asarray(state.params, np.float64), state


@pytest.mark.thorough
def test_bfloat16_weights_drift_as_the_steps_say():
    exact = -float(np.float64(np.asarray(STEP_SIZE, jnp.bfloat16))) * NUM_STEPS
    before, nearest, _ = drift(stochastic=False)
    assert np.mean(nearest == before) > 0.6  # most weights never moved
    assert abs(np.mean(nearest - before)) < 0.8 * abs(exact)

    before, after, state = drift(stochastic=True)
    moves = after - before
    # The distance of neighbours is at most 2**-11 up to 0.125; a rounding has at most half
    # of it as standard deviation, and those of 20 steps and 20,000 weights average out.
    assert np.abs(before).max() < 0.125
    sigma = 0.5 * 2.0**-11 * np.sqrt(NUM_STEPS) / np.sqrt(NUM_WEIGHTS)
    assert abs(moves.mean() - exact) < 6 * sigma
    assert sigma < 0.02 * abs(exact)
    assert state.params.dtype == jnp.bfloat16


def test_rounding_in_a_train_step_needs_a_key_and_changes_it():
    tx = jaxclip.sign_sgd(0.1)
    step = jaxclip.make_train_step(
        lambda w, batch: jnp.sum(w * batch), tx, stochastic_rounding=True, donate=False
    )
    w = jnp.ones(2, jnp.float32)
    with pytest.raises(ValueError, match="key"):
        step(jaxclip.TrainState.create(w, tx), jnp.ones_like(w))
    state = jaxclip.TrainState.create(w, tx, key=jax.random.key(0))
    after, _ = step(state, jnp.ones_like(w))
    assert not np.array_equal(jax.random.key_data(after.key), jax.random.key_data(state.key))
    np.testing.assert_array_equal(after.params, np.float32([0.9, 0.9]))
    with pytest.raises(ValueError, match="stochastic_rounding"):
        jaxclip.make_train_step(lambda w, batch: w, tx, stochastic_rounding="yes")


@pytest.mark.thorough
def test_a_skipped_step_leaves_half_precision_parameters_bit_identical():
    tx = jaxclip.sign_sgd(0.1)
    step = jaxclip.make_train_step(
        lambda w, batch: jnp.sum(w.astype(jnp.float32) * batch), tx, stochastic_rounding=True
    )
    w = jnp.linspace(-1, 1, 9).astype(jnp.bfloat16)
    state = jaxclip.TrainState.create(w, tx, key=jax.random.key(0))
    state, info = step(state, jnp.asarray(jnp.nan, jnp.float32))
    assert int(info.num_skipped) == 1
    np.testing.assert_array_equal(state.params, w)


@pytest.mark.thorough
def test_the_box_holds_exactly_after_stochastic_rounding():
    tx = jaxclip.sign_sgd(0.01)
    step = jaxclip.make_train_step(
        lambda w, batch: jnp.sum(w.astype(jnp.float32) * batch),
        tx,
        weight_threshold=0.1,
        stochastic_rounding=True,
        telemetry_every=1,
    )
    state = jaxclip.TrainState.create(jnp.zeros(100, jnp.bfloat16), tx, key=jax.random.key(0))
    for _ in range(15):
        state, info = step(state, jnp.ones((), jnp.float32))
    assert np.abs(np.asarray(state.params, np.float64)).max() <= 0.1
    assert float(info.weight_clip_rate) > 0.9
