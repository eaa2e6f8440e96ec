"""Arrays of Qwix: the same numbers both ways, multiplied by Qwix itself."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxclip
from jaxclip import Grid, interop

qwix = pytest.importorskip("qwix", reason="qwix is in the extra qwix")

SHAPE = (3, 4, 64, 6)
GRIDS = [
    Grid(4),
    Grid(2, levels="balanced"),
    Grid(1),
    Grid("ternary", axis=None),
    Grid(8, axis=(0, 3), scale_dtype="bfloat16"),
    Grid(6, axis=-2),
    Grid(4, group_size=32, zero_point=True),
    Grid(3, group_size=16, axis=(0, 3), scale_dtype="float16"),
    Grid(8, group_size=10**6, zero_point=True),
    Grid(4, group_size=2, axis=(0, 1, 2)),
    Grid(4, group_size=64, scale_dtype="log8"),
]


def weights(shape=SHAPE, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_qwix_and_jaxclip_see_the_same_numbers_both_ways(grid):
    small = {
        "layer": {
            "kernel": jaxclip.quantize(weights(), grid, threshold=jaxclip.max_abs),
            "bias": jnp.ones(6),
        }
    }
    converted = interop.to_qwix(small)
    array = converted["layer"]["kernel"]
    assert isinstance(array, qwix.QArray)
    expected = jaxclip.dequantize(small["layer"]["kernel"])
    np.testing.assert_array_equal(
        qwix.dequantize(array).astype(jnp.float32), expected.astype(array.dtype)
    )
    assert converted["layer"]["bias"] is small["layer"]["bias"]
    back = interop.from_qwix(converted)["layer"]["kernel"]
    back.validate()
    np.testing.assert_array_equal(
        jaxclip.dequantize(back), jaxclip.dequantize(small["layer"]["kernel"]).astype(back.dtype)
    )


@pytest.mark.parametrize("qtype", ["int2", "int5", "int7", jnp.int4])
@pytest.mark.parametrize(
    ("channels", "tiles"),
    [((), {}), ((3,), {}), ((3,), {2: 16}), ((0,), {1: 2, 2: 0.25}), ((), {0: 3})],
)
def test_arrays_that_qwix_quantized_keep_their_numbers(qtype, channels, tiles):
    array = qwix.quantize(weights(), qtype, channelwise_axes=channels, tiled_axes=tiles)
    low_bit = interop.from_qwix({"w": array})["w"]
    low_bit.validate()
    np.testing.assert_array_equal(jaxclip.dequantize(low_bit), qwix.dequantize(array))


def test_qwix_multiplies_the_codes():
    w = weights((64, 8))
    x = weights((5, 64), seed=1)
    for grid in (Grid(4), Grid(8, group_size=32), Grid("ternary", axis=None)):
        small = jaxclip.quantize(w, grid, threshold=jaxclip.max_abs)
        array = interop.to_qwix(small)
        assert array.qvalue.dtype == (jnp.int8 if grid.bits == 8 else jnp.int4)
        with jax.numpy_dtype_promotion("standard"):
            product = jax.jit(lambda x, q: qwix.dot_general(x, q, (((1,), (0,)), ((), ()))))(
                x, array
            )
        np.testing.assert_allclose(product, x @ jaxclip.dequantize(small), rtol=1e-5, atol=1e-5)


def test_both_ways_work_inside_jit():
    small = jaxclip.quantize(
        weights(), Grid(4, group_size=32, zero_point=True), threshold=jaxclip.max_abs
    )
    back = jax.jit(lambda q: interop.from_qwix(interop.to_qwix(q)))(small)
    np.testing.assert_array_equal(jaxclip.dequantize(back), jaxclip.dequantize(small))


@pytest.mark.parametrize("grid", [Grid(4, group_size=48), Grid(4, group_size=24)])
def test_groups_that_are_no_tiles_become_floats_with_a_warning(grid):
    small = {"kernel": jaxclip.quantize(weights(), grid, threshold=jaxclip.max_abs)}
    with pytest.warns(UserWarning, match=r"Qwix.*'kernel' has groups of"):
        converted = interop.to_qwix(small)
    np.testing.assert_array_equal(converted["kernel"], jaxclip.dequantize(small["kernel"]))


@pytest.mark.parametrize("qtype", ["nf4", jnp.float8_e4m3fn])
def test_codes_that_are_no_integers_are_refused_by_path_and_type(qtype):
    array = qwix.quantize(weights((64, 8)), qtype, channelwise_axes=(1,))
    with pytest.raises(TypeError, match=r"'layer/kernel' has codes of type (nf4|float8_e4m3fn)"):
        interop.from_qwix({"layer": {"kernel": array}})


def test_a_scale_of_zero_is_refused_by_path():
    array = qwix.QArray(jnp.zeros((4, 2), jnp.int8), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="'w'"):
        interop.from_qwix({"w": array})


def test_a_missing_qwix_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    for convert in (interop.to_qwix, interop.from_qwix):
        with pytest.raises(ImportError, match=r"pip install 'jaxclip\[qwix\]'"):
            convert({})
