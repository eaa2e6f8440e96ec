"""The equation itself: w <- w - alpha * sign(grad J(w)), then clip w to [-t, t].

    pip install -e ".[examples]" && python examples/seed_equation.py

A softmax classifier on scikit-learn's digits whose weights live in a NumPy file. Each
round loads the file, trains, and saves it again, until a stop rule fires.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip

ALPHA, THRESHOLD = 2e-3, 0.25
STEPS_PER_ROUND, MAX_ROUNDS, PATIENCE = 25, 100, 5

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, labels = np.float32(images[order] / 16), labels[order]
train, test = (images[:1347], labels[:1347]), (images[1347:], labels[1347:])


def J(w):
    return optax.softmax_cross_entropy_with_integer_labels(train[0] @ w, train[1]).mean()


@jax.jit
def step_by_sign(w):
    return w - ALPHA * jnp.sign(jax.grad(J)(w))


@jax.jit
def step_by_jaxclip(w):
    optimizer = jaxclip.sign_sgd(ALPHA)
    updates, _ = optimizer.update(jax.grad(J)(w), optimizer.init(w))
    return optax.apply_updates(w, updates)


@jax.jit
def clip(w):
    return jaxclip.clip_weights(w, THRESHOLD)


def load(file):
    return jnp.asarray(jaxclip.checkpoints.load(file))


def save(file, w):
    jaxclip.checkpoints.save(file, w, overwrite=True)


def should_stop(losses):
    """No better loss in the last rounds, or enough rounds."""
    recent, before = losses[-PATIENCE:], losses[:-PATIENCE]
    return len(losses) >= MAX_ROUNDS or (bool(before) and min(recent) > min(before) - 1e-4)


def accuracy(w):
    return float(((test[0] @ w).argmax(-1) == test[1]).mean())


with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "weights.npy"
    np.save(file, np.random.default_rng(1).normal(0, 0.2, (64, 10)).astype(np.float32))
    print(f"start:    test accuracy {accuracy(load(file)):.4f}")

    losses = []
    while not should_stop(losses):
        w = load(file)
        for _ in range(STEPS_PER_ROUND):
            before, w = w, clip(step_by_sign(w))
        save(file, w)
        losses.append(float(J(w)))
        if len(losses) % 5 == 0:
            print(f"round {len(losses):2d}: test accuracy {accuracy(w):.4f}, loss {losses[-1]:.4f}")
    print(f"stopped after {len(losses)} rounds: no better loss for {PATIENCE} rounds")

    w = load(file)
    on_bound = float((jnp.abs(w) == jnp.abs(w).max()).mean())
    print(f"test accuracy {accuracy(w):.4f}; {on_bound:.0%} of the weights on the bound")

assert (w == clip(step_by_jaxclip(before))).all(), "jaxclip.sign_sgd is the equation, bit for bit"
assert np.abs(np.asarray(w, np.float64)).max() <= THRESHOLD
assert accuracy(w) > 0.9
