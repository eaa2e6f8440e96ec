"""Clips by leaf and by unit, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def tree_of(dtype, scale=1.0):
    k = jax.random.split(jax.random.key(3), 3)
    tree = {"a": jax.random.normal(k[0], (6, 5)), "b": 9 * jax.random.normal(k[1], (7,))}
    tree |= {"c": 0.01 * jax.random.normal(k[2], (3, 2, 4))}
    return jax.tree.map(lambda x: (x * scale).astype(dtype), tree)


def exact(x):
    return np.asarray(x, np.float64)


def norm(x, axis=None):
    return np.sqrt(np.sum(np.square(exact(x)), axis=axis, keepdims=axis is not None))


def update(tx, grads, params=None):
    return jax.jit(tx.update)(grads, tx.init(grads), params)


@every_dtype
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_each_leaf_is_scaled_to_its_bound_or_left_alone(dtype, scale):
    grads = tree_of(dtype, scale)
    clipped, state = update(jaxclip.clip_by_leaf_norm(0.5), grads)
    above = 0
    for name, g in grads.items():
        out, before = exact(clipped[name]), norm(g)
        assert norm(out) <= 0.5
        if before <= 0.5:
            np.testing.assert_array_equal(out, exact(g))
            continue
        above += 1
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(out, exact(g) * 0.5 / before, rtol=tolerance, atol=1e-6)
    np.testing.assert_allclose(state.stats.clip_rate, above / 3)
    total = np.sqrt(sum(norm(g) ** 2 for g in grads.values()))
    np.testing.assert_allclose(state.stats.pre_norm, total, rtol=1e-5)


def test_layers_of_a_stacked_leaf_are_clipped_apart():
    grads = {"layers": jnp.array([[3.0, 4.0], [0.3, 0.4], [30.0, 40.0]])}
    clipped, state = update(jaxclip.clip_by_leaf_norm(1.0, stacked_axes=1), grads)
    np.testing.assert_allclose(clipped["layers"], [[0.6, 0.8], [0.3, 0.4], [0.6, 0.8]], rtol=2e-6)
    np.testing.assert_allclose(state.stats.clip_rate, 2 / 3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_leaves_of_very_different_size_are_each_clipped_right(scale):
    grads = {"a": jnp.array([3.0, 4.0]), "b": scale * jnp.array([3.0, 4.0])}
    clipped, _ = update(jaxclip.clip_by_leaf_norm({"a": 0.5, "b": 0.5 * scale}), grads)
    np.testing.assert_allclose(clipped["a"], [0.3, 0.4], rtol=2e-6)
    np.testing.assert_allclose(exact(clipped["b"]) / scale, [0.3, 0.4], rtol=2e-6)


@every_dtype
def test_the_root_mean_square_of_a_leaf_is_at_most_the_threshold(dtype):
    grads = tree_of(dtype, 3.0)
    clipped, _ = update(jaxclip.clip_by_block_rms(0.25), grads)
    for name, g in grads.items():
        rms = norm(clipped[name]) / np.sqrt(g.size)
        before = norm(g) / np.sqrt(g.size)
        assert rms <= 0.25
        tolerance = max(2e-6, 4 * float(jnp.finfo(dtype).eps))  # the margin of the clip
        np.testing.assert_allclose(rms, min(before, 0.25), rtol=tolerance)


@pytest.mark.parametrize("axis", [None, 0, (0, 1)])
def test_adaptive_clip_is_numpys_formula(axis):
    params, grads = tree_of(jnp.float32), tree_of(jnp.float32, 0.3)
    if axis == (0, 1):
        params, grads = {"c": params["c"]}, {"c": grads["c"]}
    clipped, _ = update(jaxclip.adaptive_grad_clip(0.1, 1e-3, axis), grads, params)
    for name, g in grads.items():
        over = 0 if axis is None else axis
        bound = 0.1 * np.maximum(norm(params[name], over), 1e-3)
        coef = np.minimum(1, bound / norm(g, over))
        np.testing.assert_allclose(clipped[name], exact(g) * coef, rtol=4e-6)
        assert (norm(clipped[name], over) <= bound * (1 + 1e-7)).all()


def test_adaptive_clip_takes_a_step_from_weights_of_zero_up_to_eps():
    g = jnp.array([[3.0], [4.0]])
    clipped, _ = update(jaxclip.adaptive_grad_clip(0.5, eps=0.1), g, jnp.zeros((2, 1)))
    np.testing.assert_allclose(clipped, [[0.03], [0.04]], rtol=4e-6)


@every_dtype
def test_an_update_is_bounded_relative_to_its_weight(dtype):
    params, updates = tree_of(dtype), tree_of(dtype, 0.2)
    updates = jax.tree.map(lambda u: u[::-1], updates)
    clipped, _ = update(jaxclip.gradients.clip_update_relative(0.3, 0.02), updates, params)
    for name, u in updates.items():
        allowed = 0.3 * np.abs(exact(params[name])) + 0.02
        coef = min(1, np.min(allowed / np.maximum(np.abs(exact(u)), 1e-30)))
        assert (np.abs(exact(clipped[name])) <= allowed * (1 + 1e-6)).all()
        tolerance = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(exact(clipped[name]), exact(u) * coef, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(jaxclip.clip_by_leaf_norm, 1.0),
        functools.partial(jaxclip.clip_by_block_rms, 1.0),
        functools.partial(jaxclip.adaptive_grad_clip, 0.1),
        jaxclip.gradients.clip_update_relative,
    ],
)
def test_a_bad_entry_gives_zeros_everywhere_and_names_its_leaf(make, bad):
    grads = tree_of(jnp.float32)
    grads["b"] = grads["b"].at[2].set(bad)
    clipped, state = update(make(), grads, tree_of(jnp.float32))
    assert not any(np.any(x) for x in jax.tree.leaves(clipped))
    assert int(state.stats.num_nonfinite) == 1
    assert int(state.leaves.nonfinite_leaf) == 1


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_threshold_of_zero_or_a_traced_negative_one_gives_zeros(threshold):
    grads = tree_of(jnp.float32)
    for make in (jaxclip.clip_by_leaf_norm, jaxclip.clip_by_block_rms, jaxclip.adaptive_grad_clip):
        clipped, _ = update(make(jnp.float32(threshold)), grads, grads)
        assert not any(np.any(x) for x in jax.tree.leaves(clipped))


def test_a_threshold_with_an_entry_for_each_weight_is_refused_by_path():
    tx = jaxclip.clip_by_leaf_norm({"a": jnp.ones((2,)), "b": 1.0})
    grads = {"a": jnp.ones((2,)), "b": jnp.ones((3,))}
    with pytest.raises(ValueError, match="'a'"):
        tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("place", ["updates", "params"])
def test_a_nan_among_many_entries_is_a_bad_step_of_a_relative_clip(place):
    # XLA's minimum on CPU loses a NaN among many entries.
    good, bad = jnp.ones((64, 80)), jnp.ones((64, 80)).at[31, 7].set(jnp.nan)
    tx = jaxclip.gradients.clip_update_relative()
    trees = (bad, good) if place == "updates" else (good, bad)
    updates, state = jax.jit(tx.update)(trees[0], tx.init(good), trees[1])
    assert int(state.stats.num_nonfinite) == 1
    assert not np.any(updates)
