"""Widths chosen leaf by leaf beside one width for all leaves, at equal bytes.

    python benchmarks/lowbit/allocation.py model.safetensors [--match REGEX]

The weights are the two-dimensional float leaves of a safetensors file whose name `--match` finds.
A scale of 16 bits serves 64 weights. Error is |W - Q|^2 / |W|^2 over all leaves; "one width" is
the best that fits the target. Seconds are those of `compress`; every width was compiled before.
"""

import argparse
import collections
import pathlib
import re
import time

import jax

import jaxclip

GRID = {"axis": 0, "group_size": 64, "scale_dtype": "float16"}
WIDTHS = ("ternary", 2, 3, 4, 5, 6, 8)
TARGETS = (2.25, 2.5, 3.25, 3.5, 4.25, 5.25)


def load_weights(path, match):
    from safetensors.numpy import load_file

    leaves = {k: v for k, v in load_file(path).items() if re.search(match, k) and v.ndim == 2}
    return {k: v.astype("float32") for k, v in leaves.items() if v.dtype.kind == "f"}


def measured(params, bits=None, **target):
    start = time.perf_counter()
    small = jax.block_until_ready(jaxclip.compress(params, jaxclip.Grid(bits, **GRID), **target))
    seconds = time.perf_counter() - start
    return jaxclip.size_report(small, original=params), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=pathlib.Path)
    parser.add_argument("--match", default="")
    arguments = parser.parse_args()
    params = load_weights(arguments.weights, arguments.match)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{len(params)} leaves, {sum(v.size for v in params.values()) / 1e6:.1f} M weights")
    uniform = {width: measured(params, bits=width)[0] for width in WIDTHS}

    titles = f"{'target':>6} {'bits':>7} {'error':>8}   one width {'bits':>6} {'error':>8}"
    print(f"\n{titles} {'change':>7}   leaves")
    for target in TARGETS:
        report, seconds = measured(params, target_bits_per_weight=target)
        fitting = {w: r for w, r in uniform.items() if r.bits_per_weight <= target}
        width, best = min(fitting.items(), key=lambda pair: pair[1].relative_error)
        change = report.relative_error / best.relative_error - 1
        counts = collections.Counter(str(leaf.bits) for leaf in report.leaves)
        print(
            f"{target:>6} {report.bits_per_weight:>7.3f} {report.relative_error:>8.5f}   "
            f"{width:>9} {best.bits_per_weight:>6.3f} {best.relative_error:>8.5f} {change:>7.1%}   "
            + ", ".join(f"{counts[str(w)]} at {w}" for w in WIDTHS if counts[str(w)])
            + f"; {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
