"""Error of low-bit arrays with thresholds found here, beside Qwix's absmax, in the same arrays.

    python benchmarks/interop/qwix_error.py

Error is |W - W'|^2 / |W|^2 of a (1024, 256) kernel with W' by `qwix.dequantize` for both sides.
Widths, scales and bytes are the same. "absmax" is what `qwix.quantize` does by default.
"""

from importlib.metadata import version

import jax.numpy as jnp
import numpy as np
import qwix

import jaxclip
from jaxclip import Grid, interop

SHAPE = (1024, 256)


def drawn():
    rng = np.random.default_rng(0)
    return {
        "Gaussian": rng.normal(size=SHAPE),
        "Laplace": rng.laplace(size=SHAPE),
        "Student-t, 4": rng.standard_t(4, SHAPE),
        "boxed, half on +-t": np.clip(rng.normal(size=SHAPE), -0.6745, 0.6745),
    }


def error(array, w):
    difference = np.asarray(qwix.dequantize(array), np.float64) - w
    return np.sum(difference**2) / np.sum(w**2)


def main():
    print(f"qwix {version('qwix')}, jax {version('jax')}")
    print("| weights | codes, scales | Qwix's absmax | jaxclip | |\n|---|---|---|---|---|")
    for name, values in drawn().items():
        w = jnp.asarray(values, jnp.float32)
        for bits in (2, 4, 8):
            for group_size in (None, 64):
                tiles = {} if group_size is None else {0: group_size}
                theirs = qwix.quantize(w, f"int{bits}", channelwise_axes=(1,), tiled_axes=tiles)
                small = jaxclip.quantize(w, Grid(bits, group_size=group_size))
                ours = interop.to_qwix(small)
                assert ours.scale.shape == theirs.scale.shape
                pair = (
                    error(theirs, np.asarray(w, np.float64)),
                    error(ours, np.asarray(w, np.float64)),
                )
                scales = "channel" if group_size is None else f"{group_size} inputs"
                change = f"{pair[1] / pair[0] - 1:+.0%}"
                print(
                    f"| {name} | {bits} bits, {scales} | {pair[0]:.2e} | {pair[1]:.2e} | {change} |"
                )


if __name__ == "__main__":
    main()
