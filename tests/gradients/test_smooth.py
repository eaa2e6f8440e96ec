"""The smooth clip against its formula in extended precision."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jaxclip
from jaxclip.gradients.smooth import smooth_clip
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.of_trees import measure_norm

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
BF16 = ml_dtypes.bfloat16
DTYPES = [np.float16, BF16, np.float32, np.complex64]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def exact(x) -> np.ndarray:
    x = np.asarray(x)
    return (
        x.astype(np.clongdouble) if x.dtype.kind == "c" else x.astype(float).astype(np.longdouble)
    )


def exact_norm(tree) -> np.longdouble:
    return np.sqrt(np.longdouble(sum(np.sum(np.abs(exact(x)) ** 2) for x in jax.tree.leaves(tree))))


def exact_result(g, scale) -> np.ndarray:
    g, scale = exact(g), np.longdouble(scale)
    return g * (scale / (scale + exact_norm(g)))


def make_entries(dtype, size, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, 64) + (1j * rng.uniform(-1, 1, 64) if np.dtype(dtype).kind == "c" else 0)
    return (x * size).astype(dtype)


def clip_once(tx, grads):
    return tx.update(grads, tx.init(grads))


def sizes_of(dtype) -> list[float]:
    info = jnp.finfo(dtype)
    return [float(info.tiny) * 2.0**8, float(info.tiny) ** 0.5, 1.0, float(info.max) ** 0.5,
            float(info.max)]  # fmt: skip


@pytest.mark.thorough
@every_dtype
@eager_and_jit
def test_result_is_the_formula_at_every_magnitude_of_gradient_and_scale(dtype, wrap):
    clip = wrap(lambda s, g: clip_once(smooth_clip(s), g)[0])
    info = jnp.finfo(dtype)
    for size in sizes_of(dtype):
        for scale in (size / 64, size, min(size * 64, 3e38), 1.0, 2.0**-100, 3e38):
            scale = np.float32(max(scale, 2.0**-100))
            grads = make_entries(dtype, size)
            result = clip(scale, grads)
            assert result.dtype == dtype
            expected = exact_result(grads, scale)
            # Entries below the normal range are 0 on CPU, or evenly spaced in float16.
            spacing = float(info.smallest_subnormal if dtype == np.float16 else info.tiny)
            error = np.abs(exact(result) - expected)
            relative = 4 * float(info.eps) if info.bits < 32 else 2e-6
            assert (error <= relative * np.abs(expected) + 2 * spacing).all()


@every_dtype
def test_the_scale_is_never_exceeded_in_exact_arithmetic(dtype):
    clip = jax.jit(lambda s, g: clip_once(smooth_clip(s), g)[0])
    for size in sizes_of(dtype):
        for fraction in (0.001, 0.1, 0.7, 1.0):
            scale = np.float32(max(size * fraction, 2.0**-100))
            for seed in range(3):
                result = clip(scale, make_entries(dtype, size, seed))
                assert exact_norm(result) <= np.longdouble(scale)


@every_dtype
def test_half_precision_and_all_others_are_rounded_towards_zero(dtype):
    grads = make_entries(dtype, 2.0)
    result = exact(clip_once(smooth_clip(1.5), grads)[0])
    slack = 1e-6 if jnp.finfo(dtype).bits == 32 else 0
    assert (np.abs(result) <= np.abs(exact_result(grads, 1.5)) * (1 + slack) + slack).all()


@every_dtype
def test_an_infinite_scale_is_bit_identical_and_a_scale_of_zero_gives_zeros(dtype):
    for grads in (
        make_entries(dtype, 1.0),
        np.asarray([0.0, -0.0], dtype),
        np.full(2, jnp.finfo(dtype).smallest_subnormal, dtype),
        np.full(2, jnp.finfo(dtype).max, dtype),
    ):
        same, _ = clip_once(smooth_clip(np.inf), jnp.asarray(grads))
        assert np.asarray(same).tobytes() == grads.tobytes()
        if dtype != np.float16 and np.abs(exact(grads)).max() < 2.0**-126:
            continue  # their norm is 0 where the backend has no subnormals
        for zero in (0.0, jnp.float32(0), jnp.float32(-1)):
            nothing, _ = clip_once(smooth_clip(zero), jnp.asarray(grads))
            assert not np.asarray(nothing).any()


@pytest.mark.thorough
def test_float64_is_computed_in_float64():
    with enable_x64():
        grads = make_entries(np.float64, 3.0)
        result, _ = clip_once(smooth_clip(1.0), jnp.asarray(grads))
        np.testing.assert_allclose(result, exact_result(grads, 1.0).astype(float), rtol=1e-14)


def test_the_norm_is_over_all_leaves():
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0, jnp.bfloat16), "n": jnp.arange(2)}
    result, state = clip_once(smooth_clip(5.0), grads)
    np.testing.assert_allclose(result["a"], [1.5, 0.0], rtol=2e-6)
    assert result["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(float(result["b"]), 2.0, rtol=2**-7)
    np.testing.assert_allclose([state.stats.pre_norm, state.stats.post_norm], [5.0, 2.5], rtol=2e-6)
    np.testing.assert_allclose(state.stats.clip_coef, 0.5, rtol=2e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("scale", [1.0, np.inf])
def test_derivative_at_zero_is_the_identity(scale):
    jacobian = jax.jacobian(lambda g: clip_once(smooth_clip(scale), g)[0])(jnp.zeros(3))
    np.testing.assert_array_equal(jacobian, np.eye(3))


@pytest.mark.thorough
@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0])
def test_derivative_is_that_of_the_formula(scale):
    with enable_x64():
        g, change = np.random.default_rng(1).normal(size=(2, 6))
        _, actual = jax.jvp(
            lambda x: clip_once(smooth_clip(scale), x)[0],
            (jnp.asarray(g),),
            (jnp.asarray(change),),
        )
        step = 1e-6
        ends = [exact_result(g + h * change, scale) for h in (step, -step)]
        expected = ((ends[0] - ends[1]) / (2 * step)).astype(float)
        np.testing.assert_allclose(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [0.0, 2.0**-120, 1.0, 3e38])
@pytest.mark.parametrize("scale", [0.0, 2.0**-120, 1.0, 3e38])
def test_gradients_are_finite_at_every_magnitude(size, scale):
    def total(g, s):
        return jnp.sum(clip_once(smooth_clip(s), g)[0] * jnp.float32(1e-3))

    g = jnp.full(3, size, jnp.float32)
    by_entry, by_scale = jax.grad(total, (0, 1))(g, jnp.float32(scale))
    assert np.isfinite(np.asarray(by_entry)).all()
    assert np.isfinite(np.asarray(by_scale)).all()


def test_a_bad_step_gives_zeros_and_is_counted():
    tx = smooth_clip(1.0)
    grads = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, before = tx.update(grads, tx.init(grads))
    for bad in (np.nan, np.inf):
        result, state = tx.update(grads | {"a": jnp.array([1.0, bad])}, before)
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(result))
        assert int(state.stats.num_nonfinite) == 1
        assert float(state.stats.pre_norm) == float(before.stats.pre_norm) > 0
        assert float(state.stats.post_norm) == float(state.stats.clip_coef) == 0


def test_a_traced_nan_as_scale_is_a_bad_step():
    tx = jax.jit(lambda s: clip_once(smooth_clip(s), jnp.ones(2)))
    result, state = tx(jnp.nan)
    assert not np.asarray(result).any()
    assert int(state.stats.num_nonfinite) == 1


@pytest.mark.thorough
def test_the_norm_is_taken_over_a_mapped_axis():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    grads = jnp.array([3.0, 4.0])
    clip = jax.shard_map(
        lambda g: clip_once(smooth_clip(5.0, axis_name="x"), g)[0],
        mesh=mesh,
        in_specs=PartitionSpec("x"),
        out_specs=PartitionSpec("x"),
    )
    np.testing.assert_allclose(clip(grads), [1.5, 2.0], rtol=2e-6)


def test_a_norm_that_was_measured_already_is_used():
    grads, tx = jnp.array([3.0, 4.0]), smooth_clip(5.0)
    # A false norm, to see that it is this one that is taken.
    norm = RescaledNorm(jnp.float32(15.0), jnp.float32(1.0))
    measured = measure_norm(grads)._replace(norm=norm)
    _, state = tx.update(grads, tx.init(grads), pre_norm=measured)
    assert float(state.stats.pre_norm) == 15.0
    _, state = tx.update(grads, tx.init(grads), pre_norm=measured._replace(tree=jnp.ones(2)))
    assert float(state.stats.pre_norm) == 5.0


@pytest.mark.parametrize("bad", [-1.0, np.nan, "1", None, True, 1j])
def test_a_wrong_scale_is_refused(bad):
    with pytest.raises((TypeError, ValueError), match="scale"):
        smooth_clip(bad)


def test_a_rule_or_a_tree_as_scale_is_refused():
    with pytest.raises(TypeError, match=r"scale.*rule"):
        smooth_clip(jaxclip.max_abs())
    with pytest.raises((TypeError, ValueError), match="scale"):
        smooth_clip({"a": 1.0})


@pytest.mark.thorough
def test_statistics_are_found_by_name():
    stats = jaxclip.clip_stats(smooth_clip(1.0).init(jnp.ones(2)))
    fields = ("pre_norm", "post_norm", "clip_coef", "num_nonfinite")
    assert set(stats) == {f"smooth_clip/{f}" for f in fields}
