"""Code ranges and the blocks that share a scale."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip._core.grids import Granularity, code_range

UNKNOWN_BITS = [0, 7, 9, -1, 2.5, 4.0, True, False, "2", "Ternary", "", None, (4,), np.nan]


@pytest.mark.parametrize(
    ("bits", "full", "narrow"),
    [
        (1, (-1, 1), (-1, 1)),
        ("ternary", (-1, 1), (-1, 1)),
        (2, (-2, 1), (-1, 1)),
        (3, (-4, 3), (-3, 3)),
        (4, (-8, 7), (-7, 7)),
        (5, (-16, 15), (-15, 15)),
        (6, (-32, 31), (-31, 31)),
        (8, (-128, 127), (-127, 127)),
    ],
)
def test_code_ranges_are_those_of_the_table(bits, full, narrow):
    assert code_range(bits) == full
    assert code_range(bits, full_signed=False) == narrow


@pytest.mark.parametrize("bits", UNKNOWN_BITS, ids=repr)
def test_unknown_bits_are_refused_with_the_allowed_list(bits):
    with pytest.raises(ValueError, match=r"bits must be one of \[1, 'ternary', 2, 3, 4, 5, 6, 8\]"):
        code_range(bits)


@pytest.mark.parametrize("axis", ["0", 1.0, True, [0], (0, 1.0), (None,), (0, None)], ids=repr)
def test_an_axis_that_is_no_integer_is_refused_when_made(axis):
    with pytest.raises(TypeError, match="axis must be"):
        Granularity(axis)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"], ids=repr)
def test_a_group_size_that_is_no_count_is_refused_when_made(size):
    with pytest.raises(ValueError, match="group_size must be"):
        Granularity(0, size)


@pytest.mark.parametrize("axis", [2, -3, (0, 5)])
def test_an_axis_that_the_array_does_not_have_is_refused(axis):
    with pytest.raises(ValueError, match=r"axis must be in \[-2, 2\)"):
        Granularity(axis).split(jnp.zeros((2, 3)))


def test_groups_need_an_axis_that_is_not_a_channel():
    with pytest.raises(ValueError, match="group_size=2"):
        Granularity((0, 1), 2).split(jnp.zeros((2, 3)))


def block_of_each_entry(shape, axis, group_size):
    """An independent reading of the module's docstring: a label for each entry."""
    ndim = len(shape)
    axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    channels = {a % ndim for a in axes} if ndim else set()
    labels = np.zeros(shape, dtype=object)
    free = [a for a in range(ndim) if a not in channels]
    for index in itertools.product(*map(range, shape)):
        if group_size is None or not free:
            labels[index] = tuple(index[a] for a in sorted(channels))
        else:
            labels[index] = tuple(
                i // group_size if a == free[-1] else i for a, i in enumerate(index)
            )
    return labels


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    ndim = len(shape)
    axes = st.integers(-ndim, ndim - 1)
    axis = draw(st.one_of(st.none(), axes, st.lists(axes, max_size=2).map(tuple))) if ndim else None
    channels = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    has_free = len({a % ndim for a in channels}) < ndim if ndim else True
    group_size = draw(st.one_of(st.none(), st.integers(1, 5))) if has_free else None
    return shape, axis, group_size


@given(case=cases())
def test_entries_share_a_block_exactly_as_documented(case):
    shape, axis, group_size = case
    granularity = Granularity(axis, group_size)
    x = np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)
    blocks, axes = granularity.split(jnp.asarray(x))
    sums = granularity.compact(jnp.sum(blocks, axis=axes, keepdims=True), len(shape))
    got = np.broadcast_to(granularity.expand(sums, shape), shape)
    labels = block_of_each_entry(shape, axis, group_size)
    expected, counts = np.zeros(shape), np.zeros(shape)
    for index in itertools.product(*map(range, shape)):
        same = np.asarray([label == labels[index] for label in labels.ravel()]).reshape(shape)
        expected[index], counts[index] = x[same].sum(), same.sum()
    assert np.array_equal(got, expected)
    per_block = jnp.broadcast_to(
        jnp.asarray(granularity.block_counts(shape)),
        jnp.sum(blocks, axis=axes, keepdims=True).shape,
    )
    got_counts = granularity.expand(granularity.compact(per_block, len(shape)), shape)
    assert np.array_equal(np.broadcast_to(got_counts, shape), counts)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@pytest.mark.parametrize("group_size", [None, 2])
def test_arrays_without_entries_split_and_expand(shape, group_size):
    granularity = Granularity(None, group_size)
    blocks, axes = granularity.split(jnp.zeros(shape))
    sums = granularity.compact(jnp.sum(blocks, axis=axes, keepdims=True), len(shape))
    assert jnp.broadcast_to(granularity.expand(sums, shape), shape).shape == shape


@given(case=cases())
def test_axes_counted_from_the_end_name_the_same_blocks(case):
    shape, axis, group_size = case
    given_axes = Granularity(axis, group_size)
    granularity = given_axes.from_the_end(len(shape))
    axes = granularity.axis if isinstance(granularity.axis, tuple) else (granularity.axis,)
    assert all(a is None or a < 0 for a in axes)
    assert type(granularity.axis) is type(axis)
    assert granularity.channel_axes(len(shape)) == given_axes.channel_axes(len(shape))
    assert granularity.scale_shape(shape) == given_axes.scale_shape(shape)
    assert granularity.from_the_end(len(shape)) == granularity


def test_a_granularity_is_a_static_argument_of_jit():
    f = jax.jit(lambda x, g: g.split(x)[0], static_argnums=1)
    assert f(jnp.zeros((2, 5)), Granularity(0, 2)).shape == (2, 3, 2)
    assert hash(Granularity(0, 2)) == hash(Granularity(0, 2))
