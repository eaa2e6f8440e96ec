"""However a weight is reshaped, permuted and contracted, its moments give the outputs' energy.

For outputs that are linear in a weight, sum |f(E)|^2 = tr(E^T H E) for every array E in its place.
"""

import itertools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxclip.calibration import MatrixView, measure
from jaxclip.calibration.views import Factor, View, matrix_view, merged


def energy_by_moments(m: Any, error: np.ndarray) -> float:
    matrices = m.view.unfold(error.astype(np.float64))
    return float(np.einsum("sio,sij,sjo->", matrices, np.asarray(m.second, float), matrices))


@st.composite
def uses(draw: Any) -> tuple[tuple[int, ...], list[Any], int, int]:
    """Draws a shape, moves of an array of that shape, and how many axes are stacked and summed."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=2, max_size=5))
    shape, moves = regrouped(draw, factors), []
    current = shape
    for _ in range(draw(st.integers(0, 3))):
        order = draw(st.permutations(range(len(current))))
        current = tuple(current[i] for i in order)
        moves.append(("transpose", tuple(order)))
        current = draw(st.sampled_from(reshapes_of(current)))
        moves.append(("reshape", current))
    num_stacked = draw(st.integers(0, len(current)))
    return shape, moves, num_stacked, draw(st.integers(0, len(current) - num_stacked))


def regrouped(draw: Any, factors: list[int]) -> tuple[int, ...]:
    cuts = sorted(draw(st.sets(st.integers(1, len(factors) - 1), min_size=1, max_size=3)))
    return tuple(math.prod(factors[a:b]) for a, b in itertools.pairwise([0, *cuts, len(factors)]))


def reshapes_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns shapes with an axis split in two, two joined, or one of size 1 inserted."""
    found = [shape, (*shape, 1), (1, *shape)]
    for i, size in enumerate(shape):
        for n in (2, 3):
            if size % n == 0:
                found.append((*shape[:i], n, size // n, *shape[i + 1 :]))
        if i:
            found.append((*shape[: i - 1], shape[i - 1] * size, *shape[i + 1 :]))
    return found


@hypothesis.given(uses(), st.integers(0, 2**16))
def test_moments_give_the_energy_of_the_outputs(use: Any, seed: int):
    shape, moves, num_stacked, num_summed = use
    rng = np.random.default_rng(seed)

    def moved(w: Any) -> Any:
        for name, argument in moves:
            w = getattr(jnp, name)(w, argument)
        return w

    sizes = jnp.shape(moved(np.zeros(shape)))
    batched, summed = range(num_stacked), range(num_stacked, num_stacked + num_summed)
    x = rng.standard_normal((4, *(sizes[i] for i in (*summed, *batched)))).astype(np.float32)
    on_x = [1 + num_summed + i for i in range(num_stacked)]
    numbers = (((tuple(range(1, 1 + num_summed))), tuple(summed)), (tuple(on_x), tuple(batched)))

    def apply(w: Any, x: Any) -> Any:
        return lax.dot_general(x, moved(w), numbers)

    w, error = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    c = measure(apply, w, [x], progress=False)
    if c.missing:  # an axis that joins parts of factors; no axis is in two roles silently
        return
    exact = np.sum(np.square(np.asarray(apply(error, x), np.float64)))
    np.testing.assert_allclose(energy_by_moments(c.moments[""], error), exact, rtol=1e-4)


def test_most_uses_are_followed():
    view = View.of_weight("w", (6, 4))
    for shape in ((24,), (2, 3, 4), (6, 2, 2), (2, 12), (1, 6, 4, 1), (3, 2, 2, 2), (3, 8)):
        there = view.reshaped(shape)
        assert there is not None
        assert there.sizes == shape
        back = there.reshaped((6, 4))
        assert back is not None
        assert tuple(map(merged, back.axes)) == view.axes


def test_a_view_that_joins_parts_of_factors_is_none():
    view = View.of_weight("w", (4, 9)).transposed((1, 0))
    assert view.reshaped((6, 6)) is None


def test_a_matrix_view_names_what_is_left_as_outputs():
    stack, inputs = [Factor(0, 2, 3)], [Factor(1, 1, 2)]
    expected = MatrixView((2, 3, 2, 5, 2), (1,), (4,), (0, 2, 3))
    assert matrix_view((12, 10), stack, inputs) == expected
    with pytest.raises(ValueError, match="axes of"):
        MatrixView((2, 3), (0,), (0,), (1,))
