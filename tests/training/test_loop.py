"""The loop ends when it should, says why, and goes on bit for bit after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip import fit, max_steps
from jaxclip.training import StopReason, nonfinite, plateau, reached


def loss_fn(w, target):
    return jnp.sum((w - target) ** 2)


def problem(optimizer=None):
    tx = optimizer or jaxclip.sign_sgd(0.25)
    step = jaxclip.make_train_step(loss_fn, tx, weight_threshold=2.0)
    return step, jaxclip.TrainState.create(jnp.zeros(2), tx)


def run(stop, batches=None, **arguments):
    step, state = problem()
    batches = [jnp.ones(2)] * 20 if batches is None else batches
    return fit(step, state, batches, stop=stop, progress=False, **arguments)


# --- Ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("check_every", [1, 4, 100])
def test_a_limit_of_steps_is_exact_however_seldom_it_looks(check_every):
    result = run(max_steps(7), check_every=check_every)
    assert result.reason is StopReason.MAX_STEPS
    assert int(result.state.step) == result.history["step"][-1] == 7
    assert result.compile_seconds > 0


def test_data_that_ends_is_a_reason():
    result = run(max_steps(7), batches=iter([jnp.ones(2)] * 3))
    assert result.reason is StopReason.DATA_ENDED
    assert int(result.state.step) == 3
    assert run(max_steps(7), batches=[]).reason is StopReason.DATA_ENDED


def test_metrics_of_the_step_and_of_the_evaluation_stop_it():
    result = run(reached("loss", 0.2, mode="min"))
    assert result.reason is StopReason.REACHED
    np.testing.assert_allclose(result.history["loss"], [2, 1.125, 0.5, 0.125])
    result = run(
        reached("distance", 0.3, mode="min"),
        evaluate=lambda w: {"distance": jnp.max(jnp.abs(w - 1.0))},
        evaluate_every=3,
    )
    assert result.reason is StopReason.REACHED
    np.testing.assert_allclose(result.history["distance"], [np.nan, np.nan, 0.25])
    assert run(plateau("loss", 5)).reason is StopReason.PLATEAU


@pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
def test_steps_that_are_not_finite_stop_it_and_change_nothing():
    batches = [jnp.ones(2)] * 2 + [jnp.full(2, jnp.nan)] * 5
    result = run(nonfinite(3) | max_steps(50), batches=batches)
    assert result.reason is StopReason.NONFINITE
    np.testing.assert_array_equal(result.state.params, [0.5, 0.5])
    np.testing.assert_array_equal(result.history["num_skipped"], [0, 0, 1, 2, 3])


@pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
def test_training_that_goes_on_counts_only_the_skipped_steps_of_its_own():
    step, state = problem()
    one, bad = jnp.ones(2), jnp.full(2, jnp.nan)
    first = fit(step, state, [bad, one] * 3, stop=nonfinite(3), progress=False)
    assert first.reason is StopReason.DATA_ENDED
    then = fit(step, first.state, [one] * 4, stop=nonfinite(3), progress=False)
    assert then.reason is StopReason.DATA_ENDED
    assert then.history["num_skipped"].tolist() == [3, 3, 3, 3]  # as the state has it
    last = fit(step, then.state, [bad] * 4, stop=nonfinite(3), progress=False)
    assert last.reason is StopReason.NONFINITE
    assert last.history["num_skipped"].tolist() == [4, 5, 6]


def test_without_a_period_the_evaluation_is_that_of_the_end():
    seen = []
    result = run(
        max_steps(3),
        evaluate=lambda w: {"weight": w[0]},
        on_log=lambda step, numbers: seen.append((step, numbers)),
    )
    np.testing.assert_allclose(result.history["weight"], [np.nan, np.nan, 0.75])
    assert [step for step, _ in seen] == [1, 2, 3, 3]
    assert seen[-1][1] == {"weight": 0.75}


def test_history_has_the_numbers_of_the_transforms():
    step, state = problem(
        jaxclip.skip_nonfinite(jaxclip.sign_sgd(0.25))  # any state with statistics
    )
    result = fit(step, state, [jnp.ones(2)] * 3, stop=max_steps(3), progress=False)
    assert "skip_nonfinite/num_skipped" in result.history
    assert all(len(column) == 3 for column in result.history.values())


def test_the_loop_gives_what_steps_by_hand_give():
    step, state = problem()
    for _ in range(5):
        state, _ = step(state, jnp.ones(2))
    jax.tree.map(np.testing.assert_array_equal, run(max_steps(5)).state, state)


def test_a_log_of_json_lines_has_a_line_a_step(tmp_path):
    path = tmp_path / "log.jsonl"
    run(max_steps(3), on_log=jaxclip.training.log_to_jsonl(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["loss"] == 2.0


def test_a_bar_is_shown_on_a_terminal_only(capsys, monkeypatch):
    step, state = problem()
    fit(step, state, [jnp.ones(2)] * 3, stop=max_steps(3))
    assert capsys.readouterr().out == ""
    rich = pytest.importorskip("rich")
    console = rich.console.Console(force_terminal=True, width=120)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    step, state = problem()
    fit(step, state, [jnp.ones(2)] * 3, stop=max_steps(3))
    out = capsys.readouterr().out
    assert "3 steps" in out
    assert "loss" in out


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"stop": 100}, TypeError, "stop"),
        ({"stop": max_steps(3), "check_every": 0}, ValueError, "check_every"),
        ({"stop": max_steps(3), "evaluate_every": 1.5}, ValueError, "evaluate_every"),
        ({"stop": max_steps(3), "checkpoint_every": 2}, ValueError, "checkpoint_dir"),
        ({"stop": reached("acuracy", 0.9)}, ValueError, "acuracy"),
        ({"stop": max_steps(3), "evaluate": lambda w: 3.0, "evaluate_every": 1}, TypeError, "dict"),
        (
            {"stop": max_steps(3), "evaluate": lambda w: {"loss": 1.0}, "evaluate_every": 1},
            ValueError,
            "loss",
        ),
        (
            {"stop": max_steps(3), "evaluate": lambda w: {"weights": w}, "evaluate_every": 1},
            ValueError,
            r"scalars, 'weights' has shape \(2,\)",
        ),
    ],
)
def test_a_wrong_argument_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        run(**arguments)


# --- Signals and kills ----------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_after_the_step_and_handlers_come_back(number):
    before = signal.getsignal(number)

    def batches():
        for i in range(20):
            if i == 3:
                os.kill(os.getpid(), number)
            yield jnp.ones(2)

    result = run(max_steps(10), batches=batches())
    assert result.reason is StopReason.INTERRUPTED
    assert int(result.state.step) == 3
    assert signal.getsignal(number) is before


@pytest.mark.thorough
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    tx = jaxclip.lion(0.01, sign=jaxclip.sign.stochastic_sign(jax.random.key(7)))
    step = jaxclip.make_train_step(loss_fn, tx)
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(x, jnp.float32) for x in rng.normal(size=(12, 2))]

    def go(limit, **arguments):
        state = jaxclip.TrainState.create(jnp.zeros(2), tx, key=jax.random.key(1))
        stop = max_steps(limit) | plateau("loss", 50)
        return fit(step, state, batches, stop=stop, progress=False, **arguments)

    whole = go(10)
    go(6, checkpoint_dir=tmp_path, checkpoint_every=4)
    resumed = go(10, checkpoint_dir=tmp_path)
    assert resumed.history["step"].tolist() == [7, 8, 9, 10]
    np.testing.assert_array_equal(resumed.history["loss"], whole.history["loss"][6:])
    for a, b in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True):
        a, b = (
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (a, b)
        )
        np.testing.assert_array_equal(a, b)
    again = go(10, checkpoint_dir=tmp_path)
    assert again.reason is StopReason.MAX_STEPS
    assert int(again.state.step) == 10


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*skipped:RuntimeWarning")
def test_a_restart_counts_skipped_steps_as_the_run_left_alone_does(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    step, state = problem()
    one, bad = jnp.ones(2), jnp.full(2, jnp.nan)
    skipping = fit(step, state, [bad] * 5, stop=max_steps(5), progress=False).state
    batches = [one, bad, bad, one, bad, bad, bad, one]

    def go(count, **arguments):
        state = jax.tree.map(jnp.copy, skipping)
        stop = nonfinite(3)
        return fit(step, state, batches[:count], stop=stop, progress=False, **arguments)

    whole = go(8)
    assert whole.reason is StopReason.NONFINITE
    assert int(whole.state.step) == 5 + 7
    for count in (3, 6):  # one in the middle of a row, each goes on from the last
        assert go(count, checkpoint_dir=tmp_path).reason is StopReason.DATA_ENDED
    resumed = go(8, checkpoint_dir=tmp_path)
    assert resumed.reason is StopReason.NONFINITE
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)


# After four steps of a falling loss come steps of a larger one: how many until a rule stops.
LATER_RULES = {
    "the same": (plateau("loss", 3), StopReason.PLATEAU, 3),
    "joined, with more patience": (
        max_steps(99) | reached("loss", 0.0, mode="min") | plateau("loss", 5),
        StopReason.PLATEAU,
        5,
    ),
    "of another margin": (plateau("loss", 3, 100.0), StopReason.PLATEAU, 4),
    "of another metric": (plateau("size", 3), StopReason.PLATEAU, 4),
    "of another kind": (nonfinite(2) | max_steps(6), StopReason.MAX_STEPS, 2),
}


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    pytest.importorskip("orbax.checkpoint")
    directory = tmp_path_factory.mktemp("four steps")
    run(plateau("loss", 3), batches=[jnp.ones(2)] * 4, checkpoint_dir=directory)
    return directory


@pytest.mark.parametrize("name", LATER_RULES)
def test_a_rule_goes_on_with_what_it_remembers_and_another_begins_anew(name, four_steps, tmp_path):
    directory = shutil.copytree(four_steps, tmp_path / "copy")
    rule, reason, num_steps = LATER_RULES[name]
    found = run(
        rule,
        batches=[jnp.ones(2)] * 4 + [jnp.full(2, 9.0)] * 9,
        evaluate=lambda w: {"size": jnp.max(w)},
        evaluate_every=1,
        checkpoint_dir=directory,
    )
    assert found.reason is reason
    assert found.history["step"].tolist() == list(range(5, 5 + num_steps))


SCRIPT = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import jaxclip

directory, pause = sys.argv[1], float(sys.argv[2])


def batches(position):
    for i in range(position, 40):
        time.sleep(pause)
        yield jnp.asarray(np.random.default_rng(i).normal(size=3), jnp.float32)


tx = jaxclip.lion(0.01)
step = jaxclip.make_train_step(lambda w, x: jnp.sum((w - x) ** 2), tx, weight_threshold=0.05)
state = jaxclip.TrainState.create(jnp.zeros(3), tx, key=jax.random.key(0))
print("begun", flush=True)
result = jaxclip.fit(
    step, state, batches, stop=jaxclip.max_steps(30), progress=False,
    checkpoint_dir=directory, checkpoint_every=1,
)
digest = np.asarray(result.state.params).tobytes() + np.asarray(
    jax.tree.leaves(result.state.opt_state)[0]
).tobytes()
print(result.reason.name, int(result.state.step), digest.hex(), flush=True)
"""


def start(directory, pause):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_a_killed_run_ends_as_the_one_that_was_left_alone(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    out, errors = start(tmp_path / "whole", 0.0).communicate(timeout=200)
    assert "MAX_STEPS 30" in out, errors[-2000:]
    rng = np.random.default_rng(0)
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(tmp_path / "killed", 0.05)
        assert process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0.5, 2.0))
        process.send_signal(number)
        rest, _ = process.communicate(timeout=100)
        if number == signal.SIGTERM and rest:
            assert "INTERRUPTED" in rest or "MAX_STEPS" in rest
    resumed, errors = start(tmp_path / "killed", 0.0).communicate(timeout=200)
    assert resumed == out, errors[-2000:]


@pytest.mark.thorough
def test_on_several_devices_of_a_cpu_no_two_steps_are_under_way():
    # They may stop each other for good, whereupon XLA ends the process.
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put({name: np.ones((256, 256), np.float32) / 16 for name in "ab"}, split)
    batch = jax.device_put(np.ones((128, 256), np.float32), split)
    tx = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(1e-3))
    step = jaxclip.make_train_step(
        lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"]) ** 2), tx, weight_threshold=0.1
    )
    state = jaxclip.TrainState.create(params, tx)
    were_ready = []

    def watched(state, batch):
        were_ready.append(state.params["a"].is_ready())
        return step(state, batch)

    result = fit(watched, state, [batch] * 8, stop=max_steps(8), check_every=8, progress=False)
    assert were_ready == [True] * 8
    assert result.state.params["a"].sharding.is_equivalent_to(split, 2)
