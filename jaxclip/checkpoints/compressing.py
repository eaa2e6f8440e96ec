"""Compressing a tree in memory: fixed widths, an average of bits, or the size of a file."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks, threads
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.layouts import Layout
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints.sizes import size_report
from jaxclip.lowbit.budgets import check_budget
from jaxclip.lowbit.policies import LeafSpec, Policy
from jaxclip.lowbit.quantizer import Threshold
from jaxclip.lowbit.rounding.allocation import LeafCalibration
from jaxclip.lowbit.rounding.moments import Calibration
from jaxclip.lowbit.trees import FlatTree, compress_tree, specs_of_tree
from jaxclip.thresholds.by_error import mse_optimal

_MOST_TRIES = 10
_MOST_BITS = 12.0  # of a weight, where the search begins: codes have 8
_TOLERANCE = 0.002  # of the bytes of codes, that may be left


class OutOfReachError(ValueError):
    """A target that no file meets; `least` is the size of the smallest that was made."""

    def __init__(self, target_bytes: int, least: int):
        super().__init__(f"target_bytes={target_bytes} is out of reach: {least} was the least.")
        self.least = least


def compress(
    params: PyTree,
    bits: Bits | Grid | None = None,
    *,
    target_bits_per_weight: float | None = None,
    target_bytes: int | None = None,
    rule: Threshold = mse_optimal,
    bit_price: float | jax.Array | None = None,
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

    `target_bytes` plans the whole file that `checkpoints.save(path, small, coding="lanes")` writes,
    for entropy-coded weights: each input of a leaf has a step of its own by the calibration, and
    codes are on a path of a trellis. Without a calibration each leaf has one step, the same for
    all, and the sum of squared errors of the weights is small.

    With a calibration, leaves are rounded so that their products with the inputs are right. A
    target then makes the error of the model's outputs small, by the sensitivities of the
    calibration; without these, the sum over leaves of the relative errors of their products.

    Args:
      params: Pytree of arrays. Biases, norm scales and leaves that are not real floating
        stay as they are, and so do low-bit leaves. So do, without a `policy` for them, leaves
        under names of optimizer states (`optimizer`, `opt_state`, `exp_avg`, `moment`), and with a
        warning what another library has quantized: leaves under names such as `qweight`, `scales`
        beside it, `weight_scale_inv`, `weight_packed` and `weight.absmax`.
      bits: A `Grid`, or a width: 1, 2, 3, 4, 5, 6, 8 or "ternary", with one scale for each output.
        None (also in a `Grid`) is 4, or the width that a target chooses. The grid's axis applies
        to leaves of two or more dimensions.
      target_bits_per_weight: Largest average number of bits of an entry of a low-bit leaf, in
        (0, inf): codes and scales, including leaves of fixed width. Not traced.
      target_bytes: Largest size of the file in bytes, coded. A rule and a grid's fields are then
        only for the specs of a `policy` that have a width.
      rule: How clip thresholds are chosen: a rule or a rule's factory (`mse_optimal`,
        `max_abs`), bound here to the grid; `per_tree` of a rule, measured on all leaves that
        become low-bit by it; or a number.
      bit_price: For entropy-coded files: error that a bit is worth, in squared steps, the `price`
        of `cheaper_codes`, such as 0.12; at 0 every code is the nearest. Files get smaller and
        the error larger, more so with coarse steps. At least 0; not for 1 bit or zero points.
        With `target_bytes` the square of a leaf's step counts no more than the mean square of its
        weights, and None is 0.4; else None is 0.
      policy: Pairs `(regex, spec)`; the first whose regex matches a leaf's path decides. A spec
        is a width, a `Grid`, None to leave a leaf as it is, or a dict of any of a grid's fields,
        `rule` and `bit_price`, which replace the arguments for those leaves. Leaves without a
        match, and specs without a width, follow `bits` or the target. Leaves of fewer than two
        dimensions become low-bit only by a spec with a width.
      layout: Where the outputs are: "in_out" (flax: the last axis) or "out_in" (PyTorch, equinox:
        the first). None takes it from the names of the leaves: "in_out" for `kernel` and
        `embedding`, "out_in" for `weight`; other names follow most of these, or else "in_out".
        The output axes are (heads, head_dim) for query, key and value kernels of flax, and
        (expert, output) for leaves of three dimensions with "expert" or "moe" in their path,
        (layer, expert, output) with four. In "out_in" a leaf of three dimensions whose last axis
        is 32 or longer is a stack of matrices, not a convolution: give `axis` for a kernel that
        long.
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
    budget = check_budget(grid.bits, target_bits_per_weight, target_bytes)
    default = LeafSpec(grid, rule, bit_price)
    specs = specs_of_tree(params, default, policy, layout, calibration)
    if budget is None or budget.num_bytes is None:
        return compress_tree(params, specs, target_bits_per_weight)
    return _compress_within(budget.num_bytes, params, specs)


def _compress_within(target_bytes: int, params: PyTree, specs: Sequence[LeafSpec | None]) -> PyTree:
    """Returns a tree whose entropy-coded file has at most so many bytes."""
    names, leaves, structure = FlatTree.of(params)
    small, coded = list(leaves), {}
    for i, spec in enumerate(specs):
        if spec is None:
            continue
        if not checks.is_concrete(leaves[i]):
            raise TypeError("target_bytes needs the weights' values: compress outside of jit.")
        if spec.grid.bits is None:
            spec.check_coded(names[i])
            coded[i] = spec.factored(leaves[i], names[i])
        else:
            small[i] = spec.quantize(leaves[i], names[i])
    sizes = [SharedStep.of(spec, leaves[i]) for i, spec in coded.items()]
    units = dict(zip(coded, sizes, strict=True))

    def with_step(step: float) -> PyTree:
        def quantize(i: int, _: object) -> PyTree:
            spec = dataclasses.replace(coded[i], step=step * units[i].unit)
            return spec.quantize(leaves[i], names[i])

        found = threads.in_threads(quantize, coded, threads.num_cores())
        of_all = dict(zip(coded, found, strict=True))
        return structure.unflatten([of_all.get(i, leaf) for i, leaf in enumerate(small)])

    def num_bytes(tree: PyTree) -> int:
        return size_report(tree, "lanes").total_bytes

    without_codes = [None if i in coded else leaf for i, leaf in enumerate(small)]
    bytes_left = target_bytes - num_bytes(structure.unflatten(without_codes))
    return best_within(target_bytes, with_step, num_bytes, bytes_left, sizes)


class SharedStep(NamedTuple):
    """A leaf's part in a step that all entropy-coded leaves share.

    Attributes:
      num_weights: Its entries.
      unit: The leaf's step over the shared one.
      equal_rate: The leaf's step at which all leaves would take equal bits.
    """

    num_weights: int
    unit: float
    equal_rate: float

    @classmethod
    def of(cls, spec: LeafSpec, leaf: ArrayLike) -> "SharedStep":
        """Returns the part of a leaf, by its factored spec."""
        known = spec.calibration or LeafCalibration(None)
        equal_rate = known.equal_rate_step(leaf)
        # Without a calibration all weights get the same error.
        unit = 1.0 if spec.calibration is None else known.unit_step(leaf)
        return cls(np.size(leaf), unit, equal_rate)


def _step_near(num_bytes: int, leaves: Sequence[SharedStep]) -> float:
    """Returns the log2 of a shared step for about so many bytes of codes."""
    num_weights = max(sum(leaf.num_weights for leaf in leaves), 1)
    logs = (leaf.num_weights * math.log2(leaf.equal_rate / leaf.unit) for leaf in leaves)
    bits = 8 * num_bytes / num_weights
    return sum(logs) / num_weights + 1 - min(max(bits, 0.0), _MOST_BITS)


def best_within(
    target_bytes: int,
    with_step: Callable[[float], PyTree],
    num_bytes: Callable[[PyTree], int],
    bytes_left: int,
    leaves: Sequence[SharedStep],
) -> PyTree:
    """Returns `with_step` of about the finest shared step for a file of at most `target_bytes`.

    Args:
      target_bytes: Largest size of the file.
      with_step: Function of a shared step that returns a compressed tree.
      num_bytes: Function of that tree that returns the size of its file.
      bytes_left: About how many of them are for the codes.
      leaves: The leaves whose codes these are.
    """
    num_weights = max(sum(leaf.num_weights for leaf in leaves), 1)
    log_step, best = _step_near(bytes_left, leaves), None
    over: tuple[float, int] | None = None  # log2 of the step, and bytes
    within: tuple[float, int] | None = None
    slope = num_weights / 8  # bytes for each halving of the step; less where most codes are 0
    was_over, least = None, 0
    for _ in range(_MOST_TRIES):
        tree = with_step(2.0**log_step)
        size = num_bytes(tree)
        if (before := over or within) and log_step != before[0]:
            seen = (size - before[1]) / (before[0] - log_step)
            slope = min(max(seen, slope / 8), slope)
        is_over, least = size > target_bytes, min(size, least or size)
        if is_over:
            over = (log_step, size)
        elif within is None or size >= within[1]:
            within, best = (log_step, size), tree
            if size >= (1 - _TOLERANCE) * target_bytes:
                break
        wanted = (1 - _TOLERANCE / 2) * target_bytes
        if over and within:
            # Sizes fall about linearly with the logarithm of the step.
            fraction = (over[1] - wanted) / max(over[1] - within[1], 1)
            # The same side twice: sizes are bent here, and the interval would shrink slowly.
            fraction = 0.5 if is_over == was_over else min(max(fraction, 0.05), 0.95)
            log_step = over[0] + (within[0] - over[0]) * fraction
        else:
            change = min(max((size - wanted) / slope, -8.0), 8.0)
            log_step += change + math.copysign(0.05, change)
        was_over = is_over
    if best is None:
        raise OutOfReachError(target_bytes, least)
    return best
