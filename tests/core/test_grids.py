"""Code ranges and the blocks that share a scale."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip._core.grids import Grid, as_grid, code_range

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
    assert code_range(bits, levels="narrow") == narrow


@pytest.mark.parametrize("bits", UNKNOWN_BITS, ids=repr)
def test_unknown_bits_are_refused_with_the_allowed_list(bits):
    with pytest.raises(ValueError, match=r"bits must be one of \[1, 'ternary', 2, 3, 4, 5, 6, 8\]"):
        code_range(bits)


@pytest.mark.parametrize("axis", ["0", 1.0, True, [0], (0, 1.0), (None,), (0, None)], ids=repr)
def test_an_axis_that_is_no_integer_is_refused_when_made(axis):
    with pytest.raises(TypeError, match="axis must be"):
        Grid(4, axis=axis)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"], ids=repr)
def test_a_group_size_that_is_no_count_is_refused_when_made(size):
    with pytest.raises(ValueError, match="group_size must be"):
        Grid(4, group_size=size)


@pytest.mark.parametrize("size", [np.uint8(4), np.int64(4)], ids=repr)
def test_a_group_size_of_numpy_is_one_of_python(size):
    grid = Grid(4, axis=np.int64(0), group_size=size)
    assert grid == Grid(4, axis=0, group_size=4)
    assert grid.scale_shape((3, 300)) == (3, 75)


@pytest.mark.parametrize("axis", [2, -3, (0, 5)])
def test_an_axis_that_the_array_does_not_have_is_refused(axis):
    with pytest.raises(ValueError, match=r"axis must be in \[-2, 2\)"):
        Grid(4, axis=axis).split(jnp.zeros((2, 3)))


def test_groups_need_an_axis_that_is_not_a_channel():
    with pytest.raises(ValueError, match="group_size=2"):
        Grid(4, axis=(0, 1), group_size=2).split(jnp.zeros((2, 3)))


def block_of_each_entry(shape, axis, group_size):
    """An independent reading of the module's docstring: a label for each entry."""
    ndim = len(shape)
    axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    channels = {a % ndim for a in axes} if ndim else set()
    labels = np.zeros(shape, dtype=object)
    if group_size is not None and axis is None and ndim > 1:
        channels = {0}
    free = [a for a in range(ndim) if a not in channels]
    for index in itertools.product(*map(range, shape)):
        channel = tuple(index[a] for a in sorted(channels))
        if group_size is None or not free:
            labels[index] = channel
        else:
            place = np.ravel_multi_index([index[a] for a in free], [shape[a] for a in free])
            labels[index] = (*channel, int(place) // group_size)
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
    grid = Grid(4, axis=axis, group_size=group_size)
    x = np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(shape)
    blocks, axes = grid.split(jnp.asarray(x))
    sums = grid.compact(jnp.sum(blocks, axis=axes, keepdims=True), len(shape))
    got = np.broadcast_to(grid.expand(sums, shape), shape)
    labels = block_of_each_entry(shape, axis, group_size)
    expected, counts = np.zeros(shape), np.zeros(shape)
    for index in itertools.product(*map(range, shape)):
        same = np.asarray([label == labels[index] for label in labels.ravel()]).reshape(shape)
        expected[index], counts[index] = x[same].sum(), same.sum()
    assert np.array_equal(got, expected)
    per_block = jnp.broadcast_to(
        jnp.asarray(grid.block_counts(shape)),
        jnp.sum(blocks, axis=axes, keepdims=True).shape,
    )
    got_counts = grid.expand(grid.compact(per_block, len(shape)), shape)
    assert np.array_equal(np.broadcast_to(got_counts, shape), counts)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@pytest.mark.parametrize("group_size", [None, 2])
def test_arrays_without_entries_split_and_expand(shape, group_size):
    grid = Grid(4, axis=None, group_size=group_size)
    blocks, axes = grid.split(jnp.zeros(shape))
    sums = grid.compact(jnp.sum(blocks, axis=axes, keepdims=True), len(shape))
    assert jnp.broadcast_to(grid.expand(sums, shape), shape).shape == shape


@given(case=cases())
def test_axes_counted_from_the_end_name_the_same_blocks(case):
    shape, axis, group_size = case
    given_axes = Grid(4, axis=axis, group_size=group_size)
    grid = given_axes.from_the_end(len(shape))
    axes = grid.axis if isinstance(grid.axis, tuple) else (grid.axis,)
    assert all(a is None or a < 0 for a in axes)
    assert type(grid.axis) is type(axis)
    assert grid.channel_axes(len(shape)) == given_axes.channel_axes(len(shape))
    assert grid.group_axes(len(shape)) == given_axes.group_axes(len(shape))
    assert grid.scale_shape(shape) == given_axes.scale_shape(shape)
    assert grid.from_the_end(len(shape)) == grid


@pytest.mark.parametrize("size", [2**63, 10**20, np.uint64(2**63)], ids=repr)
def test_a_group_size_that_no_file_can_hold_is_refused_when_made(size):
    with pytest.raises(ValueError, match="group_size must be at most"):
        Grid(4, group_size=size)


@pytest.mark.parametrize(
    ("shape", "axis", "scales"),
    [
        ((3, 3, 64, 16), -1, (1, 1, 9, 16)),  # flax: height * width * in
        ((16, 64, 3, 3), 0, (16, 1, 1, 9)),  # PyTorch: in * height * width
        ((16, 1, 3, 3), 0, (16, 1, 1, 1)),  # depthwise
        ((8, 32, 16), (0, -1), (8, 1, 16)),  # experts
        ((4, 6, 16), 1, (1, 6, 1)),
        ((4, 8, 32), None, (4, 1, 4)),
    ],
)
def test_groups_run_along_all_inputs_of_an_output_together(shape, axis, scales):
    assert Grid(4, axis=axis, group_size=64).scale_shape(shape) == scales


def test_a_grid_is_a_static_argument_of_jit():
    f = jax.jit(lambda x, g: g.split(x)[0], static_argnums=1)
    assert f(jnp.zeros((2, 5)), Grid(4, axis=0, group_size=2)).shape == (2, 3, 2)
    assert hash(Grid(4, axis=0, group_size=2)) == hash(Grid(4, axis=0, group_size=2))


@pytest.mark.parametrize("dtype", [jnp.float16, np.dtype("float16"), np.float16, "float16"])
def test_dtypes_name_formats(dtype):
    assert Grid(4, scale_dtype=dtype) == Grid(4, scale_dtype="float16")


@pytest.mark.parametrize("bad", ["log", "int8", jnp.int8, np.float64, None, 8, True], ids=repr)
def test_what_is_no_format_is_refused_with_the_list(bad):
    with pytest.raises(ValueError, match=r"scale_dtype must be one of \['float32', 'float16'"):
        Grid(4, scale_dtype=bad)


def test_one_bit_has_no_zero_point():
    with pytest.raises(ValueError, match="zero_point needs a code for 0, but a 1-bit grid has"):
        Grid(1, zero_point=True)


@pytest.mark.parametrize("bad", [0, 1, None, "yes"], ids=repr)
def test_a_zero_point_that_is_no_bool_is_refused(bad):
    with pytest.raises(TypeError, match="zero_point must be True or False"):
        Grid(4, zero_point=bad)


@pytest.mark.parametrize("bad", ["wide", True, None], ids=repr)
def test_unknown_levels_are_refused_with_the_allowed_list(bad):
    with pytest.raises(ValueError, match=r"levels must be one of \['full', 'narrow', 'balanced'\]"):
        Grid(4, levels=bad)


@pytest.mark.parametrize("bits", [b for b in UNKNOWN_BITS if b is not None], ids=repr)
def test_a_grid_of_unknown_bits_is_refused_when_made(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        Grid(bits)


def test_a_bare_width_is_a_grid_with_the_axis_of_the_function():
    assert as_grid("ternary", axis=0) == Grid("ternary", axis=0)
    assert as_grid(Grid(4, group_size=2), axis=0) == Grid(4, axis="outputs", group_size=2)
    for bits in (None, Grid(None)):
        with pytest.raises(ValueError, match="bits must be one of"):
            as_grid(bits, axis=0)


def test_a_grid_passes_through_jit_as_a_static_value():
    scales = jax.jit(lambda grid: jnp.zeros(grid.scale_shape((4, 6))))
    assert scales(Grid(4)).shape == (1, 6)
    assert scales(Grid(4, axis=0, group_size=2)).shape == (4, 3)
    assert jax.tree.leaves(Grid(4)) == []
