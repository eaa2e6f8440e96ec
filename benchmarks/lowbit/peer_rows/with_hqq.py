"""Rows of HQQ, which takes no data: half-quadratic search of the zero points of groups.

    pip install "torch==2.13.0+cpu" hqq safetensors

Scales and zero points are in float16. Groups run along the inputs (axis 1) or, as HQQ's authors
advise for quality, along the outputs (axis 0).
"""

import importlib.metadata

import numpy as np
import shared
import torch
from hqq.core.quantize import Quantizer

SETTINGS = ((2, 16, 0), (2, 64, 0), (2, 64, 1), (3, 64, 0), (3, 64, 1), (4, 64, 0), (4, 64, 1))
"""Bits, group sizes and axes."""


def rows(inputs, writer):
    for bits, group_size, axis in SETTINGS:

        def rounded(name, weight, bits=bits, group_size=group_size, axis=axis):
            codes, found = Quantizer.quantize(
                torch.from_numpy(weight),
                nbits=bits,
                group_size=group_size,
                axis=axis,
                bitpack=False,
                device="cpu",
            )
            scales, zeros = (found[part].numpy().astype(np.float16) for part in ("scale", "zero"))
            codes = codes.numpy()
            parts = {
                "codes": shared.dense(codes.astype(np.uint8), bits),
                "scales": scales,
                "zeros": zeros,
            }
            decoded = (codes - zeros.astype(np.float32)) * scales.astype(np.float32)
            return parts, decoded.reshape(weight.shape)

        with torch.no_grad():
            writer.parts_row(f"{bits} bits, group {group_size}, axis {axis}", rounded)


if __name__ == "__main__":
    shared.run(f"HQQ {importlib.metadata.version('hqq')}", rows)
