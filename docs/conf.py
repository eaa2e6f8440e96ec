"""How Sphinx builds the documentation site; nothing is fetched, and no snippet is run again.

    sphinx-build -W -n --keep-going docs build/site

The docstrings are Markdown with sections of Google's style. Sphinx reads reStructuredText, so
code spans get two backticks, formulas become literal blocks, and other marks are escaped.
"""

import functools
import re

import jaxclip

project = "jaxclip"
author = "the authors of jaxclip"
version = release = jaxclip.__version__
html_title = "jaxclip"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
root_doc = "index"

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
# Types of other packages, and private ones, have no page here.
nitpick_ignore_regex = [("py:.*", r".*")]

_SECTIONS = re.compile(r"(Args|Returns|Raises|Example|Examples|References|Attributes|Yields):$")
_SPAN = re.compile(r"(`[^`]+`)")


def to_restructured_text(app, what, name, obj, options, lines):
    """Rewrites a docstring in place, before napoleon reads its sections."""
    del app, what, name, obj, options
    result: list[str] = []
    section, is_code = "", False
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if not indent and (match := _SECTIONS.match(line)):
            section = match[1]
        elif not indent and text:
            section = section if section and result and result[-1].strip() else ""
        if text.startswith(">>>"):
            is_code = True
        elif not text or (not indent and not section and text[:1] != "|"):
            is_code = is_code and not text and not section
        starts_block = (indent or text.startswith("|")) and not section and not is_code and text
        if starts_block and (not result or not result[-1].strip()):
            result += ["::", ""]
            is_code = True
        if is_code and text.startswith("|"):
            line = "  " + line  # a table, which is shown as it is written
        result.append(line if is_code or section in ("Example", "Examples") else _escaped(line))
    lines[:] = result


def _escaped(line: str) -> str:
    """Returns a line of Markdown with code spans as literals and no other marks."""
    parts = _SPAN.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part[1:-1].strip()}``"
            follows = parts[i + 1][:1]
            parts[i] += "\\ " if follows.isalnum() else ""
        else:
            parts[i] = re.sub(r"([|*_\\])", r"\\\1", part)
    return "".join(parts)


def skip_member(app, what, name, obj, skip, options):
    """Leaves out the fields of NamedTuples, which the section Attributes describes."""
    del app, what, name, options
    is_field = type(obj).__name__ == "_tuplegetter" or isinstance(obj, functools.cached_property)
    return True if is_field else skip


# Pages beside the folder docs, and where the site has them.
_MOVED = {"../benchmarks/README.md": "project/benchmarks.md"}


def move_links(app, docname, source):
    """Turns links to pages outside of the folder into links within the site."""
    del app, docname
    for old, new in _MOVED.items():
        source[0] = source[0].replace(f"]({old}", f"]({new}")


def setup(app):
    """Connects the handlers above; that of docstrings runs before napoleon's."""
    app.connect("source-read", move_links)
    app.connect("autodoc-process-docstring", to_restructured_text, priority=100)
    app.connect("autodoc-skip-member", skip_member)
