"""`compress` and `quantize` with moments of the inputs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip import Grid, compress, decompress, dequantize, max_abs, mse_optimal, quantize
from jaxclip.lowbit.rounding.moments import Calibration, InputMoments, MatrixView
from oracles.quick import quick_first


def moments_of(x, shape):
    view = MatrixView(shape, (), (0,), (1,))
    return InputMoments(
        jnp.asarray(x.T @ x)[None], jnp.asarray(x.sum(0))[None], jnp.full(1, len(x)), view
    )


@pytest.fixture(scope="module")
def network():
    """Two layers, their inputs, and a leaf whose inputs are not known."""
    rng = np.random.default_rng(0)

    def correlated(num, size):
        mix = rng.normal(size=(size, size)) * rng.lognormal(size=size)
        return (rng.normal(size=(num, size)) @ mix / size**0.5).astype(np.float32)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {
        "one": {"kernel": normal(48, 64), "bias": normal(64)},
        "two": {"kernel": normal(64, 32)},
        "other": normal(32, 32),
    }
    inputs = {"one/kernel": correlated(500, 48), "two/kernel": correlated(500, 64)}
    calibration = Calibration(
        {
            path: moments_of(x, (x.shape[1], 64 if "one" in path else 32))
            for path, x in inputs.items()
        }
    )
    return params, inputs, calibration


def errors(params, small, inputs):
    """Relative squared errors of the outputs of each layer."""
    values = decompress(small)
    found = {}
    for path, x in inputs.items():
        layer = path.split("/")[0]
        w, q = params[layer]["kernel"], np.asarray(values[layer]["kernel"])
        found[path] = np.square(x @ (w - q)).sum() / np.square(x @ w).sum()
    return found


@pytest.mark.parametrize("rule", quick_first([max_abs, mse_optimal]))
@pytest.mark.parametrize("bits", ["ternary", Grid(4, group_size=16)], ids=str)
def test_outputs_are_nearer_with_a_calibration(network, bits, rule):
    params, inputs, calibration = network
    blind = compress(params, bits, rule=rule)
    small = compress(params, bits, rule=rule, calibration=calibration)
    with_data, without = errors(params, small, inputs), errors(params, blind, inputs)
    assert all(with_data[path] < 0.6 * without[path] for path in inputs)
    np.testing.assert_array_equal(small["other"].qvalue, blind["other"].qvalue)
    np.testing.assert_array_equal(small["one"]["bias"], params["one"]["bias"])


def test_quantize_gives_what_compress_gives(network):
    params, _, calibration = network
    small = compress(params, 3, calibration=calibration)["two"]["kernel"]
    q = quantize(
        params["two"]["kernel"], Grid(3, axis=-1), moments=calibration.moments["two/kernel"]
    )
    np.testing.assert_array_equal(q.qvalue, small.qvalue)
    np.testing.assert_array_equal(q.scale, small.scale)


def test_zero_points_keep_their_scales_and_gain(network):
    params, inputs, calibration = network
    w, x = params["one"]["kernel"], inputs["one/kernel"]
    grid = Grid(3, axis=-1, zero_point=True)
    blind = quantize(w, grid)
    q = quantize(w, grid, moments=calibration.moments["one/kernel"])
    np.testing.assert_array_equal(q.zero, blind.zero)
    error, before = (np.square(x @ (w - np.asarray(dequantize(a)))).sum() for a in (q, blind))
    assert error < 0.6 * before


def test_a_target_spends_bits_where_outputs_are_sensitive(network):
    params, _, calibration = network
    params = {"one": params["one"], "two": params["two"]}
    bits = {}
    for layer in ("one", "two"):
        sensitive = {path: 1000.0 if layer in path else 1.0 for path in calibration.moments}
        sensitive = Calibration(calibration.moments, sensitive)
        small = compress(params, target_bits_per_weight=3.5, rule=max_abs, calibration=sensitive)
        bits[layer] = {k: small[k]["kernel"].num_bytes * 8 / small[k]["kernel"].size for k in small}
        num_bits = sum(8 * small[k]["kernel"].num_bytes for k in small)
        assert num_bits <= 3.5 * sum(small[k]["kernel"].size for k in small)
    assert bits["one"]["one"] > bits["one"]["two"] + 1
    assert bits["two"]["two"] > bits["two"]["one"] + 1


def test_a_calibration_of_other_parameters_is_refused(network):
    params, _, calibration = network
    with pytest.raises(ValueError, match="got moments for 'one/kernel', which is none of their"):
        compress({"two": params["two"]}, 4, calibration=calibration)
    swapped = Calibration({"one/kernel": calibration.moments["two/kernel"]})
    with pytest.raises(ValueError, match=r"for params at 'one/kernel', an array of shape \(48, 64"):
        compress(params, 4, calibration=swapped)
