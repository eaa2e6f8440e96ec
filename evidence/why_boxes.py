"""Prints why a box helps sign steps and not Adam: weights of the nets, and errors of their files.

    python evidence/why_boxes.py [--task fashion] [--seeds 3]

The nets of run.py, with the step sizes and knobs that were chosen there and the files of the middle
budget. By leaf, means over seeds:

- "deviation" and "largest": of the weights, in units of sqrt(2 / fan_in), the box of kappa = 1.
- "kurtosis": 3 for a normal distribution, 1.8 for a uniform one, 1 for two values alike in size.
- "at bound": the fraction of weights that are within 1 % of the largest.
- "error": squared error of the net's outputs relative to their squares, with this leaf alone
  rounded, and in the last line with all of them.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from recipes import RECIPES
from report import interval, read
from run import Bench
from tasks import TASKS

NAMES = ("AdamW", "Adam in a box", "Lion", "Lion, decay 1/t", "Lion in a box")
COLUMNS = ("deviation", "largest", "kurtosis", "at bound", "error")


def of_weights(w):
    """Returns what the columns say of one kernel."""
    w = np.asarray(w, np.float64)
    unit = np.sqrt(2 / np.prod(w.shape[:-1]))
    largest = np.abs(w).max()
    return {
        "deviation": w.std() / unit,
        "largest": largest / unit,
        "kurtosis": np.mean((w - w.mean()) ** 4) / w.var() ** 2,
        "at bound": np.mean(np.abs(w) > 0.99 * largest),
    }


def errors_by_leaf(task, params, loaded, inputs):
    """Returns the error of the outputs with each kernel rounded alone, and with all ("net")."""
    wanted = task.outputs(params, inputs)

    def error(changed):
        return float(jnp.sum((task.outputs(changed, inputs) - wanted) ** 2) / jnp.sum(wanted**2))

    found = {
        name: error(params | {name: layer | {"kernel": loaded[name]["kernel"]}})
        for name, layer in params.items()
    }
    return found | {"net": error(loaded)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = [name for name in TASKS if name != "language"]
    parser.add_argument("--task", choices=tasks, default="fashion")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    task = TASKS[options.task]()
    print(f"{'':<18}{'':<10}" + "".join(f"{c:>11}" for c in COLUMNS) + f"{task.metric:>20}")
    for name in NAMES:
        row = next((r for r in read(options.task) if r["recipe"] == name), None)
        if row is not None:
            print_net(task, name, row, options.seeds)


def print_net(task, name, row, num_seeds):
    """Trains the nets of a recorded row, and prints a line for each leaf."""
    bench, budget = Bench(task, RECIPES[name], None), task.budgets[1]
    of_leaves, scores = {}, []
    for seed in range(num_seeds):
        params, state, _ = bench.train(seed, row["step_size"], row["knob"], 1.0)
        measured = bench.calibrated(seed, params)
        loaded, _ = bench.file(params, state, row["knob"], budget, measured)
        scores.append(bench.scores(seed, loaded)[1])
        inputs = task.data_of(seed).test[0]
        for leaf, error in errors_by_leaf(task, params, loaded, inputs).items():
            found = of_weights(params[leaf]["kernel"]) if leaf in params else {}
            of_leaves.setdefault(leaf, []).append(found | {"error": error})
    for i, (leaf, found) in enumerate(of_leaves.items()):
        mean = jax.tree.map(lambda *x: np.mean(x), *found)
        cells = "".join(f"{mean[c]:>11.3g}" if c in mean else " " * 11 for c in COLUMNS)
        score = "{:15.4g} ± {:.2g}".format(*interval(scores)) if leaf == "net" else ""
        print(f"{'' if i else name:<18}{leaf:<10}{cells}{score}", flush=True)


if __name__ == "__main__":
    main()
