"""Text for people: names from files made harmless, and ASCII where an encoding lacks more."""

import unicodedata

_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", ".:-=+*%#"
_IN_ASCII = str.maketrans(
    {"×": "x", "−": "-", "±": "+-", "→": "->", "≤": "<=", "≥": ">=", "…": "..."}
    | dict(zip(_BARS, _ASCII_BARS, strict=True))
)


def escaped(text: str) -> str:
    """Returns text with what a terminal does not print as is, such as `\\x1b` or `\\n`, escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def encodable(text: str, encoding: str | None) -> str:
    """Returns text, in ASCII where the encoding lacks a character; None has them all."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(_IN_ASCII)
        return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
    return text


def num_columns(text: str) -> int:
    """Returns the columns that printable text takes in a terminal."""
    if text.isascii():
        return len(text)
    num_wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    num_combined = sum(unicodedata.category(c) in ("Mn", "Me") for c in text)
    return len(text) + num_wide - num_combined
