"""Averages of weights: what a constant step size loses, they win back.

    python benchmarks/papers/averages.py [--seeds 5] [--steps 2000]

Networks on digits with noisy labels, by signum with a constant step size: loss and accuracy on
held-out images of the last weights and of averages, beside a step size that falls to 0: in small
what Morales-Brotons et al. (2411.18704) and Izmailov et al. (1803.05407) report. All weights are
in a box, and so are their averages. The script fails if a claim at its end does not hold.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip
from jaxclip.training import average_weights, averaged_weights

BOX = 0.25


def data():
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    images, labels = (images[order] / 16 - 0.3).astype(np.float32), labels[order]
    noisy = np.where(rng.random(1000) < 0.1, rng.integers(0, 10, 1000), labels[797:])
    return jax.tree.map(jnp.asarray, ((images[797:], noisy), (images[:797], labels[:797])))


def scores(params, x, y):
    logits = jax.nn.relu(x @ params["in"]) @ params["out"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), 100 * (logits.argmax(-1) == y).mean()


def trained(rate, averages, args):
    """Held-out scores of the last weights and of each average, and the largest weight of all."""
    train, held_out = data()

    def run(key):
        keys = jax.random.split(key, 3)
        params = {
            "in": 0.1 * jax.random.normal(keys[0], (64, 128)),
            "out": 0.1 * jax.random.normal(keys[1], (128, 10)),
        }
        params = jaxclip.clip_weights(params, BOX)
        tx = optax.chain(jaxclip.signum(rate), jaxclip.project_weights(jaxclip.box(BOX)))

        def step(carry, i):
            params, state, states = carry
            rows = jax.random.randint(jax.random.fold_in(keys[2], i), (32,), 0, 1000)
            batch = train[0][rows], train[1][rows]
            grads = jax.grad(lambda p: scores(p, *batch)[0])(params)
            updates, state = tx.update(grads, state, params)
            states = {
                name: averages[name].update(updates, s, params)[1] for name, s in states.items()
            }
            return (optax.apply_updates(params, updates), state, states), None

        states = {name: link.init(params) for name, link in averages.items()}
        carry = params, tx.init(params), states
        (params, _, states), _ = jax.lax.scan(step, carry, jnp.arange(args.steps))
        found = {"last weights": params}
        found |= {name: averaged_weights(state, params) for name, state in states.items()}
        largest = [jnp.abs(w).max() for w in jax.tree.leaves(found)]
        return {name: scores(w, *held_out) for name, w in found.items()}, jnp.stack(largest).max()

    keys = jax.random.split(jax.random.key(0), args.seeds)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(keys))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    averages = {
        "average, decay 0.99": average_weights(0.99),
        "average, decay 0.998": average_weights(0.998),
        "uniform, last half": average_weights(1.0, start_step=args.steps // 2),
    }
    rate = 2e-3
    rows = {}
    for title, schedule, beside in (
        ("constant", rate, averages),
        ("cosine to 0", optax.cosine_decay_schedule(rate, args.steps), {}),
    ):
        found, largest = trained(schedule, beside, args)
        rows |= {(title, name): values for name, values in found.items()}
        is_inside = bool(np.all(largest <= BOX))
        print(f"{title}: largest weight of all runs and averages {largest.max()}, box {BOX}")
        if not is_inside:
            sys.exit("FAILS: weights or averages are outside of the box")
    print(f"\njax {jax.__version__}, {args.seeds} seeds, {args.steps} steps")
    print(f"{'step size':14}{'weights':24}{'held-out loss':>20}{'accuracy':>17}")
    for (title, name), (loss, accuracy) in rows.items():
        errors = [x.std(ddof=1) / args.seeds**0.5 for x in (loss, accuracy)]
        print(
            f"{title:14}{name:24}{loss.mean():12.3f} +- {errors[0]:.3f}"
            f"{accuracy.mean():9.2f} +- {errors[1]:.2f}"
        )
    last, cosine = rows["constant", "last weights"], rows["cosine to 0", "last weights"]
    best = rows["constant", "average, decay 0.998"]
    claims = {
        "the average is better than the last weights, for every seed": np.all(best[0] < last[0]),
        "it wins back at least half of what the constant step size loses": (
            (last[0] - best[0]).mean() > 0.5 * (last[0] - cosine[0]).mean()
        ),
    }
    print()
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    sys.exit(not all(claims.values()))


if __name__ == "__main__":
    main()
