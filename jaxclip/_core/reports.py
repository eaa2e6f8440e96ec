"""Reports for people and programs: aligned tables of text, and values that JSON can hold."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxclip._core.text import encodable, escaped, num_columns

_MAX_WIDTH = 120  # of a column


def format_table(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Returns rows of cells as text; columns after the first `num_left` are right-aligned."""
    # Now, and not when the text is printed, because characters that are replaced widen a column.
    encoding = getattr(sys.stdout, "encoding", None)
    rows = [[encodable(escaped(cell), encoding) for cell in row] for row in rows]
    # A name from a file may be as long as the file: it does not widen the other rows.
    columns = zip(*rows, strict=True)
    widths = [max(min(num_columns(cell), _MAX_WIDTH) for cell in column) for column in columns]
    lines = []
    for row in rows:
        padding = [" " * (w - num_columns(cell)) for cell, w in zip(row, widths, strict=True)]
        left = [cell + spaces for cell, spaces in zip(row, padding, strict=True)]
        right = [spaces + cell for cell, spaces in zip(row, padding, strict=True)]
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
