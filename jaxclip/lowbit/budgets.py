"""Budgets: a width for each leaf, such that all leaves together fit a number of bytes.

The total error is made small subject to `sum of bytes <= budget`. Each leaf is measured at every
width; only these numbers are needed here, so the leaves may stay on disk.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks
from jaxclip._core.grids import Bits
from jaxclip.lowbit.arrays import QuantizedArray

# The widths that a budget chooses from. One bit is left out: it has no code for 0, so its error
# predicts the loss in accuracy less well.
ALL_WIDTHS: tuple[Bits, ...] = ("ternary", 2, 3, 4, 5, 6, 8)
NARROWEST = ALL_WIDTHS[0]


class Budget(NamedTuple):
    """Largest size of a tree, in one of two units; the other is None.

    Attributes:
      bits_per_weight: Bits of codes and scales for each entry of a low-bit leaf, on average.
      num_bytes: Bytes of the file.
    """

    bits_per_weight: float | None = None
    num_bytes: int | None = None


class Option(NamedTuple):
    """A leaf at one width.

    Attributes:
      outline: The low-bit array with shapes for arrays; codes of all widths would fill memory.
      num_bytes: Bytes that it takes in a file, without the header.
      error: Its squared error; infinite if it takes no less than the leaf.
    """

    outline: QuantizedArray
    num_bytes: int
    error: float


def option_of(low_bit: QuantizedArray, error: float) -> Option:
    """Returns a leaf at one width, of this squared error."""
    num_bytes = low_bit.num_bytes
    is_smaller = num_bytes < math.prod(low_bit.shape) * jnp.dtype(low_bit.dtype).itemsize
    return Option(outline_of(low_bit), num_bytes, error if is_smaller else math.inf)


def check_budget(
    bits: Bits | None, bits_per_weight: float | None, num_bytes: int | None = None
) -> Budget | None:
    """Returns the given budget, or None; raises if it is not a size, or not given alone."""
    targets = {"target_bits_per_weight": bits_per_weight, "target_bytes": num_bytes}
    given = {n: v for n, v in {"bits": bits, **targets}.items() if v is not None}
    if len(given) > 1:
        raise TypeError(f"only one of bits and the targets may be given, got {given}.")
    if bits_per_weight is not None:
        if isinstance(bits_per_weight, jax.Array):
            bits_per_weight = float(bits_per_weight.item())
        checks.check_positive("target_bits_per_weight", bits_per_weight)
        return Budget(bits_per_weight=float(bits_per_weight))
    if num_bytes is not None:
        checks.check_count("target_bytes", num_bytes)
        # No file has more, and no float holds 10**400.
        return Budget(num_bytes=min(int(num_bytes), sys.maxsize))
    return None


def outline_of(leaf: QuantizedArray) -> QuantizedArray:
    """Returns a low-bit array with shapes for arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaf)


def widths_within_average(
    bits_per_weight: float,
    measured: Sequence[Sequence[Option]],
    fixed: Sequence[QuantizedArray],
) -> list[Bits]:
    """Returns the widths of the measured leaves; `fixed` leaves share the budget."""
    sizes, errors = _tables(measured)
    outlines = [*fixed, *(options[0].outline for options in measured)]
    num_entries = sum(math.prod(leaf.shape) for leaf in outlines)
    fixed_bytes = sum(leaf.num_bytes for leaf in fixed)

    def average(num_bytes: int) -> float:
        return 8 * num_bytes / max(num_entries, 1)

    least_bytes = int(sizes.min(axis=1).sum()) + fixed_bytes
    if average(least_bytes) > bits_per_weight:
        least = math.ceil(1e4 * average(least_bytes)) / 1e4
        raise ValueError(
            f"target_bits_per_weight={bits_per_weight} is out of reach: the least is {least}."
        )
    max_bytes = int(bits_per_weight * num_entries / 8) + 1
    # The average that a report computes must not exceed the target, not even by rounding.
    while max_bytes > least_bytes and average(max_bytes) > bits_per_weight:
        max_bytes -= 1
    chosen = allocate(sizes, errors, max(max_bytes, least_bytes) - fixed_bytes)
    return [ALL_WIDTHS[i] for i in chosen]


def widths_within_file(
    max_bytes: int,
    measured: Sequence[Sequence[Option]],
    file_bytes: Callable[[list[QuantizedArray]], int],
) -> list[Bits]:
    """Returns widths whose file has at most `max_bytes`; `file_bytes` gives a file's size."""
    sizes, errors = _tables(measured)
    leaves = np.arange(len(sizes))

    def size_of(chosen: list[int]) -> int:
        return file_bytes([m[i].outline for m, i in zip(measured, chosen, strict=True)])

    def bytes_of_the_rest(chosen: list[int]) -> int:
        return size_of(chosen) - int(sizes[leaves, np.asarray(chosen, int)].sum())

    least_bytes = int(sizes.min(axis=1).sum())
    candidates = [allocate(sizes, errors, least_bytes)]
    candidates += [[i] * len(sizes) for i in range(len(ALL_WIDTHS))]
    # The header's size depends on the widths by some bytes. `set_aside` only grows, so the loop
    # ends.
    set_aside = bytes_of_the_rest(candidates[0])
    while max_bytes - set_aside >= least_bytes:
        candidates.append(allocate(sizes, errors, max_bytes - set_aside))
        needed = bytes_of_the_rest(candidates[-1])
        if needed <= set_aside:
            break
        set_aside = needed
    totals = [size_of(chosen) for chosen in candidates]
    fitting = [c for c, total in zip(candidates, totals, strict=True) if total <= max_bytes]
    if not fitting:
        raise ValueError(
            f"target_bytes={max_bytes:,} is out of reach: the least is {min(totals):,}."
        )
    best = min(fitting, key=lambda chosen: float(errors[leaves, np.asarray(chosen, int)].sum()))
    return [ALL_WIDTHS[i] for i in best]


def _tables(measured: Sequence[Sequence[Option]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns bytes and errors, in shape (leaves, widths)."""
    sizes = [[option.num_bytes for option in options] for options in measured]
    errors = [[option.error for option in options] for options in measured]
    shape = (len(measured), len(ALL_WIDTHS))  # also without leaves
    return np.asarray(sizes, np.int64).reshape(shape), np.asarray(errors, float).reshape(shape)


# --- Allocation: Shoham and Gersho, 1988, https://doi.org/10.1109/29.90373 -------------


def hull_steps(sizes: np.ndarray, errors: np.ndarray) -> list[tuple[float, int]]:
    """Returns the lower convex hull of (bytes, error), as (error saved per byte, option)."""
    hull: list[tuple[float, int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], errors[i])):
        if hull and errors[i] >= errors[hull[-1][1]]:
            continue  # more bytes for nothing
        saved = math.inf  # of the option with the least bytes
        while hull:
            previous = hull[-1][1]
            saved = float((errors[previous] - errors[i]) / (sizes[i] - sizes[previous]))
            if saved < hull[-1][0]:
                break
            hull.pop()  # it is above the line from its predecessor to this option
        hull.append((saved, i))
    return hull


def allocate(sizes: np.ndarray, errors: np.ndarray, budget: int) -> list[int]:
    """Returns an option for each leaf that together fit the budget, of low total error."""
    # The error exceeds the optimum by less than the error that one step of a hull saves. It is
    # no larger than with the same option for all leaves.
    num_leaves, num_options = sizes.shape
    hulls = [hull_steps(*leaf) for leaf in zip(sizes, errors, strict=True)]
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
            chosen[leaf] = option
            spent += more
    # A hull's coarse steps can leave bytes unused that one option for all leaves would use.
    uniform = [[i] * num_leaves for i in range(num_options) if sizes[:, i].sum() <= budget]
    return min(
        [chosen, *uniform],
        key=lambda options: float(errors[leaves, np.asarray(options, int)].sum()),
    )
