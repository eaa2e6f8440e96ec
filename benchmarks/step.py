"""Time and memory of the optimizer part of a train step, beside its peers in the same run.

    python benchmarks/step.py [--case NAME] [--rounds 7] [--layers 12] [--millions 500]

Most cases step the tree of GPT-2 small: 124 million parameters in 148 leaves; "1,000 leaves" are
of (64, 64) each, "one leaf" is of 500 million. Gradients are given, so that nothing but clip,
optimizer, box, telemetry and the decision to skip is timed; with "read", the telemetry is also
fetched by the host after every step. "bfloat16" are parameters and gradients, with a float32
momentum. The cases "MLP" are whole steps, with loss and gradients, of an MLP 784-256-256-10 at
batch size 128. PyTorch is there if it is installed. Every step donates its state.

The limit is that of memory: the bytes that cannot be avoided (gradients once for the norm, then
gradients, parameters and moments in, parameters and moments out), at the speed of a donated
`a * x + b` on an array as large, measured in the same rounds. GB/s are these bytes over the time.
Cases of a group take turns; medians, and the spread from the first to the third quartile.
"Temporary" is what XLA allots beside inputs and outputs, "program" all of it with them. Each group
has a process of its own; its peak is that of the host's memory or, on a GPU, of the device's.
"""

import argparse
import itertools
import math
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_cases

import jaxclip

GIGA = 1e9


class Run:
    """A state that a step replaces again and again, timed."""

    def __init__(self, state, step):
        self.state, self.step, self.seconds = state, step, []

    def advance(self, *arguments, num_steps=1):
        start = time.perf_counter()
        for _ in range(num_steps):
            self.state = self.step(self.state, *arguments)
        jax.block_until_ready(self.state)
        self.seconds.append((time.perf_counter() - start) / num_steps)

    def quartiles(self):
        return statistics.quantiles(self.seconds[1:], n=4)  # the first is compiled


def num_bytes(tree):
    """Of the arrays of a tree; numbers about the step do not count."""
    return sum(x.nbytes for x in jax.tree.leaves(tree) if getattr(x, "ndim", 0))


def peak_bytes():
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- The optimizer part ---------------------------------------------------------------


def time_group(group, rounds):
    params, grads = step_cases.make_tree(group.shapes, group.dtype)
    size = sum(math.prod(shape) for shape in group.shapes.values())
    kind = f"{size / 1e6:.1f} M {jnp.dtype(group.dtype).name}"
    print(f"{len(group.shapes):,} leaves, {kind}, {jax.devices()[0].device_kind}")
    runs, programs = {}, {}
    for name, make in group.cases.items():
        start, step, lower = make()
        runs[name] = Run(start(params, grads), step)
        if lower:
            programs[name] = lower(runs[name].state, grads).compile().memory_analysis()
    params_bytes = num_bytes(params)
    del params
    copy = Run(jnp.zeros(size), jax.jit(lambda a, x: a * 0.999 + x, donate_argnums=0))
    for _ in range(rounds + 1):
        for run in runs.values():
            run.advance(grads)
        copy.advance(jnp.ones(()))
    speed = 2 * copy.state.nbytes / copy.quartiles()[1]
    for name, run in runs.items():
        state = 2 * params_bytes if name not in programs else num_bytes(run.state)
        needed = 2 * num_bytes(grads) + 2 * state
        low, middle, high = run.quartiles()
        spread = f"({low * 1e3:.1f}-{high * 1e3:.1f})"
        row = f"{name:<32} {middle * 1e3:>8.1f} {spread:>17} {needed / middle / GIGA:>7.1f}"
        row += f" {middle * speed / needed:>9.2f}"
        if name in programs:
            used = programs[name]
            temporary, inputs = used.temp_size_in_bytes, used.argument_size_in_bytes
            whole = temporary + inputs + used.output_size_in_bytes - used.alias_size_in_bytes
            row += f" {temporary / 2**20:>8.1f} MB {whole / 2**30:>6.2f} GB"
        print(row, flush=True)
    print(f"copy {speed / GIGA:.1f} GB/s, peak {peak_bytes() / 2**30:.1f} GB", flush=True)


# --- The whole step -------------------------------------------------------------------

STEPS_A_ROUND, TELEMETRY_EVERY, PLAIN = 64, 16, "MLP: optax.sgd"


def mlp_loss(params, batch):
    x = batch[0]
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def mlp_cases():
    sgd = optax.sgd(1e-3)
    sign_step = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(1e-3))
    train_step = jaxclip.make_train_step(mlp_loss, sign_step, weight_threshold=jaxclip.fan_in(1.0))

    def plain(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(mlp_loss)(params, batch)
        updates, opt_state = sgd.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    donated = jax.jit(plain, donate_argnums=0)

    def read(state, batch):
        state, info = train_step(state, batch)
        info.read()
        return state

    num_steps = itertools.count(1)

    def read_some(state, batch):
        state, info = train_step(state, batch)
        if next(num_steps) % TELEMETRY_EVERY == 0:
            info.read()
        return state

    def start_plain(params):
        return jax.tree.map(jnp.copy, params), sgd.init(params)

    def start_ours(params):
        return jaxclip.TrainState.create(params, sign_step)

    return {
        PLAIN: (start_plain, lambda state, batch: donated(state, batch)[0]),
        "MLP: jaxclip": (start_ours, lambda state, batch: train_step(state, batch)[0]),
        "MLP: jaxclip, read": (start_ours, read),
        f"MLP: jaxclip, read every {TELEMETRY_EVERY}th": (start_ours, read_some),
    }


def time_mlp(cases, rounds):
    rng = np.random.default_rng(0)
    sizes = [(784, 256), (256, 256), (256, 10)]
    kernels = [np.float32(rng.normal(size=s) / s[0] ** 0.5) for s in sizes]
    params = [{"kernel": jnp.asarray(k), "bias": jnp.zeros(k.shape[1])} for k in kernels]
    batch = np.float32(rng.normal(size=(128, 784))), np.int32(rng.integers(10, size=128))
    batch = jax.tree.map(jnp.asarray, batch)
    runs = {name: Run(start(params), step) for name, (start, step) in cases.items()}
    for _ in range(rounds + 1):
        for run in runs.values():
            run.advance(batch, num_steps=STEPS_A_ROUND)
    print(f"MLP 784-256-256-10, batch size 128, {STEPS_A_ROUND} steps a round")
    base = runs[PLAIN].quartiles()[1]
    for name, run in runs.items():
        low, middle, high = run.quartiles()
        spread = f"({low * 1e3:.2f}-{high * 1e3:.2f})"
        print(f"{name:<32} {middle * 1e3:>8.2f} {spread:>17} {100 * (middle / base - 1):>+7.1f} %")


# --- All of it ------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--millions", type=int, default=500, help="size of the one large leaf")
    parser.add_argument("--group", help="run this group here; without it, each in a process")
    return parser.parse_args()


def run_here(options):
    """The cases of one group, if any is wanted."""

    def wanted(cases):
        return {name: case for name, case in cases.items() if options.case in name}

    if options.group == "MLP":
        cases = mlp_cases()
        if wanted(cases):
            time_mlp({PLAIN: cases[PLAIN]} | wanted(cases), options.rounds)
        return
    group = step_cases.groups(options.layers, options.millions)[options.group]
    if cases := wanted(group.cases):
        time_group(group._replace(cases=cases), options.rounds)


def main():
    options = parse()
    if options.group:
        return run_here(options)
    # The devices are left alone here, as a GPU's memory goes to the first process that asks.
    print(f"jax {jax.__version__}, optax {optax.__version__}")
    print(
        f"{'case':<32} {'ms':>8} {'quartiles':>17} {'GB/s':>7} {'to limit':>9} "
        f"{'temporary':>11} {'program':>9}",
        flush=True,
    )
    for name in (*step_cases.groups(options.layers, options.millions), "MLP"):
        subprocess.run([sys.executable, *sys.argv, "--group", name], check=True)


if __name__ == "__main__":
    main()
