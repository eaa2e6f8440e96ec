"""Which leaves are floating, and how trees are named and filled."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import trees


def test_floating_leaves_count_and_all_others_do_not():
    floating = [0.5, 1j, np.float64(1), jnp.zeros(2, jnp.bfloat16), np.zeros(2, np.complex64)]
    other = [1, True, None, "a", jnp.zeros(2, jnp.int8), np.zeros(2, bool), jax.random.key(0)]
    other.append(np.zeros(2, jax.dtypes.float0))
    assert all(trees.is_clippable(x) for x in floating)
    assert not any(trees.is_clippable(x) for x in other)


def test_leaves_of_one_joined_name_have_names_of_their_own():
    tree = {"a/b": 1, "a": {"b": 2, "c": 3}}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert trees.unique_names(paths) == ["['a']['b']", "a/c", "['a/b']"]


def test_replaced_leaves_are_the_floating_ones_in_order():
    tree = {"a": jnp.ones(2), "n": 3, "z": jnp.zeros(1)}
    new = trees.replace_floating(tree, [jnp.full(2, 5.0), jnp.full(1, 6.0)])
    assert new["n"] == 3
    assert [new["a"].tolist(), new["z"].tolist()] == [[5, 5], [6]]
