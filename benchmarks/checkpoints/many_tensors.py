"""What a tensor costs in files of many small ones, beside the safetensors library.

    python benchmarks/checkpoints/many_tensors.py [--rounds 5]

CPU microseconds, medians of interleaved runs: loading 100,000 foreign tensors of one entry;
listing them, which safetensors does by names, shapes and dtypes; and loading 1,000 low-bit leaves
of 4,096 codes and 64 scales, two or more tensors each, which safetensors loads without decoding or
checksums.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import safetensors
import safetensors.numpy

import jaxclip
from jaxclip import checkpoints

NUM_TENSORS, NUM_LEAVES = 100_000, 1_000
GRIDS = {
    "4 bits": jaxclip.Grid(4, group_size=64),
    "4 bits, zero points": jaxclip.Grid(4, group_size=64, zero_point=True),
    "4 bits, log8 scales": jaxclip.Grid(4, group_size=64, scale_dtype="log8"),
    "ternary": jaxclip.Grid("ternary", group_size=64),
}


def cpu_seconds(function, path):
    start = time.process_time()
    function(path)
    return time.process_time() - start


def list_tensors(path):
    with safetensors.safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [(name, s.get_shape(), s.get_dtype()) for name, s in slices.items()]


def print_row(title, ours, theirs, path, count, rounds):
    pairs = [(cpu_seconds(ours, path), cpu_seconds(theirs, path)) for _ in range(rounds + 1)][1:]
    times = [1e6 * statistics.median(column) / count for column in zip(*pairs, strict=True)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{title:<32}{times[0]:>10.1f}{times[1]:>13.1f}{ratio:>8.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"jax {jax.__version__}, numpy {np.__version__}, safetensors {safetensors.__version__}")
    print(f"{'microseconds a tensor or leaf':<32}{'jaxclip':>10}{'safetensors':>13}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "net.safetensors"
        tensors = {f"layers.{i}.weight": np.ones(1, np.float32) for i in range(NUM_TENSORS)}
        safetensors.numpy.save_file(tensors, path)
        load = safetensors.numpy.load_file
        print_row("load, foreign", checkpoints.load, load, path, NUM_TENSORS, rounds)
        print_row("inspect, foreign", checkpoints.inspect, list_tensors, path, NUM_TENSORS, rounds)
        kernel = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        for title, grid in GRIDS.items():
            leaf = jax.device_get(jaxclip.quantize(kernel, grid))
            tree = {f"layer_{i}": {"kernel": leaf} for i in range(NUM_LEAVES)}
            checkpoints.save(path, tree, overwrite=True)
            print_row(f"load, {title}", checkpoints.load, load, path, NUM_LEAVES, rounds)


if __name__ == "__main__":
    main()
