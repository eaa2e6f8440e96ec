"""Rows of llama.cpp's formats with an importance matrix, made by ggml itself.

pip install gguf safetensors; npm pack @node-llama-cpp/linux-x64

GGML_LIBRARY is the path of a `libggml-base.so`. The importance of an input is its mean square, as
llama.cpp measures it. Blocks of 256 run on over the ends of rows of 384; llama.cpp itself takes
larger types there.
"""

import ctypes
import importlib.metadata
import os

import gguf
import numpy as np
import shared

KINDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "Q4_K")


def library():
    found = ctypes.CDLL(os.environ["GGML_LIBRARY"])
    pointers = [ctypes.c_void_p] * 2
    arguments = [ctypes.c_int, *pointers, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    found.ggml_quantize_chunk.argtypes = arguments
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    return found


def rows(inputs, writer):
    ggml = library()
    for kind in KINDS:
        number = gguf.GGMLQuantizationType[kind]
        block, num_bytes = gguf.GGML_QUANT_SIZES[number]

        def rounded(name, weight, number=number, block=block, num_bytes=num_bytes):
            importance = np.diagonal(inputs.moments[name]).astype(np.float32)
            repeats = np.lcm(block, weight.shape[1]) // weight.shape[1]
            importance = np.tile(importance, repeats)
            lines = np.ascontiguousarray(weight.reshape(-1, len(importance)), np.float32)
            data = np.zeros((weight.size // block, num_bytes), np.uint8)
            ggml.ggml_quantize_chunk(
                number.value,
                lines.ctypes.data,
                data.ctypes.data,
                0,
                *lines.shape,
                importance.ctypes.data,
            )
            return {"blocks": data}, gguf.quants.dequantize(data, number).reshape(weight.shape)

        ggml.ggml_quantize_init(number.value)
        writer.parts_row(kind, rounded)


if __name__ == "__main__":
    shared.run(f"llama.cpp (gguf {importlib.metadata.version('gguf')})", rows)
