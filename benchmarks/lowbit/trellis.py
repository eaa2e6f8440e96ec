"""Dependent quantization beside a uniform grid: bits, error, distance to the limit of the source.

    python benchmarks/lowbit/trellis.py [--size 512] [--rates 1.5 2 3 4] [--time]
    python benchmarks/lowbit/trellis.py --rates --weights FILE [--match encoder] [--methods model]

Sources are Gaussian and Laplacian, a square matrix of unit variance. A row is a method; its step is
found so that its bytes make the rate. Bits are those of the coded bytes, tables included; "ideal"
is the order-0 entropy. The gap is bits minus the least number of bits at the error: the
rate-distortion function of the Gaussian source, and for the Laplacian one Shannon's lower bound of
it, which overstates gaps at low rates. "model" is one round with the lengths of a Gaussian source,
without a code 0 in odd states. The others have three rounds with measured lengths.

With --weights, the two-dimensional leaves of a safetensors file whose name has `--match` in it have
one common step; error is |W - Q|^2 / |W|^2. With --time, CPU time of encoding and decoding.
"""

import argparse
import functools
import time

import jax.numpy as jnp
import numpy as np

from jaxclip.lowbit.coding.entropy_coding import encode_codes
from jaxclip.lowbit.coding.level_coding import decode_levels, encode_levels
from jaxclip.lowbit.coding.trellis import levels_of
from jaxclip.lowbit.rounding.paths import cheapest_path, measured_path, model_lengths

PRICES = (0.3, 0.4)  # squared fine steps; a uniform grid's step is two of them
NUM_CODES = 1024


# --- Methods: step -> levels in steps, bits ---------------------------------------------


def priced_uniform(x, price):
    """Codes one nearer to 0 where the bits saved are worth it; bits as measured, three rounds."""
    nearest = np.round(x).astype(np.int32)
    codes = nearest
    smaller = nearest - np.sign(nearest)
    added = (x - smaller) ** 2 - (x - nearest) ** 2
    for _ in range(3 if price else 0):
        counts = np.bincount(codes.reshape(-1) - codes.min())
        bits = dict(enumerate(np.log2(codes.size / np.maximum(counts, 0.5)), codes.min()))
        bits = np.vectorize(lambda code, bits=bits: bits.get(code, 30.0))
        span = np.arange(nearest.min() - 1, nearest.max() + 2)
        table = bits(span)
        saved = table[nearest - span[0]] - table[smaller - span[0]]
        codes = np.where(added < price * saved, smaller, nearest)
    return codes


def uniform(x, step, coder, price=0.0):
    codes = priced_uniform(x / step, price)
    if coder == "ideal":
        _, counts = np.unique(codes, return_counts=True)
        return codes, -np.sum(counts * np.log2(counts / codes.size))
    if coder == "huffman":
        clipped = np.clip(codes, -128, 127).astype(np.int8)
        return codes, 8 * len(encode_codes(clipped.reshape(-1), "huffman"))
    return codes, 8 * len(encode_levels(codes, chain=codes.shape[1], num_states=1))


def trellis(x, step, num_states, price, is_model=False):
    x = jnp.asarray(x / step, jnp.float32)
    if is_model:
        lengths = model_lengths(jnp.sqrt(jnp.mean(jnp.square(x))), NUM_CODES)
        codes = cheapest_path(x, lengths, price=price, num_states=num_states)
    else:
        codes = measured_path(x, price=price, num_codes=NUM_CODES, num_states=num_states)
    levels = np.asarray(levels_of(np.asarray(codes), num_states))
    return levels, 8 * len(encode_levels(levels, chain=levels.shape[1], num_states=num_states))


METHODS = {
    "uniform, ideal code": functools.partial(uniform, coder="ideal"),
    "uniform, Huffman": functools.partial(uniform, coder="huffman"),
    "uniform, lanes": functools.partial(uniform, coder="lanes"),
    "uniform, price .1, lanes": functools.partial(uniform, coder="lanes", price=0.1),
}
METHODS |= {
    f"trellis {n}, price {price}": functools.partial(trellis, num_states=n, price=price)
    for n in (4, 8)
    for price in PRICES
}
METHODS["trellis 8, .4, model"] = functools.partial(trellis, num_states=8, price=0.4, is_model=True)


# --- Limits ----------------------------------------------------------------------------

LIMITS = {
    "normal": lambda error: -0.5 * np.log2(error),
    "laplace": lambda error: np.log2(np.sqrt(2) * np.e) - 0.5 * np.log2(2 * np.pi * np.e * error),
}


# --- Tables ----------------------------------------------------------------------------


def at_rate(method, x, rate):
    """Bits an entry and error of a step whose bits are about the rate."""
    step = 2.0**-rate
    for _ in range(6):
        levels, bits = method(x, step)
        bits, error = bits / x.size, np.mean((x - step * levels) ** 2) / np.mean(x**2)
        step *= 2.0 ** (bits - rate)
    return bits, error


def print_sources(methods, size, rates):
    rng = np.random.default_rng(0)
    for name in ("normal", "laplace"):
        x = getattr(rng, name)(size=(size, size))
        x /= np.sqrt(np.mean(x**2))
        print(f"\n{name}, {size} x {size}" + "".join(f"{rate:8} bits    gap" for rate in rates))
        for title, method in methods.items():
            row = [at_rate(method, x, rate) for rate in rates]
            text = "".join(f"{e:13.5f}{b - LIMITS[name](e):7.3f}" for b, e in row)
            print(f"{title:26}{text}", flush=True)


def print_weights(methods, path, match, errors):
    from safetensors.numpy import load_file

    leaves = [v for k, v in load_file(path).items() if match in k and v.ndim == 2]
    leaves = [np.asarray(v, np.float32) for v in leaves]
    energy = sum(np.sum(np.square(v, dtype=np.float64)) for v in leaves)
    total = sum(v.size for v in leaves)
    print(f"\n{len(leaves)} leaves, {total:,} weights: bits a weight at each error")
    print(f"{'':26}" + "".join(f"{error:9}" for error in errors))
    for title, method in methods.items():
        found = []
        for error in errors:
            step = np.sqrt(3 * error * energy / total)
            for _ in range(4):
                results = [method(v, step) for v in leaves]
                made = sum(
                    np.sum((v - step * np.asarray(levels, np.float64)) ** 2)
                    for v, (levels, _) in zip(leaves, results, strict=True)
                )
                step *= np.sqrt(error * energy / made)
            bits = sum(bits for _, bits in results) / total
            # To the error exactly: half a bit more divides it by two.
            found.append(bits + 0.5 * np.log2(made / energy / error))
        print(f"{title:26}" + "".join(f"{bits:9.3f}" for bits in found), flush=True)


def print_times():
    print(f"\n{'chains of 2048, trellis 8':26}{'encode':>10}{'decode':>10}{'MB/s of float32':>18}")
    rng = np.random.default_rng(0)
    for num_chains in (64, 256, 1024, 4096):
        x = rng.normal(size=(num_chains, 2048)).astype(np.float32)
        levels, _ = trellis(x, 0.5, 8, 0.4)
        levels = levels.astype(np.int8)
        times = []
        for _ in range(3):
            start = time.process_time()
            coded = encode_levels(levels, chain=2048)
            between = time.process_time()
            decoded = decode_levels(coded, levels.size).astype(np.float32) * np.float32(0.5)
            times.append((between - start, time.process_time() - between))
            assert decoded.size == levels.size
        encode, decode = np.min(times, axis=0) / levels.size * 1e9
        print(f"{num_chains:26}{encode:7.0f} ns{decode:7.1f} ns{4e3 / decode:18.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rates", type=float, nargs="*", default=(1.5, 2.0, 3.0, 4.0))
    parser.add_argument("--weights")
    parser.add_argument("--match", default="")
    parser.add_argument("--errors", type=float, nargs="*", default=(0.05, 0.0144, 0.003))
    parser.add_argument("--methods", default="", help="part of their names")
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    methods = {title: method for title, method in METHODS.items() if args.methods in title}
    if args.rates:
        print_sources(methods, args.size, args.rates)
    if args.weights:
        print_weights(methods, args.weights, args.match, args.errors)
    if args.time:
        print_times()


if __name__ == "__main__":
    main()
