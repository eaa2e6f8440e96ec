"""HTML for notebooks: what is shown, and that no text gets out of its place."""

import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip._core.html import html_report, html_table, number_text, svg_bars, svg_line

EVIL = "</td><script>alert('\x1b')</script>&\"'\n"


def parsed(text: str) -> ET.Element:
    return ET.fromstring(text)


def test_text_is_shown_and_never_part_of_the_page():
    page = html_report(EVIL, html_table([["a"], [EVIL]]), svg_bars(np.ones(2), EVIL))
    root = parsed(page)
    tags = {"div", "b", "table", "tr", "th", "td", "svg", "path", "br"}
    assert {node.tag for node in root.iter()} == tags
    shown = EVIL.replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert root.find("b").text == root.findall(".//td")[0].text == shown
    assert root.find(".//svg").get("aria-label") == shown


def test_a_long_table_is_cut_and_says_so():
    page = parsed(f"<div>{html_table([['name'], *([str(i)] for i in range(1000))])}</div>")
    assert [node.text for node in page.findall(".//td")] == [str(i) for i in range(200)]
    assert page.find("div").text.startswith("800 more rows")


def test_bars_are_as_high_as_the_counts():
    path = parsed(svg_bars(np.array([0, 1, 500, 1000]), "")).find(".//path").get("d")
    heights = [int(bar.split("v-")[1].split("h")[0]) for bar in path.split("z")[:-1]]
    assert heights == [1, 24, 48]  # nothing for 0, and a pixel at least


@pytest.mark.parametrize("values", [[], [np.nan], [1.0], [2.0, 2.0], [1e308, -1e308, np.inf]])
def test_a_line_of_any_values_is_drawn(values):
    points = parsed(svg_line(np.array(values), "")).find(".//polyline").get("points").split()
    assert len(points) == np.isfinite(values).sum()
    assert all(0 <= float(y) <= 48 for y in (point.split(",")[1] for point in points))


def test_a_line_falls_where_the_values_do():
    points = parsed(svg_line(np.linspace(1, 0, 10_000), "")).find(".//polyline").get("points")
    xy = np.array([point.split(",") for point in points.split()], float)
    assert len(xy) == 320
    assert (np.diff(xy, axis=0) >= 0).all()  # y counts downwards
    assert xy[-1].tolist() == [320, 47]


def test_a_number_is_a_number_and_an_array_its_shape_and_range():
    assert number_text(0.123456) == number_text(jnp.float32(0.123456)) == "0.1235"
    assert number_text(jnp.int32(7)) == "7"
    assert number_text(jnp.array([1.0, -2.0])) == "float32[2], -2 to 1"
    assert number_text(np.zeros((0, 3), np.float32)) == "float32[0,3]"
    assert jax.eval_shape(lambda x: seen.append(number_text(x)), jnp.ones(3)) is None
    assert seen == ["float32[3]"]


seen: list[str] = []
