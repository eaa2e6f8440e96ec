"""Small pieces of HTML for notebooks: tables, and pictures as inline SVG; all text is escaped."""

import html
from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np

from jaxclip._core.checks import is_concrete
from jaxclip._core.text import escaped

_MAX_ROWS = 200  # of a table; a report may have a million
_WIDTH, _HEIGHT = 320, 48  # of a picture, in pixels
_COLOR = "#0072B2"  # is seen on light and on dark pages


def html_text(text: str) -> str:
    """Returns text as HTML that shows it, and does nothing else."""
    return html.escape(escaped(text))


def html_report(title: str, *parts: str) -> str:
    """Returns parts below a line in bold."""
    return f"<div><b>{html_text(title)}</b>{''.join(parts)}</div>"


def html_table(
    rows: Sequence[Sequence[str]],
    num_left: int = 1,
    has_head: bool = True,
    bold: Collection[int] = (),
) -> str:
    """Returns rows of cells as a table; the first is the head, and `bold` has indices of rows."""
    lines = []
    for i, row in enumerate(rows[: _MAX_ROWS + 1]):
        tag = "th" if has_head and i == 0 else "td"
        cells = []
        for j, cell in enumerate(row):
            weight = "font-weight:bold;" if i in bold else ""
            style = f"{weight}text-align:{'left' if j < num_left else 'right'}"
            cells.append(f'<{tag} style="{style}">{html_text(cell)}</{tag}>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    num_hidden = len(rows) - len(lines)
    more = f"<div>{num_hidden:,} more rows: print it for all of them</div>" if num_hidden else ""
    return f"<table>{''.join(lines)}</table>{more}"


def svg_bars(counts: np.ndarray, label: str) -> str:
    """Returns a bar for each count; a bar that is not empty is at least a pixel high."""
    width = _WIDTH / max(len(counts), 1)
    heights = np.ceil(_HEIGHT * counts / max(int(counts.max(initial=0)), 1)).astype(int)
    path = "".join(
        f"M{i * width:.1f} {_HEIGHT}h{0.9 * width:.1f}v-{height}h-{0.9 * width:.1f}z"
        for i, height in enumerate(heights)
        if height
    )
    return _svg(f'<path d="{path}" fill="{_COLOR}"/>', label)


def svg_line(values: np.ndarray, label: str) -> str:
    """Returns a line through the finite values, of at most a point for each pixel."""
    at = np.flatnonzero(np.isfinite(values))
    if at.size > _WIDTH:
        at = at[np.linspace(0, at.size - 1, _WIDTH).astype(int)]
    shown = np.asarray(values, np.float64)[at] / 2  # differences of halves cannot overflow
    low, high = shown.min(initial=np.inf), shown.max(initial=-np.inf)
    span = high - low if high > low else 1.0
    x = _WIDTH * at / max(len(values) - 1, 1)
    y = 1 + (_HEIGHT - 2) * (1 - (shown - low) / span)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    shape = f'<polyline points="{points}" fill="none" stroke="{_COLOR}" stroke-width="1.5"/>'
    return _svg(shape, label)


def _svg(shape: str, label: str) -> str:
    """Returns a picture with its label below."""
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    text = html_text(label)
    return f'<div><svg {size} role="img" aria-label="{text}">{shape}</svg><br/>{text}</div>'


def number_text(value: Any) -> str:
    """Returns a number, or what is known of an array: dtype, shape, and its range if concrete."""
    if not hasattr(value, "shape"):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    name = f"{value.dtype.name}[{','.join(map(str, value.shape))}]"
    if not can_be_read(value):
        return name
    array = np.asarray(value)
    if array.shape == ():
        return number_text(array.item())
    is_number = np.issubdtype(array.dtype, np.number) and array.dtype.kind != "c" and array.size
    return f"{name}, {array.min():.4g} to {array.max():.4g}" if is_number else name


def can_be_read(value: Any) -> bool:
    """Returns True for an array with values that this process has."""
    if not isinstance(value, (np.ndarray, np.generic, jax.Array)) or not is_concrete(value):
        return False
    if isinstance(value, jax.Array):
        return not value.is_deleted() and value.is_fully_addressable
    return True
