"""Grokking: how soon a network generalizes, with weight decay and with a bound of its rows.

    python benchmarks/papers/grok.py [--seeds 5] [--steps 10000] [--picture docs/grok.png]

The network of Gromov (https://arxiv.org/abs/2301.02679), one layer of squares, learns a + b modulo
43 from half of all pairs. It knows these soon, and the others much later or never. "Clip to grok"
(https://github.com/NiftyliuS/cliptogrok) reports that a bound of the norm of each row of weights
after each step of Lion, without weight decay, makes that 39 to 249 times as soon as with AdamW.

Here: AdamW with three weight decays, Lion, and Lion with the bound, all with the same step size.
The script fails if a claim at its end does not hold. Five CPU minutes.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxclip
from jaxclip.weights import max_norm

MODULUS, WIDTH, STEP_SIZE, BOUND, GOAL, EVERY = 43, 128, 1e-2, 3.0, 0.95, 20


def optimizers():
    lion = jaxclip.lion(STEP_SIZE, 0.9, 0.97, weight_decay=0.0)
    found = {
        f"AdamW, decay {decay}": optax.adamw(STEP_SIZE, b2=0.98, weight_decay=decay)
        for decay in (0.01, 0.1, 1.0)
    }
    bounded = optax.chain(lion, jaxclip.project_weights(max_norm(BOUND)))
    return found | {"Lion, no decay": lion, f"Lion, max_norm({BOUND:g})": bounded}


def init(key):
    keys = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(keys[0], (MODULUS, WIDTH)) * 2**-0.5,
        "second": jax.random.normal(keys[1], (MODULUS, WIDTH)) * 2**-0.5,
        "out": jax.random.normal(keys[2], (WIDTH, MODULUS)) * WIDTH**-0.5,
    }


def scores(params, pairs):
    """Mean loss and accuracy for pairs of numbers."""
    a, b = pairs
    logits = jnp.square(params["first"][a] + params["second"][b]) @ params["out"]
    total = (a + b) % MODULUS
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, total)
    return losses.mean(), (logits.argmax(-1) == total).mean()


def accuracies(tx, args):
    """Accuracy for the pairs trained on and for the others: (seeds, records) each."""

    def run(key):
        init_key, split_key = jax.random.split(key)
        pairs = jnp.divmod(jax.random.permutation(split_key, MODULUS**2), MODULUS)
        train, test = ([x[rows] for x in pairs] for rows in (np.s_[::2], np.s_[1::2]))
        params = init(init_key)

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: scores(p, train)[0])(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        def to_record(carry, _):
            carry, _ = jax.lax.scan(step, carry, None, EVERY)
            return carry, (scores(carry[0], train)[1], scores(carry[0], test)[1])

        start = params, tx.init(params)
        return jax.lax.scan(to_record, start, None, args.steps // EVERY)[1]

    keys = jax.random.split(jax.random.key(0), args.seeds)
    return map(np.asarray, jax.jit(jax.vmap(run))(keys))


def first_steps(accuracy):
    """The step from which each run is at the goal; infinite if it never is."""
    is_there = accuracy >= GOAL
    steps = EVERY * (1.0 + is_there.argmax(-1))
    return np.where(is_there.any(-1), steps, np.inf)


def draw(curves, file):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, accuracy in curves.items():
        steps = EVERY * np.arange(1, accuracy.shape[1] + 1)
        (line,) = axes.plot(steps, 100 * np.median(accuracy, axis=0), label=name)
        for one in accuracy:
            axes.plot(steps, 100 * one, color=line.get_color(), alpha=0.25, linewidth=0.7)
    axes.set(
        xscale="log",
        xlabel="steps",
        ylabel="accuracy for pairs never seen, in percent",
        title=f"a + b modulo {MODULUS}, learned from half of all pairs",
    )
    axes.legend()
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--picture", help="file to draw the curves to")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {args.seeds} seeds, {args.steps} steps of {STEP_SIZE:g}")
    print(
        f"{'steps to 95 %, median (range)':24}{'trained on':>16}{'not seen':>24}{'at the end':>12}"
    )
    reached, curves = {}, {}
    for name, tx in optimizers().items():
        train, test = accuracies(tx, args)
        soon, late = first_steps(train), first_steps(test)
        reached[name], curves[name] = late, test
        span = f"{np.median(late):.0f} ({late.min():.0f} to {late.max():.0f})"
        end = 100 * np.median(test[:, -1])
        print(f"{name:24}{np.median(soon):16.0f}{span:>24}{end:10.0f} %", flush=True)
    if args.picture:
        draw(curves, args.picture)
    weak, strong = reached["AdamW, decay 0.01"], reached["AdamW, decay 1.0"]
    bounded = reached[f"Lion, max_norm({BOUND:g})"]
    claims = {
        "Lion without a bound never generalizes": np.isinf(reached["Lion, no decay"]).all(),
        "with it every seed does": np.isfinite(bounded).all(),
        "at least ten times as soon as AdamW with a decay of 0.01": (
            np.minimum(weak, args.steps).min() > 10 * np.median(bounded)
        ),
        "about as soon as AdamW with the best decay (not 39 times)": (
            0.5 < np.median(strong) / np.median(bounded) < 2
        ),
    }
    print()
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    sys.exit(not all(claims.values()))


if __name__ == "__main__":
    main()
