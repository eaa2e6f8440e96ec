"""Runs the notebooks of this folder, and writes each with its outputs beside its text.

    pip install -e ".[notebooks]" && python examples/notebooks/build.py [NAME ...]

The text, `NAME.py`, is the one to edit: cells in jupytext's percent format. `NAME.ipynb` is made.
"""

import pathlib
import sys
import tempfile

import jupytext
import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).parent
NAMES = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem != "build"]
_VOLATILE = ("jupytext", "language_info", "widgets")


def read(name: str) -> nbformat.NotebookNode:
    """Returns a notebook without outputs, whose cells have fixed ids."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        cell["metadata"] = {}
    notebook["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    return notebook


def run(name: str) -> nbformat.NotebookNode:
    """Returns a notebook with its outputs; raises if a cell does."""
    notebook = read(name)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    for cell in notebook.cells:
        cell["metadata"] = {}  # times of execution
        if cell.cell_type == "code":
            cell["outputs"] = _joined(cell.outputs)
    for key in _VOLATILE:
        notebook.metadata.pop(key, None)
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Returns outputs with printed text that arrived in pieces as one."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1]["text"] += output.text
        else:
            joined.append(output)
    return joined


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        nbformat.write(run(name), FOLDER / f"{name}.ipynb")
        print(name, f"{(FOLDER / f'{name}.ipynb').stat().st_size:,} bytes")
