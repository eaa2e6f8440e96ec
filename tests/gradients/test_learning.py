"""What holds for every clip that learns from history, over a stream with bad steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.gradients.by_history import adagc, autoclip, zclip
from jaxclip.gradients.spikes import clip_leaf_spikes, clip_spikes
from oracles.quick import quick_first
from oracles.streams import BAD, NUM_STEPS, arrays_of_stream, make_stream, scan

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
FACTORIES = [
    autoclip,
    functools.partial(autoclip, window=8),
    zclip,
    adagc,
    clip_spikes,
    clip_leaf_spikes,
]
OTHER_SETTINGS = [
    functools.partial(zclip, warmup=3),
    functools.partial(adagc, warmup=3),
    functools.partial(clip_spikes, theta=9.0),
]
every_factory = pytest.mark.parametrize(
    "factory",
    quick_first([*FACTORIES, *OTHER_SETTINGS], len(FACTORIES)),
    ids=lambda f: getattr(f, "__name__", None) or f"{f.func.__name__}{f.keywords}",
)


@functools.cache
def run_of_factory(factory: Any) -> tuple[Any, Any]:
    return scan(factory(), arrays_of_stream())


@pytest.mark.thorough
@every_factory
def test_bad_steps_change_no_statistic_bit_for_bit(factory: Any):
    _, states = run_of_factory(factory)
    for i in BAD:
        if i:
            kept = (states.threshold, states.learned, states.num_learned, states.stats.pre_norm)
            for x in jax.tree.leaves(kept):
                np.testing.assert_array_equal(x[i], x[i - 1])


@pytest.mark.thorough
@every_factory
def test_bad_steps_leave_no_trace_in_later_steps(factory: Any):
    grads = arrays_of_stream()
    good = np.array([i for i in range(NUM_STEPS) if i not in BAD])
    with_bad, _ = run_of_factory(factory)
    without, _ = scan(factory(), jax.tree.map(lambda g: g[good], grads))
    for k in grads:
        np.testing.assert_array_equal(with_bad[k][good], without[k])


@pytest.mark.thorough
@every_factory
def test_thresholds_are_finite_and_recover_from_a_spike(factory: Any):
    spike = {60: 1e4}
    noisy = make_stream(spike, {})
    calm = make_stream({}, {})
    streams = {k: np.stack([[g[k] for g in noisy], [g[k] for g in calm]], axis=1) for k in calm[0]}
    _, both = scan(factory(), streams, in_axes=1)
    states, expected = (jax.tree.map(lambda x, i=i: x[:, i], both) for i in (0, 1))
    for x in jax.tree.leaves(states):
        assert np.isfinite(np.float64(x)).all()
    # 139 steps after a spike of 10,000: only `clip_leaf_spikes` lets it into its average raw.
    limit = 1e3 if factory is clip_leaf_spikes else 10
    assert states.threshold[-1] < limit * expected.threshold[-1]


@pytest.mark.thorough
@every_factory
def test_norms_beyond_float32_leave_finite_statistics(factory: Any):
    signs = {k: np.sign(v) for k, v in make_stream({}, {})[0].items()}
    tx = factory()
    update = jax.jit(tx.update)
    for size in (3e38, 1e-30, 1e-37):
        state = tx.init(signs)
        for i, factor in enumerate([1.0, 1.0, 1.0, 0.5, size, size, 1.0, 1.0]):
            grads = {k: np.float32(v * factor) for k, v in signs.items()}
            updates, state = update(grads, state)
            for x in jax.tree.leaves((updates, state)):
                assert np.isfinite(np.float64(x)).all(), (size, i)
            for k in signs:
                assert np.sum(np.float64(updates[k]) * signs[k]) > 0, (size, i)
        assert state.stats.num_nonfinite == 0


@pytest.mark.parametrize("factory", [autoclip, zclip, clip_spikes, clip_leaf_spikes])
def test_the_first_step_is_not_clipped(factory: Any):
    g = {"w": jnp.array([3.0, -1e4, 0.5])}
    tx = factory()
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates["w"], g["w"])
    assert state.stats.clip_coef == 1
    assert state.stats.clip_rate == 0


@every_factory
def test_zero_gradients_enter_no_statistic_and_freeze_nothing(factory: Any):
    g = {"w": jnp.array([1.0, -2.0])}
    zero = {"w": jnp.zeros(2)}
    tx = factory()
    state = tx.init(g)
    for _ in range(40):
        updates, state = tx.update(zero, state)
        np.testing.assert_array_equal(updates["w"], 0)
    assert state.num_learned == 0
    assert state.stats.num_nonfinite == 0
    updates, state = tx.update(g, state)
    expected = g["w"] * min(1, (1 / np.sqrt(5)) if "adagc" in repr(factory) else 1)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


@every_factory
def test_a_leaf_that_begins_at_zero_is_not_frozen(factory: Any):
    # As the B matrix of a zero-initialised adapter.
    tx = factory()
    state = tx.init({"a": jnp.zeros(2), "b": jnp.zeros(2)})
    update = jax.jit(tx.update)
    for _ in range(30):
        _, state = update({"a": jnp.array([0.3, 0.4]), "b": jnp.zeros(2)}, state)
    updates, _ = update({"a": jnp.array([0.3, 0.4]), "b": jnp.array([1e-3, 2e-3])}, state)
    assert np.all(np.asarray(updates["b"]) > 1e-5)


@pytest.mark.parametrize("factory", [adagc, clip_spikes, clip_leaf_spikes])
def test_updates_that_do_not_fit_the_state_raise(factory: Any):
    tx = factory()
    state = tx.init({"w": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="updates"):
        tx.update({"w": jnp.ones(2)}, state)


@pytest.mark.thorough
def test_an_infinite_z_theta_or_relative_clips_nothing():
    grads = arrays_of_stream()
    good = np.array([i for i in range(NUM_STEPS) if i not in BAD])
    grads = jax.tree.map(lambda g: g[good], grads)
    for tx in (zclip(np.inf), clip_spikes(np.inf), adagc(np.inf, max_norm=np.inf)):
        updates, states = scan(tx, grads)
        jax.tree.map(np.testing.assert_array_equal, updates, grads)
        assert all(np.isfinite(np.float64(x)).all() for x in jax.tree.leaves(states))


@pytest.mark.thorough
@every_factory
def test_bfloat16_agrees_with_float32(factory: Any):
    dtype = jnp.bfloat16
    grads = jax.tree.map(lambda g: g[:30] / 20, arrays_of_stream())
    half = jax.tree.map(lambda g: jnp.asarray(g, dtype), grads)
    updates, _ = scan(factory(), half)
    expected, _ = scan(factory(), jax.tree.map(lambda g: g.astype(jnp.float32), half))
    for k in grads:
        size = np.abs(expected[k]).max(axis=tuple(range(1, expected[k].ndim)), keepdims=True)
        error = np.abs(np.float64(updates[k]) - expected[k])
        assert np.all(error <= 2 * float(jnp.finfo(dtype).eps) * size + 1e-7)


@pytest.mark.thorough
@every_factory
def test_complex_entries_count_by_modulus(factory: Any):
    grads = jax.tree.map(lambda g: g[1:60], arrays_of_stream())
    turn = np.complex64(0.6 + 0.8j)
    with jax.numpy_dtype_promotion("standard"):  # clip_to_norm multiplies complex by real
        updates, _ = scan(factory(), jax.tree.map(lambda g: g * turn, grads))
    expected, _ = scan(factory(), grads)
    for k in grads:
        size = np.abs(expected[k]).max()
        np.testing.assert_allclose(updates[k], expected[k] * turn, rtol=2e-3, atol=1e-5 * size)


@pytest.mark.thorough
@every_factory
def test_inside_vmap_with_an_axis_name_all_devices_agree(factory: Any):
    make = functools.partial(factory, axis_name="devices")
    grads = {"w": arrays_of_stream()["w"][1:60]}
    whole, _ = scan(factory(), grads)

    def one_device(part: Any) -> Any:
        tx = make()
        state = tx.init({"w": part["w"][0]})

        def body(state: Any, g: Any) -> tuple[Any, Any]:
            updates, state = tx.update(g, state)
            return state, (updates, state.stats.num_nonfinite, state.threshold)

        return jax.lax.scan(body, state, part)[1]

    split = {"w": jnp.asarray(grads["w"]).reshape(59, 2, 2, 2)}  # steps, devices, rows, columns
    mapped = jax.jit(jax.vmap(one_device, in_axes=1, out_axes=1, axis_name="devices"))
    parts, num_bad, thresholds = jax.device_get(mapped(split))
    size = np.abs(whole["w"]).max()
    np.testing.assert_allclose(
        parts["w"].reshape(59, 4, 2), whole["w"], rtol=1e-4, atol=1e-6 * size
    )
    np.testing.assert_array_equal(num_bad[:, 0], num_bad[:, 1])
    if "clip_leaf_spikes" not in repr(factory):
        np.testing.assert_allclose(thresholds[:, 0], thresholds[:, 1], rtol=1e-6)


@pytest.mark.thorough
@every_factory
def test_float64_leaves_keep_their_dtype_in_a_tree_with_others(factory: Any):
    with enable_x64(True):
        dtypes = {"a": jnp.float64, "b": jnp.float32, "c": jnp.complex64, "d": jnp.bfloat16}
        tx = factory()
        update = jax.jit(tx.update)
        state = tx.init({k: np.zeros(2, dtype) for k, dtype in dtypes.items()})
        for size in (1.0, 2.0, 1e30, 1.0):
            grads = {k: np.full(2, size, dtype) for k, dtype in dtypes.items()}
            updates, state = update(grads, state)
        assert {k: u.dtype for k, u in updates.items()} == dtypes
        assert all(np.isfinite(np.complex128(x)).all() for x in jax.tree.leaves((updates, state)))
        assert state.stats.pre_norm.dtype == state.threshold.dtype == jnp.float32
        np.testing.assert_allclose(state.stats.pre_norm, np.sqrt(8), rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("factory", [autoclip, zclip, adagc, clip_spikes, clip_leaf_spikes])
def test_float64_gradients_leave_the_statistics_in_float32(factory: Any):
    with enable_x64(True):
        g = {"a": jnp.array([0.1, -0.3], jnp.float64), "b": jnp.array([0.2j], jnp.complex128)}
        tx = factory()
        first, update = tx.init(g), jax.jit(tx.update)
        state = first
        for size in (1.0, 100.0):
            updates, state = update(jax.tree.map(lambda x, s=size: x * s, g), state)
            if size == 1.0:
                jax.tree.map(np.testing.assert_array_equal, updates, g)
        dtypes = [x.dtype for x in jax.tree.leaves((updates, state))]
    assert dtypes == [x.dtype for x in jax.tree.leaves((g, first))]
