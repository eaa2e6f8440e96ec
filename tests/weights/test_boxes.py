"""Boxes: bounds of each entry, held as given in every dtype."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxclip
from jaxclip.weights.boxes import Box, box, nonnegative
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


def test_it_agrees_with_the_box_and_the_l_infinity_ball_of_optax():
    w = jnp.asarray(np.random.default_rng(0).normal(size=64), jnp.float32)
    peers = optax.projections
    assert np.array_equal(box(-0.25, 0.5)(w), peers.projection_box(w, -0.25, 0.5))
    assert np.array_equal(box(0.5)(w), peers.projection_linf_ball(w, 0.5))
    assert np.array_equal(box(0.0, 1.0)(w), peers.projection_hypercube(w))
    # Where that is not right: in half precision its bound is rounded to nearest, outwards.
    half = jnp.ones(1, jnp.bfloat16)
    assert float(peers.projection_box(half, -0.1, 0.1)[0]) > 0.1 >= float(box(-0.1, 0.1)(half)[0])


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
        ({}, None),
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
    with pytest.raises(TypeError, match="side"):
        Box().side("", jnp.ones(1), jnp.ones(1), 0)


def test_weak_types_are_kept_and_other_arrays_returned():
    for projection in (box(0.1), box(0.0, 0.1), nonnegative()):
        assert projection(jnp.asarray(2.0)).weak_type
        assert projection(jnp.arange(3, dtype=jnp.int32)).dtype == jnp.int32
