"""A boxed chain in the training states of flax, haiku and orbax, against the same steps alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)
BOX = 0.05


def transform():
    return optax.chain(
        jaxclip.clip_by_global_norm(1.0),
        jaxclip.lion(0.02),
        jaxclip.project_weights(jaxclip.box(BOX)),
    )


def alone(params, loss_fn, num_steps=5):
    """The same steps with optax's two functions."""
    tx = transform()
    opt_state = tx.init(params)
    for _ in range(num_steps):
        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert np.abs(a).max() <= BOX


def squared_error(outputs):
    return jnp.mean((outputs - Y) ** 2)


def test_a_train_state_of_linen_takes_the_same_steps():
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    module = linen.Dense(4)
    params = module.init(jax.random.key(0), X)["params"]

    def loss_fn(params):
        return squared_error(module.apply({"params": params}, X))

    state = train_state.TrainState.create(apply_fn=module.apply, params=params, tx=transform())
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss_fn)(state.params)))
    for _ in range(5):
        state = step(state)
    assert_same(state.params, alone(params, loss_fn))
    assert jaxclip.clip_stats(state.opt_state)


def test_an_optimizer_of_nnx_takes_the_same_steps():
    nnx = pytest.importorskip("flax.nnx")
    module = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(module, nnx.Param)
    params = jax.tree.map(jnp.array, params)  # the module's are updated in place

    def loss_fn(params):
        return squared_error(nnx.merge(graph, params)(X))

    optimizer = nnx.Optimizer(module, transform(), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        grads = nnx.grad(lambda module: squared_error(module(X)))(module)
        optimizer.update(module, grads)

    for _ in range(5):
        step(module, optimizer)
    assert_same(nnx.state(module, nnx.Param), alone(params, loss_fn))


def test_parameters_of_haiku_take_the_same_steps_in_a_train_step():
    haiku = pytest.importorskip("haiku")
    network = haiku.without_apply_rng(haiku.transform(lambda x: haiku.Linear(4)(x)))
    params = network.init(jax.random.key(0), X)
    tx = transform()
    step = jaxclip.make_train_step(lambda p, x: squared_error(network.apply(p, x)), tx)
    state = jaxclip.TrainState.create(params, tx)
    for _ in range(5):
        state, _ = step(state, X)
    assert_same(state.params, alone(params, lambda p: squared_error(network.apply(p, X))))


def test_orbax_restores_a_train_state_into_its_abstract_target(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx = transform()
    step = jaxclip.make_train_step(lambda p, x: squared_error(x @ p["kernel"]), tx)
    params = {"kernel": jnp.zeros((8, 4))}
    state, _ = step(jaxclip.TrainState.create(params, tx), X)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(lambda: jaxclip.TrainState.create(params, tx))
        restored = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    (after, info), (expected, expected_info) = step(restored, X), step(state, X)
    assert_same(after.params, expected.params)
    assert float(info.loss) == float(expected_info.loss)
