"""Pictures: what they show, and what is said where matplotlib is missing."""

import sys

import numpy as np
import pytest

from jaxclip import plots
from jaxclip.sweeps import SweepRow

CURVES = {
    "one": [("8 bits", 4096, 98.0, 0.5), ("1 bit", 1024, 71.0, 2.0)],
    "two": [("8 bits", 4096, 97.0, 0.5), ("1 bit", 1024, 95.0, 2.0)],
}


def test_the_tradeoff_has_a_curve_and_a_label_for_each_setting():
    axes = plots.tradeoff(CURVES, title="t").axes[0]
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["one", "two"]
    x, y = handles[0].lines[0].get_data()
    assert list(x) == [4.0, 1.0]
    assert list(y) == [98.0, 71.0]
    assert [t.get_text() for t in axes.texts] == ["8 bits", "1 bit"]


def test_nine_curves_and_nine_widths_are_told_apart():
    curves = {str(i): CURVES["one"] for i in range(9)}
    handles, _ = plots.tradeoff(curves).axes[0].get_legend_handles_labels()
    lines = [handle.lines[0] for handle in handles]
    rows = [ROWS[0]._replace(bits=bits) for bits in range(9)]
    points = plots.front(rows, rows[:1], rows[0], metric="accuracy").axes[0].lines[:9]
    for drawn in (lines, points):
        faces = {(x.get_color(), x.get_marker(), x.get_markerfacecolor()) for x in drawn}
        assert len(faces) == 9
    assert len({(x.get_color(), x.get_linestyle()) for x in lines}) == 9


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_saved(tmp_path, suffix):
    file = tmp_path / f"picture.{suffix}"
    plots.tradeoff(CURVES, file)
    assert file.stat().st_size > 5_000


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.ticker", None)
    with pytest.raises(ImportError, match=r"jaxclip\[examples\]"):
        plots.tradeoff(CURVES)


ROWS = [
    SweepRow(
        step_size=0.1 * (i + 1),
        threshold=1.0,
        bits=bits,
        metric=0.9 + 0.01 * i,
        standard_error=0.002,
        gap=0.0,
        file_bytes=1024.0 * size,
        seconds_per_step=0.1,
        weight_clip_rate=0.0,
        num_diverged=0,
        is_outranked=False,
    )
    for bits, size in ((None, 32), (4, 4), ("ternary", 2), (1, 1))
    for i in (0, 1)
]


def test_the_front_shows_every_row_under_its_width_and_the_recommended_one():
    axes = plots.front(ROWS, ROWS[1::2][::-1], ROWS[5], metric="accuracy").axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    best = "recommended: step size 0.2,\nthreshold 1,\nternary"
    assert {"as trained", "4 bits", "ternary", "1 bit", best} <= set(lines)
    x, y = lines["ternary"].get_data()
    assert list(x) == [2.0, 2.0]
    assert list(y) == [0.9, 0.91]
    assert list(lines[best].get_data()[0]) == [2.0]
    colors = [lines[name].get_color() for name in ("as trained", "4 bits", "ternary", "1 bit")]
    assert len(set(colors)) == 4


def test_families_of_nets_have_colours_and_kinds_of_files_have_markers():
    half = [row._replace(model="half", metric=row.metric - 0.05) for row in ROWS]
    full = [row._replace(model="full", threshold=np.inf) for row in ROWS]
    small = [full[0]._replace(bits=None, budget=900, file_bytes=896.0)]
    rows = [*half, *full, *small, *(row._replace(threshold=np.inf) for row in half)]
    axes = plots.front(rows, small, small[0], metric="accuracy").axes[0]
    labels = axes.get_legend_handles_labels()[1]
    families = ["half, in a box", "full, no box", "half, no box"]
    kinds = ["as trained", "4 bits", "ternary", "1 bit", "within a budget"]
    best = "recommended: full,\nstep size 0.1,\n900 B"
    assert labels == [*families, *kinds, best, "Pareto front"]
    lines = {line.get_label(): line for line in axes.lines}
    assert len({lines[name].get_color() for name in families}) == 3
    assert len({lines[name].get_marker() for name in kinds}) == 5
    # The line of a family goes along its best files, from the smallest on.
    x, y = lines["full, no box"].get_data()
    assert (list(x), list(y)) == ([0.875, 1.0], [0.9, 0.91])


def test_a_heat_map_has_each_number_in_its_cell_and_one_scale_for_all_widths():
    values = np.arange(12.0).reshape(2, 3, 2) / 100
    values[0, 0, 0] = np.nan
    figure = plots.heat_maps(values, [0.1, 0.2], [1, 2, np.inf], [None, 1], metric="accuracy")
    first, second = figure.axes
    assert [t.get_text() for t in second.texts] == ["0.01", "0.03", "0.05", "0.07", "0.09", "0.11"]
    assert second.texts[2].get_position() == (2, 0)
    assert first.texts[0].get_text() == "nan"
    assert [t.get_text() for t in first.get_xticklabels()] == ["1", "2", "inf"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0.01, 0.11)


def test_a_heat_map_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"values must be of shape \(1, 2, 1\), got \(2, 1, 1\)"):
        plots.heat_maps(np.zeros((2, 1, 1)), [0.1], [1, 2], [None], metric="accuracy")


def test_histograms_have_the_box_and_the_levels_where_there_are_any():
    weights = {"boxed": np.linspace(-0.5, 0.5, 101), "free": np.linspace(-2, 2, 11)}
    figure = plots.weight_histograms(
        weights, thresholds={"boxed": 0.5}, levels={"boxed": [-0.5, 0.0, 0.5]}
    )
    boxed, free = figure.axes
    at = sorted(float(line.get_xdata()[0]) for line in boxed.lines if len(line.get_xdata()))
    assert at == [-0.5, -0.5, 0.0, 0.5, 0.5]
    assert not free.lines
    assert sum(patch.get_height() for patch in free.patches) == pytest.approx(1)


def test_curves_are_means_over_seeds_within_a_band():
    figure = plots.training_curves(
        [1, 2], {"a": [[1.0, 0.5], [2.0, 1.5]], "b": [0.3, 0.2]}, clip_rates={"a": [0.0, 0.25]}
    )
    loss, rate = figure.axes
    assert list(loss.lines[0].get_ydata()) == [1.5, 1.0]
    assert list(rate.lines[0].get_ydata()) == [0.0, 25.0]
    assert loss.get_yscale() == "log"
    band = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.5, 2.0)


def test_curves_at_zero_or_below_are_not_on_a_logarithmic_scale():
    assert plots.training_curves([1], {"a": [0.0]}).axes[0].get_yscale() == "linear"


@pytest.mark.thorough
def test_new_pictures_are_saved(tmp_path):
    figures = {
        "front": lambda file: plots.front(ROWS, ROWS[:1], ROWS[0], file, metric="accuracy"),
        "map": lambda file: plots.heat_maps(np.ones((1, 1, 1)), [1], [1], [4], file, metric="a"),
        "weights": lambda file: plots.weight_histograms({"w": np.ones(3)}, file),
        "curves": lambda file: plots.training_curves([1, 2], {"a": [2.0, 1.0]}, file),
    }
    for name, draw in figures.items():
        draw(tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size > 3_000
