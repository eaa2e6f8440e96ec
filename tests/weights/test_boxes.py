"""Boxes: bounds of each entry, held as given in every dtype."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxclip
from jaxclip import box, project_weights
from jaxclip.weights import nonnegative
from oracles.exact_sets import DTYPES, wide

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
clip = jax.jit(lambda w, low, high: box(low, high)(w))


def entries_of(dtype, size=8):
    """Finite numbers by their bits, from subnormals to the largest."""
    unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")

    def finite(bits):
        x = bits.view(dtype)
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(x.astype(np.float32)), x, dtype(1)).astype(dtype)

    return hnp.arrays(unsigned, size).map(finite)


def inwards(low, high, dtype) -> tuple[float, float]:
    """The least and the largest number of a dtype that are in an interval, in NumPy."""
    near = np.asarray([low, high], np.float64).astype(dtype)
    infinity = np.asarray(np.inf, dtype)
    first = near[0] if float(near[0]) >= low else np.nextafter(near[0], infinity)
    last = near[1] if float(near[1]) <= high else np.nextafter(near[1], -infinity)
    return float(first), float(last)


@every_dtype
@pytest.mark.parametrize("traced", [False, True], ids=["number", "traced"])
@given(data=st.data(), ends=st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 2).map(sorted))
def test_entries_beyond_a_bound_are_on_it_and_the_others_are_untouched(dtype, traced, data, ends):
    w = data.draw(entries_of(dtype))
    low, high = (0.0 if abs(x) < 2.0**-20 else x for x in ends)  # not flushed, nor subnormal
    first, last = inwards(low, high, dtype)
    got = clip(jnp.asarray(w), *map(np.float32, (low, high))) if traced else box(low, high)(w)
    assert got.dtype == dtype
    expected = np.minimum(np.maximum(wide(w), first), last)
    assert np.array_equal(wide(got), expected)


@every_dtype
@pytest.mark.parametrize(
    ("low", "high"), [(-0.1, 0.1), (0.1, 0.7), (-0.7, -0.1), (0.7, 0.8), (-0.8, -0.7)]
)
def test_bounds_that_the_dtype_does_not_have_are_rounded_inwards(dtype, low, high):
    got = np.asarray(box(low, high)(jnp.asarray([-1, 1], dtype)), np.float64)
    assert low <= got[0] <= got[1] <= high
    assert tuple(got) == inwards(low, high, dtype)


@every_dtype
@given(data=st.data())
def test_nonnegative_weights_are_the_positive_parts_and_keras_and_optax_agree(dtype, data):
    w = data.draw(entries_of(dtype))
    expected = np.where(wide(w) >= 0, wide(w), 0)  # Keras: w * (w >= 0)
    got = [f(lambda w: nonnegative()(w))(jnp.asarray(w)) for f in (lambda f: f, jax.jit)]
    assert np.array_equal(wide(got[0]), expected)
    assert np.array_equal(wide(got[1]), expected)
    peer = optax.projections.projection_non_negative(jnp.asarray(w))
    is_normal = np.abs(wide(w)) >= 2.0**-126
    assert np.array_equal(wide(peer)[is_normal], expected[is_normal])


@pytest.mark.thorough
def test_it_agrees_with_the_box_and_the_l_infinity_ball_of_optax():
    w = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
    peers = optax.projections
    assert np.array_equal(box(-0.25, 0.5)(w), peers.projection_box(w, -0.25, 0.5))
    assert np.array_equal(box(0.5)(w), peers.projection_linf_ball(w, 0.5))
    assert np.array_equal(box(0.0, 1.0)(w), peers.projection_hypercube(w))
    # Where that is not right: in half precision its bound is rounded to nearest, outwards.
    half = jnp.ones(1, jnp.bfloat16)
    assert float(peers.projection_box(half, -0.1, 0.1)[0]) > 0.1 >= float(box(-0.1, 0.1)(half)[0])


@pytest.mark.thorough
def test_one_argument_is_the_box_of_clip_weights():
    params = {"dense": {"kernel": jnp.full((8, 3), 2.0), "bias": jnp.full(3, 2.0)}}
    rule = jaxclip.fan_in(1.0)
    expected = jaxclip.clip_weights(params, rule)
    got = jax.tree.map(box(rule), params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    z = jnp.asarray([3 + 4j, 0.1j], jnp.complex64)
    assert np.array_equal(box(1.0)(z), jaxclip.clip_weights(z, 1.0))


@eager_and_jit
def test_nan_stays_and_infinities_are_brought_in(wrap):
    got = wrap(lambda w: box(-1.0, 2.0)(w))(jnp.asarray([np.nan, np.inf, -np.inf, 0.5]))
    assert np.array_equal(got, [np.nan, 2.0, -1.0, 0.5], equal_nan=True)


def test_traced_nonsense_bounds_nothing_or_gives_the_upper_bound():
    w = jnp.asarray([-5.0, 0.3, 5.0])
    assert np.array_equal(clip(w, np.float32(np.nan), np.float32(np.nan)), w)
    assert np.array_equal(clip(w, np.float32(-np.inf), np.float32(np.inf)), w)
    assert np.array_equal(clip(w, np.float32(2.0), np.float32(1.0)), np.ones(3))
    # No bfloat16 is between these: the largest below.
    got = box(0.1, 0.1)(jnp.ones(1, jnp.bfloat16))
    assert float(got[0]) == inwards(0.1, 0.1, ml_dtypes.bfloat16)[1]


def test_bounds_may_be_schedules():
    growing = box(0.0, lambda step: 1.0 + step)
    assert float(growing(jnp.asarray(9.0), jnp.float32(3))) == 4.0
    assert float(box(lambda step: jnp.float32(0.5))(jnp.asarray(9.0))) == 0.5


@pytest.mark.thorough
def test_float64_bounds_hold_as_given():
    with enable_x64(True):
        w = jnp.asarray([-1.0, 0.05, 3.0])
        for low, high in [(-0.1, 0.1), (jnp.asarray(-0.1), jnp.asarray(0.1))]:
            assert np.array_equal(np.asarray(box(low, high)(w)), [-0.1, 0.05, 0.1])


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("0", 1.0),
        (True, 1.0),
        (np.nan, 1.0),
        (0.0, np.nan),
        (np.inf, np.inf),
        (-np.inf, -np.inf),
        (2.0, 1.0),
        (jaxclip.fan_in(), 1.0),
        (0.0, 1j),
        (-1.0, None),
        ({"w": -1.0}, None),
    ],
    ids=repr,
)
def test_what_is_no_interval_is_refused_by_name(low, high):
    with pytest.raises((TypeError, ValueError), match=r"low|high"):
        box(low, high)


def test_complex_entries_have_no_interval():
    for projection in (box(0.0, 1.0), nonnegative()):
        with pytest.raises(TypeError, match="complex"):
            projection(jnp.ones(2, jnp.complex64))


def test_weak_types_are_kept_and_other_arrays_returned():
    for projection in (box(0.1), box(0.0, 0.1), nonnegative()):
        assert projection(jnp.asarray(2.0)).weak_type
        assert projection(jnp.arange(3, dtype=jnp.int32)).dtype == jnp.int32


# --- In a chain -----------------------------------------------------------------------


def make_step(wrap):
    def step(w, u, t):
        tx = project_weights(box(t))
        updates, _ = tx.update(u, tx.init(w), w)
        with jax.numpy_dtype_promotion("standard"):
            return updates, optax.apply_updates(w, updates)

    return wrap(step)


STEPS = {"eager": make_step(lambda f: f), "jit": make_step(jax.jit)}
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@every_dtype
@pytest.mark.parametrize("update_dtype", DTYPES)
@every_step
@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-8, 4), t=st.floats(0.5, 1, width=32))
def test_from_inside_no_weight_is_ever_outside_after_apply_updates(
    dtype, update_dtype, step, seed, power, t
):
    t = float(np.float32(t * 2.0**power))
    rng = np.random.default_rng(seed)
    w = wide(jaxclip.clip_weights(jnp.asarray((rng.normal(size=64) * t).astype(dtype)), t)).astype(
        dtype
    )
    u = (rng.normal(size=64) * t * 10.0 ** rng.integers(-3, 3, 64)).astype(update_dtype)
    updates, after = step(jnp.asarray(w), jnp.asarray(u), jnp.float32(t))
    assert updates.dtype == update_dtype
    assert after.dtype == dtype
    assert np.all(np.abs(wide(after)) <= t)


@every_dtype
@every_step
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), power=st.integers(-8, 4), t=st.floats(0.5, 1, width=32))
def test_weights_that_start_outside_are_brought_in_by_the_first_step(dtype, step, seed, power, t):
    t = float(np.float32(t * 2.0**power))
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=64) * t * 10.0 ** rng.integers(-2, 4, 64)).astype(dtype)
    u = (rng.normal(size=64) * t * 10.0 ** rng.integers(-3, 3, 64)).astype(dtype)
    w = np.where(np.isfinite(w), w, dtype(1000)).astype(dtype)
    _, after = step(jnp.asarray(w), jnp.asarray(u), jnp.float32(t))
    assert np.all(np.abs(wide(after)) <= t)


@pytest.mark.parametrize(
    ("dtype", "update_dtype"),
    [(np.float32, ml_dtypes.bfloat16), (np.float32, np.float16), (np.float16, ml_dtypes.bfloat16)],
)
@every_step
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_weights_a_little_outside_are_brought_in_by_coarser_updates_too(
    dtype, update_dtype, step, seed
):
    # Up to 30 times the threshold, where the box is wider than the spacing of the update.
    rng = np.random.default_rng(seed)
    w, u = (rng.uniform(-3, 3, 64)).astype(dtype), rng.normal(size=64).astype(update_dtype)
    _, after = step(jnp.asarray(w), jnp.asarray(u), jnp.float32(0.1))
    assert np.all(np.abs(wide(after)) <= float(np.float32(0.1)))


@pytest.mark.parametrize("update_dtype", [ml_dtypes.bfloat16, np.float16])
@every_step
def test_where_no_update_leads_into_the_box_weights_end_as_near_as_one_can_bring_them(
    step, update_dtype
):
    w = np.asarray([2.0041, -2.0041, 1.0, 3.03, 700.3, -1e5, 0.0], np.float32)
    u, t = jnp.zeros(w.size, update_dtype), np.float32(1e-3)
    after = np.abs(wide(step(jnp.asarray(w), u, jnp.asarray(t))[1]))
    # Every update that there is: those by bits, without NaN and infinities.
    every = np.arange(2**16, dtype=np.uint16).view(update_dtype).astype(np.float32)
    sums = w[:, None] + every[np.isfinite(every)]
    nearest = np.min(np.maximum(np.abs(sums.astype(np.float64)), t), axis=1)
    assert np.array_equal(np.maximum(after, t), nearest)
    assert np.sum(after > t) >= 2
    for _ in range(3):  # the next steps bring them in
        w = step(jnp.asarray(w), u, jnp.asarray(t))[1]
    assert np.all(np.abs(wide(w)) <= t)


@every_dtype
@every_step
@settings(max_examples=20)
@given(data=st.data())
def test_no_finite_weight_and_update_leave_the_box_whatever_their_size(dtype, step, data):
    w, u = data.draw(entries_of(dtype)), data.draw(entries_of(dtype))
    _, after = step(jnp.asarray(w), jnp.asarray(u), jnp.float32(0.1))
    assert np.all(np.abs(wide(after)) <= float(np.float32(0.1)))


@every_dtype
@every_step
def test_inside_the_box_the_step_is_the_one_that_was_asked_for(dtype, step):
    rng = np.random.default_rng(3)
    w, u = (0.1 * rng.normal(size=256)).astype(dtype), (0.01 * rng.normal(size=256)).astype(dtype)
    _, after = step(jnp.asarray(w), jnp.asarray(u), jnp.float32(100.0))
    expected = (w.astype(np.float32) + u.astype(np.float32)).astype(dtype)
    spacing = np.abs(np.spacing(wide(expected).astype(np.float32))) * 2.0 ** (
        23 - ml_dtypes.finfo(dtype).nmant
    )
    assert np.all(np.abs(wide(after) - wide(expected)) <= spacing)


@every_dtype
def test_weights_driven_to_the_bound_end_within_an_ulp_of_it(dtype):
    w = (np.random.default_rng(4).uniform(-0.3, 0.3, 256)).astype(dtype)
    _, after = STEPS["jit"](jnp.asarray(w), jnp.ones(256, dtype), jnp.float32(0.3))
    bound = inwards(0.0, float(np.float32(0.3)), dtype)[1]
    assert np.all(wide(after) >= bound * (1 - 2 * float(ml_dtypes.finfo(dtype).eps)))


def test_float64_weights_stay_within_the_threshold_as_given():
    with enable_x64(True):
        tx = project_weights(box(0.1))
        w = jnp.asarray(np.random.default_rng(5).uniform(-0.2, 0.2, 256))
        u = jnp.asarray(np.random.default_rng(6).normal(size=256))
        updates, _ = jax.jit(tx.update)(u, tx.init(w), w)
        assert updates.dtype == jnp.float64
        assert np.all(np.abs(np.asarray(optax.apply_updates(w, updates))) <= 0.1)


@pytest.mark.thorough
@every_step
def test_complex_weights_stay_within_the_modulus(step):
    rng = np.random.default_rng(7)
    w, u = rng.normal(size=(2, 2, 2048)).astype(np.float32)
    w, u = (0.2 * (x[0] + 1j * x[1]) for x in (w, u))
    _, after = step(jnp.asarray(w), jnp.asarray(u), jnp.float32(0.1))
    assert np.all(np.abs(np.asarray(after).astype(np.complex128)) <= float(np.float32(0.1)))


@every_step
@pytest.mark.parametrize("t", [np.nan, -1.0, 0.0, np.inf])
def test_a_traced_nonsense_threshold_never_poisons_the_weights(step, t):
    w, u = jnp.asarray([0.5, -2.0, 0.0]), jnp.asarray([1.0, 1.0, -1.0])
    _, after = step(w, u, jnp.float32(t))
    assert np.all(np.isfinite(after))
    if t <= 0:
        assert np.array_equal(np.abs(after), np.zeros(3))
    if t == np.inf:
        assert np.array_equal(after, w + u)


@pytest.mark.thorough
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_complex_weights_far_outside_end_inside(wrap):
    # The step is as large as the weight, and rounded as coarsely.
    rng = np.random.default_rng(4)
    w = jnp.asarray((rng.normal(size=99) + 1j * rng.normal(size=99)) * 30, jnp.complex64)
    tx = project_weights(box(jnp.float32(1.0)))
    after = wrap(lambda w: optax.apply_updates(w, tx.update(0 * w, tx.init(w), w)[0]))(w)
    modulus = np.abs(np.asarray(after, np.complex128))
    assert np.all(modulus <= 1)
    np.testing.assert_allclose(modulus, 1, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_a_traced_infinite_box_leaves_updates_as_they_are(dtype):
    w = jnp.array([3e38, 0.1, -1e-3]).astype(dtype)
    u = jnp.array([3e38, 1e-9, 0.7]).astype(dtype)
    tx = project_weights(box(jnp.asarray(jnp.inf)))
    updates, _ = tx.update(u, tx.init(w), w)
    np.testing.assert_array_equal(updates, u)
