"""Clipping and sign steps for JAX: train by sign inside a weight box, ship at low bits."""

from jaxclip import checkpoints, plots
from jaxclip.compression import compress, decompress, size_report
from jaxclip.gradients import clip_by_global_norm, clip_by_value
from jaxclip.norms import global_norm
from jaxclip.quantization import QuantizedArray, dequantize, pack_codes, quantize, unpack_codes
from jaxclip.sign import lion, scale_by_lion, scale_by_sign, scale_by_signum, sign_sgd, signum
from jaxclip.telemetry import clip_stats
from jaxclip.thresholds import fan_in, max_abs, mse_optimal, resolve_threshold
from jaxclip.training import StepInfo, TrainState, make_train_step
from jaxclip.weights import clip_weights, keep_weights_within, kernels_only

__all__ = [
    "QuantizedArray",
    "StepInfo",
    "TrainState",
    "checkpoints",
    "clip_by_global_norm",
    "clip_by_value",
    "clip_stats",
    "clip_weights",
    "compress",
    "decompress",
    "dequantize",
    "fan_in",
    "global_norm",
    "keep_weights_within",
    "kernels_only",
    "lion",
    "make_train_step",
    "max_abs",
    "mse_optimal",
    "pack_codes",
    "plots",
    "quantize",
    "resolve_threshold",
    "scale_by_lion",
    "scale_by_sign",
    "scale_by_signum",
    "sign_sgd",
    "signum",
    "size_report",
    "unpack_codes",
]

__version__ = "0.1.0.dev0"
