"""Balanced grids: odd codes, as many levels on both sides of 0 and none at 0."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import safe_open

from jaxclip import (
    Grid,
    calibration,
    checkpoints,
    compress,
    decompress,
    dequantize,
    fake_quantize,
    interop,
    keep_on_grid,
    max_abs,
    mse_optimal,
    quantize,
)
from jaxclip.lowbit import cheaper_codes, pack_codes, unpack_codes
from jaxclip.thresholds.by_error import least_squares

W = np.random.default_rng(0).standard_t(4, (6, 80)).astype(np.float32)
every_width = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def balanced(bits, **fields):
    return Grid(bits, levels="balanced", **fields)


def odd_codes(ratio, bits):
    """The nearest of all odd numbers that a width has, by looking at each of them."""
    levels = np.arange(1 - 2**bits, 2**bits, 2)
    return levels[np.abs(ratio[..., None] - levels).argmin(-1)]


def least_error(row, bits):
    """The least squared error over all scales, by 3,000 of them, each refitted twice."""
    scales = np.abs(row).max() * np.geomspace(0.02, 1.5, 3000)[:, None]
    for _ in range(2):
        codes = odd_codes(row / scales, bits)
        scales = (row * codes).sum(1, keepdims=True) / np.square(codes).sum(1, keepdims=True)
    return np.square(row - scales * odd_codes(row / scales, bits)).sum(1).min()


@every_width
def test_codes_are_the_nearest_odd_numbers(bits):
    q = quantize(W, balanced(bits, axis=0), threshold=max_abs)
    ratio = W.astype(np.float64) / np.asarray(q.scale)
    is_between = np.abs(ratio / 2 - np.round(ratio / 2)) < 1e-6  # two codes are as near
    codes = np.asarray(q.qvalue)
    np.testing.assert_array_equal(codes[~is_between], odd_codes(ratio, bits)[~is_between])
    assert (np.abs(W - dequantize(q)) <= np.abs(q.scale) * (1 + 1e-6)).all()
    np.testing.assert_allclose(q.threshold[:, 0], np.abs(W).max(1), rtol=1e-6)


@every_width
@pytest.mark.parametrize("size", [16, 64, 400])
def test_mse_optimal_finds_the_best_scale(bits, size):
    w = np.random.default_rng(1).standard_t(4, (8, size))
    q = quantize(w.astype(np.float32), balanced(bits, axis=0), threshold=mse_optimal)
    errors = np.square(w - np.asarray(dequantize(q), np.float64)).sum(1)
    best = np.array([least_error(row, bits) for row in w])
    assert errors.sum() <= 1.003 * best.sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_least_squares_is_near_the_optimum_for_normal_weights(bits):
    w = np.random.default_rng(1).normal(size=(4, 500)).astype(np.float32)
    q = quantize(w, balanced(bits, axis=0), threshold=least_squares)
    errors = np.square(w - np.asarray(dequantize(q))).sum(1)
    assert errors.sum() <= 1.03 * sum(least_error(row.astype(np.float64), bits) for row in w)


def test_at_two_bits_they_have_less_error_than_the_four_levels_of_a_full_grid():
    w = np.random.default_rng(1).normal(size=(4, 4000)).astype(np.float32)

    def error(grid):
        return np.square(w - np.asarray(dequantize(quantize(w, grid)))).mean()

    found = error(balanced(2, axis=0))
    assert found == pytest.approx(0.1188, rel=0.03)  # Max, 1960, table for 4 levels
    assert found < 0.85 * error(Grid(2, axis=0))
    assert quantize(w, balanced(2, axis=0)).num_bytes == quantize(w, Grid(2, axis=0)).num_bytes


@pytest.mark.parametrize("fields", [{}, {"axis": 0}, {"axis": 0, "group_size": 16}], ids=str)
def test_jitted_and_concrete_arrays_have_the_same_codes(fields):
    grid = balanced(3, **fields)
    for rule in (max_abs(), mse_optimal()):
        concrete = quantize(W, grid, threshold=rule)
        traced = jax.jit(lambda w, r=rule: quantize(w, grid, threshold=r))(W)
        np.testing.assert_allclose(concrete.scale, traced.scale, rtol=2e-6)
        assert np.mean(np.asarray(concrete.qvalue) != np.asarray(traced.qvalue)) < 0.01


def test_one_bit_is_the_smallest_balanced_grid():
    one, same = quantize(W, Grid(1, axis=0)), quantize(W, balanced(1, axis=0))
    np.testing.assert_array_equal(one.qvalue, same.qvalue)
    np.testing.assert_array_equal(one.scale, same.scale)
    np.testing.assert_array_equal(one.qvalue, np.where(W < 0, -1, 1))


@pytest.mark.parametrize("coding", [None, "huffman", "lanes"])
def test_files_give_the_same_array_back_in_the_newest_version(coding, tmp_path):
    tree = {f"w{b}": quantize(W, balanced(b, axis=0)) for b in (2, 3, 4)}
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, tree, coding=coding)
    loaded = checkpoints.load(path)
    for name, q in tree.items():
        assert loaded[name].grid.levels == "balanced"
        np.testing.assert_array_equal(loaded[name].qvalue, q.qvalue)
        np.testing.assert_array_equal(loaded[name].scale, q.scale)
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["jaxclip"])
    assert header["version"] == 5
    assert "full_signed" not in header["leaves"]["w2"]
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
    import read_low_bit_file

    weights = read_low_bit_file.read_file(path)
    for name, q in tree.items():
        np.testing.assert_array_equal(weights[name], np.asarray(dequantize(q)))


@every_width
def test_packed_in_memory_they_are_the_same_array(bits):
    for q in (quantize(W, balanced(bits, axis=0)), quantize(jnp.asarray(W), balanced(bits))):
        packed = q.packed()
        np.testing.assert_array_equal(packed.unpacked().qvalue, q.qvalue)
        np.testing.assert_array_equal(dequantize(packed), dequantize(q))


@every_width
def test_codes_are_packed_as_places_on_the_grid(bits):
    codes = np.random.default_rng(1).choice(np.arange(1 - 2**bits, 2**bits, 2), 43).astype(np.int8)
    stream = "".join(f"{(c + 2**bits - 1) // 2:0{bits}b}"[::-1] for c in codes)
    stream += "0" * (-len(stream) % 8)
    expected = [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]
    for array in (codes, jnp.asarray(codes)):
        packed = pack_codes(array, bits, levels="balanced")
        assert packed.tolist() == expected
        unpacked = unpack_codes(packed, bits, codes.size, levels="balanced")
        assert type(unpacked) is type(packed)
        np.testing.assert_array_equal(unpacked, codes)


def test_codes_that_are_even_are_refused(tmp_path):
    q = quantize(W, balanced(2, axis=0))
    bad = q.with_code_dtype(jnp.int8)
    object.__setattr__(bad, "qvalue", np.zeros(q.shape, np.int8))
    with pytest.raises(ValueError, match="codes are not in the range"):
        bad.validate()
    with pytest.raises(ValueError, match="codes are not in the range"):
        checkpoints.save(tmp_path / "bad.safetensors", {"w": bad})


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_exports_for_integer_codes_carry_them(bits, tmp_path):
    tree = compress({"layer": {"weight": W[:, :64].copy()}}, balanced(bits))
    path = tmp_path / "out.safetensors"
    interop.to_compressed_tensors(path, tree)
    with safe_open(path, "numpy") as file:
        packed, scale = (file.get_tensor(f"layer.weight_{part}") for part in ("packed", "scale"))
    width = 4 if bits < 4 else 8
    words = packed.view(np.uint32)[..., None] >> np.arange(0, 32, width, dtype=np.uint32)
    codes = (words & (2**width - 1)).reshape(len(packed), -1)[:, :64].astype(int) - 2 ** (width - 1)
    expected = np.asarray(decompress(tree)["layer"]["weight"])
    np.testing.assert_allclose(codes * scale.astype(np.float32), expected, rtol=1e-6)


def test_rounding_with_moments_feeds_errors_back():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 40)) @ rng.normal(size=(40, 40))
    params = {"kernel": rng.normal(size=(40, 24)).astype(np.float32)}
    c = calibration.measure(
        lambda p, x: x @ p["kernel"], params, [x.astype(np.float32)], progress=False
    )
    grid = balanced(2)

    def error(small):
        return np.square(x @ (params["kernel"] - np.asarray(decompress(small)["kernel"]))).sum()

    rounded = compress(params, grid, calibration=c)
    assert (np.asarray(rounded["kernel"].qvalue) % 2 == 1).all()
    assert error(rounded) < 0.7 * error(compress(params, grid))


def test_training_on_the_grid_ends_on_it():
    grid = balanced(2, axis=None)
    params = {"kernel": jnp.asarray(W)}
    tx = keep_on_grid(optax.sgd(0.1), grid)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    levels = np.unique(np.round(np.asarray(params["kernel"]), 5))
    assert levels.size == 4
    np.testing.assert_allclose(levels / levels[-1], [-1, -1 / 3, 1 / 3, 1], rtol=1e-4)
    slope = jax.grad(lambda w: fake_quantize(w, grid, threshold=1.0).sum())(jnp.asarray(W))
    np.testing.assert_array_equal(slope, np.abs(W) <= 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: balanced(5), "levels='balanced' needs bits to be 1, 2, 3 or 4, got 5"),
        (lambda: balanced("ternary"), "levels='balanced' needs bits .* got 'ternary'"),
        (lambda: balanced(2, zero_point=True), "zero_point needs a code for 0, which levels"),
        (lambda: compress({"w": W}, balanced(2), bit_price=0.1), "levels='balanced' lacks"),
        (
            lambda: compress({"w": W}, balanced(None), target_bits_per_weight=3.0),
            "levels='balanced' needs bits",
        ),
        (
            lambda: cheaper_codes(quantize(W, balanced(2)), W),
            "small must have a code 0 for the value 0, got balanced levels",
        ),
    ],
)
def test_what_a_grid_without_zero_cannot_do_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
