"""Reports for people and programs: aligned tables of text, and values that JSON can hold."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxclip._core.text import escaped

_MAX_WIDTH = 120  # characters of a column


def format_table(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Returns rows of cells as text; columns after the first `num_left` are right-aligned."""
    rows = [[escaped(cell) for cell in row] for row in rows]
    # A name from a file may be as long as the file: it does not widen the other rows.
    columns = zip(*rows, strict=True)
    widths = [max(min(len(cell), _MAX_WIDTH) for cell in column) for column in columns]
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
