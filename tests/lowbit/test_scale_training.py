"""Scales trained behind fixed codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip import checkpoints
from jaxclip.lowbit import trainable_parts
from jaxclip.thresholds.by_magnitude import max_abs
from oracles.small_params import params_and_goal


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16", "log8"])
def test_rebuilt_from_its_own_parts_a_tree_is_itself(scale_dtype):
    params, _ = params_and_goal()
    small = jaxclip.compress(params, jaxclip.Grid(2, scale_dtype=scale_dtype), rule=max_abs)
    parts, rebuild = trainable_parts(small)
    again = rebuild(parts)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(small), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.thorough
def test_training_the_factors_finds_the_scales_of_least_squares():
    w = np.random.default_rng(0).standard_t(3, (64, 5)).astype(np.float32)
    small = jaxclip.compress({"w": jnp.asarray(w)}, "ternary", rule=max_abs)
    codes = np.asarray(small["w"].qvalue, np.float64)
    best = (w * codes).sum(0) / (codes**2).sum(0)
    parts, rebuild = trainable_parts(small)

    def loss_fn(parts):
        return jnp.mean((jaxclip.decompress(rebuild(parts))["w"] - w) ** 2)

    tx = optax.adam(optax.cosine_decay_schedule(0.03, 300))

    @jax.jit
    def step(parts, state):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.grad(loss_fn)(parts), state)
        return optax.apply_updates(parts, updates), state

    state = tx.init(parts)
    for _ in range(300):
        parts, state = step(parts, state)
    np.testing.assert_allclose(rebuild(parts)["w"].scale[0], best, rtol=2e-3)
    assert np.array_equal(rebuild(parts)["w"].qvalue, codes)


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "log8"])
def test_what_is_rebuilt_is_valid_and_of_the_same_size_on_disk(scale_dtype, zero_point, tmp_path):
    params, _ = params_and_goal()
    small = jaxclip.compress(
        params, jaxclip.Grid(2, zero_point=zero_point, scale_dtype=scale_dtype), rule=max_abs
    )
    parts, rebuild = trainable_parts(small)
    moved = jax.tree.map(lambda x: x * jnp.linspace(-1.5, 2.0, x.size).reshape(x.shape), parts)
    new = jax.jit(rebuild)(moved)
    new["kernel"].validate()
    assert jaxclip.size_report(new).total_bytes == jaxclip.size_report(small).total_bytes
    checkpoints.save(tmp_path / "a.safetensors", new)
    read = checkpoints.load(tmp_path / "a.safetensors")
    assert np.array_equal(read["kernel"].scale, new["kernel"].scale)


@pytest.mark.parametrize("scale_dtype", ["float32", "log8"])
def test_the_derivative_is_that_of_the_weights_in_their_scales(scale_dtype):
    params, _ = params_and_goal()
    small = jaxclip.compress(params, jaxclip.Grid(4, scale_dtype=scale_dtype), rule=max_abs)
    parts, rebuild = trainable_parts(small)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(jaxclip.decompress(rebuild(p))["kernel"])))(parts)
    w = np.asarray(jaxclip.decompress(small)["kernel"], np.float64)
    np.testing.assert_allclose(grads["kernel"][0], (np.cos(w) * w).sum(0), rtol=1e-5)
    assert np.array_equal(grads["bias"], np.zeros(4))


def test_trainable_parts_names_what_is_wrong():
    with pytest.raises(ValueError, match="low-bit leaf"):
        trainable_parts({"w": jnp.ones((2, 2))})
    parts, rebuild = trainable_parts(jaxclip.compress({"w": jnp.ones((2, 2))}, 4, rule=max_abs))
    with pytest.raises(ValueError, match=r"parts\['w'\] must have shape \(1, 2\), got None"):
        rebuild({})
    with pytest.raises(ValueError, match=r"parts\['w'\] must have shape \(1, 2\), got \(2,\)"):
        rebuild({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"parts\['x'\] must have shape None"):
        rebuild(parts | {"x": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"parts must be a dict from path to array, got \[1\]"):
        rebuild([1])
    with pytest.raises(ValueError, match=r"parts\[1\] must have shape None"):
        rebuild(parts | {1: jnp.ones(2)})


@pytest.mark.thorough
def test_trainable_parts_mixes_up_no_leaves_of_the_same_path():
    params = {"w": jnp.ones((2, 2)), "a": {"b": jnp.zeros(3)}, "a/b": 5 * jnp.ones(3)}
    message = r"\['a'\]\['b'\] and \['a/b'\] are both called 'a/b'"
    with pytest.raises(ValueError, match=message):
        trainable_parts(jaxclip.compress(params, 4, rule=max_abs))
    del params["a"]
    parts, rebuild = trainable_parts(jaxclip.compress(params, 4, rule=max_abs))
    assert np.array_equal(rebuild(parts | {"a/b": jnp.arange(3.0)})["a/b"], [0, 1, 2])
