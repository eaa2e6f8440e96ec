"""Policies: a grid and a rule for each leaf, by the first regex that matches its path."""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.layouts import Layout, output_axes
from jaxclip._core.trees import PyTree
from jaxclip.lowbit.arrays import QuantizedArray, is_quantized
from jaxclip.lowbit.budgets import NARROWEST
from jaxclip.lowbit.distortion import QuantizationError, squared_error
from jaxclip.lowbit.no_weights import QUANTIZED, reasons_to_keep
from jaxclip.lowbit.packing import num_side_bytes, num_stored_bytes
from jaxclip.lowbit.quantizer import (
    Threshold,
    quantize,
    quantize_on_host,
    quantize_with_moments,
    shared_choice,
)
from jaxclip.lowbit.rounding.allocation import LeafCalibration
from jaxclip.lowbit.rounding.by_rate import cheaper_codes
from jaxclip.lowbit.rounding.feedback import FactoredMoments, factor_moments
from jaxclip.lowbit.rounding.input_steps import (
    PRICE,
    coded_outline,
    quantize_by_inputs,
)
from jaxclip.lowbit.rounding.moments import Calibration, InputMoments
from jaxclip.lowbit.scale_formats import dtype_in_memory
from jaxclip.thresholds.rules import ThresholdRule
from jaxclip.thresholds.values import is_rule_factory

# A width, a Grid, None for "as it is", or a dict of fields of a Grid, `rule` and `bit_price`.
Spec: TypeAlias = Bits | Grid | Mapping[str, Any] | None
Policy: TypeAlias = Sequence[tuple[str, Spec]]  # pairs of a regex and a spec


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """The grid and the threshold rule of one leaf.

    Attributes:
      grid: Its grid; `bits` is None where a budget chooses the width.
      rule: A threshold rule, its factory or a number, as in `compress`.
      bit_price: Error that a bit is worth, as in `compress`.
      calibration: What data say of the leaf; None to round without data.
      step: For an entropy-coded file, the step of `quantize_by_inputs`; None for the grid.
      origin: The policy's entry that it comes from, for messages.
    """

    grid: Grid
    rule: Threshold
    bit_price: float | jax.Array | None = None
    calibration: LeafCalibration | None = None
    step: float | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        if self.bit_price is not None:
            checks.check_nonnegative("bit_price", self.bit_price)
        if not callable(self.rule):
            checks.check_threshold_array("rule", self.rule)
            if np.ndim(self.rule) == 0:
                checks.check_positive("rule", self.rule)
        if self.grid.bits is None:
            return
        if self.has_price and (self.grid.is_odd or self.grid.zero_point):
            lacking = "bits=1" if self.grid.bits == 1 else "zero_point"
            lacking = "levels='balanced'" if self.grid.levels == "balanced" else lacking
            raise ValueError(f"bit_price needs a code for the value 0, which {lacking} lacks.")
        if isinstance(self.rule, ThresholdRule):
            self.rule.bind(self.grid)  # raises if the rule does not support the grid

    @property
    def has_price(self) -> bool:
        """True if a code need not be the nearest."""
        if self.bit_price is None:
            return False
        return not checks.is_concrete(self.bit_price) or bool(self.bit_price > 0)

    @property
    def moments(self) -> InputMoments | FactoredMoments | None:
        """Moments of the leaf's inputs, or None."""
        return None if self.calibration is None else self.calibration.moments

    def check_coded(self, path: str) -> None:
        """Raises if the spec asks for something that steps of `quantize_by_inputs` cannot have."""
        plain = Grid(None, axis=self.grid.axis)
        given = {
            name: getattr(self.grid, name)
            for name in _GRID_FIELDS
            if getattr(self.grid, name) != getattr(plain, name)
        }
        rule = self.rule() if is_rule_factory(self.rule) else self.rule  # pyright: ignore
        if shared_choice(rule) != "mse_optimal":
            given["rule"] = self.rule
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"{self._name(path)}: target_bytes of an entropy-coded file chooses steps and "
                f"widths itself, so {name} must not be given without bits, got {value!r}."
            )

    def with_bits(self, bits: Bits) -> "LeafSpec":
        """Returns this spec with a width for its grid."""
        return dataclasses.replace(self, grid=dataclasses.replace(self.grid, bits=bits))

    def in_layout(self, path: str, leaf: ArrayLike, layout: Layout) -> "LeafSpec":
        """Returns this spec for a leaf of that layout, with its output axes if asked for."""
        grid, rule = self.grid, self.rule
        if isinstance(rule, ThresholdRule):
            rule = rule.in_layout(layout)
        if grid.axis == "outputs" and np.ndim(leaf) >= 2:
            grid = dataclasses.replace(grid, axis=output_axes(path, np.shape(leaf), layout))
        return dataclasses.replace(self, grid=grid, rule=rule)

    def quantize(self, leaf: ArrayLike, path: str, bits: Bits | None = None) -> QuantizedArray:
        """Returns the low-bit array of a leaf; `bits` is its width if the grid has none."""
        name = f"params at {path!r}"
        moments = self.moments
        if moments is not None:
            moments = factor_moments(moments, np.shape(leaf), name)
        if self.step is not None:
            price = PRICE if self.bit_price is None else float(self.bit_price)
            return quantize_by_inputs(leaf, moments, self.step, price=price, name=name)
        grid, rule = self._for_leaf(leaf, path, bits)
        price = 0.0 if self.bit_price is None else self.bit_price
        if moments is not None:
            return quantize_with_moments(
                leaf, grid, moments, threshold=rule, price=float(price), name=name
            )
        small = quantize(leaf, grid, threshold=rule, name=name)
        return cheaper_codes(small, leaf, price=price) if self.has_price else small

    def factored(self, leaf: ArrayLike, path: str) -> "LeafSpec":
        """Returns this spec with its moments factored, to be used several times."""
        if self.calibration is None:
            return self
        factored = self.calibration.factored(np.shape(leaf), f"params at {path!r}")
        return dataclasses.replace(self, calibration=factored)

    def error_of(self, leaf: np.ndarray | jax.Array, small: QuantizedArray) -> float:
        """Returns the error of a low-bit leaf that budgets make small, by a factored spec."""
        if self.calibration is None:
            return squared_error(leaf, small)
        return self.calibration.error_of(leaf, small)

    def quantize_on_host(
        self, leaf: ArrayLike, path: str, bits: Bits | None = None
    ) -> tuple[QuantizedArray, QuantizationError] | None:
        """Returns what `quantize` does, in NumPy, and its error; None if that takes other ways."""
        if self.has_price or self.moments is not None or self.step is not None:
            return None
        grid, rule = self._for_leaf(leaf, path, bits)
        return quantize_on_host(leaf, grid, threshold=rule, name=f"params at {path!r}")

    def outline(self, leaf: Any, path: str, bits: Bits | None = None) -> QuantizedArray:
        """Returns the low-bit array of a leaf with shapes for arrays; `leaf` may be a shape."""
        dtype = jnp.dtype(leaf.dtype)
        if self.step is not None:
            view = None if self.moments is None else self.moments.view
            return coded_outline(view, np.shape(leaf), dtype)
        grid, rule = self._for_leaf(leaf, path, bits)
        if self.has_price or shared_choice(rule) is None:  # the rule may not suit the leaf
            without = dataclasses.replace(self, calibration=None)  # which changes no shape
            traced = jax.eval_shape(lambda w: without.quantize(w, path, bits), leaf)
            return dataclasses.replace(traced, dtype=dtype)
        grid = grid.from_the_end(np.ndim(leaf))
        shape = grid.scale_shape(np.shape(leaf))
        codes: Any = jax.ShapeDtypeStruct(np.shape(leaf), jnp.int8)
        scale: Any = jax.ShapeDtypeStruct(shape, dtype_in_memory(grid.scale_dtype))
        zero: Any = jax.ShapeDtypeStruct(shape, jnp.int8) if grid.zero_point else None
        return QuantizedArray(codes, scale, grid, dtype, zero)

    def _for_leaf(
        self, leaf: ArrayLike, path: str, bits: Bits | None
    ) -> tuple[Grid, ArrayLike | ThresholdRule]:
        """Returns grid and rule of a leaf."""
        grid, rule = self.grid_for(leaf, path, bits), self.rule
        rule = rule() if is_rule_factory(rule) else rule  # pyright: ignore[reportCallIssue]
        if isinstance(rule, ThresholdRule):
            rule = rule.at_path(path)
        elif not callable(rule):
            shape = grid.scale_shape(np.shape(leaf))
            if not _broadcasts(np.shape(rule), shape):
                raise ValueError(
                    f"{self._name(path)}: rule must broadcast to one value per block, {shape}, "
                    f"got {np.shape(rule)}."
                )
        return grid, rule  # pyright: ignore[reportReturnType]

    def grid_for(self, leaf: ArrayLike, path: str, bits: Bits | None = None) -> Grid:
        """Returns the grid of a leaf; raises if the leaf lacks one of its axes."""
        grid = (self if bits is None else self.with_bits(bits)).grid
        if np.ndim(leaf) < 2:
            grid = dataclasses.replace(grid, axis=None)
        try:
            grid.scale_shape(np.shape(leaf))
        except ValueError as error:
            raise ValueError(f"{self._name(path)}: {error}") from error
        return grid

    def makes_smaller(self, leaf: ArrayLike, path: str) -> bool:
        """Returns True if codes and scales can take fewer bytes than the leaf."""
        grid = self.grid_for(leaf, path, self.grid.bits or NARROWEST)
        shape = np.shape(leaf)
        num_blocks = math.prod(grid.scale_shape(shape))
        # Codes that are made to be coded may take any size: there only the scales count.
        is_coded = self.has_price or getattr(self.rule, "needs_coding", False)
        num_bytes = (
            num_side_bytes(num_blocks, grid)
            if is_coded
            else num_stored_bytes(shape, num_blocks, grid)
        )
        return num_bytes < math.prod(shape) * jnp.result_type(leaf).itemsize

    def _name(self, path: str) -> str:
        """Returns where a leaf is, and the policy's entry that is for it, for messages."""
        return f"{self.origin}, params at {path!r}" if self.origin else f"params at {path!r}"


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


_GRID_FIELDS = tuple(field.name for field in dataclasses.fields(Grid))
_FIELDS = (*_GRID_FIELDS, "rule", "bit_price")


class _Entry(NamedTuple):
    """One pair of a policy."""

    pattern: re.Pattern
    spec: LeafSpec | None
    has_width: bool


class LeafSpecs(NamedTuple):
    """The specs of the leaves of a tree.

    Attributes:
      specs: The spec of each leaf; None to leave it as it is.
      kept: Names of leaves that stay as they are because low bits would take no fewer bytes.
      layouts: The layouts by which axes were found.
      no_weights: Names of leaves that stay as they are because they are no weights, and why.
    """

    specs: list[LeafSpec | None]
    kept: list[str]
    layouts: set[Layout]
    no_weights: dict[str, str]


def leaf_specs(
    names: Sequence[str],
    leaves: Sequence[PyTree],
    policy: Policy,
    default: LeafSpec,
    layouts: Sequence[Layout],
) -> LeafSpecs:
    """Returns the spec of each leaf by the first regex that matches it, for its layout."""
    entries = [_parse_entry(pair, default) for pair in policy]
    firsts = [next((i for i, e in enumerate(entries) if e.pattern.search(n)), None) for n in names]
    unmatched = [entry.pattern.pattern for i, entry in enumerate(entries) if i not in firsts]
    if unmatched:
        raise ValueError(f"policy has patterns that match no leaf: {unmatched}.")
    specs: list[LeafSpec | None] = []
    kept: list[str] = []
    reasons, no_weights = reasons_to_keep(names), {}
    used: set[Layout] = set()
    for name, leaf, layout, i in zip(names, leaves, layouts, firsts, strict=True):
        spec = default if i is None else entries[i].spec
        has_width = i is not None and entries[i].has_width
        if not (_can_be_low_bit(leaf) and (has_width or np.ndim(leaf) >= 2)):
            spec = None
        if spec is not None and i is None and name in reasons:
            no_weights[name] = reasons[name]
            spec = None
        has_axis = spec is None or spec.grid.axis != "outputs" or np.ndim(leaf) < 2
        spec = spec if spec is None else spec.in_layout(name, leaf, layout)
        if spec is not None and not spec.makes_smaller(leaf, name):
            kept.append(name)
            spec = None
        elif spec is not None and not has_axis:
            used.add(layout)
        specs.append(spec)
    if quantized := [name for name, reason in no_weights.items() if reason == QUANTIZED]:
        warnings.warn(
            f"{len(quantized):,} leaves stay as they are, because their names say that another "
            f"library has quantized them, such as {quantized[0]!r}; a policy can choose otherwise.",
            stacklevel=2,
        )
    return LeafSpecs(specs, kept, used, no_weights)


def with_calibration(
    specs: Sequence[LeafSpec | None], paths: Sequence[str], calibration: Calibration
) -> list[LeafSpec | None]:
    """Returns the specs with what a calibration says of their leaves."""
    unknown = sorted(calibration.moments.keys() - set(paths))
    if unknown:
        raise ValueError(
            f"calibration must be of these parameters, got moments for {unknown[0]!r}, which is "
            "none of their paths."
        )
    return [
        spec if spec is None else dataclasses.replace(spec, calibration=_of_leaf(calibration, path))
        for spec, path in zip(specs, paths, strict=True)
    ]


def _of_leaf(calibration: Calibration, path: str) -> LeafCalibration:
    sensitivity = calibration.sensitivities.get(path)
    known = None if sensitivity is None else float(np.asarray(sensitivity))
    return LeafCalibration(calibration.moments.get(path), known)


def _parse_entry(pair: tuple[str, Spec], default: LeafSpec) -> _Entry:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(f"policy must be pairs (regex, spec), got {pair!r}.")
    text, given = pair
    try:
        pattern = re.compile(text)
    except (re.error, TypeError) as error:
        raise ValueError(f"policy: {text!r} is not a regular expression: {error}") from error
    if given is None:
        return _Entry(pattern, None, False)
    if isinstance(given, Grid):
        has_width = given.bits is not None
    else:
        has_width = not isinstance(given, Mapping) or "bits" in given
    return _Entry(pattern, _spec_of(given, default, f"policy {text!r}"), has_width)


def _spec_of(given: Spec, default: LeafSpec, origin: str) -> LeafSpec:
    """Returns the default with the fields that a policy gives."""
    try:
        if isinstance(given, Grid):
            grid = given if given.bits else dataclasses.replace(given, bits=default.grid.bits)
            return dataclasses.replace(default, grid=grid, origin=origin)
        fields = dict(given) if isinstance(given, Mapping) else {"bits": given}
        unknown = [name for name in fields if name not in _FIELDS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {_FIELDS}.")
        if fields.get("bits", 4) is None:
            raise ValueError("bits must be a width, got None; None alone keeps a leaf.")
        of_grid = {name: fields.pop(name) for name in _GRID_FIELDS if name in fields}
        grid = dataclasses.replace(default.grid, **of_grid)
        return dataclasses.replace(default, grid=grid, **fields, origin=origin)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{origin}: {error}") from error


def _can_be_low_bit(leaf: PyTree) -> bool:
    is_floating = trees.is_clippable(leaf) and not jnp.iscomplexobj(leaf)
    return is_floating and not is_quantized(leaf)
