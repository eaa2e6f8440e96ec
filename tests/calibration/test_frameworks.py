"""Models of flax, equinox and plain functions; arrays that are split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxclip
from jaxclip.calibration import InputMoments, measure

TOKENS = np.random.default_rng(0).integers(0, 11, (4, 6))


def check(m: InputMoments, captured: Any) -> None:
    """Compares moments with captured inputs (..., inputs) of one matrix."""
    x = np.asarray(captured, np.float64)
    x = x.reshape(-1, x.shape[-1])
    second = x.T @ x
    np.testing.assert_allclose(m.second[0], second, rtol=1e-4, atol=1e-4 * np.abs(second).max())
    np.testing.assert_array_equal(m.count, [len(x)])


def test_a_transformer_block_of_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                num_heads=2, in_features=8, decode=False, rngs=rngs
            )
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.down = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, tokens: jax.Array) -> Any:
            x = self.embed(tokens)
            y = self.norm(x)
            x = x + self.attention(y)
            hidden = jax.nn.gelu(self.up(x))
            return self.embed.attend(x + self.down(hidden)), (y, x, hidden)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        graph, params = nnx.split(Block(nnx.Rngs(0)))
        c = measure(
            lambda p, t: nnx.merge(graph, p)(t)[0], params, [TOKENS[:2], TOKENS[2:]], progress=False
        )
        _, (normed, x, hidden) = nnx.merge(graph, params)(TOKENS)
    assert c.missing == ("attention/key/bias", "attention/query/bias", "attention/value/bias")
    for name in ("query", "key", "value"):
        m = c.moments[f"attention/{name}/kernel"]
        assert (m.view.shape, m.view.inputs, m.view.outputs) == ((8, 2, 4), (0,), (1, 2))
        check(m, normed)
    assert c.moments["attention/out/kernel"].view.inputs == (0, 1)
    check(c.moments["up/kernel"], x)
    check(c.moments["down/kernel"], hidden)
    assert c.moments["embed/embedding"].view.inputs == (1,)
    assert "also looked up" in dict(c.notes)["embed/embedding"]


def test_a_scanned_and_rematerialized_stack_of_linen():
    nn = pytest.importorskip("flax.linen")

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: Any) -> Any:
            return jnp.tanh(nn.Dense(6)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            axes = {"params": 0}
            stack = nn.scan(nn.remat(Layer), axes, split_rngs={"params": True}, length=3)
            x, _ = stack(name="layers")(x, None)
            return nn.Conv(5, (3,), name="conv")(x[None])

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net, x = Net(), np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)
        params = net.init(jax.random.key(0), x)
        c = measure(net.apply, params, [x], progress=False)
    m = c.moments["params/layers/Dense_0/kernel"]
    kernel, captured = params["params"]["layers"]["Dense_0"]["kernel"], [x]
    for layer in kernel[:-1]:
        captured.append(np.tanh(captured[-1] @ layer))
    assert (m.view.stack, m.view.inputs) == ((0,), (1,))
    for i, inputs in enumerate(captured):
        np.testing.assert_allclose(m.second[i], inputs.T @ inputs, rtol=1e-4, atol=1e-4)
    last = np.pad(np.tanh(captured[-1] @ kernel[-1]), ((1, 1), (0, 0)))
    patches = np.stack([last[i : i + 7] for i in range(3)], 1).reshape(7, 18)
    check(c.moments["params/conv/kernel"], patches)
    assert c.missing == ("params/layers/Dense_0/bias",)


def test_a_partitioned_module_of_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(5, 3, 8, 1, key=jax.random.key(0))
    x = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    params, static = eqx.partition(net, eqx.is_array)
    c = measure(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, [x], progress=False)
    first = net.layers[0]
    check(c.moments["layers/0/weight"], x)
    check(c.moments["layers/1/weight"], jax.nn.relu(x @ first.weight.T + first.bias[None]))
    assert c.moments["layers/1/weight"].view.inputs == (1,)
    with pytest.raises(TypeError, match=r"params at 'activation' must be .*partition"):
        measure(lambda p, x: jax.vmap(p)(x), net, [x], progress=False)


def test_low_bit_leaves_are_part_of_the_model():
    params = {"a": jaxclip.quantize(jnp.eye(4), 8), "b": jnp.eye(4)}
    x = np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)
    c = measure(lambda p, x: (x @ p["a"]) @ p["b"], params, [x], progress=False)
    assert list(c.moments) == ["b"]
    assert c.missing == ()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_arrays_may_be_split_over_devices(kind: AxisType):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"), (kind,) * 2)
    rng = np.random.default_rng(1)
    params = {"a": rng.standard_normal((6, 4)), "b": rng.standard_normal((4, 6))}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    kernel = rng.standard_normal((3, 6, 6)).astype(np.float32)
    x = rng.standard_normal((8, 6)).astype(np.float32)
    where = {"out_sharding": P("data")} if kind == AxisType.Explicit else {}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(jnp.dot(x, p["a"]))
        x = jnp.dot(x, p["b"], **where)
        return jax.lax.conv_general_dilated(
            x[:, None], p["c"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), **where
        )

    specs = {"a": P(None, "model"), "b": P("model"), "c": P()}
    params["c"] = kernel
    placed = {k: jax.device_put(w, NamedSharding(mesh, specs[k])) for k, w in params.items()}
    batch = jax.device_put(x, NamedSharding(mesh, P("data")))
    with jax.sharding.set_mesh(mesh):
        c = measure(apply, placed, [batch, batch], progress=False)
    where = {}
    plain = measure(apply, params, [x, x], progress=False)
    assert plain.missing == c.missing == ()
    for name, m in plain.moments.items():
        np.testing.assert_allclose(c.moments[name].second, m.second, rtol=1e-5, atol=1e-4)
        assert c.moments[name].view == m.view


def test_what_is_done_on_each_device_by_itself_is_not_followed():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    params = {"a": np.eye(4, dtype=np.float32), "b": np.ones((4, 3), np.float32)}
    x = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)

    def apply(p: Any, x: jax.Array) -> jax.Array:
        specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
        return jax.shard_map(lambda x, w: jnp.tanh(x @ w), mesh=mesh, **specs)(x, p["a"]) @ p["b"]

    c = measure(apply, params, [x], progress=False)
    assert c.missing == ("a",)
    assert dict(c.notes) == {"a": "not followed: shard_map"}
    check(c.moments["b"], np.tanh(x))
