"""Which bytes are best for weights that are zero: masks, run lengths or entropy coding?

    python benchmarks/checkpoints/sparse_files.py [FILE.safetensors --match REGEX]

Leaves are matrices (inputs, outputs): drawn ones, or those of a file in PyTorch's layout. They are
pruned by magnitude, and everything is in bits an entry.

Codes: packed; the codings of `checkpoints.save`; and what a mask could do: a bit an entry and the
values packed, the same with coded values, and coded run lengths of zeros with coded values.
"more" is what the smallest of the last three takes beyond the smallest of the others.

Float leaves: whole files, as they are and with each coding, beside a bit an entry and the values.

Groups: codes with n of every m inputs, coded, and the entropy of whole groups (their masks, then
the values). Beside the error of the weights stands that of a file of no more bytes than groups
would take, by `compress(target_bytes=)`. "3:4 in 5 bits" has one scale an output, and in every
group of four one 0 and three signs, which take 1.25 bits an entry.
"""

import argparse
import re

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import jaxclip
from jaxclip import sparsity
from jaxclip.lowbit.coding.entropy_coding import encode_codes
from jaxclip.lowbit.coding.level_coding import encode_levels
from jaxclip.lowbit.coding.trellis import as_chains
from jaxclip.lowbit.packing import num_packed_bytes

DENSITIES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64)
WIDTHS = ("ternary", 2, 3, 4, 8)
GROUPS = ((3, 4, "ternary"), (2, 4, "ternary"), (1, 4, "ternary"), (2, 4, 4), (2, 8, 4), (2, 16, 4))


def coded(codes, coding):
    """Bits of a matrix of codes, or of a row of them."""
    rows = as_chains(codes, (1,) if codes.ndim > 1 else ())
    flat = rows if coding == "lanes" else codes
    return 8 * len(encode_codes(flat.reshape(-1), coding, chain=rows.shape[1]))


def smallest(codes, bits=8):
    packed = 8 * num_packed_bytes(codes.size, bits)
    return min(packed, *(coded(codes, c) for c in ("huffman", "ans", "lanes")))


def run_lengths(is_value):
    """Bits of the runs of zeros before each value, row by row or column by column."""
    found = []
    for mask in (is_value, is_value.T):
        runs = np.diff(np.flatnonzero(mask), prepend=-1) - 1
        short = np.minimum(runs, 127).astype(np.int8)
        num_long = np.count_nonzero(short == 127)
        levels = encode_levels(runs, chain=4096, num_states=1)
        found += [8 * len(levels), smallest(short) + 32 * num_long]
    return min(found)


def code_row(w, density, bits):
    """Bits of the codes of a pruned leaf, by each way."""
    pruned = sparsity.prune({"kernel": w}, density)["kernel"]
    levels = "narrow" if bits == 2 else "full"
    codes = np.asarray(jaxclip.quantize(pruned, jaxclip.Grid(bits, levels=levels)).qvalue)
    values = codes[codes != 0]
    raw = 8 * num_packed_bytes(values.size, 1 if bits == "ternary" else bits)
    coded_values = min(raw, smallest(values))
    return {
        "packed": 8 * num_packed_bytes(codes.size, bits),
        **{c: coded(codes, c) for c in ("huffman", "ans", "lanes")},
        "mask": codes.size + raw,
        "mask, c.": codes.size + coded_values,
        "runs, c.": run_lengths(codes != 0) + coded_values,
    }


def compare_codes(title, w):
    for density in DENSITIES:
        for bits in WIDTHS:
            row = code_row(w, density, bits)
            sizes = list(row.values())
            if (density, bits) == (DENSITIES[0], WIDTHS[0]):
                print(f"\n{title + ', codes':34}" + "".join(f"{t:>9}" for t in [*row, "more"]))
            more = min(sizes[4:]) / min(sizes[:4]) - 1
            numbers = "".join(f"{size / w.size:9.3f}" for size in sizes)
            print(f"{f'1/{round(1 / density)}, {bits}':34}{numbers}{more:9.1%}", flush=True)


def compare_floats(title, w):
    codings = (None, "huffman", "lanes", "smallest")
    heads = ["as is", *codings[1:], "mask", "saved"]
    print(f"\n{title + ', float files':34}" + "".join(f"{t:>9}" for t in heads))
    for dtype in ("float32", "bfloat16", "float16"):
        for density, pattern in [*((d, "free") for d in DENSITIES), (1 / 2, 4), (1 / 4, 4)]:
            pruned = sparsity.prune({"kernel": w.astype(dtype)}, density, pattern=pattern)
            files = [8 * jaxclip.size_report(pruned, c).total_bytes / w.size for c in codings]
            plain = 1 + density * 8 * jnp.dtype(dtype).itemsize
            name = f"1/{round(1 / density)}" if pattern == "free" else f"{round(4 * density)}:4"
            numbers = "".join(f"{x:9.3f}" for x in [*files, plain])
            print(f"{f'{name}, {dtype}':34}{numbers}{1 - files[-1] / plain:9.1%}", flush=True)


def group_bits(codes, m):
    """The entropy of groups of inputs, their masks and then their values, in bits."""
    is_value = codes.T.reshape(-1, m) != 0
    _, counts = np.unique(is_value @ (1 << np.arange(m)), return_counts=True)
    p = counts / counts.sum()
    return -(p * np.log2(p)).sum() * len(is_value) + smallest(codes[codes != 0])


def file_of(w, num_bits):
    """Bits an entry and error of an entropy-coded file."""
    small = jaxclip.compress({"kernel": w}, target_bytes=int(num_bits * w.size / 8) + 400)
    report = jaxclip.size_report(small, "lanes", original={"kernel": w})
    return 8 * report.leaves[0].stored_bytes / w.size, report.relative_error


def compare_groups(title, w):
    heads = ("coded", "groups", "error", "a file", "error")
    print(f"\n{title + ', groups':34}" + "".join(f"{t:>9}" for t in heads))
    exact = np.asarray(w, np.float64)
    kept = np.asarray(sparsity.prune({"kernel": w}, 3 / 4, pattern=4)["kernel"]) != 0
    scale = np.abs(exact).sum(0) / kept.sum(0)
    error = np.square(np.where(kept, np.abs(exact) - scale, exact)).sum() / np.square(exact).sum()
    bits, other = file_of(w, 1.25)
    print(f"{'3:4 in 5 bits':43}{1.25:9.3f}{error:9.4f}{bits:9.3f}{other:9.4f}", flush=True)
    for n, m, width in GROUPS:
        pruned = sparsity.prune({"kernel": w}, n / m, pattern=m)["kernel"]
        q = jaxclip.quantize(pruned, width)
        codes = np.asarray(q.qvalue)
        error = float(np.square(np.asarray(jaxclip.dequantize(q)) - exact).sum())
        sizes = [smallest(codes, width) / w.size, group_bits(codes, m) / w.size]
        numbers = [*sizes, error / np.square(exact).sum(), *file_of(w, sizes[1])]
        print(f"{f'{n}:{m}, {width}':34}" + "".join(f"{x:9.{3}f}" for x in numbers), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="weights; drawn ones if not given")
    parser.add_argument("--match", default="", help="regex of the names of matrices")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, numpy {np.__version__}")
    rng = np.random.default_rng(0)
    leaves = {"Laplace": rng.laplace(size=(512, 512)), "normal": rng.normal(size=(512, 512))}
    if args.file:
        found = load_file(args.file).items()
        leaves = {n: w.T for n, w in found if w.ndim == 2 and re.search(args.match, n)}
    for title, w in leaves.items():
        w = jnp.asarray(w, jnp.float32)
        for compare in (compare_codes, compare_floats, compare_groups):
            compare(title[-20:], w)


if __name__ == "__main__":
    main()
