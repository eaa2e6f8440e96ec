"""Rows of llm-compressor's GPTQ, with the moments of the calibration as its Hessian.

    pip install "torch==2.13.0+cpu" llmcompressor safetensors

Grids of groups with a zero point. Their ranges are those of the observer that weighs
errors by the mean square of the input; inputs are taken in the order of their mean squares.
"""

import importlib.metadata

import shared
import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer

SETTINGS = ((2, 64), (3, 64), (4, 64))
"""Bits and group sizes."""


def scales_and_zeros(args, weight, moments):
    """Of each group of each row, by its observer."""
    observer = Observer.load_from_registry("imatrix_mse", base_name="weight", args=args)
    observer._imatrix_sum = moments.diagonal().clone()
    observer._imatrix_count = torch.tensor(1)
    observer(weight)
    found = observer.get_qparams()
    return found["scale"], found["zero_point"]


def rows(inputs, writer):
    for bits, group_size in SETTINGS:
        args = QuantizationArgs(
            num_bits=bits,
            symmetric=False,
            strategy="group",
            group_size=group_size,
            actorder="weight",
        )

        def rounded(name, weight, args=args, bits=bits, group_size=group_size):
            weight, moments = (torch.from_numpy(x) for x in (weight, inputs.moments[name]))
            scales, zeros = scales_and_zeros(args, weight, moments)
            scales = scales.to(torch.float16).to(torch.float32)
            found, _, _ = quantize_weight(
                weight[None].clone(), moments[None].clone(), scales[None], zeros[None], None, args
            )
            wide_scales, wide_zeros = (
                x.float().repeat_interleave(group_size, 1) for x in (scales, zeros)
            )
            half = 2 ** (bits - 1)
            codes = (found[0] / wide_scales + wide_zeros).round() + half
            decoded = (codes - half - wide_zeros) * wide_scales
            parts = shared.affine_parts(
                codes.numpy(), scales.numpy(), zeros.float().numpy() + half, bits
            )
            return parts, decoded.numpy()

        with torch.no_grad():
            writer.parts_row(f"GPTQ, {bits} bits, group {group_size}", rounded)


if __name__ == "__main__":
    shared.run(f"llm-compressor {importlib.metadata.version('llmcompressor')}", rows)
