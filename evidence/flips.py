"""What do bit errors in the stored codes cost, with a box and without?

    python evidence/flips.py

The digits networks of run.py, AdamW and Lion in a box at the step sizes that were chosen there,
at 8 and 4 bits. Each bit of the packed codes is flipped with the given probability (scales and
biases are spared), 5 draws for each of 5 seeds; printed is the test accuracy, mean +- standard
error over the seeds. After Stutz et al., Bit Error Robustness for Energy-Efficient DNN
Accelerators, 2021, https://arxiv.org/abs/2006.13977, who found that clipped weights suffer less.
"""

import dataclasses

import jax
import numpy as np
from methods import make_methods
from report import read, spread
from run import trained
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
    methods = make_methods(task.num_steps, task.weight_decay)
    evaluate = jax.jit(task.evaluate)
    print(f"{'method':<14} {'bits':>4}" + "".join(f"{rate:>15g}" for rate in RATES))
    for name in ("AdamW", "Lion in a box"):
        step_size = next(row["step_size"] for row in read("digits") if row["method"] == name)
        result = trained(task, methods[name], [step_size], task.seeds, keep_params=True)
        params = result.params_of(result.rows()[0])
        for bits in (8, 4):
            cells = []
            for rate in RATES:
                accuracies = []
                for seed in range(task.seeds):
                    tree = jax.tree.map(lambda x, i=seed: x[i], params)
                    small = jaxclip.compress(tree, jaxclip.Grid(bits, levels="narrow"))
                    draws = [with_flips(small, rate, rng) for _ in range(DRAWS if rate else 1)]
                    found = [float(evaluate(jaxclip.decompress(s))["test"]) for s in draws]
                    accuracies.append(np.mean(found))
                cells.append("{:.2f} ± {:.2f}".format(*spread(accuracies)))
            print(f"{name:<14} {bits:>4}" + "".join(f"{cell:>15}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
