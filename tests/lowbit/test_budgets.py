"""Bytes shared out: against all combinations of options."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip.lowbit.budgets import allocate, hull_steps


@st.composite
def tables(draw):
    """Sizes and errors of a few leaves; errors need not fall with size."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    rows = lambda most: st.lists(  # noqa: E731
        st.integers(0, most), min_size=math.prod(shape), max_size=math.prod(shape)
    )
    sizes, errors = (np.reshape(draw(rows(most)), shape) for most in (12, 30))
    return sizes, errors / 4


def total(table, options):
    return sum(row[option] for row, option in zip(table, options, strict=True))


def best_by_trying_all(sizes, errors, budget):
    combinations = itertools.product(range(sizes.shape[1]), repeat=len(sizes))
    return min(total(errors, c) for c in combinations if total(sizes, c) <= budget)


def lower_hull(sizes, errors):
    """Points that are the best for some price of a byte, by the definition: none is on or above
    a line between two others, and none has an error as low with no more bytes."""
    points = sorted(set(zip(sizes.tolist(), errors.tolist(), strict=True)))
    points = [p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] for q in points if q != p)]
    return [
        p
        for p in points
        if not any(
            a[0] < p[0] < c[0]
            and a[1] + (c[1] - a[1]) * (p[0] - a[0]) / (c[0] - a[0]) <= p[1] + 1e-12
            for a, c in itertools.product(points, points)
        )
    ]


def random_tables(seed):
    rng = np.random.default_rng(seed)
    sizes = np.sort(rng.integers(1, 60, (4, 5)), axis=1)
    return sizes, -np.sort(-rng.exponential(1, (4, 5)), axis=1)


@given(tables())
def test_the_hull_is_that_of_its_definition_and_a_byte_saves_less_from_step_to_step(tables):
    for sizes, errors in zip(*tables, strict=True):
        steps = hull_steps(sizes, errors)
        assert [(sizes[j], errors[j]) for _, j in steps] == lower_hull(sizes, errors)
        saved = [s for s, _ in steps]
        assert saved[0] == math.inf
        assert all(a > b > 0 for a, b in itertools.pairwise(saved))


def check_all_budgets(sizes, errors):
    hulls = [lower_hull(*leaf) for leaf in zip(sizes, errors, strict=True)]
    drops = [a[1] - b[1] for hull in hulls for a, b in itertools.pairwise(hull)]
    for budget in range(int(sizes.min(1).sum()), int(sizes.max(1).sum()) + 1):
        options = allocate(sizes, errors, budget)
        assert total(sizes, options) <= budget
        error, best = total(errors, options), best_by_trying_all(sizes, errors, budget)
        assert error <= best + max(drops, default=0) + 1e-9
        for j in range(sizes.shape[1]):
            if sizes[:, j].sum() <= budget:
                assert error <= errors[:, j].sum() + 1e-9
    assert error == pytest.approx(errors.min(1).sum())  # where all fits


@given(tables())
def test_the_budget_holds_and_the_error_is_within_one_step_of_the_optimum(tables):
    check_all_budgets(*tables)


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_that_the_steps_fill_exactly_gives_the_optimum(seed):
    sizes, errors = random_tables(seed)
    hulls = [hull_steps(*leaf) for leaf in zip(sizes, errors, strict=True)]
    steps = sorted(
        (-saved, i, place)
        for i, hull in enumerate(hulls)
        for place, (saved, _) in enumerate(hull)
        if place
    )
    options = [hull[0][1] for hull in hulls]
    for _, i, place in steps[:8]:
        options[i] = hulls[i][place][1]
        budget = int(total(sizes, options))
        best = best_by_trying_all(sizes, errors, budget)
        assert total(errors, allocate(sizes, errors, budget)) == pytest.approx(best)


def test_a_hand_worked_table():
    # Slopes: leaf 0 saves 5, then 1.5 a byte; leaf 1 saves 1, then 0.25.
    sizes, errors = np.array([[1, 2, 4]] * 2), np.array([[9.0, 4.0, 1.0], [2.0, 1.0, 0.5]])
    chosen = {2: [0, 0], 3: [1, 0], 4: [1, 1], 5: [2, 0], 6: [2, 1], 7: [2, 1], 8: [2, 2]}
    assert {budget: allocate(sizes, errors, budget) for budget in chosen} == chosen


def test_one_option_for_all_is_taken_where_the_hull_leaves_bytes_unused():
    # Option 1 of leaf 1 lies above its hull, and the step to option 2 does not fit.
    sizes = np.array([[0, 4, 5], [0, 4, 9]])
    errors = np.array([[9.0, 1.0, 0.9], [9.0, 8.0, 0.0]])
    assert [option for _, option in hull_steps(sizes[1], errors[1])] == [0, 2]
    assert allocate(sizes, errors, 8) == [1, 1]


def test_a_budget_below_the_least_bytes_is_refused_with_the_least():
    with pytest.raises(ValueError, match=r"budget must be at least 3.*got 2"):
        allocate(np.array([[1, 5], [2, 6]]), np.array([[1.0, 0.0]] * 2), 2)


def test_no_leaves_take_no_bytes():
    assert allocate(np.zeros((0, 7), int), np.zeros((0, 7)), 0) == []
