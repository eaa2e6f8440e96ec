"""Clips relative to the weights, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from oracles.units import DTYPES, exact, norm, tree_of, update

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.thorough
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


@pytest.mark.thorough
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


@pytest.mark.thorough
@pytest.mark.parametrize("absolute", [0.01, 1e-30, 1e36])
def test_an_update_at_the_top_of_its_range_is_bounded_and_not_lost(absolute):
    params = {"w": jnp.ones(4), "b": jnp.ones(1), "s": jnp.float32(1)}
    updates = {"w": jnp.array([3e38, -1e38, 2e38, 1e37]), "b": jnp.array([1e38]), "s": 2e38}
    updates["s"] = jnp.float32(updates["s"])
    clipped, _ = update(jaxclip.gradients.clip_update_relative(0.5, absolute), updates, params)
    for name, u in updates.items():
        coef = np.min((0.5 + absolute) / np.abs(exact(u)))
        np.testing.assert_allclose(exact(clipped[name]), exact(u) * coef, rtol=4e-6)


CLIPS = [
    functools.partial(jaxclip.clip_by_leaf_norm, 0.5),
    functools.partial(jaxclip.clip_by_block_rms, 0.1),
    functools.partial(jaxclip.adaptive_grad_clip, 0.1, axis=(0, 1)),
    functools.partial(jaxclip.gradients.clip_update_relative, 0.3, 0.02),
]


def split_update(make, updates, params):
    """Updates and the state of a leaf whose first axis is split over devices."""
    tx = make(axis_name="devices")
    return jax.vmap(lambda u, w: tx.update(u, tx.init(u), w), axis_name="devices")(updates, params)


@pytest.mark.parametrize("make", CLIPS)
@pytest.mark.parametrize("size", [1, pytest.param(1e38, marks=pytest.mark.thorough)])
def test_leaves_that_are_split_over_an_axis_are_clipped_as_the_whole(make, size):
    rng = np.random.default_rng(5)
    params, updates = rng.normal(size=(2, 4, 2, 3)).astype(np.float32)
    updates[1] *= np.float32(size)  # on one device
    whole, expected = update(make(), updates.reshape(8, 3), params.reshape(8, 3))
    parts, state = split_update(make, updates, params)
    assert np.abs(parts.reshape(8, 3) - updates.reshape(8, 3)).max() > 0.1
    np.testing.assert_allclose(parts.reshape(8, 3), whole, rtol=1e-5)
    for name in ("pre_norm", "post_norm", "clip_coef", "clip_rate"):
        for got in getattr(state.stats, name):
            np.testing.assert_allclose(got, getattr(expected.stats, name), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("make", CLIPS)
@pytest.mark.parametrize("place", ["updates", "params"])
def test_a_bad_entry_on_one_device_gives_zeros_on_all(make, place):
    if place == "params" and make not in CLIPS[2:]:
        pytest.skip("it does not look at the parameters")
    arrays = {"updates": np.ones((4, 2, 3), np.float32), "params": np.ones((4, 2, 3), np.float32)}
    arrays[place][2, 1, 1] = np.nan
    parts, state = split_update(make, **arrays)
    assert not np.any(parts)
    assert np.asarray(state.stats.num_nonfinite).tolist() == [1] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "make",
    [
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


@pytest.mark.thorough
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_a_ratio_of_zero_or_a_traced_negative_one_gives_zeros(threshold):
    grads = tree_of(jnp.float32)
    clipped, _ = update(jaxclip.adaptive_grad_clip(jnp.float32(threshold)), grads, grads)
    assert not any(np.any(x) for x in jax.tree.leaves(clipped))


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["updates", "params"])
def test_a_nan_among_many_entries_is_a_bad_step_of_a_relative_clip(place):
    # XLA's minimum on CPU loses a NaN among many entries.
    good, bad = jnp.ones((64, 80)), jnp.ones((64, 80)).at[31, 7].set(jnp.nan)
    tx = jaxclip.gradients.clip_update_relative()
    trees = (bad, good) if place == "updates" else (good, bad)
    updates, state = jax.jit(tx.update)(trees[0], tx.init(good), trees[1])
    assert int(state.stats.num_nonfinite) == 1
    assert not np.any(updates)
