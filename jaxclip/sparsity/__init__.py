"""Weights that are exactly zero: chosen while training, or afterwards.

`keep_sparse` wraps an optimizer and keeps the fraction of weights that it is given.
"""

from jaxclip.sparsity.keeping import keep_sparse as keep_sparse
