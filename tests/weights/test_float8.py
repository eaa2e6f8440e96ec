"""Floats of 8 and 4 bits, every number of them: bounds hold, no lack of infinity makes NaN."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxclip

FORMATS = [
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    *(
        pytest.param(name, marks=pytest.mark.thorough)
        for name in ("float8_e5m2", "float8_e5m2fnuz", "float8_e4m3b11fnuz", "float4_e2m1fn")
    ),
]
every_format = pytest.mark.parametrize("name", FORMATS)


def all_numbers(name: str) -> np.ndarray:
    numbers = np.arange(16 if "float4" in name else 256, dtype=np.uint8).view(
        getattr(ml_dtypes, name)
    )
    return numbers[np.isfinite(numbers.astype(np.float64))]


def exact(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@every_format
def test_entries_are_clipped_to_the_largest_number_within_the_bound(name):
    w = jnp.asarray(all_numbers(name))
    tx = jaxclip.clip_by_value(1.0)
    state = tx.init(w)
    clips = [jaxclip.clip_weights, lambda w, t: jaxclip.clip_by_value(t).update(w, state)[0]]
    for t in (0.0, 0.6, float(jnp.finfo(w.dtype).max), 1e30, np.inf):
        inside = np.abs(exact(w))[np.abs(exact(w)) <= t].max()
        expected = np.clip(exact(w), -inside, inside)
        for clip in clips:
            for bound in (t, jnp.float32(t)):
                np.testing.assert_array_equal(exact(clip(w, bound)), expected)


@every_format
def test_weights_never_leave_a_box_however_the_sum_is_rounded(name):
    w = all_numbers(name)
    largest = float(jnp.finfo(w.dtype).max)
    for low, high in ((-0.6, 0.6), (-0.3, 1.0), (-0.3, 1e30), (-0.9 * largest, 0.9 * largest)):
        box = jaxclip.box(high) if low == -high else jaxclip.box(low, high)
        tx = jaxclip.project_weights(box)
        update = jax.jit(tx.update)
        for step in (0.0, 1.0, -3.0):
            u = jnp.full(w.shape, step, w.dtype)
            v = np.asarray(update(u, tx.init(w), jnp.asarray(w))[0])
            after = exact((w.astype(np.float32) + v.astype(np.float32)).astype(w.dtype))
            is_free = high > largest  # beyond it the sum itself overflows
            ok = (low <= after) & ((after <= high) | (is_free & (exact(w) + step > largest)))
            assert (ok | (is_free & np.isnan(after))).all()


@every_format
def test_a_bound_beyond_the_format_has_nothing_on_it(name):
    w = jnp.asarray(all_numbers(name))
    assert float(jax.jit(jaxclip.weights.weight_clip_rate)(w, jnp.inf)) == 0
    assert float(jax.jit(lambda w: jaxclip.weights.weight_clip_rate(w, 1e30))(w)) == 0


def test_powers_of_two_without_sign_are_refused_by_their_path():
    params = {"scale": jnp.ones(4, jnp.float8_e8m0fnu)}
    with pytest.raises(TypeError, match="'scale' is float8_e8m0fnu"):
        jaxclip.clip_weights(params, 0.5)


def test_4_bit_floats_are_clipped_in_jit():
    w = jnp.asarray(all_numbers("float4_e2m1fn"))
    clipped = jax.jit(jaxclip.clip_weights)(w, jnp.float32(2.5))
    np.testing.assert_array_equal(exact(clipped), np.clip(exact(w), -2, 2))


@pytest.mark.thorough
def test_4_bit_floats_are_quantized_to_their_own_numbers():
    w = jnp.asarray(all_numbers("float4_e2m1fn")).reshape(8, 2)
    values = jaxclip.dequantize(jaxclip.quantize(w, 8))
    assert values.dtype == w.dtype
    np.testing.assert_array_equal(exact(values), exact(w))
