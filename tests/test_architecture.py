"""The house's plan: rooms in order, `__all__` that tells the truth, a light import."""

import pathlib
import subprocess
import sys
import types

import jaxclip
from jaxclip import _names

PACKAGE = pathlib.Path(jaxclip.__file__).parent


def test_all_of_the_root_is_its_public_names():
    public = set(_names.__all__)
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


def test_importing_jaxclip_imports_only_jax_optax_and_numpy():
    script = (
        "import sys, jax, optax, numpy; before = set(sys.modules);"
        "import jaxclip; jaxclip.lion; print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    new = set(result.stdout.split()) - {"jaxclip", "jax", "optax", "numpy"}
    assert new <= set(sys.stdlib_module_names)
