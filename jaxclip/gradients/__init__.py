"""Clips for gradients and updates, as optax transforms.

Each clip multiplies by one float32 coefficient, or bounds each entry, and keeps `ClipStats` in its
state. NaN and infinity never enter a state.
"""

from jaxclip.gradients.by_history import adagc as adagc
from jaxclip.gradients.by_history import autoclip as autoclip
from jaxclip.gradients.by_history import zclip as zclip
from jaxclip.gradients.by_norm import clip_by_global_norm as clip_by_global_norm
from jaxclip.gradients.by_singular_value import clip_by_spectral_norm as clip_by_spectral_norm
from jaxclip.gradients.by_unit import clip_by_block_rms as clip_by_block_rms
from jaxclip.gradients.by_unit import clip_by_leaf_norm as clip_by_leaf_norm
from jaxclip.gradients.by_value import clip_by_value as clip_by_value
from jaxclip.gradients.feedback import error_feedback as error_feedback
from jaxclip.gradients.guards import skip_nonfinite as skip_nonfinite
from jaxclip.gradients.guards import skip_or_clip as skip_or_clip
from jaxclip.gradients.per_example import per_example as per_example
from jaxclip.gradients.relative import adaptive_grad_clip as adaptive_grad_clip
from jaxclip.gradients.relative import clip_update_relative as clip_update_relative
from jaxclip.gradients.smooth import smooth_clip as smooth_clip
from jaxclip.gradients.spikes import clip_leaf_spikes as clip_leaf_spikes
from jaxclip.gradients.spikes import clip_spikes as clip_spikes
from jaxclip.gradients.state import ClipStats as ClipStats
