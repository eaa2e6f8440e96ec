"""How Sphinx builds the documentation site; nothing is fetched, and no snippet is run again.

    sphinx-build -W -n --keep-going docs build/site

The docstrings are Markdown with sections of Google's style. Sphinx reads reStructuredText, so
code spans get two backticks, formulas become literal blocks, and other marks are escaped.
Notebooks are pages with the outputs that they were saved with; their tests run them.
"""

import functools
import itertools
import pathlib
import re
import shutil

import jaxclip

project = "jaxclip"
author = "the authors of jaxclip"
version = release = jaxclip.__version__
html_title = "jaxclip"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
root_doc = "index"
nb_execution_mode = "off"

# Sphinx reads what is in this folder, so that the notebooks are copied to it.
_NOTEBOOKS = pathlib.Path(__file__).parent / "notebooks"
shutil.rmtree(_NOTEBOOKS, ignore_errors=True)
_NOTEBOOKS.mkdir()
for _notebook in (_NOTEBOOKS.parents[1] / "examples" / "notebooks").glob("*.ipynb"):
    shutil.copy2(_notebook, _NOTEBOOKS)

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search is in the sidebar
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

_MODULES = re.compile(r"~?\b(?:jaxclip|jax|jaxlib|numpy|optax|collections|typing)\.(?:\w+\.)*")
_ARRAY_LIKE = "Array | ndarray | bool | number | bool | int | float | complex"
_SECTIONS = re.compile(r"(Args|Returns|Raises|Example|References|Attributes):$")
_SPAN = re.compile(r"(`(?:[^`\n]|\n(?!\s*\n))+`)")  # within a paragraph


def to_restructured_text(app, what, name, obj, options, lines):
    """Rewrites a docstring in place, before napoleon reads its sections."""
    del app, what, name, obj, options
    result: list[str] = []
    for is_code, group in itertools.groupby(_marked(lines), key=lambda pair: pair[0]):
        text = "\n".join(line for _, line in group)
        result += (text if is_code else _escaped(text)).split("\n")
    lines[:] = result


def _marked(lines):
    """Yields each line with True if it is code: a formula, a table or an example."""
    section, is_code, before = "", False, ""
    for line in lines:
        text, is_indented = line.strip(), line[:1] == " "
        if not is_indented and text:
            match = _SECTIONS.match(line)
            section = match[1] if match else section if before else ""
        is_table = text.startswith("|")
        if section:
            is_code = section == "Example" and not line.startswith("Example")
        elif not text:
            pass  # blank lines belong to what is before them
        elif not (is_indented or is_table):
            is_code = False
        elif not before and not is_code:
            yield from ((True, "::"), (True, ""))
            is_code = True
        yield is_code, f"  {line}" if is_code and is_table else line
        before = text


def _escaped(text: str) -> str:
    """Returns Markdown with code spans as literals and no other marks."""
    parts = _SPAN.split(text)
    for i, part in enumerate(parts):
        if i % 2:
            ends_word = parts[i + 1][:1].isalnum()
            parts[i] = f"``{part[1:-1].strip()}``" + ("\\ " if ends_word else "")
        else:
            parts[i] = re.sub(r"([|*_\\])", r"\\\1", part)
    return "".join(parts)


def skip_member(app, what, name, obj, skip, options):
    """Leaves out the fields of NamedTuples, which the section Attributes describes."""
    del app, what, name, options
    is_field = type(obj).__name__ == "_tuplegetter" or isinstance(obj, functools.cached_property)
    return True if is_field else skip


def shorten_types(app, what, name, obj, options, signature, result):
    """Names types without their modules."""
    del app, what, name, obj, options
    texts = (text and _MODULES.sub("", text) for text in (signature, result))
    return tuple(text and text.replace(_ARRAY_LIKE, "ArrayLike") for text in texts)


# Pages beside the folder docs, and where the site has them.
_MOVED = {
    "../benchmarks/README.md": "project/benchmarks.md",
    "../examples/notebooks/": "notebooks/",
}


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
    app.connect("autodoc-process-signature", shorten_types)
