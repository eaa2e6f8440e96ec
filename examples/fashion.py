"""Data of the examples: Fashion-MNIST, or scikit-learn's digits where it is not at hand.

Fashion-MNIST is read from its four idx files, gzipped or not: from a folder, or from where
the Debian package `dataset-fashion-mnist` put them (`apt install dataset-fashion-mnist`).
"""

import gzip
import itertools
import pathlib
import subprocess

import numpy as np
from sklearn.datasets import load_digits

PACKAGE = "dataset-fashion-mnist"
NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def load(folder=None):
    """Says what was loaded; (images, labels) to train on, to stop by, and to test on."""
    files = find_files(folder)
    if files:
        source = f"Fashion-MNIST from {files[0].parent}"
        images, labels, test_images, test_labels = (read_idx(file) for file in files)
    else:
        source = f"scikit-learn's digits: there is neither --data nor the package {PACKAGE}"
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        (test_images, images), (test_labels, labels) = (
            np.split(x[order], [450]) for x in (images, labels)
        )
    mean, deviation = np.float32(images.mean()), np.float32(images.std())

    def prepare(images, labels):
        pixels = (images.reshape(len(images), -1) - mean) / deviation
        return pixels.astype(np.float32), labels.astype(np.int32)

    images, labels = prepare(images, labels)
    num_held_out = len(labels) // 10
    held_out = images[:num_held_out], labels[:num_held_out]
    train = images[num_held_out:], labels[num_held_out:]
    return source, train, held_out, prepare(test_images, test_labels)


def find_files(folder=None):
    """The four idx files of a folder, or of the Debian package; none if it is not installed."""
    if folder is None:
        try:
            command = ["dpkg", "-L", PACKAGE]
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return []
        there = [pathlib.Path(line) for line in listed.splitlines()]
    else:
        there = sorted(pathlib.Path(folder).iterdir())
    found = {path.name.removesuffix(".gz"): path for path in there}
    missing = [name for name in NAMES if name not in found]
    if missing:
        raise FileNotFoundError(f"{folder or PACKAGE} has no {', '.join(missing)} (or .gz).")
    return [found[name] for name in NAMES]


def read_idx(file):
    """An idx file of bytes: two zeros, 8 for bytes, the number of dimensions, the dimensions."""
    content = file.read_bytes()
    content = gzip.decompress(content) if file.suffix == ".gz" else content
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    if content[:3] != b"\0\0\x08" or len(content) != 4 + 4 * rank + shape.prod(dtype=np.int64):
        raise ValueError(f"{file} is not a whole idx file of bytes.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def batches(data, size, position=0):
    """Batches without end, shuffled epoch by epoch, from the `position`-th one on."""
    images, labels = data
    per_epoch = len(labels) // size
    for epoch in itertools.count(position // per_epoch):
        order = np.random.default_rng(epoch).permutation(len(labels))
        for place in range(position % per_epoch, per_epoch):
            picks = order[place * size : (place + 1) * size]
            yield images[picks], labels[picks]
        position = 0
