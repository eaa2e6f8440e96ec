"""Trees: which leaf is stored at how many bits."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip import _checks
from jaxclip.allocation import allocate
from jaxclip.fidelity import squared_error
from jaxclip.grids import Bits, code_range
from jaxclip.layout import plan_file
from jaxclip.quantization import QuantizedArray, dequantize, quantize
from jaxclip.scale_formats import scale_format
from jaxclip.sizes import size_report
from jaxclip.threshold_rules import mse_optimal

__all__ = ["compress", "decompress"]

# What a target chooses from. One bit is left out: without a code for 0 its error tells less
# of what a network loses.
_WIDTHS: tuple[Bits, ...] = ("ternary", 2, 3, 4, 5, 6, 8)


def compress(
    params: Any,
    bits: Bits | None = None,
    *,
    target_bits_per_weight: float | None = None,
    target_bytes: int | None = None,
    rule: Any = mse_optimal,
    axis: int | tuple[int, ...] | None = -1,
    group_size: int | None = None,
    full_signed: bool = True,
    zero_point: bool = False,
    scale_dtype: Any = "float32",
    policy: Sequence[tuple[str, Bits | None]] = (),
) -> Any:
    """Replaces leaves of two or more dimensions by low-bit arrays.

    With a target, each leaf gets the width of "ternary", 2, 3, 4, 5, 6 or 8 bits that makes
    the squared error `sum |W - Q|^2` over all leaves small: bytes go where they lower it most,
    as `jaxclip.allocation` says. The error counts in the weights' own units, so that leaves of
    large weights get more bits; `policy` fixes a leaf that must not follow.

    Args:
      params: Pytree of arrays. Biases, norm scales and leaves that are not real floating
        stay as they are, and so do low-bit leaves.
      bits: 1, 2, 3, 4, 5, 6, 8 or "ternary"; None for 4, or for what a target chooses.
      target_bits_per_weight: Most bits that an entry of a low-bit leaf takes on average, in
        (0, inf): codes and scales, those of leaves whose width is fixed included. Not traced.
      target_bytes: Most bytes of the file, `size_report(small).total_bytes`; at least 1.
      rule: How clip thresholds are chosen: a rule or a rule's factory (`mse_optimal`,
        `max_abs`), bound here to the grid and granularity; or a number.
      axis: Channel axis with a scale for each index; by default the last, an output
        channel in flax's layouts. None for one scale a leaf.
      group_size: Entries that share a scale along the last non-channel axis.
      full_signed: Whether grids of two bits or more use the level -2**(bits-1).
      zero_point: Whether grids may lie unevenly around 0, as in `quantize`; not for 1 bit.
      scale_dtype: Format of the scales: float32, float16, bfloat16 or "log8".
      policy: Pairs `(regex, bits)`; the first whose regex matches a leaf's path decides
        its width, None to leave it as it is. Leaves that none matches follow `bits` or
        the target.

    Returns:
      A tree of the same structure with `QuantizedArray` leaves, for `decompress`,
      `size_report` and `checkpoints.save`. A target is never exceeded, and the error within it
      is no larger than that of any one width for all leaves that fits.

    Raises:
      TypeError: If an argument is of a wrong type, more than one of `bits` and the targets
        is given, or a target comes with traced weights.
      ValueError: If `bits` or `scale_dtype` is not allowed, `zero_point` comes with 1 bit, a
        regex matches no leaf, a weight is NaN or infinite (the message names leaf and
        index), or a target is out of reach (the message has the least).

    Example:
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> small = compress(params, bits="ternary")
      >>> small["kernel"].bits, small["bias"].dtype
      ('ternary', dtype('float32'))
      >>> params = {"a": jnp.ones((64, 64)), "b": jax.random.normal(jax.random.key(0), (64, 64))}
      >>> small = compress(params, target_bits_per_weight=3.5)
      >>> small["a"].bits, small["b"].bits
      ('ternary', 4)
    """
    target = _checked_target(bits, target_bits_per_weight, target_bytes)
    bits = 4 if bits is None else bits
    code_range(bits)
    scale_dtype = scale_format(scale_dtype)
    flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_quantized)
    names, leaves = [_checks.path_name(path) for path, _ in flat], [leaf for _, leaf in flat]
    fixed = _fixed_widths(names, policy)

    def quantized(i: int, width: Bits) -> QuantizedArray:
        return quantize(
            leaves[i],
            width,
            threshold=rule,
            axis=axis if np.ndim(leaves[i]) >= 2 else None,
            group_size=group_size,
            full_signed=full_signed,
            zero_point=zero_point,
            scale_dtype=scale_dtype,
            name=f"params at '{names[i]}'",
        )

    can = [i for i, leaf in enumerate(leaves) if _can_be_low_bit(leaf)]
    free = [i for i in can if i not in fixed and np.ndim(leaves[i]) >= 2]
    small = list(leaves)
    for i in can:
        width = fixed.get(i)
        if width is not None:
            small[i] = quantized(i, width)
    widths = [bits] * len(free)
    if target is not None:
        widths = _allocated_widths(*target, small, structure, free, quantized)
    for i, width in zip(free, widths, strict=True):
        small[i] = quantized(i, width)
    return structure.unflatten(small)


def decompress(small: Any, dtype: Any = None) -> Any:
    """Returns the tree of arrays that a compressed tree stands for.

    Args:
      small: What `compress` returned, or `checkpoints.load` read.
      dtype: Floating dtype for the leaves that were compressed; None for their own.

    Returns:
      The tree with every `QuantizedArray` dequantized; other leaves as they are.

    Example:
      >>> decompress(compress({"kernel": jnp.ones((2, 2))}, bits="ternary"))
      {'kernel': Array([[1., 1.],
             [1., 1.]], dtype=float32)}
    """
    return jax.tree.map(
        lambda leaf: dequantize(leaf, dtype) if _is_quantized(leaf) else leaf,
        small,
        is_leaf=_is_quantized,
    )


def _fixed_widths(
    names: list[str], policy: Sequence[tuple[str, Bits | None]]
) -> dict[int, Bits | None]:
    """What the policy says, by the leaf's place."""
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in policy):
        raise ValueError(f"policy must be pairs (regex, bits), got {policy!r}.")
    patterns = [_compiled(pattern) for pattern, _ in policy]
    for _, width in policy:
        if width is not None:
            code_range(width)
    firsts = [next((n for n, p in enumerate(patterns) if p.search(name)), None) for name in names]
    unmatched = [policy[n][0] for n in range(len(policy)) if n not in firsts]
    if unmatched:
        raise ValueError(f"policy has patterns that match no leaf: {unmatched}.")
    return {i: policy[n][1] for i, n in enumerate(firsts) if n is not None}


def _can_be_low_bit(leaf: Any) -> bool:
    if _is_quantized(leaf) or not _checks.is_clippable(leaf):
        return False
    return not jnp.iscomplexobj(leaf)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"policy has {pattern!r}, which is no regular expression: {error}"
        ) from error


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


# --- Targets --------------------------------------------------------------------------


def _checked_target(bits: Any, bits_per_weight: Any, num_bytes: Any) -> tuple[str, Any] | None:
    """The target's name and value, or None without one."""
    targets = {"target_bits_per_weight": bits_per_weight, "target_bytes": num_bytes}
    given = {n: v for n, v in {"bits": bits, **targets}.items() if v is not None}
    if len(given) > 1:
        raise TypeError(f"only one of bits and the targets may be given, got {given}.")
    if bits_per_weight is not None:
        if isinstance(bits_per_weight, jax.Array):
            bits_per_weight = bits_per_weight.item()
        _checks.check_positive("target_bits_per_weight", bits_per_weight)
        return "target_bits_per_weight", float(bits_per_weight)
    if num_bytes is not None:
        _checks.check_count("target_bytes", num_bytes)
        return "target_bytes", int(num_bytes)
    return None


def _allocated_widths(
    name: str,
    target: Any,
    small: list[Any],
    structure: Any,
    free: list[int],
    quantized: Callable[[int, Bits], QuantizedArray],
) -> list[Bits]:
    """The widths of the free leaves; the others are in `small` as they will be stored."""
    measured = [_measured(name, small[i], functools.partial(quantized, i)) for i in free]
    sizes = np.asarray([[option.num_bytes for option in leaf] for leaf in measured], np.int64)
    errors = np.asarray([[option.error for option in leaf] for leaf in measured], np.float64)
    shape = (len(free), len(_WIDTHS))  # of no leaves too
    sizes, errors = sizes.reshape(shape), errors.reshape(shape)

    def file_bytes(options: list[int]) -> int:
        tree = list(small)
        for i, leaf, option in zip(free, measured, options, strict=True):
            tree[i] = leaf[option].outline
        return size_report(structure.unflatten(tree)).total_bytes

    if name == "target_bytes":
        options = _within_file(target, sizes, errors, file_bytes)
    else:
        others = [leaf for leaf in small if _is_quantized(leaf)]
        entries = sum(math.prod(leaf.shape) for leaf in others)
        entries += sum(math.prod(small[i].shape) for i in free)
        stored = sum(plan_file(leaf).data_bytes for leaf in others)
        options = _within_average(target, sizes, errors, stored, entries)
    return [_WIDTHS[option] for option in options]


class _Option(NamedTuple):
    """A leaf at one width: its shapes, what it takes in a file, its squared error."""

    outline: QuantizedArray
    num_bytes: int
    error: float


def _measured(target: str, leaf: Any, quantized: Callable[[Bits], QuantizedArray]) -> list[_Option]:
    options = []
    for width in _WIDTHS:
        q = quantized(width)
        if not _checks.is_concrete(q.qvalue):
            raise TypeError(f"{target} needs the weights' values: compress outside of jit.")
        # Shapes are enough from here on; the codes of all widths would fill the memory.
        outline = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), q)
        options.append(_Option(outline, plan_file(q).data_bytes, squared_error(leaf, q)))
    return options


def _within_average(
    target: float, sizes: np.ndarray, errors: np.ndarray, others: int, entries: int
) -> list[int]:
    """Options of at most `target` bits an entry, with bytes that are spent already."""

    def average(num_bytes: int) -> float:
        return 8 * num_bytes / max(entries, 1)

    least = int(sizes.min(axis=1).sum()) + others
    if average(least) > target:
        bits = math.ceil(1e4 * average(least)) / 1e4
        raise ValueError(f"target_bits_per_weight={target} is out of reach: the least is {bits}.")
    budget = int(target * entries / 8) + 1
    while budget > least and average(budget) > target:  # as the report will round it
        budget -= 1
    return allocate(sizes, errors, max(budget, least) - others)


def _within_file(
    target: int, sizes: np.ndarray, errors: np.ndarray, file_bytes: Callable[[list[int]], int]
) -> list[int]:
    """Options whose file has at most `target` bytes.

    The header's size depends on the options by some bytes, so that room for it is found by
    trying: it only grows, and the loop ends.
    """
    rows = np.arange(len(sizes))

    def beside(options: list[int]) -> int:
        """Bytes of the header and of all other leaves."""
        return file_bytes(options) - int(sizes[rows, np.asarray(options, int)].sum())

    least_sum = int(sizes.min(axis=1).sum())
    least = allocate(sizes, errors, least_sum)
    candidates = [least] + [[j] * len(sizes) for j in range(len(_WIDTHS))]
    room = beside(least)
    while target - room >= least_sum:
        candidates.append(allocate(sizes, errors, target - room))
        needed = beside(candidates[-1])
        if needed <= room:
            break
        room = needed
    totals = [file_bytes(options) for options in candidates]
    fitting = [c for c, total in zip(candidates, totals, strict=True) if total <= target]
    if not fitting:
        raise ValueError(f"target_bytes={target:,} is out of reach: the least is {min(totals):,}.")
    return min(fitting, key=lambda options: float(errors[rows, np.asarray(options, int)].sum()))
