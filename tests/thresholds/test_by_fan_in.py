"""`fan_in` by the layer conventions of flax, and on flax's own layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from jaxclip import compress
from jaxclip._core.trees import path_name
from jaxclip.thresholds.by_fan_in import fan_in
from jaxclip.thresholds.values import resolve_threshold


def num_inputs(rule, params):
    """The number of inputs that each leaf's threshold of kappa 1 follows from; inf if free."""
    bounds = resolve_threshold(rule, params)
    return jax.tree.map(lambda t: round(2 / float(t) ** 2) if t < np.inf else np.inf, bounds)


@pytest.mark.parametrize(
    ("path", "shape", "inputs"),
    [
        ("dense/kernel", (64, 10), 64),
        ("conv/kernel", (3, 3, 16, 32), 3 * 3 * 16),
        ("conv1d/kernel", (5, 16, 32), 5 * 16),
        ("general/kernel", (4, 8, 10), 32),
        ("attention/query/kernel", (32, 4, 8), 32),
        ("attention/key/kernel", (32, 4, 8), 32),
        ("attention/value/kernel", (32, 4, 8), 32),
        ("attention/out/kernel", (4, 8, 32), 32),
        ("embed/embedding", (1000, 16), 16),
        ("dense/bias", (10,), None),
        ("conv3d/kernel", (3, 3, 3, 2, 5), 54),
        ("attention/query/bias", (4, 8), None),
        ("norm/scale", (64,), None),
        ("norm/scale", (4, 16), None),
        ("temperature", (), None),
    ],
)
def test_fan_in_is_read_by_the_layer_conventions_of_flax(path, shape, inputs):
    tree = jnp.zeros(shape)
    for name in reversed(path.split("/")):
        tree = {name: tree}
    (got,) = jax.tree.leaves(resolve_threshold(fan_in(0.5), tree))
    expected = np.inf if inputs is None else 0.5 * np.sqrt(2 / inputs)
    np.testing.assert_allclose(float(got), expected, rtol=1e-6)


def test_stacked_axes_are_not_inputs():
    params = {"kernel": jnp.zeros((12, 64, 10)), "bias": jnp.zeros((12, 10))}
    got = resolve_threshold(fan_in(1.0, stacked_axes=1), params)
    np.testing.assert_allclose(float(got["kernel"]), np.sqrt(2 / 64), rtol=1e-6)
    assert float(got["bias"]) == np.inf


def test_kappa_may_be_traced_or_a_schedule():
    params = {"w": jnp.zeros((8, 3)), "b": jnp.zeros(3)}
    traced = jax.jit(lambda k: resolve_threshold(fan_in(k), params))(2.0)
    assert (float(traced["w"]), float(traced["b"])) == (1.0, np.inf)
    scheduled = fan_in(lambda step: 1.0 + step)
    assert float(resolve_threshold(scheduled, params, jnp.float32(3))["w"]) == 2.0


@pytest.mark.parametrize("bad", ["1", None, True, 1j, -1.0, np.nan, np.ones(2)], ids=repr)
def test_a_kappa_that_is_no_number_is_refused_by_name(bad):
    with pytest.raises((TypeError, ValueError), match="kappa"):
        fan_in(bad)


@pytest.mark.parametrize(
    ("shape", "out_axes", "stacked", "inputs"),
    [
        ((32, 4, 8), (-2, -1), 0, 32),
        ((4, 8, 32), (-1,), 0, 32),
        ((10, 64), 0, 0, 64),
        ((12, 10, 64), 0, 1, 64),
        ((16, 8, 3, 3), 0, 0, 72),
        ((5, 6), (0, 1), 0, 1),
    ],
)
def test_out_axes_say_which_axes_are_outputs(shape, out_axes, stacked, inputs):
    rule = fan_in(1.0, out_axes=out_axes, stacked_axes=stacked)
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[stacked:][-1])}
    got = resolve_threshold(rule, params)
    np.testing.assert_allclose(float(got["kernel"]), np.sqrt(2 / inputs), rtol=1e-6)
    assert float(got["bias"]) == np.inf
    assert num_inputs(rule, params) == {"kernel": inputs, "bias": np.inf}


@pytest.mark.parametrize("bad", [True, 1.5, "1", (), (0, None)], ids=repr)
def test_out_axes_must_be_axes(bad):
    with pytest.raises((TypeError, ValueError), match="out_axes"):
        fan_in(1.0, out_axes=bad)
    with pytest.raises(ValueError, match=r"out_axes .*'dense/kernel'"):
        resolve_threshold(fan_in(1.0, out_axes=2), {"dense": {"kernel": jnp.ones((2, 2))}})


@pytest.mark.parametrize(
    ("path", "shape", "inputs"),
    [
        ("linear/weight", (10, 64), 64),
        ("conv/weight", (32, 16, 3, 3), 16 * 3 * 3),
        ("cell/weight_ih", (30, 7), 7),
        ("embed/weight", (1000, 16), 16),
        ("moe/experts/weight", (8, 10, 64), 64),
        ("moe/experts/kernel", (8, 64, 10), 64),
    ],
)
def test_weights_of_pytorch_and_equinox_have_their_inputs_last(path, shape, inputs):
    assert num_inputs(fan_in(), {path: jnp.zeros(shape)}) == {path: inputs}
    small = compress({path: jnp.ones(shape)}, 4, rule=fan_in())[path]
    np.testing.assert_allclose(small.threshold.max(), np.sqrt(2 / inputs), rtol=1e-6)


def test_a_layout_is_said_where_names_do_not_say_it():
    params = {"a": {"w": jnp.zeros((8, 3))}, "b": {"w": jnp.zeros((3, 8))}}
    assert num_inputs(fan_in(), params) == {"a": {"w": 8}, "b": {"w": 3}}
    assert num_inputs(fan_in(layout="out_in"), params) == {"a": {"w": 3}, "b": {"w": 8}}
    # A name that says nothing follows most of the others, also as a rule of `compress`.
    params |= {"c": {"weight": jnp.zeros((4, 6))}}
    assert num_inputs(fan_in(), params) == {"a": {"w": 3}, "b": {"w": 8}, "c": {"weight": 6}}
    params = jax.tree.map(lambda w: w + 1, params)
    small = compress(params, 8, rule=fan_in(0.5))
    small = flatten_dict(small, sep="/")
    got = {name: round(0.5 / float(q.threshold.max()) ** 2) for name, q in small.items()}
    assert got == {"a/w": 3, "b/w": 8, "c/weight": 6}
    for bad in ("torch", 0, True):
        with pytest.raises(ValueError, match="layout must be one of"):
            fan_in(layout=bad)
    with pytest.raises(ValueError, match="out_axes and layout say the same thing"):
        fan_in(layout="in_out", out_axes=0)


@pytest.mark.thorough
def test_fan_in_and_scales_of_the_real_layers_of_equinox():
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)
    layers = [
        eqx.nn.Linear(64, 10, key=key),
        eqx.nn.Conv2d(16, 32, 3, key=key),
        eqx.nn.ConvTranspose2d(6, 4, 2, key=key),
        eqx.nn.Embedding(100, 16, key=key),
        eqx.nn.GRUCell(7, 12, key=key),
        eqx.nn.MultiheadAttention(2, 8, key=key),
        eqx.nn.LayerNorm(8),
    ]
    params = eqx.filter(layers, eqx.is_inexact_array)
    got = num_inputs(fan_in(), params)
    assert [layer.weight for layer in got[:4]] == [64, 16 * 9, 6 * 4, 16]
    assert (got[4].weight_ih, got[4].weight_hh, got[5].query_proj.weight) == (7, 12, 8)
    assert {got[0].bias, got[1].bias, got[4].bias, got[6].weight} == {np.inf}
    small = compress(params, 4)
    assert [q.weight.scale.size for q in small[:2]] == [10, 32]
    np.testing.assert_array_equal(small[0].weight.scale.shape, (10, 1))


class Layers(nn.Module):
    """One of each of flax's layers, over an input of shape (2, 6, 6, 8)."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3), feature_group_count=4, name="conv")(x)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.ConvTranspose(6, (2, 2), name="transposed")(x)
        x = nn.Dense(5, name="dense")(x.reshape(2, 36, 6))
        x = nn.DenseGeneral((3, 4), name="two_outputs")(x)
        x = nn.DenseGeneral(10, axis=(-2, -1), name="two_inputs")(x)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(x)
        x = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=7,
        )(nn.Dense(10, name="stack"), x, None)[0]
        return x, nn.Embed(30, 4, name="embed")(jnp.zeros(1, jnp.int32))


def test_fan_in_of_the_real_layers_of_flax():
    shapes = jax.eval_shape(Layers().init, jax.random.key(0), jnp.zeros((2, 6, 6, 8)))["params"]
    rules = {name: fan_in() for name in shapes} | {
        "two_outputs": fan_in(out_axes=(-2, -1)),
        "stack": fan_in(stacked_axes=1),
    }
    got = num_inputs(rules, shapes)
    kernels = {
        name: got[name]["kernel"]
        for name in ("conv", "transposed", "dense", "two_outputs", "two_inputs", "stack")
    }
    assert kernels == {
        "conv": 3 * 3 * 8 // 4,  # of the inputs of its group
        "transposed": 2 * 2 * 12,
        "dense": 6,
        "two_outputs": 5,
        "two_inputs": 3 * 4,
        "stack": 10,
    }
    attention = {name: layer["kernel"] for name, layer in got["attention"].items()}
    assert attention == {"query": 10, "key": 10, "value": 10, "out": 8}
    assert got["embed"] == {"embedding": 4}
    free = [*(got[n]["bias"] for n in (*kernels, "norm")), got["norm"]["scale"]]
    free += [layer["bias"] for layer in got["attention"].values()]
    assert set(free) == {np.inf}


@pytest.mark.thorough
def test_fan_in_of_the_attention_of_nnx():
    layer = nnx.MultiHeadAttention(2, 10, 8, decode=False, rngs=nnx.Rngs(0))
    got = num_inputs(fan_in(), nnx.state(layer, nnx.Param))
    got = {path_name(p): n for p, n in jax.tree_util.tree_leaves_with_path(got)}
    assert {k: n for k, n in got.items() if n < np.inf} == {
        "query/kernel": 10,
        "key/kernel": 10,
        "value/kernel": 10,
        "out/kernel": 8,
    }


@pytest.mark.parametrize("bad", [-1, 1.5, True, "1", None], ids=repr)
def test_stacked_axes_must_be_a_count(bad):
    with pytest.raises((TypeError, ValueError), match="stacked_axes"):
        fan_in(1.0, stacked_axes=bad)
