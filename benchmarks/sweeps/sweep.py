"""What does training a grid of settings in one compiled program save?

    python benchmarks/sweeps/sweep.py [--steps 200] [--batch 32] [--repeats 3]

The 64-128-128-10 network of the examples learns scikit-learn's digits by Lion in a box: 8 step
sizes x 8 boxes x 5 seeds, 320 rows. Timed are

* sweep: one program for all rows, as `jaxclip.sweep` compiles it;
* loop: one compiled function of (step size, threshold, seed) with a loop over the steps inside,
  called for each row;
* jit each: that function compiled anew for each setting, with its numbers as constants, as a
  script does that is started once a setting. Four settings are timed, and 64 extrapolated.

The first two in turns, medians; compiling is in all of them once, as it is for the user, and is
printed beside. What XLA must do is the same in all three.
"""

import argparse
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxclip
from jaxclip.sweeps.programs import Program
from jaxclip.sweeps.tasks import Task

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
from digits import loss_fn, model, train

SEEDS = range(5)
STEP_SIZES = np.geomspace(1e-4, 1e-2, 8)
THRESHOLDS = np.geomspace(0.25, 2.0, 8)
GRID = np.stack(np.meshgrid(STEP_SIZES, THRESHOLDS, indexing="ij"), axis=-1).reshape(-1, 2)


def init_fn(key):
    return model.init(key, jnp.zeros((1, 64)))


def timed(function):
    begun = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begun


def one_row(num_steps, batches):
    """The function of the loop: a row from its numbers to its parameters."""

    def run(step_size, threshold, seed):
        init_key, data_key, loss_key = jax.random.split(jax.random.key(seed), 3)
        optimizer = jaxclip.lion(step_size)
        step = jaxclip.make_train_step(
            loss_fn, optimizer, weight_threshold=jaxclip.fan_in(threshold)
        )
        state = jaxclip.TrainState.create(init_fn(init_key), optimizer, key=loss_key)

        def body(i, state):
            return step(state, batches(jax.random.fold_in(data_key, i)))[0]

        return jax.lax.fori_loop(0, num_steps, body, state).params

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="steps of a row")
    parser.add_argument("--batch", type=int, default=32, help="examples of a batch")
    parser.add_argument("--repeats", type=int, default=3, help="timings of sweep and loop")
    options = parser.parse_args()
    batches = jaxclip.sweeps.random_batches(train, options.batch)
    size = f"{len(GRID)} settings x {len(SEEDS)} seeds, {options.steps} steps of {options.batch}"
    print(f"jax {jax.__version__}, {size} examples")

    task = Task(
        loss_fn,
        init_fn,
        jaxclip.lion,
        batches,
        weight_threshold=jaxclip.fan_in,
        stop=jaxclip.max_steps(options.steps),
        evaluate=lambda params: {"loss": loss_fn(params, train)},
        metric="loss",
    )
    begun = time.perf_counter()
    program = Program(task, len(GRID), SEEDS, jax.devices(), None, options.steps)
    sweep_compile = time.perf_counter() - begun
    looped = jax.jit(one_row(options.steps, batches))
    loop_compile = timed(lambda: looped(1e-3, 1.0, 0))

    def by_sweep():
        return program.run(GRID[:, 0], GRID[:, 1]).params

    def by_loop():
        return [looped(a, t, seed) for a, t in GRID for seed in SEEDS]

    seconds = {"sweep": [], "loop": []}
    timed(by_sweep)
    for _ in range(options.repeats):
        seconds["sweep"].append(timed(by_sweep))
        seconds["loop"].append(timed(by_loop))
    apart = max(
        float(jnp.abs(a.reshape(-1, *b.shape)[-1] - b).max())
        for a, b in zip(jax.tree.leaves(by_sweep()), jax.tree.leaves(by_loop()[-1]), strict=True)
    )

    def anew(a, t):
        run = one_row(options.steps, batches)
        fresh = jax.jit(lambda seed: run(float(a), float(t), seed))
        return [fresh(seed) for seed in SEEDS]

    each = [timed(lambda a=a, t=t: anew(a, t)) for a, t in GRID[::16]]
    totals = {
        "sweep": statistics.median(seconds["sweep"]) + sweep_compile,
        "loop": statistics.median(seconds["loop"]) + loop_compile,
        "jit each": statistics.median(each) * len(GRID),
    }
    compiling = {"sweep": sweep_compile, "loop": loop_compile, "jit each": float("nan")}
    print("way          seconds  of which compiling  x sweep")
    for way, total in totals.items():
        print(f"{way:<10} {total:9.2f} {compiling[way]:19.2f} {total / totals['sweep']:8.1f}")
    needed = program.bytes_needed()
    print(f"the program holds {needed / 2**20:,.0f} MiB" if needed else "")
    print(f"the last row ends within {apart:.2g} of the same row of the loop")


if __name__ == "__main__":
    main()
