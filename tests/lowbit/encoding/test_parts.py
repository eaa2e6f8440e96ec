"""Tests of `lowbit.parts`: every entry has one place, and rows are those that share a scale."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jaxclip import Grid
from jaxclip.lowbit.encoding.parts import parts_of

SHAPES = [(), (1,), (200,), (3, 70), (70, 3), (5, 4, 65), (3, 3, 2, 8), (1, 300), (130, 130)]


@st.composite
def shapes_and_grids(draw):
    shape = draw(st.sampled_from(SHAPES))
    axes = st.sampled_from([None, *range(-len(shape), 0)]) if len(shape) > 1 else st.none()
    size = st.sampled_from([None, 1, 3, 64, 100, 128, 129, 5000])
    return shape, Grid(4, axis=draw(axes), group_size=draw(size))


def slabs_of(array, parts):
    """All slabs of an array with -1 as padding, and their places."""
    for places in parts.places():
        for place in places:
            slab = np.full(parts.part_shape[1:3], -1.0)
            for source, target in parts.pairs(parts.matrix(array), slab, place):
                target[...] = source
            yield slab, place


@settings(max_examples=60)
@given(shapes_and_grids())
def test_every_entry_has_one_place_and_comes_back(shape_and_grid):
    shape, grid = shape_and_grid
    parts = parts_of(shape, grid)
    array = np.arange(int(np.prod(shape)), dtype=np.float64).reshape(shape)
    entries = np.concatenate([slab[slab >= 0] for slab, _ in slabs_of(array, parts)])
    np.testing.assert_array_equal(np.sort(entries), array.reshape(-1))
    codes, matrix = parts.empty_codes()
    values = array.astype(np.int8)
    for slab, place in slabs_of(values, parts):
        for target, source in parts.pairs(matrix, slab, place):
            target[...] = source
    np.testing.assert_array_equal(codes, values)


@settings(max_examples=60)
@given(shapes_and_grids())
def test_a_row_has_the_entries_that_share_a_scale(shape_and_grid):
    shape, grid = shape_and_grid
    parts = parts_of(shape, grid)
    blocks = np.arange(parts.num_channels * parts.num_groups, dtype=np.float64)
    scales = parts.as_scales(blocks.reshape(parts.num_channels, parts.num_groups))
    assert scales.shape == grid.scale_shape(shape)
    array = np.broadcast_to(grid.expand_with(np, scales, shape), shape)
    for slab, place in slabs_of(np.array(array), parts):
        rows = slab[: place.num_rows * parts.row_pieces].reshape(place.num_rows, -1)
        expected = blocks.reshape(parts.num_channels, -1)[place.channels, place.groups]
        for row, block, count in zip(rows, expected.reshape(-1), parts.counts(place), strict=True):
            np.testing.assert_array_equal(row[row >= 0], np.full(count, block))


@pytest.mark.parametrize("axis", [0, 1])
def test_few_shapes_of_parts_serve_arrays_of_every_shape(axis):
    shapes = [(n, m) for n in (3, 64, 65, 700, 4096) for m in (5, 64, 300, 1536)]
    for size, most in ((32, 1), (64, 1), (None, 2)):
        grid = Grid(4, axis=axis, group_size=size)
        found = {parts_of(shape, grid).part_shape for shape in shapes}
        # An array whose channels are no longer than a group has channels as rows.
        assert len(found) <= most + (size is not None), found
