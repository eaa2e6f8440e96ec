"""The sign step against NumPy, against optax where optax is right, and against bad gradients."""

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

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
REAL = [np.float16, ml_dtypes.bfloat16, np.float32]
every_dtype = pytest.mark.parametrize("dtype", REAL, ids=lambda d: np.dtype(d).name)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
momentum = pytest.mark.parametrize(
    "make", [jaxclip.scale_by_signum, jaxclip.scale_by_lion], ids=["signum", "lion"]
)
TINY = 2.0**-126  # the smallest float32 that XLA on CPU does not flush to zero


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def update_once(tx, grads, params=None):
    return tx.update(grads, tx.init(grads if params is None else params), params)


@jax.jit
def signs_of(g):
    updates, state = update_once(jaxclip.scale_by_sign(), g)
    return updates, state.num_nonfinite


def normal_gradients(num_steps, shapes=((4, 3), (3,)), seed=0):
    rng = np.random.default_rng(seed)
    names = [f"p{i}" for i in range(len(shapes))]
    return [
        {n: rng.normal(size=s).astype(np.float32) for n, s in zip(names, shapes, strict=True)}
        for _ in range(num_steps)
    ]


def run(tx, params, gradients, wrap=jax.jit):
    """Parameters after some steps, and the last state."""
    state, update = tx.init(params), wrap(tx.update)
    for g in gradients:
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def start():
    return {"p0": jnp.full((4, 3), 0.3, jnp.float32), "p1": jnp.full((3,), -0.2, jnp.float32)}


# --- The sign --------------------------------------------------------------------------


@every_dtype
@given(data=st.data())
def test_the_sign_is_that_of_numpy_and_nan_is_zero_and_counted(dtype, data):
    unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
    g = data.draw(hnp.arrays(unsigned, 16)).view(dtype)
    signs, num_nonfinite = signs_of(g)
    assert signs.dtype == dtype
    with np.errstate(invalid="ignore"):
        wide = g.astype(np.float64)
    expected = np.where(np.isnan(wide), 0, np.sign(wide))
    flushed = np.abs(wide) < TINY  # float32 and bfloat16 subnormals: sign 0 on CPU
    assert np.array_equal(np.where(flushed, 0, float64(signs)), np.where(flushed, 0, expected))
    assert np.all(np.isin(float64(signs), [-1, 0, 1]))
    assert int(num_nonfinite) == int(not np.isfinite(wide).all())


@every_dtype
@eager_and_jit
def test_zero_nan_and_infinity_have_the_documented_signs(wrap, dtype):
    g = jnp.asarray([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 3.0, -1e-3], dtype)
    signs, state = wrap(lambda g: update_once(jaxclip.scale_by_sign(), g))(g)
    assert float64(signs).tolist() == [0, 0, 0, 0, 1, -1, 1, -1]
    assert int(state.num_nonfinite) == 1


@eager_and_jit
def test_float16_subnormals_keep_their_sign(wrap):
    g = jnp.asarray([6e-8, -6e-8, 1e-5, -1e-5], jnp.float16)
    signs, _ = wrap(lambda g: update_once(jaxclip.scale_by_sign(), g))(g)
    assert float64(signs).tolist() == [1, -1, 1, -1]


@pytest.mark.thorough
@eager_and_jit
def test_float64_signs_are_right_for_numbers_float32_does_not_have(wrap):
    with enable_x64(True):
        g = jnp.asarray([1e-300, -1e-300, 1e300, -1e300, np.nan], jnp.float64)
        for tx in (jaxclip.scale_by_sign(), jaxclip.scale_by_signum(), jaxclip.scale_by_lion()):
            signs, _ = wrap(lambda g, tx=tx: update_once(tx, g))(g)
            assert signs.dtype == jnp.float64
            assert np.asarray(signs).tolist() == [1, -1, 1, -1, 0]


@given(
    angle=st.floats(0, 2 * np.pi),
    # Not lower: the small component of a flat angle may be flushed, 2**-126 at most.
    power=st.sampled_from([-100, -60, -1, 0, 3, 64, 100, 126]),
)
def test_the_sign_of_a_complex_number_is_its_direction(angle, power):
    z = np.complex64(1.5 * np.exp(1j * angle)) * np.float32(2.0**power)
    got = complex(signs_of(np.full(4, z))[0][0])
    z = complex(z)
    scale = 2.0**-power
    expected = (z * scale) / abs(z * scale)
    assert abs(got - expected) < 1e-6


def test_complex_zero_nan_and_infinity_have_sign_zero():
    z = np.array([0, complex(np.nan, 1), complex(1, np.nan), complex(np.inf, 1)], np.complex64)
    signs, num_nonfinite = signs_of(z)
    assert np.array_equal(signs, np.zeros(4))
    assert int(num_nonfinite) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("tx", [jaxclip.scale_by_signum(), jaxclip.scale_by_lion()])
def test_momentum_of_complex_gradients_points_along_them(tx):
    z = jnp.asarray([3 + 4j, -1e20 + 0j, 1e-20j], jnp.complex64)
    signs, state = update_once(tx, z)
    np.testing.assert_allclose(signs, [0.6 + 0.8j, -1, 1j], rtol=1e-6)
    assert state.mu.dtype == jnp.complex64


@pytest.mark.parametrize("name", ["scale_by_sign", "scale_by_lion"])
def test_directions_are_those_of_optax(name):
    ours, theirs = getattr(jaxclip, name)(), getattr(optax, name)()
    state, expected_state = ours.init(start()), theirs.init(start())
    for g in normal_gradients(6):
        updates, state = ours.update(g, state)
        expected, expected_state = theirs.update(g, expected_state)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


# --- Momentum --------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_signum_is_the_sign_of_the_average_as_numpy_has_it(beta, nesterov):
    tx = jaxclip.scale_by_signum(beta, nesterov=nesterov)
    gradients = [g["p0"] for g in normal_gradients(6)]
    state, m = tx.init(jnp.zeros((4, 3))), np.zeros((4, 3))
    for g in gradients:
        signs, state = tx.update(jnp.asarray(g), state)
        m = beta * m + (1 - beta) * g
        direction = beta * m + (1 - beta) * g if nesterov else m
        np.testing.assert_allclose(state.mu, m, rtol=1e-5, atol=1e-6)
        clear = (np.abs(direction) > 1e-5) | (beta == 1)
        assert np.array_equal(np.asarray(signs)[clear], np.sign(direction)[clear])


def test_nesterov_looks_one_step_ahead_by_hand():
    # m: 4, then 0.5*4 + 0.5*(-6) = -1 against a look-ahead of 0.5*(-1) + 0.5*(-6) = -3.5;
    # with g = 3 the momentum is 1 below zero yet the look-ahead is above it.
    plain, ahead = (jaxclip.scale_by_signum(0.5, nesterov=n) for n in (False, True))
    gradients = [jnp.asarray([-8.0]), jnp.asarray([3.0])]  # m = -4, then -0.5; ahead: 1.25
    signs = []
    for tx in (plain, ahead):
        state = tx.init(gradients[0])
        for g in gradients:
            update, state = tx.update(g, state)
        assert float(state.mu[0]) == -0.5
        signs.append(float(update[0]))
    assert signs == [-1, 1]


@momentum
@every_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@eager_and_jit
def test_a_bad_entry_leaves_its_momentum_as_it_was_and_the_others_as_without_it(
    wrap, make, dtype, bad
):
    tx = make()
    update = wrap(tx.update)
    good = jnp.asarray([1.0, -2.0, 0.5, 3.0], dtype)
    _, state = update(good, tx.init(good))
    _, expected = update(-good, state)
    updates, after = update((-good).at[2].set(jnp.asarray(bad, dtype)), state)
    assert np.asarray(after.mu[2]).tobytes() == np.asarray(state.mu[2]).tobytes()
    others = np.array([0, 1, 3])
    assert float64(after.mu)[others].tolist() == float64(expected.mu)[others].tolist()
    assert np.isfinite(float64(after.mu)).all()
    assert np.isin(float64(updates), [-1, 0, 1]).all()
    assert float(updates[2]) == (0 if np.isnan(bad) else np.sign(bad))
    assert int(after.num_nonfinite) == 1
    assert int(update(good, after)[1].num_nonfinite) == 1


@momentum
@given(data=st.data())
def test_momentum_is_finite_whatever_the_gradients_are(make, data):
    tx = make(mu_dtype=jnp.bfloat16) if make is jaxclip.scale_by_lion else make()
    state, update = tx.init(jnp.zeros(8)), jitted_update(make)
    for _ in range(3):
        g = data.draw(hnp.arrays(np.uint32, 8)).view(np.float32)
        updates, state = update(g, state)
        assert np.isfinite(float64(state.mu)).all()
        assert np.isin(float64(updates), [-1, 0, 1]).all()


_jitted = {}


def jitted_update(make):
    if make not in _jitted:
        tx = make(mu_dtype=jnp.bfloat16) if make is jaxclip.scale_by_lion else make()
        _jitted[make] = jax.jit(tx.update)
    return _jitted[make]


@momentum
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mu_dtype", [None, jnp.float32, jnp.bfloat16, "bfloat16"])
def test_momentum_has_the_dtype_asked_for_and_updates_that_of_the_gradient(make, dtype, mu_dtype):
    tx = make(0.9, mu_dtype) if make is jaxclip.scale_by_signum else make(0.9, 0.99, mu_dtype)
    g = jnp.asarray([1.0, -2.0, 0.0], dtype)
    state = tx.init(g)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(g, state)
        assert updates.dtype == dtype
        assert state.mu.dtype == jnp.dtype(dtype if mu_dtype is None else mu_dtype)
    decay = 0.9 if make is jaxclip.scale_by_signum else 0.99
    np.testing.assert_allclose(float64(state.mu), float64(g) * (1 - decay**2), rtol=2e-2)


@momentum
def test_a_traced_decay_rate_that_is_nan_leaves_the_momentum_alone(make):
    g = jnp.array([1.0, -1.0])
    _, state = update_once(make(), g)

    @jax.jit
    def step(rate):
        tx = make(rate) if make is jaxclip.scale_by_signum else make(rate, rate)
        return tx.update(g, state)

    updates, after = step(jnp.float32(jnp.nan))
    assert np.array_equal(after.mu, state.mu)
    assert np.isfinite(np.asarray(updates)).all()


# --- What raises -----------------------------------------------------------------------


@momentum
@pytest.mark.parametrize(
    ("grads", "path"),
    [
        ({"a": {"w": jnp.ones(2)}, "c": jnp.ones(3)}, "b"),
        ({"a": {"v": jnp.ones(2)}, "b": jnp.ones(3)}, "a/w"),
        ({"a": {"w": jnp.ones(2)}}, "b"),
        ({"a": {"w": jnp.ones(4)}, "b": jnp.ones(3)}, "a/w"),
    ],
)
def test_gradients_that_do_not_match_the_parameters_raise_naming_the_path(make, grads, path):
    params = {"a": {"w": jnp.ones(2)}, "b": jnp.ones(3)}
    tx = make()
    with pytest.raises(ValueError, match=f"'{path}'"):
        tx.update(grads, tx.init(params))


@pytest.mark.parametrize(
    ("bad", "error"),
    [(-0.1, ValueError), (1.5, ValueError), (np.nan, ValueError), (None, TypeError)],
)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (jaxclip.scale_by_signum, "beta"),
        (jaxclip.scale_by_lion, "b1"),
        (jaxclip.scale_by_lion, "b2"),
        (lambda **k: jaxclip.signum(0.1, **k), "beta"),
        (lambda **k: jaxclip.lion(0.1, **k), "b1"),
        (lambda **k: jaxclip.lion(0.1, **k), "b2"),
    ],
)
def test_a_decay_rate_outside_zero_to_one_raises(make, name, bad, error):
    with pytest.raises(error, match=name):
        make(**{name: bad})
