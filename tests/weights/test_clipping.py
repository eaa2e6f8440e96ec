"""The box on arrays: exact projection, and the share of weights on the bound."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxclip
from jaxclip.weights.clipping import (
    clip_weights,
    kernels_only,
    weight_clip_rate,
)
from oracles.quick import quick_first

enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
eager_and_jit = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
TINY = 2.0**-126


def floor_in(t: float, dtype) -> float:
    """The largest number of a dtype that is not above t, in NumPy."""
    if t > float(ml_dtypes.finfo(dtype).max):
        return np.inf
    near = np.asarray(t, np.float64).astype(dtype)
    return float(near if float(near) <= t else np.nextafter(near, np.zeros((), dtype)))


def weights_of_any_size(dtype, size=8):
    """Finite numbers by their bits, from subnormals to the largest."""
    unsigned = np.dtype(f"uint{8 * np.dtype(dtype).itemsize}")
    largest = float(ml_dtypes.finfo(dtype).max)

    def finite(bits):
        with np.errstate(invalid="ignore"):  # signalling NaN
            x = bits.view(dtype).astype(np.float64)
        return np.nan_to_num(x, nan=1.0, posinf=largest, neginf=-largest).astype(dtype)

    return hnp.arrays(unsigned, size).map(finite)


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


# --- clip_weights ----------------------------------------------------------------------

jitted_clip = jax.jit(clip_weights)


@every_dtype
@given(data=st.data(), power=st.integers(-24, 15), mantissa=st.floats(1, 2))
def test_clipped_entries_sit_on_the_bound_exactly_and_the_others_are_untouched(
    dtype, data, power, mantissa
):
    w, t = data.draw(weights_of_any_size(dtype)), mantissa * 2.0**power
    bound = floor_in(t, dtype)
    got = clip_weights(jnp.asarray(w), t)
    assert got.dtype == dtype
    got = float64(got)
    assert np.all(np.abs(got) <= t)
    expected = np.clip(float64(w), -bound, bound)
    flushed = np.abs(expected) < TINY
    assert np.array_equal(np.where(flushed, 0, got), np.where(flushed, 0, expected))


@every_dtype
@given(data=st.data(), t=st.floats(0, 2.0**15, width=32, allow_subnormal=False))
def test_a_traced_threshold_bounds_as_given_in_every_dtype(dtype, data, t):
    w = data.draw(weights_of_any_size(dtype))
    bound = floor_in(t, dtype)
    got = float64(jitted_clip(jnp.asarray(w), jnp.float32(t)))
    assert np.all(np.abs(got) <= t)
    expected = np.clip(float64(w), -bound, bound)
    flushed = np.abs(expected) < TINY
    assert np.array_equal(np.where(flushed, 0, got), np.where(flushed, 0, expected))


@pytest.mark.parametrize("dtype", [*DTYPES, np.float64])
@pytest.mark.parametrize("kind", ["number", "traced", "array"])
def test_subnormal_weights_inside_the_box_come_back_bit_for_bit(dtype, kind):
    # A minimum and a maximum would flush them to 0 on CPU.
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    tiny = float(ml_dtypes.finfo(dtype).tiny)
    w = np.asarray([smallest, -smallest, 3 * smallest, tiny / 2, -tiny / 2, tiny, 0.0], dtype)
    with enable_x64(dtype is np.float64):
        for t in (0.25, 2 * tiny):
            if kind == "number":
                clipped = (clip_weights(jnp.asarray(w), t), jax.jit(clip_weights)(w, t))
            else:
                shape = w.shape if kind == "array" else ()
                bound = jnp.full(shape, t, np.float64 if dtype is np.float64 else np.float32)
                clipped = (clip_weights(jnp.asarray(w), bound), jitted_clip(w, bound))
            for got in clipped:
                assert got.dtype == dtype
                assert np.asarray(got).tobytes() == w.tobytes()


@pytest.mark.parametrize("kind", ["number", "numpy", "jax"])
def test_float64_weights_are_bounded_as_given(kind):
    with enable_x64(True):
        t = {"number": 0.1, "numpy": np.float64(0.1), "jax": jnp.asarray(0.1, jnp.float64)}[kind]
        got = clip_weights(jnp.asarray([-1.0, 0.05, 3.0]), t)
        assert got.dtype == jnp.float64
        assert np.all(np.abs(np.asarray(got)) <= 0.1)


@pytest.mark.thorough
@given(
    parts=hnp.arrays(np.float32, (2, 8), elements=st.floats(-2, 2, width=32)),
    t=st.sampled_from([0.0, 0.1, 0.5, 1.0, 1e-20]),
)
def test_complex_weights_are_scaled_to_modulus_at_most_the_threshold(parts, t):
    z = (parts[0] + 1j * parts[1]).astype(np.complex64)
    for f in (clip_weights, jitted_clip):
        got = np.asarray(f(jnp.asarray(z), t)).astype(np.complex128)
        assert np.all(np.abs(got) <= t)
        far = np.abs(z) > 1.001 * t
        unit = z[far] / np.abs(z[far].astype(np.complex128))
        np.testing.assert_allclose(got[far], unit * t, rtol=2e-5, atol=2e-6 * t)


@eager_and_jit
def test_a_complex_weight_an_ulp_above_the_threshold_is_brought_in(wrap):
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 4096)
    z = (0.5 * (np.cos(angle) + 1j * np.sin(angle))).astype(np.complex64)
    got = np.asarray(wrap(clip_weights)(jnp.asarray(z), 0.5)).astype(np.complex128)
    assert np.all(np.abs(got) <= 0.5)


@pytest.mark.thorough
def test_structure_dtypes_weak_types_and_other_leaves_are_kept():
    params = {
        "w": jnp.full((2, 3), 2.0, jnp.bfloat16),
        "weak": jnp.asarray(2.0),
        "python": 2.0,
        "numpy": np.full(3, 2.0, np.float32),
        "n": jnp.arange(5),
        "flag": True,
        "none": None,
        "key": jax.random.key(0),
        "empty": jnp.zeros((0, 2)),
    }
    got = clip_weights(params, 0.5)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert got["w"].dtype == jnp.bfloat16
    assert got["weak"].weak_type
    assert [float(np.max(got[k])) for k in ("w", "weak", "python", "numpy")] == [0.5] * 4
    assert got["n"] is params["n"]
    assert got["flag"] is True
    assert got["key"] is params["key"]
    assert got["empty"].shape == (0, 2)
    assert clip_weights({}, 0.5) == {}
    assert clip_weights(None, 0.5) is None


def test_an_infinite_threshold_changes_no_bit_and_zero_gives_zeros():
    w = jnp.asarray([1.0, -jnp.inf, 3e38, -0.0, jnp.nan])
    for t in (np.inf, jnp.inf, jnp.asarray(np.inf)):
        got = np.asarray(clip_weights(w, t))
        assert np.array_equal(got.view(np.uint32), np.asarray(w).view(np.uint32))
    assert np.array_equal(np.abs(clip_weights(w[:4], 0.0)), np.zeros(4))
    assert np.array_equal(np.abs(clip_weights(w[:4], jnp.float32(-1))), np.zeros(4))


def test_nan_stays_nan_and_infinite_weights_go_to_the_bound():
    got = clip_weights(jnp.asarray([np.nan, np.inf, -np.inf]), 0.5)
    assert np.array_equal(got, [np.nan, 0.5, -0.5], equal_nan=True)


@eager_and_jit
def test_a_traced_nan_threshold_never_poisons_the_weights(wrap):
    w = jnp.asarray([0.5, -2.0])
    got = wrap(clip_weights)(w, jnp.float32(np.nan))
    assert np.all(np.isfinite(got))
    scheduled = wrap(lambda w: clip_weights(w, lambda step: jnp.float32(np.nan)))(w)
    assert np.all(np.isfinite(scheduled))
    assert float(wrap(weight_clip_rate)(w, jnp.float32(np.nan))) == 0


@eager_and_jit
@pytest.mark.parametrize(
    ("threshold", "on_bound"),
    [(0.5, 3), (0.0, 4), (np.inf, 0), (np.array([0.5, np.inf, 0.0, 0.25]), 3)],
)
def test_the_rate_counts_weights_on_the_bound_or_outside(wrap, threshold, on_bound):
    w = jnp.asarray([0.5, -2.0, 0.0, 0.75])
    boxed = max(np.sum(np.isfinite(np.broadcast_to(threshold, 4))), 1)
    for traced in (threshold, jnp.asarray(threshold, jnp.float32)):
        assert float(wrap(weight_clip_rate)(w, traced)) == np.float32(on_bound / boxed)


@eager_and_jit
@pytest.mark.parametrize(
    "dtype", quick_first([np.float32, np.complex64, np.float16, ml_dtypes.bfloat16, np.float64], 2)
)
def test_a_weight_that_is_nan_is_not_on_the_bound(wrap, dtype):
    with enable_x64(dtype is np.float64):
        tail = np.resize(np.asarray([np.nan, -np.nan, 1.0, np.inf, -0.5, 0.1]), 6 * 40)
        w = jnp.asarray(tail.astype(dtype))
        for t in (0.5, np.full(w.size, 0.5, np.float32)):  # one for all, one for each
            assert float(wrap(weight_clip_rate)(w, t)) == np.float32(3 / 6)
        assert float(wrap(weight_clip_rate)(jnp.full(3, np.nan, dtype), 0.0)) == 0


def test_masks_schedules_prefixes_and_fan_in_say_which_leaves_are_boxed():
    params = {"kernel": jnp.full((8, 2), 3.0), "bias": jnp.full(2, 3.0)}

    def largest(threshold, mask=None, **kwargs):
        got = clip_weights(params, threshold, mask, **kwargs)
        return float(got["kernel"].max()), float(got["bias"].max())

    assert largest(0.5) == (0.5, 0.5)
    assert largest(0.5, kernels_only) == (0.5, 3.0)
    assert largest(0.5, {"kernel": False, "bias": True}) == (3.0, 0.5)
    assert largest(0.5, False) == (3.0, 3.0)
    assert largest({"kernel": 0.25, "bias": np.inf}) == (0.25, 3.0)
    assert largest(jaxclip.fan_in(1.0)) == (0.5, 3.0)
    assert largest(lambda step: 1.0 / (1 + step), step=jnp.float32(3)) == (0.25, 0.25)
    assert kernels_only(params) == {"kernel": True, "bias": False}


@pytest.mark.thorough
def test_a_rule_bounds_each_channel_and_its_thresholds_can_be_passed_themselves():
    w = np.random.default_rng(1).standard_t(2, (64, 3)).astype(np.float32)
    rule = jaxclip.mse_optimal("ternary", axis=1)
    t = np.asarray(rule(jnp.asarray(w)), np.float64)
    expected = np.clip(w, -t, t)
    np.testing.assert_allclose(clip_weights(jnp.asarray(w), rule), expected, rtol=1e-6)
    # "Calls that users will type" of the design: t = rule(w); clip_weights(w, t).
    np.testing.assert_allclose(
        clip_weights(jnp.asarray(w), rule(jnp.asarray(w))), expected, rtol=1e-6
    )


BAD = ["0.5", None, True, 1j, -1.0, np.nan, -np.inf, np.full(2, -1.0), jaxclip.fan_in]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: getattr(b, "__name__", repr(b)))
def test_values_that_are_not_thresholds_are_refused_by_name(bad):
    params = {"w": jnp.ones((4, 2))}
    for call in (
        lambda: clip_weights(params, bad),
        lambda: weight_clip_rate(params, bad),
        lambda: jaxclip.box(bad),
    ):
        with pytest.raises((TypeError, ValueError), match=r"threshold|low"):
            call()
    if bad is not None:
        with pytest.raises((TypeError, ValueError), match=r"threshold at 'w'"):
            clip_weights(params, {"w": bad})


def test_none_in_a_tree_of_thresholds_leaves_its_weights_free():
    params = {"w": jnp.full((2,), 3.0), "b": jnp.full((2,), 3.0)}
    threshold = {"w": 0.5, "b": None}
    clipped = clip_weights(params, threshold)
    np.testing.assert_array_equal(clipped["w"], 0.5)
    np.testing.assert_array_equal(clipped["b"], 3.0)
    assert weight_clip_rate(params, threshold) == 1.0
    tx = jaxclip.project_weights(jaxclip.box(threshold))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], -2.5)
    np.testing.assert_array_equal(updates["b"], 0.0)


@pytest.mark.parametrize("shape", [(3,), (4, 1, 1), (5, 2)])
def test_an_array_of_the_wrong_shape_is_refused_with_the_path(shape):
    params = {"layer": {"w": jnp.ones((4, 2))}}
    tx = jaxclip.project_weights(jaxclip.box(jnp.ones(shape)))
    for call in (
        lambda: clip_weights(params, jnp.ones(shape)),
        lambda: weight_clip_rate(params, np.ones(shape)),
        lambda: tx.update(params, tx.init(params), params),
    ):
        with pytest.raises(ValueError, match=r"threshold.*layer/w"):
            call()


def test_a_threshold_tree_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="prefix"):
        clip_weights({"w": jnp.ones(2)}, {"v": 1.0})


# --- weight_clip_rate ------------------------------------------------------------------


def test_the_clip_rate_is_the_share_of_boxed_weights_on_the_bound():
    params = {
        "w": jnp.asarray([[0.5, -0.5, 0.1, 0.49]]),
        "b": jnp.asarray([9.0]),
        "n": jnp.arange(9),
    }
    assert float(weight_clip_rate(params, 0.5)) == pytest.approx(3 / 5)
    assert float(weight_clip_rate(params, 0.5, kernels_only)) == 0.5
    assert float(weight_clip_rate(params, {"w": np.inf, "b": 1.0, "n": 1.0})) == 1.0
    assert float(weight_clip_rate(params, np.inf)) == 0.0
    assert float(weight_clip_rate({}, 0.5)) == 0.0
    assert float(jax.jit(weight_clip_rate)(params, 0.5)) == pytest.approx(3 / 5)


@pytest.mark.parametrize("num_leaves", [7, 8, 9, 17])
@eager_and_jit
def test_rate_of_many_leaves_of_one_shape(wrap, num_leaves):
    rng = np.random.default_rng(num_leaves)
    leaves = [np.float32(rng.uniform(-1, 1, (5, 3))) for _ in range(num_leaves)]
    leaves[1][0] = np.nan  # beside it, the entries of the other leaves count
    bounds = [0.5, 0.25] * num_leaves
    tree, threshold = dict(enumerate(leaves)), dict(zip(range(num_leaves), bounds, strict=False))
    pairs = zip(leaves, bounds, strict=False)
    expected = sum((np.abs(w) >= t).sum() for w, t in pairs) / (15 * num_leaves)
    rate = wrap(lambda w: weight_clip_rate(w, threshold))(tree)
    assert float(rate) == pytest.approx(expected, rel=1e-6)


@every_dtype
def test_all_clipped_weights_count_even_where_the_threshold_is_not_representable(dtype):
    w = clip_weights(jnp.asarray([1.0, -1.0, 0.0, 0.01]).astype(dtype), 0.1)
    for rate in (weight_clip_rate, jax.jit(weight_clip_rate, static_argnums=1)):
        assert float(rate(w, 0.1)) == 0.5
    z = clip_weights(jnp.asarray([3 + 4j, 0.01j], jnp.complex64), 0.1)
    assert float(weight_clip_rate(z, 0.1)) == 0.5


@pytest.mark.thorough
def test_the_clip_rate_of_a_large_leaf_does_not_stall():
    assert float(weight_clip_rate(jnp.ones(2**25, jnp.float16), 1.0)) == 1.0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_clip_rate_counts_what_is_on_the_bound_to_the_ulp(dtype, wrap):
    rng = np.random.default_rng(0)
    rate = wrap(lambda w, t: weight_clip_rate(w, t))
    for t in [0.0, 1.0, 1.9990234375, 0.3, 2.0**-14, *rng.uniform(0.5, 2, 20)]:
        t = np.asarray(t, dtype)
        below = np.nextafter(t, np.zeros((), dtype)) if t > 0 else t
        above = np.nextafter(t, np.asarray(9, dtype))
        w = np.resize(np.asarray([t, -t, below, -below, above, 0, t / 2], dtype), 7 * 700)
        expected = np.mean(np.abs(w.astype(np.float64)) >= float(t))
        np.testing.assert_allclose(rate(jnp.asarray(w), jnp.asarray(t)), expected, rtol=1e-6)


# --- Masks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("kernel", TypeError, "mask must be True or False, got 'kernel'"),
        ({"a": "yes", "b": True}, TypeError, "mask must be True or False at 'a', got 'yes'"),
        ({"a": 1, "b": True}, TypeError, "mask must be True or False at 'a', got 1"),
        (lambda params: params, TypeError, "mask must be True or False at 'a'"),
        ({"c": True}, ValueError, "mask must be a prefix tree of the parameters"),
        ({"a": {"x": True}, "b": True}, ValueError, "mask must be a prefix tree"),
    ],
)
def test_a_mask_of_anything_but_bools_is_refused(mask, error, message):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(error, match=message):
        jaxclip.clip_weights(params, 0.1, mask)
    with pytest.raises(error, match=message):
        jax.eval_shape(
            lambda p: _update(jaxclip.project_weights(jaxclip.box(0.1), mask), p), params
        )
    if error is TypeError and not callable(mask):
        with pytest.raises(TypeError, match=message):
            jaxclip.lion(0.1, mask=mask)


def _update(tx, params):
    return tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("yes", [True, np.True_, np.asarray(True), jnp.asarray(True)], ids=repr)
def test_a_mask_of_any_kind_of_truth_value_chooses_leaves(yes):
    params = {"a": {"x": jnp.ones(2), "y": jnp.ones(3)}, "b": jnp.ones(2)}
    clipped = jaxclip.clip_weights(params, 0.5, {"a": yes, "b": False})
    assert [float(x[0]) for x in jax.tree.leaves(clipped)] == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_outside_of_a_subnormal_bound_ends_on_it(dtype, wrap):
    bound = 2.0**-128
    clipped = wrap(lambda w: clip_weights(w, bound))(jnp.asarray([1.0, -1.0, 0.0], dtype))
    np.testing.assert_array_equal(np.asarray(clipped, np.float64), [bound, -bound, 0])


def test_without_a_bound_nothing_is_on_it_however_large_the_leaf():
    # Without the tests' cheap code, XLA sums a leaf of this size in another way than a small one.
    params = {"kernel": jnp.ones((784, 256)), "bias": jnp.ones(256)}
    bounds = {"kernel": jnp.float32(np.inf), "bias": jnp.full(256, np.inf).at[0].set(1.0)}
    rate = jax.jit(jaxclip.weights.weight_clip_rate)
    assert float(rate(params, bounds)) == 1.0  # one bound, and one entry on it
    assert float(rate(params, jnp.float32(np.inf))) == 0.0
