"""A row is a loop over the train step, bit for bit, and its history is what that step says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.sweeps import programs
from jaxclip.training import average_weights, averaged_weights
from oracles.quick import quick_first
from oracles.small_sweeps import BATCHES, evaluate, init_fn, loss_fn, momentum, params_at, run

NUM_STEPS, EVERY = 7, 3
BOXES = {
    "fan-in": jaxclip.fan_in,
    "schedule": lambda t: lambda step: t / (1 + step.astype(jnp.float32)),
    # It measures the weights before they are clipped; after that it would find other bounds.
    "rule": lambda t: jaxclip.thresholds.per_tree(jaxclip.thresholds.percentile_abs(80.0)),
    # 0.1 is not a float32: the bound is the number below it.
    "numbers": lambda t: {"hidden": 0.1, "out": {"kernel": t, "bias": None}},
    "none": lambda t: None,
}


# XLA of jax 0.12 makes other roundings of a product and a sum in a loop than outside.
HAS_OWN_ROUNDINGS = [int(n) for n in jax.__version__.split(".")[:2]] >= [0, 12]


def is_same(actual, desired):
    if HAS_OWN_ROUNDINGS:
        np.testing.assert_allclose(actual, desired, rtol=1e-6, atol=1e-7)
    else:
        np.testing.assert_array_equal(actual, desired)


def looped(step_size, threshold, seed, box, optimizer=momentum):
    """State and history of a row whose step is called again and again from Python."""

    def create(step_size, key):
        return jaxclip.TrainState.create(init_fn(key), optimizer(step_size), key=loss_key)

    def step(step_size, threshold, state, key):
        step = jaxclip.make_train_step(
            loss_fn, optimizer(step_size), weight_threshold=box(threshold), telemetry_every=1
        )
        return step(state, BATCHES(key))

    init_key, data_key, loss_key = jax.random.split(jax.random.key(seed), 3)
    numbers = np.float32(step_size), np.float32(threshold)
    state, infos = jax.jit(create)(numbers[0], init_key), []
    step = jax.jit(step)
    for i in range(NUM_STEPS):
        state, info = step(*numbers, state, jax.random.fold_in(data_key, i))
        infos.append(info)
    losses = np.asarray([info.loss for info in infos], np.float64)
    means = [x.mean() for x in (losses[:3], losses[3:6], losses[6:])]
    return state, means, [infos[i].weight_clip_rate for i in (2, 5, 6)]


@pytest.mark.parametrize("name", quick_first(list(BOXES)))
@pytest.mark.parametrize("loop", ["compiled", "host"])
def test_a_row_is_a_loop_over_the_train_step_bit_for_bit(name, loop):
    box = BOXES[name]
    swept = run(
        stop=jaxclip.max_steps(NUM_STEPS),
        weight_threshold=box,
        step_sizes=[0.3, 0.03],
        thresholds=[0.25],
        record_every=EVERY,
        bits=(None,),
        loop=loop,
    )
    for (i, step_size), seed in itertools.product(enumerate(swept.step_sizes), (0, 1)):
        state, losses, rates = looped(step_size, 0.25, seed, box)
        jax.tree.map(is_same, params_at(swept, i, 0, seed), state.params)
        np.testing.assert_allclose(swept.history["loss"][i, 0, seed], losses, rtol=4e-7)
        np.testing.assert_array_equal(swept.history["weight_clip_rate"][i, 0, seed], rates)
    assert name == "none" or swept.weight_clip_rate.any()


def averaging(step_size):
    return optax.chain(momentum(step_size), average_weights(0.7))


@pytest.mark.parametrize("num_devices", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_averages_in_the_optimizer_are_what_is_evaluated_compressed_and_returned(num_devices):
    box = 0.25
    swept = run(
        stop=jaxclip.max_steps(NUM_STEPS),
        weight_threshold=lambda t: t,
        optimizer=averaging,
        step_sizes=[0.3, 0.03],
        thresholds=[box],
        devices=jax.devices()[:num_devices],
    )
    state, *_ = looped(0.03, box, 1, lambda t: t, averaging)
    expected, shipped = averaged_weights(state.opt_state, state.params), params_at(swept, 1, 0, 1)
    # Rows that are trained together are those of batched products, rounded otherwise.
    atol = 0 if num_devices == 1 else 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, atol), shipped, expected)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, w: np.any(a != w), shipped, state.params)))
    assert all(np.all(np.abs(a) <= box) for a in jax.tree.leaves(swept.params))
    files = expected, jaxclip.decompress(jaxclip.compress(expected, 4))
    found = [float(evaluate(params)["test"]) for params in files]
    np.testing.assert_allclose(swept.metrics["test"][1, 0, 1], found, rtol=1e-5)


def test_a_rule_reads_the_metrics_of_the_averages():
    # Of weights that shrink by a tenth a step, the average of all passes 0.85 two steps later.
    def below(optimizer):
        return run(
            loss_fn=lambda p, batch: 0.5 * jnp.sum(p["w"] ** 2),
            init_fn=lambda key: {"w": jnp.ones(1)},
            evaluate=lambda p: {"test": p["w"][0]},
            optimizer=optimizer,
            weight_threshold=None,
            stop=jaxclip.training.reached("test", 0.85, mode="min") | jaxclip.max_steps(NUM_STEPS),
            evaluate_every=1,
            train_metric=None,
            step_sizes=[0.1],
            thresholds=[np.inf],
            seeds=1,
            bits=(None,),
        ).steps.item()

    def averaged(step_size):
        return optax.chain(optax.sgd(step_size), average_weights(1.0))

    means = np.cumsum(0.9 ** np.arange(1, NUM_STEPS + 1)) / np.arange(1, NUM_STEPS + 1)
    assert below(optax.sgd) == 2
    assert below(averaged) == 1 + np.flatnonzero(means <= 0.85)[0] > 2


def test_a_rule_may_read_the_fraction_on_the_bound_of_every_step():
    stop = jaxclip.training.reached("weight_clip_rate", 0.3) | jaxclip.max_steps(NUM_STEPS)
    swept = run(stop=stop, step_sizes=[0.3], thresholds=[0.5], bits=(None,))
    assert (swept.steps < NUM_STEPS).all()
    at_end = swept.history["weight_clip_rate"]
    assert (at_end[..., -1] >= 0.3).all()
    assert all(
        (x[: n - 1] < 0.3).all() for x, n in zip(at_end[0, 0], swept.steps[0, 0], strict=True)
    )


@pytest.mark.parametrize("loop", ["compiled", "host"])
def test_a_row_that_has_stopped_takes_no_more_steps(loop):
    losses = []

    def counted(params, batch):
        loss = loss_fn(params, batch)
        jax.debug.callback(losses.append, loss)
        return loss

    stop = jaxclip.training.plateau("loss", 1) | jaxclip.max_steps(NUM_STEPS)
    swept = run(loss_fn=counted, stop=stop, thresholds=[0.25], bits=(None,), loop=loop)
    jax.effects_barrier()
    assert swept.steps.min() < NUM_STEPS
    assert len(losses) == swept.steps.sum() + swept.steps.size  # and one of weights of 0


def test_rows_do_not_depend_on_how_many_are_trained():
    few, many = (
        run(step_sizes=step_sizes, thresholds=[0.25], bits=(None,))
        for step_sizes in ([0.3], [0.03, 0.3, 0.1])
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[1]), few.params, many.params)


@pytest.mark.thorough
def test_the_length_of_a_call_changes_no_bit(monkeypatch):
    few = {"thresholds": [0.25], "bits": (None,), "record_every": EVERY}
    whole = run(**few)
    monkeypatch.setattr(programs, "_SECONDS_PER_CALL", 0.0)  # a call for each step
    stepped = run(**few)
    jax.tree.map(np.testing.assert_array_equal, stepped.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, stepped.history, whole.history)
