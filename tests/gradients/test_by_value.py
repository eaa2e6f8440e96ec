"""Clipping entry by entry against NumPy's clip with the bound rounded down."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxclip
from jaxclip._core.floats import has_nonfinite
from jaxclip.gradients.by_value import clip_by_value
from oracles.exact_clips import (
    BF16,
    BOUNDS,
    DTYPES,
    TINY,
    assert_bit_identical,
    clip_once,
    exact,
    exact_norm,
    finite_entries,
    flush,
)
from oracles.not_thresholds import NOT_THRESHOLDS

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
real_dtype = pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: np.dtype(d).name)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


@functools.cache
def jitted_value_clip(bound):
    return jax.jit(lambda g: clip_once(clip_by_value(bound), g))


@every_dtype
@given(data=st.data(), bound=st.sampled_from(BOUNDS))
def test_value_clip_is_numpys_clip_with_the_bound_rounded_down(dtype, data, bound):
    x = data.draw(finite_entries(dtype, 8))
    got, state = jitted_value_clip(bound)(x)
    assert got.dtype == np.dtype(dtype)
    modulus, out = np.abs(exact(x)), np.abs(exact(got))
    if np.dtype(dtype).kind == "c":
        # Subnormals count as 0 and may stay as they are.
        assert np.all(out <= np.longdouble(bound) + 2 * TINY)
        size = np.where(modulus > bound, np.longdouble(bound) / np.maximum(modulus, TINY), 1)
        assert np.all(np.abs(exact(got) - exact(x) * size) <= 2e-6 * out + 4 * TINY)
    else:
        with np.errstate(over="ignore"):
            limit = np.asarray(bound, np.float64).astype(dtype)
        if float(limit) > bound:
            limit = np.nextafter(limit, np.zeros((), dtype))
        expected = np.clip(exact(x), -exact(limit), exact(limit))
        assert np.all(out <= bound)
        assert np.array_equal(flush(got), flush(expected))
        clear = (modulus >= TINY) | (modulus == 0)
        if clear.all():
            rate = np.mean(modulus > exact(limit))
            np.testing.assert_allclose(float(state.stats.clip_rate), rate, rtol=1e-6)


@real_dtype
def test_a_float32_array_as_threshold_keeps_the_dtype(dtype):
    grads = {"w": jnp.asarray([3.0, -4.0], dtype)}
    for bound in (jnp.float32(0.5), lambda step: jnp.float32(0.5) + 0 * step.astype(jnp.float32)):
        clipped, _ = clip_once(clip_by_value(bound), grads)
        assert clipped["w"].dtype == dtype
        assert exact_norm(clipped) <= 0.5 * 2**0.5
    injected = optax.inject_hyperparams(clip_by_value)(0.5)
    clipped, _ = clip_once(injected, grads, jax.jit(injected.update))
    assert clipped["w"].dtype == dtype


@every_dtype
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_threshold_of_zero_gives_zeros_also_from_zeros(dtype, value):
    for bound in (0, 0.0, -0.0, np.float32(0), jnp.float32(0)):
        clipped, state = clip_once(clip_by_value(bound), jnp.full(3, value, dtype))
        assert np.array_equal(np.asarray(clipped), np.zeros(3, dtype))
        assert int(state.stats.num_nonfinite) == 0
        assert float(state.stats.clip_rate) == value


@eager_and_jit
def test_a_negative_array_counts_as_zero_and_turns_no_sign(wrap):
    grads = jnp.array([3.0, -4.0, 0.0])
    clipped, state = wrap(lambda c: clip_once(clip_by_value(c), grads))(jnp.float32(-1))
    assert np.array_equal(clipped, np.zeros(3))
    assert int(state.stats.num_nonfinite) == 0


@eager_and_jit
def test_a_nan_array_as_threshold_is_a_bad_step(wrap):
    grads = jnp.array([3.0, -4.0, 0.0])
    clipped, state = wrap(lambda c: clip_once(clip_by_value(c), grads))(jnp.float32(jnp.nan))
    assert np.array_equal(clipped, np.zeros(3))
    assert int(state.stats.num_nonfinite) == 1


@every_dtype
@eager_and_jit
def test_value_clip_bounds_infinities_and_zeroes_nans(wrap, dtype):
    grads = jnp.asarray([np.nan, np.inf, -np.inf, 0.25, -3.0], dtype)
    got, state = wrap(lambda g: clip_once(clip_by_value(0.5), g))(grads)
    # An infinite complex number has no direction that arithmetic keeps: it becomes 0.
    infinite = 0.0 if np.dtype(dtype).kind == "c" else 0.5
    np.testing.assert_allclose(
        exact(got).real.astype(float), [0, infinite, -infinite, 0.25, -0.5], rtol=1e-5
    )
    assert int(state.stats.num_nonfinite) == 1


def test_complex_entries_are_clipped_by_modulus():
    got, state = clip_once(clip_by_value(1.0), jnp.asarray([3 + 4j, 0.3 - 0.4j, 0], jnp.complex64))
    np.testing.assert_allclose(got, [0.6 + 0.8j, 0.3 - 0.4j, 0], rtol=1e-5)
    assert float(state.stats.clip_rate) == np.float32(1 / 3)


def test_a_clipped_complex_entry_is_never_above_the_bound():
    rng = np.random.default_rng(0)
    z = (rng.normal(size=4096) + 1j * rng.normal(size=4096)).astype(np.complex64)
    got, _ = jax.jit(lambda z: clip_once(clip_by_value(0.1), z))(z)
    changed = np.asarray(got) != z
    assert changed.sum() > 4000
    assert np.all(np.abs(exact(got)[changed]) <= np.longdouble(0.1))


def test_value_clip_leaves_entries_inside_the_bound_bit_identical_subnormals_too():
    x = np.array([1e-40, -1e-42, 0.5, -1.0, 1.0, 0.0, -0.0], np.float32)
    for g in (x, x.astype(BF16), x.astype(np.float16)):
        got, _ = jax.jit(lambda g: clip_once(clip_by_value(1.0), g))(g)
        assert_bit_identical(got, g)


# --- Several steps ---------------------------------------------------------------------


def test_ordinary_gradients_are_clipped_as_by_optax_clip():
    g = jax.random.normal(jax.random.key(0), (5, 7))
    expected = optax.clip(0.5).update(g, optax.EmptyState())[0]
    assert np.array_equal(clip_once(clip_by_value(0.5), g)[0], expected)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_many_leaves_alike_and_not_are_counted_as_one_by_one(wrap):
    rng = np.random.default_rng(0)
    shapes = [(3, 5)] * 19 + [(5, 3)] * 8 + [(2,)]
    grads = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    bounds = [0.5 if i % 3 else 1.5 for i in range(len(shapes))]
    tx = clip_by_value(bounds)
    clipped, state = wrap(tx.update)(list(map(jnp.asarray, grads)), tx.init(grads))
    expected = [np.clip(g, -bound, bound) for g, bound in zip(grads, bounds, strict=True)]
    assert_bit_identical(clipped, expected)
    num_clipped = sum(np.sum(g != e) for g, e in zip(grads, expected, strict=True))
    rate = num_clipped / sum(g.size for g in grads)
    np.testing.assert_allclose(state.stats.clip_rate, rate, rtol=1e-6)
    assert not has_nonfinite(clipped)
    for i in range(len(grads)):
        hit = [g.at[(0,) * g.ndim].set(jnp.nan) if i == j else g for j, g in enumerate(clipped)]
        assert has_nonfinite(hit)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_clip_rate_of_entries_is_that_of_the_last_finite_step(bad):
    tx = clip_by_value(1.0)
    state = tx.init(jnp.zeros(4))
    rates = []
    for entry in (2.0, bad, 0.5):
        _, state = tx.update(jnp.asarray([entry, 3.0, 1.0, -0.5]), state)
        rates.append(float(state.stats.clip_rate))
    assert rates == [0.5, 0.5, 0.25]
    assert int(state.stats.num_nonfinite) == 1


@eager_and_jit
def test_a_schedule_through_zero_inf_negative_and_nan_is_as_good_as_new_afterwards(wrap):
    values = np.float32([0.5, 0, np.inf, -1, np.nan, 0.5])
    tx = clip_by_value(lambda step: jnp.asarray(values)[step])
    grads = {"w": jnp.array([3.0, -4.0])}
    state, update, norms = tx.init(grads), wrap(tx.update), []
    for _ in values:
        clipped, state = update(grads, state)
        norms.append(float(exact_norm(clipped)))
    inside = 0.5 * 2**0.5
    np.testing.assert_allclose(norms, [inside, 0, 5, 0, 0, inside], rtol=1e-5)
    assert int(state.stats.num_nonfinite) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_schedule_may_return_python_numbers():
    for value, expected in ((0, 0), (-1.0, 0), (2, 2), (np.inf, 3), (np.nan, 0)):
        tx = clip_by_value(lambda step, value=value: value)
        clipped, _ = clip_once(tx, jnp.array([3.0]))
        np.testing.assert_allclose(float(clipped[0]), expected, rtol=1e-5)


# --- Thresholds by leaf ----------------------------------------------------------------

GRADS = {"dense": {"kernel": jnp.full((8, 2), -3.0), "bias": jnp.full(2, 3.0)}, "out": jnp.ones(2)}


@eager_and_jit
def test_a_prefix_tree_bounds_each_part_by_its_own_threshold(wrap):
    tx = clip_by_value({"dense": 0.5, "out": lambda step: 0.25 * (1 + step.astype(jnp.float32))})
    state, update = tx.init(GRADS), wrap(tx.update)
    for out in (0.25, 0.5, 0.75):
        got, state = update(GRADS, state)
        assert np.all(np.asarray(got["dense"]["kernel"]) == -0.5)
        assert np.all(np.asarray(got["dense"]["bias"]) == 0.5)
        assert np.all(np.asarray(got["out"]) == out)
    assert float(state.stats.clip_rate) == 1


def test_fan_in_bounds_kernels_and_leaves_biases_free():
    got, state = clip_once(clip_by_value(jaxclip.fan_in(1.0)), GRADS)
    assert np.all(np.asarray(got["dense"]["kernel"]) == -0.5)  # sqrt(2 / 8)
    assert np.all(np.asarray(got["dense"]["bias"]) == 3)
    assert float(state.stats.clip_rate) == np.float32(16 / 20)


@pytest.mark.thorough
def test_max_abs_clips_nothing_and_mse_optimal_is_one_threshold_a_channel():
    got, state = clip_once(clip_by_value(jaxclip.max_abs()), GRADS)
    jax.tree.map(np.testing.assert_array_equal, got, GRADS)
    assert float(state.stats.clip_rate) == 0
    g = jnp.asarray([[1.0, 10.0], [1.0, -10.0], [1.0, 10.0], [-5.0, 40.0]])
    got, _ = clip_once(clip_by_value(jaxclip.mse_optimal(1, axis=1)), g)
    expected = np.clip(g, [-2, -17.5], [2, 17.5])  # the mean of |g| for each column
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-6)


def test_a_tree_that_does_not_fit_the_gradients_raises():
    with pytest.raises(ValueError, match="prefix tree"):
        clip_once(clip_by_value({"dense": 0.5}), GRADS)


# --- What cannot be a threshold --------------------------------------------------------


@pytest.mark.parametrize(("bad", "error"), NOT_THRESHOLDS, ids=lambda x: repr(x)[:20])
def test_bad_thresholds_raise_in_the_factory_naming_the_argument(bad, error):
    with pytest.raises(error, match="max_abs"):
        clip_by_value(bad)
    if bad is None:  # in a tree it bounds nothing
        return
    with pytest.raises(error, match=r"max_abs at 'dense/w'"):
        clip_by_value({"out": 1.0, "dense": {"w": bad}})


@pytest.mark.parametrize("array", [np.ones(3), np.ones((2, 2)), jnp.ones(3)])
def test_an_array_that_does_not_broadcast_to_its_leaf_raises_naming_the_path(array):
    tx = clip_by_value({"dense": 1.0, "out": array})
    with pytest.raises(ValueError, match="'out'"):
        clip_once(tx, GRADS)


def test_an_array_bounds_each_entry_it_broadcasts_to():
    bounds = np.float32([0.25, 4.0])
    for bound in (bounds, jnp.asarray(bounds)):
        got, _ = clip_once(clip_by_value(bound), {"w": jnp.full((3, 2), -2.0)})
        assert np.array_equal(got["w"], np.broadcast_to([-0.25, -2.0], (3, 2)))


@pytest.mark.parametrize("factory", [jaxclip.max_abs, jaxclip.fan_in, jaxclip.mse_optimal])
def test_a_factory_that_was_not_called_raises_with_advice(factory):
    with pytest.raises(TypeError, match=r"max_abs.*call it"):
        clip_by_value(factory)
