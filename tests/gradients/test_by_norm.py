"""Clipping by global norm against exact norms, where optax is wrong and where it is right."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

import jaxclip
from jaxclip.gradients.by_norm import clip_by_global_norm
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
    ordinary_entries,
    real_part_of,
)
from oracles.not_thresholds import NOT_THRESHOLDS
from oracles.quick import quick_first

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
real_dtype = pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: np.dtype(d).name)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
LARGEST = float(np.finfo(np.float32).max)


@functools.cache
def jitted_clip(max_norm):
    return jax.jit(lambda g: clip_once(clip_by_global_norm(max_norm), g))


@jax.jit
def traced_clip(max_norm, g):
    return clip_once(clip_by_global_norm(max_norm), g)


def check_global_clip(grads, max_norm, clipped, state):
    """I1-I4 and the telemetry of one step, against extended precision."""
    max_norm = max(np.longdouble(max_norm), np.longdouble(0))
    bound = max_norm if max_norm >= TINY else np.longdouble(0)
    norm = exact_norm([flush(g) for g in grads])
    if norm > bound * (1 + 1e-6):
        assert float(state.stats.clip_rate) == 1
    if norm <= bound * (1 - 1e-6):
        assert float(state.stats.clip_rate) == 0
    if float(state.stats.clip_rate) == 0:
        assert_bit_identical(clipped, grads)
        assert float(state.stats.clip_coef) == 1
        coef = np.longdouble(1)
    else:
        assert exact_norm(clipped) <= max_norm
        coef = bound / norm
    for g, c in zip(grads, clipped, strict=True):
        info = ml_dtypes.finfo(real_part_of(g.dtype))
        expected = flush(g) * coef
        step = max(float(info.smallest_subnormal), 2 * TINY) if g.dtype != np.float64 else 1e-300
        if coef == 1:
            expected = exact(g)
        error = np.abs(exact(c) - expected)
        # One rounding towards zero, in each part of a complex number, and the margin.
        relative = 2 * float(info.eps) + 32 * 2.0**-23
        assert np.all(error <= relative * np.abs(expected) + 2 * step)
    with np.errstate(over="ignore"):
        expected = {
            "pre_norm": np.float32(min(norm, LARGEST)),
            "post_norm": np.float32(min(norm * coef, LARGEST)),
            "clip_coef": np.float32(coef),
        }
    for name, value in expected.items():
        np.testing.assert_allclose(
            np.float32(getattr(state.stats, name)), value, rtol=2e-6, atol=2 * TINY, err_msg=name
        )
    assert int(state.stats.num_nonfinite) == 0
    assert int(state.step) == 1


# --- The invariants, as properties -----------------------------------------------------


@pytest.mark.thorough
@every_dtype
@given(data=st.data(), max_norm=st.sampled_from(BOUNDS))
def test_global_clip_of_entries_of_every_size_is_bounded_and_right(dtype, data, max_norm):
    x = data.draw(finite_entries(dtype, 8))
    grads = (x[:6].reshape(2, 3), x[6:])
    clipped, state = jitted_clip(max_norm)(grads)
    check_global_clip(grads, max_norm, clipped, state)


@every_dtype
@given(data=st.data(), power=st.integers(-120, 120), distance=st.floats(0.25, 4))
def test_global_clip_near_its_threshold_is_bounded_and_right(dtype, data, power, distance):
    info = ml_dtypes.finfo(real_part_of(dtype))
    power = int(np.clip(power, np.log2(float(info.tiny)) + 8, np.log2(float(info.max)) - 2))
    x = data.draw(ordinary_entries(dtype, 8, power))
    grads = (x[:6].reshape(2, 3), x[6:])
    max_norm = np.float32(distance * float(exact_norm(grads)))
    clipped, state = traced_clip(jnp.asarray(max_norm), grads)
    check_global_clip(grads, max_norm, clipped, state)


@pytest.mark.parametrize("size", [1e-30, 1.0, 3e38])
@pytest.mark.parametrize("max_norm", [2.0**-20, np.nextafter(2.0**-20, 0), 1e-32, 1e-37])
def test_a_gradient_of_any_size_is_clipped_to_a_small_norm(size, max_norm):
    grads = jnp.full(64, size, jnp.float32)
    if exact_norm(grads) > max_norm:
        clipped = jitted_clip(max_norm)(grads)[0]
        assert max_norm * (1 - 1e-5) <= exact_norm(clipped) <= max_norm


@pytest.mark.thorough
@settings(max_examples=25)
@given(data=st.data(), max_norm=st.sampled_from([0.0, 1e-200, 0.1, 1.0, 1e200, np.inf]))
def test_global_clip_of_float64_is_bounded_and_right(data, max_norm):
    with enable_x64(True):
        power = data.draw(st.integers(-800, 800))
        x = np.ldexp(data.draw(ordinary_entries(np.float64, 8, 0)), power)
        grads = (x[:6].reshape(2, 3), x[6:])
        clipped, state = jax.tree.map(np.asarray, jitted_clip(max_norm)(grads))
        assert clipped[0].dtype == np.float64
        norm = exact_norm(grads)
        if float(state.stats.clip_rate) == 0:
            assert norm <= max_norm * (1 + 1e-15)
            assert_bit_identical(clipped, grads)
        else:
            assert norm > max_norm * (1 - 1e-15)
            assert exact_norm(clipped) <= max_norm
        coef = 1 if norm <= max_norm else np.longdouble(max_norm) / norm
        for g, c in zip(grads, clipped, strict=True):
            expected = np.longdouble(g) * coef
            assert np.all(np.abs(c - expected) <= 1e-14 * np.abs(expected) + 1e-300)
        with np.errstate(over="ignore", under="ignore"):
            pre_norm = np.float32(min(norm, LARGEST))
        np.testing.assert_allclose(state.stats.pre_norm, pre_norm, rtol=1e-6, atol=2 * TINY)


@pytest.mark.thorough
@given(data=st.data(), max_norm=st.sampled_from([0.0, 0.1, 1.0, np.inf]))
def test_one_norm_is_taken_over_leaves_of_different_dtypes(data, max_norm):
    dtypes = DTYPES[:3]
    grads = tuple(data.draw(ordinary_entries(d, 4, 0)) for d in dtypes)
    clipped, state = jitted_clip(max_norm)(grads)
    assert [c.dtype for c in clipped] == [np.dtype(d) for d in dtypes]
    check_global_clip(grads, max_norm, clipped, state)


# --- The table of FACTS: where optax's clip fails --------------------------------------


@pytest.mark.parametrize(
    ("dtype", "count", "value", "max_norm"),
    [
        (np.float16, 4, 300.0, 1.0),
        (np.float16, 1_000_000, 1e-4, 0.01),
        (np.float32, 4, 1e20, 1.0),
        (BF16, 4, 1e20, 1.0),
        (BF16, 4, 1e30, 1.0),
        (np.float32, 4, 1e-25, 1e-26),
        (np.float32, 16, 3e38, 1.0),
        (np.complex64, 4, 1e20 + 1e20j, 1.0),
        (np.float16, 2, 6e-8, 1e-8),
    ],
)
@pytest.mark.parametrize("wrap", quick_first([jax.jit, lambda f: f]), ids=["jit", "eager"])
def test_squares_that_overflow_or_underflow_are_clipped_in_the_right_direction(
    wrap, dtype, count, value, max_norm
):
    grads = (np.full(count, value, dtype),)
    clipped, state = wrap(lambda g: clip_once(clip_by_global_norm(max_norm), g))(grads)
    check_global_clip(grads, max_norm, clipped, state)
    assert float(state.stats.clip_coef) < 1
    if max_norm > 1e-7:
        assert exact_norm(clipped) >= 0.98 * max_norm
        assert np.all(exact(clipped[0]) != 0)


@pytest.mark.parametrize(("size", "max_norm"), [(1e18, 1e-21), (1e38, 1e-30), (1e30, 1e-12)])
def test_a_coefficient_below_the_float32_range_is_not_a_silent_zero(size, max_norm):
    clipped, _ = jitted_clip(max_norm)((np.full(4, size, np.float32),))
    assert 0.99 * max_norm <= exact_norm(clipped) <= max_norm


def test_a_coefficient_whose_first_factor_is_1_is_a_coefficient():
    # The margin and the norm cancel, and the other factor is the whole coefficient.
    size = np.float32(1 - 8 * np.finfo(np.float32).eps)
    clipped, _ = clip_once(clip_by_global_norm(1.2e-38), jnp.full((1,), size))
    assert 0 < float(clipped[0]) <= 1.2e-38


@pytest.mark.parametrize("max_norm", [1.0, np.inf])
def test_a_thousand_bfloat16_leaves_of_norm_one_have_norm_32(max_norm):
    # 256 entries stand in for 1,024 leaves, in four leaves: a bfloat16 sum stalls at 256.
    grads = tuple(np.ones(256, BF16) for _ in range(4))
    clipped, state = jitted_clip(max_norm)(grads)
    assert float(state.stats.pre_norm) == 32
    assert exact_norm(clipped) <= max_norm
    check_global_clip(grads, max_norm, clipped, state)


@pytest.mark.thorough
@pytest.mark.parametrize("value", [0.3, 1.315])
def test_the_norm_of_200_leaves_stays_within_the_threshold(value):
    # A running float32 sum over leaves of one size rounds the same way each time.
    grads = tuple(np.full(1, value, np.float32) for _ in range(200))
    clipped, state = jax.jit(functools.partial(clip_once, clip_by_global_norm(1.0)))(grads)
    assert exact_norm(clipped) <= 1
    np.testing.assert_allclose(float(state.stats.pre_norm), float(exact_norm(grads)), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(2**22,), (2**16, 64)])
def test_the_norm_of_four_million_entries_stays_within_the_threshold(shape):
    rng = np.random.default_rng(0)
    for grads in (np.full(shape, 0.3, np.float32), rng.lognormal(size=shape).astype(np.float32)):
        clipped, _ = jitted_clip(1.0)((grads,))
        assert 1 - 1e-5 <= exact_norm(clipped) <= 1


@real_dtype
def test_a_norm_exactly_at_the_threshold_changes_no_bit(dtype):
    triples = [(3, 4, 5), (5, 12, 13), (8, 15, 17), (20, 21, 29)]
    for a, b, c in triples:
        for power in range(-10, 8):
            grads = (np.array([a * 2.0**power, 0, -b * 2.0**power], dtype),)
            clipped, state = traced_clip(jnp.float32(c * 2.0**power), grads)
            assert_bit_identical(clipped, grads)
            assert float(state.stats.clip_rate) == 0


@real_dtype
def test_a_leaf_of_500_entries_is_never_above_the_threshold(dtype):
    rng = np.random.default_rng(0)
    for _ in range(100):
        max_norm = np.float32(rng.uniform(0.1, 2))
        grads = (rng.normal(size=500).astype(dtype),)
        clipped, _ = traced_clip(jnp.asarray(max_norm), grads)
        assert exact_norm(clipped) <= max_norm
        assert exact_norm(clipped) >= max_norm * (1 - float(ml_dtypes.finfo(dtype).eps) - 1e-5)
        cosine = np.sum(exact(clipped[0]) * exact(grads[0]))
        cosine /= exact_norm(clipped) * exact_norm(grads)
        assert cosine > 1 - 1e-4


@pytest.mark.thorough
@real_dtype
def test_a_float32_array_as_threshold_keeps_the_dtype(dtype):
    grads = {"w": jnp.asarray([3.0, -4.0], dtype)}
    for bound in (jnp.float32(0.5), lambda step: jnp.float32(0.5) + 0 * step.astype(jnp.float32)):
        clipped, _ = clip_once(clip_by_global_norm(bound), grads)
        assert clipped["w"].dtype == dtype
        assert exact_norm(clipped) <= 0.5
    injected = optax.inject_hyperparams(clip_by_global_norm)(0.5)
    clipped, _ = clip_once(injected, grads, jax.jit(injected.update))
    assert clipped["w"].dtype == dtype


@every_dtype
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_threshold_of_zero_gives_zeros_also_from_zeros(dtype, value):
    for bound in (0, 0.0, -0.0, np.float32(0), jnp.float32(0)):
        clipped, state = clip_once(clip_by_global_norm(bound), jnp.full(3, value, dtype))
        assert np.array_equal(np.asarray(clipped), np.zeros(3, dtype))
        assert int(state.stats.num_nonfinite) == 0
        assert float(state.stats.clip_rate) == value


@eager_and_jit
def test_a_negative_array_counts_as_zero_and_turns_no_sign(wrap):
    grads = jnp.array([3.0, -4.0, 0.0])
    clipped, state = wrap(lambda c: clip_once(clip_by_global_norm(c), grads))(jnp.float32(-1))
    assert np.array_equal(clipped, np.zeros(3))
    assert int(state.stats.num_nonfinite) == 0


@eager_and_jit
def test_a_nan_array_as_threshold_is_a_bad_step(wrap):
    grads = jnp.array([3.0, -4.0, 0.0])
    clipped, state = wrap(lambda c: clip_once(clip_by_global_norm(c), grads))(jnp.float32(jnp.nan))
    assert np.array_equal(clipped, np.zeros(3))
    assert int(state.stats.num_nonfinite) == 1


def test_infinity_and_numbers_beyond_float32_never_clip():
    grads = (np.array([1e-40, 3e38, -1.0, 0.0, -0.0], np.float32),)
    for bound in (np.inf, 1e300, np.float64(1e300), 10**40, jnp.float32(jnp.inf)):
        clipped, state = clip_once(clip_by_global_norm(bound), grads)
        assert_bit_identical(clipped, grads)
        assert float(state.stats.clip_coef) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@real_dtype
@eager_and_jit
def test_one_bad_entry_makes_all_leaves_zero_and_is_counted(wrap, dtype, bad):
    tx = clip_by_global_norm(1.0)
    update = wrap(tx.update)
    good = {"a": jnp.asarray([3.0, 4.0], dtype), "b": jnp.ones(2, dtype)}
    state = update(good, tx.init(good))[1]
    clipped, after = update(good | {"b": jnp.asarray([1.0, bad], dtype)}, state)
    assert all(np.all(exact(x) == 0) for x in jax.tree.leaves(clipped))
    assert int(after.stats.num_nonfinite) == 1
    assert float(after.stats.pre_norm) == float(state.stats.pre_norm)
    assert float(after.stats.post_norm) == float(after.stats.clip_coef) == 0
    clipped, last = update(good, after)
    assert exact_norm(clipped) >= 0.99
    assert int(last.stats.num_nonfinite) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", quick_first(DTYPES[:3]))
@pytest.mark.parametrize("max_norm", [0.0, 1.0, np.inf])
def test_the_derivative_at_zero_gradients_is_the_identity(dtype, max_norm):
    jacobian = jax.jacobian(lambda g: clip_once(clip_by_global_norm(max_norm), g)[0])
    for f in (jacobian, jax.jit(jacobian)):
        assert np.array_equal(exact(f(jnp.zeros(3, dtype))), np.eye(3))


@pytest.mark.parametrize(
    ("size", "max_norm"), [(1.0, 0.5), (1e20, 2.0), (1e-24, 1e-26), (1.0, 0.0), (1.0, 100.0)]
)
def test_the_derivative_is_the_analytic_jacobian(size, max_norm):
    g = size * np.array([1.0, -2.0, 0.5, 3.0])
    norm = np.linalg.norm(g / size)
    unit = g / size / norm
    coef = max_norm / size / norm
    expected = coef * (np.eye(4) - np.outer(unit, unit)) if coef < 1 else np.eye(4)
    g = jnp.asarray(g, jnp.float32)

    def clip(g):
        return clip_once(clip_by_global_norm(max_norm), g)[0]

    for jacobian in jax.jit(lambda g: (jax.jacfwd(clip)(g), jax.jacrev(clip)(g)))(g):
        np.testing.assert_allclose(
            np.float64(jacobian), expected, rtol=1e-4, atol=1e-5 * max(coef, TINY)
        )


def test_axis_name_makes_the_norm_global_inside_shard_map():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    tx = clip_by_global_norm(1.0, axis_name="x")
    spec = PartitionSpec("x")
    grads = np.full(8, 2.0**-0.5, np.float32)  # norm 2; a shard's own norm is 1

    def clip(g):
        clipped, state = tx.update(g, tx.init(g))
        return clipped, state.stats.pre_norm

    clipped, pre_norm = jax.jit(
        jax.shard_map(clip, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec()))
    )(grads)
    np.testing.assert_allclose(float(pre_norm), 2, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(clipped), grads / 2, rtol=1e-5)
    assert exact_norm(clipped) <= 1


# --- Several steps ---------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.7, optax.linear_schedule(2.0, 0.2, 6)])
@eager_and_jit
def test_ordinary_gradients_are_clipped_as_by_optax_over_several_steps(wrap, bound):
    rng = np.random.default_rng(0)
    ours = clip_by_global_norm(bound)
    grads = {"w": rng.normal(size=(4, 3)).astype(np.float32), "b": np.float32([0.3, -1])}
    state, update = ours.init(grads), wrap(ours.update)
    num_clipped = 0
    for i in range(8):
        g = jax.tree.map(lambda x, i=i: jnp.asarray(x * np.float32(0.5**i)), grads)
        max_norm = float(bound(i)) if callable(bound) else bound
        theirs = optax.clip_by_global_norm(max_norm)
        expected, _ = theirs.update(g, theirs.init(g))
        got, state = update(g, state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-6), got, expected)
        num_clipped += exact_norm(g) > max_norm
        np.testing.assert_allclose(float(state.stats.clip_rate), num_clipped / (i + 1), rtol=1e-6)
    assert 0 < num_clipped < 8


def test_the_clip_rate_is_the_fraction_of_steps_and_a_bad_step_is_not_clipped():
    tx = clip_by_global_norm(1.0)
    state = tx.init(jnp.zeros(2))
    rates = []
    for norm in (5.0, 0.5, 1.0, np.nan, 2.0):
        _, state = tx.update(jnp.asarray([norm, 0.0]), state)
        rates.append(float(state.stats.clip_rate))
    np.testing.assert_allclose(rates, [1, 1 / 2, 1 / 3, 1 / 4, 2 / 5], rtol=1e-6)
    assert int(state.step) == 5
    assert int(state.stats.num_nonfinite) == 1


@eager_and_jit
def test_a_schedule_through_zero_inf_negative_and_nan_is_as_good_as_new_afterwards(wrap):
    values = np.float32([0.5, 0, np.inf, -1, np.nan, 0.5])
    tx = clip_by_global_norm(lambda step: jnp.asarray(values)[step])
    grads = {"w": jnp.array([3.0, -4.0])}
    state, update, norms = tx.init(grads), wrap(tx.update), []
    for _ in values:
        clipped, state = update(grads, state)
        norms.append(float(exact_norm(clipped)))
    inside = 0.5
    np.testing.assert_allclose(norms, [inside, 0, 5, 0, 0, inside], rtol=1e-5)
    assert int(state.stats.num_nonfinite) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_schedule_may_return_python_numbers():
    for value, expected in ((0, 0), (-1.0, 0), (2, 2), (np.inf, 3), (np.nan, 0)):
        tx = clip_by_global_norm(lambda step, value=value: value)
        clipped, _ = clip_once(tx, jnp.array([3.0]))
        np.testing.assert_allclose(float(clipped[0]), expected, rtol=1e-5)


# --- What cannot be a threshold --------------------------------------------------------


@pytest.mark.parametrize(("bad", "error"), NOT_THRESHOLDS, ids=lambda x: repr(x)[:20])
def test_bad_thresholds_raise_in_the_factory_naming_the_argument(bad, error):
    with pytest.raises(error, match="max_norm"):
        clip_by_global_norm(bad)


@pytest.mark.parametrize("array", [np.ones(2), np.ones((1, 1)), jnp.ones(2)])
def test_an_array_cannot_bound_a_global_norm(array):
    with pytest.raises(ValueError, match=r"max_norm.*shape"):
        clip_by_global_norm(array)


@pytest.mark.parametrize("rule", [jaxclip.max_abs(), jaxclip.fan_in(1.0), jaxclip.mse_optimal(4)])
def test_a_rule_cannot_bound_a_global_norm(rule):
    with pytest.raises(TypeError, match="max_norm"):
        clip_by_global_norm(rule)


@pytest.mark.parametrize("factory", [jaxclip.max_abs, jaxclip.fan_in, jaxclip.mse_optimal])
def test_a_factory_that_was_not_called_raises(factory):
    with pytest.raises(TypeError, match="max_norm"):
        clip_by_global_norm(factory)


@pytest.mark.parametrize(("size", "max_norm"), [(1.0, 0.7), (1e308, 1e307)])
def test_a_float32_leaf_in_a_tree_with_a_float64_one_is_finite_and_bounded(size, max_norm):
    with enable_x64(True):
        grads = {"a": jnp.full(3, 1.1, jnp.float32), "b": jnp.full(1, size, jnp.float64)}
        tx = jaxclip.clip_by_global_norm(max_norm)
        clipped, _ = jax.device_get(jax.jit(tx.update)(grads, tx.init(grads)))
    parts = [np.asarray(x, np.longdouble) for x in (*grads.values(), *clipped.values())]
    norm, left = (np.sqrt(sum(np.sum(x * x) for x in pair)) for pair in (parts[:2], parts[2:]))
    # The float32 leaf is rounded towards zero.
    assert norm * (1 - 2e-7) <= left * (norm / np.longdouble(max_norm)) <= norm
    np.testing.assert_allclose(clipped["a"], 1.1 * (max_norm / float(norm)), rtol=3e-7)


def test_norms_beyond_float32_are_reported_as_its_largest_number():
    grads = jnp.full(4, 3e38)
    tx = jaxclip.clip_by_global_norm(jnp.inf)
    _, state = tx.update(grads, tx.init(grads))
    assert state.stats.pre_norm == state.stats.post_norm == jnp.finfo(jnp.float32).max


def test_the_reported_norm_after_the_clip_accounts_for_eps():
    grads, tx = jnp.array([3.0, 4.0]), jaxclip.clip_by_global_norm(1.0, eps=5.0)
    clipped, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(clipped, [0.3, 0.4], rtol=2e-6)
    np.testing.assert_allclose(
        [state.stats.post_norm, state.stats.clip_coef], [0.5, 0.1], rtol=2e-6
    )


@pytest.mark.thorough
@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_a_nan_among_many_entries_is_a_bad_step_of_every_norm(ord):
    grads = jnp.ones((64, 80)).at[31, 7].set(jnp.nan)
    tx = jaxclip.clip_by_global_norm(1.0, ord=ord)
    clipped, state = jax.jit(tx.update)(grads, tx.init(grads))
    assert int(state.stats.num_nonfinite) == 1
    assert not np.any(clipped)
