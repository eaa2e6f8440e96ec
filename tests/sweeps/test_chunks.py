"""Chunks on disk resume a sweep; those of another sweep, or damaged ones, are refused."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent import futures

import jax
import numpy as np
import pytest

from jaxclip import checkpoints
from jaxclip._core import atomic
from jaxclip.sweeps import programs
from jaxclip.sweeps.chunks import ChunkStore
from jaxclip.sweeps.tasks import Setting, random_batches
from oracles.small_sweeps import (
    INPUTS,
    TARGETS,
    TASK,
    evaluate,
    init_fn,
    loss_fn,
    run,
    run_small,
)


def same(a, b):
    for field in dataclasses.fields(a):
        if field.name != "seconds_per_step":
            jax.tree.map(
                np.testing.assert_array_equal, getattr(a, field.name), getattr(b, field.name)
            )


@pytest.mark.thorough
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
    "step_size": {"step_sizes": [0.1, 0.2]},
    "seeds": {"seeds": [4, 5]},
    "bits": {"bits": (2,)},
    "program": {"batches": random_batches((INPUTS + 1, TARGETS), 16)},
    "chunk_size": {"chunk_size": 3},
}


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_data_inside_compiled_functions_is_part_of_the_sweep(tmp_path):
    same(run_small(directory=tmp_path), run_small(directory=tmp_path))
    for which, differs in {"loss_fn": "program", "batches": "program", "evaluate": "eval"}.items():
        with pytest.raises(ValueError, match=f"another sweep: {differs}[a-z]* differ"):
            run_small(shifted=which, directory=tmp_path)


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_a_damaged_chunk_is_an_error(tmp_path):
    small = {"thresholds": [1.0], "step_sizes": [0.1], "bits": (None,), "directory": tmp_path}
    run(**small)
    (file,) = tmp_path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    with pytest.raises(checkpoints.CheckpointError):
        run(**small)


def test_two_sweeps_on_one_folder_divide_its_chunks(tmp_path, monkeypatch):
    few = {"chunk_size": 1, "bits": (None,), "thresholds": [1.0], "directory": tmp_path}
    real, trained, second_trains = programs.Program.run, [], threading.Event()

    def listed(self, settings, *args):
        trained.append(float(settings.step_size[0]))
        if len(trained) == 1:
            others.append(pool.submit(run, **few))
            assert second_trains.wait(120)
        second_trains.set()
        return real(self, settings, *args)

    monkeypatch.setattr(programs.Program, "run", listed)
    others = []
    with futures.ThreadPoolExecutor(1) as pool:
        mine = run(**few)
    same(mine, others[0].result())
    np.testing.assert_array_equal(mine.seconds_per_step, others[0].result().seconds_per_step)
    assert trained == [0.3, 0.03]
    assert not [*tmp_path.glob("*.lock"), *tmp_path.glob("*tmp*")]


@pytest.mark.thorough
def test_where_there_are_no_locks_the_same_sweep_twice_has_one_result(tmp_path, monkeypatch):
    few = {"chunk_size": 1, "bits": (None,), "thresholds": [1.0], "directory": tmp_path}
    real, others = programs.Program.run, []
    monkeypatch.setattr(atomic, "_lock", lambda handle, wait: None)

    def overtaken(self, *args):
        trained = real(self, *args)
        if not others:  # another process trains the same chunk, and all others, and is faster
            others.append(None)
            others[0] = run(**few)
        return trained

    monkeypatch.setattr(programs.Program, "run", overtaken)
    mine = run(**few)
    same(mine, others[0])
    np.testing.assert_array_equal(mine.seconds_per_step, others[0].seconds_per_step)


def test_a_description_that_another_process_writes_first_is_compared(tmp_path, monkeypatch):
    ChunkStore(tmp_path, {"seeds": [0]})
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    ChunkStore(tmp_path, {"seeds": [0]})
    with pytest.raises(ValueError, match="another sweep: seeds"):
        ChunkStore(tmp_path, {"seeds": [1]})


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("num_steps", "chunk_size", "num_first"),
    [(4000, 1, 2), (10**9, 40, 0)],
    ids=["between chunks", "in long rows"],
)
def test_sigint_keeps_finished_chunks_and_leaves_no_partial_one(
    tmp_path, num_steps, chunk_size, num_first
):
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
            task, step_sizes=[0.001 * k for k in range(1, 41)], seeds=2, bits=(None,),
            chunk_size=int(sys.argv[3]), directory=sys.argv[1],
        )
    """)
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(num_steps), str(chunk_size)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    # The description comes just before the training of the first chunk.
    while len([*tmp_path.glob("sweep.json"), *tmp_path.glob("settings-*")]) < 1 + num_first:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0 if num_first else 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, "it was done before the signal came"
    assert "KeyboardInterrupt" in errors
    files = sorted(tmp_path.glob("*.safetensors"))
    assert num_first <= len(files) < (40 if num_first else 1)
    for file in files:
        assert checkpoints.load(file)["steps"].tolist() == [[4000, 4000]]
    assert not [f for f in tmp_path.iterdir() if "tmp" in f.name]


@pytest.mark.thorough
def test_a_memory_budget_too_small_for_one_setting_is_refused():
    with pytest.raises(ValueError, match=r"memory_budget is 1,000, but one setting .* takes"):
        run_small(memory_budget=1000)


@pytest.mark.thorough
def test_a_memory_budget_makes_chunks(result, tmp_path):
    six = Setting(None, None, np.ones(6), np.ones(6))
    needed = programs.Program(TASK, six, 6, [0, 1], jax.devices()[:1], None, 1).bytes_needed()
    chunked = run(memory_budget=int(0.7 * needed), directory=tmp_path, bits=(None,))
    assert 2 <= len(list(tmp_path.glob("*.safetensors"))) <= 3
    for mine, one in zip(
        jax.tree.leaves(chunked.params), jax.tree.leaves(result.params), strict=True
    ):
        np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-6)
