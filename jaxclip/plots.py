"""Pictures of accuracy, size, weights and training.

They need matplotlib, from the extra `examples`. Each function returns the figure, and saves it
if a file is given.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from jaxclip._core.extras import import_extra
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.text import escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers for grey print.
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
) -> "Figure":
    """Draws a metric against size on disk, one curve for each setting.

    Args:
      curves: Points `(name, bytes, mean, deviation)` of each setting, such as
        `("4 bits", 16832, 98.7, 0.4)`. The names label the points of the first curve.
      file: PNG, SVG or PDF file to save the picture in; None for no file.
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
    figure, [axes] = _new_figure(8, 4.6)
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
    axes.set_ylim(low, high + 0.18 * (high - low))  # space for the names of the points
    for name, size, *_ in next(iter(curves.values())):
        axes.annotate(name, (size / 1024, high), rotation=45, fontsize=9)
    _draw_size_axis(axes)
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
    mode: Literal["max", "min"] = "max",
    title: str = "",
) -> "Figure":
    """Draws settings by metric and size, with their front and the recommended one.

    Nets have a colour each, by what differs among them: model, density, in a box or not. A line
    joins the best of their files. Kinds of files have a marker each.

    Args:
      rows: `SweepRow`s of a sweep, or objects with their attributes.
      on_front: The rows on the Pareto front, in order of size; a line joins them.
      best: The recommended row, drawn as a star.
      file: PNG, SVG or PDF file to save the picture in; None for no file.
      metric: Label of the vertical axis.
      mode: "max" if a larger metric is better, "min" if a smaller one is.
      title: Line above the picture.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: If matplotlib is not installed; the message names the extra.

    Example:
      >>> from jaxclip.sweeps import SweepRow
      >>> row = SweepRow(0.1, 1.0, 4, 0.9, 0.01, 0.0, 2048.0, 0.1, 0.5, 0, False)
      >>> figure = front([row], [row], row, metric="accuracy")
      >>> [line.get_label() for line in figure.axes[0].lines][0]
      '4 bits'
    """
    figure, [axes] = _new_figure(9, 4.8)
    nets = _names_of_nets(rows)
    families = list(dict.fromkeys(nets))
    kinds = list(dict.fromkeys(row.file_kind for row in rows))
    for i, family in enumerate(families):
        mine = [row for row, net in zip(rows, nets, strict=True) if net == family]
        if len(families) > 1:
            places = _places(_improving(mine, mode))
            axes.plot(*places, linewidth=1, label=family, **_style(i) | {"marker": ""})
        for k, kind in enumerate(kinds):
            style = _style(k) if len(families) == 1 else _style(i, k)
            places = _places([row for row in mine if row.file_kind == kind])
            label = kind if len(families) == 1 else None
            axes.plot(*places, linestyle="", alpha=0.35, markersize=5, label=label, **style)
    for k, kind in enumerate(kinds if len(families) > 1 else []):
        grey = {"color": "#666666"} | ({"markerfacecolor": "#666666"} if k < 7 else {})
        axes.plot([], [], linestyle="", label=kind, **_style(k) | grey)
    axes.errorbar(
        *_places(on_front),
        [row.standard_error for row in on_front],
        color="black",
        linewidth=1.2,
        capsize=2,
        label="Pareto front",
    )
    name = f"recommended: {best.net_name}, {best.file_name}".replace(", ", ",\n")
    axes.plot(*_places([best]), "*", color="black", markersize=15, label=name)
    _draw_size_axis(axes)
    axes.set(ylabel=metric, title=title)
    figure.legend(loc="outside right upper", fontsize=9)
    return _saved(figure, file)


def heat_maps(
    values: ArrayLike,
    step_sizes: Sequence[float],
    thresholds: Sequence[float],
    bits: Sequence[Bits | None],
    file: str | os.PathLike | None = None,
    *,
    metric: str,
    title: str = "",
) -> "Figure":
    """Draws a metric over step sizes and thresholds, one map for each width, on one scale.

    Args:
      values: Array of shape (step sizes, thresholds, widths), such as `SweepResult.means()`.
      step_sizes: Step sizes along the first axis.
      thresholds: Thresholds along the second axis; inf for no box.
      bits: Widths along the third axis; None for weights as they were trained.
      file: PNG, SVG or PDF file to save the picture in; None for no file.
      metric: Name of the metric, the title if there is no other.
      title: Line above the maps.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: If matplotlib is not installed; the message names the extra.
      ValueError: If `values` has another shape.

    Example:
      >>> figure = heat_maps(np.ones((2, 3, 1)), [0.1, 1], [1, 2, 4], [None], metric="accuracy")
      >>> len(figure.axes[0].texts)
      6
    """
    values = np.asarray(values, np.float64)
    shape = (len(step_sizes), len(thresholds), len(bits))
    if values.shape != shape:
        raise ValueError(f"values must be of shape {shape}, got {values.shape}.")
    num_columns = min(len(bits), 3)
    num_rows = -(-len(bits) // num_columns)
    width = max((0.62 * len(thresholds) + 1.2) * num_columns, 4)
    height = max((0.36 * len(step_sizes) + 1.0) * num_rows, 2.6)
    figure, grid = _new_figure(width, height, num_rows, num_columns)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    for axes in grid[len(bits) :]:
        axes.set_visible(False)
    for axes, bit_width, layer in zip(grid, bits, np.moveaxis(values, 2, 0), strict=False):
        axes.imshow(layer, cmap="cividis", vmin=low, vmax=high, origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(layer):
            is_dark = not value > (low + high) / 2
            color = "white" if is_dark else "black"
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=color, fontsize=7)
        axes.set_xticks(range(len(thresholds)), [f"{t:.3g}" for t in thresholds], fontsize=8)
        axes.set_yticks(range(len(step_sizes)), [f"{a:.2g}" for a in step_sizes], fontsize=8)
        axes.set(title=width_name(bit_width), xlabel="threshold", ylabel="step size")
    figure.suptitle(title or metric)
    return _saved(figure, file)


def weight_histograms(
    weights: Mapping[str, ArrayLike],
    file: str | os.PathLike | None = None,
    *,
    thresholds: Mapping[str, float] | None = None,
    levels: Mapping[str, ArrayLike] | None = None,
    title: str = "",
) -> "Figure":
    """Draws histograms of weights side by side, with the box and the levels of the grid.

    Args:
      weights: Arrays by name, such as `{"AdamW": w, "Lion in a box": v}`.
      file: PNG, SVG or PDF file to save the picture in; None for no file.
      thresholds: Half-width of the box by name; names without a box are left out.
      levels: Values of the low-bit grid by name; names without a grid are left out.
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
    figure, grid = _new_figure(4.2 * len(weights), 3.4, 1, len(weights))
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
        axes.set(xlabel="weight", ylabel="fraction of the weights")
        axes.set_title(escaped(name), parse_math=False)  # it may come from a file
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, loc="upper center")
    figure.suptitle(title)
    return _saved(figure, file)


def training_curves(
    steps: Sequence[int],
    curves: Mapping[str, ArrayLike],
    file: str | os.PathLike | None = None,
    *,
    clip_rates: Mapping[str, ArrayLike] | None = None,
    ylabel: str = "training loss",
    title: str = "",
) -> "Figure":
    """Draws losses over the steps, and below them the fraction of weights on the bound.

    Args:
      steps: Steps along the horizontal axis.
      curves: Values of each setting, of shape (steps,) or (seeds, steps). Over seeds the mean is
        drawn within a band of one standard deviation.
      file: PNG, SVG or PDF file to save the picture in; None for no file.
      clip_rates: `weight_clip_rate` of each setting, of the same shapes, in [0, 1]; None to
        leave that panel out.
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
    panels: list[tuple[str, Mapping[str, ArrayLike], float]] = [(ylabel, curves, 1)]
    if clip_rates is not None:
        panels.append(("weights on the bound, %", clip_rates, 100))
    figure, grid = _new_figure(7, 3.2 * len(panels), len(panels), 1)
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


def _style(i: int, k: int | None = None) -> dict[str, str]:
    """Returns the i-th colour and the k-th marker, or the i-th; hollow once all are used."""
    k = i if k is None else k
    color, marker = _STYLES[i % len(_STYLES)][0], _STYLES[k % len(_STYLES)][1]
    face = color if k // len(_STYLES) % 2 == 0 else "white"
    return {"color": color, "marker": marker, "markerfacecolor": face}


def _places(rows: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Returns sizes in KiB, and metrics."""
    return [row.file_bytes / 1024 for row in rows], [row.metric for row in rows]


def _improving(rows: Sequence[Any], mode: str) -> list[Any]:
    """Returns, from the smallest file on, the best of each budget if no smaller one is as good."""
    sign, best, found = -1 if mode == "max" else 1, {}, []
    for row in sorted(rows, key=lambda row: sign * row.metric):
        best.setdefault(row.file_bytes if row.budget is None else row.budget, row)
    for row in sorted(best.values(), key=lambda row: row.file_bytes):
        if not found or sign * row.metric < sign * found[-1].metric:
            found.append(row)
    return found


def _names_of_nets(rows: Sequence[Any]) -> list[str]:
    """Returns a name for each row: its model, density and box, as far as rows differ in them."""
    columns = [
        [row.model or "" for row in rows],
        ["" if row.density is None else f"density {row.density:.3g}" for row in rows],
        ["no box" if math.isinf(row.threshold) else "in a box" for row in rows],
    ]
    columns = [names for names in columns if len(set(names)) > 1]
    return [", ".join(names) for names in zip(*columns, strict=True)] or [""] * len(rows)


def _new_figure(
    width: float, height: float, num_rows: int = 1, num_columns: int = 1
) -> tuple["Figure", list[Any]]:
    """Returns a figure and its axes, row by row."""
    import_extra("matplotlib.figure", "examples")
    from jaxclip._core.figures import NotebookFigure  # here, because it needs matplotlib

    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(num_rows, num_columns, squeeze=False).flat)


def _draw_size_axis(axes: Any) -> None:
    """Makes the horizontal axis one of file sizes in KiB, on a logarithmic scale."""
    ticker = import_extra("matplotlib.ticker", "examples")
    axes.set_xscale("log", base=2)
    left, right = axes.get_xlim()
    axes.set_xlim(left, 1.2 * right)
    parts = (1.0, 1.25, 1.5, 1.75) if right < 4 * left else (1.0,)
    axes.xaxis.set_major_locator(ticker.LogLocator(2, parts))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.set_xlabel("size of the file, KiB")


def width_name(bits: Bits | Grid | None) -> str:
    """Returns a width or a grid in words."""
    if bits is None:
        return "as trained"
    if isinstance(bits, Grid):
        fields = [bits.levels if bits.levels != "full" else ""]
        fields += [f"groups of {bits.group_size}" if bits.group_size else ""]
        fields += [
            "zero point" if bits.zero_point else "",
            bits.scale_dtype.removeprefix("float32"),
        ]
        return ", ".join([width_name(bits.bits), *filter(None, fields)])
    return bits if isinstance(bits, str) else f"{bits} bit{'s' if bits > 1 else ''}"


def _saved(figure: "Figure", file: str | os.PathLike | None) -> "Figure":
    """Saves the figure if there is a file, and returns it."""
    if file is not None:
        figure.savefig(file, dpi=150)
    return figure
