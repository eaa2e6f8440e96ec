"""Weights that are exactly zero: chosen while training, or afterwards.

`keep_sparse` wraps an optimizer and keeps the fraction of weights that it is given. `prune` does so
once, after training, and with a calibration for a small error of the outputs. `soft_threshold` is
the proximal step of an L1 penalty.
"""

from jaxclip.sparsity.keeping import keep_sparse as keep_sparse
from jaxclip.sparsity.pruning import prune as prune
from jaxclip.sparsity.shrinking import soft_threshold as soft_threshold
