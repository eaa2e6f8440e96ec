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
    code = "\n".join(code_blocks(page))
    if not code:
        return
    for module in re.findall(r"^(?:import|from) (\w+)", code, flags=re.M):
        pytest.importorskip(module)  # equinox and haiku are for developers
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    if page.name != "README.md":  # whose numbers have a test of their own
        printed = re.findall(r"^```\n\n```\n(.*?)^```", page.read_text(), flags=re.M | re.S)
        assert not [block for block in printed if block not in result.stdout], result.stdout


def run_python(code: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    # Under jax's defaults, as a user has them.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_readme_prints_what_its_first_example_prints(tmp_path: pathlib.Path):
    readme = (ROOT / "README.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", readme, re.S).groups()
    code += """
plain = jaxclip.compress(state.params, target_bytes=3500)
print(f"{accuracy(jaxclip.decompress(plain)):.1%}")
"""
    numbers = re.compile(r"([\d.]+)%; ([\d,]+) bytes: ([\d.]+)%")
    printed = run_python(code, tmp_path).stdout
    found, wanted = (
        [float(x.replace(",", "")) for x in numbers.search(text).groups()]
        for text in (printed, shown)
    )
    trained, size, kept = found
    assert [trained, kept] == pytest.approx([wanted[0], wanted[2]], abs=1)
    assert wanted[1] * 0.98 < size <= 3500
    assert kept > trained - 1, "the file loses less than a point"
    without = float(printed.splitlines()[-1].rstrip("%"))
    assert without == pytest.approx(95.1, abs=1)
    assert "Without `calibration=` it has 95.1 %" in readme
    header = 8 + int.from_bytes((tmp_path / "digits.safetensors").read_bytes()[:8], "little")
    assert header < size / 3


def test_the_readme_is_short_and_reaches_code_by_line_30():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines.index("```python") <= 30
    assert len(lines) <= 120


def test_every_subpackage_has_a_page_of_the_reference():
    wings = {path.parent.name for path in (ROOT / "jaxclip").glob("[a-z]*/__init__.py")} - {"cli"}
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")}
    assert pages.keys() - {"index"} == wings | {"plots"}
    for wing in wings:
        assert f"automodule:: jaxclip.{wing}\n   :members:\n   :imported-members:" in pages[wing]


@pytest.mark.parametrize("page", PAGES[3:], ids=lambda p: p.stem)
def test_a_page_of_the_docs_comes_to_the_point(page: pathlib.Path):
    text = page.read_text()
    if "```python" in text:
        # Two screens, with a line of a table as one of about four on the screen.
        before = text[: text.index("```python")].splitlines()
        assert sum(4 if line.startswith("|") else 1 for line in before) <= 70


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
