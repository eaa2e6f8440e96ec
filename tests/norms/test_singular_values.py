"""Capped singular values against exact decompositions in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxclip.norms.singular_values import cap_singular_values
from oracles.matrices import SPECTRA, eps_of, exact_cap, make_matrix, spectral_norm, wide
from oracles.quick import quick_first

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
DTYPES = [np.float16, np.complex64, ml_dtypes.bfloat16, np.float32]
every_dtype = pytest.mark.parametrize(
    "dtype", quick_first(DTYPES, 2), ids=lambda d: np.dtype(d).name
)
SHAPES = [(24, 24), (40, 12), (12, 40), (1, 9), (9, 1)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


@every_shape
@every_spectrum
@pytest.mark.parametrize("ratio", [1.5, 10.0, 300.0])
def test_capped_matrix_is_the_exact_one_within_the_stated_error(shape, spectrum, ratio):
    matrix = make_matrix(shape, spectrum, size=ratio)
    capped = cap_singular_values(matrix, 1.0)
    assert spectral_norm(wide(capped) - exact_cap(matrix, 1.0)) <= 3e-5 * ratio
    assert spectral_norm(capped) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("steps", "error"), quick_first([(8, 1e-3), (14, 5e-6), (10, 2e-4), (12, 3e-5)], 2)
)
@every_spectrum
def test_error_falls_with_the_steps_as_stated(steps, error, spectrum):
    for ratio in (2.0, 12.0):
        matrix = make_matrix((24, 16), spectrum, size=ratio)
        capped = cap_singular_values(matrix, 1.0, steps)
        assert spectral_norm(wide(capped) - exact_cap(matrix, 1.0)) <= error * ratio
        assert spectral_norm(capped) <= 1 + 1e-6


@every_dtype
@every_spectrum
def test_every_dtype_keeps_the_cap_and_is_right_to_its_rounding(dtype, spectrum):
    matrix = make_matrix((20, 14), spectrum, dtype, size=10.0)
    capped = cap_singular_values(jnp.asarray(matrix), 1.0)
    assert capped.dtype == dtype
    exact = exact_cap(matrix, 1.0)
    rounding = 2 * eps_of(dtype) * np.linalg.norm(exact)
    assert spectral_norm(wide(capped) - exact) <= 2e-4 + rounding
    assert spectral_norm(capped) <= 1 + 1e-6


@every_dtype
@pytest.mark.parametrize("magnitude", ["tiny", "small", "large", "largest"])
def test_every_magnitude_of_the_dtype_is_capped_rightly(dtype, magnitude):
    info = jnp.finfo(dtype)
    largest = float(info.max)
    size = {
        "tiny": float(info.tiny) * (64 if dtype == np.float16 else 2.0**30),
        "small": float(info.tiny) ** 0.5,
        "large": largest**0.5,
        "largest": largest,
    }[magnitude]
    matrix = make_matrix((12, 8), "linear", np.complex128 if dtype == np.complex64 else float)
    matrix = (matrix / max(np.abs(matrix.real).max(), np.abs(matrix.imag).max())).astype(dtype)
    # By a number below the largest by rounding: products of extremes stay in the dtype.
    matrix = (wide(matrix) * (size * (1 - 2 * eps_of(dtype)))).astype(dtype)
    assert np.isfinite(wide(matrix)).all()
    cap = spectral_norm(matrix) / 4
    capped = cap_singular_values(jnp.asarray(matrix), np.float32(min(cap, 3e38)))
    cap = float(np.float32(min(cap, 3e38)))
    # Float16 is spaced evenly below its normal range; float32 there is 0 on CPU.
    rounding = 2 * eps_of(dtype) * np.linalg.norm(exact_cap(matrix, cap))
    if np.dtype(dtype) == np.float16:
        rounding += float(info.smallest_subnormal) * np.sqrt(matrix.size)
    error = spectral_norm(wide(capped) - exact_cap(matrix, cap))
    assert error <= 1e-4 * cap + rounding
    assert spectral_norm(capped) <= cap * (1 + 1e-6)


@every_shape
@pytest.mark.parametrize("ratio", [1e5, 1e20, 1e33])
def test_a_cap_beyond_the_reach_of_the_steps_is_kept_and_the_direction_is_right(shape, ratio):
    # The largest singular values all come to the cap; the small ones only shrink.
    matrix = make_matrix(shape, "flat", size=1.0)
    cap = 1 / ratio
    capped = cap_singular_values(matrix, np.float32(cap))
    assert spectral_norm(capped) <= cap * (1 + 1e-6)
    assert spectral_norm(wide(capped) - exact_cap(matrix, cap)) <= 0.02 * cap


@pytest.mark.thorough
@every_shape
@every_dtype
def test_frobenius_norm_at_the_cap_is_bit_identical(shape, dtype):
    matrix = make_matrix(shape, "linear", dtype, size=3.0)
    cap = float(np.linalg.norm(wide(matrix)))
    capped = cap_singular_values(jnp.asarray(matrix), cap * (1 + 1e-15))
    assert np.asarray(capped).tobytes() == matrix.tobytes()


@pytest.mark.thorough
@every_dtype
def test_an_infinite_cap_is_bit_identical_and_a_cap_of_zero_gives_zeros(dtype):
    matrix = jnp.asarray(make_matrix((6, 4), "linear", dtype))
    subnormal = jnp.full((3, 2), jnp.finfo(dtype).smallest_subnormal, dtype)
    for x in (matrix, subnormal):
        assert np.asarray(cap_singular_values(x, np.inf)).tobytes() == np.asarray(x).tobytes()
        assert not np.asarray(cap_singular_values(x, 0.0)).any()
        assert not np.asarray(cap_singular_values(x, jnp.float32(-1))).any()


@pytest.mark.thorough
def test_zero_matrices_stay_zero():
    assert not np.asarray(cap_singular_values(jnp.zeros((4, 3)), 0.5)).any()


@pytest.mark.thorough
def test_float64_is_computed_in_float64():
    with enable_x64():
        matrix = make_matrix((20, 12), "linear", np.float64, size=3.0)
        capped = cap_singular_values(jnp.asarray(matrix), 1.0, 16)
        assert capped.dtype == jnp.float64
        # Float32 would leave some 1e-7 in the singular values that are kept.
        _, s, vh = np.linalg.svd(matrix)
        kept = vh[s < 0.9].T
        assert np.abs((np.asarray(capped) - matrix) @ kept).max() <= 2e-6
        assert spectral_norm(wide(capped) - exact_cap(matrix, 1.0)) <= 3e-6
        assert spectral_norm(capped) <= 1


@pytest.mark.thorough
def test_a_batch_caps_each_matrix_and_leaves_those_within_alone():
    batch = np.stack([make_matrix((10, 6), size=s, seed=i) for i, s in enumerate((5.0, 0.1, 2.0))])
    capped = cap_singular_values(batch, 1.0)
    for matrix, out in zip(batch, capped, strict=True):
        assert spectral_norm(wide(out) - exact_cap(matrix, 1.0)) <= 1e-4
    assert np.asarray(capped[1]).tobytes() == batch[1].tobytes()


@pytest.mark.thorough
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_stays_so(bad):
    matrix = jnp.ones((3, 3)).at[1, 1].set(bad)
    assert not np.isfinite(np.asarray(cap_singular_values(matrix, 1.0))).all()


@pytest.mark.thorough
@pytest.mark.parametrize("spectrum", ["linear", "condition 1e7", "half rank"])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8)], ids=str)
def test_derivative_is_that_of_the_exact_cap(spectrum, shape):
    # In the basis of singular vectors the derivative is a table of divided differences.
    with enable_x64():
        matrix = make_matrix(shape, spectrum, np.float64, size=1.7)
        change = np.random.default_rng(5).normal(size=shape)
        step = 1e-6
        ends = [exact_cap(matrix + h * change, 1.0) for h in (step, -step)]
        expected = (ends[0] - ends[1]) / (2 * step)

        def cap(w):
            return cap_singular_values(w, 1.0, 16)

        _, forward = jax.jvp(cap, (jnp.asarray(matrix),), (jnp.asarray(change),))
        np.testing.assert_allclose(forward, expected, atol=2e-4)
        # It is the Hessian of a function of the matrix, so its transpose is itself.
        (backward,) = jax.vjp(cap, jnp.asarray(matrix))[1](jnp.asarray(change))
        np.testing.assert_allclose(backward, expected, atol=2e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("cap", [1.0, 0.0])
def test_derivative_at_zero_is_finite(cap):
    gradient = jax.grad(lambda w: jnp.sum(cap_singular_values(w, cap)))
    assert np.isfinite(np.asarray(gradient(jnp.zeros((4, 3))))).all()
    if cap:
        np.testing.assert_array_equal(gradient(jnp.zeros((4, 3))), np.ones((4, 3)))


@pytest.mark.thorough
def test_derivative_with_respect_to_the_cap_is_the_polar_factor_of_what_is_clipped():
    matrix = jnp.diag(jnp.array([4.0, 3.0, 0.25]))
    slope = jax.jvp(lambda c: cap_singular_values(matrix, c), (jnp.float32(1),), (jnp.float32(1),))
    np.testing.assert_allclose(slope[1], np.diag([1.0, 1.0, 0.0]), atol=1e-3)


def test_no_decomposition_is_in_the_program():
    program = str(jax.make_jaxpr(lambda w: cap_singular_values(w, 1.0))(jnp.ones((8, 8))))
    assert "dot_general[" in program
    for name in ("svd", "eigh", "qr", "householder_product", "cholesky", "lu", "custom_call"):
        assert f" {name}[" not in program


@pytest.mark.thorough
@pytest.mark.parametrize("matrix", [np.ones(3, np.float32), np.ones((2, 2), np.int32)])
def test_a_vector_or_a_matrix_of_integers_is_refused(matrix):
    with pytest.raises(ValueError, match="matrix"):
        cap_singular_values(matrix, 1.0)
