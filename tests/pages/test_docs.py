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
    [pytest.param(p, marks=pytest.mark.thorough) for p in PAGES],
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


def test_the_readme_prints_what_its_first_example_prints(tmp_path: pathlib.Path):
    readme = (ROOT / "README.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", readme, re.S).groups()
    numbers = re.compile(r"([\d.]+)%, .* ([\d,]+) bytes ([\d.]+)%")
    printed = run_python(code, tmp_path).stdout
    expected = [[float(x.replace(",", "")) for x in row] for row in numbers.findall(shown)]
    found = [[float(x.replace(",", "")) for x in row] for row in numbers.findall(printed)]
    assert len(found) == len(expected) == 2, printed
    for (trained, size, kept), wanted in zip(found, expected, strict=True):
        assert [trained, kept] == pytest.approx([wanted[0], wanted[2]], abs=1.5)
        assert size == pytest.approx(wanted[1], rel=0.03)
    rounded_later, on_grid = found
    assert on_grid[0] == on_grid[2], "the file loses nothing"
    assert on_grid[0] > rounded_later[2] + 1, "rounding after training does"
    header = 8 + int.from_bytes((tmp_path / "digits.safetensors").read_bytes()[:8], "little")
    assert header < on_grid[1] / 5


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


@pytest.mark.thorough
def test_the_version_is_in_one_place():
    pattern = re.compile(re.escape(f'"{jaxclip.__version__}"'))
    files = [*ROOT.glob("*.toml"), *(ROOT / "jaxclip").glob("*.py")]
    assert [f.name for f in files if pattern.search(f.read_text())] == ["__init__.py"]
