"""Compressing the leaves of a tree to low-bit arrays, and decompressing them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core import checks, trees
from jaxclip._core.grids import Bits
from jaxclip._core.layouts import Layout, layouts_of
from jaxclip._core.trees import PyTree
from jaxclip.lowbit.arrays import dequantize, dequantize_stored, is_quantized
from jaxclip.lowbit.budgets import (
    ALL_WIDTHS,
    Option,
    option_of,
    widths_within_average,
)
from jaxclip.lowbit.policies import LeafSpec, Policy, leaf_specs, with_calibration
from jaxclip.lowbit.rounding.moments import Calibration
from jaxclip.thresholds.by_tree import shared_over
from jaxclip.thresholds.rules import ThresholdRule


class FlatTree(NamedTuple):
    """The leaves of a tree, low-bit arrays whole, with their paths and what takes them back."""

    names: list[str]
    leaves: list[PyTree]
    structure: Any

    @classmethod
    def of(cls, params: PyTree) -> "FlatTree":
        """Returns the leaves of a tree."""
        flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
        return cls([trees.path_name(p) for p, _ in flat], [leaf for _, leaf in flat], structure)


def compress_tree(
    params: PyTree, specs: Sequence[LeafSpec | None], bits_per_weight: float | None = None
) -> PyTree:
    """Returns a tree with leaves quantized by their specs, of `specs_of_tree`.

    Specs without a width get those that fit an average of bits, or 4 bits.
    """
    names, leaves, structure = FlatTree.of(params)
    small = list(leaves)
    open_specs: dict[int, LeafSpec] = {}
    for i, spec in enumerate(specs):
        if spec is not None and spec.grid.bits is None:
            open_specs[i] = spec
        elif spec is not None:
            small[i] = spec.quantize(leaves[i], names[i])
    widths: list[Bits] = [4] * len(open_specs)
    if bits_per_weight is not None:
        fixed = [leaf for leaf in small if is_quantized(leaf)]
        measured = [_measured(spec, leaves[i], names[i]) for i, spec in open_specs.items()]
        widths = widths_within_average(bits_per_weight, measured, fixed)
    for (i, spec), width in zip(open_specs.items(), widths, strict=True):
        small[i] = spec.quantize(leaves[i], names[i], width)
    return structure.unflatten(small)


def specs_of_tree(
    params: PyTree,
    default: LeafSpec,
    policy: Policy = (),
    layout: Layout | None = None,
    calibration: Calibration | None = None,
) -> list[LeafSpec | None]:
    """Returns the spec of each leaf of a tree; None to leave it as it is."""
    names, leaves, _ = FlatTree.of(params)
    specs = leaf_specs(names, leaves, policy, default, layouts_of(names, layout)).specs
    specs = _with_shared_rules(specs, leaves)
    if calibration is None:
        return specs
    paths, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    return with_calibration(specs, trees.unique_names([path for path, _ in paths]), calibration)


def _measured(spec: LeafSpec, leaf: jax.Array, name: str) -> list[Option]:
    """Returns a leaf at every width."""
    options = []
    spec = spec.factored(leaf, name)
    for width in ALL_WIDTHS:
        on_host = None if spec.calibration else spec.quantize_on_host(leaf, name, width)
        if on_host is not None:
            options.append(option_of(on_host[0], on_host[1].squared_error))
            continue
        q = spec.quantize(leaf, name, width)
        if not checks.is_concrete(q.qvalue):
            raise TypeError(
                "target_bits_per_weight needs the weights' values: compress outside of jit."
            )
        options.append(option_of(q, spec.error_of(leaf, q)))
    return options


def _with_shared_rules(
    specs: Sequence[LeafSpec | None], leaves: Sequence[ArrayLike]
) -> list[LeafSpec | None]:
    """Returns the specs with rules for a whole tree measured on all leaves that they are for."""

    def shared_rule(spec: LeafSpec | None) -> ThresholdRule | None:
        rule = None if spec is None else spec.rule
        return rule if isinstance(rule, ThresholdRule) and not rule.is_leafwise else None

    rules = [shared_rule(spec) for spec in specs]
    leaves_of: dict[ThresholdRule, list[ArrayLike]] = {}
    for rule, leaf in zip(rules, leaves, strict=True):
        if rule is not None:
            leaves_of.setdefault(rule, []).append(leaf)
    shared = {rule: shared_over(rule, group) for rule, group in leaves_of.items()}
    return [
        spec if spec is None or rule is None else dataclasses.replace(spec, rule=shared[rule])
        for spec, rule in zip(specs, rules, strict=True)
    ]


def decompress(small: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Returns the tree of arrays that a compressed tree stands for.

    Args:
      small: The result of `compress` or of `checkpoints.load`.
      dtype: Floating dtype for the leaves that were compressed; None for their own.

    Returns:
      The tree with every `QuantizedArray` dequantized; other leaves are unchanged.

    Raises:
      ValueError: If a weight is beyond `dtype`. In jit it becomes the largest number.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxclip import compress
      >>> decompress(compress({"kernel": jnp.ones((2, 2))}, "ternary"))
      {'kernel': Array([[1., 1.],
             [1., 1.]], dtype=float32)}
    """

    def restored(path: tuple, leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        is_known = all(map(checks.is_concrete, (leaf.qvalue, leaf.scale, leaf.zero)))
        if dtype is not None and is_known:
            # By the outermost levels: few leaves have to be decoded to know.
            largest = jnp.max(leaf.threshold, initial=0)
            if not largest <= jnp.asarray(jnp.finfo(dtype).max).astype(jnp.float32):
                dequantize_stored(leaf, dtype, trees.path_name(path))  # raises for values beyond it
        return dequantize(leaf, dtype)

    return jax.tree_util.tree_map_with_path(restored, small, is_leaf=is_quantized)
