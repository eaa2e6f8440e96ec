"""What a notebook shows of the package's objects, also while they are traced."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip import plots

WEIGHTS = jnp.linspace(-1, 1, 32).reshape(8, 4)


def html_of(value) -> ET.Element:
    return ET.fromstring(value._repr_html_())


def numbers(root: ET.Element) -> dict[str, str]:
    rows = ([cell.text for cell in row] for row in root.iter("tr"))
    return dict(row for row in rows if len(row) == 2)


# --- QuantizedArray -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, "ternary", 2, 8])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_low_bit_array_shows_its_size_and_how_often_each_code_is_used(bits, is_packed):
    q = jaxclip.quantize(WEIGHTS, bits)
    q, codes = q.packed() if is_packed else q, np.asarray(q.qvalue)
    text = f"QuantizedArray(shape=(8, 4), dtype=float32, bits={bits!r}, num_bytes={q.num_bytes})"
    root = html_of(q)
    assert repr(q) == str(q) == root.find("b").text == text
    bars = root.find(".//path").get("d").count("z")
    assert bars == len(np.unique(codes))
    most = np.unique(codes, return_counts=True)[1].max()
    assert root.find(".//svg").get("aria-label").endswith(f"at most {most}")


def test_a_low_bit_array_is_shown_while_it_is_traced_and_after_it_was_mapped():
    q, shown = jaxclip.quantize(WEIGHTS, 2), []

    def show(q):
        shown.extend((repr(q), q._repr_html_()))
        return q.scale

    jax.jit(show)(q)
    jax.vmap(show)(jax.tree.map(lambda x: jnp.stack([x, x]), q))
    jax.eval_shape(lambda q: show(q), q)
    assert shown == [repr(q), f"<div><b>{repr(q).replace('<', '&lt;')}</b></div>"] * 3
    assert "qvalue=None" in repr(jax.tree.map(lambda x: None, q))
    assert "shape=(2, 8, 4)" in repr(jax.tree.map(lambda x: jnp.stack([x, x]), q))
    assert "num_bytes=12" in html_of(jax.eval_shape(lambda: q)).find("b").text


# --- Reports --------------------------------------------------------------------------------


def test_a_size_report_is_a_table_whose_names_are_escaped():
    tree = {"<b>layer": WEIGHTS, "small": jaxclip.quantize(WEIGHTS, 4)}
    report = jaxclip.size_report(tree)
    root = html_of(report)
    cells = [[cell.text or "" for cell in row] for row in root.iter("tr")]
    assert [row[0] for row in cells] == ["leaf", "<b>layer", "small", "file header", "total"]
    printed = [line.split() for line in str(report).splitlines()]
    assert [[word for cell in row for word in cell.split()] for row in cells[:-1]] == printed[:-1]
    assert root.find("b").text.startswith(f"{report.total_bytes:,} bytes, ")
    assert (
        repr(report)
        == f"SizeReport(2 leaves, total_bytes={report.total_bytes}, bits_per_weight=5.00)"
    )


# --- Training -------------------------------------------------------------------------------


def loss_fn(params, x):
    return jnp.mean((x @ params["w"]) ** 2)


TX = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.lion(0.1))


def test_a_step_shows_its_numbers_also_inside_of_a_program_and_for_many():
    step = jaxclip.make_train_step(loss_fn, TX)
    state, x = jaxclip.TrainState.create({"w": WEIGHTS}, TX), jnp.ones((2, 8))
    shown = []
    jax.jit(lambda s: shown.append(html_of(step(s, x)[1])))(state)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    many = numbers(html_of(jax.vmap(step, (0, None))(states, x)[1]))
    info = step(state, x)[1]
    found = numbers(html_of(info))
    assert found["loss"] == f"{float(info.loss):.4g}"
    assert found["num_skipped"] == "0"
    assert found["clip_by_global_norm/pre_norm"] == f"{float(info.stats['pre_norm']):.4g}"
    assert len(numbers(shown[0])) == len(found)
    assert all(re.fullmatch(r"(int|float)32\[\]", text) for text in numbers(shown[0]).values())
    assert many["loss"].startswith("float32[2], ")


def test_a_run_shows_why_it_ended_and_its_last_metrics():
    step = jaxclip.make_train_step(loss_fn, TX)
    state = jaxclip.TrainState.create({"w": WEIGHTS}, TX)
    result = jaxclip.fit(step, state, [jnp.ones((2, 8))] * 5, stop=jaxclip.max_steps(3))
    root = html_of(result)
    found = numbers(root)
    assert found["steps"] == "3"
    assert found["why it ended"] == "The last step was taken."
    assert found["loss"] == f"{result.history['loss'][-1]:.4g}"
    assert len(root.find(".//polyline").get("points").split()) == 3
    assert repr(result).startswith("FitResult(step=3, ")
    assert repr(result).endswith("reason=MAX_STEPS)")


# --- Pictures -------------------------------------------------------------------------------


def test_a_figure_is_a_picture_without_pyplot_and_survives_pickling():
    script = (
        "import sys, pickle; from jaxclip import plots\n"
        "figure = plots.training_curves([1, 2], {'a': [1.0, 0.5]})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert figure._repr_png_().startswith(b'\\x89PNG')\n"
        "assert pickle.loads(pickle.dumps(figure)).axes[0].get_ylabel() == 'training loss'\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_ipython_shows_figures_as_pictures_and_reports_as_tables():
    formatters = pytest.importorskip("IPython.core.formatters")
    show = formatters.DisplayFormatter().format
    figure = plots.training_curves([1, 2], {"a": [1.0, 0.5]})
    assert show(figure)[0]["image/png"].startswith(b"\x89PNG")
    for value in (jaxclip.quantize(WEIGHTS, 4), jaxclip.size_report({"w": WEIGHTS})):
        data = show(value)[0]
        assert data["text/html"].startswith("<div>")
        assert data["text/plain"] == repr(value)


def test_treescope_shows_the_parts_of_a_low_bit_array():
    treescope = pytest.importorskip("treescope")
    text = treescope.render_to_text({"a": jaxclip.quantize(WEIGHTS, 2)})
    assert "qvalue=<jax.Array int8(8, 4)" in text
    assert "grid=Grid(bits=2" in text
