"""The invariants that every transform keeps, drawn: what goes in, what comes out.

I1 finite, I2 bounded in norm, I3 of the right direction, I4 untouched below the threshold,
I5 bounded entry by entry, I9 signs. A transform is covered by its row in the table of
`test_transform_laws.py`. The oracle is exact: Python fractions, or longdouble.

What a transform cannot keep is said in `EXCEPTIONS`, in words.
"""

from fractions import Fraction
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from drawn_trees import (
    ROWS,
    Width,
    bits_of,
    both_widths,
    every_row,
    fields_of,
    first_state,
    flushed,
    is_finite,
    moduli_squared,
    norm_of,
    norm_squared,
    parts_of,
    real_part_of,
    run,
    settings_of,
    some_examples,
    tiny_of,
    trees,
)
from hypothesis import given
from hypothesis import strategies as st
from test_transform_laws import Row

ENTRIES_NOT_COUNTED = (
    "a threshold that is zero or subnormal may zero subnormal entries, and complex entries "
    "within ulps of the threshold may lose ulps, without being counted as clipped"
)
EXCEPTIONS = {
    "I2": {
        "clip_by_leaf_norm": "bounds the norm of each leaf, which is what is tested",
        "clip_by_spectral_norm": "bounds another norm, softly: see `test_spectra.py`",
        "all": (
            "a tree whose norm is within NORM_ROUNDING of the threshold is clipped or passed "
            "as its norm comes out, rounded; passed, it may be above by as much; and a tree of "
            "nothing but numbers that the backend flushes has norm 0 and is always passed"
        ),
    },
    "I3": {
        "all": (
            "where the sum of squares may overflow (from a norm of 2**64 on, of a unit from 2**38 "
            "on), entries are scaled down first: those below RESCALED_TO_ZERO of the norm become "
            "0, which turns the direction by far less than an ulp"
        ),
    },
    "I4": {
        "all": "the same: within NORM_ROUNDING below the threshold a tree may be clipped",
        "clip_by_value": ENTRIES_NOT_COUNTED,
        "clip_spikes": ENTRIES_NOT_COUNTED,
    },
}
# Relative rounding of a float32 norm, and of a float64 one.
NORM_ROUNDING = {False: 1e-6, True: 2e-15}
OF_EACH_LEAF = ("clip_by_leaf_norm", "adagc")  # with float32 leaves beside float64 ones
# Share of the norm below which an entry is lost where the squares overflow.
RESCALED_TO_ZERO = {False: 2.0**-99, True: 2.0**-993}
UNIT_RESCALED_TO_ZERO = 2.0**-73
with_norm_bound = pytest.mark.parametrize(
    "row",
    [r for n, r in ROWS.items() if r.parameter == "max_norm" and n != "clip_by_spectral_norm"],
    ids=lambda r: r.factory.__name__,
)
with_entry_bound = pytest.mark.parametrize(
    "row", [r for r in ROWS.values() if r.parameter == "max_abs"], ids=lambda r: r.factory.__name__
)
with_direction = pytest.mark.parametrize(
    "row",
    [r for name, r in ROWS.items() if name.startswith("scale_by_") or name == "majority_vote"],
    ids=lambda r: r.factory.__name__,
)


def excepted(invariant: str, row: Row) -> bool:
    """Whether the row is named under the invariant."""
    return row.factory.__name__ in EXCEPTIONS[invariant]


def norm_rounding(row: Row, width: Width) -> float:
    """Relative rounding of the norms that a transform takes."""
    return NORM_ROUNDING[width.has_x64 and row.factory.__name__ not in OF_EACH_LEAF]


def bounded_parts(row: Row, tree: Any) -> list[Any]:
    """What a bound on the norm is on: the whole tree, or each leaf."""
    return jax.tree.leaves(tree) if excepted("I2", row) else [tree]


def draw_steps(data: Any, row: Row, width: Width, num_steps: int = 2) -> tuple[Any, Any, list[Any]]:
    """A hyper-parameter, parameters, and the gradients of some steps."""
    grads = [data.draw(trees(row, width)) for _ in range(num_steps)]
    return data.draw(settings_of(row, width, grads[-1])), data.draw(trees(row, width)), grads


# --- I1 -------------------------------------------------------------------------------


@pytest.mark.thorough
@every_row
@both_widths
@some_examples
@given(data=st.data())
def test_finite_gradients_give_finite_updates_and_states(row: Row, width: Width, data: Any):
    value, params, grads = draw_steps(data, row, width)
    for updates, state in run(row, width, value, grads, params):
        assert is_finite(updates)
        assert all(int(n) == 0 for n in fields_of(state, "num_nonfinite"))
        assert is_finite(state)


# --- I2 -------------------------------------------------------------------------------


@pytest.mark.thorough
@with_norm_bound
@both_widths
@some_examples
@given(data=st.data())
def test_the_norm_is_at_most_the_threshold_in_exact_arithmetic(row: Row, width: Width, data: Any):
    value, params, grads = draw_steps(data, row, width)
    if value == np.inf:
        return
    slack = 1 + Fraction(norm_rounding(row, width))
    for g, (updates, _) in zip(grads, run(row, width, value, grads, params), strict=True):
        before, after = bounded_parts(row, g), bounded_parts(row, updates)
        for b, a in zip(before, after, strict=True):
            bound = Fraction(float(value))
            if bits_of(a) == bits_of(b):  # passed
                a, bound = jax.tree.map(flushed, a), bound * slack
            assert norm_squared(a) <= bound**2


# --- I3 -------------------------------------------------------------------------------


@pytest.mark.thorough
@with_norm_bound
@both_widths
@some_examples
@given(data=st.data())
def test_a_clip_by_norm_is_one_exact_coefficient(row: Row, width: Width, data: Any):
    value, params, (grads,) = draw_steps(data, row, width, 1)
    ((updates, _),) = run(row, width, value, [grads], params)
    # A threshold that is subnormal where the norm is computed counts as 0.
    is_double = width.has_x64
    floor = tiny_of(np.float64 if is_double else np.float32)
    bound = np.longdouble(value if value >= floor else 0)
    before, after = bounded_parts(row, grads), bounded_parts(row, updates)
    for b, a in zip(before, after, strict=True):
        norm = norm_of(jax.tree.map(flushed, b))
        if bits_of(a) == bits_of(b):
            assert norm <= bound * (1 + np.longdouble(norm_rounding(row, width)))
            continue
        coef = bound / norm if norm > 0 else np.longdouble(0)
        for x, y in zip(jax.tree.leaves(b), jax.tree.leaves(a), strict=True):
            info = ml_dtypes.finfo(real_part_of(x.dtype))
            # One rounding towards zero, and the margin that keeps the norm below the bound.
            is_exact = is_double and row.factory.__name__ not in OF_EACH_LEAF
            relative = 2 * float(info.eps) + 32 * (2.0**-52 if is_exact else 2.0**-23)
            absolute = 2 * max(float(info.smallest_subnormal), tiny_of(x.dtype))
            is_of_unit = row.factory.__name__ in OF_EACH_LEAF
            lost = UNIT_RESCALED_TO_ZERO if is_of_unit else RESCALED_TO_ZERO[is_double]
            absolute = absolute + bound * lost
            expected = flushed(x) * coef
            assert np.all(np.abs(parts_of(y) - expected) <= relative * np.abs(expected) + absolute)


# --- I4 -------------------------------------------------------------------------------


@pytest.mark.thorough
@every_row
@both_widths
@some_examples
@given(data=st.data())
def test_what_a_clip_says_it_has_not_clipped_is_bit_identical(row: Row, width: Width, data: Any):
    if not fields_of(first_state(row, width), "clip_rate"):
        return
    value, params, grads = draw_steps(data, row, width)
    for g, (updates, state) in zip(grads, run(row, width, value, grads, params), strict=True):
        # A share of the last step's entries or of all steps so far: 0 is not clipped.
        if any(fields_of(state, "clip_rate")) or any(fields_of(state, "num_skipped")):
            continue
        if not excepted("I4", row):
            assert bits_of(updates) == bits_of(g)
            continue
        for before, after in zip(jax.tree.leaves(g), jax.tree.leaves(updates), strict=True):
            is_lost = (flushed(before) == 0) & (parts_of(after) == 0)
            is_same = parts_of(before) == parts_of(after)
            if before.dtype.kind == "c":
                error = np.abs(parts_of(after) - parts_of(before))
                is_same |= error <= 8 * np.finfo(before.dtype).eps * np.abs(parts_of(before))
            assert np.all(is_same | is_lost)


@pytest.mark.thorough
@with_norm_bound
@both_widths
@some_examples
@given(data=st.data(), excess=st.sampled_from([0.0, 1.0, np.inf]))
def test_gradients_below_the_threshold_are_bit_identical(
    row: Row, width: Width, data: Any, excess: float
):
    grads, params = data.draw(trees(row, width)), data.draw(trees(row, width))
    with np.errstate(over="ignore"):
        rounding = np.longdouble(norm_rounding(row, width))
        value = norm_of(grads) * (1 + rounding) * (1 + excess) if excess < np.inf else excess
        value = (np.float64 if width.has_x64 else np.float32)(value)
    ((updates, _),) = run(row, width, value, [grads], params)
    assert bits_of(updates) == bits_of(grads)


# --- I5 -------------------------------------------------------------------------------


@pytest.mark.thorough
@with_entry_bound
@both_widths
@some_examples
@given(data=st.data())
def test_entries_are_at_most_the_threshold_and_untouched_within(row: Row, width: Width, data: Any):
    value, params, grads = draw_steps(data, row, width)
    for g, (updates, _) in zip(grads, run(row, width, value, grads, params), strict=True):
        for before, after in zip(jax.tree.leaves(g), jax.tree.leaves(updates), strict=True):
            if value == np.inf:
                assert bits_of(before) == bits_of(after)
                continue
            square = Fraction(float(value)) ** 2
            assert all(m <= square for m in moduli_squared(after))
            is_complex = before.dtype.kind == "c"
            room = (1 - 8 * Fraction(float(np.finfo(before.dtype).eps))) ** 2 if is_complex else 1
            is_within = np.array([m <= square * room for m in moduli_squared(before)])
            # A threshold of 0 in the leaf's dtype gives 0 also for -0 and subnormals.
            smallest = float(ml_dtypes.finfo(real_part_of(before.dtype)).smallest_subnormal)
            if value >= max(smallest, tiny_of(before.dtype)):
                assert before[is_within].tobytes() == after[is_within].tobytes()


# --- I9 -------------------------------------------------------------------------------


@pytest.mark.thorough
@with_direction
@both_widths
@some_examples
@given(data=st.data())
def test_directions_are_signs(row: Row, width: Width, data: Any):
    grads, params = data.draw(trees(row, width)), data.draw(trees(row, width))
    ((updates, _),) = run(row, width, row.value, [grads], params)
    for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True):
        if g.dtype.kind == "c":
            size = np.abs(u.astype(np.complex128))
            is_unit = np.abs(size - 1) <= 4 * np.finfo(g.dtype).eps
            # Zero only where the backend flushes both parts.
            is_tiny = np.abs(g.astype(np.clongdouble)) < 2 * tiny_of(g.dtype) / (1 - row.value)
            assert np.all(is_unit | ((size == 0) & is_tiny))
            continue
        u = parts_of(u)
        assert set(u) <= {-1.0, 0.0, 1.0}
        # The first momentum is a share of the gradient: of subnormals it may be zero.
        assert np.all(
            (u == np.sign(parts_of(g)))
            | ((u == 0) & (np.abs(parts_of(g)) < tiny_of(g.dtype) / (1 - row.value)))
        )
        assert not np.any((u != 0) & (parts_of(g) == 0))
