"""The comparison's own parts, and its rows: what was run, and what the tables make of it."""

import contextlib
import importlib
import itertools
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip

FOLDER = pathlib.Path(jaxclip.__file__).parent.parent / "evidence"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the folder evidence is not here")


@contextlib.contextmanager
def lenient():
    """Promotions as in a user's program, which optax's schedules need; in all threads."""
    usual = {"jax_numpy_dtype_promotion": "standard", "jax_numpy_rank_promotion": "allow"}
    before = {name: getattr(jax.config, name) for name in usual}
    try:
        for name, value in usual.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("recipes", "tasks", "run", "report", "front", "why_boxes")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def rows(parts):
    return {name: parts["report"].read(name) for name in parts["tasks"].TASKS}


def names_of(parts):
    return {*parts["recipes"].RECIPES, "AdamW, NNCodec", "AdamW, narrower, NNCodec"}


def test_every_row_has_every_seed_and_its_file_is_within_the_budget(rows):
    assert rows["digits"]
    for task_rows in rows.values():
        num_seeds = {len(row[field]) for row in task_rows for field in ("test", "valid", "bytes")}
        assert len(num_seeds) <= 1
        for row in task_rows:
            # Grids' files are fitted with one seed, and may be a little larger with another.
            assert np.mean(row["bytes"]) <= 1.04 * row["budget"]


def test_no_two_recipes_have_the_same_scores(rows):
    for task_rows in rows.values():
        for a, b in itertools.combinations(task_rows, 2):
            if a["budget"] == b["budget"]:
                assert a["test"] != b["test"], (a["recipe"], b["recipe"])


def test_every_recipe_has_a_row_for_each_budget(parts, rows):
    for task_rows in rows.values():
        for name in {row["recipe"] for row in task_rows}:
            assert name in names_of(parts)
            budgets = [row["budget"] for row in task_rows if row["recipe"] == name]
            assert len(budgets) == len(set(budgets)) == 3


def test_the_page_has_the_tables_of_the_rows(parts, rows):
    page = (FOLDER.parent / "docs" / "evidence.md").read_text().splitlines()
    found = {
        name: (make(), rows[name]) for name, make in parts["tasks"].TASKS.items() if rows[name]
    }
    tables = [parts["report"].all_claims(found)]
    for task, task_rows in found.values():
        tables += [
            parts["report"].table(task, task_rows),
            parts["report"].claims_of(task, task_rows),
        ]
    missing = [line for table in tables for line in table.splitlines() if line not in page]
    assert not missing


@pytest.mark.weekly
def test_a_row_comes_out_of_the_committed_code(parts, rows):
    row = next(r for r in rows["digits"] if r["recipe"] == "AdamW")
    task = parts["tasks"].digits()
    bench = parts["run"].Bench(task, parts["recipes"].RECIPES["AdamW"], None)
    with lenient():
        found = bench.run(0, row["step_size"], row["knob"], [row["budget"]])[0]
    # Training amplifies the last bits, which differ between machines.
    assert found["whole_test"] == pytest.approx(row["whole_test"][0], abs=2)
    assert found["test"] == pytest.approx(row["test"][0], abs=2)
    assert found["bytes"] == pytest.approx(row["bytes"][0], rel=0.01)


def test_intervals_and_verdicts_are_those_of_students_t(parts):
    report = parts["report"]
    # 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t = 4.303 for two degrees of freedom.
    assert report.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.303 / 3**0.5), rel=1e-3)
    cases = [([3.0, 3.1, 3.2], "yes"), ([-3.0, -3.1, -3.2], "no"), ([1.0, 2.0, 3.0], "open")]
    for values, expected in cases:
        assert report.verdict(np.array(values)) == expected


def test_differences_are_paired_and_positive_where_the_first_is_better(parts):
    rows = [
        {"recipe": "a", "budget": 1, "test": [1.0, 2.0]},
        {"recipe": "b", "budget": 1, "test": [0.5, 2.5]},
    ]
    found = parts["report"].differences(rows, "a", "b", 1, True)
    np.testing.assert_array_equal(found, [0.5, -0.5])
    np.testing.assert_array_equal(
        parts["report"].differences(rows, "a", "b", 1, False), [-0.5, 0.5]
    )
    assert parts["report"].differences(rows, "a", "b", 2, True) is None


def test_means_of_other_seeds_are_apart_by_welchs_interval(parts):
    # Variances 1 and 4 of three: standard error sqrt(5 / 3), 2.94 degrees of freedom, t = 3.22.
    found = parts["report"].apart([1.0, 2.0, 3.0], [0.0, 2.0, 4.0])
    assert found == pytest.approx((0, 3.22 * (5 / 3) ** 0.5), abs=0.01)


@pytest.mark.weekly
def test_the_search_of_files_reports_what_it_recommends(parts, monkeypatch, capsys, tmp_path):
    front, short = parts["front"], parts["tasks"].digits()._replace(num_steps=60, budgets=(5200,))
    monkeypatch.setitem(front.TASKS, "digits", lambda: short)
    monkeypatch.setattr(front, "WIDTHS", (0.25,))
    picture = tmp_path / "front.png"
    monkeypatch.setattr(
        sys, "argv", ["front.py", "--task", "digits", "--seeds", "2", "--picture", str(picture)]
    )
    with lenient():
        front.main()
    printed = capsys.readouterr().out
    for budget in short.budgets:
        part = printed.split(f"{budget:,} bytes: ")[1].split("bytes: ")[0]
        assert "of the width, weight decay" in part
        assert f"files of at most {budget:,} bytes it has the best valid" in part
    sizes = re.findall(r"largest file ([\d,]+) bytes", printed)
    for size, budget in zip(sizes, short.budgets, strict=True):
        assert int(size.replace(",", "")) <= budget
    assert printed.count("(the same recipe)") == 1
    assert picture.stat().st_size > 5000


def test_every_claim_and_every_curve_is_about_known_recipes(parts):
    known = names_of(parts)
    assert {name for pair in parts["report"].CLAIMS.values() for name in pair} <= known
    assert set(parts["report"].SHOWN) <= known


def test_decay_of_the_reciprocal_of_the_box_holds_weights_in_it(parts):
    tx = parts["recipes"].lion_in_a_soft_box(0.01, 0.5, 2000)
    params = {"kernel": jnp.full((8, 3), 0.05), "bias": jnp.zeros(3)}
    grads = jax.tree.map(lambda w: -jnp.ones_like(w), params)  # push as hard as they can
    with lenient():
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(150):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    bound = 0.5 * (2 / 8) ** 0.5
    assert 0.9 * bound < params["kernel"].max() <= bound
    assert params["bias"].max() > bound  # free


def test_a_kurtosis_of_uniform_weights_costs_nothing(parts):
    w = jnp.linspace(-1, 1, 10_001)[:, None]
    assert parts["recipes"].kurtosis({"w": w, "b": jnp.ones(2)}, 1.0) < 1e-6
    assert parts["recipes"].ranges({"w": 3 * w, "b": jnp.full(2, 9.0)}, 0.5) == 1.5


def test_weights_on_the_two_ends_of_a_box_have_kurtosis_1_and_those_of_a_uniform_one_1_8(parts):
    unit = (2 / 18) ** 0.5  # of 3 * 3 * 2 inputs
    ends = np.where(np.arange(18 * 4) % 2, unit, -unit).reshape(3, 3, 2, 4)
    found = parts["why_boxes"].of_weights(ends)
    assert found == pytest.approx({"deviation": 1, "largest": 1, "kurtosis": 1, "at bound": 1})
    uniform = np.linspace(-1, 1, 20_002).reshape(2, -1)
    found = parts["why_boxes"].of_weights(uniform)
    assert found["kurtosis"] == pytest.approx(1.8, abs=1e-3)
    assert found["at bound"] == pytest.approx(0.01, abs=1e-4)


def test_the_error_of_a_net_is_that_of_its_rounded_layer(parts):
    task = parts["tasks"].digits()
    params = task.init(jax.random.key(0))
    inputs = task.data_of(0).test[0][:50]
    layer = {"kernel": params["dense_2"]["kernel"] * 0.9, "bias": params["dense_2"]["bias"]}
    loaded = params | {"dense_2": layer}
    with lenient():
        found = parts["why_boxes"].errors_by_leaf(task, params, loaded, inputs)
    # The last layer is linear and its bias 0: outputs are .9 of what they were.
    assert found == pytest.approx({"dense_0": 0, "dense_1": 0, "dense_2": 0.01, "net": 0.01})


@pytest.mark.thorough
def test_a_convolution_by_slices_is_a_convolution(parts):
    task = parts["tasks"]
    params = task.convolutions_init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (3, 784))
    x = images.reshape(3, 28, 28, 1)
    with lenient():
        for i in range(2):
            layer = params[f"layer_{i}"]
            x = jax.lax.conv_general_dilated(
                x,
                layer["kernel"],
                (2, 2),
                ((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x + layer["bias"])
        hidden = jax.nn.relu(x.reshape(3, -1) @ params["layer_2"]["kernel"])
        expected = hidden @ params["layer_3"]["kernel"]
        found = task.convolutions(params, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_results_are_whole_lines_of_json():
    for file in (FOLDER / "results").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            assert json.loads(line)["recipe"]


@pytest.mark.parametrize("budget", [3000, 5000, 12_000])
def test_the_width_is_the_largest_whose_file_is_within_the_budget(parts, monkeypatch, budget):
    task = parts["tasks"].digits()
    bench = parts["run"].Bench(task, parts["recipes"].RECIPES["AdamW on a grid"], 0.1)
    size = lambda width: round(700 + 0.21 * bench.size(width))  # noqa: E731
    monkeypatch.setattr(bench, "train", lambda seed, step, knob, width: (width, None, 0.0))
    monkeypatch.setattr(bench, "file", lambda width, *_: (None, size(width)))
    knob, width = bench.fitted(1e-3, jaxclip.Grid("ternary"), budget)
    assert knob == jaxclip.Grid("ternary")
    assert size(width) <= budget < size(width + 2 / 64) or size(width) >= 0.95 * budget
    with pytest.raises(ValueError, match="600 bytes are out of reach"):
        bench.fitted(1e-3, jaxclip.Grid("ternary"), 600)
