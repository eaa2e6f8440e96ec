"""What calibration buys, in files of an MLP for Fashion-MNIST: accuracy against bytes.

    pip install -e ".[examples]"
    python benchmarks/lowbit/calibrated_fashion.py [--data FOLDER] [--seeds 5] [--samples 4096]

MLPs 784-256-256-10 are trained by AdamW (2,000 batches of 128), rounded, and not trained again.
Files are whole, with biases in float32. Moments and sensitivities are from images of the training
set, without labels.
"""

import argparse
import itertools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from calibrated import Rounder, at_bytes, measured_by, written

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
import fashion

SIZES = (784, 256, 256, 10)


def logits(params, x):
    for i in range(len(SIZES) - 1):
        x = (jax.nn.relu(x) if i else x) @ params[f"kernel_{i}"] + params[f"bias_{i}"]
    return x


def trained(data, seed, num_steps, weight_decay):
    params, keys = {}, jax.random.split(jax.random.key(seed), len(SIZES))
    for i, (n, m) in enumerate(itertools.pairwise(SIZES)):
        params[f"kernel_{i}"] = jax.random.normal(keys[i], (n, m)) * math.sqrt(2 / n)
        params[f"bias_{i}"] = jnp.zeros(m)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, num_steps), weight_decay=weight_decay)

    @jax.jit
    def step(params, state, images, labels):
        def loss(params):
            found = logits(params, images)
            return optax.losses.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, batches = tx.init(params), fashion.batches(data, 128, seed * num_steps)
    for _ in range(num_steps):
        params, state = step(params, state, *next(batches))
    return jax.tree.map(np.asarray, params)


def files_of(params, images, targets):
    """Yields a title, loaded parameters and bytes for each way to round."""
    measured = measured_by(logits, params, [images], [images])
    model = Rounder(params, measured)
    size = sum(w.size for w in model.weights.values())
    weighted = model.with_sensitivities(measured.sensitivities)
    num_bytes, loaded, _ = written(lambda: params, coding=None)
    yield "float32", loaded, num_bytes
    methods = {
        "a step a leaf, without data": model.uniform,
        "dependent_codes, without data": model.dependent,
        "calibrated": lambda rate: model.by_inputs(rate, weighted),
    }
    for target in targets:
        for title, make in methods.items():
            num_bytes, loaded, _ = at_bytes(make, target, size, model.rest, rounds=12)
            yield f"{title}, {target:,}", loaded, num_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder; the Debian package's if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--targets", type=int, nargs="*", default=(59_600, 40_900, 29_300, 20_000))
    args = parser.parse_args()
    source, train, _, (images, labels) = fashion.load(args.data)
    print(source)
    table = {}
    for seed in range(args.seeds):
        params = trained(train, seed, args.steps, args.weight_decay)
        picks = np.random.default_rng(seed).permutation(len(train[1]))[: args.samples]
        for title, loaded, num_bytes in files_of(params, train[0][picks], args.targets):
            found = np.asarray(logits(loaded, images)).argmax(1)
            table.setdefault(title, []).append((100 * np.mean(found == labels), num_bytes))
    print(f"\n{'':44}{'bytes':>10}{'accuracy':>10}{'sd':>6}   {args.seeds} seeds")
    for title, rows in table.items():
        accuracy, num_bytes = np.array(rows).T
        print(f"{title:44}{num_bytes.mean():10,.0f}{accuracy.mean():10.2f}{accuracy.std():6.2f}")


if __name__ == "__main__":
    main()
