"""Step size against box, at every width: the map behind docs/choosing.md.

    python evidence/grid.py [--task digits] [--picture docs/choosing.png]

Lion, 5 step sizes x 4 boxes x 5 seeds, in one sweep. Printed are the recommendation, the front,
and for each width a table of the mean accuracy on validation data.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tasks import TASKS

import jaxclip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--picture", type=pathlib.Path, help="where to draw the maps")
    options = parser.parse_args()
    task = TASKS[options.task]()
    metric = task.metric.replace("test", "validation")
    data = jax.tree.map(jnp.asarray, task.data_of(0))

    def loss_fn(params, batch):
        return task.loss(task.outputs(params, batch[0]), batch[1])

    def evaluate(params):
        shown = {"valid": data.valid, "train": jax.tree.map(lambda x: x[:10_000], data.train)}
        return {k: task.score(task.outputs(params, x[0]), x[1]) for k, x in shown.items()}

    def lion(step_size):
        schedule = optax.cosine_decay_schedule(step_size, task.num_steps)
        return jaxclip.lion(schedule, weight_decay=0.0)

    swept = jaxclip.sweeps.Task(
        loss_fn,
        task.init,
        lion,
        lambda key: task.batch_of(data.train, key),
        weight_threshold=jaxclip.fan_in,
        stop=jaxclip.max_steps(task.num_steps),
        evaluate=evaluate,
        metric="valid",
        train_metric="train",
        mode="max" if task.is_better_high else "min",
    )
    result = jaxclip.sweep(
        swept,
        step_sizes=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        thresholds=[0.5, 1.0, 2.0, np.inf],
        seeds=task.num_seeds,
        progress=False,
    )
    print(f"{task.title}, {task.num_steps} steps, {task.num_seeds} seeds: {metric}")
    print("recommended within half a point:", result.recommend(max_loss=0.5))
    for row in result.pareto():
        print("on the front:", row)
    for b, bits in enumerate(result.bits):
        print(f"\n{'as trained' if bits is None else bits}: step size down, box across")
        print("         " + "".join(f"{t:>9g}" for t in result.thresholds))
        for i, a in enumerate(result.step_sizes):
            print(f"{a:<9g}" + "".join(f"{x:9.2f}" for x in result.means()[i, :, b]))
    print("\nshare of the boxed weights on the bound")
    for i, a in enumerate(result.step_sizes):
        shares = result.weight_clip_rate[i].mean(axis=-1)
        print(f"{a:<9g}" + "".join(f"{x:9.0%}" if np.isfinite(x) else "" for x in shares))
    if options.picture:
        jaxclip.plots.heat_maps(
            result.means(),
            result.step_sizes,
            result.thresholds,
            result.bits,
            options.picture,
            metric=metric,
            title=f"{task.title}, Lion: {metric}",
        )


if __name__ == "__main__":
    main()
