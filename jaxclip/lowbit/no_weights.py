"""Leaves that are no weights to be rounded, told by their names.

Moments of an optimizer, and what other libraries made of weights when they quantized them: codes,
scales and zero points. Rounding these once more would ruin the layer.
"""

import re
from collections.abc import Iterable

OPTIMIZER_STATE = "optimizer state"
QUANTIZED = "quantized already"

_OPTIMIZER_STATE = re.compile(
    r"(?:^|[^a-z])(?:optimi[sz]er|optim|opt_state|exp_avg|exp_inf|moments?)(?:[^a-z]|$)"
    r"|(?:^|[^a-z])(?:momentum(?:_buffer)?|adam(?:_\d+)?)$",
    re.IGNORECASE,
)
# Names that tell a quantized layer, of GPTQ, AWQ, compressed-tensors, fp8 and bitsandbytes.
_OF_CODES = re.compile(r"(.*)(?:qweight|weight_packed)$")
_OF_SCALES = re.compile(r"(.*weight)(?:_scale|_scale_inv|_zero_point|[./]absmax)$")
# What such a layer has besides, after the name of the layer or of its weight.
_PARTS_OF_LAYER = re.compile(r"qweight|qzeros|zeros|scales|g_idx|weight_\w+")
_PARTS_OF_WEIGHT = re.compile(r"|_(?:scale|scale_inv|zero_point|shape|g_idx)|[./].+")


def reasons_to_keep(names: Iterable[str]) -> dict[str, str]:
    """Returns the names, among those of all leaves, that are no weights, and why."""
    names = list(names)
    layers = {found[1] for name in names if (found := _OF_CODES.fullmatch(name))}
    weights = {found[1] for name in names if (found := _OF_SCALES.fullmatch(name))}
    reasons = {}
    for name in names:
        if _OPTIMIZER_STATE.search(name):
            reasons[name] = OPTIMIZER_STATE
        elif _is_part(name, layers, _PARTS_OF_LAYER) or _is_part(name, weights, _PARTS_OF_WEIGHT):
            reasons[name] = QUANTIZED
    return reasons


def _is_part(name: str, stems: set[str], parts: re.Pattern[str]) -> bool:
    """Returns True if a name is a stem and one of the parts."""
    if not stems:
        return False
    # A stem ends at few places of a name: trying all pairs would take quadratic time.
    places = {0, len(name), *(m.end() for m in re.finditer(r"weight|[./]", name))}
    return any(name[:i] in stems and parts.fullmatch(name, i) for i in places)
