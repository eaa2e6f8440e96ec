"""Weights kept on a grid while training, and scales trained behind fixed codes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxclip
from jaxclip import checkpoints, keep_on_grid
from jaxclip._core.grids import code_range
from jaxclip.lowbit import trainable_parts
from jaxclip.thresholds.by_error import least_squares
from jaxclip.thresholds.by_magnitude import max_abs
from jaxclip.thresholds.rules import ThresholdRule

WIDTHS = [1, "ternary", 2, 4, 8]
MOMENTUM = optax.sgd(0.02, momentum=0.9)
every_width = pytest.mark.parametrize("bits", WIDTHS)


def params_and_goal(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": jax.random.normal(keys[0], (6, 4), dtype), "bias": jnp.zeros(4, dtype)}
    goal = jax.random.normal(keys[1], (6, 4), dtype)
    return params, lambda p: jnp.sum((p["kernel"] - goal) ** 2 + (p["bias"] - 1)[None] ** 2)


def walk(tx, params, loss_fn, num_steps):
    """Parameters and state after each step."""
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(num_steps):
        updates, state = update(jax.grad(loss_fn)(params), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def unrounded(params, state):
    return jax.tree.map(lambda w, r: w.astype(r.dtype) + r, params, state.residual)


# --- keep_on_grid ---------------------------------------------------------------------


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


@pytest.mark.parametrize("bits", [1, "ternary"])
def test_max_abs_finds_the_same_codes_in_the_trained_parameters(bits):
    params, loss_fn = params_and_goal()
    *_, (now, state) = walk(keep_on_grid(MOMENTUM, bits), params, loss_fn, 5)
    small = jaxclip.compress(now, bits, rule=max_abs)
    ours = jaxclip.compress(unrounded(now, state), bits, rule=least_squares)
    assert np.array_equal(small["kernel"].qvalue, ours["kernel"].qvalue)
    np.testing.assert_allclose(small["kernel"].scale, ours["kernel"].scale, rtol=1e-6)


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


@pytest.mark.parametrize("start_step", [2, np.int64(2), jnp.asarray(2)], ids=repr)
def test_the_first_step_on_the_grid_may_be_a_hyper_parameter(start_step):
    params, loss_fn = params_and_goal()
    known = walk(keep_on_grid(optax.sgd(0.1), "ternary", start_step=2), params, loss_fn, 4)
    injected = optax.inject_hyperparams(keep_on_grid, static_args="inner")(
        optax.sgd(0.1), "ternary", start_step=start_step
    )
    for (a, _), (b, _) in zip(known, walk(injected, params, loss_fn, 4), strict=True):
        np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-6)


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


def test_before_its_first_step_it_is_the_inner_optimizer():
    params, loss_fn = params_and_goal()
    inner = jaxclip.lion(0.1)
    ours = walk(keep_on_grid(inner, 1, start_step=4), params, loss_fn, 5)
    theirs = walk(inner, params, loss_fn, 5)
    for i, ((a, _), (b, _)) in enumerate(zip(ours, theirs, strict=True)):
        far = jax.tree.map(lambda x, y: np.max(np.abs(x - y)), a, b)
        assert (max(jax.tree.leaves(far)) <= 2e-7) == (i < 4)


def test_a_box_inside_bounds_the_unrounded_weights():
    params, loss_fn = params_and_goal()
    inner = optax.chain(jaxclip.lion(0.3), jaxclip.project_weights(jaxclip.box(0.5)))
    for now, state in walk(keep_on_grid(inner, "ternary"), params, loss_fn, 6):
        assert (
            max(float(jnp.max(jnp.abs(v))) for v in jax.tree.leaves(unrounded(now, state)))
            <= 0.5 + 1e-7
        )


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


# --- trainable_parts ------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16", "log8"])
def test_rebuilt_from_its_own_parts_a_tree_is_itself(scale_dtype):
    params, _ = params_and_goal()
    small = jaxclip.compress(params, jaxclip.Grid(2, scale_dtype=scale_dtype))
    parts, rebuild = trainable_parts(small)
    again = rebuild(parts)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(small), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


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
        params, jaxclip.Grid(2, zero_point=zero_point, scale_dtype=scale_dtype)
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
    small = jaxclip.compress(params, jaxclip.Grid(4, scale_dtype=scale_dtype))
    parts, rebuild = trainable_parts(small)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(jaxclip.decompress(rebuild(p))["kernel"])))(parts)
    w = np.asarray(jaxclip.decompress(small)["kernel"], np.float64)
    np.testing.assert_allclose(grads["kernel"][0], (np.cos(w) * w).sum(0), rtol=1e-5)
    assert np.array_equal(grads["bias"], np.zeros(4))


def test_trainable_parts_names_what_is_wrong():
    with pytest.raises(ValueError, match="low-bit leaf"):
        trainable_parts({"w": jnp.ones((2, 2))})
    parts, rebuild = trainable_parts(jaxclip.compress({"w": jnp.ones((2, 2))}, 4))
    with pytest.raises(ValueError, match=r"parts\['w'\] must have shape \(1, 2\), got None"):
        rebuild({})
    with pytest.raises(ValueError, match=r"parts\['w'\] must have shape \(1, 2\), got \(2,\)"):
        rebuild({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"parts\['x'\] must have shape None"):
        rebuild(parts | {"x": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"parts must be a dict from path to array, got \[1\]"):
        rebuild([1])
    with pytest.raises(ValueError, match=r"parts\['1'\] must have shape None"):
        rebuild(parts | {1: jnp.ones(2)})


def test_trainable_parts_mixes_up_no_leaves_of_the_same_path():
    params = {"w": jnp.ones((2, 2)), "a": {"b": jnp.zeros(3)}, "a/b": 5 * jnp.ones(3)}
    message = r"\['a'\]\['b'\] and \['a/b'\] are both called 'a/b'"
    with pytest.raises(ValueError, match=message):
        trainable_parts(jaxclip.compress(params, 4))
    del params["a"]
    parts, rebuild = trainable_parts(jaxclip.compress(params, 4))
    assert np.array_equal(rebuild(parts | {"a/b": jnp.arange(3.0)})["a/b"], [0, 1, 2])


# --- least_squares --------------------------------------------------------------------


def refitted(row, low, high, num_refits, step):
    row = row.astype(np.float64)

    def refit(s):
        q = np.clip(np.round(row / s), low, high) if s > 0 else np.zeros_like(row)
        s = (row * q).sum() / (q**2).sum() if q.any() else s
        return s, np.square(row - s * q).sum()

    s = step * np.sqrt(np.mean(row**2))
    if num_refits:
        s = min(refit(np.abs(row).max() / high), refit(s), key=lambda found: found[1])[0]
    for _ in range(num_refits - 1):
        s, _ = refit(s)
    return s * high


@pytest.mark.parametrize("num_refits", [0, 1, 3])
@pytest.mark.parametrize(
    ("bits", "levels", "step"),
    [("ternary", "full", 1.224), (2, "full", 1.048), (4, "full", 0.339), (4, "narrow", 0.353)],
)
def test_least_squares_is_lloyds_alternation_in_float64(bits, levels, step, num_refits):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(9, 50)).astype(np.float32) * np.float32(2.0) ** rng.integers(
        -60, 60, (9, 1)
    )
    w = w.astype(np.float32)
    w[0] = 0
    w[1:3, 7] = 100 * np.abs(
        w[1:3, 7]
    )  # rows for which the scale of the largest weight is the better start
    rule = least_squares(bits, axis=0, num_refits=num_refits, levels=levels)
    got = np.asarray(rule(jnp.asarray(w)))[:, 0]
    expected = [refitted(row, *code_range(bits, levels), num_refits, step) for row in w]
    np.testing.assert_allclose(got, expected, rtol=3e-5)


@every_width
@pytest.mark.parametrize("levels", ["full", "narrow"])
def test_without_a_refit_the_scale_is_the_best_for_a_normal_distribution(bits, levels):
    from scipy.optimize import minimize_scalar
    from scipy.stats import norm

    x = norm.ppf((np.arange(50_000) + 0.5) / 50_000).astype(np.float32)
    low, high = code_range(bits, levels)
    ours = float(least_squares(bits, num_refits=0, levels=levels)(jnp.asarray(x))[0])

    def error(t):
        return sum(
            np.square(y - t / high * np.clip(np.round(y * high / t), low, high)).sum()
            for y in (x, -x)
        )

    if bits == 1:
        assert ours == pytest.approx(np.abs(x).mean(), rel=1e-5)
        return
    found = minimize_scalar(error, bounds=(0.7 * ours, 1.5 * ours), method="bounded").x
    assert abs(found - ours) < 0.01 * ours, (found, ours)


@every_width
@pytest.mark.parametrize("levels", ["full", "narrow"])
def test_the_error_is_never_above_that_of_the_largest_weight(bits, levels):
    rng = np.random.default_rng(3)
    rows = [rng.standard_t(df, (20, 64)) for df in (1, 3)]
    rows += [rng.normal(size=(20, 64)), rng.normal(size=(20, 64)), np.eye(20, 64)]
    rows[-2][:, 5] = 50
    w = jnp.asarray(np.concatenate(rows).astype(np.float32))

    def errors(rule):
        q = jaxclip.quantize(
            w,
            jaxclip.Grid(bits, levels=levels, axis=0),
            threshold=rule(),
        )
        return np.square(np.asarray(jaxclip.dequantize(q)) - np.asarray(w)).sum(axis=1)

    for num_refits in (1, 2):
        ours = errors(functools.partial(least_squares, num_refits=num_refits))
        assert np.all(ours <= errors(max_abs) * (1 + 1e-5))


@every_width
def test_a_refit_never_raises_the_error(bits):
    w = jnp.asarray(np.random.default_rng(2).laplace(size=(400, 6)).astype(np.float32))

    def error(num_refits):
        rule = functools.partial(least_squares, num_refits=num_refits)
        q = jaxclip.quantize(w, jaxclip.Grid(bits, levels="narrow", axis=1), threshold=rule())
        return np.square(np.asarray(jaxclip.dequantize(q)) - np.asarray(w)).sum(axis=0)

    for n in range(3):
        assert np.all(error(n + 1) <= error(n) * (1 + 1e-5))


def test_least_squares_names_what_is_wrong():
    with pytest.raises(ValueError, match="bits"):
        least_squares(7)
    for wrong in (-1, 0.5, True):
        with pytest.raises(ValueError, match="num_refits"):
            least_squares(2, num_refits=wrong)
    with pytest.raises(ValueError, match="needs bits"):
        least_squares()(jnp.ones(3))
