"""What does a sweep save, next to a loop over the settings?

    python benchmarks/sweeps/sweep.py [--settings 64] [--steps 200] [--batch 32] [--repeats 3]

The 64-128-128-10 network of the examples learns scikit-learn's digits by Lion in a box, every
setting with 5 seeds. Timed are

* sweep: all rows, as `jaxclip.sweep` trains them;
* halving: the same with `schedule="halving"`, judged by the loss at ternary;
* a quarter: the first, while three quarters of the settings diverge and stop after two steps;
* loop: one compiled function of (step size, threshold, seed) with a loop over the steps inside,
  called for each row;
* jit each: that function compiled anew for each setting, with its numbers as constants, as a
  script does that is started once a setting. Four settings are timed, and all extrapolated.

The first four in turns, medians of wall time and of the CPU seconds of this process. Compiling is
in none of them but the last; it is printed beside. The last line is a whole `jaxclip.sweep` with
compression to six widths and evaluation, and the same once more, when all is compiled.
"""

import argparse
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxclip
from jaxclip.sweeps.chunks import Compressor, Halving, halving_rungs
from jaxclip.sweeps.programs import Program
from jaxclip.sweeps.tasks import Setting, Task

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
from digits import loss_fn, model, train

SEEDS = range(5)


def init_fn(key):
    return model.init(key, jnp.zeros((1, 64)))


def timed(function):
    """Wall time and CPU seconds of a call."""
    begun = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


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
    parser.add_argument("--settings", type=int, default=64, help="settings, a multiple of 4")
    parser.add_argument("--steps", type=int, default=200, help="steps of a row")
    parser.add_argument("--batch", type=int, default=32, help="examples of a batch")
    parser.add_argument("--repeats", type=int, default=3, help="timings of sweep and loop")
    options = parser.parse_args()
    step_sizes = np.geomspace(1e-4, 1e-2, options.settings // 4)
    thresholds = np.geomspace(0.25, 2.0, 4)
    axes = np.meshgrid(step_sizes, thresholds, indexing="ij")
    grid = np.stack(axes, axis=-1).reshape(-1, 2)
    batches = jaxclip.sweeps.random_batches(train, options.batch)
    size = f"{len(grid)} settings x {len(SEEDS)} seeds, {options.steps} steps of {options.batch}"
    print(f"jax {jax.__version__}, {size} examples")

    task = Task(
        loss_fn,
        init_fn,
        jaxclip.lion,
        batches,
        weight_threshold=jaxclip.fan_in,
        stop=jaxclip.max_steps(options.steps) | jaxclip.training.nonfinite(1),
        evaluate=lambda params: {"loss": loss_fn(params, train)},
        metric="loss",
        mode="min",
    )
    programs, settings = [], Setting(None, None, *grid.T)

    def compile_sweep():
        every = -(-options.steps // 50)
        programs.append(Program(task, settings, len(grid), SEEDS, jax.devices(), None, every))

    sweep_compile = timed(compile_sweep)
    (program,) = programs
    looped = jax.jit(one_row(options.steps, batches))
    loop_compile = timed(lambda: looped(1e-3, 1.0, 0))
    is_sound = (np.arange(len(grid)) % 4 == 0)[:, None]
    quarter = Setting(None, None, *np.where(is_sound, grid, (3e38, np.inf)).T)
    rungs = halving_rungs(program.recorded_at)
    compressor = Compressor(task.evaluate, jaxclip.compress, None, ["ternary"])

    def halved():
        choose = Halving(task, compressor, len(grid))
        return program.run(settings, rungs, choose).params

    ways = {
        "sweep": lambda: program.run(settings).params,
        "loop": lambda: [looped(a, t, seed) for a, t in grid for seed in SEEDS],
        "halving": halved,
        "a quarter": lambda: program.run(quarter).params,
    }
    are_equal = all(
        np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(ways["sweep"]()), jax.tree.leaves(ways["loop"]()), strict=True
        )
    )
    halved()  # compiles its rounding
    found = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, function in ways.items():
            found[way].append(timed(function))
    medians = {way: np.median(x, axis=0) for way, x in found.items()}

    def anew(a, t):
        run = one_row(options.steps, batches)
        fresh = jax.jit(lambda seed: run(float(a), float(t), seed))
        return [fresh(seed) for seed in SEEDS]

    each = [timed(lambda a=a, t=t: anew(a, t)) for a, t in grid[:: len(grid) // 4]]
    medians["jit each"] = np.median(each, axis=0) * len(grid)
    print("way        seconds     CPU  loop / it: seconds   CPU")
    for way, (wall, cpu) in medians.items():
        ratios = medians["loop"] / (wall, cpu)
        print(f"{way:<9} {wall:8.2f} {cpu:7.2f} {ratios[0]:19.2f} {ratios[1]:5.2f}")
    print(f"compiling took {sweep_compile[1]:.1f} (sweep) and {loop_compile[1]:.1f} (loop) CPU s")
    print(f"sweep and loop end {'with' if are_equal else 'WITHOUT'} equal bits")

    def whole():
        jaxclip.sweep(task, step_sizes=step_sizes, thresholds=thresholds, progress=False)

    (wall, cpu), (again, again_cpu) = timed(whole), timed(whole)
    print(
        f"whole sweep: {wall:.1f} s, {cpu:.1f} CPU s; again: {again:.1f} s, {again_cpu:.1f} CPU s"
    )


if __name__ == "__main__":
    main()
