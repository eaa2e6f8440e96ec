"""Sign optimizers: the step itself, against optax, decay, and steps relative to the box."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_directions import (
    eager_and_jit,
    enable_x64,
    every_dtype,
    float64,
    normal_gradients,
    run,
    start,
    update_once,
)

import jaxclip

# --- sign_sgd --------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(
    "alpha", [0.25, 0.1, 0.0, *(pytest.param(a, marks=pytest.mark.thorough) for a in (1e-3, -0.5))]
)
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
        for number in (bad, np.float32(bad)):  # a schedule of Python
            step = wrap(lambda w, n=number: update_once(make(lambda step: n), w, w)[0])
            assert np.array_equal(step(w), np.zeros(3))


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
def test_a_relative_step_is_a_fraction_of_each_leafs_box(make, relative_to, kernel, bias, out):
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


@pytest.mark.thorough
@every_dtype
def test_a_relative_step_keeps_the_dtype(dtype):
    w = jnp.ones((8, 2), dtype)
    for rate in (0.25, jnp.float32(0.25)):
        updates, _ = update_once(jaxclip.sign_sgd(rate, relative_to=jaxclip.fan_in(1.0)), w, w)
        assert updates.dtype == dtype
        assert np.all(float64(updates) == -0.125)


# --- What raises -----------------------------------------------------------------------


def test_a_relative_step_names_the_leaf_whose_shape_is_not_that_of_its_weights():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = jaxclip.sign_sgd(0.1, relative_to=jaxclip.thresholds.max_abs())
    for wrong in ({"a": jnp.ones(3), "b": jnp.ones(1)}, {"a": jnp.ones(3), "b": jnp.ones(())}):
        with pytest.raises(ValueError, match="at 'b' updates has"):
            tx.update(wrong, tx.init(params), params)


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


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_a_step_beyond_the_dtype_is_its_largest_number(dtype):
    g = jnp.array([1.0, -1.0, 0.0]).astype(dtype)
    tx = jaxclip.lion(jnp.float32(3e38), weight_decay=100.0)
    updates, _ = tx.update(g, tx.init(g), g)
    assert np.all(np.isfinite(updates))
    np.testing.assert_array_equal(np.sign(np.real(updates)), [-1, 1, 0])
