"""Codes chosen for their cost: never a worse trade, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip.lowbit.coding.entropy_coding import decode_codes, encode_codes
from jaxclip.lowbit.coding.trellis import as_chains
from jaxclip.lowbit.rounding.by_rate import cheaper_codes, dependent_codes
from jaxclip.thresholds.by_rate import code_entropy
from oracles.quick import quick_first

encode = functools.partial(jaxclip.quantize, threshold=jaxclip.max_abs)  # which compiles fast
RNG = np.random.default_rng(0)
SHAPES = {
    "gauss": RNG.normal(size=(64, 48)),
    "laplace": RNG.laplace(size=(64, 48)),
    "boxed": np.clip(RNG.normal(size=(64, 48)), -0.7, 0.7),
    "outlier": np.where(RNG.random((64, 48)) < 1e-3, 300, RNG.normal(size=(64, 48))),
    "tiny": 1e-25 * RNG.normal(size=(64, 48)),
    "huge": 1e30 * RNG.normal(size=(64, 48)),
}
GRIDS = {
    "coded": (jaxclip.Grid(8, axis=None), jaxclip.thresholds.rate_optimal(2.0)),
    "coded by row": (jaxclip.Grid(8, axis=0), jaxclip.thresholds.rate_optimal(1.5)),
    "4 bits": (jaxclip.Grid(4, axis=1), jaxclip.mse_optimal),
    "groups": (jaxclip.Grid(3, axis=0, group_size=20), jaxclip.mse_optimal),
}


def cost(w, q, price):
    """Squared error and the price of all bits, in float64."""
    scale = np.asarray(q.scale, np.float64)
    value = np.asarray(jnp.broadcast_to(q.grid.expand(q.scale, q.shape), q.shape))
    decoded = value.astype(np.float64) * np.asarray(q.qvalue)
    _, counts = np.unique(np.asarray(q.qvalue), return_counts=True)
    bits = -(counts * np.log2(counts / counts.sum())).sum()
    return np.square(w.astype(np.float64) - decoded).sum() + price * np.square(scale).mean() * bits


@pytest.mark.thorough
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", GRIDS)
def test_the_cost_is_no_larger_and_each_code_is_the_nearest_or_one_nearer_to_0(shape, case):
    w = SHAPES[shape].astype(np.float32)
    grid, rule = GRIDS[case]
    q = jaxclip.quantize(w, grid, threshold=rule)
    for price in (0.12, 0.5):
        found = cheaper_codes(q, w, price=price)
        found.validate()
        before, after = np.asarray(q.qvalue, int), np.asarray(found.qvalue, int)
        assert ((after == before) | (after == before - np.sign(before))).all()
        assert cost(w, found, price) <= cost(w, q, price) * (1 + 1e-5)
        np.testing.assert_array_equal(found.scale, q.scale)


@pytest.mark.thorough
def test_at_the_same_error_fewer_bits_are_needed():
    w = RNG.normal(size=(256, 256)).astype(np.float32)

    def bits_and_error(rate, is_chosen):
        q = jaxclip.quantize(w, 8, threshold=jaxclip.thresholds.rate_optimal(rate))
        q = cheaper_codes(q, w) if is_chosen else q
        error = np.square(w - np.asarray(jaxclip.dequantize(q), np.float64)).mean()
        return float(code_entropy(q.qvalue)), error

    bits, error = bits_and_error(1.8, True)
    rates = np.linspace(1.2, 2.0, 17)
    plain = np.asarray([bits_and_error(rate, False) for rate in rates])
    needed = np.interp(-error, -plain[:, 1], plain[:, 0])
    assert bits < 0.97 * needed


@pytest.mark.thorough
def test_at_the_top_of_float32_the_codes_are_those_of_ordinary_magnitudes():
    w = np.float32(SHAPES["gauss"] / np.abs(SHAPES["gauss"]).max() * 0.99)
    grid = jaxclip.Grid(4, axis=0)
    same, top = (jaxclip.quantize(x, grid, threshold=x.max()) for x in (w, w * 2.0**127 * 2))
    found = cheaper_codes(same, w, price=2.0)
    assert (np.asarray(found.qvalue) != np.asarray(same.qvalue)).any()
    top = cheaper_codes(top, w * np.float32(2.0**127) * 2, price=2.0)
    np.testing.assert_array_equal(top.qvalue, found.qvalue)


@pytest.mark.thorough
def test_without_a_price_nothing_moves():
    w = SHAPES["gauss"].astype(np.float32)
    q = jaxclip.quantize(w, 8, threshold=jaxclip.thresholds.rate_optimal(2.0))
    np.testing.assert_array_equal(cheaper_codes(q, w, price=0.0).qvalue, q.qvalue)


def test_a_program_with_a_traced_price_gives_the_same_codes():
    w = SHAPES["gauss"].astype(np.float32)
    q = jaxclip.quantize(w, 8, threshold=jaxclip.thresholds.rate_optimal(2.0))
    jitted = jax.jit(lambda q, w, price: cheaper_codes(q, w, price=price))
    np.testing.assert_array_equal(jitted(q, w, 0.12).qvalue, cheaper_codes(q, w).qvalue)


@pytest.mark.thorough
def test_a_tree_keeps_what_is_not_low_bit_and_makes_a_smaller_file(tmp_path):
    params = {"kernel": jax.random.normal(jax.random.key(0), (96, 64)), "bias": jnp.ones(64)}
    small = jaxclip.compress(params, 8, rule=jaxclip.thresholds.rate_optimal(1.8))
    chosen = cheaper_codes(small, params)
    assert chosen["bias"] is small["bias"]
    sizes = []
    for name, tree in (("plain", small), ("chosen", chosen)):
        file = tmp_path / f"{name}.safetensors"
        jaxclip.checkpoints.save(file, tree, coding="huffman")
        loaded = jaxclip.checkpoints.load(file)
        np.testing.assert_array_equal(loaded["kernel"].qvalue, tree["kernel"].qvalue)
        sizes.append(file.stat().st_size)
    assert sizes[1] < 0.95 * sizes[0]


@pytest.mark.parametrize("w", [np.zeros((4, 3), np.float32), np.zeros((0, 3), np.float32)])
def test_zeros_and_nothing_stay(w):
    q = jaxclip.quantize(w, 4)
    np.testing.assert_array_equal(cheaper_codes(q, w).qvalue, q.qvalue)


@pytest.mark.thorough
def test_bad_input_is_named():
    w = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="price"):
        cheaper_codes(encode(w, 4), w, price=-1.0)
    with pytest.raises(ValueError, match="got one bit"):
        cheaper_codes(encode(w, 1), w)
    with pytest.raises(ValueError, match=r"small at 'a' must .* got a zero point"):
        cheaper_codes({"a": encode(w, jaxclip.Grid(4, axis=None, zero_point=True))}, {"a": w})
    with pytest.raises(ValueError, match=r"original at 'a' must have shape \(4, 4\), got \(2, 2\)"):
        cheaper_codes({"a": encode(w, 4)}, {"a": jnp.ones((2, 2))})


def coded_bits(q: jaxclip.QuantizedArray) -> float:
    """Bits an entry in a file."""
    chains = as_chains(np.asarray(q.qvalue).astype(np.int8), q.grid.channel_axes(q.ndim))
    codes = chains.reshape(-1)
    coded = encode_codes(codes, "lanes", chain=chains.shape[1])
    assert coded is not None
    np.testing.assert_array_equal(decode_codes(coded, "lanes", codes.size), codes)
    return 8 * len(coded) / q.size


@pytest.mark.parametrize("num_states", quick_first([8, 4]))
@pytest.mark.parametrize("rate", quick_first([2.5, 1.5, 3.5]))
@pytest.mark.parametrize("grid", [jaxclip.Grid(8, axis=None), jaxclip.Grid(8, axis=0)])
def test_codes_on_a_path_have_less_error_in_as_many_bytes(num_states, rate, grid):
    w = RNG.normal(size=(192, 250)).astype(np.float32)
    q = jaxclip.quantize(w, grid, threshold=jaxclip.thresholds.rate_optimal(rate))
    found = dependent_codes(q, w, num_states=num_states)
    found.validate()
    errors = [np.mean((w - np.asarray(jaxclip.dequantize(x))) ** 2) for x in (q, found)]
    # The distance at equal error: half a bit for a factor of two.
    saved = coded_bits(q) - coded_bits(found) + 0.5 * np.log2(errors[0] / errors[1])
    assert errors[1] < errors[0]
    assert coded_bits(found) < coded_bits(q)
    assert saved > (0.13 if num_states == 4 else 0.15)


@pytest.mark.thorough
def test_an_array_whose_outliers_would_be_clipped_stays_as_it_is():
    w = RNG.normal(size=(64, 64)).astype(np.float32)
    w[3, 5] = 500
    q = jaxclip.quantize(w, jaxclip.Grid(8, axis=None), threshold=jaxclip.max_abs)
    found = dependent_codes({"w": q, "b": np.ones(3)}, {"w": w, "b": np.ones(3)})["w"]
    np.testing.assert_array_equal(found.qvalue, q.qvalue)
    np.testing.assert_array_equal(found.scale, q.scale)


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (0, 3)])
def test_arrays_of_every_shape_have_a_path(shape):
    w = RNG.normal(size=shape).astype(np.float32)
    q = jaxclip.quantize(w, jaxclip.Grid(8, axis=None), threshold=3.0)
    found = dependent_codes(q, w)
    found.validate()
    assert found.shape == shape


def test_dependent_codes_need_eight_bits_without_a_zero_point():
    w = RNG.normal(size=(4, 8)).astype(np.float32)
    with pytest.raises(ValueError, match=r"small at 'a' must have 8 bits .* got bits=4"):
        dependent_codes({"a": encode(w, 4)}, {"a": w})
    with pytest.raises(ValueError, match="got a zero point"):
        dependent_codes(encode(w, jaxclip.Grid(8, zero_point=True)), w)
    with pytest.raises(ValueError, match=r"original must have shape \(4, 8\), got \(8,\)"):
        dependent_codes(encode(w, 8), w[0])
    with pytest.raises(ValueError, match="num_states"):
        dependent_codes(encode(w, 8), w, num_states=16)
