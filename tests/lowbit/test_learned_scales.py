"""Scales that `keep_on_grid` learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip import Grid, keep_on_grid
from jaxclip.lowbit import compress_trained
from jaxclip.lowbit.learned_scales import gradients_of_scales
from jaxclip.thresholds.by_error import least_squares
from oracles.small_params import params_and_goal
from oracles.walks import walk

GRIDS = [
    Grid("ternary", axis=-1),
    Grid(1, axis=-1),
    Grid(2, levels="balanced", axis=None),
    Grid(3, levels="narrow", axis=0),
    Grid(4, axis=-1, group_size=4),
]
MOMENTUM = optax.sgd(0.02, momentum=0.9)


def gradient_of_lsq(g, v, grid, scale):
    """The gradient of ln s, float64, in blocks of columns, rows, groups of 4 or all entries."""
    g, v, scale = (np.asarray(x, np.float64) for x in (g, v, scale))
    step = np.broadcast_to(grid.expand_with(np, scale, v.shape), v.shape)
    low, high = grid.code_range
    odd = grid.bits == 1 or grid.levels == "balanced"
    ratio = v / step
    code = np.clip(2 * np.floor(ratio / 2) + 1 if odd else np.round(ratio), low, high)
    inside = (low <= ratio) & (ratio <= high) & (grid.bits != 1)
    terms = g * step * np.where(inside, code - ratio, code)
    if grid.group_size:
        total = terms.reshape(-1, grid.group_size, v.shape[1]).sum(1)
        count = grid.group_size
    elif grid.axis is None:
        total, count = terms.sum(keepdims=True), v.size
    else:
        other = 0 if grid.axis == -1 else 1
        total, count = terms.sum(other, keepdims=True), v.shape[other]
    return total / np.sqrt(count * high)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_gradient_of_a_scale_is_that_of_lsq(grid):
    rng = np.random.default_rng(3)
    g, v = rng.normal(size=(2, 12, 5)).astype(np.float32)
    small = jaxclip.quantize(v, grid, threshold=1.1)  # so that some lie outside
    found = gradients_of_scales({"w": g}, {"w": v}, {"w": small}, {"w": small.scale})["w"]
    expected = gradient_of_lsq(g, v, grid, small.scale)
    assert found.shape == small.scale.shape
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_the_gradient_of_a_scale_is_the_straight_through_derivative():
    rng = np.random.default_rng(4)
    g, v = rng.normal(size=(2, 9, 3)).astype(np.float32)
    grid = Grid(3, levels="narrow", axis=-1)
    small = jaxclip.quantize(v, grid, threshold=1.0)

    def rounded(log_scale):
        ratio = v / jnp.exp(log_scale)
        straight = ratio + jax.lax.stop_gradient(jnp.round(ratio) - ratio)
        w = jnp.exp(log_scale) * jnp.where(jnp.abs(ratio) > 3, 3 * jnp.sign(ratio), straight)
        return jnp.sum(g * w)

    expected = jax.grad(rounded)(jnp.log(small.scale)) / np.sqrt(9 * 3)
    found = gradients_of_scales({"w": g}, {"w": v}, {"w": small}, {"w": small.scale})["w"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_rule_gives_the_first_scales_and_the_optimizer_the_others():
    params, loss_fn = params_and_goal()
    tx = keep_on_grid(MOMENTUM, "ternary", start_step=2, learn_scales=optax.sgd(0.0))
    states = [state for _, state in walk(tx, params, loss_fn, 5)]
    first = jax.tree.map(lambda w, r: w + r, *_weights_at(tx, params, loss_fn, 3))
    expected = jaxclip.compress(first, "ternary", rule=least_squares)["kernel"].scale
    for state in states[2:]:
        np.testing.assert_allclose(jnp.exp(state.scales.log_scales["kernel"]), expected, rtol=1e-5)


def _weights_at(tx, params, loss_fn, num_steps):
    *_, (now, state) = walk(tx, params, loss_fn, num_steps)
    return now, state.residual


@pytest.mark.parametrize("grid", ["ternary", pytest.param(Grid(4), marks=pytest.mark.thorough)])
def test_the_trained_tree_is_the_parameters(grid):
    params, loss_fn = params_and_goal()
    tx = optax.chain(keep_on_grid(MOMENTUM, grid, learn_scales=optax.sgd(0.1)))
    *_, (now, state) = walk(tx, params, loss_fn, 6)
    small = compress_trained(now, state, grid)
    for name, w in jaxclip.decompress(small).items():
        np.testing.assert_allclose(w, now[name], rtol=0, atol=2.0**-21)
    by_rule = jaxclip.compress(
        jax.tree.map(lambda w, r: w + r, now, state[0].residual), grid, rule=least_squares
    )
    assert not np.allclose(small["kernel"].scale, by_rule["kernel"].scale, rtol=1e-3)


def test_without_learned_scales_the_trained_tree_is_that_of_the_rule():
    params, loss_fn = params_and_goal()
    *_, (now, state) = walk(keep_on_grid(MOMENTUM, "ternary"), params, loss_fn, 4)
    small = compress_trained(now, state, "ternary")
    for name, w in jaxclip.decompress(small).items():
        np.testing.assert_allclose(w, now[name], rtol=0, atol=2.0**-21)


def test_learned_scales_lower_the_loss_of_weights_that_stay():
    target = jnp.array([[0.7, -0.7], [0.7, 0.7]])
    loss_fn = lambda p: jnp.sum((p["kernel"] - target) ** 2)  # noqa: E731
    params = {"kernel": jnp.array([[1.0, -2.0], [1.0, 2.0]])}
    tx = keep_on_grid(optax.sgd(0.0), 1, learn_scales=optax.sgd(0.1))
    *_, (now, _) = walk(tx, params, loss_fn, 200)
    np.testing.assert_allclose(now["kernel"], target, atol=1e-3)


def test_a_bad_step_leaves_the_scales():
    params, loss_fn = params_and_goal()
    tx = keep_on_grid(MOMENTUM, "ternary", learn_scales=optax.sgd(0.1))
    *_, (now, state) = walk(tx, params, loss_fn, 3)
    bad = jax.tree.map(jnp.ones_like, now) | {"kernel": now["kernel"].at[0, 0].set(jnp.nan)}
    _, after = tx.update(bad, state, now)
    for x, y in zip(*map(jax.tree.leaves, (state.scales, after.scales)), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize("kernel", [np.zeros((4, 2)), np.array([[0.0, 3.0], [0.0, -3.0]])])
def test_blocks_of_zeros_can_grow(kernel):
    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    loss_fn = lambda p: jnp.sum((p["kernel"] - 1) ** 2)  # noqa: E731
    tx = keep_on_grid(optax.sgd(0.05), "ternary", learn_scales=optax.sgd(0.1))
    *_, (now, _) = walk(tx, params, loss_fn, 200)
    np.testing.assert_allclose(now["kernel"][:, 0], 1.0, atol=1e-2)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_scales_of_half_precision_weights_are_learned_in_float32(dtype):
    params, loss_fn = params_and_goal(dtype)
    tx = keep_on_grid(MOMENTUM, "ternary", learn_scales=jaxclip.lion(0.01))
    *_, (now, state) = walk(tx, params, loss_fn, 4)
    assert state.scales.log_scales["kernel"].dtype == jnp.float32
    assert now["kernel"].dtype == dtype
    assert np.all(np.isfinite(np.asarray(now["kernel"], np.float32)))


def test_learned_scales_name_what_is_wrong():
    params, _ = params_and_goal()
    with pytest.raises(TypeError, match="learn_scales"):
        keep_on_grid(MOMENTUM, 4, learn_scales=True)
    tx = keep_on_grid(MOMENTUM, Grid(4, zero_point=True), learn_scales=jaxclip.lion(0.1))
    with pytest.raises(ValueError, match=r"without zero points.*'kernel'"):
        tx.init(params)
    with pytest.raises(ValueError, match="state of one keep_on_grid, got 0"):
        compress_trained(params, MOMENTUM.init(params), 4)


def test_with_no_low_bit_leaf_it_is_the_optimizer_inside():
    params, loss_fn = params_and_goal()
    tx = keep_on_grid(MOMENTUM, 4, policy=[(".*", None)], learn_scales=optax.sgd(0.1))
    *_, (ours, state) = walk(tx, params, loss_fn, 3)
    *_, (theirs, _) = walk(MOMENTUM, params, loss_fn, 3)
    assert state.scales.log_scales == {}
    np.testing.assert_allclose(ours["kernel"], theirs["kernel"], rtol=1e-6)
