"""Bits and error of low-bit grids: codes of a fixed width beside codes that are entropy coded.

    python benchmarks/rates.py model.safetensors [--match encoder] [--picture docs/rates.png]

The weights are the two-dimensional float leaves of a safetensors file whose name has `--match` in
it. Error is |W - Q|^2 / |W|^2 over all of them. Bits a weight include scales of 16 bits. "ideal"
is the order-0 entropy of each leaf's codes, "Huffman" what zlib's Z_HUFFMAN_ONLY makes of them,
one code a byte, tables included. "saved" is against the fixed-width row above, at equal error.
"""

import argparse
import pathlib
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxclip
from jaxclip.rates import code_entropy

SCALE_BITS = 16
WIDTHS = ("ternary", 2, 3, 4)
RATES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)


def load_weights(path, match):
    from safetensors.numpy import load_file

    leaves = [v for k, v in load_file(path).items() if match in k and v.ndim == 2]
    return [jnp.asarray(v, jnp.float32) for v in leaves if v.dtype.kind == "f"]


def squared_error(leaf, q):
    difference = np.asarray(leaf, np.float64) - np.asarray(jaxclip.dequantize(q), np.float64)
    return np.sum(difference**2)


def huffman_bits(codes):
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    symbols = np.asarray(codes).tobytes()
    return 8 * len(coder.compress(symbols) + coder.flush())


def fixed(leaves, bits, group_size):
    """Bits a weight and error of codes of a fixed width."""
    total = sum(leaf.size for leaf in leaves)
    spent = error = 0
    for leaf in leaves:
        q = jaxclip.quantize(leaf, bits, axis=0, group_size=group_size)
        codes = jaxclip.quantization.num_packed_bytes(leaf.size, bits)
        spent += 8 * codes + SCALE_BITS * q.scale.size
        error += squared_error(leaf, q)
    return spent / total, error / sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves)


def coded(leaves, axis=0, **goal):
    """Bits a weight (ideal, Huffman), error, and seconds of quantizing."""
    total = sum(leaf.size for leaf in leaves)
    ideal = huffman = error = seconds = 0
    for leaf in leaves:
        start = time.perf_counter()
        q = jaxclip.quantize(leaf, 8, threshold=jaxclip.rate_optimal(**goal), axis=axis)
        jax.block_until_ready(q.qvalue)
        seconds += time.perf_counter() - start
        scales = SCALE_BITS * q.scale.size
        ideal += float(code_entropy(q.qvalue)) * leaf.size + scales
        huffman += huffman_bits(q.qvalue) + scales
        error += squared_error(leaf, q)
    energy = sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves)
    return ideal / total, huffman / total, error / energy, seconds


def gaussian_bound(error):
    """Bits a weight that no code of independent Gaussian numbers can go below."""
    return 0.5 * np.log2(1 / error)


def draw(curves, file):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    styles = {
        "fixed, channel": ("#D55E00", "v", "fixed width,\na scale a channel", (4.08, 0.0155)),
        "fixed, group 64": ("#E69F00", "s", "fixed width,\na scale for 64 weights", (2.45, 0.13)),
        "coded": ("#0072B2", "o", "entropy coded\n(rate_optimal)", (4.15, 0.0053)),
    }
    for name, (color, marker, label, place) in styles.items():
        bits, errors = np.asarray(curves[name]).T
        axes.plot(bits, errors, color=color, marker=marker, markersize=6)
        axes.annotate(label, place, color=color, fontweight="bold")
    for bits, errors, name in zip(
        *np.asarray(curves["fixed, group 64"]).T, ("ternary", "2", "3", "4"), strict=True
    ):
        axes.annotate(name, (bits, errors), xytext=(6, 6), textcoords="offset points", fontsize=9)
    errors = np.geomspace(0.25, 0.001, 50)
    axes.plot(gaussian_bound(errors), errors, color="0.35", linestyle="--")
    axes.annotate(
        "bound for Gaussian weights", (1.9, 0.045), rotation=-31, color="0.35", ha="right"
    )
    axes.set(
        yscale="log",
        xlim=(1, 4.8),
        ylim=(0.0015, 0.3),
        xlabel="bits a weight, scales included",
        ylabel="relative squared error of the weights",
        title="Down and to the left is better",
    )
    axes.grid(alpha=0.3, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=pathlib.Path)
    parser.add_argument("--match", default="encoder")
    parser.add_argument("--picture", type=pathlib.Path)
    arguments = parser.parse_args()
    leaves = load_weights(arguments.weights, arguments.match)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    print(f"{len(leaves)} leaves, {sum(v.size for v in leaves) / 1e6:.1f} M weights")
    curves = {"fixed, channel": [], "fixed, group 64": [], "coded": []}

    print(f"\n{'codes':<26} {'error':>8} {'ideal':>7} {'Huffman':>8} {'saved':>7} {'saved':>8}")
    for bits in WIDTHS:
        for name, group_size in (("fixed, channel", None), ("fixed, group 64", 64)):
            spent, error = fixed(leaves, bits, group_size)
            curves[name].append((spent, error))
            width = f"{bits} bits" if bits != "ternary" else bits
            print(f"{name + ', ' + width:<26} {error:>8.5f} {spent:>7.3f}")
            ideal, huffman, reached, _ = coded(leaves, error=error)
            saved = [f"{100 * (1 - b / spent):>6.1f}%" for b in (ideal, huffman)]
            line = f"{reached:>8.5f} {ideal:>7.3f} {huffman:>8.3f} {saved[0]} {saved[1]:>8}"
            print(f"{'  coded, the same error':<26} {line}", flush=True)

    print(
        f"\n{'coded, step a channel':<26} {'error':>8} {'ideal':>7} {'Huffman':>8} {'seconds':>8}"
    )
    for rate in RATES:
        ideal, huffman, error, seconds = coded(leaves, bits_per_weight=rate)
        curves["coded"].append((ideal, error))
        print(
            f"{f'rate_optimal({rate})':<26} {error:>8.5f} {ideal:>7.3f} {huffman:>8.3f} "
            f"{seconds:>8.2f}",
            flush=True,
        )
    ideal, huffman, error, seconds = coded(leaves, axis=None, bits_per_weight=3.0)
    name = "  (3.0), one step a leaf"
    print(f"{name:<26} {error:>8.5f} {ideal:>7.3f} {huffman:>8.3f} {seconds:>8.2f}")
    if arguments.picture:
        draw(curves, arguments.picture)


if __name__ == "__main__":
    main()
