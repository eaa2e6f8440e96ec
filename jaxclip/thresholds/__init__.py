"""Thresholds: numbers, arrays, schedules, rules, or trees of these.

A rule is a callable that takes an array and returns the threshold for it.
"""

from jaxclip.thresholds.by_error import least_squares as least_squares
from jaxclip.thresholds.by_error import mse_optimal as mse_optimal
from jaxclip.thresholds.by_fan_in import fan_in as fan_in
from jaxclip.thresholds.by_magnitude import max_abs as max_abs
from jaxclip.thresholds.by_magnitude import percentile_abs as percentile_abs
from jaxclip.thresholds.by_magnitude import std_multiple as std_multiple
from jaxclip.thresholds.by_rate import code_entropy as code_entropy
from jaxclip.thresholds.by_rate import rate_optimal as rate_optimal
from jaxclip.thresholds.by_tree import per_tree as per_tree
from jaxclip.thresholds.rules import ThresholdRule as ThresholdRule
from jaxclip.thresholds.values import resolve_threshold as resolve_threshold
