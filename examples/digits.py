"""What the examples on more than one device train, as in quickstart.py, and what they count."""

import re

import flax.linen as nn
import numpy as np
import optax
from sklearn.datasets import load_digits

images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, labels = np.float32(images[order] / 16), np.int32(labels[order])
train, test = (images[:1347], labels[:1347]), (images[1347:], labels[1347:])
model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])


def loss_fn(params, batch):
    logits = model.apply(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def accuracy(params):
    """Of parameters that lie on one device."""
    return float((model.apply(params, test[0]).argmax(-1) == test[1]).mean())


def draw(num_steps, batch_size):
    """Which examples are in the batch of each step."""
    return np.random.default_rng(1).integers(len(train[0]), size=(num_steps, batch_size))


def collective_bytes(program):
    """Bytes of the results of a step's collectives, on one device."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    total = 0
    for results in re.findall(rf"= (.*?) (?:{kinds})(?:-done)?\(", program.as_text()):
        for bits, dims in re.findall(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]", results):
            total += int(np.prod([int(d) for d in dims.split(",") if d])) * int(bits or 8) // 8
    return total
