"""Majority votes against a NumPy count, on eight devices, and the bytes they move."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxclip.gradients.feedback import error_feedback
from jaxclip.norms import of_trees
from jaxclip.sign.directions import scale_by_lion, scale_by_sign
from jaxclip.sign.kinds import scaled_sign
from jaxclip.sign.voting import MajorityVoteState, majority_vote

NUM_WORKERS = 8


def on_workers(fn: Any, num_workers: int = NUM_WORKERS) -> Any:
    """`fn(replicated, split) -> (replicated, split)` on every worker's part of `split`."""
    mesh = Mesh(np.array(jax.devices()[:num_workers]), ("workers",))

    def local(replicated: Any, split: Any) -> tuple[Any, Any]:
        out, new = fn(replicated, jax.tree.map(lambda x: x[0], split))
        return out, jax.tree.map(lambda x: x[None], new)

    specs = (P(), P("workers"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return jax.jit(mapped)


def vote(tx: Any, directions: Any, state: Any) -> Any:
    """Updates that every worker sees, and the state of the first."""
    updates, states = workers_update(tx, directions, state)
    return updates, jax.tree.map(lambda x: x[0], states)


def under_vmap(tx: Any, directions: Any, state: Any) -> Any:
    return jax.vmap(tx.update, in_axes=(0, None), axis_name="workers")(directions, state)


workers_update = jax.jit(under_vmap, static_argnums=0)


def vote_on_devices(tx: Any, directions: Any, state: Any) -> Any:
    """The same, with every worker on its own device."""

    def local(state: Any, u: Any) -> tuple[Any, Any]:
        updates, state = tx.update(u, state)
        return state, updates

    num_workers = jax.tree.leaves(directions)[0].shape[0]
    state, updates = on_workers(local, num_workers)(state, directions)
    return updates, state


def make_directions(dtype: Any = jnp.float32, num_workers: int = NUM_WORKERS) -> Any:
    shapes = {"kernel": (13, 7), "bias": (5,), "scale": ()}
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal((num_workers, *shape)), dtype)
        for name, shape in shapes.items()
    }


def count(directions: Any) -> np.ndarray:
    """The oracle: the sign of the sum of signs."""
    u = np.asarray(directions, np.float64)
    return np.sign(np.sign(np.nan_to_num(u)).sum(0))


def assert_majority(updates: Any, directions: Any) -> None:
    for name, u in updates.items():
        assert u.dtype == directions[name].dtype
        expected = np.broadcast_to(count(directions[name]), u.shape)
        np.testing.assert_array_equal(np.asarray(u, np.float64), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("num_workers", [1, 2, 5, 8])
@pytest.mark.parametrize("zeros", ["alternate", "abstain"])
def test_every_worker_gets_the_sign_of_the_sum_of_signs(num_workers: int, zeros: Any):
    tx = majority_vote("workers", zeros=zeros)
    directions = make_directions(num_workers=num_workers)
    assert_majority(vote(tx, directions, tx.init(directions))[0], directions)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_directions_vote_too(dtype: Any):
    tx, directions = majority_vote("workers"), make_directions(dtype, 4)
    assert_majority(vote(tx, directions, tx.init(directions))[0], directions)


@pytest.mark.thorough
@pytest.mark.parametrize(("num_workers", "zeros"), [(3, "alternate"), (8, "abstain")])
def test_workers_on_devices_vote_as_workers_under_vmap_do(num_workers: int, zeros: Any):
    tx = majority_vote("workers", zeros=zeros, ties="previous")
    directions = make_directions(num_workers=num_workers)
    state = tx.init(jax.tree.map(lambda x: x[0], directions))
    expected = vote(tx, directions, state)
    actual = vote_on_devices(tx, directions, state)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.thorough
def test_eager_equals_jit():
    tx, directions = majority_vote("workers"), {"w": make_directions(num_workers=4)["bias"]}
    state = tx.init(directions)
    eager, _ = under_vmap(tx, directions, state)
    jax.tree.map(np.testing.assert_array_equal, eager, vote(tx, directions, state)[0])


def test_a_tuple_of_axes_is_one_electorate():
    tx, directions = majority_vote(("hosts", "chips")), make_directions()
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("hosts", "chips"))
    state, spec = tx.init(directions), P(("hosts", "chips"))
    mapped = jax.shard_map(
        lambda u: tx.update(u, state)[0], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    updates = jax.jit(mapped)(directions)
    for name, u in updates.items():
        np.testing.assert_array_equal(u, np.broadcast_to(count(directions[name]), u.shape))


def test_a_single_worker_gets_its_signs_and_sends_nothing():
    tx, u = majority_vote(None), jnp.array([-2.0, 0.0, jnp.nan, jnp.inf])
    np.testing.assert_array_equal(tx.update(u, tx.init(u))[0], [-1, 0, 0, 1])


@pytest.mark.thorough
def test_ties_give_0_or_the_last_majority():
    first = jnp.array([[1.0, -1.0, 1.0], [1.0, -1.0, -1.0]])
    tie = jnp.array([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    for ties, expected in (("zero", [0, 0, 0]), ("previous", [1, -1, 0])):
        tx = majority_vote("workers", ties=ties)
        state = tx.init(first[0])
        updates, state = vote(tx, first, state)
        np.testing.assert_array_equal(updates[0], [1, -1, 0])
        updates, state = vote(tx, tie, state)
        np.testing.assert_array_equal(updates, [expected, expected])
        assert int(state.step) == 2


@pytest.mark.thorough
def test_zeros_of_an_even_electorate_cancel_and_of_an_odd_one_alternate():
    tx = majority_vote("workers")
    for num_workers, expected in ((4, [0, 0, 0, 0]), (3, [1, -1, 1, -1])):
        directions = jnp.zeros((num_workers, 9))
        state, seen = tx.init(directions[0]), []
        for _ in range(4):
            updates, state = vote(tx, directions, state)
            assert len(np.unique(updates)) == 1
            seen.append(int(updates[0, 0]))
        assert seen == expected


def test_who_abstains_does_not_count():
    directions = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, jnp.nan], [0.0, 0.0, -1.0, -1.0]])
    tx = majority_vote("workers", zeros="abstain")
    updates, _ = vote(tx, directions, tx.init(directions[0]))
    np.testing.assert_array_equal(updates[0], [0, 1, 0, -1])


@pytest.mark.thorough
def test_a_bad_entry_is_counted_by_its_worker_and_stays_out():
    tx, directions = majority_vote("workers"), jnp.ones((4, 3)).at[2, 1].set(jnp.nan)
    mapped = jax.vmap(lambda u: tx.update(u, tx.init(u)), axis_name="workers")
    updates, state = mapped(directions)
    assert isinstance(state, MajorityVoteState)
    np.testing.assert_array_equal(updates, np.ones((4, 3)))
    np.testing.assert_array_equal(state.num_nonfinite, [0, 0, 1, 0])


@pytest.mark.thorough
def test_other_leaves_pass_through_and_complex_ones_are_refused():
    tx = majority_vote("workers", ties="previous")
    u = {"w": jnp.ones((2, 3)), "n": jnp.arange(6).reshape(2, 3), "none": None}
    state = tx.init({"w": u["w"][0], "n": u["n"][0], "none": None})
    updates, state = vote(tx, u, state)
    np.testing.assert_array_equal(updates["n"], u["n"])
    assert updates["none"] is None
    with pytest.raises(TypeError, match="layer/kernel"):
        tx.update(
            {"layer": {"kernel": jnp.ones(2, jnp.complex64)}},
            state._replace(previous={"layer": {"kernel": jnp.zeros(2, jnp.int8)}}),
        )
    for bad in ({"ties": "coin"}, {"zeros": "plus"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            majority_vote("workers", **bad)


# --- Composition ------------------------------------------------------------------------


def train(tx: Any, num_steps: int, num_workers: int) -> tuple[Any, Any]:
    """Replicated parameters and per-worker states of a small regression."""
    key = jax.random.key(0)
    truth = jax.random.normal(key, (6,))
    x = jax.random.normal(jax.random.key(1), (num_workers, 16, 6))
    params = {"w": jnp.zeros(6)}
    state = jax.vmap(lambda _: tx.init(params))(jnp.arange(num_workers))

    def step(params: Any, local: Any) -> tuple[Any, Any]:
        state, x = local
        grads = jax.grad(lambda p: jnp.mean((x @ (p["w"] - truth)) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), (state, x)

    mapped, losses = on_workers(step, num_workers), []
    for _ in range(num_steps):
        losses.append(float(of_trees.global_norm(params["w"] - truth)))
        params, (state, x) = mapped(params, (state, x))
    return losses, state


@pytest.mark.thorough
def test_distributed_lion_with_a_momentum_per_worker_trains():
    step_size = optax.linear_schedule(0.06, 0.0, 100)
    descend = optax.scale_by_learning_rate(step_size)
    tx = optax.chain(scale_by_lion(b2=0.9), majority_vote("workers"), descend)
    losses, state = train(tx, 100, NUM_WORKERS)
    assert losses[-1] < 0.1 * losses[0]
    mu = state[0].mu["w"]
    assert mu.shape == (NUM_WORKERS, 6)
    assert not np.array_equal(mu[0], mu[1])


@pytest.mark.thorough
def test_the_vote_of_workers_with_equal_data_is_lion():
    params, g = jnp.zeros(11), jax.random.normal(jax.random.key(5), (3, 11))
    alone = scale_by_lion()
    tx = optax.chain(scale_by_lion(), majority_vote("workers"))
    state, state_alone = tx.init(params), alone.init(params)
    for i in range(3):
        expected, state_alone = alone.update(g[i], state_alone)
        updates, state = vote(tx, jnp.broadcast_to(g[i], (4, 11)), state)
        np.testing.assert_array_equal(updates[3], expected)


@pytest.mark.thorough
def test_error_feedback_of_each_worker_composes():
    compress = error_feedback(scale_by_sign(scaled_sign("mean_abs")))
    tx = optax.chain(compress, majority_vote("workers"))
    directions = jax.random.normal(jax.random.key(6), (4, 33))
    state = jax.vmap(tx.init)(directions)
    update = jax.jit(jax.vmap(tx.update, axis_name="workers"))
    residual = np.zeros((4, 33))
    for _ in range(3):
        updates, state = update(directions, state)
        corrected = np.asarray(directions, np.float64) + residual
        np.testing.assert_array_equal(updates, np.broadcast_to(count(corrected), (4, 33)))
        size = np.abs(corrected).mean(1, keepdims=True)
        residual = corrected - size * np.sign(corrected)
        np.testing.assert_allclose(state[0].inner_state.residual, residual, atol=1e-5)


# --- Bytes on the wire ------------------------------------------------------------------

_BYTES = {"pred": 1, "u8": 1, "s8": 1, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter)(?:-start)?\(")


def collective_bytes(compiled: Any) -> dict[str, int]:
    """Bytes of the results of the collectives of a compiled program, on one device."""
    total: dict[str, int] = {}
    for shape, name in _COLLECTIVE.findall(compiled.as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
            size = math.prod(int(d) for d in dims.split(",") if d)
            total[name] = total.get(name, 0) + size * _BYTES[dtype]
    return total


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("num_workers", "zeros", "bits"),
    [(8, "alternate", 3), (8, "abstain", 4), (7, "alternate", 2), (7, "abstain", 4)],
)
def test_a_vote_moves_a_few_bits_a_coordinate(num_workers: int, zeros: Any, bits: int):
    size = 8 * 7 * 1000
    tx, g = majority_vote("workers", zeros=zeros), jnp.ones((num_workers, size), jnp.float32)
    state = tx.init(g[0])

    def voted(state: Any, g: Any) -> tuple[Any, Any]:
        updates, state = tx.update(g, state)
        return updates, state

    def averaged(state: Any, g: Any) -> tuple[Any, Any]:
        return jax.lax.pmean(g, "workers"), g

    vote_bytes = collective_bytes(on_workers(voted, num_workers).lower(state, g).compile())
    mean_bytes = collective_bytes(on_workers(averaged, num_workers).lower(state, g).compile())
    assert mean_bytes == {"all-reduce": 4 * size}
    assert set(vote_bytes) == {"all-to-all", "all-gather"}
    assert sum(vote_bytes.values()) == size * bits // 8
