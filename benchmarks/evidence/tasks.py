"""What is learned: data, network, loss and metrics of each task."""

import functools
import itertools
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
import fashion


class Task(NamedTuple):
    """A task of the comparison; `evaluate` gives "valid", "test" and "train"."""

    init_fn: Callable[[Any], Any]
    loss_fn: Callable[[Any, Any], Any]
    batches: Callable[[Any], Any]
    evaluate: Callable[[Any], dict[str, Any]]
    num_steps: int
    weight_decay: float
    metric: str
    mode: str
    seeds: int
    title: str


# --- Dense networks -------------------------------------------------------------------


def dense_init(sizes):
    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        layers = {}
        for i, (n, m) in enumerate(itertools.pairwise(sizes)):
            kernel = np.float32(np.sqrt(2 / n)) * jax.random.normal(keys[i], (n, m))
            layers[f"dense_{i}"] = {"kernel": kernel, "bias": jnp.zeros(m)}
        return layers

    return init


def dense(params, x):
    for i in range(len(params)):
        layer = params[f"dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"][None]
        x = jax.nn.relu(x) if i + 1 < len(params) else x
    return x


def classification(sizes, train, valid, test, num_steps, batch_size, title):
    def loss_fn(params, batch):
        logits = dense(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def accuracy(params, data):
        return 100 * (dense(params, data[0]).argmax(-1) == data[1]).mean(dtype=jnp.float32)

    shown = tuple(x[:10_000] for x in train)
    data = {"valid": valid, "test": test, "train": shown}
    data = jax.tree.map(jnp.asarray, data)
    return Task(
        init_fn=dense_init(sizes),
        loss_fn=loss_fn,
        batches=jaxclip.random_batches(train, batch_size),
        evaluate=lambda params: {name: accuracy(params, x) for name, x in data.items()},
        num_steps=num_steps,
        weight_decay=0.01,
        metric="test accuracy, %",
        mode="max",
        seeds=5,
        title=title,
    )


def digits(num_steps=1500):
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = np.float32(images[order] / 16), np.int32(labels[order])
    parts = [(images[a:b], labels[a:b]) for a, b in ((0, 1147), (1147, 1347), (1347, 1797))]
    title = "scikit-learn's digits, MLP 64-128-128-10"
    return classification([64, 128, 128, 10], *parts, num_steps, 64, title)


def fashion_mnist(num_steps=2000):
    source, train, valid, test = fashion.load()
    if "Fashion" not in source:
        raise FileNotFoundError(source)
    title = "Fashion-MNIST, MLP 784-256-256-10"
    return classification([784, 256, 256, 10], train, valid, test, num_steps, 128, title)


# --- A small language model -----------------------------------------------------------

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 2, 64, 16


def transformer_init(key):
    keys = iter(jax.random.split(key, 6 * LAYERS + 3))

    def matrix(n, m, gain=1.0):
        return np.float32(gain / np.sqrt(n)) * jax.random.normal(next(keys), (n, m))

    def layer():
        return {
            "norm_1": {"scale": jnp.ones(WIDTH)},
            "attention": {"kernel": matrix(WIDTH, 3 * WIDTH)},
            "project": {"kernel": matrix(WIDTH, WIDTH, (2 * LAYERS) ** -0.5)},
            "norm_2": {"scale": jnp.ones(WIDTH)},
            "up": {"kernel": matrix(WIDTH, 4 * WIDTH, 2**0.5)},
            "down": {"kernel": matrix(4 * WIDTH, WIDTH, (2 * LAYERS) ** -0.5)},
        }

    params = {f"layer_{i}": layer() for i in range(LAYERS)}
    params["bytes"] = {"embedding": np.float32(0.05) * jax.random.normal(next(keys), (256, WIDTH))}
    params["places"] = {
        "embedding": np.float32(0.05) * jax.random.normal(next(keys), (LENGTH, WIDTH))
    }
    params["norm"] = {"scale": jnp.ones(WIDTH)}
    params["out"] = {"kernel": matrix(WIDTH, 256)}
    return params


def transformer(params, tokens):
    def norm(x, p):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["scale"]

    with jax.numpy_rank_promotion("allow"):
        x = params["bytes"]["embedding"][tokens] + params["places"]["embedding"]
        for i in range(LAYERS):
            p = params[f"layer_{i}"]
            qkv = norm(x, p["norm_1"]) @ p["attention"]["kernel"]
            q, k, v = (
                y.reshape(*y.shape[:-1], HEADS, WIDTH // HEADS) for y in jnp.split(qkv, 3, axis=-1)
            )
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.reshape(x.shape) @ p["project"]["kernel"]
            x = x + jax.nn.gelu(norm(x, p["norm_2"]) @ p["up"]["kernel"]) @ p["down"]["kernel"]
        return norm(x, params["norm"]) @ params["out"]["kernel"]


def king_james(file=None):
    """The text, as the Debian package `bible-kjv` prints it, or from a file."""
    if file is not None:
        return pathlib.Path(file).read_bytes()
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def language(num_steps=600):
    text = np.frombuffer(king_james(), np.uint8)
    blocks = text[: len(text) // 4096 * 4096].reshape(-1, 4096)
    place = np.arange(len(blocks)) % 20
    train = jnp.asarray(blocks[place > 1])
    parts = {"valid": blocks[place == 0], "test": blocks[place == 1], "train": blocks[place == 2]}

    def windows(rows):  # two from each of 48 blocks
        rows = rows[np.linspace(0, len(rows) - 1, 48).astype(int), : 2 * LENGTH + 2]
        return jnp.asarray(rows.reshape(-1, LENGTH + 1))

    shown = {name: windows(rows) for name, rows in parts.items()}

    def loss_fn(params, batch):
        tokens = batch.astype(jnp.int32)
        logits = transformer(params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean() / np.float32(np.log(2))

    def batches(key):
        row_key, start_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (BATCH,), 0, len(train))
        starts = jax.random.randint(start_key, (BATCH,), 0, 4096 - LENGTH)
        columns = starts[:, None] + jnp.arange(LENGTH + 1)[None]
        return train[rows[:, None], columns]

    return Task(
        init_fn=transformer_init,
        loss_fn=loss_fn,
        batches=batches,
        evaluate=lambda params: {name: loss_fn(params, x) for name, x in shown.items()},
        num_steps=num_steps,
        weight_decay=0.1,
        metric="bits per byte",
        mode="min",
        seeds=3,
        title="King James text, byte-level transformer of 0.5 M parameters",
    )


TASKS = {
    "digits": digits,
    "fashion": fashion_mnist,
    "fashion_long": functools.partial(fashion_mnist, 6000),
    "language": language,
}
