"""Cautious weight decay: where the loss ends, and how large the weights are, by the coefficient.

    python benchmarks/papers/cautious_decay.py [--seeds 5] [--steps 1500]

A regression with more weights than examples has many minima. Decay as in AdamW ends beside all of
them, the further the larger its coefficient is. Cautious decay ends in one of them, and in one of a
smaller norm than without decay: the picture of Chen et al., 2510.12402. Then digits: the loss and
the accuracy on held-out images by the coefficient. The script fails if a claim at its end does not
hold.
"""

import argparse
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from jaxclip.sign import cautious_decay

COEFFICIENTS = (0.01, 0.1, 1.0)
KINDS = ("plain", "cautious")


def optimizer(rate, kind, coefficient):
    decay = {
        "none": optax.identity(),
        "plain": optax.add_decayed_weights(coefficient),
        "cautious": cautious_decay(coefficient, is_direction=True),
    }[kind]
    return optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))


def trained(tx, loss_fn, params, num_steps):
    def step(carry, i):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))[0][0]


def settings():
    yield "none", 0.0
    yield from itertools.product(KINDS, COEFFICIENTS)


def size_of(params):
    return jnp.sqrt(sum(jnp.sum(w**2) for w in jax.tree.leaves(params)))


# --- A regression with many minima ------------------------------------------------------


def regression(args):
    """The loss and the norm of the weights at the end, means over seeds."""

    def run(key, kind, coefficient):
        keys = jax.random.split(key, 3)
        inputs = jax.random.normal(keys[0], (20, 60))
        targets = inputs @ jax.random.normal(keys[1], (60,))

        def loss_fn(w, step):
            del step
            return jnp.mean((inputs @ w - targets) ** 2) / 2

        # A step size that falls to 0, so that what is left is not the size of the last step.
        tx = optimizer(optax.cosine_decay_schedule(3e-2, args.steps), kind, coefficient)
        w = trained(tx, loss_fn, 2 * jax.random.normal(keys[2], (60,)), args.steps)
        return loss_fn(w, 0), size_of(w)

    keys = jax.random.split(jax.random.key(0), args.seeds)
    print(f"{'regression':22}{'loss':>12}{'norm':>8}")
    found = {}
    for kind, coefficient in settings():
        runs = jax.jit(jax.vmap(lambda key, k=kind, c=coefficient: run(key, k, c)))(keys)
        loss, norm = (float(x.mean()) for x in runs)
        found[kind, coefficient] = loss, norm
        print(f"{kind:10}{coefficient:12}{loss:12.1e}{norm:8.2f}", flush=True)
    return found


# --- Digits -----------------------------------------------------------------------------


def digits(args):
    """The loss in training, and loss and accuracy on held-out images, means over seeds."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = jnp.asarray(images[order] / 16 - 0.3, jnp.float32), jnp.asarray(labels[order])
    held_out, train = (images[:797], labels[:797]), (images[797:], labels[797:])

    def mean_loss(params, x, y):
        logits = jax.nn.relu(x @ params["in"]) @ params["out"]
        is_right = logits.argmax(-1) == y
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), 100 * is_right.mean()

    def run(key, kind, coefficient):
        keys = jax.random.split(key, 3)
        params = {
            "in": 0.2 * jax.random.normal(keys[0], (64, 128)),
            "out": 0.1 * jax.random.normal(keys[1], (128, 10)),
        }

        def loss_fn(params, step):
            rows = jax.random.randint(jax.random.fold_in(keys[2], step), (64,), 0, 1000)
            return mean_loss(params, train[0][rows], train[1][rows])[0]

        tx = optimizer(optax.cosine_decay_schedule(3e-3, args.steps), kind, coefficient)
        params = trained(tx, loss_fn, params, args.steps)
        return mean_loss(params, *train)[0], *mean_loss(params, *held_out), size_of(params)

    keys = jax.random.split(jax.random.key(1), args.seeds)
    print(f"\n{'digits':22}{'train loss':>12}{'held-out loss':>15}{'accuracy':>16}{'norm':>8}")
    found = {}
    for kind, coefficient in settings():
        runs = jax.jit(jax.vmap(lambda key, k=kind, c=coefficient: run(key, k, c)))(keys)
        train_loss, loss, accuracy, norm = (float(x.mean()) for x in runs)
        found[kind, coefficient] = train_loss, loss
        error = float(runs[2].std()) / args.seeds**0.5
        print(
            f"{kind:10}{coefficient:12}{train_loss:12.1e}{loss:15.3f}"
            f"{accuracy:9.2f} +- {error:.2f}{norm:8.2f}",
            flush=True,
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.default_backend()}, {args.seeds} seeds, {args.steps} steps")
    exact, learned = regression(args), digits(args)
    largest = COEFFICIENTS[-1]
    claims = {
        "regression: plain decay ends beside the minima, cautious decay in one": (
            exact["cautious", largest][0] < 1e-4 * exact["plain", largest][0]
        ),
        "regression: cautious decay ends in a minimum of a smaller norm": (
            exact["cautious", largest][1] < 0.9 * exact["none", 0.0][1]
        ),
        "digits: the training loss stands the largest coefficient better": (
            learned["cautious", largest][0] < learned["plain", largest][0]
        ),
    }
    print()
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    sys.exit(not all(claims.values()))


if __name__ == "__main__":
    main()
