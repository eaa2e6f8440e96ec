"""QK-Clip: logits of attention in float64 before and after, for MHA, GQA and MLA; soft caps."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxclip
from jaxclip.weights import key_heads, max_attention_logits, qk_clip, query_heads, soft_cap

IN, FEATURES, ROTARY, TOKENS = 6, 4, 2, 5
QUERIES, KEYS = query_heads(), key_heads()


def drawn(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def layer_of(seed, num_heads, num_keys, dtype=np.float32):
    """Kernels and biases of an attention layer in flax's layout; keys have values behind them."""
    return {
        "query": {
            "kernel": drawn(seed, IN, num_heads, FEATURES, dtype=dtype),
            "bias": drawn(seed + 1, num_heads, FEATURES, dtype=dtype),
        },
        "key": {"kernel": drawn(seed + 2, IN, num_keys, FEATURES, dtype=dtype)},
        "value": drawn(seed + 3, IN, num_keys, FEATURES, dtype=dtype),
    }


HEADS_OF_LAYER = {"query": QUERIES, "key": KEYS, "value": None}


def logits_of(params, x) -> np.ndarray:
    """Logits of each query head in float64, `(heads, T, S)`."""
    wide = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), params)
    q = np.einsum("ti,ihf->thf", x, wide["query"]["kernel"]) + wide["query"]["bias"]
    k = np.einsum("ti,ihf->thf", x, wide["key"]["kernel"])
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("thf,shf->hts", q, k) / np.sqrt(FEATURES)


def assert_same_bits(actual, expected):
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


# --- qk_clip --------------------------------------------------------------------------


@pytest.mark.parametrize(("num_heads", "num_keys"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_every_logit_is_multiplied_by_the_factor_of_its_own_head(num_heads, num_keys):
    x, tau = drawn(9, TOKENS, IN).astype(np.float64), 2.0
    params = layer_of(0, num_heads, num_keys)
    before = logits_of(params, x)
    largest = before.max(axis=(1, 2))
    assert (largest > tau).any()
    clipped = qk_clip(params, jnp.asarray(largest, jnp.float32), tau, heads=HEADS_OF_LAYER)
    gamma = np.minimum(1, tau / largest)
    after = logits_of(clipped, x)
    np.testing.assert_allclose(after, before * gamma[:, None, None], rtol=0, atol=3e-6)
    assert after.max() <= tau * (1 + 1e-6)
    assert_same_bits(clipped["value"], params["value"])


def test_without_shared_keys_query_and_key_are_scaled_by_the_root():
    params, largest = layer_of(1, 2, 2), np.asarray([8.0, 0.5], np.float32)
    clipped = qk_clip(params, largest, 2.0, heads=HEADS_OF_LAYER)
    np.testing.assert_allclose(
        clipped["query"]["kernel"][:, 0], params["query"]["kernel"][:, 0] * 0.5, rtol=1e-6
    )
    np.testing.assert_allclose(
        clipped["key"]["kernel"][:, 0], params["key"]["kernel"][:, 0] * 0.5, rtol=1e-6
    )
    np.testing.assert_allclose(
        clipped["query"]["bias"][0], params["query"]["bias"][0] * 0.5, rtol=1e-6
    )
    for name in ("query", "key"):
        assert_same_bits(clipped[name]["kernel"][:, 1], params[name]["kernel"][:, 1])


def test_a_key_is_scaled_no_further_than_the_query_that_needs_it_least():
    params = layer_of(2, 4, 2)
    clipped = qk_clip(params, np.asarray([8.0, 1.0, 18.0, 8.0]), 2.0, heads=HEADS_OF_LAYER)
    ratio = np.asarray(clipped["key"]["kernel"]) / params["key"]["kernel"]
    np.testing.assert_allclose(ratio[0, :, 0], [1.0, 0.5], rtol=1e-6)
    ratio = np.asarray(clipped["query"]["kernel"]) / params["query"]["kernel"]
    np.testing.assert_allclose(ratio[0, :, 0], [0.25, 1.0, 1 / 4.5, 0.5], rtol=1e-6)


def test_latent_attention_scales_the_rotary_query_by_gamma_and_no_shared_key_or_value():
    # Queries and keys: features of the head, then the rotary part; one rotary key for all heads.
    rng, num_heads = np.random.default_rng(4), 3
    params = {
        "wq_b": rng.normal(size=(IN, num_heads, FEATURES + ROTARY)).astype(np.float32),
        "wkv_b": rng.normal(size=(IN, num_heads, FEATURES + 3)).astype(np.float32),
        "w_rotary_key": rng.normal(size=(IN, ROTARY)).astype(np.float32),
    }
    heads = {
        "wq_b": query_heads(num_shared=ROTARY),
        "wkv_b": key_heads(num_values=3),
        "w_rotary_key": None,
    }
    x = rng.normal(size=(TOKENS, IN))

    def logits(p):
        q, kv = (np.einsum("ti,ihf->thf", x, np.asarray(p[n], float)) for n in ("wq_b", "wkv_b"))
        rotary = np.einsum(
            "thf,sf->hts", q[..., FEATURES:], x @ np.asarray(p["w_rotary_key"], float)
        )
        return np.einsum("thf,shf->hts", q[..., :FEATURES], kv[..., :FEATURES]) + rotary

    before = logits(params)
    largest = before.max(axis=(1, 2))
    tau = float(np.sort(largest)[0] * 1.01)  # two heads are above
    clipped = qk_clip(params, jnp.asarray(largest, jnp.float32), tau, heads=heads)
    gamma = np.minimum(1, tau / largest)
    np.testing.assert_allclose(logits(clipped), before * gamma[:, None, None], rtol=0, atol=2e-5)
    ratio = np.asarray(clipped["wq_b"]) / params["wq_b"]
    np.testing.assert_allclose(ratio[0, :, 0], np.sqrt(gamma), rtol=1e-6)
    np.testing.assert_allclose(ratio[0, :, -1], gamma, rtol=1e-6)
    assert_same_bits(clipped["wkv_b"][..., FEATURES:], params["wkv_b"][..., FEATURES:])
    assert_same_bits(clipped["w_rotary_key"], params["w_rotary_key"])


def test_a_query_without_a_key_that_may_be_scaled_takes_all_of_gamma():
    w = drawn(0, IN, 2, FEATURES)
    clipped = qk_clip({"q": w}, np.asarray([4.0, 1.0]), 1.0, heads={"q": QUERIES})
    np.testing.assert_allclose(clipped["q"][:, 0], w[:, 0] / 4, rtol=1e-6)


def test_joined_axes_are_those_of_pytorch():
    params = layer_of(3, 4, 2)

    def joined(w):  # (in, heads, features) -> (heads * features, in)
        return np.asarray(w).reshape(IN, -1).T if np.ndim(w) == 3 else np.asarray(w).reshape(-1)

    largest = np.asarray([9.0, 1.0, 3.0, 5.0], np.float32)
    expected = qk_clip(params, largest, 2.0, heads=HEADS_OF_LAYER)
    heads = {"query": query_heads(0, 4), "key": key_heads(0, 2), "value": None}
    got = qk_clip(jax.tree.map(joined, params), largest, 2.0, heads=heads)
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(joined, expected))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_heads_within_keep_their_bits_and_dtypes_and_weak_types_are_kept(dtype):
    params = layer_of(5, 2, 2, dtype)
    at_tau = qk_clip(params, np.asarray([2.0, -3.0], np.float32), 2.0, heads=HEADS_OF_LAYER)
    jax.tree.map(assert_same_bits, at_tau, params)
    above = qk_clip(params, np.asarray([3.0, 2.0], np.float32), 2.0, heads=HEADS_OF_LAYER)
    assert jax.tree.map(lambda w: w.dtype, above) == jax.tree.map(lambda w: w.dtype, params)
    assert_same_bits(above["query"]["kernel"][:, 1], params["query"]["kernel"][:, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_head_whose_logit_is_not_finite_is_left_alone(bad):
    params = layer_of(6, 2, 2)
    clipped = jax.jit(functools.partial(qk_clip, heads=HEADS_OF_LAYER))(
        params, jnp.asarray([bad, 8.0]), jnp.float32(2.0)
    )
    assert_same_bits(clipped["query"]["kernel"][:, 0], params["query"]["kernel"][:, 0])
    np.testing.assert_allclose(
        clipped["key"]["kernel"][:, 1], params["key"]["kernel"][:, 1] / 2, rtol=1e-6
    )


@pytest.mark.parametrize("tau", [np.nan, 0.0, -1.0])
def test_a_traced_tau_that_is_not_positive_scales_nothing(tau):
    params = layer_of(7, 2, 2)
    clip = jax.jit(functools.partial(qk_clip, heads=HEADS_OF_LAYER))
    jax.tree.map(assert_same_bits, clip(params, jnp.ones(2), jnp.float32(tau)), params)


def test_layers_of_a_model_have_vectors_of_their_own_and_stacked_ones_are_mapped():
    one, two = layer_of(8, 2, 2), layer_of(18, 2, 1)
    model = {"a": one, "b": two, "mlp": drawn(0, 3, 3), "step": 7}
    heads = {"a": HEADS_OF_LAYER, "b": HEADS_OF_LAYER, "mlp": None, "step": None}
    logits = {"a": jnp.asarray([8.0, 1.0]), "b": jnp.asarray([1.0, 9.0]), "mlp": None, "step": None}
    got = qk_clip(model, logits, 2.0, heads=heads)
    for name in ("a", "b"):
        alone = qk_clip(model[name], logits[name], 2.0, heads=HEADS_OF_LAYER)
        jax.tree.map(assert_same_bits, got[name], alone)
    assert got["mlp"] is model["mlp"]
    assert got["step"] == 7
    stacked = jax.tree.map(lambda *w: np.stack(w), one, one)
    clip = jax.vmap(lambda p, m: qk_clip(p, m, 2.0, heads=HEADS_OF_LAYER))
    got = clip(stacked, jnp.asarray([[8.0, 1.0], [1.0, 1.0]]))
    assert_same_bits(got["key"]["kernel"][1], one["key"]["kernel"])
    alone = qk_clip(one, logits["a"], 2.0, heads=HEADS_OF_LAYER)
    np.testing.assert_allclose(got["key"]["kernel"][0], alone["key"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("tau", [0.0, -1.0, np.nan, np.inf, "1", None, True], ids=repr)
def test_a_tau_that_is_no_positive_number_is_refused(tau):
    with pytest.raises((TypeError, ValueError), match="tau"):
        qk_clip(layer_of(0, 2, 2), np.ones(2), tau, heads=HEADS_OF_LAYER)


def test_heads_that_do_not_divide_are_refused_with_their_path():
    def clip(params, num_logits, heads):
        return qk_clip(params, np.ones(num_logits), 1.0, heads=heads)

    with pytest.raises(ValueError, match=r"key heads must divide .*6; got 4 at 'key/kernel'"):
        clip(layer_of(0, 6, 4), 6, HEADS_OF_LAYER)
    with pytest.raises(ValueError, match=r"'query/bias' must have as many heads .*3; got 4"):
        clip(layer_of(0, 4, 4), 3, HEADS_OF_LAYER)
    with pytest.raises(ValueError, match=r"num_heads must divide axis 0 of 'q', of size 10"):
        clip({"q": np.ones((10, 2))}, 4, {"q": query_heads(0, 4)})
    with pytest.raises(ValueError, match=r"num_shared must be at most .*'q', 4; got 5"):
        clip({"q": np.ones((3, 2, 4))}, 2, {"q": query_heads(num_shared=5)})
    with pytest.raises(ValueError, match=r"also name the queries"):
        clip({"k": np.ones((3, 2, 4))}, 2, {"k": KEYS})
    with pytest.raises(ValueError, match=r"axis must be one of the leaf"):
        clip({"q": np.ones(4)}, 2, {"q": QUERIES})


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"axis": 1.0}, "axis"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": True}, "num_heads"),
    ],
)
def test_descriptions_out_of_range_are_refused_by_name(arguments, name):
    for describe in (query_heads, key_heads):
        with pytest.raises(ValueError, match=name):
            describe(**arguments)
    with pytest.raises(ValueError, match="num_shared"):
        query_heads(num_shared=-1)
    with pytest.raises(ValueError, match="num_values"):
        key_heads(num_values=-1)


def test_trees_that_do_not_fit_and_logits_that_are_no_vector_are_refused():
    params = layer_of(0, 2, 2)
    with pytest.raises(ValueError, match="heads must be one value or a prefix"):
        qk_clip(params, np.ones(2), 1.0, heads={"query": QUERIES})
    with pytest.raises(ValueError, match="max_logits must be one value or a prefix"):
        qk_clip(params, {"query": np.ones(2)}, 1.0, heads=HEADS_OF_LAYER)
    with pytest.raises(TypeError, match="heads must be query_heads"):
        qk_clip(params, np.ones(2), 1.0, heads=HEADS_OF_LAYER | {"value": 3})
    for bad in (np.float32(1.0), np.ones((2, 2)), np.ones(2, np.int32)):
        with pytest.raises(ValueError, match="max_logits must be a floating vector"):
            qk_clip(params, bad, 1.0, heads=HEADS_OF_LAYER)


# --- max_attention_logits -------------------------------------------------------------


@pytest.mark.parametrize(("num_heads", "num_keys"), [(4, 4), (4, 2), (3, 1)])
def test_the_largest_logits_are_those_of_the_formula(num_heads, num_keys):
    q, k = drawn(0, 2, 5, num_heads, 3), drawn(1, 2, 7, num_keys, 3)
    wide = np.repeat(k, num_heads // num_keys, axis=2).astype(np.float64)
    logits = np.einsum("bthf,bshf->bhts", q.astype(np.float64), wide)
    got = max_attention_logits(q, k)
    np.testing.assert_allclose(got, logits.max(axis=(0, 2, 3)) / np.sqrt(3), rtol=1e-6)
    mask = np.random.default_rng(2).random((2, 1, 5, 7)) < 0.3
    seen = np.where(np.tri(5, 7, dtype=bool) & mask, logits * 0.25, -np.inf)
    got = max_attention_logits(q, k, scale=0.25, mask=mask, is_causal=True)
    np.testing.assert_allclose(got, seen.max(axis=(0, 2, 3)), rtol=1e-6)


def test_key_heads_are_shared_as_by_the_attention_of_jax():
    q, k = drawn(0, 2, 5, 4, 5), drawn(1, 2, 5, 2, 5)
    one_hot = np.broadcast_to(np.eye(5, dtype=np.float32)[None, :, None], k.shape)
    odds = np.asarray(jax.nn.dot_product_attention(q, k, one_hot, is_causal=False))
    # The largest logit of a row, from odds against its first key.
    logits = np.einsum("bthf,bshf->bths", q, np.repeat(k, 2, axis=2)) / np.sqrt(5)
    np.testing.assert_allclose(np.log(odds / odds[..., :1]), logits - logits[..., :1], atol=1e-4)
    np.testing.assert_allclose(max_attention_logits(q, k), logits.max(axis=(0, 1, 3)), rtol=1e-5)


def test_half_precision_is_measured_in_float32_and_no_derivative_flows():
    q = np.full((1, 1, 1, 4), 300.0, np.float16)  # its square overflows float16
    got = max_attention_logits(q, q)
    assert got.dtype == jnp.float32
    assert got[0] == 180_000
    slope = jax.grad(lambda q: max_attention_logits(q, q).sum())(jnp.ones((2, 1, 3)))
    assert not slope.any()


def test_a_nan_shows_and_heads_that_see_nothing_are_minus_infinity():
    q = drawn(0, 64, 2, 64)
    q[17, 0, 3] = np.nan
    got = np.asarray(max_attention_logits(q, drawn(1, 64, 2, 64)))
    assert np.isnan(got[0])
    assert np.isfinite(got[1])
    assert np.all(max_attention_logits(q, q, mask=False) == -np.inf)


def test_a_mapped_axis_takes_the_largest_of_all_devices():
    q, k = drawn(0, 4, 5, 2, 3), drawn(1, 4, 5, 2, 3)
    got = jax.vmap(lambda q, k: max_attention_logits(q, k, axis_name="i"), axis_name="i")(q, k)
    np.testing.assert_array_equal(got, np.tile(max_attention_logits(q, k), (4, 1)))


def test_shapes_that_do_not_fit_are_refused():
    for q, k in [((5, 2, 3), (5, 2, 4)), ((2, 5, 2, 3), (5, 2, 3)), ((2, 3), (2, 3))]:
        with pytest.raises(ValueError, match="query and key must have shapes"):
            max_attention_logits(np.ones(q), np.ones(k))
    with pytest.raises(ValueError, match="must divide the 4"):
        max_attention_logits(np.ones((5, 4, 3)), np.ones((5, 3, 3)))


def test_measured_and_clipped_logits_end_at_tau_when_they_are_measured_again():
    params, x = layer_of(11, 4, 2), drawn(12, 3, TOKENS, IN)

    def largest(p):
        q = jnp.einsum("bti,ihf->bthf", x, p["query"]["kernel"]) + p["query"]["bias"][None, None]
        return max_attention_logits(q, jnp.einsum("bti,ihf->bthf", x, p["key"]["kernel"]))

    before = np.asarray(largest(params))
    after = largest(qk_clip(params, before, 3.0, heads=HEADS_OF_LAYER))
    assert (before > 3).any()
    np.testing.assert_allclose(after, np.minimum(before, 3), rtol=2e-6)


# --- soft_cap -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(-10, 12), cap=st.floats(0.01, 100))
def test_a_soft_cap_is_the_formula_and_never_above_the_cap(dtype, seed, size, cap):
    x = (drawn(seed, 32) * 2.0**size).astype(dtype)
    got = np.asarray(jit_soft_cap(jnp.asarray(x), np.float32(cap)))
    assert got.dtype == dtype
    wide, bound = x.astype(np.float64), np.float64(np.float32(cap))
    assert np.all(np.abs(got.astype(np.float64)) <= bound)
    eps = float(ml_dtypes.finfo(dtype).eps) if np.dtype(dtype).itemsize == 2 else 1e-6
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    expected = bound * np.tanh(wide / bound)
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=1.1 * eps, atol=tiny)


jit_soft_cap = jax.jit(soft_cap)


def test_a_cap_that_caps_nothing_returns_the_logits_and_nan_stays():
    x = jnp.asarray([-1e30, 0.1, np.nan, np.inf])
    for cap in (float("inf"), jnp.float32(np.inf), jnp.float32(np.nan), jnp.float32(0.0)):
        np.testing.assert_array_equal(soft_cap(x, cap), x)
    np.testing.assert_array_equal(soft_cap(x, 2.0)[jnp.asarray([0, 2, 3])], [-2, np.nan, 2])
    assert soft_cap(jnp.asarray(1.0), 2.0).weak_type == jnp.asarray(1.0).weak_type


@pytest.mark.parametrize("cap", [0.0, -1.0, np.nan, "1", None], ids=repr)
def test_a_cap_that_is_no_positive_number_is_refused(cap):
    with pytest.raises((TypeError, ValueError), match="cap"):
        jaxclip.weights.soft_cap(jnp.ones(2), cap)
