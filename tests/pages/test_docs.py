"""What the README and the docs say is run, and their links lead somewhere."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import jaxclip

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def code_blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.thorough] * (p.name != "README.md")) for p in PAGES],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_python_blocks_of_a_page_run_in_order(page: pathlib.Path, tmp_path: pathlib.Path):
    blocks = code_blocks(page)
    if not blocks:
        return
    result = run_python("\n".join(blocks), tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def run_python(code: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    # Under jax's defaults, as a user has them.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_readme_reaches_code_by_line_30():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") <= 30


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository_lead_to_files(page: pathlib.Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_changelog_has_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{jaxclip.__version__}]" in changelog


def test_the_version_is_in_one_place():
    pattern = re.compile(re.escape(f'"{jaxclip.__version__}"'))
    files = [*ROOT.glob("*.toml"), *(ROOT / "jaxclip").glob("*.py")]
    assert [f.name for f in files if pattern.search(f.read_text())] == ["__init__.py"]
