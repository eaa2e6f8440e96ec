"""Moments of convolutions are those of patches cut out by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxclip.calibration import InputMoments, measure

IMAGES = np.random.default_rng(0).standard_normal((2, 7, 6, 4)).astype(np.float32)  # NHWC


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def convolve(kernel: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    numbers = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC")}[x.ndim - 2]
    options = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


def windows(x: np.ndarray, size: tuple, stride: int, pad: int, dilation: int) -> np.ndarray:
    """Returns patches (samples, height, width, channels)."""
    x = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    spans = [(n - 1) * dilation + 1 for n in size]
    rows = range(0, x.shape[1] - spans[0] + 1, stride)
    columns = range(0, x.shape[2] - spans[1] + 1, stride)
    cut = [
        x[:, i : i + spans[0] : dilation, j : j + spans[1] : dilation]
        for i in rows
        for j in columns
    ]
    return np.concatenate(cut)


def moments(kernel: np.ndarray, x: np.ndarray, max_dim: int = 8192, **options: Any) -> InputMoments:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return convolve(params["kernel"], x, **options)

    c = measure(apply, {"kernel": kernel}, [x], max_dim=max_dim, progress=False)
    return c.moments["kernel"]


def check(m: InputMoments, stacked: np.ndarray) -> None:
    """Compares with patches (stack, samples, inputs)."""
    second = np.einsum("sni,snj->sij", stacked, stacked)
    scale = np.abs(second).max()
    if m.is_diagonal:
        second = np.einsum("sii->si", second)
    np.testing.assert_allclose(m.second, second, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(m.first, stacked.sum(1), rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_array_equal(m.count, np.full(len(stacked), stacked.shape[1]))


@pytest.mark.parametrize(("stride", "pad", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2)], ids=str)
def test_a_convolution(stride: int, pad: int, dilation: int):
    options = {
        "window_strides": (stride, stride),
        "padding": [(pad, pad)] * 2,
        "rhs_dilation": (dilation, dilation),
    }
    m = moments(draw(3, 2, 4, 5), IMAGES, **options)
    patches = windows(IMAGES, (3, 2), stride, pad, dilation)
    check(m, patches.reshape(1, len(patches), 24))
    assert (m.view.shape, m.view.inputs, m.view.outputs) == ((3, 2, 4, 5), (0, 1, 2), (3,))


def test_a_grouped_convolution_has_a_matrix_for_each_group():
    m = moments(draw(3, 3, 2, 6), IMAGES, feature_group_count=2, padding="VALID")
    patches = windows(IMAGES, (3, 3), 1, 0, 1)
    groups = patches.reshape(len(patches), 3, 3, 2, 2).transpose(3, 0, 1, 2, 4)
    check(m, groups.reshape(2, len(patches), 18))
    assert (m.view.shape, m.view.stack, m.view.outputs) == ((3, 3, 2, 2, 3), (3,), (4,))


def test_a_depthwise_convolution_has_a_matrix_for_each_channel():
    m = moments(draw(3, 3, 1, 4), IMAGES, feature_group_count=4, padding="VALID")
    patches = windows(IMAGES, (3, 3), 1, 0, 1)
    check(m, patches.reshape(len(patches), 9, 4).transpose(2, 0, 1))
    assert (m.view.stack, m.view.inputs) == ((3,), (0, 1))


def test_a_transposed_convolution():
    m = moments(draw(3, 3, 4, 5), IMAGES, lhs_dilation=(2, 2), padding=[(2, 2)] * 2)
    dilated = np.zeros((2, 13, 11, 4))
    dilated[:, ::2, ::2] = IMAGES
    patches = windows(dilated, (3, 3), 1, 2, 1)
    check(m, patches.reshape(1, len(patches), 36))


def test_the_output_is_that_of_the_matrices_of_the_view():
    kernel = draw(3, 3, 2, 6)
    m = moments(kernel, IMAGES, feature_group_count=2, padding="VALID")
    patches = windows(IMAGES, (3, 3), 1, 0, 1).reshape(-1, 3, 3, 2, 2)
    groups = patches.transpose(3, 0, 1, 2, 4).reshape(2, -1, 18)
    outputs = np.einsum("sni,sio->nso", groups, m.view.unfold(kernel.astype(np.float64)))
    expected = convolve(kernel, IMAGES, feature_group_count=2, padding="VALID")
    # Patches are in the order of windows, then of images.
    expected = np.asarray(expected).reshape(2, -1, 6).transpose(1, 0, 2).reshape(-1, 6)
    np.testing.assert_allclose(outputs.reshape(-1, 6), expected, rtol=1e-4, atol=1e-4)


def test_a_long_kernel_above_max_dim_has_diagonals():
    x = np.random.default_rng(2).standard_normal((3, 40, 1)).astype(np.float32)
    m = moments(draw(16, 1, 5), x, max_dim=8, padding="VALID", window_strides=(4,))
    patches = np.stack([x[:, i : i + 16, 0] for i in range(0, 25, 4)], 1).reshape(1, -1, 16)
    check(m, patches.astype(np.float64))


def test_kernels_under_vmap_have_a_matrix_each():
    kernels = draw(3, 3, 3, 4, 5)

    def apply(kernels: jax.Array, x: jax.Array) -> jax.Array:
        each = jax.vmap(lambda k, x: convolve(k, x, padding="VALID"))
        return each(kernels, jnp.stack([x, 2 * x, 3 * x]))

    m = measure(apply, kernels, [IMAGES], progress=False).moments[""]
    patches = windows(IMAGES, (3, 3), 1, 0, 1).reshape(-1, 36)
    check(m, np.stack([patches, 2 * patches, 3 * patches]))
    assert (m.view.stack, m.view.inputs, m.view.outputs) == ((0,), (1, 2, 3), (4,))


def test_two_layers_in_another_layout():
    params = {"b": draw(5, 6, 3, 3), "a": draw(6, 4, 3, 3)}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(lax.conv(x, p["a"], (1, 1), "VALID"))
        return lax.conv(x, p["b"], (1, 1), "VALID")

    x = IMAGES.transpose(0, 3, 1, 2)
    c = measure(apply, params, [x], progress=False)
    hidden = np.tanh(lax.conv(x, params["a"], (1, 1), "VALID")).transpose(0, 2, 3, 1)
    patches = windows(hidden, (3, 3), 1, 0, 1)
    inputs = patches.transpose(0, 3, 1, 2).reshape(1, -1, 54)  # channels come first
    check(c.moments["b"], inputs)
    assert c.moments["b"].view.inputs == (1, 2, 3)
