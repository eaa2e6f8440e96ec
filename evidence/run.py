"""Trains one task by all methods, and writes a row for each method, rule and width.

    python evidence/run.py digits
    python evidence/run.py language --methods "AdamW" "Adam in a box"

Rows are appended to results/TASK.jsonl as they are found; a method that is there is skipped, so
an interrupted run goes on. The tables are made by report.py.
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from methods import low_bit, make_methods, prune, through_grid
from tasks import TASKS

import jaxclip
from jaxclip.sweeps.chunks import Compressor

RESULTS = pathlib.Path(__file__).parent / "results"
WIDTHS = (None, 4, 3, 2, "ternary", 1)
TUNING_SEED = 1000  # not among those that are reported
DENSITIES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)


def trained(task, method, step_sizes, seeds, *, judged_at=None, **more):
    """A sweep over step sizes; of quantization-aware training, at its own width."""
    is_aware = method.width is not None
    loss_fn = task.loss_fn if method.width is None else through_grid(task.loss_fn, method.width)
    swept = jaxclip.sweeps.Task(
        loss_fn,
        task.init_fn,
        method.optimizer,
        task.batches,
        weight_threshold=method.threshold,
        stop=jaxclip.max_steps(task.num_steps),
        evaluate=task.evaluate,
        metric="valid",
        mode=task.mode,
    )
    return jaxclip.sweep(
        swept,
        step_sizes=step_sizes,
        thresholds=[np.inf if method.box is None else method.box],
        seeds=seeds,
        bits=(method.width if is_aware else judged_at,),
        compress=low_bit if is_aware else jaxclip.compress,
        progress=False,
        **more,
    )


def as_sparse_file(params):
    """What a sparse tree is on disk: a bit for each place, and the others in float16."""

    def leaf(w):
        if w.ndim < 2:
            return w
        flat = np.asarray(w).ravel()
        return {"is_kept": np.packbits(flat != 0), "values": flat[flat != 0].astype(np.float16)}

    return jax.tree.map(leaf, params)


def sparse_bytes(params, num_seeds):
    trees = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(num_seeds)]
    return [jaxclip.size_report(as_sparse_file(tree)).total_bytes for tree in trees]


def in_half(params):
    return jax.tree.map(lambda w: w.astype(jnp.float16).astype(w.dtype), params)


def learn_scales(task, params, bits, rule):
    """The weights of a low-bit file whose codes stay while scales, biases and norms are trained.

    Adam from .01 down to 0, in a tenth of the steps of the training.
    """
    num_steps = task.num_steps // 10
    parts, rebuild = jaxclip.lowbit.trainable_parts(jaxclip.compress(params, bits, rule=rule))
    tx = optax.adam(optax.cosine_decay_schedule(0.01, num_steps))

    def step(i, carry):
        parts, state = carry
        batch = task.batches(jax.random.fold_in(jax.random.key(0), i))
        grads = jax.grad(lambda p: task.loss_fn(jaxclip.decompress(rebuild(p)), batch))(parts)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(parts, updates), state

    parts, _ = jax.lax.fori_loop(0, num_steps, step, (parts, tx.init(parts)))
    return jaxclip.decompress(rebuild(parts))


class Rounder:
    """Rows (rule, bits, metrics, bytes) of parameters with an axis of seeds; compiled once."""

    def __init__(self, task):
        def compress_by(rule):
            return lambda params, bits: jaxclip.compress(params, bits, rule=rule)

        evaluate = task.evaluate
        self._rules = {
            "mse_optimal": (
                WIDTHS,
                Compressor(evaluate, compress_by(jaxclip.mse_optimal), None, WIDTHS),
            ),
            "max_abs": (
                WIDTHS[1:],
                Compressor(evaluate, compress_by(jaxclip.max_abs), None, WIDTHS[1:]),
            ),
        }
        self._trained_at = {
            width: Compressor(evaluate, low_bit, None, [width]) for width in (4, "ternary", 1)
        }
        self._learned = jax.jit(
            lambda params, bits, rule: jax.vmap(
                lambda p: evaluate(learn_scales(task, p, bits, rule))
            )(params),
            static_argnums=(1, 2),
        )
        self._in_half = jax.jit(jax.vmap(lambda params: evaluate(in_half(params))))
        self._prune = jax.jit(jax.vmap(prune, (0, None)))

    def rows(self, name, method, params):
        num_seeds = len(jax.tree.leaves(params)[0])
        by_seed = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(num_seeds)]
        if method.width is not None:
            rule = "max_abs" if method.width == 4 else "absmean"
            yield rule, method.width, *self._trained_at[method.width](by_seed)
            return
        densities = [method.density] if method.density else DENSITIES if name == "AdamW" else []
        for density in densities:
            sparse = self._prune(params, density)
            metrics = {k: np.asarray(x)[:, None] for k, x in self._in_half(sparse).items()}
            sizes = np.asarray(sparse_bytes(in_half(sparse), num_seeds))[:, None]
            yield f"pruned, density {density:g}", "float16", metrics, sizes
        if method.density is None:
            for rule, (widths, compressor) in self._rules.items():
                metrics, sizes = compressor(by_seed)
                for i, width in enumerate(widths):
                    if method.ends_at and (rule, width) != ("max_abs", method.ends_at):
                        continue  # the weights are on that grid
                    is_best = rule == ("max_abs" if method.ends_at else "mse_optimal")
                    if method.learns_scales and is_best and width in (2, "ternary", 1):
                        learned = self._learned(params, width, getattr(jaxclip, rule))
                        learned = {k: np.asarray(x)[:, None] for k, x in learned.items()}
                        yield f"{rule}, learned", width, learned, sizes[:, i : i + 1]
                    chosen = {k: x[:, i : i + 1] for k, x in metrics.items()}
                    name_of_rule = "-" if width is None else rule
                    yield name_of_rule, width or "float32", chosen, sizes[:, i : i + 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--methods", nargs="*", help="names; all by default")
    parser.add_argument("--steps", type=int, help="steps, if not as many as the task says")
    parser.add_argument("--seeds", type=int, help="seeds, if not as many as the task says")
    parser.add_argument("--grid", type=int, nargs=2, default=(0, 7), help="part of the step sizes")
    parser.add_argument(
        "--judged-at", help='width at which step sizes are chosen, "ternary" or none'
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    task = TASKS[options.task](**({"num_steps": options.steps} if options.steps else {}))
    seeds = options.seeds or task.seeds
    file = options.results / f"{options.task}.jsonl"
    file.parent.mkdir(exist_ok=True)
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rounder = Rounder(task)
    methods = make_methods(task.num_steps, task.weight_decay)
    for name in options.methods or methods:
        method, begun = methods[name], time.monotonic()
        shown = f"{name}, chosen at {options.judged_at}" if options.judged_at else name
        if any(row["method"] == shown for row in known):
            continue
        step_sizes = method.step_sizes[slice(*options.grid)]
        tuned = trained(task, method, step_sizes, [TUNING_SEED], judged_at=options.judged_at)
        sound = [row for row in tuned.rows() if not row.num_diverged]
        best = (max if task.mode == "max" else min)(sound, key=lambda row: row.metric)
        final = trained(task, method, [best.step_size], seeds, keep_params=True)
        params = final.params_of(final.rows()[0])
        rows = []
        for rule, bits, metrics, sizes in rounder.rows(name, method, params):
            row = {"task": options.task, "method": shown, "rule": rule, "bits": bits}
            row |= {k: [round(float(x), 4) for x in v[:, 0]] for k, v in metrics.items()}
            row |= {"bytes": float(np.mean(sizes)), "step_size": best.step_size}
            row |= {"seconds": float(final.seconds_per_step[0, 0]) * task.num_steps}
            row |= {"on_bound": float(final.weight_clip_rate.mean()), "steps": task.num_steps}
            row |= {"is_edge": best.step_size in (step_sizes[0], step_sizes[-1])}
            row |= {"jax": jax.__version__}
            rows.append(row)
        with file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
        took = time.monotonic() - begun
        print(f"{shown}: step size {best.step_size:g}, {took:.0f} s", flush=True)
        for row in rows:
            print(f"  {row['rule']:<22} {row['bits']!s:<8} {np.mean(row['test']):8.3f}", flush=True)


if __name__ == "__main__":
    main()
