"""Norms of leaves and of units against NumPy, and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.norms.of_units import join_units, leaf_norms, measure_units, unit_axes, unit_norms
from oracles.exact_norms import assert_norm, oracle

every_ord = pytest.mark.parametrize("ord", [1, 2, np.inf])


def test_a_leaf_that_the_compiler_knows_to_be_zero_has_norm_zero():
    for norm in (lambda x: unit_norms(x)[0, 0], leaf_norms):
        assert jax.jit(lambda n=norm: n(jnp.zeros((1, 1))))() == 0


@every_ord
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_leaf_norms_are_the_global_norms_of_the_leaves(ord, scale):
    leaves = {"w": scale * jax.random.normal(jax.random.key(0), (5, 3)), "b": jnp.full(3, 2.0)}
    norms = jax.jit(functools.partial(leaf_norms, ord=ord))(leaves | {"step": jnp.arange(3)})
    assert norms["step"] == 0
    for name, x in leaves.items():
        assert_norm(norms[name], oracle([x], ord), x.size)


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), (0, 2)])
@pytest.mark.parametrize("shape", [(4, 3, 2), (2, 3, 4, 5)])
def test_unit_norms_are_numpys_at_mixed_magnitudes(axis, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x *= np.float32([1e-30, 1e30])[np.arange(shape[-1]) % 2]
    axes = {None: (0,) if len(shape) == 3 else (0, 1, 2)}.get(axis, axis)
    expected = np.sqrt(np.sum(np.square(x.astype(np.float64)), axis=axes, keepdims=True))
    np.testing.assert_allclose(unit_norms(jnp.asarray(x), axis), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_the_derivative_of_a_unit_norm_is_the_unit_vector(scale):
    x = jnp.array([[3.0, 0.0], [4.0, 0.0]]) * scale
    slope = jax.grad(lambda x: jnp.sum(unit_norms(x)))(x)
    np.testing.assert_allclose(slope, [[0.6, 0], [0.8, 0]], rtol=1e-6)


def test_units_are_those_of_adaptive_gradient_clipping_unless_axes_are_given():
    assert unit_axes((3, 3, 8, 16)) == (0, 1, 2)
    assert unit_axes((8, 16)) == unit_axes((2, 8, 16)) == unit_axes((16,)) == (0,)
    assert unit_axes((1, 16, 1)) == (0, 1, 2)
    assert unit_axes((8, 16), -1) == (1,)
    with pytest.raises(ValueError, match=r"axis must be in \[-2, 2\)"):
        unit_axes((8, 16), 2)


@pytest.mark.thorough
def test_joined_units_have_the_norms_they_have_apart():
    parts = [measure_units(jnp.asarray(x), (0,)) for x in ([3.0, 4.0], [1e30, 0.0], [2.0])]
    np.testing.assert_allclose(join_units(parts).value(), [5, 1e30, 2], rtol=1e-6)
