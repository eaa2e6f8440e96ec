"""Weights in a box, exactly: `w <- min(max(w, -t), t)`, and in other sets.

`clip_weights` boxes arrays, `project_weights(box(t))` does so as the last link of a chain, and
`make_train_step(weight_threshold=t)` inside the step. `project_weights` takes every other set
too: `nonnegative`, `max_norm`, `unit_norm`, `spectral_cap`. `qk_clip` scales the weights of queries
and keys by what their products were.
"""

from jaxclip.weights.attention import key_heads as key_heads
from jaxclip.weights.attention import max_attention_logits as max_attention_logits
from jaxclip.weights.attention import qk_clip as qk_clip
from jaxclip.weights.attention import query_heads as query_heads
from jaxclip.weights.attention import soft_cap as soft_cap
from jaxclip.weights.boxes import box as box
from jaxclip.weights.boxes import nonnegative as nonnegative
from jaxclip.weights.clipping import clip_weights as clip_weights
from jaxclip.weights.clipping import kernels_only as kernels_only
from jaxclip.weights.clipping import weight_clip_rate as weight_clip_rate
from jaxclip.weights.projecting import project_weights as project_weights
from jaxclip.weights.projections import max_norm as max_norm
from jaxclip.weights.projections import spectral_cap as spectral_cap
from jaxclip.weights.projections import unit_norm as unit_norm
