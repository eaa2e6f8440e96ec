"""The train step: one program, exact box, and a bad step that changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxclip
from jaxclip.thresholds import percentile_abs
from jaxclip.training.info import StepInfo
from jaxclip.training.step import TrainState, make_train_step
from oracles.given_gradients import given_loss
from oracles.quick import quick_first


def linear_loss(params, batch):
    x, y = batch
    prediction = x @ params["kernel"] + params["bias"][None]
    return jnp.mean((prediction - y) ** 2)


def make_params(dtype=jnp.float32):
    kernel = 0.1 * jax.random.normal(jax.random.key(1), (8, 2))
    return {"kernel": kernel.astype(dtype), "bias": jnp.zeros(2, dtype)}


def make_batch(seed=0, dtype=jnp.float32):
    k = jax.random.split(jax.random.key(seed), 2)
    x, y = jax.random.normal(k[0], (16, 8)), jax.random.normal(k[1], (16, 2))
    return x.astype(dtype), y.astype(dtype)


def make_optimizer():
    return optax.chain(jaxclip.clip_by_global_norm(0.5), jaxclip.lion(0.02))


def bits(tree):
    def of(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes()

    return [of(x) for x in jax.tree.leaves(tree)]


def float64(x):
    return np.asarray(x).astype(np.float64)


def run(step, state, num_steps=5, start=0):
    infos = []
    for i in range(start, start + num_steps):
        state, info = step(state, make_batch(i))
        infos.append(info)
    return state, infos


# --- The step --------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("threshold", quick_first([0.15, None]))
def test_eager_jit_and_scan_agree(threshold):
    tx = make_optimizer()
    step = make_train_step(linear_loss, tx, weight_threshold=threshold)
    start = functools.partial(TrainState.create, make_params(), tx)
    jitted, infos = run(step, start())
    eager, eager_infos = run(step.__wrapped__, start())
    batches = jax.tree.map(lambda *x: jnp.stack(x), *[make_batch(i) for i in range(5)])
    scanned, scanned_infos = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(start(), batches)
    for other in (eager, scanned):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), other, jitted
        )
    for i, info in enumerate(infos):
        assert isinstance(info, StepInfo)
        np.testing.assert_allclose(info.loss, eager_infos[i].loss, rtol=1e-5)
        np.testing.assert_allclose(info.loss, scanned_infos.loss[i], rtol=1e-5)
    assert int(jitted.step) == 5


@pytest.mark.thorough
def test_a_weakly_typed_parameter_compiles_once_and_can_be_scanned():
    params, traces = {"scale": jnp.asarray(0.5)}, []

    def loss(params, batch):
        traces.append(1)
        return (params["scale"] - jnp.mean(batch)) ** 2

    tx = make_optimizer()
    step = make_train_step(loss, tx)
    state = TrainState.create(params, tx)
    jax.lax.scan(step, state, jnp.ones((3, 2)))
    traces.clear()
    for _ in range(3):
        state, _ = step(state, jnp.ones(2))
    assert len(traces) == 1


def test_the_step_is_sign_sgd_by_hand_with_an_exact_box():
    def loss(w, target):
        return jnp.sum((w - target) ** 2)

    tx = jaxclip.sign_sgd(0.25)
    step = make_train_step(loss, tx, weight_threshold=0.625, telemetry_every=1)
    state, target = TrainState.create(jnp.zeros(3), tx), jnp.array([2.0, -0.3, 0.0])
    expected = [[0.25, -0.25, 0], [0.5, -0.5, 0], [0.625, -0.25, 0], [0.625, -0.5, 0]]
    losses = [4.09, 3.065, 2.29, 1.893125]
    rates = [0, 0, 1 / 3, 1 / 3]
    for row, value, rate in zip(expected, losses, rates, strict=True):
        state, info = step(state, target)
        assert np.array_equal(state.params, np.float32(row))
        np.testing.assert_allclose(info.loss, value, rtol=1e-6)
        np.testing.assert_allclose(info.weight_clip_rate, rate, rtol=1e-6)


@pytest.mark.thorough
def test_a_hundred_steps_with_schedules_compile_once():
    traces = []

    def loss(params, batch):
        traces.append(1)
        return linear_loss(params, batch)

    tx = optax.chain(
        jaxclip.clip_by_global_norm(lambda step: 1 / (1 + step.astype(jnp.float32))),
        jaxclip.lion(lambda step: 0.1 * 0.9 ** step.astype(jnp.float32)),
    )
    box = jaxclip.fan_in(lambda step: 1 / (1 + 0.1 * step.astype(jnp.float32)))
    step = make_train_step(loss, tx, weight_threshold=box)
    run(step, TrainState.create(make_params(), tx), 100)
    assert len(traces) == 1


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bits():
    def once():
        tx = make_optimizer()
        step = make_train_step(noisy_loss, tx, weight_threshold=0.2)
        return run(step, TrainState.create(make_params(), tx, key=jax.random.key(7)))

    first, second = once(), once()
    assert bits(first) == bits(second)


@pytest.mark.thorough
def test_jit_of_vmap_over_many_states_equals_one_at_a_time():
    tx = make_optimizer()
    step = make_train_step(linear_loss, tx, weight_threshold=0.2)
    sizes = (1.0, 2.0)
    many = [TrainState.create(jax.tree.map(lambda p: p * s, make_params()), tx) for s in sizes]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)
    got, info = jax.jit(jax.vmap(step, in_axes=(0, None)))(stacked, make_batch())
    for i, state in enumerate(many):
        expected, expected_info = step(state, make_batch())
        for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[i], e, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(info.loss[i], expected_info.loss, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=lambda f: f.__name__)
def test_a_step_can_be_transformed_over_a_step_size_in_its_closure(transform):
    def final_loss(rate):
        tx = optax.sgd(rate)
        step = make_train_step(linear_loss, tx)
        if transform is not jax.jit:  # which alone shows in what the step can see
            step = step.__wrapped__
        state, _ = step(TrainState.create(make_params(), tx), make_batch())
        return linear_loss(state.params, make_batch())

    rates = jnp.asarray([0.1, 0.2], jnp.float32) if transform is jax.vmap else 0.1
    assert np.isfinite(np.asarray(transform(final_loss)(rates))).all()


@pytest.mark.thorough
def test_a_batch_of_steps_can_be_lowered_and_a_traced_batch_is_enough():
    step = make_train_step(linear_loss, make_optimizer())
    state = TrainState.create(make_params(), make_optimizer())
    batches = jax.tree.map(lambda *x: jnp.stack(x), make_batch(0), make_batch(1))
    both = jax.jit(jax.vmap(step, in_axes=(None, 0))).lower(state, batches).compile()
    losses = both(state, batches)[1].loss
    one = jax.jit(lambda batch: step(state, batch)[1].loss)(make_batch(1))
    assert losses.shape == (2,)
    np.testing.assert_allclose(losses[1], one, rtol=1e-6)


def test_the_step_can_be_lowered():
    tx = make_optimizer()
    step = make_train_step(linear_loss, tx)
    lowered = step.lower(TrainState.create(make_params(), tx), make_batch())
    assert "stablehlo" in lowered.as_text() or "mhlo" in lowered.as_text()
    lowered.compile()


# --- Losses ----------------------------------------------------------------------------


def noisy_loss(params, batch, key):
    x, y = batch
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    return linear_loss(params, (jnp.where(keep, x, jnp.zeros_like(x)), y))


@pytest.mark.thorough
def test_what_the_loss_returns_beside_it_is_in_the_info():
    def loss(params, batch):
        value = linear_loss(params, batch)
        return value, {"double": 2 * value}

    tx = make_optimizer()
    step = make_train_step(loss, tx, has_aux=True)
    _, info = step(TrainState.create(make_params(), tx), make_batch())
    np.testing.assert_allclose(info.aux["double"], 2 * info.loss, rtol=1e-6)
    step = make_train_step(linear_loss, tx)
    assert step(TrainState.create(make_params(), tx), make_batch())[1].aux is None


def keyword_only(params, batch, *, key):
    return noisy_loss(params, batch, key)


def third_parameter(params, batch, noise):
    return noisy_loss(params, batch, noise)


@pytest.mark.parametrize("loss", [noisy_loss, keyword_only, third_parameter, jax.jit(noisy_loss)])
def test_a_loss_that_takes_a_key_gets_a_fresh_one_each_step(loss):
    tx = optax.sgd(0.0)
    step = make_train_step(loss, tx)
    state = TrainState.create(make_params(), tx, key=jax.random.key(0))
    losses, keys = set(), set()
    for _ in range(4):
        state, info = step(state, make_batch())
        losses.add(float(info.loss))
        keys.add(tuple(np.asarray(jax.random.key_data(state.key)).tolist()))
    assert len(losses) == len(keys) == 4


@pytest.mark.thorough
def test_a_loss_with_optional_arguments_gets_no_key():
    def loss(params, batch, scale=1.0):
        return scale * linear_loss(params, batch)

    tx = make_optimizer()
    step = make_train_step(loss, tx)
    state = TrainState.create(make_params(), tx, key=jax.random.key(0))
    before = bits(state.key)
    state, info = step(state, make_batch())
    assert bits(state.key) == before
    np.testing.assert_allclose(info.loss, linear_loss(make_params(), make_batch()), rtol=1e-6)


@pytest.mark.thorough
def test_a_key_that_was_bound_already_is_not_asked_for():
    tx = make_optimizer()
    step = make_train_step(functools.partial(noisy_loss, key=jax.random.key(3)), tx)
    _, info = step(TrainState.create(make_params(), tx), make_batch())
    expected = noisy_loss(make_params(), make_batch(), jax.random.key(3))
    np.testing.assert_allclose(info.loss, expected, rtol=1e-6)


def test_a_loss_that_takes_a_key_without_one_raises_with_advice():
    tx = make_optimizer()
    step = make_train_step(noisy_loss, tx)
    with pytest.raises(ValueError, match="key"):
        step(TrainState.create(make_params(), tx), make_batch())


@pytest.mark.thorough
def test_legacy_keys_work():
    tx = make_optimizer()
    step = make_train_step(noisy_loss, tx)
    state = TrainState.create(make_params(), tx, key=jax.random.PRNGKey(0))
    state, info = step(state, make_batch())
    assert np.isfinite(float(info.loss))


# --- The box ---------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", quick_first([jnp.bfloat16, jnp.float32, jnp.float16]))
@pytest.mark.parametrize("threshold", [0.1, jnp.float32(0.1)], ids=["number", "array"])
def test_weights_are_in_the_box_after_every_step_eager_and_jit(dtype, threshold):
    tx = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(0.03))
    step = make_train_step(linear_loss, tx, weight_threshold=threshold, telemetry_every=1)
    for run_step in (step, step.__wrapped__):
        state = TrainState.create(make_params(dtype), tx)
        for i in range(5):
            state, info = run_step(state, make_batch(i, dtype))
            for w in jax.tree.leaves(state.params):
                assert w.dtype == dtype
                assert np.abs(float64(w)).max() <= np.float64(np.float32(0.1))
        assert float(info.weight_clip_rate) > 0


def halving_box(step):
    return jnp.asarray([0.5, 0.25, 0.125])[jnp.minimum(step, 2)]


def clip_rate_of(params, bounds):
    on = sum(np.sum(np.abs(float64(params[k])) >= t * (1 - 1e-6)) for k, t in bounds.items())
    return on / sum(params[k].size for k in bounds)


@pytest.mark.parametrize(
    ("threshold", "mask", "boxed"),
    [
        (0.12, None, {"kernel": 0.12, "bias": 0.12}),
        (jaxclip.fan_in(0.25), None, {"kernel": 0.125}),
        (0.12, jaxclip.weights.kernels_only, {"kernel": 0.12}),
        (0.12, {"kernel": False, "bias": True}, {"bias": 0.12}),
        ({"kernel": 0.125, "bias": 0.0625}, None, {"kernel": 0.125, "bias": 0.0625}),
        (halving_box, None, {"kernel": 0.125, "bias": 0.125}),
    ],
    ids=["number", "fan_in", "function", "mask", "tree", "schedule"],
)
def test_the_clip_rate_is_the_share_of_boxed_weights_on_the_bound(threshold, mask, boxed):
    # Some entries are pushed outwards without end, the others stay where they are.
    pull = {"kernel": jnp.asarray([[1.0, 0.0], [-1.0, 0.0]] * 4), "bias": jnp.array([-1.0, 0.0])}
    tx = jaxclip.sign_sgd(0.07)

    def loss(params, batch):
        return sum(jnp.vdot(params[k], pull[k]) for k in pull)

    step = make_train_step(loss, tx, weight_threshold=threshold, mask=mask, telemetry_every=1)
    state, infos = run(step, TrainState.create(jax.tree.map(jnp.zeros_like, pull), tx), 4)
    params = jax.device_get(state.params)
    for name, bound in boxed.items():
        largest = np.abs(params[name]).max()
        assert np.nextafter(np.float32(bound), np.float32(0)) <= largest <= bound
    for name in params.keys() - boxed.keys():
        assert np.abs(params[name]).max() > 0.125
    np.testing.assert_allclose(infos[-1].weight_clip_rate, clip_rate_of(params, boxed), rtol=1e-6)
    assert float(infos[-1].weight_clip_rate) == 0.5


@pytest.mark.thorough
def test_the_threshold_of_a_step_is_resolved_once():
    calls = []

    def narrowing(step):
        calls.append(step)
        return 1.0 / (1 + step.astype(jnp.float32))

    a = jnp.zeros(100).at[0].set(1000.0).at[1].set(30.0)
    tx, params = optax.sgd(0.0), {"a": a, "b": jnp.ones(100)}
    step = make_train_step(lambda p, _: jnp.sum(p["a"]), tx, weight_threshold=narrowing)
    jax.eval_shape(step, TrainState.create(params, tx), None)
    assert len(calls) == 1
    # 100 before the clip, which one weight reaches; measured again, 10, which 30 exceeds too.
    rule = jaxclip.thresholds.std_multiple(1.0)
    step = make_train_step(lambda p, _: jnp.sum(p["a"]), tx, weight_threshold={"a": rule, "b": 2.0})
    _, info = step(TrainState.create(params, tx), None)
    np.testing.assert_allclose(info.weight_clip_rate, 1 / 200, rtol=1e-6)


@pytest.mark.thorough
def test_the_clip_rate_of_a_skipped_step_is_that_of_the_weights_it_keeps():
    rule, tx = percentile_abs(90.0), make_optimizer()
    step = make_train_step(linear_loss, tx, weight_threshold=rule, telemetry_every=1)
    state, _ = run(step, TrainState.create(make_params(), tx))
    x, y = make_batch()
    kept = jax.tree.leaves(jax.device_get(state.params))  # the step donates its state
    _, info = step(state, (x.at[0, 0].set(jnp.nan), y))
    num_on_bound = sum(np.sum(np.abs(w) >= np.asarray(rule(jnp.asarray(w)))) for w in kept)
    assert int(info.num_skipped) == 1
    assert float(info.weight_clip_rate) == pytest.approx(num_on_bound / sum(w.size for w in kept))


def test_weights_on_the_bound_are_counted_at_the_first_step_and_every_few_steps():
    starts = jnp.array([0.0, 0.25, 0.5, 0.75])  # one more is on the bound after each step
    loss, tx = (lambda w, _: -jnp.sum(w)), jaxclip.sign_sgd(0.25)
    step = make_train_step(loss, tx, weight_threshold=1.0, telemetry_every=3)
    expected = [0.25, 0.25, 0.75, 0.75, 0.75, 1.0]
    state, rates = TrainState.create(starts, tx), []
    for i in range(6):
        if i == 4:  # as a checkpoint would
            state = jax.tree.map(jnp.asarray, jax.device_get(state))
        state, info = step(state, None)
        rates.append(float(info.weight_clip_rate))
        assert float(state.weight_clip_rate) == rates[-1]
    assert rates == expected
    _, infos = jax.lax.scan(step, TrainState.create(starts, tx), None, length=6)
    assert infos.weight_clip_rate.tolist() == expected
    rows = jax.vmap(lambda w: jax.lax.scan(step, TrainState.create(w, tx), None, length=6)[1])
    both = rows(jnp.stack([starts, jnp.ones(4)])).weight_clip_rate
    assert both.tolist() == [expected, [1.0] * 6]


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None])
def test_steps_between_counts_are_an_integer_of_at_least_one(every):
    with pytest.raises(ValueError, match="telemetry_every must be an integer of at least 1"):
        make_train_step(linear_loss, make_optimizer(), telemetry_every=every)


def test_without_a_box_the_clip_rate_is_zero():
    tx = make_optimizer()
    _, info = make_train_step(linear_loss, tx)(TrainState.create(make_params(), tx), make_batch())
    assert float(info.weight_clip_rate) == 0


def test_weights_that_start_outside_are_brought_in_by_the_first_step():
    tx = jaxclip.sign_sgd(0.01)
    params = jax.tree.map(lambda p: p + 5, make_params())
    step = make_train_step(linear_loss, tx, weight_threshold=0.5)
    state, _ = step(TrainState.create(params, tx), make_batch())
    assert max(np.abs(w).max() for w in jax.tree.leaves(jax.device_get(state.params))) == 0.5


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (-1.0, ValueError),
        (np.nan, ValueError),
        ("0.1", TypeError),
        (True, TypeError),
        (1j, TypeError),
    ],
)
def test_a_bad_threshold_raises_when_the_step_is_made(bad, error):
    with pytest.raises(error, match="weight_threshold"):
        make_train_step(linear_loss, make_optimizer(), weight_threshold=bad)


def test_a_mask_without_a_threshold_raises():
    with pytest.raises(ValueError, match="mask"):
        make_train_step(linear_loss, make_optimizer(), mask=jaxclip.weights.kernels_only)


# --- Bad steps -------------------------------------------------------------------------


def sensitive_loss(params, batch):
    """With `batch["trap"]` one entry of one gradient is infinite while the loss is finite."""
    good = jnp.sum((params["w"] - batch["target"]) ** 2) + jnp.sum(params["b"] ** 2)
    # The square root of 0: value 0, slope infinite.
    x = params["b"][0] - jax.lax.stop_gradient(params["b"][0])
    root = jnp.sqrt(jnp.where(batch["trap"], x, jnp.ones_like(x)))
    return good + root + batch["loss"]


BAD_BATCHES = {
    "loss_nan": {"loss": np.nan},
    "loss_inf": {"loss": np.inf},
    "loss_minus_inf": {"loss": -np.inf},
    "one_gradient_entry_inf": {"trap": True},
}


def sensitive_batch(loss=0.0, trap=False, target=1.0):
    return {
        "target": jnp.full(3, target, jnp.float32),
        "loss": jnp.float32(loss),
        "trap": jnp.asarray(trap),
    }


OPTIMIZERS = {
    "lion": lambda: optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(0.1)),
    "adam": lambda: optax.adamw(0.1),
    "accumulating": lambda: optax.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("bad", BAD_BATCHES)
@pytest.mark.parametrize(
    ("optimizer", "eager"),
    [("lion", False), ("adam", False), ("accumulating", False), ("lion", True)],
)
@jax.numpy_dtype_promotion("standard")  # optax's Adam raises a float to an integer power
def test_a_bad_step_changes_no_bit_is_counted_and_training_goes_on(optimizer, bad, eager):
    tx = OPTIMIZERS[optimizer]()
    step = make_train_step(sensitive_loss, tx, weight_threshold=0.9, donate=False)
    step = step.__wrapped__ if eager else step
    params = {"w": jnp.zeros(3, jnp.float32), "b": jnp.full(2, 0.25, jnp.float32)}
    state = TrainState.create(params, tx)
    for _ in range(2):
        state, info = step(state, sensitive_batch())
    assert int(info.num_skipped) == 0
    after, info = step(state, sensitive_batch(**BAD_BATCHES[bad]))
    assert bits((after.params, after.opt_state)) == bits((state.params, state.opt_state))
    assert int(after.num_skipped) == int(info.num_skipped) == 1
    assert int(after.step) == 3
    again, info = step(after, sensitive_batch())
    expected, _ = step(state, sensitive_batch())
    assert bits((again.params, again.opt_state)) == bits((expected.params, expected.opt_state))
    assert int(again.num_skipped) == int(info.num_skipped) == 1
    assert np.isfinite(float(info.loss))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_entry_among_finite_gradients_and_a_finite_loss_skips_the_step(bad):
    @jax.custom_vjp
    def hook(x):
        return jnp.zeros((), jnp.float32)

    hook.defvjp(
        lambda x: (jnp.zeros((), jnp.float32), None),
        lambda _, g: (jnp.asarray([1, bad, 1], jnp.float32),),
    )

    def loss(params, batch):
        return hook(params["w"]) + jnp.sum(params["v"])

    tx = OPTIMIZERS["lion"]()
    state = TrainState.create({"w": jnp.ones(3, jnp.float32), "v": jnp.ones(2, jnp.float32)}, tx)
    step = make_train_step(loss, tx, donate=False)
    after, info = step(state, None)
    assert np.isfinite(float(info.loss))
    assert bits((after.params, after.opt_state)) == bits((state.params, state.opt_state))
    assert int(info.num_skipped) == 1


def test_weights_outside_the_box_stay_there_over_a_bad_step():
    tx = OPTIMIZERS["lion"]()
    params = {"w": jnp.full(3, 7.0, jnp.float32), "b": jnp.ones(2, jnp.float32)}
    state = TrainState.create(params, tx)
    step = make_train_step(sensitive_loss, tx, weight_threshold=0.5, donate=False)
    after, _ = step(state, sensitive_batch(loss=np.nan))
    assert bits(after.params) == bits(state.params)


def test_finite_gradients_whose_squares_overflow_are_no_bad_step():
    tx = OPTIMIZERS["lion"]()
    step = make_train_step(jnp.vdot, tx)
    state, info = step(TrainState.create(jnp.zeros(4), tx), jnp.full(4, 3e38))
    assert int(info.num_skipped) == 0
    np.testing.assert_allclose(state.params, -0.1, rtol=1e-6)


# --- State -----------------------------------------------------------------------------


def test_a_state_saved_as_numpy_continues_bit_for_bit():
    tx = make_optimizer()
    step = make_train_step(noisy_loss, tx, weight_threshold=0.2)
    start = functools.partial(TrainState.create, make_params(), tx)
    whole, _ = run(step, start(key=jax.random.key(3)), 6)
    half, _ = run(step, start(key=jax.random.key(3)), 3)
    saved = jax.tree.map(np.array, half._replace(key=jax.random.key_data(half.key)))
    loaded = jax.tree.map(jnp.asarray, saved)
    loaded = loaded._replace(key=jax.random.wrap_key_data(loaded.key))
    resumed, _ = run(step, loaded, 3, start=3)
    assert bits(resumed) == bits(whole)


def test_a_donated_matrix_is_read_before_it_is_overwritten():
    # XLA on CPU got these very shapes wrong with jax 0.7.2 and 0.8.0.
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(256, 256)) / 16 for _ in range(2)]
    x = rng.normal(size=(128, 256))

    def loss_fn(params, batch):
        return jnp.mean((jax.nn.relu(batch @ params[0]) @ params[1]) ** 2)

    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx)
    state = TrainState.create([jnp.asarray(w, jnp.float32) for w in weights], tx)
    for _ in range(4):
        state, info = step(state, jnp.asarray(x, jnp.float32))
        hidden = np.maximum(x @ weights[0], 0)
        output = hidden @ weights[1]
        np.testing.assert_allclose(info.loss, np.mean(output**2), rtol=1e-5)
        change = 2 * output / output.size
        grads = x.T @ ((change @ weights[1].T) * (hidden > 0)), hidden.T @ change
        weights = [w - 0.1 * g for w, g in zip(weights, grads, strict=True)]


def test_a_numpy_state_continues_as_it_is():
    tx = make_optimizer()
    step = make_train_step(linear_loss, tx)
    whole, _ = run(step, TrainState.create(make_params(), tx), 4)
    half, _ = run(step, TrainState.create(make_params(), tx), 2)
    resumed, _ = run(step, jax.tree.map(np.array, half), 2, start=2)
    assert bits(resumed) == bits(whole)


@pytest.mark.thorough
@pytest.mark.parametrize("donate", [True, False])
def test_the_callers_arrays_stay_usable(donate):
    tx = make_optimizer()
    params, key, batch = make_params(), jax.random.key(0), make_batch()
    before = bits((params, key, batch))
    step = make_train_step(noisy_loss, tx, donate=donate)
    state = TrainState.create(params, tx, key=key)
    for _ in range(2):
        last = state
        state, _ = step(state, batch)
        assert last.params["kernel"].is_deleted() == (donate and jax.__version_info__ >= (0, 9))
    assert bits((params, key, batch)) == before


def test_arrays_that_stand_twice_in_the_parameters_can_be_donated():
    shared = jnp.ones(3)
    tx = make_optimizer()
    step = make_train_step(lambda p, b: jnp.sum(p["a"] * b) + jnp.sum(p["b"] ** 2), tx)
    step(TrainState.create({"a": shared, "b": shared}, tx), jnp.ones(3))
    assert np.array_equal(shared, np.ones(3))


@pytest.mark.parametrize("name", ["dog", "schedule_free_sgd", "prodigy", "dadapt_adamw"])
def test_optimizers_that_keep_the_parameters_in_their_state_can_be_donated(name):
    tx = getattr(optax.contrib, name)(0.1)
    step = make_train_step(linear_loss, tx)
    with jax.numpy_dtype_promotion("standard"):
        state, info = step(TrainState.create(make_params(), tx), make_batch())
        state, info = step(state, make_batch())
    assert np.isfinite(float(info.loss))


@pytest.mark.thorough
def test_the_info_names_the_first_clip_of_the_chain_bare():
    tx = optax.chain(
        jaxclip.clip_by_global_norm(0.5), jaxclip.clip_by_global_norm(0.25), jaxclip.lion(0.01)
    )
    _, info = make_train_step(linear_loss, tx)(TrainState.create(make_params(), tx), make_batch())
    grads = jax.grad(linear_loss)(make_params(), make_batch())
    norm = np.sqrt(sum(np.sum(float64(g) ** 2) for g in jax.tree.leaves(grads)))
    assert norm > 0.5
    expected = {
        "pre_norm": norm,
        "post_norm": 0.5,
        "clip_coef": 0.5 / norm,
        "clip_rate": 1,
        "clip_by_global_norm/pre_norm": norm,
        "clip_by_global_norm_2/pre_norm": 0.5,
        "clip_by_global_norm_2/post_norm": 0.25,
        "scale_by_lion/num_nonfinite": 0,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(float(info.stats[name]), value, rtol=1e-5, err_msg=name)


def test_the_info_shows_each_statistic_once_and_finds_it_by_both_names():
    tx = make_optimizer()
    _, info = make_train_step(linear_loss, tx)(TrainState.create(make_params(), tx), make_batch())
    assert set(info.stats) == set(
        jaxclip.clip_stats(TrainState.create(make_params(), tx).opt_state)
    )
    assert str(info).count("pre_norm") == 1
    assert info.stats["pre_norm"] is info.stats["clip_by_global_norm/pre_norm"]
    assert "clip_rate" in info.stats
    assert info.stats.get("pre_norms", 3) == 3
    with pytest.raises(KeyError, match="pre_norms"):
        info.stats["pre_norms"]
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), info)
    assert stacked.stats["clip_rate"].shape == (2,)


def test_reading_gives_the_numbers_of_the_device_and_stacked_infos_split_by_step():
    def loss(params, batch):
        return linear_loss(params, batch), {"rows": jnp.arange(3), "half": jnp.bfloat16(0.5)}

    tx = make_optimizer()
    step = make_train_step(loss, tx, weight_threshold=0.1, has_aux=True)

    def body(state, batch):
        state, info = step(state, batch)
        assert info.stats["pre_norm"].shape == info.grad_norm.shape == ()
        return state, info

    batches = jax.tree.map(lambda *x: jnp.stack(x), *[make_batch(i) for i in range(3)])
    _, stacked = jax.lax.scan(body, TrainState.create(make_params(), tx), batches)
    state = TrainState.create(make_params(), tx)
    for i in range(3):
        state, info = step(state, jax.tree.map(lambda x, i=i: x[i], batches))
        read, from_scan = info.read(), jax.tree.map(lambda x, i=i: x[i], stacked)
        assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(read))
        assert [*read.stats] == [*info.stats] == [*jaxclip.clip_stats(state.opt_state)]
        for name in ("loss", "grad_norm", "weight_clip_rate", "num_skipped", "nonfinite_leaf"):
            assert getattr(read, name) == getattr(info, name)
            assert getattr(read, name).dtype == getattr(info, name).dtype
            np.testing.assert_allclose(getattr(from_scan, name), getattr(read, name), rtol=1e-6)
        for name, x in read.stats.items():
            assert x == info.stats[name]
            np.testing.assert_allclose(stacked.stats[name][i], x, rtol=1e-6)
        assert read.aux["rows"].tolist() == [0, 1, 2]


def test_the_info_has_the_norm_of_the_gradients_and_the_learning_rate():
    def rate(step):
        return 0.5 / (1 + step.astype(jnp.float32))

    grads = jax.grad(linear_loss)(make_params(), make_batch())
    norm = np.sqrt(sum(np.sum(float64(g) ** 2) for g in jax.tree.leaves(grads)))
    for tx, rates in [
        (jaxclip.lion(rate), [0.5, 0.25]),
        (jaxclip.sign_sgd(0.5), [0.5, 0.5]),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=rate), [0.5, 0.25]),
        (optax.sgd(0.5), None),
    ]:
        _, infos = run(make_train_step(linear_loss, tx), TrainState.create(make_params(), tx), 2)
        np.testing.assert_allclose(infos[0].grad_norm, norm, rtol=1e-6)
        found = [info.learning_rate for info in infos]
        assert found == (rates or [None, None])


def test_without_a_clip_there_are_no_bare_names():
    tx = jaxclip.sign_sgd(0.1)
    _, info = make_train_step(linear_loss, tx)(TrainState.create(make_params(), tx), make_batch())
    assert set(info.stats) == {"scale_by_sign/num_nonfinite"}


def test_the_counts_of_steps_stay_at_the_largest_integer():
    tx, largest = jaxclip.sign_sgd(0.1), 2**31 - 1
    state = TrainState.create(make_params(), tx)
    full = [jnp.full((), largest, jnp.int32) for _ in range(2)]
    state = state._replace(step=full[0], num_skipped=full[1])
    x, y = make_batch()
    state, info = make_train_step(linear_loss, tx)(state, (x * jnp.nan, y))
    assert [int(n) for n in (state.step, state.num_skipped, info.num_skipped)] == [largest] * 3


def quadratic(params, batch):
    return jnp.sum(batch * (params["kernel"] - 0.5) ** 2)


@pytest.mark.parametrize("has_aux", [False, True])
def test_an_optimizer_that_searches_along_a_line_gets_the_loss(has_aux):
    def loss(params, batch, *, key):  # the search must see the noise of the step's own key
        value = quadratic(params, batch) + jax.random.normal(key)
        return (value, value) if has_aux else value

    tx = optax.chain(jaxclip.clip_by_global_norm(100.0), optax.lbfgs())
    params = {"kernel": jnp.zeros(3, jnp.float32)}
    state = TrainState.create(params, tx, key=jax.random.key(0))
    step = make_train_step(loss, tx, has_aux=has_aux)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(6):
            state, _ = step(state, jnp.array([1.0, 2.0, 3.0], jnp.float32))
    np.testing.assert_allclose(state.params["kernel"], 0.5, atol=0.01)


@pytest.mark.parametrize("name", ["sophia", "reduce_on_plateau"])
def test_optimizers_that_ask_for_more_than_the_gradient_get_it(name):
    tx = getattr(optax.contrib, name)(0.1)
    step = make_train_step(linear_loss, tx)
    with jax.numpy_dtype_promotion("standard"):
        jax.eval_shape(step.__wrapped__, TrainState.create(make_params(), tx), make_batch())


@pytest.mark.parametrize("opaque_mode", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_sharpness_aware_minimization_gets_the_gradient_elsewhere(opaque_mode):
    tx = optax.contrib.sam(optax.sgd(0.25), optax.sgd(0.1), opaque_mode=opaque_mode)
    step = make_train_step(lambda w, _: jnp.sum(w**2), tx)
    state = TrainState.create(jnp.array([3.0, -4.0]), tx)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(1 if opaque_mode else 2):
            state, _ = step(state, None)
    # The gradient at w + 0.1 g, with g = 2 w: one step takes w to w (1 - 0.5 * 1.2).
    np.testing.assert_allclose(state.params, [1.2, -1.6], rtol=1e-6)


def test_none_leaves_single_leaves_of_a_tree_free():
    pull = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = jaxclip.sign_sgd(0.5)
    step = make_train_step(
        lambda p, _: jnp.sum(p["kernel"]) + jnp.sum(p["bias"]),
        tx,
        weight_threshold={"kernel": 0.25, "bias": None},
    )
    state, info = step(TrainState.create(jax.tree.map(jnp.zeros_like, pull), tx), None)
    assert float(state.params["kernel"][0, 0]) == -0.25
    assert float(state.params["bias"][0]) == -0.5
    assert float(info.weight_clip_rate) == 1


# --- Flax ------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_split_nnx_model_takes_the_steps_of_plain_parameters_bit_for_bit():
    model = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

    tx = make_optimizer()
    plain_params = jax.tree.map(jnp.array, nnx.to_pure_dict(params))
    step = make_train_step(loss, tx, weight_threshold=jaxclip.fan_in(0.25))
    plain_step = make_train_step(linear_loss, tx, weight_threshold=jaxclip.fan_in(0.25))
    state = TrainState.create(params, tx)
    plain = TrainState.create(plain_params, tx)
    losses = []
    for seed in range(20):
        state, info = step(state, make_batch(seed % 2))
        plain, plain_info = plain_step(plain, make_batch(seed % 2))
        assert info.loss == plain_info.loss
        losses.append(float(info.loss))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(state.params), plain.params)
    nnx.update(model, state.params)
    np.testing.assert_array_equal(model.kernel[...], plain.params["kernel"])
    assert np.abs(np.asarray(model.kernel[...])).max() == 0.125


@pytest.mark.thorough
def test_linen_parameters_train():
    model = linen.Dense(2)
    params = model.init(jax.random.key(0), make_batch()[0])

    def loss(params, batch):
        return jnp.mean((model.apply(params, batch[0]) - batch[1]) ** 2)

    tx = make_optimizer()
    step = make_train_step(loss, tx, weight_threshold=jaxclip.fan_in(0.25))
    state = TrainState.create(params, tx)
    for _ in range(20):
        state, _ = step(state, make_batch())
    assert np.abs(np.asarray(state.params["params"]["kernel"])).max() == 0.125


# --- Other trees -----------------------------------------------------------------------


@pytest.mark.thorough
def test_a_module_whose_leaves_may_be_none_trains_as_the_plain_dict_does():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:  # as equinox has them: what is not trained is None
        kernel: jax.Array
        bias: jax.Array
        scale: jax.Array | None = None

    def loss(layer, batch):
        assert layer.scale is None
        return linear_loss({"kernel": layer.kernel, "bias": layer.bias}, batch)

    tx = make_optimizer()
    layer = Layer(**make_params())
    step = make_train_step(loss, tx, weight_threshold=jaxclip.fan_in(0.1), telemetry_every=1)
    state, infos = run(step, TrainState.create(layer, tx))
    step = make_train_step(linear_loss, tx, weight_threshold=jaxclip.fan_in(0.1))
    expected, _ = run(step, TrainState.create(make_params(), tx))
    assert isinstance(state.params, Layer)
    assert state.params.scale is None
    assert bits((state.params.kernel, state.params.bias)) == bits(
        (expected.params["kernel"], expected.params["bias"])
    )
    assert float(infos[-1].weight_clip_rate) > 0


# --- Compilation -----------------------------------------------------------------------

COPY_OPTION = "xla_cpu_copy_insertion_use_region_analysis"


def options_passed(monkeypatch, **kwargs):
    """The compiler options that `jax.jit` gets for a step."""
    seen = []
    real_jit = jax.jit

    def spy(*args, **jit_kwargs):
        seen.append(jit_kwargs.get("compiler_options"))
        return real_jit(*args, **jit_kwargs)

    jaxclip._core.compiling.cpu_options.cache_clear()
    monkeypatch.setattr(jax, "jit", spy)
    make_train_step(linear_loss, make_optimizer(), **kwargs)
    jaxclip._core.compiling.cpu_options.cache_clear()
    return seen[-1] or {}


def test_the_copy_option_is_set_on_cpu_and_a_users_value_wins(monkeypatch):
    assert options_passed(monkeypatch)[COPY_OPTION] is True
    mine = {COPY_OPTION: False, "xla_cpu_enable_fast_math": False}
    assert options_passed(monkeypatch, compiler_options=mine) == mine


def test_no_cpu_option_reaches_another_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert options_passed(monkeypatch) == {}


@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_the_clip_inside_a_step_takes_its_own_norm(ord):
    tx = optax.chain(jaxclip.clip_by_global_norm(1.0, ord=ord), optax.sgd(1.0))
    step = make_train_step(lambda w, g: jnp.vdot(w, g), tx)
    gradient = np.array([3.0, -4.0, 12.0])
    state, info = step(TrainState.create(jnp.zeros(3, jnp.float32), tx), jnp.float32(gradient))
    norm = np.linalg.norm(gradient, ord)
    np.testing.assert_allclose(info.stats["pre_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(state.params, -gradient / norm, rtol=2e-6)


@pytest.mark.thorough
def test_a_clip_behind_another_link_does_not_take_the_norm_of_the_gradients():
    tx = optax.chain(optax.scale(2.0), jaxclip.clip_by_global_norm(100.0))
    step = make_train_step(lambda w, g: jnp.vdot(w, g), tx)
    _, info = step(TrainState.create(jnp.zeros(2), tx), jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(info.stats["pre_norm"], 10.0, rtol=1e-6)


CLIPS = {
    "none": optax.identity(),
    "global norm": jaxclip.clip_by_global_norm(1.0),
    "leaf norm": jaxclip.clip_by_leaf_norm(1.0),
    "block rms": jaxclip.clip_by_block_rms(1.0),
    "value": jaxclip.clip_by_value(1.0),
    "agc": jaxclip.adaptive_grad_clip(0.01, axis=(0, 1)),
    "autoclip": jaxclip.gradients.autoclip(),
    "zclip": jaxclip.gradients.zclip(),
    "adagc": jaxclip.gradients.adagc(),
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("clip", "threshold", "dtype"),
    [
        *((name, 0.1, "float32") for name in CLIPS),
        ("none", None, "float32"),
        ("global norm", jaxclip.fan_in(1.0), "float32"),
        ("global norm", 0.1, "bfloat16"),
    ],
)
def test_a_donated_step_writes_no_array_to_memory_but_its_state(clip, threshold, dtype):
    if jax.__version_info__ < (0, 10):
        pytest.skip("with jax 0.7.2 the program writes two arrays of its own")
    # Two leaves of one shape, for which XLA may share what it should not.
    params = {name: jax.ShapeDtypeStruct((256, 512), dtype) for name in "ab"}
    tx = optax.chain(CLIPS[clip], jaxclip.lion(1e-3, mu_dtype=jnp.float32))
    step = jaxclip.make_train_step(given_loss, tx, weight_threshold=threshold)
    state = jax.eval_shape(lambda p: jaxclip.TrainState.create(p, tx), params)
    used = step.lower(state, params).compile().memory_analysis()
    assert used.temp_size_in_bytes < 4096  # scalars; an array has 512 KiB


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="with jax 0.7.2 the program writes two arrays of its own"
)
def test_a_clip_by_units_writes_no_copy_of_the_gradients():
    params = {name: jax.ShapeDtypeStruct((256, 512), "float32") for name in "ab"}
    tx = optax.chain(jaxclip.adaptive_grad_clip(0.01), jaxclip.lion(1e-3))
    step = jaxclip.make_train_step(given_loss, tx)
    state = jax.eval_shape(lambda p: jaxclip.TrainState.create(p, tx), params)
    used = step.lower(state, params).compile().memory_analysis()
    assert used.temp_size_in_bytes < 2**17  # sums of the units; an array has 512 KiB
