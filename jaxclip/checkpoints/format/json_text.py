"""JSON of untrusted files, strict in form, in memory bounded by a small multiple of its text.

A header is read entry by entry, so that its nesting never becomes a nest of objects: 3 bytes of
text such as `[],` would take 72 bytes of memory.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

# Values that any text may hold.
_ALWAYS_ALLOWED = 2**20
_MAX_METADATA = 2**16  # entries, where files have a few hundred at most
_SPACE = re.compile(r"[ \t\r\n]*")
# An entry as most writers have it, and what follows it. It is only a short cut.
_SIZE = "(?:0|[1-9][0-9]{0,18})"
_PLAIN_ENTRY = re.compile(
    r'[ \t\r\n]*"([^"\\\x00-\x1f]*)":\{"dtype":"(\w+)",'
    rf'"shape":\[((?:{_SIZE}(?:,{_SIZE}){{0,63}})?)\],"data_offsets":\[({_SIZE}),({_SIZE})\]\}}([,}}])',
    re.ASCII,
)
# A name without escapes, and an object without objects inside: all that a tensor's entry may be.
_NAME = re.compile(r'[ \t\r\n]*"([^"\\\x00-\x1f]*)"[ \t\r\n]*:[ \t\r\n]*')
_ENTRY = re.compile(r"\{[^{}]{0,4096}\}")


def strict_json(
    text: bytes, name: str, *, max_values: int = _ALWAYS_ALLOWED, fractions: bool = False
) -> Any:
    """Parses JSON without repeated keys, giant numbers or deep nesting.

    Fractions and NaN are refused too, unless `fractions` is True.
    """
    # Each value is followed by a comma, or opens or closes something. Those in strings are counted
    # as well: `max_values` leaves room for them.
    num_values = sum(text.count(character) for character in (b",", b"[", b"{"))
    if num_values > max_values:
        raise ValueError(
            f"{name} has {num_values:,} values in {len(text):,} bytes, and {max_values:,} are "
            "read: it was made to exhaust memory."
        )
    decoder = _LENIENT if fractions else _STRICT
    try:
        return decoder.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}.") from error


def header_entries(text: bytes) -> Iterator[tuple[str, Any]]:
    """Yields the names and values of a safetensors header, one by one.

    The value of `__metadata__` is a dict of strings, each other value a dict.
    """
    try:
        yield from _entries(text.decode())
    except (ValueError, RecursionError) as error:
        message = f"the header is not valid JSON of a safetensors file: {error}."
        raise ValueError(message) from error


def _dict_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _integer_of(number: str) -> int:
    if len(number) > 20 or not number.lstrip("-").isdigit():
        raise ValueError(f"{number[:20]} is not a size")
    return int(number)


def _number_of(number: str) -> int | float:
    # A long integer takes quadratic time, and Python refuses one of thousands of digits.
    return int(number) if len(number) <= 20 else float(number)


_STRICT = json.JSONDecoder(
    object_pairs_hook=_dict_of,
    parse_int=_integer_of,
    parse_float=_integer_of,
    parse_constant=_integer_of,
)
_LENIENT = json.JSONDecoder(object_pairs_hook=_dict_of, parse_int=_number_of)


def _entries(text: str) -> Iterator[tuple[str, Any]]:
    position = _after(text, 0, "{")
    more = not text.startswith("}", position)
    position += not more
    while more:
        plain = _PLAIN_ENTRY.match(text, position)
        if plain is not None and plain[1] != "__metadata__":
            name, dtype, shape, start, stop, end = plain.groups()
            sizes = [int(n) for n in shape.split(",")] if shape else []
            yield name, {"dtype": dtype, "shape": sizes, "data_offsets": [int(start), int(stop)]}
            more, position = end == ",", plain.end()
            continue
        name, position = _name(text, position)
        if name == "__metadata__":
            value, position = _strings(text, position)
        else:
            entry = _ENTRY.match(text, position)
            if entry is None:
                raise ValueError(f"tensor {name[:60]!r} has no entry of the form that it needs")
            value, position = _STRICT.decode(entry[0]), entry.end()
        yield name, value
        more, position = _goes_on(text, position)
    if _after(text, position, "") != len(text):
        raise ValueError(f"there is more after its end, at character {position}")


def _strings(text: str, position: int) -> tuple[dict[str, str], int]:
    """Returns an object whose values are strings, and the place behind it."""
    position = _after(text, position, "{")
    pairs: list[tuple[str, str]] = []
    if text.startswith("}", position):
        return {}, position + 1
    more = True
    while more:
        name, position = _name(text, position)
        if not text.startswith('"', position):
            raise ValueError(f"the metadata {name[:60]!r} is not a string")
        value, position = _STRICT.raw_decode(text, position)
        pairs.append((name, value))
        if len(pairs) > _MAX_METADATA:
            raise ValueError(f"its metadata have more than {_MAX_METADATA:,} entries")
        more, position = _goes_on(text, position)
    return _dict_of(pairs), position


def _name(text: str, position: int) -> tuple[str, int]:
    """Returns the string and colon at a place, and the place behind them."""
    match = _NAME.match(text, position)
    if match is not None:
        return match[1], match.end()
    position = _after(text, position, "")
    if not text.startswith('"', position):
        raise ValueError(f"a name is missing at character {position}")
    name, position = _STRICT.raw_decode(text, position)  # with escapes
    return name, _after(text, position, ":")


def _goes_on(text: str, position: int) -> tuple[bool, int]:
    """Returns True at a comma and False at a closing brace, and the place behind it."""
    position = _after(text, position, "")
    if not text.startswith((",", "}"), position):
        raise ValueError(f"a comma or a brace is missing at character {position}")
    return text[position] == ",", position + 1


def _after(text: str, position: int, character: str) -> int:
    """Returns the place behind spaces, a character, and spaces again."""
    position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
    if not text.startswith(character, position):
        raise ValueError(f"{character!r} is missing at character {position}")
    position += len(character)
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]
