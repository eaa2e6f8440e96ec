"""Targets: the width of each leaf, so that all together take no more than they may.

How a leaf's error falls with its bytes is measured at every width; `allocation` shares the
bytes out. What is needed of a tree here are numbers, so that its leaves may lie on disk.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxclip._core import checks
from jaxclip.lowbit.arrays import QuantizedArray

# What a target chooses from. One bit is left out: without a code for 0 its error tells less
# of what a network loses.
ALL_WIDTHS = ("ternary", 2, 3, 4, 5, 6, 8)


class Target(NamedTuple):
    """What a tree may take.

    Attributes:
      name: "target_bits_per_weight" or "target_bytes".
      value: Its value.
    """

    name: str
    value: float


class Option(NamedTuple):
    """A leaf at one width.

    Attributes:
      outline: The low-bit array with shapes for arrays.
      num_bytes: What it takes in a file, without the header.
      error: Its squared error.
    """

    outline: QuantizedArray
    num_bytes: int
    error: float


def check_target(bits: Any, bits_per_weight: Any, num_bytes: Any) -> Target | None:
    """Returns the target that is given, or None; raises if it is no size or not alone.

    Args:
      bits: One width for all leaves, or None.
      bits_per_weight: A number in (0, inf), or None.
      num_bytes: An integer of at least 1, or None.

    Raises:
      TypeError: If more than one is given, or one is of a wrong type.
      ValueError: If one is out of range.

    Example:
      >>> check_target(None, 2.5, None)
      Target(name='target_bits_per_weight', value=2.5)
    """
    targets = {"target_bits_per_weight": bits_per_weight, "target_bytes": num_bytes}
    given = {n: v for n, v in {"bits": bits, **targets}.items() if v is not None}
    if len(given) > 1:
        raise TypeError(f"only one of bits and the targets may be given, got {given}.")
    if bits_per_weight is not None:
        if isinstance(bits_per_weight, jax.Array):
            bits_per_weight = bits_per_weight.item()
        checks.check_positive("target_bits_per_weight", bits_per_weight)
        return Target("target_bits_per_weight", float(bits_per_weight))
    if num_bytes is not None:
        checks.check_count("target_bytes", num_bytes)
        return Target("target_bytes", int(num_bytes))
    return None


def outline_of(leaf: QuantizedArray) -> QuantizedArray:
    """Returns a low-bit array with shapes for arrays: the codes of all widths would fill memory.

    Args:
      leaf: A low-bit array.

    Example:
      >>> from jaxclip.lowbit.quantizer import quantize
      >>> outline_of(quantize(np.ones(3, np.float32))).qvalue
      ShapeDtypeStruct(shape=(3,), dtype=int8)
    """
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaf)


def choose_widths(
    target: Target,
    measured: Sequence[Sequence[Option]],
    others: Sequence[QuantizedArray],
    file_bytes: Callable[[list[QuantizedArray]], int] | None = None,
) -> list[int]:
    """Returns the place in `ALL_WIDTHS` of each leaf's width, of low total error.

    Args:
      target: What the tree may take.
      measured: For each leaf, its options in the order of `ALL_WIDTHS`.
      others: Low-bit leaves whose width is fixed; shapes suffice.
      file_bytes: The size of the file with these outlines for the leaves; for "target_bytes".

    Raises:
      ValueError: If the target is out of reach; the message has the least.

    Example:
      >>> choose_widths(Target("target_bytes", 200), [], [], lambda outlines: 128)
      []
    """
    sizes = np.asarray([[option.num_bytes for option in leaf] for leaf in measured], np.int64)
    errors = np.asarray([[option.error for option in leaf] for leaf in measured], np.float64)
    shape = (len(measured), len(ALL_WIDTHS))  # of no leaves too
    sizes, errors = sizes.reshape(shape), errors.reshape(shape)
    if target.name == "target_bytes":
        assert file_bytes is not None

        def total(options: list[int]) -> int:
            return file_bytes([m[j].outline for m, j in zip(measured, options, strict=True)])

        return _within_file(int(target.value), sizes, errors, total)
    outlines = [*others, *(leaf[0].outline for leaf in measured)]
    entries = sum(math.prod(leaf.shape) for leaf in outlines)
    stored = sum(leaf.num_bytes for leaf in others)
    return _within_average(target.value, sizes, errors, stored, entries)


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
    candidates = [least] + [[j] * len(sizes) for j in range(len(ALL_WIDTHS))]
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


def hull_steps(sizes: Any, errors: Any) -> Iterator[tuple[float, int]]:
    """Yields the options on the lower convex hull of (bytes, error), from the least bytes on.

    Args:
      sizes: Bytes of one leaf's options.
      errors: Their errors.

    Yields:
      Pairs `(saved, option)`: the error that a byte saves over the option before, which
      falls from pair to pair; infinite for the first.

    Example:
      >>> list(hull_steps([1, 2, 3, 4], [9.0, 8.0, 3.0, 2.0]))
      [(inf, 0), (3.0, 2), (1.0, 3)]
    """
    sizes, errors = np.asarray(sizes).tolist(), np.asarray(errors).tolist()
    hull: list[tuple[float, int]] = []
    for j in sorted(range(len(sizes)), key=lambda j: (sizes[j], errors[j])):
        if hull and errors[j] >= errors[hull[-1][1]]:
            continue  # more bytes for nothing
        saved = np.inf
        while hull:
            before = hull[-1][1]
            saved = (errors[before] - errors[j]) / (sizes[j] - sizes[before])
            if saved < hull[-1][0]:
                break
            hull.pop()  # it lies above the line from the one before it to this
        hull.append((saved, j))
    yield from hull


def allocate(sizes: Any, errors: Any, budget: int) -> list[int]:
    """Chooses an option for each leaf, of low total error within a budget of bytes.

    Args:
      sizes: Bytes, integers of shape (leaves, options).
      errors: Errors in the same shape, finite; the total is what counts.
      budget: Bytes that all leaves together may take.

    Returns:
      The option of each leaf. They fit the budget; their error is no larger than that of any
      one option for all leaves that fits; and it exceeds the optimum by less than one step
      saves, as the module's docstring says.

    Raises:
      ValueError: If the least bytes exceed the budget.

    Example:
      >>> allocate([[1, 2, 4], [1, 2, 4]], [[9.0, 4.0, 1.0], [2.0, 1.0, 0.5]], 5)
      [2, 0]

    References:
      Shoham and Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers, 1988,
      https://doi.org/10.1109/29.90373
    """
    sizes, errors = np.asarray(sizes), np.asarray(errors)
    num_leaves, num_options = sizes.shape
    hulls = [list(hull_steps(*leaf)) for leaf in zip(sizes, errors, strict=True)]
    chosen = [hull[0][1] for hull in hulls]
    leaves = np.arange(num_leaves)
    spent = int(sizes[leaves, np.asarray(chosen, int)].sum())
    if spent > budget:
        raise ValueError(f"budget must be at least {spent}, the least bytes, got {budget}.")
    steps = [
        (-saved, leaf, place)
        for leaf, hull in enumerate(hulls)
        for place, (saved, _) in enumerate(hull)
        if place > 0
    ]
    is_full = [False] * num_leaves
    for _, leaf, place in sorted(steps):
        option = hulls[leaf][place][1]
        more = int(sizes[leaf, option] - sizes[leaf, chosen[leaf]])
        is_full[leaf] |= spent + more > budget
        if not is_full[leaf]:
            chosen[leaf], spent = option, spent + more
    # A hull's coarse steps can leave bytes over that one option for all would use.
    uniform = [[j] * num_leaves for j in range(num_options) if sizes[:, j].sum() <= budget]
    return min(
        [chosen, *uniform],
        key=lambda options: float(errors[leaves, np.asarray(options, int)].sum()),
    )
