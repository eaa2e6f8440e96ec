"""Norms against long-double NumPy, from subnormals to the largest numbers."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxclip
from jaxclip.norms import of_trees, of_units
from jaxclip.norms.of_trees import global_norm, measure_norm, rescaled_global_norm
from oracles.exact_norms import assert_norm, oracle

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
ORDS = [1, 2, np.inf]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_ord = pytest.mark.parametrize("ord", ORDS)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
jitted_norm = jax.jit(global_norm, static_argnames=("ord",))


def from_bits(bits: np.ndarray, dtype) -> np.ndarray:
    """Every finite number of a dtype, by its bits; NaN becomes 1, inf the largest."""
    largest = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = bits.view(dtype).astype(np.float64)
    return np.nan_to_num(x, nan=1.0, posinf=largest, neginf=-largest).astype(dtype)


def arrays(dtype, size=8):
    unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
    return hnp.arrays(unsigned, size).map(lambda bits: from_bits(bits, dtype))


@every_dtype
@every_ord
@given(data=st.data())
def test_norms_equal_the_oracle_for_every_finite_input(dtype, ord, data):
    x = data.draw(arrays(dtype))
    assert_norm(jitted_norm(jnp.asarray(x), ord=ord), oracle([x], ord), x.size)


@every_ord
@given(bits=hnp.arrays(np.uint64, 8))
def test_float64_norms_equal_the_oracle_for_every_finite_input(ord, bits):
    x = from_bits(bits, np.float64)
    with enable_x64(True):
        got = jitted_norm(jnp.asarray(x), ord=ord)
        assert got.dtype == jnp.float64
    assert_norm(got, oracle([x], ord), 8, 1e-14, np.finfo(np.float64).tiny, np.finfo("d").max)


@pytest.mark.parametrize("norm", [global_norm, jitted_norm], ids=["eager", "jit"])
@every_ord
@every_dtype
@pytest.mark.parametrize("magnitude", ["tiny", "small", "one", "large", "max"])
def test_norms_of_normal_draws_are_right_at_every_magnitude(norm, ord, dtype, magnitude):
    info = ml_dtypes.finfo(dtype)
    scale = {
        "tiny": float(info.tiny) * 100,
        "small": max(1e-25, float(info.tiny) * 100),
        "one": 1.0,
        "large": min(1e25, float(info.max) / 100),
        "max": float(info.max) / 8,
    }[magnitude]
    x = (np.random.default_rng(0).normal(size=(7, 9)).clip(-4, 4) * scale).astype(dtype)
    got = norm({"a": jnp.asarray(x[:3]), "b": jnp.asarray(x[3:])}, ord=ord)
    assert got.dtype == jnp.float32
    assert_norm(got, oracle([x], ord), x.size)


@given(x=arrays(np.float32))
def test_a_rescaled_norm_is_finite_and_exact_even_beyond_float32(x):
    norm, rescale = rescaled_global_norm(jnp.asarray(x))
    assert np.isfinite(norm)
    assert np.log2(float(rescale)) in (-90, 0, 90)
    got = np.longdouble(float(norm)) / np.longdouble(float(rescale))
    expected = oracle([x])
    assert abs(got - expected) <= 2e-6 * expected + 8 * 2.0**-126


def test_norms_are_as_right_where_the_device_lacks_float64(monkeypatch):
    for module in (of_trees, of_units):
        monkeypatch.setattr(module, "uses_float64", lambda dtype: False)
    jax.clear_caches()
    try:
        for scale, dtype, ord in itertools.product((1e-36, 1.0, 1e38), DTYPES[1:], ORDS):
            x = (np.linspace(-1, 1, 15) * scale).astype(dtype)
            assert_norm(jitted_norm({"w": jnp.asarray(x)}, ord=ord), oracle([x], ord), x.size)
            norms = of_units.leaf_norms(jnp.asarray(x), ord=ord)
            assert_norm(norms, oracle([x], ord), x.size)
    finally:
        jax.clear_caches()  # later tests must not meet these programs


@every_ord
def test_mixed_dtypes_share_one_float32_norm(ord):
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=11).astype(d) for d in DTYPES]
    got = global_norm([jnp.asarray(p) for p in parts], ord=ord)
    assert got.dtype == jnp.float32
    assert_norm(got, oracle(parts, ord), 33)


@pytest.mark.thorough
def test_many_bfloat16_leaves_of_norm_one_do_not_stall():
    leaves = [jnp.ones((), jnp.bfloat16)] * 17**2  # a bfloat16 sum stalls at 256
    assert float(global_norm(leaves)) == 17.0


def test_the_sum_of_a_large_leaf_does_not_stall():
    # A running float32 sum of ones stalls at 2**24.
    assert float(global_norm(jnp.ones(2**25, jnp.float16), ord=1)) == 2.0**25


@pytest.mark.thorough
@every_ord
@pytest.mark.parametrize("scale", [1e-30, 1.0, 2e38])
def test_complex_entries_count_by_modulus(ord, scale):
    rng = np.random.default_rng(2)
    z = ((rng.uniform(-1, 1, 5) + 1j * rng.uniform(-1, 1, 5)) * scale).astype(np.complex64)
    assert_norm(global_norm(jnp.asarray(z), ord=ord), oracle([z], ord), 5)
    assert_norm(global_norm([jnp.asarray(z), jnp.ones(2)], ord=ord), oracle([z, [1, 1]], ord), 7)


@every_ord
def test_leaves_that_are_not_floating_do_not_count(ord):
    others = [
        jnp.full(3, 100),
        True,
        7,
        None,
        np.ones(3, bool),
        jnp.ones(3, jnp.uint8),
        jax.random.key(0),
        np.zeros(3, jax.dtypes.float0),
    ]
    assert float(global_norm([jnp.asarray([3.0]), *others], ord=ord)) == 3.0
    assert float(global_norm(others, ord=ord)) == 0.0


@eager_and_jit
@every_ord
def test_an_empty_tree_and_leaves_without_entries_have_norm_zero(wrap, ord):
    norm = wrap(lambda t: global_norm(t, ord=ord))
    for tree in ({}, None, [], {"a": jnp.zeros((0, 3), jnp.float32)}, [jnp.zeros(0, jnp.bfloat16)]):
        got = norm(tree)
        assert got.dtype == jnp.float32
        assert got.shape == ()
        assert float(got) == 0.0


def test_python_and_numpy_numbers_count():
    assert float(global_norm({"a": 3.0, "b": np.float64(4.0)})) == 5.0
    assert float(global_norm(np.asarray([6.0, 8.0]))) == 10.0
    assert float(global_norm([3 + 4j])) == 5.0


@pytest.mark.thorough
@every_ord
def test_infinite_entries_give_inf_and_nan_entries_nan(ord):
    for wrap in (lambda f: f, jax.jit):
        norm = wrap(lambda t: global_norm(t, ord=ord))
        assert float(norm(jnp.asarray([1.0, -np.inf]))) == np.inf
        assert np.isnan(norm(jnp.asarray([1.0, np.nan])))
        assert np.isnan(norm(jnp.asarray([np.inf, np.nan])))
        # XLA's maximum on CPU loses a NaN among many entries.
        many = jnp.zeros(5000).at[700].set(jnp.nan)
        assert np.isnan(norm(many))
        assert np.isnan(norm([many[i] for i in range(690, 710)]))


@pytest.mark.parametrize("ord", [0, 3, -1, 1.5, np.nan, -np.inf, "2", "max", None, True, 2j])
def test_an_unknown_ord_is_refused_by_name(ord):
    with pytest.raises((ValueError, TypeError), match="ord"):
        global_norm(jnp.ones(2), ord=ord)


# --- Derivatives and transformations ---------------------------------------------------


@pytest.mark.thorough
@eager_and_jit
def test_the_derivative_is_zero_at_zero(wrap):
    grad = wrap(jax.grad(global_norm))
    assert np.array_equal(grad(jnp.zeros(4)), np.zeros(4))
    both = wrap(jax.grad(lambda t: global_norm(t)))({"a": jnp.zeros(2), "b": jnp.ones(1)})
    assert np.array_equal(both["a"], [0, 0])
    assert np.array_equal(both["b"], [1])


@eager_and_jit
@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1.0, 1e25, 1.5e38, 3e38])
def test_the_derivative_is_the_unit_vector_at_every_magnitude(wrap, scale):
    x = np.asarray([3.0, -4.0, 0.0, 12.0]) / 13
    got = wrap(jax.grad(global_norm))(jnp.asarray(x * scale, jnp.float32))
    np.testing.assert_allclose(got, x, rtol=1e-5)


@pytest.mark.thorough
def test_vmap_gives_the_norm_of_each_row_at_mixed_magnitudes():
    x = np.outer([1e-30, 1.0, 1e30, 0.0], [3.0, 4.0]).astype(np.float32)
    got = jax.vmap(global_norm)(jnp.asarray(x))
    np.testing.assert_allclose(got, [5e-30, 5, 5e30, 0], rtol=1e-6)
    grads = jax.vmap(jax.grad(global_norm))(jnp.asarray(x))
    np.testing.assert_allclose(grads, [[0.6, 0.8]] * 3 + [[0, 0]], rtol=1e-5)


@every_ord
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_axis_name_gives_the_global_norm_inside_vmap(ord, scale):
    x = (np.random.default_rng(3).normal(size=(4, 6)) * scale).astype(np.float32)
    got = jax.vmap(lambda t: global_norm(t, ord=ord, axis_name="i"), axis_name="i")(jnp.asarray(x))
    for g in got:
        assert_norm(g, oracle([x], ord), x.size)


@every_ord
@pytest.mark.parametrize("where", ["everywhere", "one device"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_axis_name_gives_the_global_norm_on_every_device_of_shard_map(ord, scale, where):
    mesh = Mesh(np.asarray(jax.devices()), ("d",))
    spec = PartitionSpec("d")
    x = np.random.default_rng(4).normal(size=(16, 3))
    x = x * scale if where == "everywhere" else np.where(np.arange(16)[:, None] < 2, x * scale, x)
    x = x.astype(np.float32)

    def local(t):
        return global_norm(t, ord=ord, axis_name="d")[None]

    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
    got = mapped({"a": jnp.asarray(x), "n": jnp.arange(8)})
    assert len(got) == 8
    for g in got:
        assert_norm(g, oracle([x], ord), x.size)


@pytest.mark.thorough
@every_ord
def test_sharded_arrays_under_jit_have_the_global_norm(ord):
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("a", "b"))
    x = np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)
    for spec in (PartitionSpec("a", "b"), PartitionSpec(None, "b"), PartitionSpec(("a", "b"))):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        got = jitted_norm({"w": sharded, "b": jnp.ones(3)}, ord=ord)
        assert_norm(got, oracle([x, np.ones(3)], ord), x.size)


def test_the_root_exports_the_norm():
    assert jaxclip.global_norm is global_norm


@pytest.mark.thorough
def test_each_device_has_its_own_norm_inside_shard_map_without_an_axis_name():
    mesh, spec = Mesh(np.array(jax.devices()[:8]), ("x",)), PartitionSpec("x")
    x = jnp.arange(1.0, 17.0).reshape(8, 2) * jnp.where(jnp.arange(8.0) == 3, 1e20, 1)[:, None]

    def local(x):
        return global_norm({"a": x, "b": x[0, 0]})[None]

    norms = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    rows = np.asarray(x, np.float64)
    expected = np.sqrt(np.sum(rows**2, axis=1) + rows[:, 0] ** 2)
    np.testing.assert_allclose(norms, expected, rtol=1e-6)


def test_a_measured_norm_is_used_only_for_the_same_arrays_order_and_axis():
    tree = {"a": jnp.ones(2), "b": jnp.ones(3)}
    measured = measure_norm(tree)
    assert measured.is_of(dict(tree), 2, None)
    assert not measured.is_of(tree, 1, None)
    assert not measured.is_of(tree, 2, "x")
    assert not measured.is_of(tree | {"b": tree["b"] * 2}, 2, None)
    assert not measured.is_of({"a": tree["a"]}, 2, None)


def test_a_measured_norm_knows_the_norm_of_each_leaf_and_which_is_not_finite():
    norms = measure_norm([jnp.array([3.0, 4.0]), jnp.array(0.0)]).leaf_norms
    np.testing.assert_allclose(norms, [5, 0])
    norms = measure_norm([jnp.array([jnp.inf]), jnp.full(9, 3e38)]).leaf_norms
    assert not np.isfinite(norms[0])
    assert norms[1] == jnp.finfo(jnp.float32).max


@pytest.mark.parametrize("size", [0.0, 1e-25, 1e25])
def test_the_norm_of_a_constant_leaf_of_a_program_is_right(size):
    # XLA would fold the constant with the rescale, squared: 0 * inf.
    @jax.jit
    def norms(x):
        tree = {"x": x, "unused": jnp.full(4, size)}
        return jaxclip.global_norm(tree), jaxclip.norms.leaf_norms(tree)["unused"]

    np.testing.assert_allclose(norms(jnp.zeros(3)), [2 * size] * 2, rtol=1e-6)
