"""Two processes, one batch: a step is that of one process, and a NaN in one is skipped by both."""

import os
import socket
import subprocess
import sys

import pytest

START = """
import sys

import jax

rank, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(
    coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=rank,
    initialization_timeout=60, heartbeat_timeout_seconds=10,
)

import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 4
"""

END = """
multihost_utils.sync_global_devices("done")
jax.distributed.shutdown()
"""

SKIPS = """
from jaxclip.gradients import guards

tx = {
    "skip_nonfinite": guards.skip_nonfinite(optax.adam(0.1)),
    "skip_or_clip": guards.skip_or_clip(optax.adam(0.1), drop_norm=1e3, max_norm=1.0),
}
params = jax.device_put({"w": jnp.arange(3.0)}, NamedSharding(mesh, P()))


def loss_fn(params, x):
    return jnp.mean((x @ params["w"] - 1.0) ** 2)


for name, optimizer in tx.items():

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(loss_fn)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    p, state, rng = params, jax.jit(optimizer.init)(params), np.random.default_rng(rank)
    for i in range(4):
        x = rng.standard_normal((4, 3)).astype(np.float32)
        if i == 2 and rank == 1:
            x[3, 1] = np.nan
        p, state = step(
            p, state, jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), x)
        )
        digest = np.asarray(p["w"]).tobytes().hex()
        print(name, i, int(state.num_skipped), digest, flush=True)
"""

STEPS = """
import jaxclip

box = 0.25
tx = optax.chain(jaxclip.clip_by_global_norm(0.5), jaxclip.lion(2.0**-5))


def loss_fn(params, batch):
    return jnp.mean((batch @ params["w"] + params["b"]) ** 4)


def train(mesh, spec):
    put = lambda x, spec: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, spec), lambda i: x[i]
    )
    rng = np.random.default_rng(0)
    params = {"w": 0.2 * rng.standard_normal((8, 4)), "b": np.full(4, 0.1)}
    params = {k: put(v.astype(np.float32), spec if k == "w" else P()) for k, v in params.items()}
    # A key, to see that it can go to all devices; the loss takes none.
    state = jaxclip.TrainState.create(params, tx, key=jax.random.key(0))
    step = jaxclip.make_train_step(loss_fn, tx, weight_threshold=box)
    rows = []
    for i in range(5):
        batch = rng.standard_normal((16, 8)).astype(np.float32)
        if i == 2:
            batch[15, 0] = np.nan  # in the last shard, of the second process
        state, info = jax.block_until_ready(step(state, put(batch, P("data"))))
        for shard in state.params["w"].addressable_shards:
            assert (abs(np.asarray(shard.data)) <= box).all()
        whole = jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, P()))(
            (state.params, state.opt_state[1][0].mu, info.loss, info.stats, info.weight_clip_rate)
        )
        leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(whole)]
        rows.append((int(info.num_skipped), np.concatenate(leaves).astype(np.float64)))
    return rows


alone = train(Mesh(np.array(jax.local_devices()[:1]), ("data",)), P())
for spec in (P(), P("data")):
    for i, (one, many) in enumerate(zip(alone, train(mesh, spec), strict=True)):
        assert one[0] == many[0]
        if i == 2:  # its loss is NaN, the rest as before
            one, many = ((n, x[np.isfinite(x)]) for n, x in (one, many))
        ulps = abs(one[1] - many[1]).max() * 2**23
        print("step", i, many[0], ulps, many[1].tobytes().hex(), flush=True)
"""


def run_both(script: str, timeout: float = 120.0) -> list[str]:
    """What the two processes print; both are gone when this returns or raises."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(2)
    ]
    try:
        results = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    for p, (_, errors) in zip(processes, results, strict=True):
        assert p.returncode == 0, errors[-2000:]
    # Without what gloo says.
    return [
        "\n".join(line for line in output.splitlines() if line.startswith(("skip_", "step")))
        for output, _ in results
    ]


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_both_processes_skip_the_step_at_which_one_has_a_nan():
    first, second = run_both(START + SKIPS + END)
    assert first == second
    lines = [line.split() for line in first.splitlines()]
    assert [line[0] for line in lines] == ["skip_nonfinite"] * 4 + ["skip_or_clip"] * 4
    for rows in (lines[:4], lines[4:]):
        assert [int(row[2]) for row in rows] == [0, 0, 1, 1]
        digests = [row[3] for row in rows]
        assert digests[1] == digests[2]
        assert len(set(digests)) == 3


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_a_step_of_two_processes_is_that_of_one_with_a_nan_on_one_host():
    first, second = run_both(START + STEPS + END)
    assert first == second
    lines = [line.split() for line in first.splitlines()]
    assert [int(line[2]) for line in lines] == 2 * [0, 0, 1, 1, 1]
    # Of numbers about 1; sums over the batch are added up in another order.
    assert max(float(line[3]) for line in lines) <= 16
