"""Digits on two hosts: gradients averaged in float32, or a vote of one bit a weight.

    pip install -e ".[examples]" && python examples/two_hosts.py      # two processes, this machine
    srun python examples/two_hosts.py                                 # one process of a cluster
    python examples/two_hosts.py --cluster                            # where none is noticed
    python examples/two_hosts.py --coordinator HOST:PORT --num-processes 2 --process-id 0

Without arguments and outside a cluster it starts two processes of four CPU devices each, which
talk over gloo, and ends both if one fails. Every process also trains alone, to compare.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

import digits
import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxclip

NUM_STEPS, BATCH_SIZE, BOX = 250, 128, jaxclip.fan_in(1.0)
# Set by what starts a job under Slurm or Open MPI, on a TPU slice, or by hand.
CLUSTER = ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")
CLUSTER += ("JAX_COORDINATOR_ADDRESS",)

picks = digits.draw(NUM_STEPS, BATCH_SIZE)
step_size = optax.cosine_decay_schedule(4e-3, NUM_STEPS)


# --- One process of many --------------------------------------------------------------
def put(x, mesh, spec):
    """A global array, of which every process makes the parts on its own devices."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


def put_batch(i, mesh):
    return tuple(put(x[i], mesh, P("workers")) for x in digits.train)


def start(mesh):
    params = digits.model.init(jax.random.key(0), digits.images[:1])
    return jax.tree.map(lambda x: put(x, mesh, P()), params)


def run(program, state, mesh):
    """Losses of all steps, and the last state. One step at a time, as many_devices.py says."""
    losses = []
    for i in picks:
        state, loss = jax.block_until_ready(program(state, put_batch(i, mesh)))
        losses.append(float(loss))
    return np.array(losses), state


def average(mesh):
    """The train step as on one device: XLA adds up the gradients of all workers."""
    optimizer = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(step_size))
    step = jaxclip.make_train_step(digits.loss_fn, optimizer, weight_threshold=BOX)
    state = jaxclip.TrainState.create(start(mesh), optimizer)
    program = step.lower(state, put_batch(picks[0], mesh)).compile()

    def advance(state, batch):
        state, info = program(state, batch)
        return state, info.loss

    losses, state = run(advance, state, mesh)
    return losses, state.params, program


def vote(mesh):
    """Lion with a momentum for each worker, who then vote on the sign of every weight's step."""
    optimizer = optax.chain(
        jaxclip.scale_by_lion(),
        jaxclip.sign.majority_vote("workers"),
        optax.scale_by_learning_rate(step_size),
    )

    def local_step(params, opt_state, batch):
        opt_state = jax.tree.map(lambda x: x[0], opt_state)  # this worker's own
        loss, grads = jax.value_and_grad(digits.loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jaxclip.clip_weights(optax.apply_updates(params, updates), BOX)
        return params, jax.tree.map(lambda x: x[None], opt_state), loss[None]

    specs = (P(), P("workers"), P("workers"))
    mapped = jax.shard_map(local_step, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    jitted = jax.jit(lambda state, batch: mapped(*state, batch), donate_argnums=0)
    params = start(mesh)
    alone = jax.tree.map(np.asarray, optimizer.init(jax.device_get(params)))
    opt_state = jax.tree.map(
        lambda x: put(np.broadcast_to(x, (mesh.size, *x.shape)), mesh, P("workers")), alone
    )
    program = jitted.lower((params, opt_state), put_batch(picks[0], mesh)).compile()

    def advance(state, batch):
        params, opt_state, losses = program(state, batch)
        return (params, opt_state), losses.addressable_shards[0].data[0]

    losses, (params, _) = run(advance, (params, opt_state), mesh)
    return losses, params, program


def main():
    mesh = Mesh(np.array(jax.devices()), ("workers",), axis_types=(AxisType.Auto,))
    here = Mesh(np.array(jax.local_devices()[:1]), ("workers",), axis_types=(AxisType.Auto,))
    assert BATCH_SIZE % mesh.size == 0, f"{mesh.size} workers do not share {BATCH_SIZE} examples"
    results = {"one process": average(here), "averaged": average(mesh), "voted": vote(mesh)}
    scores = {
        name: digits.accuracy(jax.device_get(params)) for name, (_, params, _) in results.items()
    }
    say = print if jax.process_index() == 0 else lambda *words, **options: None
    say(f"{jax.process_count()} processes, {mesh.size} devices: {jax.devices()[0].device_kind}")
    say("gradients      last loss  accuracy  collectives a step")
    for name, (losses, _, program) in results.items():
        moved = digits.collective_bytes(program)
        say(f"{name:<14} {losses[-10:].mean():9.4f} {scores[name]:9.4f} {moved:13,} bytes")

    alone, averaged = (results[name][0][:10] for name in ("one process", "averaged"))
    ulps = abs(averaged / alone - 1).max() * 2**23
    assert ulps <= 64, f"FAILS: the first ten losses differ by {ulps:.0f} ulps"
    assert abs(scores["averaged"] - scores["one process"]) <= 0.015, f"FAILS: {scores}"
    assert scores["voted"] >= scores["one process"] - 0.02, f"FAILS: {scores}"
    say(f"holds: ten losses agree with one process to 64 ulps (here {ulps:.0f}); the vote is")
    say("       within two points of the average")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("done")
        jax.distributed.shutdown()


# --- Two of them on this machine ------------------------------------------------------
def launch(num_processes=2):
    """Starts the processes and waits for them; if one fails, or this one is ended, all end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, __file__, "--coordinator", address]
    command += ["--num-processes", str(num_processes), "--process-id"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the `finally` below
    children = []
    try:
        for i in range(num_processes):
            children.append(subprocess.Popen([*command, str(i)], env=environment))
        while any(c.poll() is None for c in children):
            if any(c.poll() for c in children):
                break
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    sys.exit(max(abs(c.returncode) for c in children))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", action="store_true", help="let JAX find the others")
    parser.add_argument("--coordinator", help="HOST:PORT of the first process")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    arguments = parser.parse_args()
    is_one_of_many = arguments.cluster or arguments.coordinator is not None
    if not is_one_of_many and not any(name in os.environ for name in CLUSTER):
        launch()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        arguments.coordinator,
        arguments.num_processes,
        arguments.process_id,
        initialization_timeout=120,
    )
    main()
