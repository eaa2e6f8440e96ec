"""Notebooks have the cells of their text, run from top to bottom, and show what they should."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem != "build"]
SCRIPT = """
import json, sys
import build
print(json.dumps(getattr(build, sys.argv[1])(sys.argv[2])))
"""


def made(function: str, name: str) -> dict:
    """The notebook that a function of `build.py` makes, in a process of its own."""
    pytest.importorskip("jupytext")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), environment.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, function, name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def saved(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def text_of(cell: dict) -> tuple[str, str]:
    return cell["cell_type"], "".join(cell["source"])


def kinds(notebook: dict) -> list[list[str]]:
    """What each cell shows: kinds of output, and the kinds of data in it."""
    cells = [cell.get("outputs", []) for cell in notebook["cells"]]
    return [
        [o["output_type"] + "/" + ",".join(sorted(o.get("data", []))) for o in c] for c in cells
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_cells_of_its_text_and_small_outputs(name):
    notebook = saved(name)
    assert [*map(text_of, notebook["cells"])] == [*map(text_of, made("read", name)["cells"])]
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000
    ran = [c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code"]
    assert ran == [*range(1, len(ran) + 1)]
    install = notebook["cells"][1]
    assert "jax_version" in "".join(install["source"])
    assert not install["outputs"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_a_fresh_kernel_and_shows_what_the_saved_one_does(name):
    notebook = made("run", name)
    assert kinds(notebook) == kinds(saved(name))
    shown = str(kinds(notebook))
    assert "text/html" in shown
    assert "image/png" in shown or name == "your_model"
