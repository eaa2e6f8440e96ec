"""Optimizers whose momentum takes 8 or 4 bits a weight between steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip import Grid, checkpoints
from jaxclip.lowbit import QuantizedArray, dequantize, low_bit_momentum
from oracles.small_params import params_and_goal

SIZES = pytest.mark.parametrize("bits", [8, 4])


def momentum(state):
    """The low-bit arrays of a state, in order."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return [x for x in leaves if isinstance(x, QuantizedArray)]


def draw(key, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(key), shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def averages(tx, grads):
    """Momentum after each of many gradients, decoded."""

    def step(state, g):
        _, state = tx.update(g, state, g)
        return state, jnp.asarray(momentum(state)[0])

    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]


@SIZES
@pytest.mark.parametrize("shape", [(70, 3), (7,), (3, 4, 5)])
def test_each_entry_takes_one_of_the_two_levels_around_it(bits, shape):
    g = draw(0, shape)
    tx = low_bit_momentum(jaxclip.signum(0.1, 0.75), Grid(bits, group_size=16), min_size=1)
    (q,) = momentum(jax.jit(tx.update)(g, tx.init(g), g)[1])
    q.validate()
    exact = 0.25 * np.asarray(g, np.float64)
    scale = np.broadcast_to(q.fitted_grid.expand(q.scale, shape), shape).astype(np.float64)
    found = scale * np.asarray(q.unpacked().qvalue, np.float64)
    assert np.all(np.abs(found - exact) < scale * (1 + 1e-5))
    # The largest entry of each block is a level itself.
    blocks, axes = q.grid.split(jnp.abs(0.25 * g))
    largest = q.grid.compact(jnp.max(blocks, axis=axes, keepdims=True), g.ndim)
    np.testing.assert_allclose(q.scale * (2 ** (bits - 1) - 1), largest, rtol=1e-6)


@SIZES
def test_the_stored_average_is_right_on_average(bits):
    steps, size = 400, 64
    slopes = jnp.linspace(-1, 1, size, dtype=jnp.float32)
    grads = slopes[None] + 0.02 * draw(1, (steps, size))
    stored = np.asarray(
        averages(low_bit_momentum(jaxclip.signum(0.1, 0.98), bits, min_size=1), grads)
    )
    exact, m = np.zeros((steps, size)), np.zeros(size)
    for i, g in enumerate(np.asarray(grads, np.float64)):
        m = exact[i] = 0.98 * m + 0.02 * g
    error = (stored - exact)[100:].mean(0)
    level = 1 / (2 ** (bits - 1) - 1)
    # A rounding is off by sqrt(1 / 6) of a level, and the mean of 300 averages of them by
    # sqrt(1 / 6) / (0.02 sqrt(300)) = 1.2 levels an entry; rounding down would be off by 25.
    assert np.abs(error.mean()) < 0.5 * level
    assert np.sqrt(np.mean(error**2)) < 2 * level
    # An average that moves by less than half a level a step does not stand still.
    assert np.corrcoef(stored[-200:].mean(0), np.asarray(slopes))[0, 1] > 0.99


def test_updates_are_those_of_the_optimizer_for_the_rounded_momentum():
    params, grads = {"w": draw(0, (9, 8))}, [{"w": draw(i, (9, 8))} for i in range(1, 4)]
    inner = optax.sgd(0.5, momentum=0.5)
    tx = low_bit_momentum(inner, 4, min_size=1)
    state = tx.init(params)
    for g in grads:
        rounded = jax.tree.map(
            lambda x: dequantize(x) if isinstance(x, QuantizedArray) else x,
            state.inner_state,
            is_leaf=lambda x: isinstance(x, QuantizedArray),
        )
        expected, _ = inner.update(g, rounded, params)
        updates, state = tx.update(g, state, params)
        np.testing.assert_array_equal(updates["w"], expected["w"])


@SIZES
def test_a_momentum_on_the_grid_stays_there(bits):
    high = 2 ** (bits - 1) - 1
    w = jnp.asarray(np.random.default_rng(0).integers(-high, high + 1, (64, 4)), jnp.float32)
    w = w.at[0].set(high)
    tx = low_bit_momentum(jaxclip.signum(0.1, 0.0), Grid(bits, group_size=64), min_size=1)
    np.testing.assert_allclose(averages(tx, jnp.stack([w, w, w])), jnp.stack([w, w, w]), rtol=1e-6)


def test_the_largest_entry_of_a_block_does_not_shrink_with_rounded_scales():
    g = jnp.outer(jnp.ones(64), jnp.linspace(1.0, 1.02, 16))  # between two numbers of bfloat16
    stored = averages(low_bit_momentum(jaxclip.lion(0.1), 8, min_size=1), jnp.stack([g] * 500))
    expected = (1 - 0.99 ** np.arange(401, 501)).mean() * g[0]
    np.testing.assert_allclose(stored[-100:].mean((0, 1)), expected, rtol=0.005)


@SIZES
def test_blocks_of_zeros_stay_zeros_and_their_scales_finite(bits):
    g = jnp.zeros((64, 3)).at[:, 1].set(1e-30).at[:, 2].set(3.0)
    stored = averages(low_bit_momentum(jaxclip.lion(0.1), bits, min_size=1), jnp.stack([g] * 5))
    assert not stored[:, :, 0].any()
    assert np.isfinite(stored).all()
    expected = 3 * (1 - 0.99**5)
    np.testing.assert_allclose(stored[-1][:, 2], expected, atol=2 * expected / 2 ** (bits - 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_entry_that_is_not_finite_leaves_its_momentum_as_it_was(bad):
    g = draw(0, (64, 2))
    tx = low_bit_momentum(optax.sgd(0.1, momentum=0.9), Grid(8, group_size=32), min_size=1)
    _, state = tx.update(g, tx.init(g), g)
    before = jnp.asarray(momentum(state)[0])
    _, state = tx.update((9 * before).at[5, 0].set(bad), state, g)
    after = jnp.asarray(momentum(state)[0])
    assert np.isfinite(after).all()
    scale = np.abs(after).max() / 127
    assert abs(after[5, 0] - before[5, 0]) <= scale
    np.testing.assert_allclose(after[6:, 0], 9.9 * before[6:, 0], atol=1.01 * scale)


def test_second_moments_and_small_arrays_stay_as_they_are():
    params = {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
    with jax.numpy_dtype_promotion("standard"):
        state = low_bit_momentum(optax.adam(1e-3)).init(params).inner_state[0]
    assert isinstance(state.mu["kernel"], QuantizedArray)
    assert len(momentum(state)) == 1
    kinds = {"a": jnp.zeros(9, jnp.complex64), "b": jnp.zeros(9, jnp.float8_e4m3fn)}
    assert not momentum(low_bit_momentum(jaxclip.lion(0.1), min_size=1).init(kinds))


def test_bytes_of_the_state_are_an_eighth_or_a_quarter():
    params = {"kernel": jnp.zeros((512, 256), jnp.float32)}

    def bytes_a_weight(tx):
        leaves = jax.tree.leaves(tx.init(params))
        return sum(x.nbytes for x in leaves) / params["kernel"].size

    assert bytes_a_weight(jaxclip.lion(0.1)) == pytest.approx(4, abs=1e-3)
    assert bytes_a_weight(low_bit_momentum(jaxclip.lion(0.1))) == pytest.approx(1.031, abs=1e-3)
    assert bytes_a_weight(low_bit_momentum(jaxclip.lion(0.1), 4)) == pytest.approx(0.531, abs=1e-3)


@SIZES
def test_vmap_gives_each_run_what_it_has_alone(bits):
    grads = draw(0, (3, 4, 70, 2))  # runs, steps
    tx = low_bit_momentum(jaxclip.lion(0.1), bits, min_size=1)
    together = jax.jit(jax.vmap(functools.partial(averages, tx)))(grads)
    for run, alone in zip(together, map(functools.partial(averages, tx), grads), strict=True):
        np.testing.assert_array_equal(run, alone)


@SIZES
def test_a_donated_train_step_keeps_it_and_a_bad_step_leaves_its_bits(bits):
    params, loss_fn = params_and_goal()
    tx = low_bit_momentum(jaxclip.lion(0.01), bits, min_size=1)
    step = jaxclip.make_train_step(lambda p, scale: loss_fn(p) * scale, tx, weight_threshold=1.0)
    state = jaxclip.TrainState.create(params, tx)
    for _ in range(2):
        state, info = step(state, jnp.float32(1.0))
    before = jax.device_get(state.opt_state)
    state, info = step(state, jnp.float32(jnp.nan))
    assert int(info.num_skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.opt_state), before)
    assert momentum(state.opt_state)[0].packing is None or bits == 4


@SIZES
def test_a_state_saved_and_loaded_goes_on_bit_for_bit(bits, tmp_path):
    params = {"w": draw(0, (70, 3))}
    tx = low_bit_momentum(jaxclip.lion(0.1), bits, min_size=1)
    _, state = tx.update({"w": draw(1, (70, 3))}, tx.init(params), params)
    checkpoints.save(tmp_path / "state.safetensors", state)
    loaded = checkpoints.load(tmp_path / "state.safetensors", like=state)
    next_step = jax.jit(tx.update)
    expected, found = (next_step({"w": draw(2, (70, 3))}, s, params) for s in (state, loaded))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.thorough
@SIZES
def test_orbax_restores_it(bits, tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    params = {"w": draw(0, (70, 3))}
    tx = low_bit_momentum(jaxclip.lion(0.1), bits, min_size=1)
    _, state = tx.update({"w": draw(1, (70, 3))}, tx.init(params), params)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("ternary", "bits must be 8 or 4"),
        (1, "bits must be 8 or 4"),
        (6, "bits must be 8 or 4"),
        (Grid(None), "bits must be 8 or 4"),
        (Grid(8, zero_point=True), "no zero points"),
        (Grid(4, levels="balanced"), "a level at 0"),
        (Grid(8, scale_dtype="log8"), "scale_dtype must be"),
        (Grid(8, scale_dtype="float16"), "scale_dtype must be"),
        (7, "bits must be"),
    ],
)
def test_a_grid_that_cannot_hold_a_momentum_is_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        low_bit_momentum(jaxclip.lion(0.1), bits)


def test_other_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="inner must be"):
        low_bit_momentum(0.1)
    with pytest.raises(ValueError, match="min_size"):
        low_bit_momentum(jaxclip.lion(0.1), min_size=0)
    with pytest.raises(ValueError, match="inner must have a momentum"):
        low_bit_momentum(optax.sgd(0.1)).init(jnp.zeros(9))
    tx = low_bit_momentum(jaxclip.lion(0.1), Grid(8, axis=2), min_size=1)
    with pytest.raises(ValueError, match=r"momentum at '.*w'.*axis"):
        tx.init({"w": jnp.zeros((3, 3))})
