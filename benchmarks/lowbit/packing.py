"""Time of packing and unpacking codes, beside a plain copy of the codes.

    python benchmarks/lowbit/packing.py [--codes 16777216] [--rounds 7]

Medians of alternating rounds, in GB of int8 codes a second of CPU time, which other work on the
machine disturbs less than it does the clock. The copy reads and writes every code once; packing
reads as much and writes less.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxclip
from jaxclip._core.grids import code_range


def medians(rounds, *calls):
    for call in calls:
        jax.block_until_ready(call())
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.process_time()
            jax.block_until_ready(call())
            taken.append(time.process_time() - start)
    return [statistics.median(taken) for taken in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", type=int, default=2**24)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, numpy {np.__version__}; {args.codes:,} codes")
    print("GB of codes a CPU second")
    titles = ("copy", "pack", "unpack", "copy, jit", "pack, jit", "unpack, jit")
    print(f"{'bits':>8}" + "".join(f"{title:>13}" for title in titles))
    for bits in (1, "ternary", 2, 3, 4, 5, 6, 8):
        low, high = code_range(bits)
        codes = np.random.default_rng(0).integers(low, high + 1, args.codes).astype(np.int8)
        codes = np.where(codes == 0, np.int8(1), codes) if bits == 1 else codes
        packed = jaxclip.lowbit.pack_codes(codes, bits)
        pack = jax.jit(lambda c, bits=bits: jaxclip.lowbit.pack_codes(c, bits))
        unpack = jax.jit(lambda p, bits=bits: jaxclip.lowbit.unpack_codes(p, bits, args.codes))
        copy = jax.jit(lambda c: c ^ 1)  # XLA would hand back an unchanged argument
        on_device, packed_on_device = jnp.asarray(codes), jnp.asarray(packed)
        taken = medians(
            args.rounds,
            lambda codes=codes: codes.copy(),
            lambda codes=codes, bits=bits: jaxclip.lowbit.pack_codes(codes, bits),
            lambda packed=packed, bits=bits: jaxclip.lowbit.unpack_codes(packed, bits, args.codes),
            lambda copy=copy, codes=on_device: copy(codes),
            lambda pack=pack, codes=on_device: pack(codes),
            lambda unpack=unpack, packed=packed_on_device: unpack(packed),
        )
        print(f"{bits!s:>8}" + "".join(f"{args.codes / t / 1e9:>13.2f}" for t in taken))


if __name__ == "__main__":
    main()
