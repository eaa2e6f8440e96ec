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


@pytest.mark.parametrize("tx", [jaxclip.scale_by_signum(), jaxclip.scale_by_lion()])
def test_momentum_of_complex_gradients_points_along_them(tx):
    z = jnp.asarray([3 + 4j, -1e20 + 0j, 1e-20j], jnp.complex64)
    signs, state = update_once(tx, z)
    np.testing.assert_allclose(signs, [0.6 + 0.8j, -1, 1j], rtol=1e-6)
    assert state.mu.dtype == jnp.complex64


# --- sign_sgd --------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("alpha", [0.25, 0.1, 1e-3, 0.0, -0.5])
@pytest.mark.parametrize("kind", ["number", "array", "schedule"])
def test_sign_sgd_is_exactly_the_weight_minus_alpha_times_the_sign(dtype, alpha, kind):
    rng = np.random.default_rng(0)
    w = rng.normal(size=64).astype(dtype)
    g = rng.normal(size=64).astype(dtype)
    g[:2] = 0
    given_alpha = {
        "number": alpha,
        "array": jnp.float32(alpha),
        "schedule": lambda step: jnp.float32(alpha),
    }[kind]
    after, _ = run(jaxclip.sign_sgd(given_alpha), jnp.asarray(w), [g])
    rounded = np.asarray(alpha, dtype)
    expected = w - rounded * np.sign(g.astype(np.float32)).astype(dtype)
    assert after.dtype == dtype
    assert np.array_equal(float64(after), float64(expected))


def test_sign_sgd_is_exact_in_float64():
    with enable_x64(True):
        w, g = np.linspace(-1, 1, 7), np.linspace(3, -2, 7)
        after, _ = run(jaxclip.sign_sgd(0.1), jnp.asarray(w), [g])
        assert np.array_equal(np.asarray(after), w - 0.1 * np.sign(g))


@pytest.mark.parametrize(
    "make", [jaxclip.sign_sgd, jaxclip.signum, lambda r: jaxclip.lion(r, weight_decay=0.0)]
)
@eager_and_jit
def test_a_traced_learning_rate_that_is_not_finite_takes_no_step(wrap, make):
    w = jnp.array([0.5, -0.25, 0.0])
    for bad in (np.nan, np.inf, -np.inf):
        step = wrap(lambda rate: update_once(make(rate), w, w)[0])
        assert np.array_equal(step(jnp.float32(bad)), np.zeros(3))
        scheduled = wrap(lambda r: update_once(make(lambda step: r), w, w)[0])
        assert np.array_equal(scheduled(jnp.float32(bad)), np.zeros(3))


@pytest.mark.parametrize("make", [jaxclip.sign_sgd, jaxclip.signum, jaxclip.lion])
@eager_and_jit
def test_a_learning_rate_schedule_counts_from_zero(wrap, make):
    def schedule(step):
        return jnp.asarray([0.5, 0.25, 0.125], jnp.float32)[step]

    extra = {"weight_decay": 0.0} if make is jaxclip.lion else {}
    params, gradients = jnp.zeros(2, jnp.float32), [np.ones(2, np.float32)] * 3
    params, _ = run(make(schedule, **extra), params, gradients, wrap)
    assert np.array_equal(params, np.full(2, -0.875))


# --- Against optax ---------------------------------------------------------------------

schedules = pytest.mark.parametrize(
    "rate", [0.01, optax.linear_schedule(0.02, 0.001, 6)], ids=["constant", "linear"]
)


def assert_params_close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected
    )


def start():
    return {"p0": jnp.full((4, 3), 0.3, jnp.float32), "p1": jnp.full((3,), -0.2, jnp.float32)}


@schedules
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("mask", [None, {"p0": True, "p1": False}])
def test_lion_is_optax_lion_over_several_steps(rate, decay, mask):
    gradients = normal_gradients(8)
    arguments = (rate, 0.8, 0.95, None, decay, mask)
    ours, state = run(jaxclip.lion(*arguments), start(), gradients)
    theirs, expected = run(optax.lion(*arguments), start(), gradients)
    assert_params_close(ours, theirs)
    assert_params_close(state[0].mu, expected[0].mu)


def test_lion_decays_by_default_as_optax_does():
    gradients = normal_gradients(4)
    ours, theirs = (run(make(0.1), start(), gradients)[0] for make in (jaxclip.lion, optax.lion))
    assert_params_close(ours, theirs)


@schedules
def test_signum_is_optax_signum_over_several_steps(rate):
    if not hasattr(optax, "signum"):
        pytest.skip("this optax has no signum")
    gradients = normal_gradients(8)
    ours, _ = run(jaxclip.signum(rate, 0.7), start(), gradients)
    theirs, _ = run(optax.signum(rate, 0.7), start(), gradients)
    assert_params_close(ours, theirs)


@schedules
def test_sign_sgd_is_optax_sign_sgd_over_several_steps(rate):
    gradients = normal_gradients(8)
    ours, _ = run(jaxclip.sign_sgd(rate), start(), gradients)
    theirs, _ = run(optax.sign_sgd(rate), start(), gradients)
    assert_params_close(ours, theirs)


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


# --- Decay, and steps relative to the box ----------------------------------------------


@pytest.mark.parametrize(
    "mask", [lambda p: jax.tree.map(lambda x: x.ndim > 1, p), {"p0": True, "p1": False}]
)
@pytest.mark.parametrize("make", [jaxclip.signum, jaxclip.lion])
def test_decay_acts_on_masked_leaves_only_and_as_numpy_has_it(make, mask):
    params, g = start(), jax.tree.map(jnp.ones_like, start())
    tx = make(0.5, weight_decay=0.1, mask=mask)
    after, _ = run(tx, params, [g])
    np.testing.assert_allclose(after["p0"], 0.3 - 0.5 * (1 + 0.1 * 0.3), rtol=1e-6)
    np.testing.assert_allclose(after["p1"], -0.2 - 0.5, rtol=1e-6)


@every_dtype
def test_a_traced_decay_keeps_the_dtype(dtype):
    w = jnp.asarray([0.5, -0.25], dtype)
    updates = jax.jit(lambda d: update_once(jaxclip.lion(1.0, weight_decay=d), w, w)[0])(0.5)
    assert updates.dtype == dtype
    np.testing.assert_allclose(float64(updates), [-1.25, 1.125], rtol=1e-2)


@pytest.mark.parametrize("make", [jaxclip.signum, jaxclip.lion])
def test_a_traced_decay_that_is_not_finite_poisons_no_parameter(make):
    w = jnp.array([0.5, -0.25])

    @jax.jit
    def step(decay):
        return update_once(make(0.1, weight_decay=decay), w, w)[0]

    for bad in (np.nan, np.inf):
        assert np.isfinite(np.asarray(step(jnp.float32(bad)))).all()


BOX = {"dense": {"kernel": jnp.zeros((8, 2)), "bias": jnp.zeros(2)}, "out": jnp.zeros(3)}


@pytest.mark.parametrize(
    ("relative_to", "kernel", "bias", "out"),
    [
        (0.5, 0.5, 0.5, 0.5),
        (jaxclip.fan_in(1.0), 0.5, 1, 1),  # sqrt(2 / 8); the others have no box
        ({"dense": 0.25, "out": float("inf")}, 0.25, 0.25, 1),
        ({"dense": jaxclip.fan_in(2.0), "out": 0.125}, 1, 1, 0.125),
        (lambda step: 0.5 / (1 + step.astype(jnp.float32)), 0.5, 0.5, 0.5),
        (0.0, 0, 0, 0),
        (jnp.float32(0.5), 0.5, 0.5, 0.5),
        (jnp.float32(-1), 0, 0, 0),
    ],
)
@pytest.mark.parametrize("make", [jaxclip.sign_sgd, jaxclip.signum, jaxclip.lion])
def test_a_relative_step_is_a_share_of_each_leafs_box(make, relative_to, kernel, bias, out):
    tx = make(0.25, relative_to=relative_to)
    g = jax.tree.map(lambda p: jnp.full_like(p, -3.0), BOX)
    after, _ = run(tx, BOX, [g])
    assert np.all(np.asarray(after["dense"]["kernel"]) == 0.25 * kernel)
    assert np.all(np.asarray(after["dense"]["bias"]) == 0.25 * bias)
    assert np.all(np.asarray(after["out"]) == 0.25 * out)


def test_a_schedule_of_the_box_counts_the_same_steps_as_the_learning_rate():
    tx = jaxclip.sign_sgd(0.5, relative_to=lambda step: 2.0 ** -step.astype(jnp.float32))
    after, _ = run(tx, jnp.zeros(2, jnp.float32), [-np.ones(2, np.float32)] * 3)
    assert np.array_equal(after, np.full(2, 0.5 + 0.25 + 0.125))


@pytest.mark.parametrize("rate", [1, np.int32(1), jnp.int32(1)])
def test_an_integer_learning_rate_does_not_round_the_box_down(rate):
    params, gradients = jnp.zeros(2, jnp.float32), [np.ones(2, np.float32)]
    after, _ = run(jaxclip.sign_sgd(rate, relative_to=0.5), params, gradients)
    assert np.array_equal(after, np.full(2, -0.5))


@pytest.mark.parametrize("kind", ["array", "schedule"])
def test_a_box_that_is_nan_takes_no_step(kind):
    w = jnp.array([0.5, -0.25])

    @jax.jit
    def step(t):
        relative_to = t if kind == "array" else lambda step: t
        return update_once(jaxclip.sign_sgd(0.1, relative_to=relative_to), w, w)[0]

    assert np.array_equal(step(jnp.float32(jnp.nan)), np.zeros(2))


@every_dtype
def test_a_relative_step_keeps_the_dtype(dtype):
    w = jnp.ones((8, 2), dtype)
    for rate in (0.25, jnp.float32(0.25)):
        updates, _ = update_once(jaxclip.sign_sgd(rate, relative_to=jaxclip.fan_in(1.0)), w, w)
        assert updates.dtype == dtype
        assert np.all(float64(updates) == -0.125)


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


def test_decay_names_the_path_at_which_gradients_and_parameters_differ():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    tx = jaxclip.signum(0.1, weight_decay=0.1)
    state = tx.init(params)
    with pytest.raises(ValueError, match="'c'"):
        tx.update(params, state, {"a": jnp.ones(2), "c": jnp.ones(3)})


@pytest.mark.parametrize(
    "tx", [jaxclip.lion(0.1), jaxclip.sign_sgd(0.1, relative_to=0.5)], ids=["decay", "relative"]
)
def test_an_update_that_needs_the_parameters_says_so(tx):
    g = jnp.ones(2)
    with pytest.raises(ValueError, match="params"):
        tx.update(g, tx.init(g))


RATES = [jaxclip.sign_sgd, jaxclip.signum, jaxclip.lion]


@pytest.mark.parametrize("make", RATES)
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (np.nan, ValueError),
        (np.inf, ValueError),
        (-np.inf, ValueError),
        ("0.1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (1j, TypeError),
        (np.ones(2), ValueError),
        (jnp.ones(2), ValueError),
    ],
    ids=lambda x: repr(x)[:12],
)
def test_a_bad_learning_rate_raises(make, bad, error):
    with pytest.raises(error, match="learning_rate"):
        make(bad)


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


@pytest.mark.parametrize(
    ("bad", "error"),
    [(-0.1, ValueError), (np.nan, ValueError), (np.inf, ValueError), ("1", TypeError)],
)
@pytest.mark.parametrize("make", [jaxclip.signum, jaxclip.lion])
def test_a_bad_weight_decay_raises(make, bad, error):
    with pytest.raises(error, match="weight_decay"):
        make(0.1, weight_decay=bad)


@pytest.mark.parametrize("make", RATES)
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (-1.0, ValueError),
        (np.nan, ValueError),
        ("fan_in", TypeError),
        (True, TypeError),
        ({"w": -1.0}, ValueError),
        (jaxclip.fan_in, TypeError),
    ],
)
def test_a_bad_box_raises_in_the_factory_naming_the_argument(make, bad, error):
    with pytest.raises(error, match="relative_to"):
        make(0.1, relative_to=bad)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_a_step_beyond_the_dtype_is_its_largest_number(dtype):
    g = jnp.array([1.0, -1.0, 0.0]).astype(dtype)
    tx = jaxclip.lion(jnp.float32(3e38), weight_decay=100.0)
    updates, _ = tx.update(g, tx.init(g), g)
    assert np.all(np.isfinite(updates))
    np.testing.assert_array_equal(np.sign(np.real(updates)), [-1, 1, 0])
