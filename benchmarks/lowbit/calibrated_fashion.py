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
import os
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip import calibration, checkpoints, compress, decompress

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
    return params


def files_of(params, images, targets):
    """Yields a title, loaded parameters and bytes for each way to round."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "small.safetensors")

        def written(small, coding=None):
            checkpoints.save(path, small, coding=coding, overwrite=True)
            return decompress(checkpoints.load(path)), os.path.getsize(path)

        yield "float32", *written(params)
        found = calibration.measure(logits, params, [images], progress=False)
        found = calibration.sensitivities(logits, params, [images], found, progress=False)
        for target, given in itertools.product(targets, (None, found)):
            title = f"{target:,} bytes, {'calibrated' if given else 'without data'}"
            small = compress(params, target_bytes=target, calibration=given)
            yield title, *written(small, "lanes")


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
    print(source, flush=True)
    table = {}
    for seed in range(args.seeds):
        params = trained(train, seed, args.steps, args.weight_decay)
        picks = np.random.default_rng(seed).permutation(len(train[1]))[: args.samples]
        for title, loaded, num_bytes in files_of(params, train[0][picks], args.targets):
            found = np.asarray(logits(loaded, images)).argmax(1)
            table.setdefault(title, []).append((100 * np.mean(found == labels), num_bytes))
    print(f"{'':34}{'bytes':>10}{'accuracy':>10}{'sd':>6}   {args.seeds} seeds")
    for title, rows in table.items():
        accuracy, num_bytes = np.array(rows).T
        print(f"{title:34}{num_bytes.mean():10,.0f}{accuracy.mean():10.2f}{accuracy.std():6.2f}")


if __name__ == "__main__":
    main()
