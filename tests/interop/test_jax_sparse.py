"""Sparse arrays of jax: they stand for the same matrix, multiply alike, and come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

import jaxclip
from jaxclip import interop, sparsity


def pruned_array(shape, density, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 9, shape) / 4 * rng.choice([-1, 1], shape)  # exact in every dtype
    return jnp.asarray(np.where(rng.random(shape) < density, values, 0), dtype)


@pytest.mark.parametrize("kind", ["bcoo", "bcsr"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(12, 20), (1, 7), (5, 1), (0, 3)])
def test_a_matrix_comes_back_and_is_what_jax_makes_of_it(kind, dtype, shape):
    w = pruned_array(shape, 0.3, dtype)
    found = interop.to_jax_sparse({"w": w, "b": jnp.ones(3)}, kind)
    theirs = {"bcoo": sparse.BCOO, "bcsr": sparse.BCSR}[kind].fromdense(w)
    assert type(found["w"]) is type(theirs)
    for ours, expected in zip(*map(jax.tree.leaves, (found["w"], theirs)), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)
    back = interop.from_jax_sparse(found)
    assert back["w"].dtype == w.dtype
    np.testing.assert_array_equal(back["w"], w)
    assert back["b"] is found["b"]


def test_products_are_those_of_the_dense_matrix_and_pruned_weights_get_no_gradient():
    w, x = pruned_array((16, 8), 0.2), pruned_array((3, 16), 1.0, seed=1)
    m = interop.to_jax_sparse(w)
    np.testing.assert_array_equal(jax.jit(lambda x, m: x @ m)(x, m), x @ w)
    rows = interop.to_jax_sparse(w.T, "bcsr")
    np.testing.assert_array_equal(jax.jit(lambda m, x: m @ x)(rows, x.T), (x @ w).T)

    def loss(m):
        return ((x @ m) ** 2).sum()

    gradient = jax.grad(loss, allow_int=True)(m).data
    np.testing.assert_allclose(gradient, jax.grad(loss)(w)[tuple(m.indices.T)], rtol=1e-6)


def test_low_bit_leaves_become_what_they_stand_for():
    w = sparsity.prune({"kernel": jax.random.normal(jax.random.key(0), (32, 16))}, 1 / 8)
    small = jaxclip.compress(w, 4)
    for tree in (small, {"kernel": small["kernel"].packed()}):
        found = interop.to_jax_sparse(tree)["kernel"]
        assert found.nse == 64
        np.testing.assert_array_equal(found.todense(), jaxclip.dequantize(small["kernel"]))


def test_leaves_that_are_dense_or_no_weights_stay_as_they_are():
    tree = {
        "dense": pruned_array((8, 8), 0.9),
        "conv": pruned_array((3, 3, 4, 8), 0.1),
        "ints": jnp.zeros((4, 4), jnp.int32),
        "bias": jnp.zeros(9),
        "key": jax.random.key(0),
        "none": None,
    }
    found = interop.to_jax_sparse(tree, "bcsr")
    assert all(found[name] is tree[name] for name in tree)
    found = interop.to_jax_sparse(tree, max_density=1)
    assert {n for n, x in found.items() if isinstance(x, sparse.BCOO)} == {"dense", "conv"}
    np.testing.assert_array_equal(found["conv"].todense(), tree["conv"])
    dense = {"w": jnp.eye(4)}
    assert interop.to_jax_sparse(dense, max_density=0.24)["w"] is dense["w"]


def test_numbers_that_are_none_are_kept():
    w = np.zeros((4, 4), np.float32)
    w[0, 1], w[1, 1], w[2, 2] = np.nan, np.inf, -0.0
    found = interop.to_jax_sparse(w)
    assert found.nse == 2
    np.testing.assert_array_equal(found.todense(), w)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="kind"):
        interop.to_jax_sparse({}, "csr")
    for density in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="max_density"):
            interop.to_jax_sparse({}, max_density=density)
    with pytest.raises(TypeError, match="'w' has no values"):
        jax.jit(interop.to_jax_sparse)({"w": jnp.eye(3)})
