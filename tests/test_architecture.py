"""The house's plan: rooms in order, `__all__` that tells the truth, a light import."""

import ast
import importlib
import pathlib
import subprocess
import sys
import types

import pytest

import jaxclip
from jaxclip import _names

PACKAGE = pathlib.Path(jaxclip.__file__).parent
ROOMS = [
    "_checks",
    "rescaling",
    "norms",
    "grids",
    "block_sums",
    "scales",
    "affine_scales",
    "optimal_scales",
    "thresholds",
    "threshold_rules",
    "layer_rules",
    "tree_rules",
    "landing",
    "rates",
    "sign_kinds",
    "sign",
    "sign_optimizers",
    "voting",
    "rounding",
    "gradients",
    "units",
    "history",
    "smoothing",
    "spectra",
    "adaptive",
    "spikes",
    "guards",
    "feedback",
    "projections",
    "boxes",
    "weights",
    "constraints",
    "telemetry",
    "packing",
    "scale_formats",
    "quantization",
    "rate_rounding",
    "fidelity",
    "straight_through",
    "coding",
    "layout",
    "headers",
    "sizes",
    "allocation",
    "policies",
    "targets",
    "compression",
    "low_bit_training",
    "archives",
    "folders",
    "sources",
    "matching",
    "file_reports",
    "progress",
    "atomic",
    "writing",
    "leaf_parts",
    "conversion",
    "checkpoints",
    "training",
    "stopping",
    "run_store",
    "fitting",
    "plots",
    "sweep_tasks",
    "sweep_programs",
    "sweep_chunks",
    "sweep_results",
    "sweeps",
    "studies",
    "links",
    "probes",
    "lost_steps",
    "lint",
    "inspection",
    "exports",
    "gguf_blocks",
    "gguf_files",
    "pack_quantized",
    "interop",
    "cli",
]
every_room = pytest.mark.parametrize("room", ROOMS)


def imported_rooms(room: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "jaxclip":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxclip."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("jaxclip.")}
    return found


def test_every_file_is_a_room_with_a_place_in_the_order():
    assert {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "__main__", "_names"} == set(ROOMS)
    assert not [p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"]


@every_room
def test_a_room_imports_only_from_rooms_above_it(room: str):
    assert imported_rooms(room) <= set(ROOMS[: ROOMS.index(room)])


@every_room
def test_all_is_the_public_names_of_the_room(room: str):
    module = importlib.import_module(f"jaxclip.{room}")
    if room == "_checks":
        return
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    defined = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    public = {name for name in defined if not name.startswith("_")}
    assert public == set(module.__all__)
    assert module.__all__ == sorted(module.__all__)


def test_all_of_the_root_is_its_public_names():
    modules = set(ROOMS) - {"checkpoints", "interop", "plots"}
    public = {n for n in vars(_names) if not n.startswith("_")} - modules
    assert public == set(jaxclip.__all__)
    assert set(dir(jaxclip)) >= public
    assert all(getattr(jaxclip, name) is getattr(_names, name) for name in public)
    assert isinstance(jaxclip.checkpoints, types.ModuleType)
    assert not hasattr(jaxclip, "no_such_name")


def test_names_of_the_root_are_imported_on_use_and_the_help_of_commands_needs_no_jax():
    for words in ("--help", "inspect --help", "compress --help"):
        script = (
            "import sys; from jaxclip.cli import main\n"
            f"try: main({words.split()!r})\n"
            "except SystemExit as end: assert not end.code\n"
            "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "usage: jaxclip" in result.stdout


@every_room
def test_no_public_function_is_named_as_its_room(room: str):
    module = importlib.import_module(f"jaxclip.{room}")
    assert room not in getattr(module, "__all__", [])


@every_room
def test_public_functions_are_documented_with_an_example(room: str):
    module = importlib.import_module(f"jaxclip.{room}")
    for name in getattr(module, "__all__", []):
        member = getattr(module, name)
        if isinstance(member, types.FunctionType):
            assert member.__doc__, name
            assert "Example" in member.__doc__, name
            takes_arguments = bool(member.__code__.co_argcount or member.__code__.co_kwonlyargcount)
            assert "Args:" in member.__doc__ or not takes_arguments, name


def test_importing_jaxclip_imports_only_jax_optax_and_numpy():
    script = (
        "import sys, jax, optax, numpy; before = set(sys.modules);"
        "import jaxclip; jaxclip.lion; print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    new = set(result.stdout.split()) - {"jaxclip", "jax", "optax", "numpy"}
    assert new <= set(sys.stdlib_module_names)
