"""Rows of Qwix's GPTQ and AWQ, with the moments of the calibration.

    pip install qwix safetensors

Groups of 64 inputs with a float16 scale. GPTQ takes int4 with symmetric ranges, the only ones that
it works with at this version. AWQ takes 2 to 4 bits, at 4 bits a zero point, too. Its mean
magnitudes of inputs are the roots of their mean squares; its scales of inputs are in float16.
"""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import shared
from qwix.contrib import awq_core, gptq_core

GROUP_SIZE = 64


def how_to(bits, method):
    qarray = gptq_core.qarray
    return qarray.HowToQuantize(
        qtype=jnp.int4 if bits == 4 else f"int{bits}",
        channelwise_axes=[0],
        tiled_axes={1: GROUP_SIZE},
        calibration_method=method,
    )


def of_file(found, bits):
    """What a file holds of an array of Qwix, and its values from a float16 scale."""
    codes = np.asarray(found.qvalue.astype(jnp.int8)).astype(np.int32)
    scales = np.asarray(found.scale, np.float32).astype(np.float16)
    half = 2 ** (bits - 1)
    given = found.zero_point
    zeros = None if given is None else np.asarray(given.astype(jnp.int8)).astype(np.int32)
    parts = shared.affine_parts(codes + half, scales, None if given is None else zeros + half, bits)
    wide = np.repeat(scales.astype(np.float32), GROUP_SIZE, 1)
    shift = 0 if given is None else np.repeat(zeros, GROUP_SIZE, 1)
    return parts, (codes - shift) * wide


def rows(inputs, writer):
    def gptq(name, weight):
        moments = jnp.asarray(inputs.moments[name])
        found, _ = gptq_core.quantize_weight(jnp.asarray(weight), moments, how_to(4, "absmax"))
        return of_file(found, 4)

    def awq(name, weight, bits, method):
        sizes = jnp.sqrt(jnp.diagonal(inputs.moments[name]))
        found, scales = awq_core.quantize_weight(jnp.asarray(weight), sizes, how_to(bits, method))
        parts, decoded = of_file(found, bits)
        scales = np.asarray(scales).astype(np.float16)
        return parts | {"inputs": scales}, decoded / scales.astype(np.float32)

    for bits, method in ((2, "absmax"), (3, "absmax"), (4, "absmax"), (4, "minmax")):
        ranges = "symmetric" if method == "absmax" else "zero points"
        writer.parts_row(
            f"AWQ, {bits} bits, group {GROUP_SIZE}, {ranges}",
            lambda name, weight, bits=bits, method=method: awq(name, weight, bits, method),
        )
    writer.parts_row(f"GPTQ, 4 bits, group {GROUP_SIZE}, symmetric", gptq)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    shared.run(f"Qwix {importlib.metadata.version('qwix')}", rows)
