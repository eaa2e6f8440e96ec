"""Weights in a box, exactly: clip(w, -t, t) on arrays, in a chain, or inside the train step.

Every set that weights can be projected onto lives here; the box is one of them.
"""

from jaxclip.weights.boxes import box as box
from jaxclip.weights.boxes import nonnegative as nonnegative
from jaxclip.weights.clipping import clip_weights as clip_weights
from jaxclip.weights.clipping import kernels_only as kernels_only
from jaxclip.weights.constraints import constrain as constrain
from jaxclip.weights.constraints import keep_weights_within as keep_weights_within
from jaxclip.weights.constraints import project_weights as project_weights
from jaxclip.weights.projections import max_norm as max_norm
from jaxclip.weights.projections import spectral_cap as spectral_cap
from jaxclip.weights.projections import unit_norm as unit_norm
