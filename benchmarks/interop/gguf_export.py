"""Error and time of GGUF blocks as `jaxclip.interop.to_gguf` makes them, beside the gguf package.

    python benchmarks/interop/gguf_export.py [model.safetensors] [--match encoder]

takes all two-dimensional float leaves of a safetensors file whose names contain `--match` and
whose rows are a multiple of the block long, and weights drawn from several distributions. Error is
|W - W'|^2 / |W|^2 with W' read by the gguf package for both sides; bytes are the same. Time is
one pass after a first.
"""

import argparse
import pathlib
import time
from importlib.metadata import version

import gguf
import jax
import numpy as np

from jaxclip.interop.gguf_blocks import encode_blocks
from jaxclip.interop.gguf_packing import WRITTEN


def drawn(block_size, num_weights=2**19):
    rng = np.random.default_rng(0)
    size = (num_weights // block_size, block_size)
    outlier = rng.normal(size=size)
    outlier[:, 0] *= 30
    return {
        "Gaussian": rng.normal(size=size),
        "uniform": rng.uniform(-1, 1, size),
        "Laplace": rng.laplace(size=size),
        "Student-t, 3": rng.standard_t(3, size),
        "one outlier a block": outlier,
        "boxed, half on +-t": np.clip(rng.normal(size=size), -0.6745, 0.6745),
        "one-sided": np.abs(rng.normal(size=size)),
    }


def file_weights(path, match, block_size):
    from safetensors.numpy import load_file

    leaves = {k: v for k, v in load_file(path).items() if match in k and v.ndim == 2}
    blocks = [
        v.astype(np.float32).reshape(-1, block_size)
        for v in leaves.values()
        if v.dtype.kind in "fV" and v.shape[1] % block_size == 0
    ]
    return np.concatenate(blocks)


def measure(x, kind):
    quant_type = gguf.GGMLQuantizationType[kind]
    energy = np.sum(np.square(x, dtype=np.float64))
    row = []
    for encode in (lambda: encode_blocks(x, kind), lambda: gguf.quants.quantize(x, quant_type)):
        encode()
        start = time.perf_counter()
        data = encode()
        seconds = time.perf_counter() - start
        difference = gguf.quants.dequantize(data, quant_type).astype(np.float64) - x
        row += [np.sum(difference**2) / energy, np.sum(difference**2, axis=1), seconds]
    (ours, our_blocks, our_time), (theirs, their_blocks, their_time) = row[:3], row[3:]
    num_worse = np.sum(our_blocks > their_blocks * (1 + 1e-6))
    return ours, theirs, num_worse, x.size / our_time / 1e6, x.size / their_time / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path, nargs="?")
    parser.add_argument("--match", default="", help="part of the names of the leaves that count")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, gguf {version('gguf')}, {jax.devices()[0].device_kind}")
    for kind, form in WRITTEN.items():
        weights = {name: x.astype(np.float32) for name, x in drawn(form.size).items()}
        if arguments.file:
            of_file = file_weights(arguments.file, arguments.match, form.size)
            weights = {arguments.file.name: of_file, **weights}
        print(f"\n{kind}, {8 * form.num_bytes / form.size:.4g} bits a weight")
        print(
            f"{'weights':<20} {'M':>5} {'gguf':>10} {'jaxclip':>10} {'ratio':>6} "
            f"{'worse blocks':>12} {'M/s, gguf':>9} {'jaxclip':>8}"
        )
        for name, x in weights.items():
            ours, theirs, num_worse, speed, their_speed = measure(x, kind)
            print(
                f"{name:<20} {x.size / 1e6:>5.1f} {theirs:>10.3e} {ours:>10.3e} "
                f"{ours / theirs:>6.3f} {num_worse:>12} {their_speed:>9.0f} {speed:>8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
