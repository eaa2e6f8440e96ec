"""Accuracy at four densities, by the way to get there; and what a step costs.

    pip install -e ".[examples]"
    python benchmarks/sparsity.py [--data FOLDER] [--seeds 5] [--steps 300] [--samples 1024]
    python benchmarks/sparsity.py --files --seeds 3 --steps 2000 --samples 4096

An MLP with two hidden layers of 128 is trained by Adam, on scikit-learn's digits or, with --data,
on Fashion-MNIST. Accuracy is that on test data; nothing is trained after one-shot
pruning. Kernels are pruned, biases are not. The moments are from training images, without labels.

With --files the accuracy of whole files of Fashion-MNIST, coded in lanes, of MLPs 784-256-256-10
trained by AdamW. "Rounded" is `compress(target_bytes=, calibration=)` without further training. The
density of these rows is the best of some on held-out images, and in the loop of a grid the one that
fits the bytes. Zeros of 2:4 stay where they are, so these files are rounded to 4 bits without
moments, or were trained on a ternary grid. "same bytes" is the unpruned network, rounded
to as many.
"""

import argparse
import itertools
import math
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip
from jaxclip import calibration, interop, sparsity

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
import fashion

DENSITIES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
PENALTIES = (0.2, 0.4, 0.6, 0.8)
WIDTH, STEP_SIZE = 128, 3e-3
BUDGETS = (29_300, 20_000, 14_000)
FIRST_DENSITY = {"ternary": (0.13, 0.07, 0.04), 3: (0.107, 0.058, 0.034)}


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


def initial(key, num_pixels, width=WIDTH):
    params, sizes = {}, (num_pixels, width, width, 10)
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        kernel = jax.random.normal(jax.random.fold_in(key, i), (n, m))
        params |= {f"kernel_{i}": kernel * math.sqrt(2 / n), f"bias_{i}": jnp.zeros(m)}
    return params


def trained(make, values, data, num_seeds, num_steps, width=WIDTH, finish=lambda params, _: params):
    """What `finish` makes of parameters and state after training, for an optimizer made of each of
    some values; all seeds are stacked."""
    images, labels = map(jnp.asarray, data)

    def loss(params, images, labels):
        found = logits(params, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    def run(case, images, labels):
        value, key = case
        tx = make(value)
        params = initial(key, images.shape[1], width)

        def step(carry, i):
            params, state = carry
            picks = jax.random.randint(jax.random.fold_in(key, i), (128,), 0, len(labels))
            grads = jax.grad(loss)(params, images[picks], labels[picks])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return finish(*jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))[0])

    # Not vmapped: then every step would choose masks, and only the due ones take them.
    keys = jnp.tile(jax.random.split(jax.random.key(0), num_seeds), len(values))
    cases = jnp.repeat(jnp.asarray(values, jnp.float32), num_seeds), keys
    stacked = jax.jit(lambda cases, *data: jax.lax.map(lambda case: run(case, *data), cases))(
        cases, images, labels
    )
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


# --- Files ------------------------------------------------------------------------------------


class Files:
    """Files of networks, and what is needed to make and to judge them."""

    def __init__(self, args):
        source, self.train, self.held_out, self.test = fashion.load(args.data)
        print(f"{source}; {args.seeds} seeds, mean and standard deviation", flush=True)
        self.args, self.rows = args, {}
        picks = np.random.default_rng(0).permutation(len(self.train[1]))[: args.samples]
        self.images = self.train[0][picks]
        rate = optax.cosine_decay_schedule(1e-3, args.steps)
        self.adam = optax.adamw(rate, weight_decay=args.weight_decay)

    def train_all(self, make, values, num_seeds=None, finish=lambda params, _: params):
        sizes = (self.train, num_seeds or self.args.seeds, self.args.steps, 256)
        found = trained(make, values, *sizes, finish)
        return [[jax.tree.map(lambda w, i=i: w[i], x) for i in range(sizes[1])] for x in found]

    def keep(self, density, **options):
        """An optimizer that prunes by the cubic schedule in the first half."""
        cubic = optax.polynomial_schedule(1.0, density, 3, self.args.steps // 2)
        return sparsity.keep_sparse(self.adam, cubic, every=10, **options)

    def on_grid(self, bits, **options):
        """A function of densities to low-bit trees, trained on a grid in the second half."""
        half = self.args.steps // 2
        scales = optax.adam(optax.cosine_decay_schedule(1e-3, self.args.steps))

        def make(density):
            inner = self.keep(density, **options)
            return jaxclip.keep_on_grid(inner, bits, start_step=half, learn_scales=scales)

        def finish(params, state):
            return jaxclip.lowbit.compress_trained(params, state, bits)

        return lambda values, num_seeds=None: self.train_all(make, values, num_seeds, finish)

    def rounded(self, params, target):
        measured = calibration.measure(logits, params, [self.images], progress=False)
        measured = calibration.sensitivities(
            logits, params, [self.images], measured, progress=False
        )
        return jaxclip.compress(params, target_bytes=target, calibration=measured)

    def judged(self, trees):
        """Accuracy on test data and on held-out data, bytes and density, of each tree's file."""
        found = []
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "net.safetensors")
            for tree in trees:
                jaxclip.checkpoints.save(path, tree, coding="lanes", overwrite=True)
                loaded = jaxclip.decompress(jaxclip.checkpoints.load(path))
                scores = [100 * np.mean(np.asarray(logits(loaded, x)).argmax(1) == y)
                          for x, y in (self.test, self.held_out)]  # fmt: skip
                found.append((*scores, path.stat().st_size, density_of(loaded)))
        return np.array(found)

    def show(self, title, found, note=""):
        mean, deviation = found.mean(0), found.std(0, ddof=1) if len(found) > 1 else 0 * found[0]
        print(
            f"{title:42}{mean[2]:9,.0f}{mean[0]:9.2f} +-{deviation[0]:5.2f}{mean[3]:9.3f}  {note}",
            flush=True,
        )

    def best_rounded(self, title, nets, target):
        """The row of the density that is best on held-out images; `nets` are by density."""
        found = {d: self.judged([self.rounded(p, target) for p in x]) for d, x in nets.items()}
        best = max(found, key=lambda d: found[d][:, 1].mean())
        self.show(title, found[best], "" if best == 1 else f"pruned to 1/{round(1 / best)}")

    def fitting(self, title, train, density, target):
        """The row of the density whose files have about so many bytes."""
        (trees,) = train([density], 1)
        size = self.judged(trees)[0, 2]
        density *= ((target - 5000) / (size - 5000)) ** 1.2
        (trees,) = train([density])
        self.show(title, self.judged(trees), f"pruned to {density:.3f}")


def compare_files(args):
    files = Files(args)
    (dense,) = files.train_all(lambda _: files.adam, [1])
    densities = (1 / 4, 1 / 8, 1 / 16)
    during = dict(zip(densities, files.train_all(files.keep, densities), strict=True))
    measured = [calibration.measure(logits, p, [files.images], progress=False) for p in dense]
    pairs = list(zip(dense, measured, strict=True))
    after = {d: [sparsity.prune(p, d, calibration=c) for p, c in pairs] for d in (1 / 2, 1 / 4)}
    print(f"{'':42}{'bytes':>9}{'accuracy':>17}{'density':>9}", flush=True)
    files.show("float32", files.judged(dense))
    for i, target in enumerate(BUDGETS):
        files.best_rounded("not pruned, rounded", {1: dense}, target)
        files.best_rounded("pruned after training, rounded", after, target)
        files.best_rounded("pruned while training, rounded", during, target)
        for bits, first in FIRST_DENSITY.items():
            title = f"the same, on a grid in the loop, {bits}"
            files.fitting(title, files.on_grid(bits), first[i], target)
    (pruned,) = files.train_all(lambda d: files.keep(d, pattern=4), [1 / 2])
    (ternary,) = files.on_grid("ternary", pattern=4)([1 / 2])
    in_loop = ("2:4, ternary in the loop", ternary)
    for title, trees in (("2:4, 4 bits", [jaxclip.compress(p, 4) for p in pruned]), in_loop):
        found = files.judged(trees)
        files.show(title, found)
        files.best_rounded("not pruned, same bytes", {1: dense}, int(found[:, 2].mean()))


# --- Times ------------------------------------------------------------------------------------


def medians(calls, num_rounds):
    """Median seconds of each call, by title, in alternating rounds."""
    times = {title: [] for title in calls}
    for _, (title, call) in itertools.product(range(num_rounds), calls.items()):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        times[title].append(time.perf_counter() - begun)
    return {title: statistics.median(t) for title, t in times.items()}


def compare_steps(num_rounds):
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
    found = medians(steps, num_rounds)
    print("step of Adam with keep_sparse, in steps of Adam alone, 1024 x 1024 weights")
    for title in list(found)[1:]:
        print(f"  {title:20}{found[title] / found['alone']:6.1f}")


def compare_products(num_rounds):
    """Prints the time of products with sparse arrays over that of dense ones."""
    kernel = {"kernel": jax.random.normal(jax.random.key(0), (2048, 2048))}
    densities = (1 / 8, 1 / 32, 1 / 128)
    print("products with 2048 x 2048 weights, in times of the dense product")
    print(f"{'  density':32}" + "".join(f"{f'1/{round(1 / d)}':>9}" for d in densities))
    product = jax.jit(lambda a, b: a @ b)
    for batch in (1, 64):
        x = jax.random.normal(jax.random.key(1), (batch, 2048))
        table = {}
        for density in densities:
            pruned = sparsity.prune(kernel, density)["kernel"]
            calls = {"dense": (x, pruned), "x @ BCOO": (x, interop.to_jax_sparse(pruned))}
            rows = interop.to_jax_sparse(pruned.T, "bcsr")
            calls["BCSR @ x.T"] = (rows, x.T)
            calls = {t: lambda pair=pair: product(*pair) for t, pair in calls.items()}
            jax.block_until_ready([call() for call in calls.values()])
            found = medians(calls, num_rounds)
            for title in list(found)[1:]:
                table.setdefault(title, []).append(found[title] / found["dense"])
        for title, ratios in table.items():
            name = f"  {title}, {batch} rows of x"
            print(f"{name:32}" + "".join(f"{r:9.2f}" for r in ratios), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of Fashion-MNIST; digits if not given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15, help="of timing; 0 for none")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of --files")
    parser.add_argument("--files", action="store_true", help="files of Fashion-MNIST alone")
    args = parser.parse_args()
    if args.files:
        compare_files(args)
        return
    compare_accuracies(args)
    if args.rounds:
        compare_steps(args.rounds)
        compare_products(args.rounds)


if __name__ == "__main__":
    main()
