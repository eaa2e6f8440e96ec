"""A frozen leaf makes no step bad; whatever trains still does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxclip
from jaxclip.training.frozen import find_frozen
from oracles.given_gradients import given_loss

LABELS = {"train": "train", "frozen": "frozen", "more": "train"}
IS_FROZEN = {name: label == "frozen" for name, label in LABELS.items()}
PARAMS = {name: jnp.full((3, 2), 0.5) for name in LABELS}


def partitioned(inner):
    return optax.partition({"train": inner, "frozen": optax.set_to_zero()}, LABELS)


zeroed = optax.masked(optax.set_to_zero(), IS_FROZEN)
clip, lion = jaxclip.clip_by_global_norm(1.0), jaxclip.lion(0.1)
FREEZING = {
    "partition": partitioned(optax.chain(clip, lion)),
    "clip before partition": optax.chain(clip, partitioned(lion)),
    "last of the chain": optax.chain(optax.adam(0.1), zeroed),
    "first of the chain": optax.chain(zeroed, clip, optax.adamw(0.1)),
    "between two clips": optax.chain(clip, zeroed, optax.clip_by_global_norm(0.5), lion),
    "MultiSteps": optax.MultiSteps(partitioned(lion), 2),
    "apply_if_finite": optax.apply_if_finite(partitioned(lion), 3),
    "skip_nonfinite": jaxclip.skip_nonfinite(optax.chain(optax.adam(0.1), zeroed)),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: optax.chain(jaxclip.lion(learning_rate), zeroed)
    )(learning_rate=0.1),
    "project_weights": optax.chain(
        partitioned(lion), jaxclip.project_weights(jaxclip.weights.box(0.4))
    ),
    "decay afterwards": optax.chain(partitioned(lion), optax.add_decayed_weights(0.1)),
    "a leaf clip": optax.chain(jaxclip.clip_by_leaf_norm(1.0), optax.sgd(0.1), zeroed),
    "a transform of one's own": optax.chain(
        lion, optax.stateless(lambda u, _: u | {"frozen": jnp.zeros_like(u["frozen"])})
    ),
}
TRAINING = {
    "lion": lion,
    "masked without set_to_zero": optax.masked(lion, jax.tree.map(lambda x: not x, IS_FROZEN)),
    "a sign without momentum": jaxclip.sign_sgd(0.1),
    "a clip of NaN": optax.chain(jaxclip.gradients.clip_by_value(1.0), optax.sgd(0.1)),
    "no step at all": optax.sgd(0.0),
}


def frozen_leaves(tx):
    tx = optax.with_extra_args_support(tx)
    with jax.numpy_dtype_promotion("standard"):
        found = find_frozen(
            jax.jit(lambda g, state: tx.update(g, state, PARAMS, value=jnp.float32(0))),
            PARAMS,
            tx.init(PARAMS),
        )
    return {name for name, is_in in zip(sorted(PARAMS), found, strict=True) if is_in}


@pytest.mark.parametrize("name", FREEZING)
def test_a_leaf_whose_gradient_reaches_no_weight_is_known_whatever_froze_it(name):
    assert frozen_leaves(FREEZING[name]) == {"frozen"}


@pytest.mark.parametrize("name", TRAINING)
def test_a_leaf_that_gets_its_gradient_is_not_frozen(name):
    assert frozen_leaves(TRAINING[name]) == set()


@pytest.mark.parametrize("name", ["clip before partition", "skip_nonfinite"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_of_a_frozen_leaf_is_as_if_it_were_zero(name, bad):
    tx = FREEZING[name]
    step = jaxclip.make_train_step(given_loss, tx, donate=False)
    grads = {name: jnp.full((3, 2), 0.3) for name in PARAMS}
    with_bad = grads | {"frozen": jnp.full((3, 2), bad)}
    clean = grads | {"frozen": jnp.zeros((3, 2))}
    start = jaxclip.TrainState.create(PARAMS, tx)
    with jax.numpy_dtype_promotion("standard"):
        (got, info), (expected, _) = step(start, with_bad), step(start, clean)
        assert float(jnp.max(jnp.abs(got.params["train"] - 0.5))) > 0.01
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert (int(info.num_skipped), info.nonfinite_path(PARAMS)) == (0, "frozen")
        np.testing.assert_allclose(info.grad_norm, 0.3 * np.sqrt(12), rtol=1e-6)
        # A leaf that trains is named before it, and its step changes nothing.
        kept, info = step(got, with_bad | {"train": jnp.full((3, 2), bad)})
    assert (int(info.num_skipped), info.nonfinite_path(PARAMS)) == (1, "train")
    jax.tree.map(np.testing.assert_array_equal, kept[1:3], got[1:3])


def test_a_frozen_leaf_is_known_in_a_scan_and_in_a_batch_of_step_sizes():
    grads = {name: jnp.ones((4, 3, 2)) for name in PARAMS} | {"frozen": jnp.full((4, 3, 2), np.nan)}

    @jax.vmap
    def trained(step_size):
        tx = partitioned(jaxclip.sign_sgd(step_size))
        step = jaxclip.make_train_step(given_loss, tx)
        return jax.lax.scan(step, jaxclip.TrainState.create(PARAMS, tx), grads)

    state, info = trained(jnp.array([0.125, 0.25]))
    np.testing.assert_array_equal(state.params["train"][:, 0, 0], [0.0, -0.5])
    np.testing.assert_array_equal(state.params["frozen"], np.full((2, 3, 2), 0.5))
    assert not info.num_skipped.any()
    assert (info.nonfinite_leaf == sorted(PARAMS).index("frozen")).all()
