"""Bytes shared out where they lower the error most.

Leaf i stored at option j takes `sizes[i, j]` bytes and has squared error `errors[i, j]`. Wanted
is an option for each leaf of least total error within a budget of bytes: a knapsack. Of each
leaf only the options on its lower convex hull are steps worth taking, and along a hull the error
that a byte saves only falls. So the steps of all leaves, sorted by error saved a byte, are taken
as long as they fit.

The steps up to the first that does not fit, with a fraction of that one, are the best even if
options could be mixed. So the total is at most what that one step saves above the optimum, and
is the optimum where it fits exactly.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["allocate", "hull_steps"]


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
