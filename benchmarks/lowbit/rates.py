"""Bits and error of low-bit grids: codes of a fixed width beside codes that are entropy coded.

    python benchmarks/lowbit/rates.py model.safetensors [--match encoder] [--picture docs/rates.png]

The weights are the two-dimensional float leaves of a safetensors file whose name has `--match` in
it. Error is |W - Q|^2 / |W|^2 over all of them. "ideal" is the order-0 entropy of each leaf's codes
and its float16 scales; the others are the bytes of files that `checkpoints.save` writes, headers
included, per weight. "saved" is against the fixed-width file of the row above, at equal error.

In the last table codes are chosen at a price of a bit (`cheaper_codes`); "saved" is against the
file of nearest codes whose steps make the error the same, to a thousandth.
"""

import argparse
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxclip
from jaxclip.thresholds.by_rate import code_entropy

WIDTHS = ("ternary", 2, 3, 4)
RATES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)
PRICED_RATES = (1.6, 2.1, 3.05, 4.05)
PRICE = 0.12


def load_weights(path, match):
    from safetensors.numpy import load_file

    leaves = [v for k, v in load_file(path).items() if match in k and v.ndim == 2]
    return [jnp.asarray(v, jnp.float32) for v in leaves if v.dtype.kind == "f"]


def squared_error(leaf, q):
    difference = np.asarray(leaf, np.float64) - np.asarray(jaxclip.dequantize(q), np.float64)
    return np.sum(difference**2)


def file_bits(tree, coding=None):
    """Bits of the file of a tree of low-bit arrays, per weight."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "small.safetensors")
        jaxclip.checkpoints.save(path, tree, coding=coding)
        return 8 * path.stat().st_size / sum(q.qvalue.size for q in tree)


def relative_error(leaves, tree):
    energy = sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves)
    return sum(squared_error(x, q) for x, q in zip(leaves, tree, strict=True)) / energy


def fixed(leaves, bits, group_size):
    """Bits a weight and error of codes of a fixed width."""
    grid = jaxclip.Grid(bits, axis=0, group_size=group_size, scale_dtype="float16")
    tree = [jaxclip.quantize(leaf, grid) for leaf in leaves]
    return file_bits(tree), relative_error(leaves, tree)


def coded(leaves, axis=0, **goal):
    """Bits a weight (ideal, by Huffman, by ans), error, and seconds of quantizing."""
    start = time.perf_counter()
    grid = jaxclip.Grid(8, axis=axis, scale_dtype="float16")
    rule = jaxclip.thresholds.rate_optimal(**goal)
    tree = jax.block_until_ready([jaxclip.quantize(leaf, grid, threshold=rule) for leaf in leaves])
    seconds = time.perf_counter() - start
    ideal = sum(float(code_entropy(q.qvalue)) * q.qvalue.size + 16 * q.scale.size for q in tree)
    files = [file_bits(tree, coding) for coding in ("huffman", "ans")]
    total = sum(q.qvalue.size for q in tree)
    return ideal / total, *files, relative_error(leaves, tree), seconds


def of_rate(leaves, rate):
    """Low-bit arrays by `rate_optimal`."""
    grid = jaxclip.Grid(8, axis=0, scale_dtype="float16")
    rule = jaxclip.thresholds.rate_optimal(rate)
    return [jaxclip.quantize(leaf, grid, threshold=rule) for leaf in leaves]


def priced(leaves, rate):
    """Error, and bits a weight of files of cheaper and of nearest codes with this error."""
    tree = jaxclip.lowbit.cheaper_codes(of_rate(leaves, rate), leaves, price=PRICE)
    error = found = relative_error(leaves, tree)
    nearest = None
    while nearest is None or abs(found / error - 1) > 1e-3:
        if nearest is not None:
            rate += 0.5 * np.log2(found / error)  # what half a bit does at high rates
        nearest = of_rate(leaves, rate)
        found = relative_error(leaves, nearest)
    return error, *(file_bits(t, c) for t in (tree, nearest) for c in ("huffman", "ans"))


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
        "coded": ("#0072B2", "o", "Huffman coded\n(rate_optimal)", (4.15, 0.0053)),
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
        xlabel="bits a weight in the file, all included",
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

    titles = "".join(f"{t:>9}" for t in ("ideal", "Huffman", "ans", "saved", "saved"))
    print(f"\n{'codes':<26} {'error':>8}{titles}")
    for bits in WIDTHS:
        for name, group_size in (("fixed, channel", None), ("fixed, group 64", 64)):
            spent, error = fixed(leaves, bits, group_size)
            curves[name].append((spent, error))
            width = f"{bits} bits" if bits != "ternary" else bits
            print(f"{name + ', ' + width:<26} {error:>8.5f}{spent:>9.3f}")
            *sizes, reached, _ = coded(leaves, error=error)
            numbers = "".join(f"{size:>9.3f}" for size in sizes)
            saved = "".join(f"{1 - size / spent:>9.1%}" for size in sizes[1:])
            print(f"{'  coded, the same error':<26} {reached:>8.5f}{numbers}{saved}", flush=True)

    titles = "".join(f"{t:>9}" for t in ("ideal", "Huffman", "ans", "seconds"))
    print(f"\n{'coded, step a channel':<26} {'error':>8}{titles}")
    goals = [(f"rate_optimal({rate})", 0, rate) for rate in RATES]
    for name, axis, rate in [*goals, ("  (3.0), one step a leaf", None, 3.0)]:
        *sizes, error, seconds = coded(leaves, axis=axis, bits_per_weight=rate)
        if axis == 0:
            curves["coded"].append((sizes[1], error))
        numbers = "".join(f"{size:>9.3f}" for size in sizes)
        print(f"{name:<26} {error:>8.5f}{numbers}{seconds:>9.2f}", flush=True)

    titles = "".join(f"{t:>9}" for t in ("Huffman", "ans", "nearest", "nearest", "saved", "saved"))
    print(f"\n{f'coded, price {PRICE}':<26} {'error':>8}{titles}")
    for rate in PRICED_RATES:
        error, *sizes = priced(leaves, rate)
        saved = [
            1 - cheaper / nearest for cheaper, nearest in zip(sizes[:2], sizes[2:], strict=True)
        ]
        numbers = "".join(f"{size:>9.3f}" for size in sizes)
        numbers += "".join(f"{share:>9.1%}" for share in saved)
        print(f"{f'rate_optimal({rate})':<26} {error:>8.5f}{numbers}", flush=True)
    if arguments.picture:
        draw(curves, arguments.picture)


if __name__ == "__main__":
    main()
