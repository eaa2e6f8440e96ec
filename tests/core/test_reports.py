"""Tables line up, and every report becomes JSON that any reader takes."""

import dataclasses
import io
import json
import sys
from typing import Any

import numpy as np
import pytest

from jaxclip._core import extras
from jaxclip._core.reports import format_table, to_json
from jaxclip._core.text import encodable


def test_columns_of_a_table_line_up_and_no_line_ends_in_spaces():
    rows = [["leaf", "bits", "note"], ["layer/w", "4", ""], ["b", "12", "rare"]]
    assert format_table(rows).splitlines() == [
        "leaf     bits  note",
        "layer/w     4",
        "b          12  rare",
    ]
    assert format_table(rows, num_left=0).splitlines()[2] == "      b    12  rare"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_columns_line_up_after_wide_combined_and_escaped_characters(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    names = ["plain", "red \x1b[31m", "重み", "e\u0301te\u0301", "größe", "\U0001f600"]
    lines = format_table([[name, "4"] for name in names]).splitlines()
    in_terminal = [encodable(line, encoding) for line in lines]
    assert in_terminal == lines  # nothing that is printed is replaced any more
    # "W" and "F" are the wide characters of Unicode; marks are drawn over the one before.
    marks, wide = "\u0301", "重み\U0001f600"
    columns = [len(x) - sum(map(x.count, marks)) + sum(map(x.count, wide)) for x in lines]
    assert len(set(columns)) == 1


@dataclasses.dataclass
class Report:
    shape: tuple[int, ...]
    errors: dict[Any, float]
    counts: np.ndarray


def test_a_report_becomes_json_with_names_for_the_numbers_that_json_lacks():
    report = Report((2, 3), {4: 0.5, "ternary": float("inf")}, np.array([1.0, np.nan]))
    text = json.dumps(to_json([report, None]), allow_nan=False)
    errors = {"4": 0.5, "ternary": "inf"}
    assert json.loads(text) == [{"shape": [2, 3], "errors": errors, "counts": [1.0, "nan"]}, None]


def test_a_bar_that_is_not_wanted_takes_progress_and_shows_nothing(capsys):
    with extras.progress_bar(10, False, is_in_bytes=True) as advance:
        advance(10)
    assert extras.rich_progress(False) is None
    assert capsys.readouterr().out == ""
