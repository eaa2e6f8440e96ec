"""Any pytree of arrays goes into a file by its key paths, and comes back as what it was."""

import collections
import dataclasses
import types
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxclip
from jaxclip import checkpoints
from jaxclip.checkpoints import CheckpointError
from oracles.saved_trees import assert_same


class Pair(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any
    name: str = dataclasses.field(default="layer", metadata={"static": True})


@jax.tree_util.register_pytree_with_keys_class
class Model:
    """A module as equinox has it: all fields are children, arrays or not."""

    def __init__(self, layers, activation, rate, axis_name):
        self.layers, self.activation, self.rate, self.axis_name = (
            layers,
            activation,
            rate,
            axis_name,
        )

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(k), v) for k, v in vars(self).items()], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class Nameless:
    def __init__(self, *arrays):
        self.arrays = arrays

    def tree_flatten(self):
        return self.arrays, None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def kernel() -> np.ndarray:
    return np.arange(6, dtype=np.float32).reshape(2, 3)


def bias() -> np.ndarray:
    return np.ones(3, np.float32)


def boxed() -> dict:
    return {"kernel": linen.Partitioned(kernel(), (None, "x")), "bias": bias()}


FLAT = {"kernel", "bias"}
TREES = {
    "OrderedDict": (collections.OrderedDict(kernel=kernel(), bias=bias()), FLAT),
    "defaultdict": (collections.defaultdict(list, kernel=kernel(), bias=bias()), FLAT),
    "FrozenDict": (flax.core.freeze({"a": {"kernel": kernel()}}), {"a/kernel"}),
    "NamedTuple": (Pair(kernel(), bias()), FLAT),
    "dataclass": (Layer(kernel(), bias(), "first"), FLAT),
    "linen boxes": (boxed(), FLAT),
    "nameless": ({"a": Nameless(kernel(), bias())}, {"a/0", "a/1"}),
    "nnx Param": (nnx.Param(kernel()), {"array"}),
    "nnx State": (
        nnx.State({"layers": {0: {"kernel": nnx.Param(kernel()), "bias": nnx.Param(bias())}}}),
        {"layers/0/kernel", "layers/0/bias"},
    ),
    "nested": (
        [Pair(Layer(kernel(), None), (nnx.Param(bias()), None)), {1: Nameless()}],
        {"0/kernel/kernel", "0/bias/0"},
    ),
    "value in the middle": ({"value": {"kernel": nnx.Param(kernel())}}, {"value/kernel"}),
    "several in a box": (nnx.State({"m": nnx.Param({"value": bias()})}), {"m/value"}),
}


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_of_any_type_comes_back_as_that_type(kind, path):
    tree, names = TREES[kind]
    checkpoints.save(path, tree)
    assert {leaf.path for leaf in checkpoints.inspect(path).leaves} == names
    loaded = checkpoints.load(path, like=tree)
    assert type(loaded) is type(tree)
    assert_same(loaded, tree)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert_same(checkpoints.load(path, like=shapes), tree)


def test_a_tree_of_any_type_has_the_bytes_of_its_dict(tmp_path):
    plain = {"kernel": kernel(), "bias": bias()}
    checkpoints.save(tmp_path / "plain.safetensors", plain)
    wanted = (tmp_path / "plain.safetensors").read_bytes()
    same = [TREES[k][0] for k in ("OrderedDict", "NamedTuple", "dataclass", "linen boxes")]
    for tree in same:
        checkpoints.save(tmp_path / "x.safetensors", tree, overwrite=True)
        assert (tmp_path / "x.safetensors").read_bytes() == wanted
        assert jaxclip.size_report(tree).total_bytes == len(wanted)
        assert_same(checkpoints.load(tmp_path / "x.safetensors"), plain)
        assert_same(checkpoints.load(tmp_path / "x.safetensors", like=tree), tree)


@pytest.mark.thorough
def test_low_bit_leaves_of_an_nnx_state_come_back_in_their_boxes(path):
    state = nnx.State({"kernel": nnx.Param(jnp.asarray(kernel())), "bias": nnx.Param(bias())})
    small = jaxclip.compress(state, 4)
    checkpoints.save(path, small)
    for like in (state, small):
        loaded = checkpoints.load(path, like=like)
        assert type(loaded) is nnx.State
        assert type(loaded["kernel"]) is nnx.Param
        assert_same(loaded, small)
        assert_same(jaxclip.decompress(loaded), jaxclip.decompress(small))


def test_npz_takes_mappings_and_boxes_too(tmp_path):
    path = tmp_path / "x.npz"
    state = nnx.State({"a": {"kernel": nnx.Param(kernel())}, "bias": nnx.Param(bias())})
    checkpoints.save(path, state)
    assert checkpoints.load(path).keys() == {"a/kernel", "bias"}
    assert_same(checkpoints.load(path, like=state), state)


# --- Modules --------------------------------------------------------------------------------


def model(rate: float = 0.25, activation=jax.nn.relu) -> Model:
    return Model([Layer(kernel(), None), Layer(kernel(), bias())], activation, rate, "batch")


def test_what_is_no_array_in_a_module_comes_from_like(path):
    checkpoints.save(path, model())
    names = {leaf.path for leaf in checkpoints.inspect(path).leaves}
    assert names == {"layers/0/kernel", "layers/1/kernel", "layers/1/bias", "rate"}
    loaded = checkpoints.load(path, like=model(0.5, jnp.tanh))
    assert type(loaded) is Model
    assert loaded.activation is jnp.tanh
    assert loaded.axis_name == "batch"
    assert type(loaded.rate) is float
    assert loaded.rate == 0.25  # a number is written: a step count is not a part of the program
    assert_same(loaded.layers, model().layers)


def test_a_filtered_module_fits_a_whole_one_and_numbers_stay(path):
    def arrays_only(tree):
        return jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else None, tree)

    checkpoints.save(path, arrays_only(model()))
    assert checkpoints.load(path, like=model(0.5)).rate == 0.5
    assert checkpoints.load(path, like=arrays_only(model())).activation is None


def test_a_number_is_read_only_from_a_number_of_its_kind(path):
    checkpoints.save(path, {"rate": np.float32(0.5)})
    assert checkpoints.load(path, like={"rate": 1.0}) == {"rate": 0.5}
    with pytest.raises(CheckpointError, match=r"'rate' has shape \(\) and dtype float32.*number 3"):
        checkpoints.load(path, like={"rate": 3})
    with pytest.raises(CheckpointError, match="'rate' is in the file, but not in like"):
        checkpoints.load(path, like={"rate": jnp.tanh})


@pytest.mark.parametrize("leaf", [types.SimpleNamespace(), "text", jnp.tanh, 3, {1, 2}])
def test_what_is_no_array_in_a_dict_is_refused_by_its_path(leaf, path):
    for tree in ({"a": leaf}, {"a": nnx.Param(leaf)}, collections.OrderedDict(a=leaf)):
        with pytest.raises(TypeError, match="'a'"):
            checkpoints.save(path, tree)
    assert not path.exists()


def test_an_unknown_object_in_a_module_is_refused_by_its_path(path):
    with pytest.raises(TypeError, match="'layers/x' is of type SimpleNamespace"):
        checkpoints.save(path, Model({"x": types.SimpleNamespace()}, None, 0.5, None))


def test_an_nnx_module_continues_with_its_random_keys(path):
    dropout, x = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), jnp.ones(64)
    dropout(x)
    checkpoints.save(path, nnx.state(dropout))
    assert {str(leaf.dtype) for leaf in checkpoints.inspect(path).leaves} == {"uint32"}
    other = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    nnx.update(other, checkpoints.load(path, like=nnx.state(other)))
    np.testing.assert_array_equal(other(x), dropout(x))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys_are_saved_as_their_data_and_made_from_it(path, impl):
    keys = {"one": jax.random.key(3, impl=impl)}
    keys["many"] = jax.random.split(keys["one"], (2, 3))
    checkpoints.save(path, keys)
    assert checkpoints.size_report(keys).total_bytes == path.stat().st_size
    data = jax.tree.map(jax.random.key_data, keys)
    assert_same(checkpoints.load(path), data)
    shapes = jax.eval_shape(lambda: keys)
    for like, device in ((keys, None), (shapes, None), (keys, jax.devices()[0])):
        loaded = checkpoints.load(path, like=like, device=device)
        for name, key in keys.items():
            assert loaded[name].dtype == key.dtype
            assert jnp.array_equal(jax.random.key_data(loaded[name]), data[name])
    with pytest.raises(checkpoints.CheckpointError, match=r"'many' has shape .*, but like has"):
        checkpoints.load(path, like=keys | {"many": keys["one"]})


def test_an_nnx_module_itself_is_saved_by_its_parameters(path):
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    checkpoints.save(path, linear)
    wanted = {"kernel": linear.kernel[...], "bias": linear.bias[...]}
    assert_same(checkpoints.load(path), wanted)
    assert_same(checkpoints.load(path, like=nnx.state(linear)), nnx.state(linear))
    loaded = checkpoints.load(path, like=linear)
    x = jnp.ones(2)
    np.testing.assert_array_equal(loaded(x), linear(x))


@pytest.mark.thorough
def test_equinox_modules_come_back_with_their_functions(path):
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    checkpoints.save(path, mlp)
    names = {leaf.path for leaf in checkpoints.inspect(path).leaves}
    assert names == {f"layers/{i}/{part}" for i in (0, 1) for part in ("weight", "bias")}
    like = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(1))
    for each in (like, eqx.filter_eval_shape(lambda: mlp)):
        loaded = checkpoints.load(path, like=each)
        assert type(loaded) is type(mlp)
        np.testing.assert_array_equal(loaded(jnp.ones(4)), mlp(jnp.ones(4)))
