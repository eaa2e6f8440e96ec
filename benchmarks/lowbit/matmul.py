"""Time and memory of products with low-bit matrices, beside float32.

    python benchmarks/lowbit/matmul.py [--rounds 15] [--quick]

Three compiled functions of the same matrix, run in turns:

    float32   x @ w
    decoded   x @ dequantize(q), as of any jax function that takes a low-bit array
    tiled     lowbit.matmul(x, q), of codes as they are (int8) and packed

Columns are medians over those of float32; temporaries are what the compiled program says, in MB.
The last column is the bytes of the packed array over the time of the tiled product, as a part of
the bandwidth at which float32 reads its matrix at batch 1.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxclip
from jaxclip.lowbit import Grid, matmul

GRIDS = {
    "2 bits, channels": Grid(2),
    "2 bits, groups of 64": Grid(2, group_size=64, scale_dtype="float16"),
    "ternary, channels": Grid("ternary"),
    "3 bits, groups of 64": Grid(3, group_size=64, scale_dtype="float16"),
    "4 bits, channels": Grid(4),
    "4 bits, groups of 64": Grid(4, group_size=64, scale_dtype="float16"),
    "4 bits, groups, zero points": Grid(4, group_size=64, zero_point=True, scale_dtype="float16"),
    "4 bits, log8 scales": Grid(4, group_size=64, scale_dtype="log8"),
    "8 bits, channels": Grid(8),
    "8 bits, a step an input": Grid(8, axis=0, scale_dtype="log8"),
}
SHAPES = [(2048, 2048), (1024, 4096), (4096, 1024), (4096, 4096)]
BATCHES = [1, 8, 64, 512]


def medians(rounds, calls):
    for call in calls:
        jax.block_until_ready(call())
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def compiled(function, *args):
    program = jax.jit(function).lower(*args).compile()
    return program, program.memory_analysis().temp_size_in_bytes / 1e6


def measure(grid, shape, batch, rounds, bandwidth=None, grad=False, left=False):
    """Prints a row; returns the bandwidth at which float32 reads its matrix, in bytes a second."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(batch, shape[0])), jnp.float32)
    q = jaxclip.quantize(w, grid, threshold=jaxclip.max_abs)
    w, packed = jaxclip.dequantize(q), q.packed()
    decode = jaxclip.dequantize
    if left:
        x = jnp.asarray(rng.normal(size=(shape[1], batch)), jnp.float32)
        products = [lambda y, w: w @ y, lambda y, q: decode(q) @ y, *[lambda y, q: q @ y] * 2]
    else:
        products = [lambda x, w: x @ w, lambda x, q: x @ decode(q), matmul, matmul]
    products = list(zip(products, (w, q, q, packed), strict=True))
    if grad:
        products = [
            (jax.grad(lambda x, w, f=f: jnp.sum(jnp.square(f(x, w)))), a) for f, a in products
        ]
    programs = [(*compiled(f, x, a), a) for f, a in products]
    times = medians(rounds, [lambda p=p, a=a: p(x, a) for p, _, a in programs])
    ratios = [t / times[0] for t in times[1:]]
    found = w.nbytes / times[0]
    used = packed.nbytes / times[-1] / (bandwidth or found)
    print(
        f"{batch:>5}{times[0] * 1e3:>10.2f}"
        + "".join(f"{r:>9.2f}" for r in ratios)
        + "".join(f"{temporary:>8.1f}" for _, temporary, _ in programs)
        + f"{w.nbytes / 1e6:>9.1f}{q.nbytes / 1e6:>7.1f}{packed.nbytes / 1e6:>7.1f}{used:>8.0%}",
        flush=True,
    )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one shape only")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, numpy {np.__version__}, {jax.default_backend()}")
    print(f"{'':15}{'time / float32':>27}{'temporaries, MB':>32}{'matrix, MB':>23}")
    titles = "decoded     int8   packed     f32 decoded    int8  packed      f32   int8 packed"
    print(f"batch   f32, ms  {titles}    used")
    for shape in SHAPES[:1] if args.quick else SHAPES:
        grids = GRIDS if shape == SHAPES[0] else dict(list(GRIDS.items())[:2])
        for name, grid in grids.items():
            print(f"{shape[0]} x {shape[1]}, {name}")
            bandwidth = None
            for batch in BATCHES:
                found = measure(grid, shape, batch, args.rounds, bandwidth)
                bandwidth = bandwidth or found
    print(f"{SHAPES[0][0]} x {SHAPES[0][1]}, 2 bits, channels: q @ y")
    for batch in BATCHES:
        measure(Grid(2, axis=0), SHAPES[0], batch, args.rounds, left=True)
    print(f"{SHAPES[0][0]} x {SHAPES[0][1]}, 2 bits, channels: derivative with respect to x")
    for batch in BATCHES:
        measure(Grid(2), SHAPES[0], batch, args.rounds, grad=True)


if __name__ == "__main__":
    main()
