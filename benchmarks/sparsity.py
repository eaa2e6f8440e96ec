"""Accuracy at four densities, by the way to get there; and what a step costs.

    pip install -e ".[examples]"
    python benchmarks/sparsity.py [--data FOLDER] [--seeds 5] [--steps 300] [--samples 1024]

An MLP with two hidden layers of 128 is trained by Adam, on scikit-learn's digits or, with --data,
on Fashion-MNIST. Accuracy is that on test data; nothing is trained after one-shot
pruning. Kernels are pruned, biases are not. The moments are from training images, without labels.
"""

import argparse
import itertools
import math
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip
from jaxclip import calibration, sparsity

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
import fashion

DENSITIES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
PENALTIES = (0.2, 0.4, 0.6, 0.8)
WIDTH, STEP_SIZE = 128, 3e-3


def digits():
    """What `fashion.load` returns, of digits."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = ((images - images.mean()) / images.std()).astype(np.float32)[order]
    test, train = (
        (x, y) for x, y in zip(*(np.split(a, [450]) for a in (pixels, labels[order])), strict=True)
    )
    return "scikit-learn's digits", train, None, test


def logits(params, x):
    for i in range(3):
        x = (jax.nn.relu(x) if i else x) @ params[f"kernel_{i}"] + params[f"bias_{i}"]
    return x


def initial(key, num_pixels):
    params, sizes = {}, (num_pixels, WIDTH, WIDTH, 10)
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (n, m))
        params |= {f"kernel_{i}": kernel * math.sqrt(2 / n), f"bias_{i}": jnp.zeros(m)}
    return params


def trained(make, values, data, num_seeds, num_steps):
    """The parameters of all seeds, stacked, for an optimizer made of each of some values."""
    images, labels = map(jnp.asarray, data)

    def loss(params, picks):
        found = logits(params, images[picks])
        return optax.losses.softmax_cross_entropy_with_integer_labels(found, labels[picks]).mean()

    def run(case):
        value, key = case
        tx = make(value)
        params = initial(key, images.shape[1])

        def step(carry, i):
            params, state = carry
            picks = jax.random.randint(jax.random.fold_in(key, i), (128,), 0, len(labels))
            updates, state = tx.update(jax.grad(loss)(params, picks), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))[0][0]

    # Not vmapped: then every step would choose masks, and only the due ones take them.
    keys = jnp.tile(jax.random.split(jax.random.key(0), num_seeds), len(values))
    cases = jnp.repeat(jnp.asarray(values, jnp.float32), num_seeds), keys
    stacked = jax.jit(lambda cases: jax.lax.map(run, cases))(cases)
    parts = [slice(i * num_seeds, (i + 1) * num_seeds) for i in range(len(values))]
    return [jax.tree.map(lambda w, part=part: w[part], stacked) for part in parts]


def optimizers(num_steps):
    """Pairs of a title and a function from a density to an optimizer."""
    adam = optax.adam(optax.cosine_decay_schedule(STEP_SIZE, num_steps))
    half, keep = num_steps // 2, sparsity.keep_sparse

    def cubic(density):
        return optax.polynomial_schedule(1.0, density, 3, half)

    def on_grid(inner):
        return jaxclip.keep_on_grid(inner, "ternary", start_step=half)

    growing = optax.cosine_decay_schedule(0.3, 3 * num_steps // 4)
    return {
        "keep_sparse, cubic": lambda d: keep(adam, cubic(d), every=10),
        "keep_sparse, constant": lambda d: keep(adam, d, every=10),
        "keep_sparse, constant, grow": lambda d: keep(adam, d, grow=growing, every=10),
        "keep_sparse, cubic, groups of 16": lambda d: keep(adam, cubic(d), pattern=16, every=10),
        "keep_sparse, cubic, tree": lambda d: keep(adam, cubic(d), scope="tree", every=10),
        "keep_on_grid(keep_sparse), ternary": lambda d: on_grid(keep(adam, cubic(d), every=10)),
    }


def one_shot(params, images, density):
    """Pairs of a title and the pruned parameters."""
    whole = calibration.measure(logits, params, [images], progress=False)
    diagonal = calibration.measure(logits, params, [images], max_dim=1, progress=False)
    yield "prune, magnitude", sparsity.prune(params, density)
    yield "prune, diagonal moments", sparsity.prune(params, density, calibration=diagonal)
    yield "prune, whole moments", sparsity.prune(params, density, calibration=whole)
    groups = sparsity.prune(params, density, pattern=16, calibration=whole)
    yield "prune, whole moments, groups of 16", groups


def accuracies(stacked, test):
    images, labels = test
    found = jax.vmap(lambda params: logits(params, images).argmax(-1))(stacked)
    return 100 * np.mean(np.asarray(found) == labels, axis=1)


def density_of(stacked):
    kernels = [w for name, w in stacked.items() if "kernel" in name]
    return sum(int((w != 0).sum()) for w in kernels) / sum(w.size for w in kernels)


def print_row(title, cells):
    found = "".join(f"{a.mean():9.2f} +-{a.std(ddof=1):5.2f}" for a in cells)
    print(f"{title:38}{found}", flush=True)


def compare_accuracies(args):
    source, train, _, test = fashion.load(args.data) if args.data else digits()
    print(f"{source}; {args.seeds} seeds, mean and standard deviation")
    sizes = (train, args.seeds, args.steps)
    adam = optax.adam(optax.cosine_decay_schedule(STEP_SIZE, args.steps))
    (dense,) = trained(lambda _: adam, [0], *sizes)
    print_row("dense", [accuracies(dense, test)])
    grid = jaxclip.keep_on_grid(adam, "ternary", start_step=args.steps // 2)
    (ternary,) = trained(lambda _: grid, [0], *sizes)
    title = f"keep_on_grid, ternary (density {density_of(ternary):.3f})"
    print_row(title, [accuracies(ternary, test)])
    print(f"{'density':38}" + "".join(f"{f'1/{round(1 / d)}':>17}" for d in DENSITIES))
    for title, make in optimizers(args.steps).items():
        print_row(title, [accuracies(x, test) for x in trained(make, DENSITIES, *sizes)])
    table: dict[str, list[np.ndarray]] = {}
    for density in DENSITIES:
        found: dict[str, list] = {}
        for seed in range(args.seeds):
            params = jax.tree.map(lambda w, i=seed: w[i], dense)
            for title, pruned in one_shot(params, train[0][: args.samples], density):
                found.setdefault(title, []).append(pruned)
        for title, pruned in found.items():
            stacked = jax.tree.map(lambda *w: jnp.stack(w), *pruned)
            table.setdefault(title, []).append(accuracies(stacked, test))
    for title, cells in table.items():
        print_row(title, cells)
    rate = optax.cosine_decay_schedule(STEP_SIZE / 4, args.steps)
    lion = jaxclip.lion(rate, weight_decay=0.0)

    def shrinking(penalty):
        return optax.chain(lion, sparsity.soft_threshold(lambda step: penalty * rate(step)))

    rows = trained(shrinking, (0.0, *PENALTIES), *sizes)
    print(f"{'lion, soft_threshold: penalty':38}" + "".join(f"{p:17.1f}" for p in (0, *PENALTIES)))
    print(f"{'  density':38}" + "".join(f"{density_of(row):17.3f}" for row in rows))
    print_row("  accuracy", [accuracies(row, test) for row in rows])


def compare_times(num_rounds):
    """Prints the time of a step of Adam on a million weights over that of Adam alone."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (1024, 1024))}
    grads, adam, keep = jax.tree.map(lambda w: 0.01 * w, params), optax.adam(1e-3), {}
    keep["alone"] = adam
    for title, options in {
        "free": {},
        "free, every=100": {"every": 100},
        "free, grow": {"grow": 0.3},
        "rows": {"pattern": "rows"},
        "groups of 4": {"pattern": 4},
    }.items():
        keep[title] = sparsity.keep_sparse(adam, 1 / 4, **options)
    steps = {}
    for title, tx in keep.items():
        update = jax.jit(tx.update)
        _, state = update(grads, tx.init(params), params)
        steps[title] = lambda update=update, state=state: update(grads, state, params)
    times = {title: [] for title in steps}
    for _, (title, step) in itertools.product(range(num_rounds), steps.items()):
        begun = time.perf_counter()
        jax.block_until_ready(step())
        times[title].append(time.perf_counter() - begun)
    medians = {title: statistics.median(t) for title, t in times.items()}
    print("step of Adam with keep_sparse, in steps of Adam alone, 1024 x 1024 weights")
    for title in list(medians)[1:]:
        print(f"  {title:20}{medians[title] / medians['alone']:6.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of Fashion-MNIST; digits if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15, help="of timing; 0 for none")
    args = parser.parse_args()
    compare_accuracies(args)
    if args.rounds:
        compare_times(args.rounds)


if __name__ == "__main__":
    main()
