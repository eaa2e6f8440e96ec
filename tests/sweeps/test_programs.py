"""One row or all rows in a program, over devices and with either loop."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxclip
from jaxclip.sweeps import programs
from jaxclip.sweeps.compiled import fingerprint
from jaxclip.sweeps.tasks import Setting, Task
from oracles.compilations import counted
from oracles.small_sweeps import (
    TASK,
    evaluate,
    run,
    run_small,
)


@pytest.mark.thorough
def test_the_program_is_traced_once_for_any_number_of_settings_and_chunks():
    def traces(**changes):
        count = 0

        def counted(params, batch):
            nonlocal count
            count += 1
            return jnp.mean((params["w"] - batch) ** 2)

        run_small(loss_fn=counted, **changes)
        return count

    few = traces(step_sizes=[0.1])
    assert traces(step_sizes=[0.1, 0.2, 0.3, 0.4], thresholds=[1.0, 2.0], chunk_size=3) == few


def test_an_equal_sweep_compiles_nothing_and_one_with_other_data_is_not_equal():
    first = run_small(bits=(None, 4))
    with counted() as compiled:
        again = run_small(bits=(None, 4))  # of functions of its own, as a notebook makes them
    assert not compiled
    np.testing.assert_array_equal(again.metrics["error"], first.metrics["error"])
    for which in ("loss_fn", "evaluate"):
        other = run_small(bits=(None, 4), shifted=which)
        assert (other.metrics["error"] != first.metrics["error"]).all()


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


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_settings_are_divided_over_devices(result):
    many = run(devices=jax.devices(), bits=(None,))
    for mine, one in zip(jax.tree.leaves(many.params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_allclose(mine, one, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_the_settings_of_a_program_are_on_all_of_its_devices():
    task = dataclasses.replace(TASK, stop=jaxclip.max_steps(2))
    settings = Setting(None, None, np.full(16, 0.1), np.full(16, 1.0))
    program = programs.Program(task, settings, 16, [0], jax.devices(), None, 1)
    placed = []

    def listed(rows, *settings_and_keys):
        placed.append(rows.state.params["hidden"]["kernel"].sharding)
        return advance(rows, *settings_and_keys)

    advance, program._advance = program._advance, listed
    program.run(settings)
    assert len(placed) == 2
    for sharding in placed:
        assert sharding.shard_shape((16, 1, 6, 8)) == (2, 1, 6, 8)
        assert len(sharding.device_set) == len(jax.devices())


@pytest.mark.thorough
def test_convolutions_on_cpu_get_a_loop_outside_the_program():
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
    one = Setting(None, None, np.ones(1), np.ones(1))
    assert programs.Program(task, one, 1, [0], jax.devices()[:1], None, 1).loop == "host"


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_constants_of_inner_jaxprs_are_distinguished(as_array):
    def traced(data):
        inner = jax.jit(lambda x: x + as_array(np.float32([1, data])))

        def outer(x):
            x = jax.checkpoint(lambda x: lax.fori_loop(0, 3, lambda i, x: inner(x), x))(x)
            return lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)

        return jax.jit(outer).trace(jnp.ones(2))

    found = [fingerprint(traced(data)) for data in (2, 2, 3)]
    assert found[0] == found[1] != found[2]
