"""Reports for people and programs: aligned tables of text, and values that JSON can hold."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def format_table(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Returns rows of cells as text; columns after the first `num_left` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        right = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(left[:num_left] + right[num_left:]).rstrip())
    return "\n".join(lines)


def to_json(value: Any) -> Any:
    """Returns a report as dicts, lists and scalars; "nan", "inf" and "-inf" for such numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(x) for key, x in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [to_json(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
