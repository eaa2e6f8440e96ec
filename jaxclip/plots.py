"""Pictures that read without the text. Needs matplotlib, from the extra `examples`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxclip import _checks

__all__ = ["tradeoff"]

# Okabe and Ito's colours, told apart with any colour vision; markers for print in grey.
_STYLES = (("#D55E00", "v"), ("#E69F00", "s"), ("#56B4E9", "D"), ("#0072B2", "o"), ("#009E73", "^"))


def tradeoff(
    curves: Mapping[str, Sequence[tuple[str, float, float, float]]],
    file: str | os.PathLike | None = None,
    *,
    metric: str = "test accuracy, %",
    title: str = "",
) -> Any:
    """Draws a metric against size on disk, one curve for each setting.

    Args:
      curves: For each setting its points `(name, bytes, mean, deviation)`, such as
        `("4 bits", 16832, 98.7, 0.4)`. The names label the points of the first curve.
      file: Where to save the picture, by its suffix PNG, SVG or PDF; None not to.
      metric: Label of the vertical axis, with its unit.
      title: Line above the picture.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: If matplotlib is not installed; the message names the extra.

    Example:
      >>> figure = tradeoff({"a": [("8 bits", 4096, 98.0, 0.5), ("1 bit", 1024, 71.0, 2.0)]})
      >>> figure.axes[0].get_xlabel()
      'size of the file, KiB'
    """
    ticker = _checks.import_extra("matplotlib.ticker", "examples")
    figure = _checks.import_extra("matplotlib.figure", "examples").Figure(
        figsize=(8, 4.6), layout="constrained"
    )
    axes = figure.add_subplot()
    for i, (label, points) in enumerate(curves.items()):
        color, marker = _STYLES[i % len(_STYLES)]
        _, sizes, means, deviations = zip(*points, strict=True)
        axes.errorbar(
            [size / 1024 for size in sizes],
            means,
            deviations,
            color=color,
            marker=marker,
            markersize=5,
            capsize=2,
            label=label,
        )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.18 * (high - low))  # room for the names of the points
    for name, size, *_ in next(iter(curves.values())):
        axes.annotate(name, (size / 1024, high), rotation=45, fontsize=9)
    axes.set_xscale("log", base=2)
    left, right = axes.get_xlim()
    axes.set_xlim(left, 1.2 * right)
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.set(xlabel="size of the file, KiB", ylabel=metric, title=title)
    axes.legend(loc="lower right")
    if file is not None:
        figure.savefig(file, dpi=150)
    return figure
