"""Which levels a narrow grid should have: accuracy after rounding, without training again.

    pip install -e ".[examples]"; apt install dataset-fashion-mnist
    python benchmarks/lowbit/levels.py [--seeds 5] [--tasks digits fashion]

The dense networks of `evidence/tasks.py`, trained by AdamW and by Lion in a box, are rounded with
one scale for each output, by `mse_optimal`. "error" is the relative squared error of the weights,
and bytes are those of the file with packed codes.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np
import optax

import jaxclip
from jaxclip import Grid

sys.path.append(str(pathlib.Path(__file__).parents[2] / "evidence"))
import tasks

TASKS = {"digits": tasks.digits, "fashion": lambda: tasks.fashion_mnist()._replace(num_steps=2000)}
GRIDS = [
    None,
    *(Grid(b, levels=levels) for b in (4, 3, 2) for levels in ("full", "narrow", "balanced")),
    Grid("ternary"),
    Grid(1),
]


def trained(task, seed, optimizer, threshold):
    init_key, data_key = jax.random.split(jax.random.key(seed))
    data = jax.tree.map(jax.numpy.asarray, task.data_of(seed).train)

    def loss_fn(params, batch):
        return task.loss(task.outputs(params, batch[0]), batch[1])

    step = jaxclip.make_train_step(loss_fn, optimizer, weight_threshold=threshold)
    state = jaxclip.TrainState.create(task.init(init_key), optimizer)
    draw = jax.jit(lambda i: task.batch_of(data, jax.random.fold_in(data_key, i)))
    for i in range(task.num_steps):
        state, _ = step(state, draw(i))
    return state.params


def weight_error(params, restored):
    weights = [(w, v) for w, v in zip(*map(jax.tree.leaves, (params, restored)), strict=True)]
    lost = sum(float(((w - v) ** 2).sum()) for w, v in weights if w.ndim > 1)
    return lost / sum(float((w**2).sum()) for w, v in weights if w.ndim > 1)


def row_of(params, grid, task, seed):
    small = params if grid is None else jaxclip.compress(params, grid)
    restored = jaxclip.decompress(small)
    inputs, labels = task.data_of(seed).test
    accuracy = float(task.score(task.outputs(restored, inputs), labels))
    return accuracy, jaxclip.size_report(small).total_bytes, weight_error(params, restored)


def print_table(name, num_seeds):
    task = TASKS[name]()
    schedule = optax.cosine_decay_schedule(1.0, task.num_steps)
    methods = {
        "AdamW": (optax.adamw(lambda i: 1e-3 * schedule(i), weight_decay=0.01), None),
        "Lion in a box": (jaxclip.lion(lambda i: 1e-3 * schedule(i)), jaxclip.fan_in(1.0)),
    }
    for method, (optimizer, threshold) in methods.items():
        nets = [trained(task, seed, optimizer, threshold) for seed in range(num_seeds)]
        print(f"\n{task.title}, {method}, {num_seeds} seeds")
        print(f"{'grid':24}{'bytes':>9}{'error':>8}{'accuracy':>10}{'+-':>6}")
        for grid in GRIDS:
            found = np.array([row_of(params, grid, task, i) for i, params in enumerate(nets)])
            accuracy, num_bytes, error = found.mean(axis=0)
            half = 1.96 * found[:, 0].std(ddof=1) / np.sqrt(num_seeds)
            title = "float32" if grid is None else f"{grid.bits}, {grid.levels}"
            print(f"{title:24}{num_bytes:9,.0f}{error:8.4f}{accuracy:10.2f}{half:6.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    for name in args.tasks:
        print_table(name, args.seeds)


if __name__ == "__main__":
    main()
