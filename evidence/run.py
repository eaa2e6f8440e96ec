"""Trains one task by each recipe, and writes its files at three budgets to results/TASK.jsonl.

    python evidence/run.py digits
    python evidence/run.py fashion --recipes "AdamW" "Lion in a box"

A recipe's step size and knob are chosen by the validation score of the file at the middle budget,
with seeds that are not reported: the step size by doubling and halving it from the task's, up to
four times as long as that helps, then the knob, then the step size once more. A recipe that is in
the file is skipped, so an interrupted run goes on. Run "AdamW" first: others take its weight decay.
report.py makes the tables.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from recipes import RECIPES
from tasks import TASKS

import jaxclip
from jaxclip import calibration, checkpoints
from jaxclip.lowbit import compress_trained

RESULTS = pathlib.Path(__file__).parent / "results"
TUNING_SEED = 1000  # the first of those that are not reported
GUESSES = {"ternary": 1.45, 2: 1.95, 3: 2.7, 4: 3.4}  # bits a weight, before a file exists


class Bench:
    """One task with one recipe: trains, writes files, scores them."""

    def __init__(self, task, recipe, decay):
        self.task, self.recipe, self.decay = task, recipe, decay
        self.settings = {}  # knob and width by knob and budget, where one of them is adapted

    @functools.cached_property
    def _train(self):
        task, recipe = self.task, self.recipe

        def train(data, params, step_size, traced_knob, key, fixed_knob):
            knob = traced_knob if fixed_knob is None else fixed_knob
            tx = recipe.optimizer(step_size, knob, task.num_steps, self.decay)

            def loss(params, batch):
                return task.loss(task.outputs(params, batch[0]), batch[1]) + recipe.penalty(
                    params, knob
                )

            def step(i, carry):
                params, state = carry
                batch = task.batch_of(data, jax.random.fold_in(key, i))
                updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
                return optax.apply_updates(params, updates), state

            params, state = jax.lax.fori_loop(0, task.num_steps, step, (params, tx.init(params)))
            return recipe.kept(state, params), state

        return jax.jit(train, static_argnums=5)

    @functools.cached_property
    def _score(self):
        return jax.jit(lambda params, x: self.task.score(self.task.outputs(params, x[0]), x[1]))

    def train(self, seed, step_size, knob, width):
        """Parameters and the optimizer's state after training, and seconds."""
        data = jax.tree.map(jnp.asarray, self.task.data_of(seed).train)
        key = jax.random.key(seed)
        params = self.task.init(key, width)
        is_number = isinstance(knob, float)
        begun = time.monotonic()
        found = self._train(
            data, params, step_size, knob if is_number else 0.0, key, None if is_number else knob
        )
        return *jax.block_until_ready(found), time.monotonic() - begun

    def scores(self, seed, params):
        """Scores on validation and test data."""
        data = self.task.data_of(seed)
        return float(self._score(params, data.valid)), float(self._score(params, data.test))

    def calibrated(self, seed, params):
        """Moments and sensitivities, from inputs without targets."""
        train = jax.tree.map(jnp.asarray, self.task.data_of(seed).train)
        batches, count = [], 0
        while count < self.task.num_samples:
            batches.append(
                self.task.batch_of(train, jax.random.fold_in(jax.random.key(7), count))[0]
            )
            count += len(jax.tree.leaves(batches[-1])[0])
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
        given = self.task.outputs, params, [joined]
        found = calibration.measure(*given, progress=False)
        return calibration.sensitivities(*given, found, progress=False)

    def file(self, params, state, knob, budget, measured):
        """What the file gives back, and its bytes."""
        kind, coding = self.recipe.file, "lanes"
        if kind == "coded":
            small = jaxclip.compress(params, target_bytes=budget, calibration=measured)
        elif kind == "grid":
            small = compress_trained(params, state, knob)
        else:
            small = jaxclip.compress(params, self.grid(knob))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "small.safetensors")
            checkpoints.save(path, small, coding=coding)
            return jaxclip.decompress(checkpoints.load(path)), os.path.getsize(path)

    def grid(self, knob):
        """The grid of a file that is rounded to one."""
        return knob if isinstance(knob, jaxclip.Grid) else jaxclip.Grid(4)

    def setting(self, step_size, knob, budget):
        """The knob and the width for a budget: what the recipe says, or what fits the budget."""
        if self.recipe.adapts is None:
            return knob, knob if self.recipe.width != 1.0 else 1.0
        if (knob, budget) not in self.settings:
            self.settings[knob, budget] = self.fitted(step_size, knob, budget)
        return self.settings[knob, budget]

    def fitted(self, step_size, knob, budget):
        """The setting of the largest file within the budget, of six files at most."""
        files, wanted = {}, 0.975 * budget  # bytes and weights by setting
        weights = 8 * budget / GUESSES[self.grid(knob).bits]
        while len(files) < 6:
            setting = self.with_weights(knob, weights)
            if setting in files:
                break
            params, state, _ = self.train(TUNING_SEED, step_size, *setting)
            num_bytes = self.file(params, state, setting[0], budget, None)[1]
            print(f"    {setting[1]:.3f} of the width: {num_bytes:,} bytes", flush=True)
            files[setting] = num_bytes, weights
            if 0.95 * budget <= num_bytes <= budget:
                break
            weights *= (wanted / num_bytes) ** 2  # some of the bytes are those of biases and header
            below = max((file for file in files.values() if file[0] <= budget), default=None)
            above = min((file for file in files.values() if file[0] > budget), default=None)
            if below and above:
                part = (wanted - below[0]) / (above[0] - below[0])
                weights = below[1] + part * (above[1] - below[1])
        within = {setting: file for setting, file in files.items() if file[0] <= budget}
        if not within:
            raise ValueError(f"{budget} bytes are out of reach: {min(files.values())[0]} at least.")
        return max(within, key=lambda setting: within[setting])

    def with_weights(self, knob, weights):
        """The setting with about so many weights other than 0."""
        if self.recipe.adapts == "density":
            return float(np.clip(weights / self.size(1.0), 1e-3, 1.0)), 1.0
        widths = np.arange(2, 129) / 64
        return knob, min(widths, key=lambda width: abs(self.size(width) - weights))

    @functools.cache  # noqa: B019
    def size(self, width):
        outline = jax.eval_shape(lambda key: self.task.init(key, width), jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(outline))

    def run(self, seed, step_size, knob, budgets):
        """Rows of one training, or of one for each budget if something is adapted to it."""
        rows, trained, key = [], None, None
        for budget in budgets:
            setting = self.setting(step_size, knob, budget)
            if key != setting:
                trained, key = self.train(seed, step_size, *setting), setting
                params, state, seconds = trained
                whole = self.scores(seed, params)
                is_coded = self.recipe.file == "coded"
                measured = self.calibrated(seed, params) if is_coded else None
            loaded, num_bytes = self.file(params, state, setting[0], budget, measured)
            valid, test = self.scores(seed, loaded)
            row = {"budget": budget, "bytes": num_bytes, "valid": valid, "test": test}
            row |= {"whole_valid": whole[0], "whole_test": whole[1], "seconds": seconds}
            rows.append(row | {"width": float(setting[1])})
        return rows


def choose(bench, middle):
    """The step size and the knob with the best validation score at the middle budget."""
    recipe, task = bench.recipe, bench.task
    sign = 1 if task.is_better_high else -1
    seen = {}

    def score(step_size, knob):
        if (step_size, knob) not in seen:
            seeds = range(TUNING_SEED, TUNING_SEED + task.num_tuning_seeds)
            rows = [bench.run(seed, step_size, knob, [middle])[0] for seed in seeds]
            found = float(np.mean([row["valid"] for row in rows]))
            seen[step_size, knob] = sign * found if np.isfinite(found) else -np.inf
            shown = f"{step_size:<9.3g} {in_words(knob)!s:<16} {found:9.4f}"
            print(f"    {shown} {rows[0]['bytes']:,} bytes", flush=True)
        return seen[step_size, knob]

    def climb(start, knob, rounds):
        best = start
        for factor in (2.0, 0.5):
            for _ in range(rounds):
                if score(best * factor, knob) <= score(best, knob):
                    break
                best *= factor
            if best != start:
                break
        return best

    step_size = climb(recipe.step * task.step_size, recipe.knobs[0], 4)
    knob = max(recipe.knobs, key=lambda knob: score(step_size, knob))
    if knob != recipe.knobs[0]:
        step_size = climb(step_size, knob, 1)
    return step_size, knob, len(seen)


def in_words(knob):
    """A knob for a row of JSON."""
    return knob if isinstance(knob, float | None) else f"{knob.bits} {knob.levels}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--recipes", nargs="*", help="names; all by default")
    parser.add_argument("--seeds", type=int, help="seeds, if not as many as the task says")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    task = TASKS[options.task]()
    file = options.results / f"{options.task}.jsonl"
    file.parent.mkdir(exist_ok=True)
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in options.recipes or RECIPES:
        if any(row["recipe"] == name for row in known):
            continue
        begun = time.monotonic()
        decays = [row["knob"] for row in known if row["recipe"] == "AdamW"]
        if name != "AdamW" and not decays:
            sys.exit('Run the recipe "AdamW" first: its weight decay is that of others.')
        bench = Bench(task, RECIPES[name], decays[0] if decays else None)
        step_size, knob, num_tried = choose(bench, task.budgets[1])
        by_budget = {budget: [] for budget in task.budgets}
        for seed in range(options.seeds or task.num_seeds):
            for row in bench.run(seed, step_size, knob, task.budgets):
                by_budget[row["budget"]].append(row)
        rows = []
        for budget, of_seeds in by_budget.items():
            row = {"recipe": name, "budget": budget, "step_size": step_size}
            row |= {"knob": in_words(knob), "tried": num_tried, "steps": task.num_steps}
            for field in ("bytes", "valid", "test", "whole_valid", "whole_test"):
                row[field] = [round(one[field], 4) for one in of_seeds]
            row |= {"seconds": round(float(np.median([one["seconds"] for one in of_seeds])), 1)}
            row |= {"width": of_seeds[-1]["width"], "jax": jax.__version__}
            rows.append(row)
            mean, size = np.mean(row["test"]), np.mean(row["bytes"])
            print(f"{name:<28} {size:9,.0f} bytes {mean:8.3f}", flush=True)
        print(f"  {time.monotonic() - begun:.0f} s", flush=True)
        known += rows
        with file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
