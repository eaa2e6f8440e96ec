"""The public names of the package, from the rooms that they live in."""

from jaxclip import checkpoints, interop, plots
from jaxclip.adaptive import adagc, autoclip, zclip
from jaxclip.boxes import box, nonnegative
from jaxclip.compression import compress, decompress
from jaxclip.constraints import constrain, project_weights
from jaxclip.feedback import error_feedback
from jaxclip.fitting import FitResult, fit, log_to_jsonl
from jaxclip.gradients import clip_by_global_norm, clip_by_value
from jaxclip.guards import skip_nonfinite, skip_or_clip
from jaxclip.layer_rules import fan_in
from jaxclip.lint import lint_chain
from jaxclip.low_bit_training import keep_on_grid, trainable_parts
from jaxclip.norms import global_norm, leaf_norms, unit_norms
from jaxclip.packing import pack_codes, unpack_codes
from jaxclip.projections import max_norm, spectral_cap, unit_norm
from jaxclip.quantization import QuantizedArray, dequantize, quantize
from jaxclip.rate_rounding import cheaper_codes
from jaxclip.rates import rate_optimal
from jaxclip.rounding import apply_updates_stochastically
from jaxclip.sign import scale_by_lion, scale_by_sign, scale_by_signum
from jaxclip.sign_kinds import scaled_sign, soft_sign, stochastic_sign
from jaxclip.sign_optimizers import cautious, lion, sign_sgd, signum
from jaxclip.sizes import size_report
from jaxclip.smoothing import smooth_clip
from jaxclip.spectra import clip_by_spectral_norm
from jaxclip.spikes import clip_leaf_spikes, clip_spikes
from jaxclip.stopping import StopReason, max_seconds, max_steps, nonfinite, plateau, reached
from jaxclip.straight_through import fake_quantize
from jaxclip.sweep_results import SweepResult, pareto_front
from jaxclip.sweep_tasks import random_batches
from jaxclip.sweeps import sweep
from jaxclip.telemetry import clip_stats, explain
from jaxclip.threshold_rules import (
    least_squares,
    max_abs,
    mse_optimal,
    percentile_abs,
    std_multiple,
)
from jaxclip.thresholds import resolve_threshold
from jaxclip.training import StepInfo, TrainState, make_train_step
from jaxclip.tree_rules import per_tree
from jaxclip.units import (
    adaptive_grad_clip,
    clip_by_block_rms,
    clip_by_leaf_norm,
    clip_update_relative,
)
from jaxclip.voting import majority_vote
from jaxclip.weights import clip_weights, keep_weights_within, kernels_only

__all__ = [
    "FitResult",
    "QuantizedArray",
    "StepInfo",
    "StopReason",
    "SweepResult",
    "TrainState",
    "adagc",
    "adaptive_grad_clip",
    "apply_updates_stochastically",
    "autoclip",
    "box",
    "cautious",
    "cheaper_codes",
    "checkpoints",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_leaf_norm",
    "clip_by_spectral_norm",
    "clip_by_value",
    "clip_leaf_spikes",
    "clip_spikes",
    "clip_stats",
    "clip_update_relative",
    "clip_weights",
    "compress",
    "constrain",
    "decompress",
    "dequantize",
    "error_feedback",
    "explain",
    "fake_quantize",
    "fan_in",
    "fit",
    "global_norm",
    "interop",
    "keep_on_grid",
    "keep_weights_within",
    "kernels_only",
    "leaf_norms",
    "least_squares",
    "lint_chain",
    "lion",
    "log_to_jsonl",
    "majority_vote",
    "make_train_step",
    "max_abs",
    "max_norm",
    "max_seconds",
    "max_steps",
    "mse_optimal",
    "nonfinite",
    "nonnegative",
    "pack_codes",
    "pareto_front",
    "per_tree",
    "percentile_abs",
    "plateau",
    "plots",
    "project_weights",
    "quantize",
    "random_batches",
    "rate_optimal",
    "reached",
    "resolve_threshold",
    "scale_by_lion",
    "scale_by_sign",
    "scale_by_signum",
    "scaled_sign",
    "sign_sgd",
    "signum",
    "size_report",
    "skip_nonfinite",
    "skip_or_clip",
    "smooth_clip",
    "soft_sign",
    "spectral_cap",
    "std_multiple",
    "stochastic_sign",
    "sweep",
    "trainable_parts",
    "unit_norm",
    "unit_norms",
    "unpack_codes",
    "zclip",
]
