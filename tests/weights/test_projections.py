"""Projections: norms of units, unit norms, singular values; against NumPy, optax and formulas."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import jaxclip
from jaxclip.weights.projections import Projection, max_norm, spectral_cap, unit_norm
from oracles.exact_sets import DTYPES, drawn, norms, wide

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
seeds = st.integers(0, 2**32 - 1)


@functools.partial(jax.jit, static_argnums=2)
def project_columns(w, bound, axis=0):
    return max_norm(bound, axis)(w)


# --- max_norm -------------------------------------------------------------------------


@every_dtype
@given(seed=seeds, power=st.integers(-20, 12), size=st.integers(-22, 14))
@example(seed=0, power=0, size=126)
@example(seed=1, power=0, size=-120)
def test_norms_are_at_most_the_bound_in_exact_arithmetic_and_units_within_untouched(
    dtype, seed, power, size
):
    w, bound = drawn(seed, (8, 4), dtype, 2.0**size), np.float32(1.37 * 2.0**power)
    got = np.asarray(project_columns(jnp.asarray(w), bound))
    assert got.dtype == dtype
    before, after = norms(w, 0), norms(got, 0)
    is_scaled = before > bound * (1 + 1e-6)
    assert np.all(after[is_scaled] <= bound)
    for j in range(4):
        if before[0, j] <= bound * (1 - 1e-6):
            assert got[:, j].tobytes() == w[:, j].tobytes()
        elif is_scaled[0, j]:
            expected = wide(w[:, j]) * (bound / before[0, j])
            info = ml_dtypes.finfo(dtype)
            atol = max(float(info.smallest_subnormal), 2.0**-126)
            np.testing.assert_allclose(
                wide(got[:, j]), expected, rtol=2 * float(info.eps) + 1e-5, atol=2 * atol
            )


@every_dtype
def test_projecting_twice_changes_nothing(dtype):
    w = jnp.asarray(drawn(2, (64, 8), dtype, 3.0))
    once = project_columns(w, np.float32(0.9))
    assert np.array_equal(np.asarray(project_columns(once, np.float32(0.9))), np.asarray(once))


def test_a_unit_exactly_on_the_bound_is_bit_identical_and_zeros_stay():
    w = jnp.asarray([[3.0, 0.0], [4.0, 0.0]])
    assert np.array_equal(max_norm(5.0, 0)(w), w)
    for bound in (0.0, jnp.float32(0.0), jnp.float32(-1.0)):
        assert np.array_equal(max_norm(bound, 0)(w), np.zeros((2, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_unit_that_is_not_finite_is_left_alone_and_the_others_are_projected(bad):
    w = jnp.asarray([[3.0, bad], [4.0, 9.0]])
    got = np.asarray(project_columns(w, np.float32(1.0)))
    assert np.array_equal(got[:, 1], [bad, 9.0], equal_nan=True)
    np.testing.assert_allclose(got[:, 0], [0.6, 0.8], rtol=1e-5)


def test_a_traced_bound_of_nan_or_infinity_bounds_nothing():
    w = jnp.asarray([[3.0], [4.0]])
    for bound in (np.nan, np.inf):
        assert np.array_equal(project_columns(w, jnp.float32(bound)), w)
    assert np.array_equal(max_norm(float("inf"))(w), w)


def test_float64_norms_are_bounded_as_given_and_complex_ones_by_modulus():
    with enable_x64(True):
        got = np.asarray(max_norm(0.1, 0)(jnp.asarray(np.random.default_rng(0).normal(size=9))))
        assert got.dtype == np.float64
        assert norms(got, 0) <= 0.1
        np.testing.assert_allclose(norms(got, 0), 0.1, rtol=1e-14)
    z = jnp.asarray([[3 + 0j, 0], [0 + 4j, 1e-3]], jnp.complex64)
    got = max_norm(1.0, 0)(z)
    np.testing.assert_allclose(got, [[0.6, 0], [0.8j, 1e-3]], rtol=1e-5)
    assert np.all(norms(got, 0) <= 1)


@pytest.mark.thorough
def test_the_default_units_go_by_the_layers_of_flax_and_an_ellipsis_takes_the_leaf():
    rng = np.random.default_rng(3)
    for shape, axes in [((6,), 0), ((5, 4), 0), ((3, 3, 2, 4), (0, 1, 2))]:
        w = rng.normal(size=shape).astype(np.float32)
        got = max_norm(0.5)(jnp.asarray(w))
        assert np.all(norms(got, axes) <= 0.5)
        np.testing.assert_allclose(got, w * 0.5 / norms(w, axes).astype(float), rtol=1e-5)
    whole = max_norm(0.5, ...)(jnp.ones((4, 4)))
    np.testing.assert_allclose(whole, np.full((4, 4), 0.125), rtol=1e-5)


def test_bounds_may_be_schedules_rules_and_one_a_unit():
    w = jnp.full((8, 2), 4.0)
    halving = max_norm(lambda step: 1.0 / (1 + step), 0)
    assert np.all(norms(halving(w, jnp.float32(3)), 0) <= 0.25)
    np.testing.assert_allclose(norms(max_norm(jaxclip.fan_in(3.0), 0)(w), 0), 1.5, rtol=1e-5)
    each = max_norm(np.asarray([1.0, 2.0]), 0)(w)
    np.testing.assert_allclose(norms(each, 0), [[1.0, 2.0]], rtol=1e-5)
    with pytest.raises(ValueError, match="one value per unit"):
        max_norm(np.ones((8, 1)), 0)(w)


@pytest.mark.parametrize("bad", ["1", None, True, -1.0, np.nan, {"w": 1.0}], ids=repr)
def test_what_is_no_bound_is_refused_by_name(bad):
    with pytest.raises((TypeError, ValueError), match="max_norm"):
        max_norm(bad)
    with pytest.raises((TypeError, ValueError), match="max_singular_value"):
        spectral_cap(bad)


def test_an_axis_out_of_range_and_a_projection_without_a_set_are_refused():
    with pytest.raises(ValueError, match="axis"):
        max_norm(1.0, 2)(jnp.ones((2, 2)))
    with pytest.raises(TypeError, match="project"):
        Projection()(jnp.ones(2))


@every_dtype
def test_it_agrees_with_the_l2_ball_of_optax_where_that_is_right(dtype):
    w = drawn(5, (32,), dtype)
    expected = optax.projections.projection_l2_ball(jnp.asarray(w, jnp.float32), 0.7)
    got = max_norm(0.7, ...)(jnp.asarray(w))
    rtol = 1.01 * float(ml_dtypes.finfo(dtype).eps) + 1e-5
    np.testing.assert_allclose(wide(got).astype(float), wide(expected).astype(float), rtol=rtol)
    # Where it is not: 3e20 squared is infinity, and its projection 0.
    huge = jnp.full(4, 3e20, jnp.float32)
    assert np.array_equal(optax.projections.projection_l2_ball(huge, 1.0), np.zeros(4))
    np.testing.assert_allclose(max_norm(1.0)(huge), np.full(4, 0.5), rtol=1e-5)


def test_it_agrees_with_the_formula_of_keras_up_to_its_epsilon():
    # MaxNorm: w * clip(n, 0, c) / (1e-7 + n); UnitNorm: w / (1e-7 + n), n over axis 0.
    w = np.asarray([[3.0, 0.1], [4.0, 0.2]])
    n = np.asarray([[5.0, np.sqrt(0.05)]])
    keras = w * np.clip(n, 0, 2.0) / (1e-7 + n)
    np.testing.assert_allclose(max_norm(2.0, 0)(jnp.asarray(w, jnp.float32)), keras, rtol=2e-6)
    np.testing.assert_allclose(unit_norm(0)(jnp.asarray(w, jnp.float32)), w / (1e-7 + n), rtol=1e-6)
    # The epsilon shrinks small weights there: to 0.09 of their size at a norm of 1e-8.
    small = np.asarray([[6e-9], [8e-9]], np.float32)
    np.testing.assert_allclose(small * 1e-8 / (1e-7 + 1e-8), small / 11, rtol=1e-6)
    assert np.array_equal(max_norm(2.0, 0)(jnp.asarray(small)), small)
    np.testing.assert_allclose(unit_norm(0)(jnp.asarray(small)), [[0.6], [0.8]], rtol=1e-6)


# --- unit_norm ------------------------------------------------------------------------

project_to_unit = jax.jit(lambda w: unit_norm(0)(w))


@every_dtype
@given(seed=seeds, size=st.integers(-13, 13))
@example(seed=0, size=126)
@example(seed=1, size=-120)
def test_units_have_norm_one_to_the_rounding_of_their_entries(dtype, seed, size):
    w = drawn(seed, (16, 3), dtype, 2.0**size)
    got = np.asarray(project_to_unit(jnp.asarray(w)))
    assert got.dtype == dtype
    has_direction = np.broadcast_to(norms(w, 0) > 2.0**-121, (1, 3))  # else flushed
    close = 1e-6 + (float(ml_dtypes.finfo(dtype).eps) if got.dtype.itemsize < 4 else 0)
    assert np.all(np.abs(norms(got, 0) - 1)[has_direction] <= close)


def test_a_unit_of_zeros_stays_and_one_that_is_not_finite_is_left_alone():
    w = jnp.asarray([[0.0, np.nan, np.inf, 3.0], [0.0, 1.0, 1.0, 4.0]])
    expected = [[0.0, np.nan, np.inf, 0.6], [0.0, 1.0, 1.0, 0.8]]
    np.testing.assert_allclose(project_to_unit(w), expected, rtol=1e-6)
    z = project_to_unit(jnp.asarray([3e30 + 4e30j, 0]))
    np.testing.assert_allclose(z, [0.6 + 0.8j, 0], rtol=1e-6)


@pytest.mark.thorough
def test_derivatives_are_finite_also_at_zero():
    for projection in (unit_norm(0), max_norm(1.0, 0)):
        slope = jax.grad(lambda w, p=projection: jnp.sum(p(w)))(jnp.zeros((3, 2)))
        assert np.all(np.isfinite(slope))


# --- spectral_cap ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_singular_values_are_capped_as_by_an_exact_decomposition(dtype):
    w = drawn(7, (12, 8), dtype)
    got = jax.jit(lambda w: spectral_cap(2.0)(w))(jnp.asarray(w))
    assert got.dtype == dtype
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    assert s[0] > 2.5 > 1.5 > s[-1]
    close = 1e-4 if dtype == np.float32 else 0.05
    np.testing.assert_allclose(np.asarray(got, np.float64), u * np.minimum(s, 2) @ v, atol=close)
    assert np.linalg.norm(np.asarray(got, np.float64), 2) <= 2 * (1 + close / 10)


def test_leaves_without_matrices_and_matrices_within_are_untouched():
    cap = spectral_cap(2.0)
    for w in (jnp.full(3, 9.0), jnp.asarray(9.0), jnp.eye(3)):
        assert np.array_equal(cap(w), w)
    assert np.isnan(cap(jnp.full((2, 2), jnp.nan))).all()


@pytest.mark.thorough
def test_stacked_matrices_are_capped_one_by_one():
    w = jnp.stack([jnp.diag(jnp.asarray([3.0, 1.0])), jnp.eye(2)])
    got = spectral_cap(2.0, stacked_axes=1)(w)
    np.testing.assert_allclose(got[0], np.diag([2.0, 1.0]), atol=1e-4)
    assert np.array_equal(got[1], w[1])


@pytest.mark.parametrize("name", ["steps", "stacked_axes"])
def test_counts_below_one_are_refused_by_name(name):
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match=name):
            spectral_cap(1.0, **{name: bad})


@pytest.mark.thorough
def test_weak_types_are_kept_and_other_arrays_returned():
    for projection in (max_norm(0.1), unit_norm(), spectral_cap(1.0)):
        assert projection(jnp.asarray(2.0)).weak_type
        assert projection(jnp.arange(3, dtype=jnp.int32)).dtype == jnp.int32
