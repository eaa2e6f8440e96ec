"""Parameters of which the quick run takes a few and the gate all."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick_first(values: Iterable[Any], count: int = 1) -> list[Any]:
    """Marks all values but the first few as thorough."""
    values = list(values)
    rest = (pytest.param(*as_tuple(v), marks=pytest.mark.thorough) for v in values[count:])
    return [*values[:count], *rest]


def as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)
