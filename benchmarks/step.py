"""Time and memory of the optimizer part of a train step, beside optax's in the same run.

    python benchmarks/step.py [--layers 12] [--rounds 7]

The tree is that of GPT-2 small: 124 million float32 parameters in 148 leaves. Gradients are
given, so that nothing but clip, optimizer, box, telemetry and the decision to skip is timed.
Every step donates its state. The limit is that of memory: the passes over the tree that cannot
be avoided (once for the norm, then gradient, parameters and moments in, parameters and moments
out), at the speed of a donated `a * x + b` on an array as large, measured in the same rounds.
Runs alternate; medians, and the spread from the first to the third quartile.
"""

import argparse
import math
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import jaxclip

BOX = 0.1


def gpt2_shapes(num_layers, width=768, vocabulary=50257, context=1024):
    shapes = {"wte": (vocabulary, width), "wpe": (context, width), "ln": (width,), "lnb": (width,)}
    for i in range(num_layers):
        for name, outputs, inputs in [("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)]:
            shapes[f"{i}/{name}"] = (inputs * width, outputs * width)
            shapes[f"{i}/{name}_bias"] = (outputs * width,)
        for name in ("ln_1", "ln_1_bias", "ln_2", "ln_2_bias"):
            shapes[f"{i}/{name}"] = (width,)
    return shapes


@jax.custom_vjp
def given_gradients(params, grads):
    return jnp.zeros((), jnp.float32)


given_gradients.defvjp(
    lambda params, grads: (jnp.zeros((), jnp.float32), grads), lambda grads, _: (grads, None)
)


def ours(optimizer):
    step = jaxclip.make_train_step(given_gradients, optimizer, weight_threshold=BOX)

    def start(params):
        return jaxclip.TrainState.create(params, optimizer)

    return start, lambda state, grads: step(state, grads)[0], step.lower


def theirs(optimizer, options=None):
    """optax as users chain it, and a box."""

    def step(state, grads):
        params, opt_state = state
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda w: jnp.clip(w, -BOX, BOX), params), opt_state

    jitted = jax.jit(step, donate_argnums=0, compiler_options=options)
    return lambda p: (jax.tree.map(jnp.copy, p), optimizer.init(p)), jitted, jitted.lower


def cases():
    clip, theirs_clip = jaxclip.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
    region = {"xla_cpu_copy_insertion_use_region_analysis": True}
    options = region if jax.default_backend() == "cpu" else None
    their_lion = optax.chain(theirs_clip, optax.lion(1e-4, weight_decay=0.1))
    our_lion = optax.chain(clip, jaxclip.lion(1e-4, weight_decay=0.1))
    adamw = optax.adamw(1e-4)
    agc = 0.01
    return {
        # name: (numbers of moments, start and step)
        "clip, Lion: jaxclip": (1, ours(our_lion)),
        "clip, Lion: optax": (1, theirs(their_lion)),
        "clip, Lion: optax, same option": (1, theirs(their_lion, options)),
        "clip, AdamW: jaxclip": (2, ours(optax.chain(clip, adamw))),
        "clip, AdamW: optax": (2, theirs(optax.chain(theirs_clip, adamw))),
        "AGC, Lion: jaxclip": (
            1,
            ours(optax.chain(jaxclip.adaptive_grad_clip(agc), jaxclip.lion(1e-4))),
        ),
        "AGC, Lion: optax": (
            1,
            theirs(optax.chain(optax.adaptive_grad_clip(agc), optax.lion(1e-4))),
        ),
        "skip(autoclip, Lion): jaxclip": (
            1,
            ours(jaxclip.skip_nonfinite(optax.chain(jaxclip.autoclip(), jaxclip.lion(1e-4)))),
        ),
    }


class Run:
    """A state that a step replaces again and again, timed."""

    def __init__(self, state, step):
        self.state, self.step, self.seconds = state, step, []

    def advance(self, *arguments):
        start = time.perf_counter()
        self.state = jax.block_until_ready(self.step(self.state, *arguments))
        self.seconds.append(time.perf_counter() - start)

    def quartiles(self):
        return statistics.quantiles(self.seconds[1:], n=4)  # the first is compiled


def print_group(group, params, grads, rounds, copy):
    runs, used = {}, {}
    for name, (num_moments, (start, step, lower)) in group.items():
        runs[name] = num_moments, Run(start(params), step)
        program = lower(runs[name][1].state, grads).compile()
        used[name] = program.memory_analysis().temp_size_in_bytes / 2**20
    for _ in range(rounds + 1):
        for _, run in runs.values():
            run.advance(grads)
        copy.advance(jnp.ones(()))
    one_pass = copy.quartiles()[1] / 2  # the copy reads and writes
    for name, (num_moments, run) in runs.items():
        low, middle, high = run.quartiles()
        limit = one_pass * (4 + 2 * num_moments)
        spread = f"({low * 1e3:.0f}-{high * 1e3:.0f})"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{name:<32} {middle * 1e3:>7.0f} {spread:>13} {middle / limit:>9.2f} "
            f"{used[name]:>8.1f} MB {peak:>5.1f} GB",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    shapes = gpt2_shapes(arguments.layers)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = jax.jit(lambda k, s: 0.02 * jax.random.normal(k, s), static_argnums=1)
    params = {n: draw(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    grads = jax.tree.map(lambda w: 0.3 * w, params)
    size = sum(math.prod(s) for s in shapes.values())

    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{len(shapes)} leaves, {size / 1e6:.1f} M float32; {arguments.rounds} rounds")
    print(f"{'case':<32} {'ms':>7} {'quartiles':>13} {'to limit':>9} {'temporary':>11} {'peak':>8}")
    copy = Run(jnp.zeros(size), jax.jit(lambda a, x: a * 0.999 + x, donate_argnums=0))
    for name in ("clip, Lion", "clip, AdamW", "AGC", "skip"):
        copy.seconds = []
        group = {n: case for n, case in cases().items() if n.startswith(name)}
        print_group(group, params, grads, arguments.rounds, copy)


if __name__ == "__main__":
    main()
