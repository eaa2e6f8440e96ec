"""A sweep is what training its rows one by one would be, and says so truthfully."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip import checkpoints
from oracles.quick import quick_first
from oracles.small_sweeps import (
    BATCHES,
    STEPS,
    evaluate,
    init_fn,
    loss_fn,
    momentum,
    params_at,
    run,
)


def trained_alone(step_size, threshold, seed, optimizer=momentum, num_steps=STEPS):
    """One row by hand, as the docstring of `sweep` defines it."""
    init_key, data_key, loss_key = jax.random.split(jax.random.key(seed), 3)
    tx = optimizer(step_size)
    step = jaxclip.make_train_step(
        loss_fn, tx, weight_threshold=jaxclip.fan_in(threshold), telemetry_every=1
    )
    state = jaxclip.TrainState.create(init_fn(init_key), tx, key=loss_key)
    for i in range(num_steps):
        state, info = step(state, BATCHES(jax.random.fold_in(data_key, i)))
    return state, info


@pytest.mark.thorough
def test_a_sweep_is_its_rows_trained_one_by_one(result):
    for (i, a), (j, t), seed in itertools.product(
        enumerate(result.step_sizes), enumerate(result.thresholds), (0, 1)
    ):
        state, info = trained_alone(float(a), float(t), seed)
        for mine, alone in zip(
            jax.tree.leaves(params_at(result, i, j, seed)),
            jax.tree.leaves(state.params),
            strict=True,
        ):
            # In ulps of the largest weight: sums are in another order in a larger product.
            ulp = np.spacing(np.abs(alone).max().astype(np.float32))
            assert np.abs(mine - np.asarray(alone)).max() <= 16 * ulp
        np.testing.assert_allclose(
            result.weight_clip_rate[i, j, seed], info.weight_clip_rate, atol=1e-6
        )


def test_boxed_rows_are_in_their_box_exactly_and_others_are_free(result):
    for j, t in enumerate(result.thresholds[:2]):
        bound = jaxclip.fan_in(t)(jnp.zeros((6, 8)))
        assert np.abs(result.params["hidden"]["kernel"][:, j]).max() <= float(bound)
    assert (result.weight_clip_rate[:, 2] == 0).all()
    assert (result.weight_clip_rate[0, 0] > 0).all()


@pytest.mark.thorough
def test_metrics_are_those_of_a_file_written_and_read(result, tmp_path):
    for b, bits in enumerate(result.bits):
        tree = params_at(result, 1, 0, 1)
        small = tree if bits is None else jaxclip.compress(tree, bits)
        file = tmp_path / f"{bits}.safetensors"
        checkpoints.save(file, small)
        loaded = jaxclip.decompress(checkpoints.load(file))
        for name, value in evaluate(loaded).items():
            np.testing.assert_allclose(result.metrics[name][1, 0, 1, b], value, rtol=1e-5)
        assert result.file_bytes[1, 0, 1, b] == file.stat().st_size


@pytest.mark.thorough
def test_bytes_of_coded_files_are_those_on_disk(tmp_path):
    coded = run(step_sizes=[0.1], thresholds=[1.0], bits=(4,), coding="huffman")
    small = jaxclip.compress(params_at(coded, 0, 0, 1), 4)
    checkpoints.save(tmp_path / "a.safetensors", small, coding="huffman")
    assert coded.file_bytes[0, 0, 1, 0] == (tmp_path / "a.safetensors").stat().st_size


# --- Rows that stop or diverge --------------------------------------------------------


@pytest.mark.thorough
def test_a_diverged_setting_is_marked_and_changes_no_other():
    sane = run(step_sizes=[0.1, 0.2], optimizer=optax.sgd, thresholds=[np.inf], bits=(None,))
    wild = run(step_sizes=[0.1, 1e25], optimizer=optax.sgd, thresholds=[np.inf], bits=(None,))
    assert wild.is_diverged.tolist() == [[[False, False]], [[True, True]]]
    assert not sane.is_diverged.any()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), wild.params, sane.params)
    assert {row.step_size for row in wild.pareto()} == {0.1}
    assert wild.recommend(1e9).step_size == 0.1
    assert "2/2" in str(wild)


def test_good_weights_to_start_from_are_no_reason_to_call_a_setting_diverged():
    good = {"w": jnp.linspace(-1.0, 1.0, 64)}
    found = run(
        loss_fn=lambda p, noise: jnp.mean((p["w"] - good["w"] + noise) ** 2),
        init_fn=lambda key: good,  # where the loss is smallest
        optimizer=jaxclip.sign_sgd,
        batches=lambda key: 1e-3 * jax.random.normal(key, (64,)),
        evaluate=lambda p: {"test": jnp.mean((p["w"] - good["w"]) ** 2)},
        train_metric=None,
        weight_threshold=None,
        step_sizes=[1e-4, 1e-3, 1e-2, 1e-1],
        thresholds=[np.inf],
        seeds=1,
        bits=(None,),
        stop=jaxclip.max_steps(100),
    )
    assert (found.loss[1:, 0, 0] > 1.5 * found.loss[0, 0, 0]).all()  # all end worse than they began
    assert not found.is_diverged.any()
    assert len(found.pareto()) == 1


def test_only_what_ends_far_worse_than_weights_of_zero_has_diverged():
    good = jnp.linspace(-1.0, 1.0, 64)
    found = run(
        loss_fn=lambda p, _: jnp.mean((p["w"] - good - 1e-4) ** 2),  # 1e-8 at the start
        init_fn=lambda key: {"w": good},
        optimizer=jaxclip.sign_sgd,
        batches=lambda key: jax.random.normal(key, (1,)),
        evaluate=lambda p: {"test": jnp.mean((p["w"] - good) ** 2)},
        train_metric=None,
        weight_threshold=lambda t: t,
        step_sizes=[1e-2, 1e4],
        thresholds=[0.5, np.inf],
        seeds=1,
        bits=(None,),
        stop=jaxclip.max_steps(10),
    )
    assert found.loss[0, 0, 0] > 0.01, "the box costs more than ten times the loss of the start"
    assert found.loss[1, 1, 0] > 1e4
    assert found.is_diverged[..., 0].tolist() == [[False, False], [False, True]]


@pytest.mark.thorough
def test_a_nan_loss_marks_its_row():
    def loss(params, batch):
        return jnp.where(jnp.abs(params["out"]["bias"][0]) > 0.02, jnp.nan, loss_fn(params, batch))

    found = run(loss_fn=loss, step_sizes=[1e-4, 0.3], thresholds=[np.inf], seeds=1, bits=(None,))
    assert found.is_diverged[:, 0, 0].tolist() == [False, True]
    assert np.isfinite(found.metrics["test"]).all()


@pytest.mark.thorough
def test_a_row_whose_first_losses_are_not_finite_is_judged_by_the_first_that_is():
    # Seed 0 skips its first two steps, NaN and inf, and seed 1 all of its six.
    def step_key(seed, i):
        data_key = jax.random.split(jax.random.key(seed), 3)[1]
        return jax.random.key_data(jax.random.fold_in(data_key, i))

    bad = np.asarray([step_key(0, 0), step_key(0, 1), *(step_key(1, i) for i in range(6))])
    values = np.asarray([np.nan, np.inf, *[np.inf] * 6], np.float32)

    def batches(key):
        is_it = jnp.all(bad == jax.random.key_data(key)[None], axis=1)
        return jnp.where(is_it.any(), jnp.asarray(values)[jnp.argmax(is_it)], 1.0)

    found = run(
        loss_fn=lambda w, batch: jnp.sum((w - batch) ** 2),
        init_fn=lambda key: jnp.zeros(2),
        optimizer=optax.sgd,
        batches=batches,
        evaluate=lambda w: {"test": jnp.sum(w)},
        train_metric=None,
        weight_threshold=None,
        step_sizes=[0.1, 3.0],
        thresholds=[np.inf],
        bits=(None,),
        stop=jaxclip.max_steps(6),
        record_every=2,
    )
    assert found.is_diverged[:, 0].tolist() == [[False, True], [True, True]]


STOPS = {
    "reached": jaxclip.training.reached("loss", 0.3, mode="min"),
    "plateau": jaxclip.training.plateau("loss", 2),
    "reached by a metric": jaxclip.training.reached("test", 0.4, mode="min"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", quick_first(["reached by a metric", "reached", "plateau"]))
def test_a_row_stops_where_fit_would_and_is_frozen_from_there(name):
    stop = STOPS[name] | jaxclip.max_steps(STEPS)
    every = 3 if "metric" in name else None
    swept = run(stop=stop, evaluate_every=every, thresholds=[1.0], bits=(None,))
    for i, seed in itertools.product((0, 1), (0, 1)):
        init_key, data_key, loss_key = jax.random.split(jax.random.key(seed), 3)
        tx = momentum(float(swept.step_sizes[i]))
        step = jaxclip.make_train_step(loss_fn, tx, weight_threshold=jaxclip.fan_in(1.0))
        fitted = jaxclip.fit(
            step,
            jaxclip.TrainState.create(init_fn(init_key), tx, key=loss_key),
            [BATCHES(jax.random.fold_in(data_key, k)) for k in range(STEPS)],
            stop=stop,
            evaluate=evaluate if every else None,
            evaluate_every=every,
            progress=False,
        )
        assert swept.steps[i, 0, seed] == int(fitted.state.step)
        assert swept.reason(i, 0, seed) is fitted.reason
        for mine, alone in zip(
            jax.tree.leaves(params_at(swept, i, 0, seed)),
            jax.tree.leaves(fitted.state.params),
            strict=True,
        ):
            np.testing.assert_allclose(mine, np.asarray(alone), rtol=1e-5, atol=1e-6)
    assert swept.steps.min() < STEPS  # or the rule was not tried


@pytest.mark.thorough
def test_a_threshold_may_become_a_schedule():
    def shrinking(kappa):
        return jaxclip.fan_in(lambda step: kappa / (1 + step.astype(jnp.float32)))

    found = run(weight_threshold=shrinking, thresholds=[2.0], step_sizes=[0.3], bits=(None,))
    bound = float(jaxclip.fan_in(2.0 / STEPS)(jnp.zeros((6, 8))))
    assert np.abs(found.params["hidden"]["kernel"]).max() <= bound * (1 + 1e-6)


# --- Bad input ------------------------------------------------------------------------

BAD = [
    ({"step_sizes": []}, ValueError, "step_sizes must have at least one"),
    ({"step_sizes": [0.1, 0.1]}, ValueError, "step_sizes .* none twice"),
    ({"step_sizes": [0.1, -1.0]}, ValueError, r"step_sizes\[1\] must be"),
    ({"thresholds": [float("nan")]}, ValueError, r"thresholds\[0\] must be"),
    ({"seeds": 0}, ValueError, "seeds"),
    ({"seeds": [1, 1]}, ValueError, "seeds .* none twice"),
    ({"seeds": [0, 0.5]}, TypeError, r"seeds\[1\] must be an integer, got 0.5"),
    ({"seeds": [2**40]}, ValueError, r"seeds\[0\] must be within 32 bits"),
    ({"devices": []}, ValueError, "devices must have at least one"),
    ({"bits": 4}, TypeError, "bits must be widths, .* got 4"),
    ({"bits": "ternary"}, TypeError, "bits must be widths, .* got 'ternary'"),
    ({"bits": ()}, ValueError, "bits must name a width"),
    (
        {"evaluate": lambda p: p["out"], "metric": "bias", "train_metric": None},
        ValueError,
        r"scalars, 'bias' has shape \(3,\)",
    ),
    ({"bits": (7,)}, ValueError, "bits"),
    ({"metric": "accuracy"}, ValueError, r"\['test', 'train'\], but no 'accuracy'"),
    ({"train_metric": "x"}, ValueError, "no 'x'"),
    ({"mode": "best"}, ValueError, "mode"),
    ({"loop": "for"}, ValueError, "loop"),
    ({"evaluate_every": 0}, ValueError, "evaluate_every"),
    ({"record_every": 0}, ValueError, "record_every"),
    ({"evaluate": lambda p: p["out"]["bias"]}, TypeError, "evaluate must return a dict"),
    ({"stop": 5}, TypeError, "stop must be a stop rule"),
    ({"stop": jaxclip.training.plateau("loss", 3)}, ValueError, "last step"),
    (
        {"stop": jaxclip.max_steps(9) | jaxclip.training.max_seconds(1e9)},
        ValueError,
        "the clock, which all rows",
    ),
    (  # behind a rule that may be met first
        {
            "stop": jaxclip.max_steps(9)
            | jaxclip.training.reached("loss", 0.1, mode="min")
            | jaxclip.training.max_seconds(1e9)
        },
        ValueError,
        "the clock, which all rows",
    ),
    (
        {
            "stop": jaxclip.max_steps(9) | jaxclip.training.plateau("loss", 3),
            "evaluate": lambda params: evaluate(params) | {"loss": 0.0},
            "evaluate_every": 3,
        },
        ValueError,
        r"evaluate returns \['loss'\], which the step reports already",
    ),
    (
        {
            "stop": jaxclip.max_steps(9) | jaxclip.training.plateau("pre_norm", 3),
            "evaluate": lambda params: evaluate(params) | {"pre_norm": 0.0},
            "evaluate_every": 3,
        },
        ValueError,
        r"evaluate returns \['pre_norm'\], which the step reports already",
    ),
    (
        {"stop": jaxclip.max_steps(9) | jaxclip.training.reached("test", 0.1, mode="min")},
        ValueError,
        "set evaluate_every",
    ),
    (
        {"stop": jaxclip.max_steps(9) | jaxclip.training.reached("accuracy", 0.1)},
        ValueError,
        r"stop reads \['accuracy'\], but the metrics are",
    ),
    ({"chunk_size": 0}, ValueError, "chunk_size"),
    ({"keep_params": False, "directory": 3}, TypeError, "PathLike"),
]


@pytest.mark.thorough
def test_numbers_of_every_kind_make_the_axes():
    changes = {"stop": jaxclip.max_steps(1), "keep_params": False, "train_metric": None}
    found = run(
        step_sizes=list(jnp.asarray([0.5, 0.25])),
        thresholds=np.asarray([1.0]),
        seeds=np.arange(2),
        bits=np.asarray([4, 2]),
        **changes,
    )
    assert list(found.step_sizes) == [0.5, 0.25]
    assert found.bits == (4, 2)
    assert list(found.seeds) == [0, 1]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        run(**change)
