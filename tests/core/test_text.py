"""Names from files are harmless when they are shown, and every encoding gets a text."""

import pathlib
import re

import pytest

import jaxclip
from jaxclip._core.text import encodable, escaped


def test_what_a_terminal_would_obey_is_escaped_and_all_else_stays():
    assert escaped("layer/größe 層 e\u0301") == "layer/größe 層 e\u0301"
    assert escaped("a\x1b]0;t\x07b\n\r\t\0") == "a\\x1b]0;t\\x07b\\n\\r\\t\\x00"
    # Line separators, the order of writing, zero width, C1 controls, lone surrogates.
    assert escaped("\u2028\u202e\u200b\x9b\udcff") == "\\u2028\\u202e\\u200b\\x9b\\udcff"
    assert all(escaped(chr(i)).isprintable() for i in range(0x110000) if i % 7 == 0)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "shift_jis"])
def test_what_an_encoding_lacks_is_written_in_ascii(encoding: str):
    text = "w ▁█ 2×3 → ±1 … 層"
    shown = encodable(text, encoding)
    assert shown.encode(encoding)
    assert shown.startswith("w .# 2x3 -> +-1 ... ")
    assert encodable(text, "utf-8") == encodable(text, None) == text
    assert encodable("plain", encoding) == "plain"


def test_messages_quote_names_by_their_repr():
    quoted_by_hand = re.compile(r"""f"[^"]*'\{[^{}]*\}'|^\s*f?"[^"]*'\{'""", re.M)
    root = pathlib.Path(jaxclip.__file__).parent
    found = {str(p): quoted_by_hand.findall(p.read_text()) for p in root.rglob("*.py")}
    assert not {path: lines for path, lines in found.items() if lines}
