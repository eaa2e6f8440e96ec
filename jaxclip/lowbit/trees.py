"""Compressing the leaves of a tree to low-bit arrays, and decompressing them."""

import dataclasses
from collections.abc import Sequence

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core import checks, trees
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.layouts import Layout, layouts_of
from jaxclip._core.trees import PyTree
from jaxclip.lowbit.arrays import dequantize, is_quantized
from jaxclip.lowbit.budgets import (
    ALL_WIDTHS,
    Option,
    check_budget,
    option_of,
    widths_within_average,
)
from jaxclip.lowbit.moments import Calibration
from jaxclip.lowbit.policies import LeafSpec, Policy, leaf_specs, with_calibration
from jaxclip.lowbit.quantizer import Threshold
from jaxclip.thresholds.by_error import mse_optimal
from jaxclip.thresholds.by_tree import shared_over
from jaxclip.thresholds.rules import ThresholdRule


def compress(
    params: PyTree,
    bits: Bits | Grid | None = None,
    *,
    target_bits_per_weight: float | None = None,
    rule: Threshold = mse_optimal,
    bit_price: float | jax.Array = 0.0,
    policy: Policy = (),
    layout: Layout | None = None,
    calibration: Calibration | None = None,
) -> PyTree:
    """Replaces leaves of two or more dimensions by low-bit arrays.

    A leaf whose codes and scales would take no fewer bytes than the leaf stays as it is.

    With a target, each leaf gets a width of "ternary", 2, 3, 4, 5, 6 or 8 bits. They make the
    squared error `sum |W - Q|^2` over all leaves small: bytes are spent where they lower it most.
    The error is in the weights' own units, so leaves of large weights get more bits. `policy` can
    fix the width of a leaf.

    With a calibration, leaves are rounded so that their products with the inputs are right. A
    target then makes the error of the model's outputs small, by the sensitivities of the
    calibration; without these, the sum over leaves of the relative errors of their products.

    Args:
      params: Pytree of arrays. Biases, norm scales and leaves that are not real floating
        stay as they are, and so do low-bit leaves, and without a `policy` for them leaves under
        names of optimizer states: `optimizer`, `opt_state`, `exp_avg`, `moment`.
      bits: A `Grid`, or a width: 1, 2, 3, 4, 5, 6, 8 or "ternary", with one scale for each output.
        None (also in a `Grid`) is 4, or the width that a target chooses. The grid's axis applies
        to leaves of two or more dimensions.
      target_bits_per_weight: Largest average number of bits of an entry of a low-bit leaf, in
        (0, inf): codes and scales, including leaves of fixed width. Not traced.
      rule: How clip thresholds are chosen: a rule or a rule's factory (`mse_optimal`,
        `max_abs`), bound here to the grid; `per_tree` of a rule, measured on all leaves that
        become low-bit by it; or a number.
      bit_price: For entropy-coded files: error that a bit is worth, in squared steps, the `price`
        of `cheaper_codes`, such as 0.12; at 0 every code is the nearest. Files get smaller and
        the error larger, more so with coarse steps. At least 0; not for 1 bit or zero points.
      policy: Pairs `(regex, spec)`; the first whose regex matches a leaf's path decides. A spec
        is a width, a `Grid`, None to leave a leaf as it is, or a dict of any of a grid's fields,
        `rule` and `bit_price`, which replace the arguments for those leaves. Leaves without a
        match, and specs without a width, follow `bits` or the target. Leaves of fewer than two
        dimensions become low-bit only by a spec with a width.
      layout: Where the outputs are: "in_out" (flax: the last axis) or "out_in" (PyTorch, equinox:
        the first). None takes it from the names of the leaves: "in_out" for `kernel` and
        `embedding`, "out_in" for `weight`; other names follow most of these, or else "in_out".
        The output axes are (heads, head_dim) for query, key and value kernels of flax, and
        (expert, output) for leaves of three dimensions with "expert" or "moe" in their path. In
        "out_in" a leaf of three dimensions whose last axis is 32 or longer is a stack of
        matrices, not a convolution: give `axis` for a kernel that long.
      calibration: Moments of the inputs of leaves, from `calibration.measure` with the same
        parameters. Leaves that it lacks are rounded without data.

    Returns:
      A tree of the same structure with `QuantizedArray` leaves, for `decompress`,
      `size_report` and `checkpoints.save`. A target is never exceeded, and the error within it
      is no larger than that of any one width for all leaves that fits.

    Raises:
      TypeError: If an argument is of a wrong type, both a width and a target are given, or a
        target comes with traced weights.
      ValueError: If `bits` is not allowed, `bit_price` is negative or comes with 1 bit or a zero
        point, a regex matches no leaf, a spec has an unknown field or a value that is not
        allowed (the message names regex and field), a weight is NaN or infinite (the message
        names leaf and index), a target is out of reach (the message has the least), or the
        calibration is of other parameters.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxclip import max_abs
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> small = compress(params, bits="ternary", rule=max_abs)
      >>> small["kernel"].bits, small["bias"].dtype
      ('ternary', dtype('float32'))
      >>> compress(params, Grid(4, group_size=2), rule=max_abs)["kernel"].scale.shape
      (4, 4)
      >>> policy = [("kernel", {"bits": 8, "group_size": 4, "axis": 0})]
      >>> compress(params, 2, rule=max_abs, policy=policy)["kernel"].scale.shape
      (8, 1)
      >>> params = {"a": jnp.ones((64, 64)), "b": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> small = compress(params, target_bits_per_weight=3.5, rule=max_abs)
      >>> small["a"].bits, small["b"].bits
      ('ternary', 4)

    References:
      Shoham and Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers, 1988,
      https://doi.org/10.1109/29.90373
    """
    grid = bits if isinstance(bits, Grid) else Grid(bits)
    budget = check_budget(grid.bits, target_bits_per_weight)
    if budget is None and grid.bits is None:
        grid = dataclasses.replace(grid, bits=4)
    flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
    names, leaves = [trees.path_name(path) for path, _ in flat], [leaf for _, leaf in flat]
    default = LeafSpec(grid, rule, bit_price)
    specs = leaf_specs(names, leaves, policy, default, layouts_of(names, layout)).specs
    specs = _with_shared_rules(specs, leaves)
    if calibration is not None:
        specs = with_calibration(specs, trees.unique_names([path for path, _ in flat]), calibration)
    small = list(leaves)
    open_specs: dict[int, LeafSpec] = {}
    for i, spec in enumerate(specs):
        if spec is not None and spec.grid.bits is None:
            open_specs[i] = spec
        elif spec is not None:
            small[i] = spec.quantize(leaves[i], names[i])
    if budget is not None and budget.bits_per_weight is not None:
        fixed = [leaf for leaf in small if is_quantized(leaf)]
        measured = [_measured(spec, leaves[i], names[i]) for i, spec in open_specs.items()]
        widths = widths_within_average(budget.bits_per_weight, measured, fixed)
        for (i, spec), width in zip(open_specs.items(), widths, strict=True):
            small[i] = spec.quantize(leaves[i], names[i], width)
    return structure.unflatten(small)


def _measured(spec: LeafSpec, leaf: jax.Array, name: str) -> list[Option]:
    """Returns a leaf at every width."""
    options = []
    spec = spec.factored(leaf, name)
    for width in ALL_WIDTHS:
        on_host = spec.quantize_on_host(leaf, name, width)
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

    Example:
      >>> import jax.numpy as jnp
      >>> decompress(compress({"kernel": jnp.ones((2, 2))}, bits="ternary"))
      {'kernel': Array([[1., 1.],
             [1., 1.]], dtype=float32)}
    """
    return jax.tree.map(
        lambda leaf: dequantize(leaf, dtype) if is_quantized(leaf) else leaf,
        small,
        is_leaf=is_quantized,
    )
