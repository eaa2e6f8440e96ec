"""Norms and the one coefficient that clips by them.

Every norm is right for every finite input of every float dtype: sums are float32, and inputs
whose squares would overflow or vanish are rescaled by a power of two first.
"""

from jaxclip.norms.of_trees import global_norm as global_norm
from jaxclip.norms.of_trees import measure_norm as measure_norm
from jaxclip.norms.of_units import leaf_norms as leaf_norms
from jaxclip.norms.of_units import unit_norms as unit_norms
