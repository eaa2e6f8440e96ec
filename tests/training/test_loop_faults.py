"""What ends or disturbs a loop: errors, signals, damaged checkpoints, bad gradients."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip import fit, max_steps
from jaxclip.training import StopReason, log_to_jsonl
from jaxclip.training.runs import Run, RunStore
from oracles.small_sweeps import run_small

TX = jaxclip.sign_sgd(0.25)
STEP = jaxclip.make_train_step(lambda w, target: jnp.sum((w - target) ** 2), TX)


def run(num_steps=6, *, batches=None, **arguments):
    state = jaxclip.TrainState.create(jnp.zeros(2), TX)
    batches = [jnp.ones(2)] * 20 if batches is None else batches
    return fit(STEP, state, batches, stop=max_steps(num_steps), progress=False, **arguments)


# --- Errors ---------------------------------------------------------------------------


def failing(step_of_error):
    def fail(step, *_):
        if step == step_of_error:
            raise RuntimeError("no more space")

    return fail


def failing_batches():
    yield from [jnp.ones(2)] * 3
    raise RuntimeError("no more space")


def batches_that_hang_until_a_second_interrupt():
    yield from [jnp.ones(2)] * 3
    for _ in range(2):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interruptible():
    """Python's handler of SIGINT, which shells ignore for what they start in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", ["on_log", "evaluate", "data", "exit", "interrupts"])
def test_an_error_outside_of_the_step_leaves_a_checkpoint(place, tmp_path, interruptible):
    pytest.importorskip("orbax.checkpoint")
    arguments = {
        "on_log": {"on_log": failing(3)},
        "evaluate": {"evaluate": lambda w: failing(0.75)(float(w[0])) or {"w": 1}},
        "data": {"batches": failing_batches()},
        "exit": {"on_log": lambda step, _: exit(3) if step == 3 else None},
        "interrupts": {"batches": batches_that_hang_until_a_second_interrupt()},
    }[place]
    if place == "evaluate":
        arguments["evaluate_every"] = 1
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)) as caught:
        run(checkpoint_dir=tmp_path, **arguments)
    assert caught.value.__notes__ == [f"The run is saved in '{tmp_path}', after step 3."]
    resumed = run(checkpoint_dir=tmp_path)
    assert resumed.history["step"].tolist() == [4, 5, 6]
    np.testing.assert_array_equal(resumed.state.params, run().state.params)


def test_a_folder_that_cannot_hold_checkpoints_is_refused_before_the_first_step(
    tmp_path, monkeypatch
):
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="checkpoint_dir must be a folder"):
        run(checkpoint_dir="file", batches=failing_batches())
    with pytest.raises(ValueError, match="checkpoint_dir 'nowhere://a/b' cannot be opened"):
        run(checkpoint_dir="nowhere://a/b", batches=failing_batches())
    assert os.listdir() == ["file"]


# --- Signals --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_the_user_chooses_the_signals(number):
    before = signal.getsignal(number)

    def on_log(step, _):
        if step == 2:
            os.kill(os.getpid(), number)

    found = run(on_log=on_log, stop_signals=(number, signal.SIGTERM))
    assert (found.reason, int(found.state.step)) == (StopReason.INTERRUPTED, 2)
    assert signal.getsignal(number) is before
    with pytest.raises(ValueError, match="stop_signals has SIGKILL, which no program can handle"):
        run(stop_signals=[signal.SIGKILL])
    with pytest.raises(ValueError, match="stop_signals has 1234, which is no signal"):
        run(stop_signals=[1234])


@pytest.mark.parametrize("place", ["last step", "last evaluation"])
def test_a_signal_at_the_very_end_is_the_reason(place):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"size": 1.0}

    found = run(2, **({"on_log": lambda step, _: step < 2 or interrupt()}
                      if place == "last step" else {"evaluate": interrupt}))  # fmt: skip
    assert (found.reason, int(found.state.step)) == (StopReason.INTERRUPTED, 2)


# --- Checkpoints ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    pytest.importorskip("orbax.checkpoint")
    folder = tmp_path_factory.mktemp("two checkpoints")
    run(4, checkpoint_dir=folder, checkpoint_every=2)
    return folder


def cut_facts(step):
    (step / "facts" / "metadata").write_text('{"posi')


def cut_arrays(step):
    for file in (step / "run").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "facts cut": cut_facts,
    "facts gone": lambda step: shutil.rmtree(step / "facts"),
    "arrays cut": cut_arrays,
    "description cut": lambda step: (step / "run" / "_METADATA").write_text("{"),
    "empty": lambda step: [shutil.rmtree(step), step.mkdir()],
}


# The first bad array ends orbax's event loop; reads of the others that end later complain of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_is_used(
    damage, two_checkpoints, tmp_path
):
    folder = shutil.copytree(two_checkpoints, tmp_path / "run")
    DAMAGES[damage](folder / "4")
    with pytest.warns(
        RuntimeWarning, match="it is now 'damaged-4', and the run goes on from step 2"
    ):
        found = run(6, checkpoint_dir=folder, checkpoint_every=1)
    assert found.history["step"].tolist() == [3, 4, 5, 6]
    assert {"5", "6", "damaged-4"} == set(os.listdir(folder))


def test_a_folder_without_a_checkpoint_of_ours_is_refused_with_a_sentence(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    (tmp_path / "12").mkdir()
    with pytest.raises(
        ValueError, match="no checkpoint of `fit` that can be read: that of step 12"
    ):
        run(checkpoint_dir=tmp_path)
    assert os.listdir(tmp_path) == ["12"]


@pytest.mark.parametrize(
    ("params", "tx", "match"),
    [
        (jnp.zeros(3), TX, r"'params' is float32 \[2\] in it, but float32 \[3\] in the state"),
        (jnp.zeros(2, jnp.bfloat16), TX, "'params' is float32 .* but bfloat16"),
        ({"w": jnp.zeros(2)}, TX, "it lacks 'params/w'"),
        (jnp.zeros(2), optax.adam(0.1), "it lacks 'opt_state"),
        (jnp.zeros(2), optax.sgd(0.1), "it has 'opt_state/.*', which the state lacks"),
    ],
    ids=["shape", "dtype", "tree", "optimizer", "smaller optimizer"],
)
def test_a_checkpoint_of_another_state_is_refused_by_its_first_difference(
    params, tx, match, two_checkpoints
):
    before = sorted(os.listdir(two_checkpoints))
    state = jaxclip.TrainState.create(params, tx)
    with RunStore(two_checkpoints) as store, pytest.raises(ValueError, match=match):
        store.restore(Run(state, (), 0, 0))
    assert sorted(os.listdir(two_checkpoints)) == before


# --- The best parameters --------------------------------------------------------------


def distance(w):
    return {"distance": jnp.abs(w[0] - 0.5), "closeness": -jnp.abs(w[0] - 0.5)}


@pytest.mark.parametrize(("metric", "mode"), [("closeness", "max"), ("distance", "min")])
def test_the_best_parameters_are_kept_also_over_a_restart(metric, mode, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    arguments = {"evaluate": distance, "evaluate_every": 1, "keep_best": metric, "best_mode": mode}
    for folder, steps in ((None, (5,)), (tmp_path, (3, 5))):
        for num_steps in steps:
            found = run(num_steps, checkpoint_dir=folder, **arguments)
        assert (found.best.step, found.best.value) == (2, 0.0)
        np.testing.assert_array_equal(found.best.params, [0.5, 0.5])
    assert run(2).best is None


def test_a_best_metric_that_nothing_measures_is_refused():
    with pytest.raises(ValueError, match="give evaluate"):
        run(keep_best="accuracy")
    with pytest.raises(ValueError, match="keep_best is 'acuracy'"):
        run(keep_best="acuracy", evaluate=distance, evaluate_every=1)
    with pytest.raises(ValueError, match="best_mode"):
        run(keep_best="distance", evaluate=distance, best_mode="smallest")


# --- Metrics and warnings -------------------------------------------------------------


def test_the_log_has_aux_gradient_norm_and_learning_rate_each_once():
    def loss_fn(w, target):
        loss = jnp.sum((w - target) ** 2)
        more = {"count": jnp.int32(3)}
        return loss, {"half": loss / 2, "all": w, "more": more, "a": {"b": 4.0}, "a/b": loss}

    def rate(step):
        return 0.25 / (1 + step.astype(jnp.float32))

    tx = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(rate))
    step, rows = jaxclip.make_train_step(loss_fn, tx, has_aux=True), []
    state = jaxclip.TrainState.create(jnp.zeros(2), tx)
    found = fit(
        step, state, [jnp.ones(2)] * 2, stop=max_steps(2), progress=False,
        on_log=lambda _, row: rows.append(row), evaluate=lambda w: {"half": w[0]},
    )  # fmt: skip
    names = [*rows[0]]
    assert names[:5] == ["loss", "grad_norm", "learning_rate", "weight_clip_rate", "num_skipped"]
    assert names[-4:] == ["aux/['a']['b']", "aux/['a/b']", "aux/half", "aux/more/count"]
    assert [name for name in names if "pre_norm" in name] == ["clip_by_global_norm/pre_norm"]
    np.testing.assert_allclose(found.history["aux/half"], found.history["loss"] / 2)
    np.testing.assert_allclose(found.history["learning_rate"], [0.25, 0.125])
    np.testing.assert_allclose(found.history["grad_norm"][0], np.sqrt(8), rtol=1e-6)
    np.testing.assert_array_equal(found.history["pre_norm"], found.history["grad_norm"])


def test_skipped_steps_and_bad_gradients_of_frozen_leaves_are_said():
    def loss_fn(params, batch):
        # 0, with a slope of infinity in the leaf that the batch names
        traps = {k: jnp.sqrt(batch[k] * (p[0] - jax.lax.stop_gradient(p[0])) + (1 - batch[k]))
                 for k, p in params.items()}  # fmt: skip
        return sum(jnp.sum(p) for p in params.values()) + sum(traps.values())

    labels = {"a": "train", "b": "frozen"}
    tx = optax.partition({"train": jaxclip.lion(0.1), "frozen": optax.set_to_zero()}, labels)
    step = jaxclip.make_train_step(loss_fn, tx)
    none = {"a": jnp.float32(0), "b": jnp.float32(0)}
    one = jnp.float32(1)
    batches = [none, none | {"b": one}, none | {"a": one}, none | {"a": one}, none]
    state = jaxclip.TrainState.create({"a": jnp.ones(2), "b": jnp.ones(2)}, tx)
    with pytest.warns(RuntimeWarning) as warned:
        found = fit(step, state, batches, stop=max_steps(5), progress=False)
    frozen, skipped, summary = (str(w.message) for w in warned)
    assert frozen.startswith("the gradient of 'b' is not finite at step 2. The leaf is frozen")
    assert skipped.startswith("step 3 was skipped, because the gradient of 'a' is not finite")
    assert summary.startswith("2 of 5 steps were skipped")
    assert found.history["num_skipped"].tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo', [1]),
        (b'{"st', []),
        (b'{"step": 1, "loss": 2.0}', [1]),
        (b"", []),
    ],
)
def test_a_log_of_json_lines_goes_on_behind_a_record_that_was_cut_short(before, kept, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(before)
    log_to_jsonl(path)(3, {"loss": 0.5})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [*kept, 3]


def test_a_line_that_is_no_record_is_kept(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("begun by hand")
    log_to_jsonl(path)(3, {"loss": 0.5})
    assert path.read_text() == 'begun by hand\n{"step": 3, "loss": 0.5}\n'


@pytest.mark.parametrize("path", ["gs://bucket/log.jsonl", "s3://bucket/x"])
def test_a_remote_path_becomes_no_local_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="path must be a path of the local file system"):
        log_to_jsonl(path)
    with pytest.raises(ValueError, match="directory must be a path of the local file system"):
        run_small(directory=path)
    assert os.listdir() == []
