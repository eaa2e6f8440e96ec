"""Fronts against brute force, recommendations against a table made by hand."""

import csv
import dataclasses
import io
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import jaxclip
from jaxclip.sweeps.results import SweepResult
from jaxclip.sweeps.table import SweepRow, pareto_front

VALUES = st.sampled_from([0.0, 1.0, 2.0, 3.0, -1.5, math.inf, -math.inf, math.nan])


@given(
    st.tuples(st.integers(0, 12), st.integers(1, 4)).flatmap(
        lambda shape: npst.arrays(np.float64, shape, elements=VALUES)
    )
)
def test_the_front_is_that_of_brute_force(costs):
    def beats(a, b):
        return (a <= b).all() and (a < b).any()  # never true with a NaN in a or b

    expected = [
        not np.isnan(point).any() and not any(beats(other, point) for other in costs)
        for point in costs
    ]
    assert pareto_front(costs).tolist() == expected


def test_a_front_of_many_points_is_that_of_brute_force():
    costs = np.random.default_rng(0).normal(size=(400, 3)).round(1)
    less = (costs[:, None] <= costs).all(-1) & (costs[:, None] < costs).any(-1)
    np.testing.assert_array_equal(pareto_front(costs), ~less.any(axis=0))


@pytest.mark.parametrize("shape", [(3,), (3, 0), (2, 2, 2)])
def test_costs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="costs must be of shape"):
        pareto_front(np.zeros(shape))


def made(metric=None, **changes):
    """Two step sizes, two thresholds, two seeds, three widths of 400, 100 and 50 bytes."""
    accuracy = np.zeros((2, 2, 2, 3))
    #            as it is    4 bits       1 bit   (mean of the seeds)
    means = [[[0.90, 0.895, 0.70], [0.91, 0.905, 0.89]], [[0.80, 0.80, 0.80], [0.9, 0.9, 0.9]]]
    accuracy[:, :, 0], accuracy[:, :, 1] = np.asarray(means) - 0.01, np.asarray(means) + 0.01
    diverged = np.zeros((2, 2, 2), bool)
    diverged[1, 1, 0] = True
    fields = {
        "step_sizes": np.asarray([0.1, 0.01]),
        "thresholds": np.asarray([1.0, np.inf]),
        "seeds": np.asarray([0, 1]),
        "bits": (None, 4, 1),
        "metrics": {"test": accuracy if metric is None else metric, "train": accuracy + 0.02},
        "file_bytes": np.broadcast_to([400.0, 100.0, 50.0], (2, 2, 2, 3)),
        "loss": np.full((2, 2, 2), 0.3),
        "weight_clip_rate": np.full((2, 2, 2), 0.25),
        "is_diverged": diverged,
        "steps": np.full((2, 2, 2), 7),
        "reason_codes": np.ones((2, 2, 2), np.int64),
        "seconds_per_step": np.full((2, 2), 0.001),
        "recorded_at": np.asarray([7]),
        "history": {"loss": np.full((2, 2, 2, 1), np.nan)},
        "metric": "test",
        "train_metric": "train",
        "mode": "max",
    }
    return SweepResult(**(fields | changes))


def chosen(row):
    return row.step_size, row.threshold, row.bits


def test_rows_are_means_over_seeds_with_their_standard_error_and_gap():
    rows = made().rows()
    assert len(rows) == 12
    row = rows[1]
    assert chosen(row) == (0.1, 1.0, 4)
    np.testing.assert_allclose(
        [row.metric, row.standard_error, row.gap, row.file_bytes, row.weight_clip_rate],
        [0.895, 0.01, 0.02, 100, 0.25],
        rtol=1e-12,
    )
    assert [r.num_diverged for r in rows] == [0] * 9 + [1] * 3


def test_the_front_has_the_rows_that_no_other_beats_without_diverged_ones():
    assert [chosen(row) for row in made().pareto()] == [
        (0.1, math.inf, 1),
        (0.1, math.inf, 4),
        (0.1, math.inf, None),
    ]


@pytest.mark.parametrize(
    ("max_loss", "bits"), [(0.0, None), (0.004, None), (0.006, 4), (0.021, 1), (1.0, 1)]
)
def test_the_recommendation_is_the_smallest_file_within_the_loss(max_loss, bits):
    row = made().recommend(max_loss)
    assert chosen(row) == (0.1, math.inf, bits)
    assert row == made().recommend(max_loss)


@pytest.mark.parametrize(
    ("max_bytes", "max_loss", "expected"),
    [
        (400, None, (0.1, math.inf, None)),
        (399, None, (0.1, math.inf, 4)),
        (100, 0.016, (0.1, math.inf, 1)),
        (99, None, (0.1, math.inf, 1)),
    ],
)
def test_within_bytes_the_best_is_recommended(max_bytes, max_loss, expected):
    row = made().recommend(max_loss, max_bytes=max_bytes)
    assert chosen(row) == expected
    assert row.file_bytes <= max_bytes


def test_a_file_must_be_within_the_bytes_for_every_seed():
    sizes = np.broadcast_to([400.0, 100.0, 50.0], (2, 2, 2, 3)).copy()
    sizes[0, 1, 1, 1] = 101  # on average 100.5
    sizes[0, 1, 0, 1] = 98
    assert chosen(made(file_bytes=sizes).recommend(max_bytes=100)) == (0.1, 1.0, 4)


def test_a_recommendation_says_why():
    assert made().recommend(max_bytes=100).reason == (
        "Of 6 files of at most 100 bytes it has the best test, 0.905."
    )
    assert made().recommend(0.021).reason == (
        "Of 9 files it is the smallest of 5 whose test is within 0.021 of the best, 0.91."
    )


def test_bytes_below_all_files_are_refused_with_the_least():
    with pytest.raises(ValueError, match=r"max_bytes=49 is out of reach: .* is 50 bytes"):
        made().recommend(max_bytes=49)


def test_metrics_that_are_a_loss_apart_in_float32_are_within_it():
    for hundredths in range(2, 100):
        pair = np.asarray([hundredths, hundredths - 1], np.float32) / np.float32(100)
        metric = np.broadcast_to(np.append(pair, 0.0).astype(np.float64), (2, 2, 2, 3))
        assert made(metric).recommend(0.01).bits == 4, hundredths
        assert made(metric).recommend(0.00999).bits is None


def test_of_files_of_one_size_the_better_one_is_recommended():
    assert made().recommend(0.5).metric == pytest.approx(0.89)  # not .70, nor .80


def test_a_smaller_metric_can_be_better():
    result = made(mode="min")
    assert result.recommend(0).metric == pytest.approx(0.70)
    assert result.rows()[0].gap == pytest.approx(-0.02)
    assert [row.metric for row in result.pareto()] == pytest.approx([0.70])


def test_nothing_is_recommended_where_all_diverged():
    result = made(is_diverged=np.ones((2, 2, 2), bool))
    assert result.pareto() == []
    with pytest.raises(ValueError, match="each setting has a diverged seed"):
        result.recommend()


def test_a_metric_that_is_nan_everywhere_is_not_called_divergence():
    result = made(np.full((2, 2, 2, 3), np.nan), is_diverged=np.zeros((2, 2, 2), bool))
    with pytest.raises(ValueError, match="'test' is NaN in each row without a diverged seed"):
        result.recommend()


@pytest.mark.parametrize("max_loss", [-0.1, math.nan])
def test_a_negative_or_nan_loss_is_refused(max_loss):
    with pytest.raises(ValueError, match="max_loss must be at least 0"):
        made().recommend(max_loss)


def test_one_seed_has_no_standard_error():
    fields = {f.name: getattr(made(), f.name) for f in dataclasses.fields(SweepResult)}
    for name in ("metrics", "history"):
        fields[name] = {k: x[:, :, :1] for k, x in fields[name].items()}
    for name in ("file_bytes", "loss", "weight_clip_rate", "is_diverged", "steps", "reason_codes"):
        fields[name] = fields[name][:, :, :1]
    result = SweepResult(**fields | {"seeds": np.asarray([3])})
    assert all(math.isnan(row.standard_error) for row in result.rows())
    assert "nan" not in result.table()


def test_json_gives_back_every_field_to_the_bit(tmp_path):
    metric = np.random.default_rng(0).normal(size=(2, 2, 2, 3))
    metric[0, 0, 0] = [np.nan, np.inf, -np.inf]
    before = made(metric)
    text = before.to_json(tmp_path / "sweep.json")
    assert (tmp_path / "sweep.json").read_text() == text
    json.loads(text, parse_constant=pytest.fail)  # no NaN that JSON does not have
    after = SweepResult.from_json(text)
    for field in dataclasses.fields(SweepResult):
        a, b = getattr(before, field.name), getattr(after, field.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
        for x, y in zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]:
            np.testing.assert_array_equal(x, y)
            assert getattr(x, "dtype", None) == getattr(y, "dtype", None)


@pytest.mark.parametrize("text", ["[]", "{}", '{"metric": "x"}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match=r"SweepResult\.to_json"):
        SweepResult.from_json(text)


def test_csv_has_a_line_for_each_row(tmp_path):
    result = made()
    text = result.to_csv(tmp_path / "sweep.csv")
    assert (tmp_path / "sweep.csv").read_text() == text
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == 12
    assert (*lines[0], "reason") == SweepRow._fields
    for line, row in zip(lines, result.rows(), strict=True):
        assert float(line["metric"]) == row.metric
        assert line["bits"] == ("" if row.bits is None else str(row.bits))


def test_the_table_shows_every_row_and_the_diverged_seeds():
    lines = str(made()).splitlines()
    assert len(lines) == 13
    assert [line for line in lines if line.rstrip().endswith("1/2")] == lines[10:]
    assert "as trained" in lines[1]


def test_the_table_leaves_out_what_was_not_compared():
    titles = str(made()).splitlines()[0]
    assert "threshold" in titles
    assert "on bound" in titles
    assert not any(word in titles for word in ("model", "decay", "density", "outranked"))
    free = str(made(thresholds=np.asarray([np.inf, np.inf]))).splitlines()[0]
    assert "threshold" not in free
    assert "on bound" not in free


def test_a_notebook_shows_the_table_with_the_front_in_bold():
    result = made()
    root = ET.fromstring(result._repr_html_())
    rows = list(root.iter("tr"))
    front = {row.setting for row in result.pareto()}
    bold = ["bold" in row[0].get("style") for row in rows[1:]]
    assert bold == [row.setting in front for row in result.rows()]
    assert 0 < sum(bold) < len(bold)
    cells = [" ".join(cell.text or "" for cell in row).split() for row in rows]
    assert cells == [line.split() for line in str(result).splitlines()]
    assert (
        repr(result) == "SweepResult(2 step sizes, 2 thresholds, 2 seeds, 3 widths, metric='test')"
    )
    assert root.find("b").text == repr(result)


def test_parameters_that_were_not_kept_are_not_given():
    with pytest.raises(ValueError, match="keep_params=True"):
        made().params_of(made().rows()[0])
    kept = made(params={"w": np.arange(8).reshape(2, 2, 2)})
    assert kept.params_of(kept.rows()[5])["w"].tolist() == [2, 3]


def test_the_names_are_public():
    assert jaxclip.sweeps.pareto_front is pareto_front
    assert jaxclip.sweeps.SweepResult is SweepResult
