"""What `sweep` and `recommend` find at the three budgets of a task, beside the recorded recipes.

    python evidence/front.py [--task fashion] [--picture docs/front.png]

Widths, step sizes and weight decays of AdamW are compared by one sweep with one seed. For each
budget the file with the best validation accuracy is recommended. Its setting is trained again with
other seeds; the scores of their files on test data stand beside the rows of results/TASK.jsonl.
Intervals are of 95 %, by Student's t, and by Welch's for differences.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import apart, interval, read
from tasks import TASKS

import jaxclip
from jaxclip import calibration

WIDTHS = (1.0, 0.5, 0.35, 0.25)
GOALS = {"fashion": {29_300: 88.2, 20_000: 87.3, 14_000: 86.3}}  # named before the first run
SAME = "AdamW, narrower"  # the recipe that is searched here
TUNING_SEED, NUM_SAMPLES = 1000, 4096


def swept_task(task, data):
    """The task for a sweep, with a model for each width."""

    def evaluate(params):
        parts = {"valid": data.valid, "test": data.test}
        return {k: task.score(task.outputs(params, x[0]), x[1]) for k, x in parts.items()}

    def adamw(step_size, weight_decay):
        schedule = optax.cosine_decay_schedule(step_size, task.num_steps)
        return optax.adamw(schedule, weight_decay=weight_decay)

    return jaxclip.sweeps.Task(
        lambda params, batch: task.loss(task.outputs(params, batch[0]), batch[1]),
        {f"{width:g} of the width": init_of(task, width) for width in WIDTHS},
        adamw,
        lambda key: task.batch_of(data.train, key),
        stop=jaxclip.max_steps(task.num_steps),
        evaluate=evaluate,
        metric="valid",
        mode="max" if task.is_better_high else "min",
    )


def init_of(task, width):
    return lambda key: task.init(key, width)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="fashion")
    parser.add_argument("--seeds", type=int, default=5, help="seeds that are reported")
    parser.add_argument("--picture", type=pathlib.Path, help="where to draw the comparison")
    options = parser.parse_args()
    begun, task = time.process_time(), TASKS[options.task]()
    data = jax.tree.map(jnp.asarray, task.data_of(0))
    inputs = data.train[0][:NUM_SAMPLES]

    def calibrate(params):
        measured = calibration.measure(task.outputs, params, [inputs], progress=False)
        return calibration.sensitivities(task.outputs, params, [inputs], measured, progress=False)

    swept = swept_task(task, data)
    files = {"budgets": list(task.budgets), "calibration": calibrate, "progress": False}
    result = jaxclip.sweep(
        swept,
        step_sizes=[task.step_size, 2 * task.step_size],
        weight_decays=[0.1, 0.3],
        seeds=[TUNING_SEED],
        bits=(4, "ternary"),
        coding="lanes",
        **files,
    )
    print(result)
    if options.picture:
        result.plot(options.picture, max_bytes=task.budgets[len(task.budgets) // 2])
    again = {}
    for budget in task.budgets:
        best = result.recommend(max_bytes=budget)
        print(f"\n{budget:,} bytes: {best.net_name}. {best.reason}")
        key = best.net_name
        if key not in again:
            again[key] = jaxclip.sweep(
                jaxclip.sweeps.Task(**vars(swept) | {"init_fn": swept.init_fn[best.model]}),
                step_sizes=[best.step_size],
                weight_decays=[best.weight_decay],
                seeds=options.seeds,
                bits=(4, "ternary"),
                coding="lanes",
                **files,
            )
        report(options.task, budget, best, again[key])
    print(f"{time.process_time() - begun:.0f} s of CPU time")


def report(name, budget, best, found):
    """Prints the recommended file's test score, and the recorded rows at that budget."""
    names = [(row.bits, row.budget) for row in found.rows()]
    file = names.index((best.bits, best.budget))
    scores = found.metrics["test"].reshape(-1, len(names))[:, file]
    size = found.file_bytes.reshape(-1, len(names))[:, file].max()
    mean, half = interval(scores)
    print(f"  {best.file_name}, largest file {size:,.0f} bytes: test {mean:.4g} ± {half:.2g}")
    if name in GOALS:
        goal = GOALS[name][budget]
        print(f"  goal {goal}: {'met' if mean >= goal else 'missed'}")
    for row in read(name):
        if row["budget"] == budget:
            difference, margin = apart(scores, row["test"])
            same = " (the same recipe)" if row["recipe"] == SAME else ""
            mean = np.mean(row["test"])
            print(f"  {row['recipe']:<28} {mean:8.4g} {difference:+9.2g} ± {margin:.2g}{same}")


if __name__ == "__main__":
    main()
