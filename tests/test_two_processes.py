"""Two processes, one batch: a NaN in the shard of one makes both skip the same step."""

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
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

from jaxclip import guards

mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 4
tx = {
    "skip_nonfinite": guards.skip_nonfinite(optax.adam(0.1), 3),
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
multihost_utils.sync_global_devices("done")
jax.distributed.shutdown()
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
    return [output[output.find("skip_") :] for output, _ in results]  # after what gloo says


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_processes_skip_the_step_at_which_one_has_a_nan():
    first, second = run_both(SCRIPT)
    assert first == second
    lines = [line.split() for line in first.splitlines()]
    assert [line[0] for line in lines] == ["skip_nonfinite"] * 4 + ["skip_or_clip"] * 4
    for rows in (lines[:4], lines[4:]):
        assert [int(row[2]) for row in rows] == [0, 0, 1, 1]
        digests = [row[3] for row in rows]
        assert digests[1] == digests[2]
        assert len(set(digests)) == 3
