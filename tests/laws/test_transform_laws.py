"""One table of transforms, and the laws of how they are built, wrapped and placed.

What goes in and what comes out is drawn: `test_invariants.py`, `test_invariants_of_steps.py`.

A new transform gets a row in `TRANSFORMS`; `test_every_public_transform_has_a_row` fails
until it has one.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxclip
from oracles.compilations import counted


@dataclasses.dataclass(frozen=True)
class Row:
    """A transform, and the hyper-parameter of it that is swept, traced and scheduled."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    parameter: str | None = None
    value: float = 0.5
    takes_schedule: bool = True

    def make(self, value: Any = None) -> optax.GradientTransformationExtraArgs:
        if self.parameter is None:
            return self.factory()
        return self.factory(**{self.parameter: self.value if value is None else value})


# A wrapper is tried around one transform; its row bears the wrapper's name.


def cautious(learning_rate):
    return jaxclip.sign.cautious(jaxclip.lion(learning_rate))


def frank_wolfe(learning_rate):
    return jaxclip.sign.frank_wolfe(learning_rate, 0.5)


def skip_nonfinite():
    return jaxclip.skip_nonfinite(jaxclip.lion(0.1))


def skip_or_clip(max_norm):
    return jaxclip.gradients.skip_or_clip(optax.identity(), jnp.inf, max_norm)


def error_feedback(max_residual):
    return jaxclip.gradients.error_feedback(jaxclip.scale_by_sign(), max_residual=max_residual)


def project_on_box(threshold):
    return jaxclip.project_weights(jaxclip.box(threshold))


def project_on_norm(threshold):
    return jaxclip.project_weights(jaxclip.weights.max_norm(threshold))


def keep_on_grid():
    return jaxclip.keep_on_grid(jaxclip.lion(0.1), 1)


def keep_on_grid_that_learns_scales():
    return jaxclip.keep_on_grid(jaxclip.lion(0.1), 1, learn_scales=jaxclip.lion(0.01))


def low_bit_momentum(b1):
    return jaxclip.lowbit.low_bit_momentum(jaxclip.lion(0.1, b1), min_size=1)


def low_bit_momentum_of_4_bits():
    return jaxclip.lowbit.low_bit_momentum(jaxclip.lion(0.1), 4, min_size=1)


def keep_sparse(density):
    return jaxclip.sparsity.keep_sparse(jaxclip.lion(0.1), density, grow=0.25)


def majority_vote():
    return jaxclip.sign.majority_vote(None, ties="previous")  # of one worker


TRANSFORMS = [
    Row(jaxclip.clip_by_value, "max_abs"),
    Row(jaxclip.clip_by_global_norm, "max_norm"),
    Row(jaxclip.clip_by_leaf_norm, "max_norm"),
    Row(jaxclip.clip_by_block_rms, "threshold"),
    Row(jaxclip.adaptive_grad_clip, "clipping"),
    Row(jaxclip.gradients.clip_update_relative, "relative", takes_schedule=False),
    Row(jaxclip.gradients.clip_by_spectral_norm, "max_norm", 4.0),
    Row(jaxclip.gradients.smooth_clip, "scale"),
    Row(jaxclip.scale_by_sign),
    Row(jaxclip.scale_by_signum, "beta", 0.9, takes_schedule=False),
    Row(jaxclip.scale_by_lion, "b1", 0.9, takes_schedule=False),
    Row(jaxclip.sign_sgd, "learning_rate", 0.01),
    Row(jaxclip.signum, "learning_rate", 0.01),
    Row(jaxclip.lion, "learning_rate", 0.01),
    Row(frank_wolfe, "learning_rate", 0.01),
    Row(project_on_box, "threshold"),
    Row(project_on_norm, "threshold"),
    Row(jaxclip.gradients.autoclip, "quantile", 0.5, takes_schedule=False),
    Row(jaxclip.gradients.zclip, "z", 2.5, takes_schedule=False),
    Row(jaxclip.gradients.adagc, "max_norm", 1.0),
    Row(jaxclip.gradients.clip_spikes, "theta", 4.0, takes_schedule=False),
    Row(jaxclip.gradients.clip_leaf_spikes, "decay", 0.9, takes_schedule=False),
    Row(cautious, "learning_rate", 0.01),
    Row(jaxclip.training.average_weights, "decay", 0.9, takes_schedule=False),
    Row(jaxclip.sign.cautious_decay, "weight_decay", 0.1),
    Row(majority_vote),
    Row(keep_on_grid),
    Row(keep_on_grid_that_learns_scales),
    Row(low_bit_momentum, "b1", 0.9, takes_schedule=False),
    Row(low_bit_momentum_of_4_bits),
    Row(keep_sparse, "density", takes_schedule=False),
    Row(jaxclip.sparsity.soft_threshold, "threshold"),
    Row(skip_nonfinite),
    Row(skip_or_clip, "max_norm"),
    Row(error_feedback, "max_residual", takes_schedule=False),
]
every_transform = pytest.mark.parametrize("row", TRANSFORMS, ids=lambda r: r.factory.__name__)
with_parameter = pytest.mark.parametrize(
    "row", [r for r in TRANSFORMS if r.parameter], ids=lambda r: r.factory.__name__
)
with_schedule = pytest.mark.parametrize(
    "row",
    [r for r in TRANSFORMS if r.parameter and r.takes_schedule],
    ids=lambda r: r.factory.__name__,
)


def make_params(dtype: Any = jnp.float32) -> Any:
    k = jax.random.split(jax.random.key(1), 2)
    return {
        "dense": {
            "kernel": (0.3 * jax.random.normal(k[0], (16, 8), jnp.float32)).astype(dtype),
            "bias": (0.3 * jax.random.normal(k[1], (8,), jnp.float32)).astype(dtype),
        },
        "scale": jnp.asarray(0.25, dtype),
    }


def make_grads(params: Any, seed: int = 2) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    grads = [
        jax.random.normal(k, p.shape, jnp.float32).astype(p.dtype)
        for k, p in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, grads)


def run(tx: Any, params: Any, num_steps: int = 3, update: Any = None) -> tuple[Any, Any]:
    """Updates of the last of a few steps, and the state after them."""
    update = tx.update if update is None else update
    state = tx.init(params)
    for i in range(num_steps):
        updates, state = update(make_grads(params, i), state, params)
    return updates, state


def floating_pairs(actual: Any, expected: Any) -> list[tuple[Any, Any]]:
    """The floating leaves of trees of one structure and dtypes, whose other leaves are equal."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = []
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        if jnp.issubdtype(a.dtype, jnp.inexact):
            pairs.append((a, e))
        else:
            np.testing.assert_array_equal(a, e)
    return pairs


def assert_close(actual: Any, expected: Any, ulps: int = 4) -> None:
    """Equal trees, to a few units in the last place of the largest entry of each leaf."""
    for a, e in floating_pairs(actual, expected):
        a, e, eps = np.asarray(a, np.float64), np.asarray(e, np.float64), jnp.finfo(a.dtype).eps
        np.testing.assert_allclose(
            a, e, atol=ulps * float(eps) * max(np.abs(e).max(initial=0), 1e-30)
        )


def signature(tree: Any) -> list[tuple]:
    """Structure, shape, dtype and weak type of every leaf."""
    leaves = [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)]
    return [str(jax.tree.structure(tree)), *leaves]


# Several rows of one transform, and how it is called.
ROWS_OF = {
    "project_on_box": "project_weights",
    "project_on_norm": "project_weights",
    "keep_on_grid_that_learns_scales": "keep_on_grid",
    "low_bit_momentum_of_4_bits": "low_bit_momentum",
}


def test_every_public_transform_has_a_row():
    made = {ROWS_OF.get(r.factory.__name__, r.factory.__name__) for r in TRANSFORMS}
    wings = (jaxclip.gradients, jaxclip.lowbit, jaxclip.sign, jaxclip.sparsity)
    wings += (jaxclip.training, jaxclip.weights)
    functions = {name: fn for wing in wings for name, fn in vars(wing).items()}
    transforms = {
        name
        for name, fn in functions.items()
        if inspect.isfunction(fn)
        and inspect.signature(fn).return_annotation is optax.GradientTransformationExtraArgs
    }
    assert transforms == made


@every_transform
def test_init_needs_only_shapes(row: Row):
    tx, params = row.make(), make_params()
    shapes = jax.eval_shape(lambda: params)
    assert signature(tx.init(shapes)) == signature(tx.init(params))
    assert signature(jax.eval_shape(tx.init, params)) == signature(tx.init(params))


@pytest.mark.thorough
@every_transform
def test_an_equal_transform_compiles_nothing_outside_of_jit_either(row: Row):
    params = make_params()

    def take_step():
        tx = row.make()
        tx.update(make_grads(params, 0), tx.init(params), params)

    take_step()
    with counted() as compiled:
        take_step()
    # `keep_on_grid` makes functions of its own; a second step with it compiles nothing.
    if row.factory not in (keep_on_grid, keep_on_grid_that_learns_scales):
        assert not compiled


@pytest.mark.parametrize("factory", [keep_on_grid, keep_on_grid_that_learns_scales])
def test_a_second_step_of_keep_on_grid_compiles_nothing_outside_of_jit(factory):
    params, tx = make_params(), factory()
    _, state = tx.update(make_grads(params, 0), tx.init(params), params)
    with counted() as compiled:
        tx.update(make_grads(params, 1), state, params)
    assert not compiled


@pytest.mark.thorough
@every_transform
def test_one_program_with_its_state_donated_serves_every_hyper_parameter(row: Row):
    # XLA refuses a buffer that is given twice, so no two fields may be the same array.
    params, traces = make_params(), []

    @functools.partial(jax.jit, donate_argnums=2)
    def update(value: jax.Array, grads: Any, state: Any) -> Any:
        traces.append(1)
        return row.make(value).update(grads, state, params)

    state = row.make().init(params)
    for i, value in enumerate([row.value, row.value / 2, 0.0, np.inf, -1.0, np.nan, row.value]):
        updates, state = update(jnp.float32(value), make_grads(params, i), state)
        for x in jax.tree.leaves((updates, state)):
            assert np.isfinite(np.asarray(x, np.float64)).all()
    assert len(traces) == 1


@with_parameter
def test_inject_hyperparams_keeps_the_dtype(row: Row):
    params = make_params(jnp.float64 if jax.config.jax_enable_x64 else jnp.bfloat16)
    tx = optax.inject_hyperparams(row.factory, hyperparam_dtype=jnp.float32)(
        **{row.parameter: row.value}
    )
    updates, _ = jax.eval_shape(tx.update, make_grads(params), tx.init(params), params)
    assert signature(updates) == signature(make_grads(params))


@pytest.mark.thorough
@with_parameter
def test_inject_hyperparams_under_jit_changes_no_update(row: Row):
    params = make_params(jnp.float64 if jax.config.jax_enable_x64 else jnp.bfloat16)
    tx = optax.inject_hyperparams(row.factory, hyperparam_dtype=jnp.float32)(
        **{row.parameter: row.value}
    )
    updates, state = run(tx, params)
    assert signature(updates) == signature(make_grads(params))
    assert_close(updates, run(row.make(), params)[0])
    stats = jaxclip.clip_stats(state)
    assert set(stats) == set(jaxclip.clip_stats(row.make().init(params)))


@pytest.mark.thorough
@with_schedule
def test_a_schedule_equals_the_values_it_takes(row: Row):
    params = make_params()
    pair = (
        row.make(lambda step: row.value * jnp.exp2(-step.astype(jnp.float32))),
        row.make(row.value / 4),
    )
    states = [tx.init(params) for tx in pair]

    @jax.jit
    def update(grads: Any, states: Any) -> Any:
        steps = [tx.update(grads, s, params) for tx, s in zip(pair, states, strict=True)]
        return tuple(zip(*steps, strict=True))

    for i in range(3):
        (scheduled, constant), states = update(make_grads(params, i), states)
    assert_close(scheduled, constant)


@pytest.mark.thorough
@with_schedule
def test_a_schedule_that_goes_wrong_poisons_nothing(row: Row):
    params = make_params()
    values = jnp.asarray([row.value, 0.0, np.inf, -1.0, np.nan, row.value], jnp.float32)
    tx = row.make(lambda step: values[jnp.minimum(step, 5)])
    updates, state = run(tx, params, num_steps=6, update=jax.jit(tx.update))
    for x in jax.tree.leaves((updates, state)):
        assert np.isfinite(np.asarray(x, np.float64)).all()


@every_transform
def test_leaves_that_are_not_floating_pass_through(row: Row):
    params = {
        "w": jnp.ones((2, 2)),
        "none": None,
        "masked": optax.MaskedNode(),
        "step": jnp.arange(3),
        "flag": jnp.array(True),
        "key": jax.random.key(3),
        "float0": np.zeros((2,), jax.dtypes.float0),
    }
    tx = row.make()

    @jax.jit
    def update(g: jax.Array) -> Any:
        grads, alone = params | {"w": g}, {"w": params["w"]}
        updates, state = tx.update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        for name in ("step", "flag", "key", "float0"):
            assert updates[name] is grads[name]
        expected, expected_state = tx.update({"w": g}, tx.init(alone), alone)
        stats = jaxclip.clip_stats(state), jaxclip.clip_stats(expected_state)
        return (updates["w"], expected["w"]), stats

    updates, stats = update(jnp.full((2, 2), 3.0))
    assert_close(*updates)
    assert stats[0] == stats[1]


@pytest.mark.thorough
@every_transform
def test_empty_trees_and_odd_shapes_work(row: Row):
    tx, trees = row.make(), [{}, (jnp.zeros((0, 3)), None), {"a": jnp.asarray(1.0)}]
    states = [tx.init(params) for params in trees]

    @jax.jit
    def update(grads: Any, states: Any) -> Any:
        steps = [tx.update(*pair, p) for *pair, p in zip(grads, states, trees, strict=True)]
        return tuple(zip(*steps, strict=True))

    for i in range(3):
        updates, states = update([make_grads(params, i) for params in trees], states)
    for x in jax.tree.leaves(states):
        assert np.isfinite(np.asarray(x, np.float64)).all()
    assert jax.tree.structure(list(updates)) == jax.tree.structure(trees)


@every_transform
@pytest.mark.parametrize("leaf", [0.5, np.float64(0.5), np.full((3,), 0.5)])
def test_python_and_numpy_leaves_are_accepted(row: Row, leaf: Any):
    tx, params = row.make(), {"w": leaf}
    updates = jax.eval_shape(lambda: tx.update({"w": leaf}, tx.init(params), params)[0])
    assert updates["w"].shape == np.shape(leaf)
    assert updates["w"].dtype == jnp.asarray(leaf).dtype


@every_transform
def test_extra_arguments_are_accepted(row: Row):
    tx, params = row.make(), make_params()

    def traced(**extra_args: Any) -> str:
        update = functools.partial(tx.update, **extra_args)
        jaxpr = jax.make_jaxpr(update)(make_grads(params), tx.init(params), params)
        return re.sub(r"0x[0-9a-f]+", "", str(jaxpr))

    assert traced(value=1.0, step=3) == traced()


@pytest.mark.thorough
@every_transform
def test_partition_masks_and_named_chains_of_optax_work_under_jit(row: Row):
    params = make_params()
    labels = {"dense": {"kernel": "a", "bias": "b"}, "scale": "a"}  # partition masks each group
    parts = optax.partition({"a": row.make(), "b": optax.identity()}, labels)
    tx = optax.named_chain(("only", parts), ("then", optax.identity()))
    updates, state = run(tx, params, update=jax.jit(tx.update))
    assert signature(updates) == signature(make_grads(params))
    np.testing.assert_array_equal(updates["dense"]["bias"], make_grads(params, 2)["dense"]["bias"])
    assert set(jaxclip.clip_stats(state)) == set(jaxclip.clip_stats(row.make().init(params)))


@pytest.mark.thorough
@every_transform
def test_multi_steps_of_optax_works_under_jit(row: Row):
    tx, params = optax.MultiSteps(row.make(), 2), make_params()
    with jax.numpy_dtype_promotion("standard"):  # it divides floats by integers
        updates, state = run(tx, params, num_steps=4, update=jax.jit(tx.update))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert set(jaxclip.clip_stats(state)) == set(jaxclip.clip_stats(row.make().init(params)))


@pytest.mark.thorough
@every_transform
def test_paths_of_init_and_update_may_differ_by_nnx_value(row: Row):
    from flax import nnx

    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, row.make(), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4), jnp.float32)) ** 2))(model)
    optimizer.update(model, grads)
    assert np.isfinite(np.asarray(model.kernel[...])).all()


@pytest.mark.thorough
@every_transform
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_eight_devices_equal_one_and_sharding_is_kept(row: Row, kind: AxisType):
    tx, params = row.make(), make_params()
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",), axis_types=(kind,))

    def shard(path: tuple, leaf: jax.Array) -> jax.Array:
        spec = PartitionSpec("x") if leaf.ndim else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    place = functools.partial(jax.tree_util.tree_map_with_path, shard)
    one = run(tx, params)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        sharded, state = place(params), None
        update = jax.jit(tx.update)
        state = tx.init(sharded)
        for i in range(3):
            updates, state = update(place(make_grads(params, i)), state, sharded)
    assert_close(jax.device_get(updates), jax.device_get(one[0]), ulps=8)
    split = sharded["dense"]["kernel"].sharding
    for leaf in jax.tree.leaves((updates, state)):
        if leaf.shape == params["dense"]["kernel"].shape:
            assert leaf.sharding.is_equivalent_to(split, leaf.ndim)
