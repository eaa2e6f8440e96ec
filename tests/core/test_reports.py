"""Tables line up, and every report becomes JSON that any reader takes."""

import dataclasses
import json
from typing import Any

import numpy as np

from jaxclip._core import extras
from jaxclip._core.reports import format_table, to_json


def test_columns_of_a_table_line_up_and_no_line_ends_in_spaces():
    rows = [["leaf", "bits", "note"], ["layer/w", "4", ""], ["b", "12", "rare"]]
    assert format_table(rows).splitlines() == [
        "leaf     bits  note",
        "layer/w     4",
        "b          12  rare",
    ]
    assert format_table(rows, num_left=0).splitlines()[2] == "      b    12  rare"


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
