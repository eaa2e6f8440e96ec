"""Headers and files that say whatever a test wants, with checksums that are right."""

import json
import random
import struct
import zlib
from typing import Any


def header_of(outer: Any, inner: dict | None = None, text: str | bytes | None = None) -> bytes:
    """A header with a right checksum, whatever it says; `text` instead of the JSON of `outer`."""
    if inner is not None:
        inner = {"header_crc": "00000000", **inner}
        outer = {"__metadata__": {"jaxclip": json.dumps(inner, separators=(",", ":"))}, **outer}
    text = json.dumps(outer, separators=(",", ":")) if text is None else text
    text = text.encode() if isinstance(text, str) else text
    raw = bytearray(struct.pack("<Q", len(text)) + text)
    place = raw.find(b"00000000", 8)
    if inner is not None and place >= 0:
        raw[place : place + 8] = f"{zlib.crc32(raw):08x}".encode()
    return bytes(raw)


# --- Damage that knows the grammar --------------------------------------------------------

_WORDS = [
    "",
    "w",
    "F32",
    "U8",
    "BF16",
    "F64",
    "I8",
    "list",
    "tuple",
    "int_keys",
    "array",
    "0",
    "-1",
]
_WORDS += ["ternary", "float16", "bfloat16", "log8", "huffman", "ans", "codes", "w:scale", "\ud800"]
_WORDS += [
    "__metadata__",
    "jaxclip",
    "bits",
    "shape",
    "zero_point",
    "../x",
    "x.safetensors",
    "a\0b",
    "é" * 200 + ".safetensors",
]
_NUMBERS = [0, 1, 2, 3, 4, 5, 6, 8, 9, -1, -2, 16, 255, 2**31, 2**40, 2**53, 2**62, 2**63, 2**64]
_NUMBERS += [-(2**63), 10**19, 10**30, 0.5, 1.0, float("inf"), float("nan")]


def any_value(rng: random.Random) -> Any:
    """Something that JSON can say, more often than not at home in a header."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(_NUMBERS)
    if kind < 5:
        return rng.choice(_WORDS)
    if kind == 5:
        return rng.choice([None, True, False, [], {}, [[]], {"": {}}])
    if kind == 6:
        return rng.choice([[any_value(rng)] * rng.randrange(1, 4), [rng.choice(_NUMBERS)] * 70])
    return {rng.choice(_WORDS): any_value(rng)}


def nested(depth: int, rng: random.Random) -> Any:
    """Lists and dicts inside each other."""
    value: Any = 0
    for _ in range(depth):
        value = rng.choice([["list", value], {"a": value}, ["int_keys", {"1": value}]])
    return value


def damage_value(root: dict, rng: random.Random) -> None:
    """Changes one thing somewhere below `root`."""
    node: Any = root
    while True:
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            return
        key = rng.choice(places)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.85:
            node = node[key]
            continue
        break
    other = rng.choice(places)
    kind = rng.randrange(7)
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[key], node[other] = node[other], node[key]
    elif kind == 2 and type(node[key]) is int:
        node[key] += rng.choice([-1, 1, node[key], 2**63])
    elif kind == 3 and isinstance(node, dict):
        node[rng.choice(_WORDS)] = node[key]
    elif kind == 4 and isinstance(node, list):
        node.insert(key, any_value(rng))
    elif kind == 5 and rng.random() < 0.2:
        node[key] = nested(rng.choice([3, 63, 64, 65, 200]), rng)
    else:
        node[key] = any_value(rng)


def damage_text(text: bytes, rng: random.Random) -> bytes:
    """Changes some bytes, as a careless or hostile writer of JSON would."""
    start = rng.randrange(len(text))
    stop = rng.randrange(start, min(start + 40, len(text)) + 1)
    kind = rng.randrange(8)
    if kind == 0:
        return text[:start]
    if kind == 1:
        return text[:start] + text[stop:]
    if kind == 2:
        return text[:stop] + text[start:]
    if kind == 3:
        return b"\xef\xbb\xbf" + text
    if kind == 4:
        junk = [
            b"\xff",
            b"\xc3\x28",
            b"\0",
            b"\\u0000",
            b"\\ud800",
            b'"',
            b"\\",
            b" ",
            b"\n",
            b"//",
        ]
        return text[:start] + rng.choice(junk) + text[start:]
    if kind == 5:
        places = [i for i, byte in enumerate(text) if chr(byte).isdigit()] or [start]
        place = rng.choice(places)
        number = rng.choice([b"-1", b"1e9", b"NaN", b"00", b"0x1", b"9" * 30, b"9" * 5000, b"7"])
        return text[:place] + number + text[place + 1 :]
    if kind == 6:
        return (
            text[:start] + rng.choice([b"[", b'{"a":']) * rng.choice([1, 900, 30_000]) + text[stop:]
        )
    return text[:start] + bytes([rng.randrange(256)]) + text[start + 1 :]
