"""Policies: how each leaf of a tree becomes low-bit, by what its path matches."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks, trees
from jaxclip._core.grids import Bits, Granularity, code_range
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.quantizer import quantize
from jaxclip.lowbit.rate_rounding import cheaper_codes
from jaxclip.lowbit.scale_formats import scale_format
from jaxclip.thresholds.rules import ThresholdRule

Policy = Sequence[tuple[str, Bits | Mapping[str, Any] | None]]
"""Pairs of a regex and a width, None for "as it is", or a dict of fields of a `LeafSpec`."""


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """How a leaf becomes low-bit.

    Attributes:
      bits: Width of the codes; None where a target chooses it.
      rule: As in `compress`, as all that follow.
      axis: Channel axis, for leaves of two or more dimensions.
      group_size: Entries that share a scale.
      full_signed: Whether the level -2**(bits-1) is used.
      zero_point: Whether the grid may lie unevenly around 0.
      scale_dtype: Format of the scales.
      bit_price: What a bit is worth, as in `cheaper_codes`; at 0 every code is the nearest.
      origin: The rule of a policy that it comes from, for messages.
    """

    bits: Bits | None
    rule: Any
    axis: int | tuple[int, ...] | None
    group_size: int | None
    full_signed: bool
    zero_point: bool
    scale_dtype: Any
    bit_price: Any = 0.0
    origin: str = ""

    def __post_init__(self) -> None:
        try:
            self._check()
        except (TypeError, ValueError) as error:
            if not self.origin:
                raise
            raise type(error)(f"{self.origin}: {error}") from error

    def _check(self) -> None:
        for name in ("full_signed", "zero_point"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        granularity = Granularity(self.axis, self.group_size)
        scale_format(self.scale_dtype)
        checks.check_nonnegative("bit_price", self.bit_price)
        if not callable(self.rule):
            checks.check_threshold_array("rule", self.rule)
            if np.ndim(self.rule) == 0:
                checks.check_positive("rule", self.rule)
        if self.bits is None:
            return
        code_range(self.bits)
        if self.bits == 1 and self.zero_point:
            raise ValueError("zero_point needs a grid with a code for 0, which bits=1 has not.")
        if self.has_price and (self.bits == 1 or self.zero_point):
            what = "bits=1" if self.bits == 1 else "zero_point"
            raise ValueError(f"bit_price needs a code that stands for 0, which {what} has not.")
        if isinstance(self.rule, ThresholdRule):
            self.rule.bind(self.bits, self.full_signed, granularity)

    @property
    def has_price(self) -> bool:
        """Whether codes may be others than the nearest."""
        return not checks.is_concrete(self.bit_price) or bool(self.bit_price > 0)

    def quantize(self, leaf: Any, path: str, bits: Bits | None = None) -> QuantizedArray:
        """Returns a leaf as low-bit.

        Args:
          leaf: Real floating array. May be traced.
          path: Where it is in the tree, for errors and for `fan_in`.
          bits: Its width; None for that of the spec.

        Returns:
          A `QuantizedArray`.

        Raises:
          ValueError: If axis or groups do not fit the leaf, and as `quantize`.
        """
        axis = self.axis if np.ndim(leaf) >= 2 else None
        name, rule = f"params at '{path}'", self.rule
        try:
            shape = Granularity(axis, self.group_size).scale_shape(np.shape(leaf))
            if isinstance(rule, ThresholdRule):
                rule = rule.at_path(path)
            elif not callable(rule) and not _broadcasts(np.shape(rule), shape):
                raise ValueError(
                    f"rule must broadcast to one value a block, {shape}, got {np.shape(rule)}."
                )
        except ValueError as error:
            where = f"{self.origin}, {name}" if self.origin else name
            raise ValueError(f"{where}: {error}") from error
        small = quantize(
            leaf,
            self.bits if bits is None else bits,  # pyright: ignore[reportArgumentType]
            threshold=rule,
            axis=axis,
            group_size=self.group_size,
            full_signed=self.full_signed,
            zero_point=self.zero_point,
            scale_dtype=self.scale_dtype,
            name=name,
        )
        return cheaper_codes(small, leaf, price=self.bit_price) if self.has_price else small


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


_FIELDS = tuple(field.name for field in dataclasses.fields(LeafSpec) if field.name != "origin")


def leaf_specs(
    names: Sequence[str], leaves: Sequence[Any], policy: Policy, default: LeafSpec
) -> list[LeafSpec | None]:
    """Returns how each leaf becomes low-bit.

    Args:
      names: The leaves' paths.
      leaves: The leaves, or their shapes.
      policy: Pairs `(regex, spec)`; the first whose regex matches a leaf's path decides.
      default: For leaves that none matches, and for fields that a dict leaves open.

    Returns:
      A spec for each leaf, in order; None for those that stay as they are: whose rule says
      so, who are not real floating, and who have fewer than two dimensions unless their rule
      gives a width.

    Raises:
      TypeError: If a field is of a wrong type; the message names rule and field.
      ValueError: If a field has no allowed value or is unknown, or a regex is none or matches
        no leaf.

    Example:
      >>> default = LeafSpec(4, 0.5, -1, None, True, False, "float32")
      >>> leaves = [np.ones((2, 2)), np.ones(2), np.ones((2, 2))]
      >>> specs = leaf_specs("abc", leaves, [("a", {"group_size": 1}), ("c", None)], default)
      >>> [spec and (spec.bits, spec.group_size) for spec in specs]
      [(4, 1), None, None]
    """
    rules = list(_parsed(policy, default))
    firsts = [next((n for n, (p, _) in enumerate(rules) if p.search(name)), None) for name in names]
    unmatched = [pattern.pattern for n, (pattern, _) in enumerate(rules) if n not in firsts]
    if unmatched:
        raise ValueError(f"policy has patterns that match no leaf: {unmatched}.")
    specs = []
    for leaf, n in zip(leaves, firsts, strict=True):
        spec = default if n is None else rules[n][1]
        has_width = n is not None and _has_width(policy[n][1])
        stays = not _can_be_low_bit(leaf) or not (has_width or np.ndim(leaf) >= 2)
        specs.append(None if stays else spec)
    return specs


def _parsed(policy: Policy, default: LeafSpec) -> Iterator[tuple[re.Pattern, LeafSpec | None]]:
    for pair in policy:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"policy must be pairs (regex, spec), got {pair!r}.")
        text, given = pair
        try:
            pattern = re.compile(text)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"policy has {text!r}, which is no regular expression: {error}"
            ) from error
        if given is None:
            yield pattern, None
            continue
        fields = dict(given) if isinstance(given, Mapping) else {"bits": given}
        origin = f"policy {text!r}"
        unknown = [name for name in fields if name not in _FIELDS]
        if unknown:
            raise ValueError(f"{origin} has {unknown[0]!r}, which is none of {_FIELDS}.")
        if fields.get("bits", 4) is None:
            raise ValueError(f"{origin} has bits=None: give None alone to keep a leaf as it is.")
        yield pattern, dataclasses.replace(default, **fields, origin=origin)


def _has_width(given: Any) -> bool:
    return "bits" in given if isinstance(given, Mapping) else given is not None


def _can_be_low_bit(leaf: Any) -> bool:
    if isinstance(leaf, QuantizedArray) or not trees.is_clippable(leaf):
        return False
    return not jnp.iscomplexobj(leaf)
