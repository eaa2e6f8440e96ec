"""Pictures: what they show, and what is said where matplotlib is missing."""

import sys

import pytest

from jaxclip import plots

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


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_saved(tmp_path, suffix):
    file = tmp_path / f"picture.{suffix}"
    plots.tradeoff(CURVES, file)
    assert file.stat().st_size > 5_000


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.ticker", None)
    with pytest.raises(ImportError, match=r"jaxclip\[examples\]"):
        plots.tradeoff(CURVES)
