"""A sweep is what training its rows one by one would be, and says so truthfully."""

import dataclasses
import functools
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxclip
from jaxclip import checkpoints
from jaxclip.sweeps import programs
from jaxclip.sweeps.chunks import ChunkStore
from jaxclip.sweeps.grid import sweep
from jaxclip.sweeps.tasks import Task, random_batches

INPUTS = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32))
STEPS = 12


def init_fn(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {"kernel": 0.4 * jax.random.normal(first, (6, 8)), "bias": jnp.zeros(8)},
        "out": {"kernel": 0.4 * jax.random.normal(second, (8, 3)), "bias": jnp.zeros(3)},
    }


def apply(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"][None]


def loss_fn(params, batch):
    return jnp.mean((apply(params, batch[0]) - batch[1]) ** 2)


def evaluate(params):
    errors = jnp.mean((apply(params, INPUTS) - TARGETS) ** 2, axis=1)
    return {"test": jnp.mean(errors[:32]), "train": jnp.mean(errors[32:])}


def momentum(step_size):
    def falling(count):
        return step_size * (1 - count.astype(jnp.float32) / (2 * STEPS))

    return optax.chain(jaxclip.clip_by_global_norm(1.0), optax.sgd(falling, momentum=0.9))


BATCHES = random_batches((INPUTS, TARGETS), 16)
TASK = Task(
    loss_fn,
    init_fn,
    momentum,
    BATCHES,
    stop=jaxclip.max_steps(STEPS),
    evaluate=evaluate,
    metric="test",
    train_metric="train",
    mode="min",
    weight_threshold=jaxclip.fan_in,
)
COMMON = {
    "step_sizes": [0.3, 0.03],
    "thresholds": [0.5, 1.0, np.inf],
    "seeds": 2,
    "bits": (None, 4),
    "devices": jax.devices()[:1],
    "keep_params": True,
    "progress": False,
}


def run(**changes):
    """A sweep of `TASK` and `COMMON`, with changes of either."""
    of_task = {f.name for f in dataclasses.fields(Task)} & changes.keys()
    task = dataclasses.replace(TASK, **{name: changes.pop(name) for name in of_task})
    return sweep(task, **(COMMON | changes))


GOAL = np.linspace(-0.3, 0.5, 4).astype(np.float32)


def run_small(name="w", names=("error", "norm"), shifted=None, **changes):
    """The least there is to sweep, in compiled functions that have their data inside."""
    functions = {
        "loss_fn": lambda data, p, noise: jnp.mean((p[name] - data - noise) ** 2),
        "batches": lambda data, key: 0.1 * jax.random.normal(key, (4,)) + data,
        "evaluate": lambda data, p: dict(
            zip(names, (jnp.mean((p[name] - data) ** 2), jnp.mean(p[name] ** 2)), strict=True)
        ),
    }
    for which, function in functions.items():
        data = GOAL + np.float32(which == shifted)
        functions[which] = jax.jit(functools.partial(function, data))
    small = {"step_sizes": [0.1], "thresholds": [1.0], "seeds": 1, "bits": (None,)}
    small |= {"metric": "error", "train_metric": None, "weight_threshold": None}
    small |= {"stop": jaxclip.max_steps(2), "optimizer": optax.sgd}
    return run(init_fn=lambda key: {name: jnp.zeros(4)}, **functions, **(small | changes))


@pytest.fixture(scope="module")
def result():
    return run()


def trained_alone(step_size, threshold, seed, optimizer=momentum, num_steps=STEPS):
    """One row by hand, as the docstring of `sweep` defines it."""
    init_key, data_key, loss_key = jax.random.split(jax.random.key(seed), 3)
    tx = optimizer(step_size)
    step = jaxclip.make_train_step(loss_fn, tx, weight_threshold=jaxclip.fan_in(threshold))
    state = jaxclip.TrainState.create(init_fn(init_key), tx, key=loss_key)
    for i in range(num_steps):
        state, info = step(state, BATCHES(jax.random.fold_in(data_key, i)))
    return state, info


def params_at(result, i, j, seed):
    return jax.tree.map(lambda leaf: leaf[i, j, seed], result.params)


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


def test_bytes_of_coded_files_are_those_on_disk(tmp_path):
    coded = run(step_sizes=[0.1], thresholds=[1.0], bits=(4,), coding="huffman")
    small = jaxclip.compress(params_at(coded, 0, 0, 1), 4)
    checkpoints.save(tmp_path / "a.safetensors", small, coding="huffman")
    assert coded.file_bytes[0, 0, 1, 0] == (tmp_path / "a.safetensors").stat().st_size


def test_the_program_is_traced_once_for_any_number_of_settings_and_chunks():
    def traces(**changes):
        count = 0

        def counted(params, batch):
            nonlocal count
            count += 1
            return loss_fn(params, batch)

        run(loss_fn=counted, bits=(None,), seeds=1, **changes)
        return count

    few = traces(step_sizes=[0.1], thresholds=[1.0])
    assert traces(step_sizes=[0.1, 0.2, 0.3, 0.4], chunk_size=3) == few


@pytest.mark.parametrize(("devices", "loop"), [(1, "compiled"), (2, "host")])
def test_the_time_of_a_step_is_without_compiling(monkeypatch, devices, loop):
    compiled = []

    def listener(event, seconds, **kwargs):
        if event.startswith("/jax/core/compile/"):
            compiled.append(event)

    # In place of seconds, what has been compiled so far is counted.
    clock = types.SimpleNamespace(monotonic=lambda: float(len(compiled)))
    monkeypatch.setattr(programs, "time", clock)
    jax.monitoring.register_event_duration_secs_listener(listener)
    few = {"step_sizes": [0.1, 0.2, 0.3], "chunk_size": 1, "loop": loop}
    try:
        found = run_small(devices=jax.devices()[:devices], **few)
    finally:  # jax 0.7 keeps its listeners
        forget = getattr(jax.monitoring, "unregister_event_duration_listener", lambda _: None)
        forget(listener)
    assert compiled
    assert found.seconds_per_step.tolist() == [[0.0]] * 3


def test_chunks_and_the_host_loop_give_what_one_program_gives(result):
    changes = ({"chunk_size": 4}, {"loop": "host"}, {"record_every": 5})
    for other in (run(bits=(None,), **change) for change in changes):
        for mine, one in zip(
            jax.tree.leaves(other.params), jax.tree.leaves(result.params), strict=True
        ):
            np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-6)
    assert other.recorded_at.tolist() == [5, 10, 12]
    np.testing.assert_allclose(
        other.history["loss"][..., -1], result.history["loss"][..., -2:].mean(-1), rtol=1e-5
    )


def test_settings_are_shared_out_over_devices(result):
    many = run(devices=jax.devices(), bits=(None,))
    for mine, one in zip(jax.tree.leaves(many.params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-6)


def test_the_settings_of_a_program_are_on_all_of_its_devices():
    task = dataclasses.replace(TASK, stop=jaxclip.max_steps(2))
    program = programs.Program(task, 16, [0], jax.devices(), None, 1)
    trained = program.run(np.full(16, 0.1), np.full(16, 1.0))
    leaf = trained.params["hidden"]["kernel"]
    assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}
    assert len(leaf.sharding.device_set) == len(jax.devices())


def test_convolutions_on_cpu_get_a_loop_outside_of_the_program():
    def conv_loss(params, batch):
        image = batch[0][:, :4].reshape(-1, 2, 2, 1)
        out = jax.lax.conv(image, params["kernel"], (1, 1), "SAME")
        return jnp.mean(out**2)

    task = Task(
        conv_loss,
        lambda key: {"kernel": jax.random.normal(key, (2, 2, 2, 2))},
        optax.sgd,
        lambda key: (jnp.ones((2, 8)),),
        stop=jaxclip.max_steps(2),
        evaluate=evaluate,
        metric="test",
    )
    assert programs.Program(task, 1, [0], jax.devices()[:1], None, 1).loop == "host"


# --- Rows that stop or diverge --------------------------------------------------------


def test_a_diverged_setting_is_marked_and_changes_no_other():
    sane = run(step_sizes=[0.1, 0.2], optimizer=optax.sgd, thresholds=[np.inf], bits=(None,))
    wild = run(step_sizes=[0.1, 1e25], optimizer=optax.sgd, thresholds=[np.inf], bits=(None,))
    assert wild.is_diverged.tolist() == [[[False, False]], [[True, True]]]
    assert not sane.is_diverged.any()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), wild.params, sane.params)
    assert {row.step_size for row in wild.pareto()} == {0.1}
    assert wild.recommend(1e9).step_size == 0.1
    assert "2/2" in str(wild)


def test_a_nan_loss_marks_its_row():
    def loss(params, batch):
        return jnp.where(jnp.abs(params["out"]["bias"][0]) > 0.02, jnp.nan, loss_fn(params, batch))

    found = run(loss_fn=loss, step_sizes=[1e-4, 0.3], thresholds=[np.inf], seeds=1, bits=(None,))
    assert found.is_diverged[:, 0, 0].tolist() == [False, True]
    assert np.isfinite(found.metrics["test"]).all()


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


@pytest.mark.parametrize("name", STOPS)
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


def test_a_threshold_may_become_a_schedule():
    def shrinking(kappa):
        return jaxclip.fan_in(lambda step: kappa / (1 + step.astype(jnp.float32)))

    found = run(weight_threshold=shrinking, thresholds=[2.0], step_sizes=[0.3], bits=(None,))
    bound = float(jaxclip.fan_in(2.0 / STEPS)(jnp.zeros((6, 8))))
    assert np.abs(found.params["hidden"]["kernel"]).max() <= bound * (1 + 1e-6)


# --- Chunks on disk -------------------------------------------------------------------


def same(a, b):
    for field in dataclasses.fields(a):
        if field.name != "seconds_per_step":
            jax.tree.map(
                np.testing.assert_array_equal, getattr(a, field.name), getattr(b, field.name)
            )


def test_a_resumed_sweep_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch):
    few = {"chunk_size": 2, "bits": (None,)}
    whole = run(**few)
    real, calls = programs.Program.run, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(programs.Program, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(**few, directory=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    resumed = run(**few, directory=tmp_path)
    assert len(calls) == 4  # two, the interrupted one, and that one again
    same(resumed, whole)
    same(run(**few, directory=tmp_path), whole)
    assert len(calls) == 4


CHANGES = {
    "settings": {"step_sizes": [0.1, 0.2]},
    "seeds": {"seeds": [4, 5]},
    "bits": {"bits": (2,)},
    "program": {"batches": random_batches((INPUTS + 1, TARGETS), 16)},
    "chunk_size": {"chunk_size": 3},
}


def test_chunks_of_another_sweep_are_refused(tmp_path):
    small = {"thresholds": [1.0], "chunk_size": 1, "bits": (None,)}
    run(**small, directory=tmp_path)
    for field, change in CHANGES.items():
        with pytest.raises(ValueError, match=f"chunks of another sweep: .*{field}"):
            run(
                **(small | change | {"chunk_size": change.get("chunk_size", 1)}),
                directory=tmp_path,
            )
    for field, change in {
        "program": {"loss_fn": lambda p, b: 2 * loss_fn(p, b)},
        "program differ": {"init_fn": lambda key: jax.tree.map(lambda x: 2 * x, init_fn(key))},
        "evaluation": {"evaluate": lambda p: {k: 2 * x for k, x in evaluate(p).items()}},
    }.items():
        with pytest.raises(ValueError, match=f"another sweep: {field}"):
            run(**(small | change), directory=tmp_path)


def test_data_inside_of_compiled_functions_are_data_of_the_sweep(tmp_path):
    same(run_small(directory=tmp_path), run_small(directory=tmp_path))
    for which, differs in {"loss_fn": "program", "batches": "program", "evaluate": "eval"}.items():
        with pytest.raises(ValueError, match=f"another sweep: {differs}[a-z]* differ"):
            run_small(shifted=which, directory=tmp_path)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_constants_of_jaxprs_inside_of_others_are_told_apart(as_array):
    def traced(data):
        inner = jax.jit(lambda x: x + as_array(np.float32([1, data])))

        def outer(x):
            x = jax.checkpoint(lambda x: lax.fori_loop(0, 3, lambda i, x: inner(x), x))(x)
            return lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)

        return jax.jit(outer).trace(jnp.ones(2))

    found = [programs.fingerprint(traced(data)) for data in (2, 2, 3)]
    assert found[0] == found[1] != found[2]


def test_names_of_metrics_and_of_parameters_are_part_of_the_sweep(tmp_path):
    run_small(directory=tmp_path)
    # In the order of their names these are the same programs.
    with pytest.raises(ValueError, match="another sweep: evaluation differ"):
        run_small(names=("a", "error"), directory=tmp_path)
    with pytest.raises(ValueError, match="another sweep: program, evaluation differ"):
        run_small(name="weight", directory=tmp_path)


@pytest.mark.parametrize("damaged", [b'{"seeds": [0', b"", b"[]", b'\xff{"seeds": [0]}'])
def test_a_damaged_description_is_an_error(tmp_path, damaged):
    ChunkStore(tmp_path, {"seeds": [0]})
    (tmp_path / "sweep.json").write_bytes(damaged)
    with pytest.raises(checkpoints.CheckpointError, match=r"sweep\.json: "):
        ChunkStore(tmp_path, {"seeds": [0]})


def test_a_damaged_chunk_is_an_error(tmp_path):
    small = {"thresholds": [1.0], "step_sizes": [0.1], "bits": (None,), "directory": tmp_path}
    run(**small)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    with pytest.raises(checkpoints.CheckpointError):
        run(**small)


@pytest.mark.slow
def test_sigint_keeps_finished_chunks_and_leaves_no_partial_one(tmp_path):
    script = textwrap.dedent("""
        import signal, sys, jax, jax.numpy as jnp, jaxclip
        from jaxclip.sweeps import Task
        # A shell starts its background jobs with the signal ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        task = Task(
            lambda w, x: jnp.mean((w @ x - 1) ** 2),
            lambda key: jax.random.normal(key, (64, 64)),
            jaxclip.sign_sgd, lambda key: jax.random.normal(key, (64, 64)),
            stop=jaxclip.max_steps(int(sys.argv[2])),
            evaluate=lambda w: {"norm": jnp.sum(w**2)}, metric="norm",
        )
        jaxclip.sweep(
            task, step_sizes=[0.001 * k for k in range(1, 41)], seeds=2, chunk_size=1,
            bits=(None,), directory=sys.argv[1],
        )
    """)
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), "4000"],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("settings-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, "it was done before the signal came"
    assert "KeyboardInterrupt" in errors
    files = sorted(tmp_path.glob("*.safetensors"))
    assert 2 <= len(files) < 40
    for file in files:
        assert checkpoints.load(file)["steps"].tolist() == [[4000, 4000]]
    assert not [f for f in tmp_path.iterdir() if "tmp" in f.name]


def test_a_memory_budget_makes_chunks_and_one_too_small_is_refused(result, tmp_path):
    needed = programs.Program(TASK, 6, [0, 1], jax.devices()[:1], None, 1).bytes_needed()
    chunked = run(memory_budget=int(0.7 * needed), directory=tmp_path, bits=(None,))
    assert 2 <= len(list(tmp_path.glob("*.safetensors"))) <= 3
    for mine, one in zip(
        jax.tree.leaves(chunked.params), jax.tree.leaves(result.params), strict=True
    ):
        np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"memory_budget is 1,000, but one setting .* takes"):
        run(memory_budget=1000)


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
        r"stop looks at \['accuracy'\], which is not among",
    ),
    ({"chunk_size": 0}, ValueError, "chunk_size"),
    ({"keep_params": False, "directory": 3}, TypeError, "PathLike"),
]


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


def test_batches_are_drawn_from_all_examples_and_bad_data_is_named():
    draws = random_batches({"x": jnp.arange(8.0)}, 400)(jax.random.key(0))["x"]
    assert set(np.asarray(draws)) == set(range(8))
    with pytest.raises(ValueError, match="one length, not 0, got"):
        random_batches((jnp.zeros(3), jnp.zeros(4)), 2)
    with pytest.raises(ValueError, match="one length, not 0"):
        random_batches(jnp.zeros((0, 3)), 2)
    with pytest.raises(ValueError, match="batch_size"):
        random_batches(jnp.zeros(3), 0)
