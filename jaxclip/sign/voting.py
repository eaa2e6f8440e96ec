"""Majority vote of workers on a direction, with one bit per coordinate and worker.

Every worker has its own direction, from its own part of the batch and, with Lion, its own
momentum. Only signs are sent, packed 8 to a byte:

    all-to-all    worker j gets all workers' bits for the j-th part of the coordinates,
                  and counts the majority there;
    all-gather    every worker gets the majorities of all parts.

A coordinate costs each worker 1 bit out and 1 or 2 bits back, whatever the number of
workers. An all-reduce of float32 moves 32 bits each way.
"""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import has_nonfinite, increment, keep_weak_type
from jaxclip._core.trees import PyTree, is_clippable, map_clippable, path_name

_AxisName: TypeAlias = str | tuple[str, ...]


class MajorityVoteState(NamedTuple):
    """State of `majority_vote`.

    Attributes:
      step: Scalar int32, steps so far.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in this worker's
        direction; the only field that differs between workers.
      previous: With `ties="previous"` the last majority as a tree of int8 like the
        parameters, else an empty tuple.
    """

    transform_name = "majority_vote"

    step: jax.Array
    num_nonfinite: jax.Array
    previous: PyTree = ()


def majority_vote(
    axis_name: _AxisName | None,
    *,
    ties: Literal["zero", "previous"] = "zero",
    zeros: Literal["alternate", "abstain"] = "alternate",
) -> optax.GradientTransformationExtraArgs:
    """Replaces each worker's direction by the sign on which most workers agree.

    `update = sign(sum over workers of sign(u))`, the same on every worker. For use inside
    `shard_map`, `pmap` or `vmap` over `axis_name`, on updates that each worker computed
    from its own batch, before any mean over workers:

        chain(scale_by_lion(), majority_vote("workers"), optax.scale(-1e-3))

    Each worker then has its own momentum (Distributed Lion): give the optimizer state a
    leading axis of workers, sharded over `axis_name`. Parameters stay replicated. Under
    `shard_map` pass `check_vma=False`: JAX cannot see that an all-gather gives every worker
    the same result. With the check on, `jax.grad` of replicated parameters sums over the
    workers by itself, and no vote is left to take. For error feedback, wrap each worker's
    compressor, `error_feedback(scale_by_sign(scaled_sign()))`, and chain the vote after it.

    Args:
      axis_name: Mapped axis (or tuple of axes) of the workers. None for a single worker:
        its sign, nothing sent.
      ties: The result of an even split. "zero": no step. "previous": the last majority of
        that coordinate (0 if there was none), kept in the state.
      zeros: The vote of a worker with a 0 (or NaN), because a bit has no third value.
        "alternate": 1 for one half of the workers and -1 for the other; the sides change
        every step. A coordinate that is 0 on all workers then gets 0 if their number is
        even, and 1 and -1 alternately if it is odd. "abstain": no vote, which takes a second
        bit on the way out; a coordinate that is 0 on all workers stays 0.

    Returns:
      A transform with values in {-1, 0, 1}; shapes, dtypes and weak types of the updates
      are kept. Leaves that are not floating pass through.

    Raises:
      TypeError: If a leaf is complex.
      ValueError: If `ties` or `zeros` is not one of the two.

    Example:
      >>> tx = majority_vote("workers")
      >>> directions = jnp.array([[2.0, -1.0], [3.0, -1.0], [-9.0, 0.1]])
      >>> state = tx.init(directions[0])
      >>> jax.vmap(lambda u: tx.update(u, state)[0], axis_name="workers")(directions)
      Array([[ 1., -1.],
             [ 1., -1.],
             [ 1., -1.]], dtype=float32)

    References:
      Bernstein et al., signSGD with Majority Vote is Communication Efficient and Fault
      Tolerant, 2018, https://arxiv.org/abs/1810.05291
      Liu et al., Communication Efficient Distributed Training with Distributed Lion, 2024,
      https://arxiv.org/abs/2404.00438
    """
    checks.check_choice("ties", ties, ("zero", "previous"))
    checks.check_choice("zeros", zeros, ("alternate", "abstain"))
    keeps_previous = ties == "previous"

    def init_fn(params):
        return MajorityVoteState(
            step=jnp.zeros((), jnp.int32),
            num_nonfinite=jnp.zeros((), jnp.int32),
            previous=jax.tree.map(_no_vote_yet, params) if keeps_previous else (),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        if keeps_previous:
            checks.check_same_structure("updates", updates, "previous votes", state.previous)
        directions = _real_leaves(updates)
        signs = iter(_elect(directions, axis_name, zeros == "abstain", state.step))
        votes = jax.tree.map(lambda u: next(signs) if is_clippable(u) else jnp.int8(0), updates)
        if keeps_previous:
            votes = jax.tree.map(lambda v, old: jnp.where(v == 0, old, v), votes, state.previous)
        result = map_clippable(lambda u, v: keep_weak_type(v.astype(u.dtype), u), updates, votes)
        return result, MajorityVoteState(
            step=increment(state.step),
            num_nonfinite=increment(state.num_nonfinite, has_nonfinite(directions)),
            previous=votes if keeps_previous else (),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _no_vote_yet(p: ArrayLike) -> jax.Array:
    if not is_clippable(p):
        return jnp.zeros((), jnp.int8)
    return jnp.zeros_like(p, dtype=jnp.int8)


def _real_leaves(updates: optax.Updates) -> list[jax.Array]:
    """Returns the floating leaves; raises TypeError if one is complex."""
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        if not is_clippable(leaf):
            continue
        leaf = jnp.asarray(leaf)
        if jnp.iscomplexobj(leaf):
            name = path_name(path)
            raise TypeError(f"majority_vote needs real updates; {name!r} is {leaf.dtype}.")
        leaves.append(leaf)
    return leaves


def _elect(
    leaves: list[jax.Array], axis_name: _AxisName | None, can_abstain: bool, step: jax.Array
) -> list[jax.Array]:
    """Returns the majority of every entry, in int8: 0 where the votes are split evenly."""
    size = sum(x.size for x in leaves)
    if axis_name is None or size == 0:
        return [(x > 0).astype(jnp.int8) - (x < 0).astype(jnp.int8) for x in leaves]
    num_workers = int(lax.psum(1, axis_name))
    # Zeros vote alternately: by worker, so that they cancel now, and by step.
    zero_is_up = (lax.axis_index(axis_name) + step) % 2 == 0

    def flat(bits_of_leaves: list[jax.Array]) -> jax.Array:
        bits = jnp.concatenate([bits.reshape(-1) for bits in bits_of_leaves])
        return jnp.pad(bits, (0, -size % (8 * num_workers))).reshape(num_workers, -1)

    planes = [flat([(x > 0) | (~(x < 0) & zero_is_up) for x in leaves])]
    if can_abstain:
        planes.append(flat([(x > 0) | (x < 0) for x in leaves]))
    majority = _exchange(jnp.stack(planes), axis_name, num_workers)

    elected, start = [], 0
    for x in leaves:
        elected.append(majority[start : start + x.size].reshape(x.shape))
        start += x.size
    return elected


def _exchange(planes: jax.Array, axis_name: _AxisName, num_workers: int) -> jax.Array:
    """Sends bits to the workers that count them, and returns the majorities as a flat array."""
    # planes[0, j]: True where this worker votes 1 on the entries that worker j counts;
    # planes[1, j], if there is one: True where it votes at all.
    sent = jnp.packbits(planes, axis=2)
    received = jnp.unpackbits(lax.all_to_all(sent, axis_name, 1, 1, tiled=True), axis=2)
    num_up = jnp.sum(jnp.prod(received, axis=0, dtype=jnp.uint8), axis=0, dtype=jnp.int32)
    num_votes = jnp.sum(received[-1], axis=0, dtype=jnp.int32)
    all_vote = planes.shape[0] == 1
    if all_vote:
        num_votes = jnp.full_like(num_up, num_workers)
    can_tie = not all_vote or num_workers % 2 == 0
    results = [2 * num_up > num_votes] + ([2 * num_up < num_votes] if can_tie else [])
    packed = jnp.packbits(jnp.stack(results), axis=1)
    gathered = lax.all_gather(packed, axis_name, axis=1, tiled=True)
    bits = jnp.unpackbits(gathered, axis=1).astype(jnp.int8)
    return bits[0] - bits[1] if can_tie else 2 * bits[0] - 1
