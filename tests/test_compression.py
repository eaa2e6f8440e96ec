"""Which leaves of a tree become low-bit, and what the errors name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip import QuantizedArray, compress, decompress


def make_params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    return {
        "embed": {"embedding": draw(11, 6)},
        "dense": {"kernel": draw(6, 5), "bias": draw(5)},
        "half": {"kernel": draw(4, 6).astype(jnp.bfloat16), "scale": draw(4)},
        "step": jnp.arange(4),
        "rotation": draw(2, 2).astype(jnp.complex64),
        "none": None,
        "temperature": draw(),
    }


@pytest.mark.parametrize("bits", [1, 4])
def test_real_floating_leaves_of_two_dimensions_become_low_bit_and_the_others_stay(bits):
    params = make_params()
    small = compress(params, bits)
    for name in ("embed/embedding", "dense/kernel", "half/kernel"):
        group, leaf = name.split("/")
        q = small[group][leaf]
        assert isinstance(q, QuantizedArray)
        assert q.bits == bits
        assert q.scale.shape == (1, params[group][leaf].shape[1])  # an output channel each
    assert small["dense"]["bias"] is params["dense"]["bias"]
    for name in ("step", "rotation", "none", "temperature"):
        assert small[name] is params[name]


@pytest.mark.parametrize("bits", [1, "ternary", 4])
def test_decompressing_restores_structure_shapes_and_dtypes_within_half_a_step(bits):
    params = make_params()
    small = compress(params, bits, rule=jaxclip.max_abs)
    back = decompress(small)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    kernel, q = np.asarray(params["dense"]["kernel"], np.float64), small["dense"]["kernel"]
    error = np.abs(kernel - np.asarray(back["dense"]["kernel"], np.float64))
    step = np.abs(np.asarray(q.scale, np.float64))
    assert np.all(error <= step * (1.0 if bits == 1 else 0.5) * (1 + 1e-5))


def test_decompressing_into_another_dtype_casts_only_what_was_compressed():
    back = decompress(compress(make_params(), 4), jnp.bfloat16)
    assert back["dense"]["kernel"].dtype == jnp.bfloat16
    assert back["dense"]["bias"].dtype == jnp.float32


def test_each_leaf_equals_quantizing_it_alone():
    params = make_params()
    params = {"dense": {"kernel": params["dense"]["kernel"]}}
    for options in (
        {},
        {"axis": 0},
        {"axis": None},
        {"group_size": 4},
        {"full_signed": False},
        {"zero_point": True, "scale_dtype": "log8"},
    ):
        q = compress(params, 3, **options)["dense"]["kernel"]
        alone = jaxclip.quantize(params["dense"]["kernel"], 3, **{"axis": -1, **options})
        assert np.array_equal(q.qvalue, alone.qvalue)
        assert np.array_equal(q.scale, alone.scale)
        assert q.granularity == alone.granularity
        assert (q.zero is None) == (alone.zero is None)
        assert q.zero is None or np.array_equal(q.zero, alone.zero)
        assert q.scale_dtype == alone.scale_dtype


def test_compressing_twice_gives_the_same_codes():
    for a, b in zip(
        jax.tree.leaves(compress(make_params(), 4)),
        jax.tree.leaves(compress(make_params(), 4)),
        strict=True,
    ):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_low_bit_leaves_are_never_compressed_again():
    small = compress(make_params(), 4)
    try:
        again = compress(small, 4)
    except (TypeError, ValueError) as error:
        assert "dense/kernel" in str(error) or "embed/embedding" in str(error)  # noqa: PT017
    else:
        assert np.array_equal(
            decompress(again)["dense"]["kernel"], decompress(small)["dense"]["kernel"]
        )


def test_compress_and_decompress_run_under_jit():
    params = make_params()
    back = jax.jit(lambda p: decompress(compress(p, "ternary")))(params)
    eager = decompress(compress(params, "ternary"))
    np.testing.assert_allclose(back["dense"]["kernel"], eager["dense"]["kernel"], rtol=1e-5)


@pytest.mark.parametrize("params", [{}, None, (), {"b": jnp.ones(3)}, [None]], ids=repr)
def test_trees_without_kernels_come_back_as_they_are(params):
    assert jax.tree.structure(compress(params)) == jax.tree.structure(params)
    assert jax.tree.structure(decompress(compress(params))) == jax.tree.structure(params)


# --- Policy ----------------------------------------------------------------------------


def test_the_first_pattern_that_matches_decides_the_width():
    small = compress(
        make_params(),
        "ternary",
        policy=[("^embed/", 8), ("half", None), ("kernel", 3), ("bias", 6)],
    )
    assert small["embed"]["embedding"].bits == 8
    assert not isinstance(small["half"]["kernel"], QuantizedArray)
    assert small["dense"]["kernel"].bits == 3
    assert small["dense"]["bias"].bits == 6
    assert small["dense"]["bias"].scale.shape == (1,)
    assert not isinstance(small["temperature"], QuantizedArray)


def test_a_pattern_that_matches_no_leaf_is_refused_by_name():
    with pytest.raises(ValueError, match="attention"):
        compress(make_params(), 4, policy=[("kernel", 4), ("attention", 8)])


def test_a_pattern_that_is_no_regular_expression_is_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="policy"):
        compress(make_params(), 4, policy=[("(", 4)])
    with pytest.raises((TypeError, ValueError), match="policy"):
        compress(make_params(), 4, policy=["kernel"])


# --- Bad input -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 9, 2.5, True, "2", None], ids=repr)
def test_unknown_bits_are_refused_even_if_no_leaf_would_use_them(bits):
    with pytest.raises(ValueError, match="bits must be one of"):
        compress({}, bits)
    if bits is not None:
        with pytest.raises(ValueError, match="bits must be one of"):
            compress(make_params(), 4, policy=[("kernel", bits)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_with_leaf_and_index(bad):
    params = make_params()
    params["dense"]["kernel"] = params["dense"]["kernel"].at[4, 1].set(bad)
    with pytest.raises(ValueError, match=rf"dense/kernel.*{bad}.*\(4, 1\)"):
        compress(params, 4)
    small = compress(params, 4, policy=[("dense/kernel", None)])
    assert not np.isfinite(small["dense"]["kernel"][4, 1])


@pytest.mark.parametrize("rule", ["mse", None, True, 1j, -1.0, np.nan, np.ones((7, 7))], ids=repr)
def test_a_rule_that_is_no_threshold_is_refused(rule):
    with pytest.raises((TypeError, ValueError), match=r"threshold|rule"):
        compress(make_params(), 4, rule=rule)


def test_rows_that_are_hard_stay_finite_in_a_whole_tree():
    rows = np.zeros((4, 8), np.float32)
    rows[1], rows[2, 3], rows[3] = 0.7, 1e6, 1e-42
    for bits in (1, "ternary", 8):
        for rule in (jaxclip.mse_optimal, jaxclip.max_abs):
            small = compress({"w": jnp.asarray(rows)}, bits, rule=rule, axis=0)
            assert np.all(np.isfinite(np.asarray(small["w"].scale)))
            assert np.all(np.asarray(small["w"].scale) != 0)
            back = np.asarray(decompress(small)["w"])
            np.testing.assert_allclose(back[1], rows[1], rtol=1e-6)
            assert np.all(np.isfinite(back))
