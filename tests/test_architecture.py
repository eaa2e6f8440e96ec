"""Architecture: imports run one way, `__init__` files list public names, the root is light."""

import ast
import pathlib
import re
import subprocess
import sys
import types

import pytest

import jaxclip

PACKAGE = pathlib.Path(jaxclip.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [
    {"_core"},
    {"norms"},
    {"thresholds"},
    {"gradients", "sign", "weights", "lowbit", "sparsity"},
    {"checkpoints", "calibration", "training", "plots"},
    {"interop", "sweeps"},
    {"cli", "_names"},
]
SIBLINGS = {("sparsity", "lowbit")}
FLOOR_OF = {wing: level for level, wings in enumerate(FLOORS) for wing in wings}
WINGS = [p.parent.name for p in PACKAGE.glob("[a-z]*/__init__.py") if p.parent.name != "cli"]


def imports_of(path: pathlib.Path) -> set[str]:
    """Modules of the package that a file imports; a name counts as a module of its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("jaxclip.")}


def public_functions(wing: str) -> list[types.FunctionType]:
    members = vars(getattr(jaxclip, wing)).values()
    return [m for m in members if isinstance(m, types.FunctionType)]


def test_wings_import_one_way():
    for path in FILES:
        wing = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports_of(path) if wing in FLOOR_OF else ():
            other = name.split(".")[1]
            is_allowed = other == wing or (wing, other) in SIBLINGS
            assert is_allowed or FLOOR_OF[other] < FLOOR_OF[wing], f"{path} imports {name}"


def test_no_import_circle_in_a_wing():
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in FILES}
    unseen = {
        m: {n.rpartition(".")[0] for n in imports_of(p)} & modules.keys()
        for m, p in modules.items()
    }
    while leaves := {m for m, needed in unseen.items() if not needed & unseen.keys()}:
        unseen = {m: needed for m, needed in unseen.items() if m not in leaves}
    assert not unseen


def test_nothing_private_of_jax_or_optax_is_touched():
    private = (
        r"\b(jax|jaxlib|optax|flax)\.[\w.]*\b_(?!_)\w|trace_state|trace_ctx|closure__|closurevars"
    )
    assert not [f"{p}: {m[0]}" for p in FILES if (m := re.search(private, p.read_text()))]


def test_a_face_holds_only_its_docstring_and_what_it_names():
    for wing in WINGS:
        body = ast.parse((PACKAGE / wing / "__init__.py").read_text()).body
        assert all(a.name == a.asname for node in body[1:] for a in node.names), wing
        places = (f"jaxclip.{wing}.", "jaxclip._core.")
        assert all(node.module.startswith(places) for node in body[1:]), wing
    assert "__all__" not in "".join(p.read_text() for p in FILES if p.parent != PACKAGE)


def test_the_root_shows_its_names_and_imports_them_on_use():
    public = set(jaxclip.__all__)
    typed = re.findall(
        r"^    from jaxclip import (\w+) as", (PACKAGE / "__init__.py").read_text(), re.M
    )
    assert {*WINGS, "plots"} - {"_core"} == set(typed) < public  # to type checkers, too
    assert {name for name in dir(jaxclip) if not name.startswith("_")} - {"cli"} == public
    assert all(hasattr(jaxclip, name) for name in public)
    assert not hasattr(jaxclip, "no_such_name")
    names: dict = {}
    exec("from jaxclip import *", names)
    assert set(names) - {"__builtins__"} == public


def test_the_help_of_commands_needs_neither_jax_nor_numpy():
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


@pytest.mark.parametrize("wing", WINGS)
def test_public_functions_are_documented_with_an_example(wing: str):
    for function in public_functions(wing):
        assert "Example" in (function.__doc__ or ""), function
        takes_arguments = function.__code__.co_argcount or function.__code__.co_kwonlyargcount
        assert "Args:" in function.__doc__ or not takes_arguments, function


def test_no_docstring_asks_a_question():
    asking = r'"""(What|Whether|How)\b'
    assert not [f"{p}: {m[0]}" for p in FILES if (m := re.search(asking, p.read_text()))]


def test_importing_jaxclip_imports_only_jax_optax_and_numpy():
    script = (
        "import sys, jax, optax, numpy; before = set(sys.modules);"
        "import jaxclip; jaxclip.lion; print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    new = set(result.stdout.split()) - {"jaxclip", "jax", "optax", "numpy"}
    assert new <= set(sys.stdlib_module_names)
