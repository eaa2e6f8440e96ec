"""Views of weights as matrices, and moments that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import checkpoints
from jaxclip.lowbit.rounding.moments import Calibration, InputMoments, MatrixView

CONVOLUTION = MatrixView((3, 2, 4, 5), (), (0, 1, 2), (3,))
GROUPED = MatrixView((3, 4, 2, 5), (2,), (0, 1), (3,))  # (height, in a group, groups, out a group)
EXPERTS = MatrixView((6, 4, 5), (0,), (2,), (1,))


@pytest.mark.parametrize("view", [CONVOLUTION, GROUPED, EXPERTS])
def test_fold_is_the_inverse_of_unfold(view):
    array = np.arange(np.prod(view.shape)).reshape(view.shape)
    assert view.unfold(array).shape == view.matrix_shape
    np.testing.assert_array_equal(view.fold(view.unfold(array), array.shape), array)


def test_a_matrix_of_the_view_is_what_inputs_are_multiplied_by():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(6, 4, 5)), rng.normal(size=(6, 7, 5))
    np.testing.assert_allclose(x @ EXPERTS.unfold(w), np.einsum("snk,sok->sno", x, w), rtol=1e-12)


def test_a_view_names_each_axis_once():
    with pytest.raises(ValueError, match=r"axes of \(2, 3\), each once, got \(\), \(0,\) and"):
        MatrixView((2, 3), (), (0,), (0,))


def test_moments_of_parts_add_up_and_refuse_another_view():
    view = MatrixView((3, 2), (), (0,), (1,))
    x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)

    def moments(part):
        return InputMoments(
            jnp.asarray(part.T @ part)[None],
            jnp.asarray(part.sum(0))[None],
            jnp.full(1, len(part)),
            view,
        )

    both, whole = moments(x[:4]) + moments(x[4:]), moments(x)
    np.testing.assert_allclose(both.second, whole.second, rtol=1e-5)
    assert both.count == 10
    other = MatrixView((3, 2), (), (1,), (0,))
    with pytest.raises(ValueError, match="the same view"):
        moments(x) + InputMoments(whole.second, whole.first, whole.count, other)


def test_a_calibration_is_saved_and_loaded_as_a_tree(tmp_path):
    rng = np.random.default_rng(0)

    def moments(view, *, is_diagonal=False):
        stack, inputs, _ = view.matrix_shape
        second = rng.normal(size=(stack, inputs) if is_diagonal else (stack, inputs, inputs))
        return InputMoments(second, rng.normal(size=(stack, inputs)), np.full(stack, 7.0), view)

    c = Calibration(
        {"a/kernel": moments(GROUPED), "b": moments(EXPERTS, is_diagonal=True)},
        {"a/kernel": np.float32(3.0)},
        missing=("c",),
        notes=(("c", "not used"), ("b", "also looked up by index, which is not counted")),
    )
    file = tmp_path / "c.safetensors"
    checkpoints.save(file, c.to_tree())
    loaded = Calibration.from_tree(checkpoints.load(file))
    assert jax.tree.structure(loaded) == jax.tree.structure(c)  # views, missing, notes
    assert list(loaded.moments) == list(c.moments)
    jax.tree.map(np.testing.assert_array_equal, loaded, c)
    for tree in ({}, {"about": np.zeros(3, np.uint8)}, {**c.to_tree(), "moments": {}}):
        with pytest.raises(ValueError, match="tree must be what"):
            Calibration.from_tree(tree)


@pytest.mark.parametrize(
    ("split", "shape", "is_of"),
    [
        ((3, 4, 2, 5), (3, 4, 10), True),
        ((3, 4, 2, 5), (3, 4, 2, 5), True),
        ((3, 4, 2, 5), (12, 10), True),
        ((3, 4, 1, 5), (3, 4, 5), True),
        ((3, 4, 10), (3, 4, 2, 5), False),
        ((3, 4, 10), (4, 3, 10), False),
        ((3, 4), (3,), False),
        ((3, 4), (3, 4, 1), True),
    ],
)
def test_a_view_is_of_an_array_whose_axes_it_keeps_or_splits(split, shape, is_of):
    axes = tuple(range(len(split)))
    assert MatrixView(split, (), axes[:1], axes[1:]).is_of(shape) == is_of


def test_the_report_has_a_row_for_each_weight():
    ones = np.ones((2, 12), np.float32)
    grouped = InputMoments(np.ones((2, 12, 12)), ones, np.full(2, 1500.0), GROUPED)
    c = Calibration({"a": grouped}, missing=("b",), notes=(("b", "not used"),))
    lines = [line.split() for line in str(c).splitlines()]
    assert lines[0] == ["weight", "inputs", "moments", "samples", "note"]
    assert lines[1] == ["a", "2", "x", "12", "whole", "1,500"]
    assert lines[2] == ["b", "none", "not", "used"]
