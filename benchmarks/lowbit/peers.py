"""Low-bit weights as other packages make them: adapters for the benchmarks.

    pip install torch torchao hqq auto-round llmcompressor qwix gguf

Each package is asked for scales (and zero points) of blocks of weights, by its own rule and without
data; codes, rounding and bytes are then the same for all: dense codes, float16 scales, float16 zero
points for HQQ and integer ones of the codes' width for others, nothing for a grid that needs none.
That is the least that their own files hold. GGUF types are whole blocks of bytes, made by the
package gguf, or by ggml itself where `GGML_LIBRARY` is the path of a `libggml-base.so`, as wheels
and npm packages of llama.cpp have it. A package that cannot be imported is left out.
"""

import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import numpy as np

# --- Scales and zero points: blocks as rows -> columns ----------------------------------------


def torchao(rows, bits, has_zero):
    import torch
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.observer import AffineQuantizedMSEObserver, MappingType

    mapping = MappingType.ASYMMETRIC if has_zero else MappingType.SYMMETRIC
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    observer = AffineQuantizedMSEObserver(
        mapping, torch.int8, PerAxis(0), quant_min=low, quant_max=high
    )
    observer(torch.from_numpy(rows))
    scale, zero = observer.calculate_qparams()
    return scale.numpy()[:, None], zero.numpy()[:, None].astype(np.float32) - low


def hqq(rows, bits, has_zero):
    import torch
    from hqq.core.quantize import Quantizer

    assert has_zero
    options = {"nbits": bits, "group_size": rows.shape[1], "axis": 1, "bitpack": False}
    _, meta = Quantizer.quantize(
        torch.from_numpy(rows), device="cpu", compute_dtype=torch.float32, **options
    )
    return meta["scale"].numpy(), meta["zero"].numpy()


def auto_round(rows, bits, has_zero):
    import torch
    from auto_round.data_type.int import search_scales

    assert not has_zero
    return search_scales(torch.from_numpy(rows), bits).numpy(), None


def llm_compressor(rows, bits, has_zero):
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.observers import Observer

    args = QuantizationArgs(num_bits=bits, symmetric=not has_zero, strategy="channel")
    observer = Observer.load_from_registry("memoryless_mse", base_name="weight", args=args)
    found = observer(torch.from_numpy(rows)).get_qparams()
    zero = found["zero_point"].float().numpy() + 2 ** (bits - 1)
    return found["scale"].numpy(), zero


QWIX_RANGES = {2: "rms,1.5", 3: "rms,2.1", 4: "absmax"}
"""Its calibration: near the best ranges of Gaussian weights, where they are better than max |w|."""


def qwix(rows, bits, has_zero):
    import jax
    import qwix

    assert not has_zero
    name = {4: jax.numpy.int4, 8: jax.numpy.int8}.get(bits, f"int{bits}")
    method = QWIX_RANGES.get(bits, "absmax")
    q = qwix.quantize(rows, name, channelwise_axes=(0,), calibration_method=method)
    return np.asarray(q.scale, np.float32), None


RULES = {
    "torchao": (torchao, (False, True)),
    "auto-round": (auto_round, (False,)),
    "llmcompressor": (llm_compressor, (False, True)),
    "qwix": (qwix, (False,)),
    "hqq": (hqq, (True,)),
}
"""The rule of each package, and whether it makes grids without and with a zero point."""


# --- Files ------------------------------------------------------------------------------------


def dense(codes, bits):
    """Codes of 1 to 8 bits, one after the other, as bytes."""
    return np.packbits(np.unpackbits(codes.reshape(-1, 1), axis=1)[:, 8 - bits :])


@dataclasses.dataclass(frozen=True)
class Affine:
    """`(code - zero) * scale` with codes in [0, 2**bits)."""

    package: str
    rule: Callable
    bits: int
    group_size: int | None
    has_zero: bool = False
    zero_is_float: bool = False

    @property
    def name(self):
        where = f"group {self.group_size}" if self.group_size else "channel"
        zero = ", zero" if self.has_zero else ""
        return f"{self.package}, {self.bits} bits, {where}{zero}"

    def fits(self, leaf):
        return self.group_size is None or leaf.size % self.group_size == 0

    def __call__(self, leaf):
        """What a file holds of a matrix, and the matrix that is read from it."""
        rows = leaf.reshape(-1, self.group_size) if self.group_size else leaf
        scale, zero = self.rule(rows, self.bits, self.has_zero)
        parts = {"scale": scale.astype(np.float16)}
        if not self.has_zero:
            zero = np.float32(2 ** (self.bits - 1))
        elif self.zero_is_float:
            parts["zero"] = zero.astype(np.float16)
            zero = parts["zero"].astype(np.float32)
        else:
            zero = np.clip(zero, 0, 2**self.bits - 1)
            parts["zero"] = dense(zero.astype(np.uint8), self.bits)
        scale = parts["scale"].astype(np.float32)
        codes = np.round(rows / np.where(scale == 0, 1, scale) + zero)
        codes = np.clip(codes, 0, 2**self.bits - 1)
        parts["codes"] = dense(codes.astype(np.uint8), self.bits)
        return parts, ((codes - zero) * scale).reshape(leaf.shape)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A GGUF type. Blocks run on over the ends of rows where those are not a multiple long."""

    kind: str
    package: str = "gguf"

    @property
    def name(self):
        return f"{'ggml' if ggml_library() else 'gguf'}, {self.kind}"

    def fits(self, leaf):
        import gguf

        return leaf.size % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]][0] == 0

    def __call__(self, leaf):
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows = np.ascontiguousarray(leaf.reshape(-1, block))
        if ggml_library() is None:
            data = gguf.quants.quantize(rows, kind)
        else:
            data = np.zeros((len(rows), num_bytes), np.uint8)
            ggml_library().ggml_quantize_chunk(
                kind.value, rows.ctypes.data, data.ctypes.data, 0, *rows.shape, None
            )
        return {"blocks": data}, gguf.quants.dequantize(data, kind).reshape(leaf.shape)


@functools.cache
def ggml_library():
    path = os.environ.get("GGML_LIBRARY")
    if path is None:
        return None
    library = ctypes.CDLL(path)
    pointers = [ctypes.c_void_p] * 2
    arguments = [ctypes.c_int, *pointers, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    library.ggml_quantize_chunk.argtypes = arguments
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


# --- The list ---------------------------------------------------------------------------------

PACKAGES = ("torchao", "hqq", "auto-round", "llmcompressor", "qwix", "gguf")
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""What the package gguf quantizes by itself."""
GGML_KINDS = (
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
)


def versions():
    """The installed packages with their versions, and the names of the others."""
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return found, missing


def is_installed(package):
    """Whether a package can be imported."""
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def peers(widths=(2, 3, 4, 5, 6, 8)):
    """Settings of the packages that are installed, each with the grid that serves it best."""
    settings = []
    for bits in widths:
        at = {"bits": bits, "group_size": 64}
        settings += [
            Affine("auto-round", auto_round, **at),
            Affine("llmcompressor", llm_compressor, **at, has_zero=True),
            Affine("hqq", hqq, **at, has_zero=True, zero_is_float=True),
        ]
        if bits < 5:
            settings += [Affine("torchao", torchao, **at), Affine("qwix", qwix, **at)]
    settings += [Blocks(kind) for kind in KINDS + (GGML_KINDS if ggml_library() else ())]
    return [s for s in settings if is_installed(s.package)]
