"""The public names of the package, from the rooms that they live in."""

from jaxclip import checkpoints, interop, plots
from jaxclip.checkpoints.sizes import size_report
from jaxclip.gradients.by_history import adagc, autoclip, zclip
from jaxclip.gradients.by_norm import clip_by_global_norm
from jaxclip.gradients.by_singular_value import clip_by_spectral_norm
from jaxclip.gradients.by_unit import clip_by_block_rms, clip_by_leaf_norm
from jaxclip.gradients.by_value import clip_by_value
from jaxclip.gradients.feedback import error_feedback
from jaxclip.gradients.guards import skip_nonfinite, skip_or_clip
from jaxclip.gradients.relative import adaptive_grad_clip, clip_update_relative
from jaxclip.gradients.smooth import smooth_clip
from jaxclip.gradients.spikes import clip_leaf_spikes, clip_spikes
from jaxclip.lint.chain import lint_chain
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.lowbit.on_grid import keep_on_grid
from jaxclip.lowbit.packing import pack_codes, unpack_codes
from jaxclip.lowbit.quantizer import quantize
from jaxclip.lowbit.rate_rounding import cheaper_codes
from jaxclip.lowbit.scale_training import trainable_parts
from jaxclip.lowbit.straight_through import fake_quantize
from jaxclip.lowbit.trees import compress, decompress
from jaxclip.norms.of_trees import global_norm
from jaxclip.norms.of_units import leaf_norms, unit_norms
from jaxclip.sign.caution import cautious
from jaxclip.sign.directions import scale_by_lion, scale_by_sign, scale_by_signum
from jaxclip.sign.kinds import scaled_sign, soft_sign, stochastic_sign
from jaxclip.sign.optimizers import lion, sign_sgd, signum
from jaxclip.sign.voting import majority_vote
from jaxclip.sweeps.grid import sweep
from jaxclip.sweeps.results import SweepResult, pareto_front
from jaxclip.sweeps.tasks import random_batches
from jaxclip.thresholds.by_error import least_squares, mse_optimal
from jaxclip.thresholds.by_fan_in import fan_in
from jaxclip.thresholds.by_magnitude import max_abs, percentile_abs, std_multiple
from jaxclip.thresholds.by_rate import rate_optimal
from jaxclip.thresholds.by_tree import per_tree
from jaxclip.thresholds.values import resolve_threshold
from jaxclip.training.loop import FitResult, fit, log_to_jsonl
from jaxclip.training.step import StepInfo, TrainState, make_train_step
from jaxclip.training.stochastic_rounding import apply_updates_stochastically
from jaxclip.training.stopping import (
    StopReason,
    max_seconds,
    max_steps,
    nonfinite,
    plateau,
    reached,
)
from jaxclip.training.telemetry import clip_stats, explain
from jaxclip.weights.boxes import box, nonnegative
from jaxclip.weights.clipping import clip_weights, kernels_only
from jaxclip.weights.constraints import constrain, keep_weights_within, project_weights
from jaxclip.weights.projections import max_norm, spectral_cap, unit_norm

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
