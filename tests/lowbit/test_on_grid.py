"""Weights kept on a grid while training, and scales trained behind fixed codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip import keep_on_grid
from jaxclip.thresholds.by_error import least_squares
from jaxclip.thresholds.by_magnitude import max_abs
from jaxclip.thresholds.rules import ThresholdRule
from oracles.small_params import params_and_goal
from oracles.walks import walk

WIDTHS = [1, "ternary", 2, 4, 8]
MOMENTUM = optax.sgd(0.02, momentum=0.9)
every_width = pytest.mark.parametrize("bits", WIDTHS)


def unrounded(params, state):
    return jax.tree.map(lambda w, r: w.astype(r.dtype) + r, params, state.residual)


@pytest.mark.thorough
@every_width
def test_parameters_are_the_rounded_weights_that_the_state_has(bits):
    params, loss_fn = params_and_goal()
    for now, state in walk(keep_on_grid(MOMENTUM, bits), params, loss_fn, 5):
        small = jaxclip.compress(unrounded(now, state), bits, rule=least_squares)
        expected = jaxclip.decompress(small)
        assert small["kernel"].bits == bits
        for name in params:
            np.testing.assert_allclose(now[name], expected[name], rtol=0, atol=2.0**-21)
        assert np.any(now["kernel"] != unrounded(now, state)["kernel"])


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [1, "ternary"])
def test_max_abs_finds_the_same_codes_in_the_trained_parameters(bits):
    params, loss_fn = params_and_goal()
    *_, (now, state) = walk(keep_on_grid(MOMENTUM, bits), params, loss_fn, 5)
    small = jaxclip.compress(now, bits, rule=max_abs)
    ours = jaxclip.compress(unrounded(now, state), bits, rule=least_squares)
    assert np.array_equal(small["kernel"].qvalue, ours["kernel"].qvalue)
    np.testing.assert_allclose(small["kernel"].scale, ours["kernel"].scale, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("bits", [1, 8])
def test_in_half_precision_the_low_bit_tree_is_that_of_the_sum(bits, dtype):
    params, loss_fn = params_and_goal(dtype)
    tx = keep_on_grid(optax.sgd(0.01), bits)
    for now, state in walk(tx, params, loss_fn, 5):
        v = unrounded(now, state)
        assert now["kernel"].dtype == dtype
        assert v["kernel"].dtype == state.residual["kernel"].dtype == jnp.float32
        small = jaxclip.compress(v, bits, rule=least_squares)
        expected = np.asarray(jaxclip.decompress(small)["kernel"])
        # Rounded to the dtype, and once more where `w + u` cannot be it.
        far = np.abs(np.asarray(now["kernel"], np.float32) - expected)
        assert np.all(far <= 2 * float(jnp.finfo(dtype).eps) * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_steps_below_the_spacing_of_the_weights_add_up(dtype):
    # A weight near 0 of a one-bit channel, moved by a thousandth of the scale at every step.
    params = {"kernel": jnp.array([[1.0], [-1.0], [0.01]], dtype)}
    grads = {"kernel": jnp.array([[0.0], [0.0], [1.0]], dtype)}
    tx = keep_on_grid(optax.sgd(2.0**-10), 1)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(100):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    v = unrounded(params, state)["kernel"]
    np.testing.assert_allclose(v[:, 0], [1, -1, 0.01 - 100 / 1024], rtol=0, atol=1e-4)
    assert params["kernel"][2, 0] < 0


@pytest.mark.thorough
def test_a_bad_step_is_handed_on_and_leaves_the_state_as_it_was():
    params, loss_fn = params_and_goal()
    tx = keep_on_grid(optax.sgd(0.1), "ternary")
    *_, (params, state) = walk(tx, params, loss_fn, 3)
    grads = jax.grad(loss_fn)(params)
    bad = {**grads, "kernel": grads["kernel"].at[2, 1].set(jnp.nan)}
    for update in (tx.update, jax.jit(tx.update)):
        updates, after = update(bad, state, params)
        assert np.isnan(updates["kernel"][2, 1])
        assert np.all(np.isfinite(updates["kernel"][:, 0]))
        assert np.array_equal(after.residual["kernel"][:, 1], state.residual["kernel"][:, 1])
        assert np.all(np.isfinite(after.residual["kernel"]))
        # Kept out of the weights by what comes after, training goes on as if nothing had been.
        again, _ = update(grads, after, params)
        expected, _ = update(grads, state, params)
        np.testing.assert_array_equal(again["kernel"][:, 1], expected["kernel"][:, 1])
    guarded = jaxclip.skip_nonfinite(keep_on_grid(optax.sgd(0.1), "ternary", start_step=9))
    updates, _ = guarded.update(bad, guarded.init(params), params)
    assert not np.any(updates["kernel"])


@pytest.mark.thorough
@pytest.mark.parametrize("start_step", [2, np.int64(2), jnp.asarray(2)], ids=repr)
def test_the_first_step_on_the_grid_may_be_a_hyper_parameter(start_step):
    params, loss_fn = params_and_goal()
    known = walk(keep_on_grid(optax.sgd(0.1), "ternary", start_step=2), params, loss_fn, 4)
    injected = optax.inject_hyperparams(keep_on_grid, static_args="inner")(
        optax.sgd(0.1), "ternary", start_step=start_step
    )
    for (a, _), (b, _) in zip(known, walk(injected, params, loss_fn, 4), strict=True):
        np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-6)


@pytest.mark.thorough
def test_it_is_training_with_straight_through_derivatives():
    params, loss_fn = params_and_goal()
    inner = MOMENTUM

    def straight(v):
        w = jaxclip.decompress(jaxclip.compress(v, 2, rule=least_squares))
        return jax.tree.map(lambda v, w: v + jax.lax.stop_gradient(w - v), v, w)

    v, inner_state = params, inner.init(params)
    trained = walk(keep_on_grid(inner, 2, start_step=3), params, loss_fn, 10)
    for i, (now, state) in enumerate(trained):
        # The first three gradients are at the weights themselves, and so is the fourth, since
        # the third step has not rounded them.
        loss = loss_fn if i <= 3 else lambda v: loss_fn(straight(v))
        updates, inner_state = inner.update(jax.grad(loss)(v), inner_state, v)
        v = optax.apply_updates(v, updates)
        for name in params:
            np.testing.assert_allclose(unrounded(now, state)[name], v[name], rtol=0, atol=2e-5)


@pytest.mark.thorough
def test_before_its_first_step_it_is_the_inner_optimizer():
    params, loss_fn = params_and_goal()
    inner = jaxclip.lion(0.1)
    ours = walk(keep_on_grid(inner, 1, start_step=4), params, loss_fn, 5)
    theirs = walk(inner, params, loss_fn, 5)
    for i, ((a, _), (b, _)) in enumerate(zip(ours, theirs, strict=True)):
        far = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), a, b)
        assert (max(jax.tree.leaves(far)) <= 2e-7) == (i < 4)


@pytest.mark.thorough
def test_a_box_inside_bounds_the_unrounded_weights():
    params, loss_fn = params_and_goal()
    inner = optax.chain(jaxclip.lion(0.3), jaxclip.project_weights(jaxclip.box(0.5)))
    for now, state in walk(keep_on_grid(inner, "ternary"), params, loss_fn, 6):
        assert (
            max(float(jnp.max(jnp.abs(v))) for v in jax.tree.leaves(unrounded(now, state)))
            <= 0.5 + 1e-7
        )


@pytest.mark.thorough
def test_policy_and_default_leave_what_compress_leaves():
    params, _ = params_and_goal()
    params |= {"count": jnp.zeros((), jnp.int32), "free": jnp.ones((3, 3))}
    tx = keep_on_grid(jaxclip.sign_sgd(0.1), 1, policy=[("free", None)])
    grads = jax.tree.map(jnp.ones_like, params) | {"count": jnp.zeros((), jnp.int32)}
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert after["count"].dtype == jnp.int32
    assert np.array_equal(after["free"], jnp.full((3, 3), 0.9))
    assert np.array_equal(after["bias"], jnp.full(4, -0.1))
    assert all(len(np.unique(np.abs(column).round(6))) == 1 for column in after["kernel"].T)


@pytest.mark.thorough
def test_it_trains_in_a_donated_step_and_in_a_chain():
    params, loss_fn = params_and_goal()
    tx = optax.chain(jaxclip.clip_by_global_norm(10.0), keep_on_grid(MOMENTUM, "ternary"))
    state = jaxclip.TrainState.create(params, tx)
    step = jax.jit(jaxclip.make_train_step(lambda p, _: loss_fn(p), tx), donate_argnums=0)
    for _ in range(60):
        state, info = step(state, None)
    residual = optax.tree_utils.tree_get(state.opt_state, "residual")
    assert info.loss < loss_fn(params)
    v = optax.apply_updates(state.params, residual)
    expected = jaxclip.decompress(jaxclip.compress(v, "ternary", rule=least_squares))
    np.testing.assert_allclose(state.params["kernel"], expected["kernel"], rtol=0, atol=1e-6)


def test_no_grid_is_chosen_before_the_first_step_on_it():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Counted(ThresholdRule):
        def measure(self, blocks, axes, counts):
            jax.debug.callback(lambda: seen.append(1))
            return jnp.max(jnp.abs(blocks), axis=axes, keepdims=True)

    params, loss_fn = params_and_goal()
    tx = keep_on_grid(optax.sgd(0.1), "ternary", start_step=3, rule=Counted())
    for i, _ in enumerate(walk(tx, params, loss_fn, 5)):
        jax.effects_barrier()
        assert len(seen) == max(i - 2, 0)


@pytest.mark.thorough
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_keeps_the_shardings(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 4))}
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put(params, rows)
    tx = keep_on_grid(optax.sgd(0.1), "ternary")
    update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0], out_shardings=rows)
    ours, alone = update(sharded, sharded), tx.update(params, tx.init(params), params)[0]
    np.testing.assert_allclose(ours["kernel"], alone["kernel"], rtol=0, atol=1e-6)


@pytest.mark.thorough
def test_keep_on_grid_names_what_is_wrong():
    params, _ = params_and_goal()
    with pytest.raises(TypeError, match="inner"):
        keep_on_grid(0.1, 4)
    for wrong in (-1, 1.5, "later", True, jnp.ones(2, jnp.int32), jnp.float32(1)):
        with pytest.raises(ValueError, match="start_step must be an integer of at least 0"):
            keep_on_grid(optax.sgd(0.1), 4, start_step=wrong)
    with pytest.raises(ValueError, match="bits"):
        keep_on_grid(optax.sgd(0.1), 7).init(params)
    tx = keep_on_grid(optax.sgd(0.1), 4)
    with pytest.raises(ValueError, match="keep_on_grid"):
        tx.update(params, tx.init(params))
