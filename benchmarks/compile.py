"""Seconds to trace and to compile a transform or a train step with many leaves, beside optax.

    python benchmarks/compile.py [--leaves 200] [--rounds 3] [--case NAME]

The leaves are of (64, 64), in float32. Seconds are of the process's CPU time, because XLA compiles
in threads and machines are shared. "x" is the ratio of tracing and compiling together to optax's.
Cases of a group take turns, each with jax's caches cleared; medians. "Operations" are those that
jax hands to XLA, "kernels" the distinct ones in the compiled program.
"""

import argparse
import re
import statistics
import time

import jax
import optax
import step_cases

import jaxclip


def update_only(optimizer):
    """A transform alone, as a program of gradients, state and parameters."""
    optimizer = optax.with_extra_args_support(optimizer)
    jitted = jax.jit(lambda grads, state, params: optimizer.update(grads, state, params))
    return lambda params, grads: jitted.lower(grads, optimizer.init(params), params)


def whole_step(case):
    return lambda params, grads: case.lower(case.start(params, grads), grads)


def groups():
    """For each group a peer, and what is compared with it."""
    our_chain = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(1e-4, weight_decay=0.1))
    their_chain = optax.chain(optax.clip_by_global_norm(1.0), optax.lion(1e-4, weight_decay=0.1))
    transforms = {
        "sign": (optax.scale_by_sign(), jaxclip.scale_by_sign()),
        "Lion": (optax.scale_by_lion(), jaxclip.scale_by_lion()),
        "value": (optax.clip(1.0), jaxclip.gradients.clip_by_value(1.0)),
        "global norm": (optax.clip_by_global_norm(1.0), jaxclip.clip_by_global_norm(1.0)),
        "block RMS": (optax.clip_by_block_rms(1.0), jaxclip.gradients.clip_by_block_rms(1.0)),
        "AGC": (optax.adaptive_grad_clip(0.01), jaxclip.adaptive_grad_clip(0.01)),
    }
    pairs = {
        name: {"optax": update_only(theirs), "jaxclip": update_only(ours)}
        for name, (theirs, ours) in transforms.items()
    }
    boxless = step_cases.ours(our_chain, box=None)
    return pairs | {
        "step": {
            "optax": whole_step(step_cases.theirs(their_chain)),
            "jaxclip": whole_step(step_cases.ours(our_chain)),
            "jaxclip, no box": whole_step(boxless),
        }
    }


def measure(lower, params, grads):
    """CPU seconds of tracing and of compiling, operations and kernels."""
    jax.clear_caches()
    start = time.process_time()
    lowered = lower(params, grads)
    traced = time.process_time()
    compiled = lowered.compile()
    done = time.process_time()
    num_operations = lowered.as_text().count(" = ")
    return traced - start, done - traced, num_operations, num_kernels(compiled.as_text())


def num_kernels(program):
    """The number of fused computations that differ in more than names."""
    bodies = re.findall(r"^%\S*fused_computation\S* \(.*?\{\n(.*?)^\}", program, re.M | re.S)
    return len({re.sub(r"%[\w.\-]+|metadata=\{.*?\}", "", body) for body in bodies})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", default="", help="only groups whose name has this in it")
    options = parser.parse_args()
    shapes = {str(i): (64, 64) for i in range(options.leaves)}
    params, grads = step_cases.make_tree(shapes, "float32")
    print(f"jax {jax.__version__}, optax {optax.__version__}, {options.leaves} leaves")
    print(f"{'':<28} {'trace s':>8} {'compile s':>10} {'x':>6} {'operations':>11} {'kernels':>8}")
    for name, cases in groups().items():
        if options.case not in name:
            continue
        runs = {case: [] for case in cases}
        for _ in range(options.rounds + 1):  # the first round imports
            for case, lower in cases.items():
                runs[case].append(measure(lower, params, grads))
        medians = {
            case: [statistics.median(column) for column in zip(*rows[1:], strict=True)]
            for case, rows in runs.items()
        }
        base = sum(medians["optax"][:2])
        for case, (traced, compiled, operations, kernels) in medians.items():
            ratio = (traced + compiled) / base
            print(
                f"{name + ': ' + case:<28} {traced:>8.2f} {compiled:>10.2f} {ratio:>6.2f} "
                f"{operations:>11,.0f} {kernels:>8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
