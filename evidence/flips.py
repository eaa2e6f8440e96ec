"""What do bit errors in the stored codes cost, with a box and without?

    python evidence/flips.py

The digits networks of run.py, AdamW and Lion in a box with the step sizes and knobs that were
chosen there, at 8 and 4 bits. Each bit of the packed codes is flipped with the given probability
(scales and biases are spared), 5 draws for each seed; printed is the test accuracy, mean +- half
of the 95 % interval over the seeds. After Stutz et al., Bit Error Robustness for Energy-Efficient
DNN Accelerators, 2021, https://arxiv.org/abs/2006.13977: clipped weights suffer less.
"""

import dataclasses

import jax
import numpy as np
from recipes import RECIPES
from report import interval, read
from run import Bench
from tasks import digits

import jaxclip
from jaxclip.lowbit.arrays import QuantizedArray

RATES = (0, 1e-4, 1e-3, 5e-3, 1e-2, 2e-2)
DRAWS = 5


def with_flips(small, rate, rng):
    """The low-bit tree after each bit of its packed codes was flipped with a probability."""

    def flipped(leaf):
        if not isinstance(leaf, QuantizedArray):
            return leaf
        codes = np.asarray(leaf.qvalue)
        packed = np.asarray(jaxclip.lowbit.pack_codes(codes.ravel(), leaf.bits))
        errors = np.packbits(rng.random((packed.size, 8)) < rate)
        back = jaxclip.lowbit.unpack_codes(packed ^ errors, leaf.bits, codes.size)
        return dataclasses.replace(leaf, qvalue=np.asarray(back).reshape(codes.shape))

    return jax.tree.map(flipped, small, is_leaf=lambda x: isinstance(x, QuantizedArray))


def main():
    task, rng = digits(), np.random.default_rng(0)
    print(f"{'recipe':<14} {'bits':>4}" + "".join(f"{rate:>15g}" for rate in RATES))
    for name in ("AdamW", "Lion in a box"):
        chosen = next(row for row in read("digits") if row["recipe"] == name)
        bench = Bench(task, RECIPES[name], None)
        nets = [
            bench.train(seed, chosen["step_size"], chosen["knob"], 1.0)[0]
            for seed in range(task.num_seeds)
        ]
        for bits in (8, 4):
            small = [
                jaxclip.compress(params, jaxclip.Grid(bits, levels="narrow")) for params in nets
            ]
            cells = []
            for rate in RATES:
                found = [
                    np.mean(
                        [
                            bench.scores(seed, jaxclip.decompress(with_flips(tree, rate, rng)))[1]
                            for _ in range(DRAWS if rate else 1)
                        ]
                    )
                    for seed, tree in enumerate(small)
                ]
                cells.append("{:8.2f} ± {:.2f}".format(*interval(found)))
            print(f"{name:<14} {bits:>4}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
