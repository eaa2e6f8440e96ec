"""Pictures that read without the text. Needs matplotlib, from the extra `examples`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxclip._core import extras

# Okabe and Ito's colours, told apart with any colour vision; markers for print in grey.
_STYLES = (
    ("#D55E00", "v"),
    ("#E69F00", "s"),
    ("#56B4E9", "D"),
    ("#0072B2", "o"),
    ("#009E73", "^"),
    ("#CC79A7", "P"),
    ("#999999", "X"),
)
_LINES = ("-", "--", "-.", ":")


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
    figure, axes = _figure(8, 4.6)
    for i, (label, points) in enumerate(curves.items()):
        _, sizes, means, deviations = zip(*points, strict=True)
        axes.errorbar(
            [size / 1024 for size in sizes],
            means,
            deviations,
            linestyle=_LINES[i // len(_STYLES) % len(_LINES)],
            markersize=5,
            capsize=2,
            label=label,
            **_style(i),
        )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.18 * (high - low))  # room for the names of the points
    for name, size, *_ in next(iter(curves.values())):
        axes.annotate(name, (size / 1024, high), rotation=45, fontsize=9)
    _by_size(axes)
    axes.set(ylabel=metric, title=title)
    axes.legend(loc="best")
    return _saved(figure, file)


def front(
    rows: Sequence[Any],
    on_front: Sequence[Any],
    best: Any,
    file: str | os.PathLike | None = None,
    *,
    metric: str,
    title: str = "",
) -> Any:
    """Draws settings by metric and size, their front as a line, the recommended one as a star.

    Args:
      rows: `SweepRow`s, or whatever has their attributes.
      on_front: Those on the front, by size.
      best: The recommended one.
      file: As in `tradeoff`.
      metric: Label of the vertical axis.
      title: Line above the picture.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: If matplotlib is not installed; the message names the extra.

    Example:
      >>> import types
      >>> row = types.SimpleNamespace(step_size=0.1, threshold=1.0, bits=4, metric=0.9)
      >>> row.file_bytes, row.standard_error = 2048.0, 0.01
      >>> len(front([row], [row], row, metric="accuracy").axes[0].texts)
      1
    """
    figure, axes = _figure(8, 4.8)
    widths = list(dict.fromkeys(row.bits for row in rows))
    for i, bits in enumerate(widths):
        some = [row for row in rows if row.bits == bits]
        sizes = [row.file_bytes / 1024 for row in some]
        axes.plot(
            sizes,
            [row.metric for row in some],
            linestyle="",
            alpha=0.35,
            markersize=5,
            label=_width_name(bits),
            **_style(i),
        )
    axes.errorbar(
        [row.file_bytes / 1024 for row in on_front],
        [row.metric for row in on_front],
        [row.standard_error for row in on_front],
        color="black",
        linewidth=1.2,
        capsize=2,
        label="no setting is better and smaller",
    )
    axes.plot(
        best.file_bytes / 1024, best.metric, "*", color="black", markersize=15, label="recommended"
    )
    axes.annotate(
        f"step size {best.step_size:.3g}, threshold {best.threshold:.3g}, {_width_name(best.bits)}",
        (best.file_bytes / 1024, best.metric),
        xytext=(12, -18),
        textcoords="offset points",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )
    _by_size(axes)
    axes.set(ylabel=metric, title=title)
    axes.legend(loc="best", fontsize=9)
    return _saved(figure, file)


def heat_maps(
    values: Any,
    step_sizes: Sequence[float],
    thresholds: Sequence[float],
    bits: Sequence[Any],
    file: str | os.PathLike | None = None,
    *,
    metric: str,
    title: str = "",
) -> Any:
    """Draws a metric over step sizes and thresholds, one map for each width, on one scale.

    Args:
      values: Array of axes (step_size, threshold, bits), such as `SweepResult.means()`.
      step_sizes: Along the first axis.
      thresholds: Along the second; inf for no box.
      bits: Along the third; None for weights as they were trained.
      file: As in `tradeoff`.
      metric: What the numbers are.
      title: Line above the maps.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: If matplotlib is not installed; the message names the extra.
      ValueError: If `values` does not have these axes.

    Example:
      >>> figure = heat_maps(np.ones((2, 3, 1)), [0.1, 1], [1, 2, 4], [None], metric="accuracy")
      >>> len(figure.axes[0].texts)
      6
    """
    values = np.asarray(values, np.float64)
    if values.shape != (len(step_sizes), len(thresholds), len(bits)):
        raise ValueError(
            f"values must be of shape {(len(step_sizes), len(thresholds), len(bits))}, "
            f"got {values.shape}."
        )
    num_columns = min(len(bits), 3)
    num_lines = -(-len(bits) // num_columns)
    cell = (0.62 * len(thresholds) + 1.2, 0.36 * len(step_sizes) + 1.0)
    size = (max(cell[0] * num_columns, 4), max(cell[1] * num_lines, 2.6))
    figure, grid = _figure(*size, num_lines, num_columns)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    for axes in grid[len(bits) :]:
        axes.set_visible(False)
    for axes, width, layer in zip(grid, bits, np.moveaxis(values, 2, 0), strict=False):
        axes.imshow(layer, cmap="cividis", vmin=low, vmax=high, origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(layer):
            is_dark = not value > (low + high) / 2
            color = "white" if is_dark else "black"
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=color, fontsize=7)
        axes.set_xticks(range(len(thresholds)), [f"{t:.3g}" for t in thresholds], fontsize=8)
        axes.set_yticks(range(len(step_sizes)), [f"{a:.2g}" for a in step_sizes], fontsize=8)
        axes.set(title=_width_name(width), xlabel="threshold", ylabel="step size")
    figure.suptitle(title or metric)
    return _saved(figure, file)


def weight_histograms(
    weights: Mapping[str, Any],
    file: str | os.PathLike | None = None,
    *,
    thresholds: Mapping[str, float] | None = None,
    levels: Mapping[str, Any] | None = None,
    title: str = "",
) -> Any:
    """Draws the distribution of weights, one panel each, with the box and the grid's levels.

    Args:
      weights: Arrays by name, such as `{"AdamW": w, "Lion in a box": v}`.
      file: As in `tradeoff`.
      thresholds: Half-width of the box by the same names, where there is one.
      levels: Values that the low-bit grid has, by the same names, where there is one.
      title: Line above the panels.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: If matplotlib is not installed; the message names the extra.

    Example:
      >>> figure = weight_histograms({"w": np.linspace(-1, 1, 99)}, thresholds={"w": 1.0})
      >>> figure.axes[0].get_title()
      'w'
    """
    figure, grid = _figure(4.2 * len(weights), 3.4, 1, len(weights))
    for axes, (name, values) in zip(grid, weights.items(), strict=True):
        values = np.asarray(values, np.float64).ravel()
        axes.hist(values, 101, color="#0072B2", weights=np.full(values.size, 1 / values.size))
        if thresholds and name in thresholds:
            for side in (-1, 1):
                axes.axvline(side * thresholds[name], color="#D55E00", linewidth=1.5)
            axes.plot([], [], color="#D55E00", label="the box")
        if levels and name in levels:
            for level in np.ravel(levels[name]):
                axes.axvline(level, color="black", linewidth=0.8, linestyle=":")
            axes.plot([], [], color="black", linestyle=":", label="levels of the grid")
        axes.set(title=name, xlabel="weight", ylabel="share of the weights")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, loc="upper center")
    figure.suptitle(title)
    return _saved(figure, file)


def training_curves(
    steps: Sequence[int],
    curves: Mapping[str, Any],
    file: str | os.PathLike | None = None,
    *,
    clip_rates: Mapping[str, Any] | None = None,
    ylabel: str = "training loss",
    title: str = "",
) -> Any:
    """Draws losses over the steps, and below them the share of weights on the bound.

    Args:
      steps: Along the horizontal axis.
      curves: For each setting its values, of shape (steps,), or (seeds, steps) for a line at
        the mean within a band of a standard deviation.
      file: As in `tradeoff`.
      clip_rates: `weight_clip_rate` of the same shapes, in [0, 1], or None.
      ylabel: Label of the upper axis.
      title: Line above the picture.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: If matplotlib is not installed; the message names the extra.

    Example:
      >>> figure = training_curves([1, 2], {"a": [1.0, 0.5]}, clip_rates={"a": [0.0, 0.1]})
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['training loss', 'weights on the bound, %']
    """
    panels: list[tuple[str, Mapping[str, Any], float]] = [(ylabel, curves, 1)]
    if clip_rates is not None:
        panels.append(("weights on the bound, %", clip_rates, 100))
    figure, grid = _figure(7, 3.2 * len(panels), len(panels), 1)
    for axes, (label, lines, factor) in zip(grid, panels, strict=True):
        for i, (name, values) in enumerate(lines.items()):
            color, _ = _STYLES[i % len(_STYLES)]
            values = factor * np.atleast_2d(np.asarray(values, np.float64))
            mean, deviation = values.mean(axis=0), values.std(axis=0)
            axes.plot(steps, mean, color=color, linestyle=_LINES[i % len(_LINES)], label=name)
            axes.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.2)
        axes.set_ylabel(label)
    if all(np.min(values) > 0 for values in curves.values()):
        grid[0].set_yscale("log")
    grid[0].legend(fontsize=9)
    grid[-1].set_xlabel("step")
    figure.suptitle(title)
    return _saved(figure, file)


# --- Parts ----------------------------------------------------------------------------


def _style(i: int) -> dict[str, str]:
    """Colour and marker of the i-th curve; hollow markers when all were taken."""
    color, marker = _STYLES[i % len(_STYLES)]
    face = color if i // len(_STYLES) % 2 == 0 else "white"
    return {"color": color, "marker": marker, "markerfacecolor": face}


def _figure(width: float, height: float, num_lines: int = 0, num_columns: int = 0) -> Any:
    """A figure and its axes: one, or a flat list of as many as were asked for."""
    figure = extras.import_extra("matplotlib.figure", "examples").Figure(
        figsize=(width, height), layout="constrained"
    )
    if not num_lines:
        return figure, figure.add_subplot()
    return figure, list(figure.subplots(num_lines, num_columns, squeeze=False).flat)


def _by_size(axes: Any) -> None:
    ticker = extras.import_extra("matplotlib.ticker", "examples")
    axes.set_xscale("log", base=2)
    left, right = axes.get_xlim()
    axes.set_xlim(left, 1.2 * right)
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.set_xlabel("size of the file, KiB")


def _width_name(bits: Any) -> str:
    if bits is None:
        return "as trained"
    return bits if isinstance(bits, str) else f"{bits} bit{'s' if bits > 1 else ''}"


def _saved(figure: Any, file: str | os.PathLike | None) -> Any:
    if file is not None:
        figure.savefig(file, dpi=150)
    return figure
