"""Policies in JSON files: settings for the tensors that an expression matches."""

import json
from typing import Any

RULES = ("mse_optimal", "max_abs")
_GRID_FIELDS = ("bits", "levels", "axis", "group_size", "zero_point", "scale_dtype")
_SPEC_FIELDS = (*_GRID_FIELDS, "rule", "bit_price")


def read_policy(path: str | None) -> list[tuple[str, Any]]:
    """Reads the pairs of a policy, in order, from a file with one JSON object."""
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            pairs = json.load(file, object_pairs_hook=tuple)  # not dict: it hides repeated keys
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path!r}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(pairs, tuple):
        raise ValueError(f'{path}: a policy must be a JSON object, such as {{"embed": 8}}.')
    return [(regex, _spec_of(f"{path}: {regex!r}", spec)) for regex, spec in pairs]


def _spec_of(origin: str, spec: Any) -> Any:
    """Returns the spec of a JSON value, in which objects are tuples of pairs."""
    if not isinstance(spec, tuple):
        if spec is not None and type(spec) not in (int, str):
            raise ValueError(f"{origin} must have a width, null or an object, got {spec!r}.")
        return spec
    fields = dict(spec)
    unknown = fields.keys() - set(_SPEC_FIELDS)
    if unknown:
        raise ValueError(f"{origin} has {min(unknown)!r}, which is none of {_SPEC_FIELDS}.")
    if len(fields) != len(spec):
        raise ValueError(f"{origin} has a field twice.")
    if "rule" in fields:
        import jaxclip

        name = fields["rule"]
        if name not in RULES:
            raise ValueError(f"{origin} has the rule {name!r}, which is none of {RULES}.")
        fields["rule"] = getattr(jaxclip, name)
    if isinstance(fields.get("axis"), list):
        fields["axis"] = tuple(fields["axis"])
    return fields
