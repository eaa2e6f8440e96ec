"""Sign kinds against float64 NumPy, and their expectations against counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.sign.directions import scale_by_lion, scale_by_sign, scale_by_signum
from jaxclip.sign.kinds import SignKind, resolve_sign_kind, scaled_sign, soft_sign, stochastic_sign
from jaxclip.sign.optimizers import lion, sign_sgd, signum

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
KINDS = {
    "hard": SignKind(),
    "soft": soft_sign(0.5),
    "stochastic": stochastic_sign(jax.random.key(0)),
    "mean_abs": scaled_sign("mean_abs"),
    "rms": scaled_sign("rms"),
    "gradient_norm": scaled_sign("gradient_norm"),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
some_kinds = pytest.mark.parametrize(
    "kind",
    [KINDS[name] for name in ("soft", "stochastic", "rms")]
    + [
        pytest.param(KINDS[name], marks=pytest.mark.thorough)
        for name in ("hard", "mean_abs", "gradient_norm")
    ],
    ids=["soft", "stochastic", "rms", "hard", "mean_abs", "gradient_norm"],
)


def sign_of(x: Any, kind: Any) -> jax.Array:
    """The step for one leaf."""
    tx = scale_by_sign(kind)
    return jax.jit(tx.update)(x, tx.init(x))[0]


def draw(dtype: Any = jnp.float32, size: int = 201) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).standard_normal(size), dtype)


def f64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


# --- Every kind -------------------------------------------------------------------------


@pytest.mark.thorough
@some_kinds
def test_eager_equals_jit_and_the_dtype_is_kept(kind: Any):
    dtype = jnp.bfloat16
    tx, x = scale_by_lion(sign=kind), {"w": draw(dtype), "b": draw(dtype, 5)}
    state = tx.init(x)
    eager, next_state = tx.update(x, state)
    jitted, jitted_state = jax.jit(tx.update)(x, state)
    assert jax.tree.structure(next_state) == jax.tree.structure(state)
    assert jax.tree.structure(jitted_state) == jax.tree.structure(state)
    for name, u in eager.items():
        assert u.dtype == jitted[name].dtype == dtype
        np.testing.assert_allclose(f64(u), f64(jitted[name]), rtol=4 * jnp.finfo(dtype).eps)


@every_kind
def test_zero_and_nan_give_0_and_infinities_their_sign(kind: Any):
    x = jnp.array([0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf, 1.0, -2.0])
    y = f64(sign_of(x, kind))
    assert (y[:3] == 0).all()
    assert y[3] > 0 > y[4]
    assert np.isfinite(y).all()
    assert abs(y[3]) >= abs(y[5])


@every_kind
def test_empty_zero_and_scalar_leaves_work(kind: Any):
    leaves = [jnp.zeros(0), jnp.zeros(4), jnp.asarray(-2.0), jnp.zeros((2, 0))]
    for x, y in zip(leaves, sign_of(leaves, kind), strict=True):
        assert y.shape == x.shape
        np.testing.assert_array_equal(np.sign(f64(y)), np.sign(f64(x)))


@pytest.mark.thorough
@every_kind
def test_finite_in_finite_out(kind: Any):
    fields = ("smallest_subnormal", "tiny", "max")
    x = [
        jnp.asarray(float(getattr(jnp.finfo(dtype), field)) * np.array([1, -1, 1]), dtype)
        for field in fields
        for dtype in DTYPES
    ]
    for y in sign_of(x, kind):
        assert np.isfinite(f64(y)).all()


@every_kind
def test_complex_entries_keep_their_phase(kind: Any):
    z = jnp.array([3 + 4j, -1j, 0j, 1e-2 + 0j], jnp.complex64)
    y = np.asarray(sign_of(z, kind), np.complex128)
    moved = np.abs(y) > 0
    phase = np.asarray(z)[moved] / np.abs(np.asarray(z)[moved])
    np.testing.assert_allclose(y[moved] / np.abs(y[moved]), phase, atol=1e-6)
    assert y[2] == 0


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["soft", "stochastic"])
def test_every_optimizer_takes_a_kind(name: str):
    kind, w, g = KINDS[name], draw(size=9), draw(size=9)[::-1].copy()
    expected = -0.1 * f64(sign_of(g, kind))
    optimizers = [
        sign_sgd(0.1, sign=kind),
        signum(0.1, beta=0.5, sign=kind),
        lion(0.1, b1=0.5, weight_decay=0.0, sign=kind),
        optax.inject_hyperparams(sign_sgd)(0.1, sign=kind),
    ]
    for tx in optimizers:
        updates, _ = jax.jit(tx.update)(g, tx.init(w), w)
        np.testing.assert_allclose(f64(updates), expected, rtol=1e-5)


@pytest.mark.thorough
@some_kinds
def test_scan_vmap_and_donation_work(kind: Any):
    tx, g = scale_by_signum(sign=kind), draw(size=24).reshape(3, 8)
    state = tx.init(g[0])

    def body(state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state)
        return state, updates

    scanned = jax.lax.scan(body, state, g)[1]
    update = jax.jit(tx.update, donate_argnums=1)
    for i in range(3):
        updates, state = update(g[i], state)
        np.testing.assert_allclose(f64(scanned[i]), f64(updates), rtol=1e-6)
    batched = jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(g))[0]))(g)
    assert batched.shape == g.shape


def test_the_default_is_the_hard_sign_bit_for_bit():
    x = jnp.array([-3.0, 0.0, -0.0, 0.5, jnp.nan, jnp.inf])
    for y in (sign_of(x, None), sign_of(x, SignKind())):
        np.testing.assert_array_equal(y, [-1, 0, 0, 1, 0, 1])
    assert scale_by_sign().init(x).sign_state == ()


def test_what_is_not_a_kind_is_refused():
    for bad in ("soft", soft_sign, 0.5, jnp.tanh):
        with pytest.raises(TypeError, match="sign kind"):
            scale_by_sign(bad)
        with pytest.raises(TypeError, match="sign kind"):
            lion(0.1, sign=bad)
    assert resolve_sign_kind(None) == SignKind()


# --- Soft -------------------------------------------------------------------------------


def oracle_quantile(x: np.ndarray, quantile: float) -> float:
    """The smallest |x| that the share of finite non-zero entries does not exceed."""
    size = np.sort(np.abs(x[np.isfinite(x) & (x != 0)]))
    return size[max(int(np.ceil(quantile * size.size)) - 1, 0)]


@pytest.mark.thorough
@pytest.mark.parametrize("quantile", [0.1, 0.5, 1.0])
def test_soft_is_tanh_of_x_over_temperature_and_quantile(quantile: float):
    leaves = [draw(dtype) for dtype in DTYPES]
    kind = soft_sign(0.7, quantile=quantile)
    for x, y in zip(leaves, sign_of(leaves, kind), strict=True):
        exact, slack = oracle_quantile(f64(x), quantile), 4 * float(jnp.finfo(x.dtype).eps)
        # The quantile is cut to 7 bits: below by at most a share 2**-7.
        low = np.tanh(np.abs(f64(x)) / (0.7 * exact))
        high = np.tanh(np.abs(f64(x)) / (0.7 * exact * (1 - 2.0**-7)))
        assert (np.abs(f64(y)) >= low * (1 - slack)).all()
        assert (np.abs(f64(y)) <= high * (1 + slack)).all()
        assert (np.sign(f64(y)) == np.sign(f64(x)))[f64(x) != 0].all()


@pytest.mark.thorough
def test_zeros_and_nonfinite_entries_do_not_count_in_the_quantile():
    x = draw(size=32)
    nonfinite = jnp.array([jnp.nan, jnp.inf, -jnp.inf], x.dtype)
    padded = jnp.concatenate([x, jnp.zeros(500, x.dtype), nonfinite])
    expected = sign_of(x, soft_sign(0.5))
    np.testing.assert_array_equal(sign_of(padded, soft_sign(0.5))[:32], expected)


@every_kind
def test_at_the_top_of_float32_a_kind_does_as_with_ordinary_magnitudes(kind: Any):
    x = np.float32([1.5, -0.6, 1.99, 0.05, 0.0])
    step = f64(sign_of(x, kind))
    size = 2.0**127 if isinstance(kind, type(scaled_sign())) else 1.0
    top = x * np.float32(2.0**126) * 2
    np.testing.assert_allclose(f64(sign_of(top, kind)), step * size, rtol=1e-6)
    with_inf = f64(sign_of(np.append(top, np.float32(np.inf)), kind))
    assert np.isfinite(with_inf).all()
    assert with_inf[-1] > 0


@pytest.mark.thorough
def test_soft_is_the_same_for_the_gradient_times_any_power_of_two():
    x = draw()
    small, same, large = sign_of([x * 2.0**-60, x, x * 2.0**60], soft_sign())
    np.testing.assert_array_equal(small, same)
    np.testing.assert_array_equal(large, same)


@pytest.mark.parametrize("temperature", [0.0, jnp.float32(-1.0), jnp.float32(jnp.nan), 1e-9])
def test_temperature_0_is_the_hard_sign(temperature: Any):
    x = draw()
    np.testing.assert_array_equal(sign_of(x, soft_sign(temperature)), jnp.sign(x))


@pytest.mark.thorough
def test_a_temperature_schedule_counts_steps():
    tx = scale_by_sign(soft_sign(lambda step: jnp.where(step == 0, 1.0, 0.0)))
    x = draw()
    state = tx.init(x)
    first, state = tx.update(x, state)
    second, state = tx.update(x, state)
    np.testing.assert_allclose(first, sign_of(x, soft_sign(1.0)), rtol=1e-6)
    np.testing.assert_array_equal(second, jnp.sign(x))
    assert int(state.sign_state.step) == 2


@pytest.mark.thorough
def test_the_temperature_may_be_traced_and_swept():
    x, values = draw(), jnp.array([0.0, 0.5, 2.0])
    swept = jax.jit(jax.vmap(lambda t: scale_by_sign(soft_sign(t)).update(x, empty_state())[0]))
    for y, value in zip(swept(values), values, strict=True):
        np.testing.assert_allclose(y, sign_of(x, soft_sign(float(value))), rtol=1e-6)


def empty_state() -> Any:
    return scale_by_sign().init(())


def test_soft_arguments_are_checked():
    for bad in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="temperature"):
            soft_sign(bad)
    for bad in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="quantile"):
            soft_sign(0.5, quantile=bad)
    with pytest.raises(TypeError, match="temperature"):
        soft_sign("warm")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "axis_type"),
    [("soft", "Auto"), ("soft", "Explicit"), ("stochastic", "Explicit"), ("rms", "Explicit")],
)
def test_sharded_leaves_give_what_one_device_gives(name: str, axis_type: str):
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    x, tx = draw(size=64).reshape(16, 4), scale_by_lion(sign=KINDS[name])
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",), axis_types=(getattr(AxisType, axis_type),))
    expected = jax.device_get(jax.jit(tx.update)(x, tx.init(x))[0])
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("x"))
        placed = jax.device_put(x, sharding)
        compiled = jax.jit(tx.update).lower(placed, tx.init(placed)).compile()
        updates = compiled(placed, tx.init(placed))[0]
    assert updates.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(jax.device_get(updates), expected, rtol=1e-6)
    assert "all-gather" not in compiled.as_text()
    assert "sort(" not in compiled.as_text()


@pytest.mark.thorough
def test_kinds_work_inside_shard_map_with_its_check_on():
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    mesh, x = Mesh(np.array(jax.devices()[:8]), ("x",)), draw(size=64).reshape(8, 8)
    for name in ("soft", "rms"):
        tx = scale_by_sign(KINDS[name])
        local = jax.shard_map(
            lambda g, tx=tx: tx.update(g, empty_state())[0],
            mesh=mesh, in_specs=P("x"), out_specs=P("x"),
        )  # fmt: skip
        row = sign_of(x[2], KINDS[name])
        np.testing.assert_allclose(jax.jit(local)(x)[2], row, rtol=1e-6)


# --- Stochastic -------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_signs_have_mean_x_over_max(dtype: Any):
    x, num_draws = draw(dtype, 20), 4000
    tx = scale_by_sign(stochastic_sign(jax.random.key(7)))

    def body(state: Any, _: Any) -> Any:
        updates, state = tx.update(x, state)
        return state, updates

    drawn = f64(jax.lax.scan(body, tx.init(x), None, length=num_draws)[1])
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    expected = f64(x) / np.abs(f64(x)).max()
    # A draw has a standard deviation of at most 1: six sigma.
    assert np.abs(drawn.mean(0) - expected).max() < 6 / np.sqrt(num_draws)
    # Entries are independent of each other: so are their products.
    product = (drawn[:, 0] * drawn[:, 1]).mean()
    assert abs(product - expected[0] * expected[1]) < 6 / np.sqrt(num_draws)


@pytest.mark.thorough
def test_the_key_changes_every_step_and_the_users_key_survives_donation():
    key = jax.random.key(0)
    tx, x = scale_by_sign(stochastic_sign(key)), draw()
    update = jax.jit(tx.update, donate_argnums=1)
    first, state = update(x, tx.init(x))
    second, state = update(x, state)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(update(x, tx.init(x))[0], first)
    assert jax.random.key_data(key).shape == (2,)


@pytest.mark.thorough
def test_leaves_and_workers_draw_independently_from_one_key():
    x = draw()
    tx = scale_by_sign(stochastic_sign(jax.random.PRNGKey(0)))
    both = sign_of({"a": x, "b": x}, stochastic_sign(jax.random.PRNGKey(0)))
    assert not np.array_equal(both["a"], both["b"])

    def on_two_workers(tx: Any) -> jax.Array:
        update = jax.vmap(lambda x: tx.update(x, tx.init(x))[0], axis_name="i")
        return jax.jit(update)(jnp.stack([x, x]))

    shared = on_two_workers(tx)
    np.testing.assert_array_equal(shared[0], shared[1])
    split = on_two_workers(scale_by_sign(stochastic_sign(jax.random.key(0), axis_name="i")))
    assert not np.array_equal(split[0], split[1])


@pytest.mark.thorough
def test_a_complex_draw_is_the_unit_with_probability_of_its_modulus():
    z = jnp.array([4 + 3j, 1j, -2.5], jnp.complex64)
    tx = scale_by_sign(stochastic_sign(jax.random.key(1)))
    draws = jax.lax.scan(lambda s, _: tx.update(z, s)[::-1], tx.init(z), None, length=4000)[1]
    mean = np.asarray(draws, np.complex128).mean(0)
    assert np.abs(mean - np.asarray(z) / 5).max() < 6 / np.sqrt(4000)


def test_what_is_not_a_key_is_refused():
    for bad in (0, None, jnp.zeros(2), "key"):
        with pytest.raises(TypeError, match="PRNG key"):
            stochastic_sign(bad)


# --- Scaled -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean_abs", "rms", "gradient_norm"])
def test_scales_are_those_of_numpy(name: str):
    leaves = [draw(dtype) for dtype in DTYPES]
    for x, y in zip(leaves, sign_of(leaves, scaled_sign(name)), strict=True):
        size = np.abs(f64(x)).mean() if name == "mean_abs" else np.sqrt(np.square(f64(x)).mean())
        slack = 4 * float(jnp.finfo(x.dtype).eps)
        np.testing.assert_allclose(f64(y), size * np.sign(f64(x)), rtol=slack)


def test_mean_abs_is_the_closest_multiple_of_the_sign():
    x = f64(draw())
    best = f64(sign_of(jnp.asarray(x, jnp.float32), scaled_sign("mean_abs")))
    error = np.square(x - best).sum()
    for factor in (0.9, 1.1):
        assert error < np.square(x - factor * best).sum()


@pytest.mark.thorough
def test_gradient_norm_grafts_the_norm_onto_the_direction_of_momentum():
    tx = scale_by_lion(sign=scaled_sign("gradient_norm"))
    g = draw(size=40).at[:7].set(0.0)
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(np.linalg.norm(f64(updates)), np.linalg.norm(f64(g)), rtol=1e-6)
    updates, _ = tx.update(0.25 * g, state)
    expected = 0.25 * np.linalg.norm(f64(g))
    np.testing.assert_allclose(np.linalg.norm(f64(updates)), expected, rtol=1e-6)


@pytest.mark.thorough
def test_large_and_small_gradients_keep_their_scale():
    x = [jnp.full(16, 1e30), jnp.full(16, 1e-30)]
    for name in ("mean_abs", "rms", "gradient_norm"):
        for y, given in zip(sign_of(x, scaled_sign(name)), x, strict=True):
            np.testing.assert_allclose(y, given, rtol=1e-5)


def test_unknown_scales_are_refused():
    for bad in ("l1", None, 1.0):
        with pytest.raises(ValueError, match="scale"):
            scaled_sign(bad)


@pytest.mark.thorough
def test_kinds_train_inside_a_train_step():
    tx = jaxclip.lion(0.05, weight_decay=0.0, sign=soft_sign(0.5))
    step = jaxclip.make_train_step(lambda w, t: jnp.sum((w - t) ** 2), tx, weight_threshold=2.0)
    state = jaxclip.TrainState.create(jnp.zeros(3), tx)
    for _ in range(60):
        state, info = step(state, jnp.array([1.0, -0.5, 0.25]))
    assert float(info.loss) < 0.1
