"""`clip_stats` finds what the transforms measured, wherever their states are."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxclip

NORM_FIELDS = {"pre_norm", "post_norm", "clip_coef", "clip_rate", "num_nonfinite"}
VALUE_FIELDS = {"clip_rate", "num_nonfinite"}
GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}


def keys(prefix, fields):
    return {f"{prefix}/{f}" for f in fields}


def state_after(tx, grads=GRADS, num_steps=1, wrap=jax.jit):
    params = jax.tree.map(jnp.zeros_like, grads)
    state, update = tx.init(params), wrap(tx.update)
    for _ in range(num_steps):
        _, state = update(grads, state, params)
    return state


@pytest.mark.thorough
def test_a_chain_gives_one_entry_a_transform_in_the_order_of_the_chain():
    tx = optax.chain(
        jaxclip.clip_by_value(3.5), jaxclip.clip_by_global_norm(1.0), jaxclip.lion(0.1)
    )
    stats = jaxclip.clip_stats(state_after(tx))
    expected = [
        "clip_by_value/clip_rate",
        "clip_by_value/num_nonfinite",
        "clip_by_global_norm/pre_norm",
        "clip_by_global_norm/post_norm",
        "clip_by_global_norm/clip_coef",
        "clip_by_global_norm/clip_rate",
        "clip_by_global_norm/num_nonfinite",
        "scale_by_lion/num_nonfinite",
    ]
    assert list(stats) == expected
    norm = (3**2 + 3.5**2) ** 0.5
    values = [1 / 3, 0, norm, 1, 1 / norm, 1, 0, 0]
    np.testing.assert_allclose([float(x) for x in stats.values()], values, rtol=2e-6)
    assert all(x.shape == () for x in stats.values())


@pytest.mark.thorough
def test_two_clips_of_one_kind_are_told_apart_by_number():
    tx = optax.chain(
        jaxclip.clip_by_global_norm(2.0),
        optax.chain(jaxclip.clip_by_global_norm(1.0)),
        jaxclip.clip_by_global_norm(10.0),
    )
    stats = jaxclip.clip_stats(state_after(tx))
    names = ["clip_by_global_norm", "clip_by_global_norm_2", "clip_by_global_norm_3"]
    assert set(stats) == set().union(*(keys(n, NORM_FIELDS) for n in names))
    norms = [float(stats[f"{n}/pre_norm"]) for n in names]
    np.testing.assert_allclose(norms, [5, 2, 1], rtol=2e-6)


WRAPPERS = {
    "masked": lambda clip: optax.masked(clip, {"w": True, "b": False}),
    "partition": lambda clip: optax.partition(
        {"clipped": clip, "free": optax.sgd(1.0)}, {"w": "clipped", "b": "free"}
    ),
    "named_chain": lambda clip: optax.named_chain(("a", clip), ("b", optax.scale(2.0))),
    "conditionally_mask": lambda clip: optax.conditionally_mask(clip, lambda step: step >= 0),
    "apply_if_finite": lambda clip: optax.apply_if_finite(clip, 3),
    "nested": lambda clip: optax.chain(optax.masked(optax.chain(clip, optax.identity()), True)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_optax_are_looked_through(name):
    tx = WRAPPERS[name](jaxclip.clip_by_global_norm(1.0))
    stats = jaxclip.clip_stats(state_after(tx))
    assert set(stats) == keys("clip_by_global_norm", NORM_FIELDS)
    expected = 3 if name in ("masked", "partition") else 5
    assert float(stats["clip_by_global_norm/pre_norm"]) == expected


def test_each_group_of_a_partition_has_its_own_numbers():
    clip = jaxclip.clip_by_global_norm
    tx = optax.partition({"x": clip(1.0), "y": clip(8.0)}, {"w": "x", "b": "y"})
    stats = jaxclip.clip_stats(state_after(tx))
    pre_norms = {float(v) for k, v in stats.items() if k.endswith("pre_norm")}
    rates = {float(v) for k, v in stats.items() if k.endswith("clip_rate")}
    assert pre_norms == {3.0, 4.0}
    assert rates == {1.0, 0.0}


def test_injected_hyper_parameters_do_not_hide_the_numbers():
    tx = optax.inject_hyperparams(jaxclip.clip_by_global_norm)(max_norm=1.0)
    stats = jaxclip.clip_stats(state_after(tx))
    assert set(stats) == keys("clip_by_global_norm", NORM_FIELDS)
    assert float(stats["clip_by_global_norm/pre_norm"]) == 5


@pytest.mark.thorough
def test_multi_steps_gives_the_numbers_of_the_last_real_step():
    tx = optax.MultiSteps(jaxclip.clip_by_global_norm(1.0), 2)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides floats by integers
        early, late = state_after(tx, num_steps=1), state_after(tx, num_steps=2)
    assert float(jaxclip.clip_stats(early)["clip_by_global_norm/pre_norm"]) == 0
    np.testing.assert_allclose(jaxclip.clip_stats(late)["clip_by_global_norm/pre_norm"], 5)


def test_a_chain_inside_multi_steps_inside_inject_is_found():
    def make(rate):
        return optax.chain(jaxclip.clip_by_value(0.5), jaxclip.sign_sgd(rate))

    stats = jaxclip.clip_stats(state_after(optax.inject_hyperparams(make)(rate=0.1)))
    assert set(stats) == keys("clip_by_value", VALUE_FIELDS) | {"scale_by_sign/num_nonfinite"}


@pytest.mark.thorough
def test_the_state_of_flax_nnx_gives_arrays():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.sign_sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4), jnp.float32)) ** 2))(model)
        optimizer.update(model, grads)
        return sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)) ** 0.5

    norm = step(model, optimizer)
    stats = jaxclip.clip_stats(optimizer.opt_state)
    assert set(stats) == keys("clip_by_global_norm", NORM_FIELDS) | {"scale_by_sign/num_nonfinite"}
    np.testing.assert_allclose(float(stats["clip_by_global_norm/pre_norm"]), norm, rtol=1e-6)
    assert all(isinstance(x, jax.Array) for x in stats.values())


@pytest.mark.thorough
def test_numbers_can_be_read_inside_jit_scan_and_vmap():
    tx = optax.chain(jaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
    params = jnp.zeros(2)

    def body(state, g):
        _, state = tx.update(g, state, params)
        return state, jaxclip.clip_stats(state)["clip_by_global_norm/pre_norm"]

    grads = jnp.asarray([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    _, norms = jax.jit(lambda g: jax.lax.scan(body, tx.init(params), g))(grads)
    np.testing.assert_allclose(norms, [5, 0.5, 0], rtol=1e-6)
    _, norms = jax.vmap(lambda g: body(tx.init(params), g))(grads)
    np.testing.assert_allclose(norms, [5, 0.5, 0], rtol=1e-6)


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.identity()])
def test_an_optimizer_without_our_transforms_has_no_numbers(tx):
    assert jaxclip.clip_stats(tx.init(jnp.zeros(2))) == {}


CLIPS = {
    "clip_by_value": jaxclip.clip_by_value(1.0),
    "clip_by_global_norm": jaxclip.clip_by_global_norm(1.0),
    "clip_by_leaf_norm": jaxclip.clip_by_leaf_norm(1.0),
    "clip_by_block_rms": jaxclip.clip_by_block_rms(1.0),
    "adaptive_grad_clip": jaxclip.adaptive_grad_clip(0.1),
    "clip_update_relative": jaxclip.gradients.clip_update_relative(),
    "clip_by_spectral_norm": jaxclip.gradients.clip_by_spectral_norm(1.0),
    "smooth_clip": jaxclip.gradients.smooth_clip(1.0),
    "autoclip": jaxclip.gradients.autoclip(),
    "zclip": jaxclip.gradients.zclip(),
    "adagc": jaxclip.gradients.adagc(),
    "clip_spikes": jaxclip.gradients.clip_spikes(),
    "clip_leaf_spikes": jaxclip.gradients.clip_leaf_spikes(),
    "skip_or_clip": jaxclip.gradients.skip_or_clip(optax.sgd(0.1), max_norm=1.0),
}


@pytest.mark.parametrize("name", CLIPS)
def test_every_clip_keeps_one_value_with_its_statistics(name):
    state = state_after(optax.chain(optax.identity(), CLIPS[name]))
    kept = optax.tree_utils.tree_get(state, "stats")
    assert isinstance(kept, jaxclip.gradients.ClipStats)
    assert kept.num_nonfinite is optax.tree_utils.tree_get(state, "num_nonfinite")
    numbers = {f"{name}/{f}": x for f, x in kept._asdict().items() if x is not None}
    found = jaxclip.clip_stats(state)
    others = keys(name, {"threshold", "num_skipped", "num_consecutive"})
    assert set(numbers) <= set(found) <= set(numbers) | others
    assert all(found[key] == number for key, number in numbers.items())


def test_a_transform_of_the_users_own_is_found_by_the_name_in_its_state():
    class CountingState(NamedTuple):
        transform_name = "count_steps"
        num_skipped: jax.Array
        stats: jaxclip.gradients.ClipStats

    stats = jaxclip.gradients.ClipStats(None, jnp.float32(2), None, None, jnp.int32(1))
    found = jaxclip.clip_stats((optax.EmptyState(), CountingState(jnp.int32(3), stats)))
    assert {key: int(x) for key, x in found.items()} == {
        "count_steps/post_norm": 2,
        "count_steps/num_nonfinite": 1,
        "count_steps/num_skipped": 3,
    }


def test_numbers_of_numpy_states_can_be_read_too():
    state = jax.tree.map(np.asarray, state_after(jaxclip.clip_by_global_norm(1.0)))
    assert float(jaxclip.clip_stats(state)["clip_by_global_norm/pre_norm"]) == 5


@pytest.mark.thorough
def test_explain_names_the_largest_leaf_and_the_first_that_is_not_finite():
    tx = optax.chain(jaxclip.clip_by_global_norm(1.0), jaxclip.clip_by_leaf_norm(0.5))
    params = {"bias": jnp.zeros(1), "kernel": jnp.zeros((2, 2)), "step": jnp.arange(2)}
    good = params | {"bias": jnp.array([3.0]), "kernel": jnp.array([[2.0, 2.0], [2.0, 2.0]])}
    update = jax.jit(tx.update)
    _, state = update(good, tx.init(params))
    first, second = jaxclip.training.explain(state, params)
    assert (first.transform, second.transform) == ("clip_by_global_norm", "clip_by_leaf_norm")
    assert (first.largest_leaf, first.nonfinite_leaf) == ("kernel", None)
    np.testing.assert_allclose(first.fraction, 16 / 25)
    np.testing.assert_allclose(list(first.norms.values()), [3, 4])
    _, state = update(good | {"bias": jnp.array([jnp.inf])}, state)
    first, _ = jaxclip.training.explain(state, params)
    assert (first.largest_leaf, first.nonfinite_leaf) == ("kernel", "bias")
    assert "'bias'" in str(first)


def test_explain_numbers_the_leaves_that_a_mask_hides_the_names_of():
    tx = optax.masked(jaxclip.clip_by_global_norm(1.0), {"w": True, "b": False})
    (report,) = jaxclip.training.explain(state_after(tx), GRADS)
    assert report.norms == {"leaf 0": 3.0}


def test_explain_keeps_the_norms_of_leaves_of_one_joined_name_apart():
    tx = jaxclip.clip_by_global_norm(1.0)
    params = {"a/b": jnp.array([3.0]), "a": {"b": jnp.array([4.0])}}
    (report,) = jaxclip.training.explain(tx.update(params, tx.init(params))[1], params)
    assert report.norms == {"['a']['b']": 4.0, "['a/b']": 3.0}
    assert report.largest_leaf == "['a']['b']"


def test_explain_inside_jit_is_refused():
    state = jaxclip.clip_by_global_norm(1.0).init(GRADS)
    with pytest.raises(TypeError, match="jitted step"):
        jax.jit(lambda s: jaxclip.training.explain(s, GRADS))(state)


@pytest.mark.thorough
def test_telemetry_adds_no_pass_over_the_gradients():
    tx, grads = jaxclip.clip_by_global_norm(1.0), jnp.ones(4099, jnp.float32)

    def silent(g, state):
        return tx.update(g, state)[0]

    def telling(g, state):
        updates, state = tx.update(g, state)
        return updates, state, jaxclip.clip_stats(state)

    state = tx.init(grads)
    programs = [jax.jit(f).lower(grads, state) for f in (silent, telling)]
    passes = re.findall(r"stablehlo.reduce.*tensor<4099xf(?:32|64)>", programs[1].as_text())
    assert len(passes) == 1
    silent_reductions, telling_reductions = (
        p.compile().as_text().count(" reduce(") for p in programs
    )
    assert silent_reductions == telling_reductions > 0


@pytest.mark.parametrize(
    "tx",
    [
        jaxclip.gradients.autoclip(),
        jaxclip.gradients.zclip(),
        jaxclip.gradients.adagc(),
        jaxclip.gradients.clip_spikes(),
        jaxclip.gradients.clip_leaf_spikes(),
        jaxclip.gradients.skip_or_clip(optax.sgd(0.1), max_norm=1.0),
    ],
)
def test_explain_reads_what_learns_too(tx):
    params = {"bias": jnp.zeros(1), "kernel": jnp.zeros((2, 2))}
    good = {"bias": jnp.array([3.0]), "kernel": jnp.full((2, 2), 2.0)}
    _, state = tx.update(good, tx.init(params))
    _, state = tx.update(good | {"bias": jnp.array([jnp.inf])}, state)
    (report,) = jaxclip.training.explain(state, params)
    assert (report.largest_leaf, report.nonfinite_leaf) == ("kernel", "bias")
    np.testing.assert_allclose(list(report.norms.values()), [3, 4], rtol=1e-6)
