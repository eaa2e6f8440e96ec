"""Time of a step of Adam within `keep_on_grid`, by the rule that chooses the grid.

    python benchmarks/lowbit/training_on_grid.py [--rounds 15]

Milliseconds a step, medians of alternating rounds, and in brackets the seconds to compile it. The
gradients are given: there is no forward and no backward pass in it. "before" is a step before
`start_step`, with `least_squares`.
"""

import argparse
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import jaxclip

NETWORKS = {"digits": (64, 128, 128, 10), "Fashion-MNIST": (784, 256, 256, 10)}
NETWORKS |= {"2 M weights": (1024, 1024, 1024)}
RULES = {"least_squares": jaxclip.thresholds.least_squares, "mse_optimal": jaxclip.mse_optimal}
RULES |= {"max_abs": jaxclip.max_abs}


def weights(sizes):
    pairs = list(itertools.pairwise(sizes))
    keys = jax.random.split(jax.random.key(0), len(pairs))
    return [
        {"kernel": (2 / n) ** 0.5 * jax.random.normal(key, (n, m)), "bias": jnp.zeros(m)}
        for key, (n, m) in zip(keys, pairs, strict=True)
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    adam = optax.adam(1e-3)
    print(f"jax {jax.__version__}, {jax.default_backend()}")
    titles = ("Adam alone", "before", *RULES)
    print(f"{'':14}{'bits':>8}" + "".join(f"{title:>19}" for title in titles))
    for network, sizes in NETWORKS.items():
        params = weights(sizes)
        grads = jax.tree.map(lambda w: 0.01 * w, params)
        for bits in ("ternary", 2):
            late = jaxclip.keep_on_grid(adam, bits, start_step=10**6)
            on_grid = [jaxclip.keep_on_grid(adam, bits, rule=rule) for rule in RULES.values()]
            steps, compiled_in = [], []
            for tx in (adam, late, *on_grid):
                state, begun = tx.init(params), time.perf_counter()
                update = jax.jit(tx.update).lower(grads, state, params).compile()
                compiled_in.append(time.perf_counter() - begun)
                steps.append(lambda update=update, s=state, g=grads, p=params: update(g, s, p))
            times = [[] for _ in steps]
            for i in range(args.rounds + 1):  # the first warms up
                for step, taken in zip(steps, times, strict=True):
                    begun = time.perf_counter()
                    jax.block_until_ready(step())
                    taken += [time.perf_counter() - begun] if i else []
            found = zip((1e3 * statistics.median(t) for t in times), compiled_in, strict=True)
            cells = "".join(f"{f'{ms:.2f} ({seconds:.1f})':>19}" for ms, seconds in found)
            print(f"{network:14}{bits!s:>8}{cells}")


if __name__ == "__main__":
    main()
