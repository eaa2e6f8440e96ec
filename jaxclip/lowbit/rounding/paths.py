"""The cheapest path through a trellis: codes for entries, by the algorithm of Viterbi.

    minimize  sum (x - level)**2 + price * bits(state mod 2, |code|)      x in steps

All entries of a chain are decided together. A table has the bits of the codes, from a model of the
source, or as measured on the codes of the round before.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip.lowbit.coding.trellis import NEXT_STATES, check_num_states, levels_of, odd_states

_UNREACHABLE = np.float32(1e30)
_NEVER = np.float32(40)  # bits of a code that does not occur
_BLOCK = 2**20  # entries in memory at a time, about 30 bytes each


def cheapest_path(
    x: ArrayLike,
    lengths: ArrayLike,
    *,
    price: ArrayLike = 0.4,
    weights: ArrayLike | None = None,
    num_states: int = 8,
) -> jax.Array:
    """Returns the codes of the path with the least error and price of bits.

    `sum(weights * (x - levels)**2) + price * sum(bits)` is the least among all paths whose codes
    are, for each entry and parity, the nearest in their grid or the next towards 0.

    Args:
      x: Finite entries in units of the step, float32; chains run along the last axis.
      lengths: Bits of codes, sign included, by magnitude: of shape (2, largest code + 1), for even
        and odd states. Larger codes are not used. With the first axes of `x` in front, (..., 2,
        largest code + 1), each chain has its own.
      price: Squared steps that a bit is worth; at least 0. May be traced.
      weights: Factors of the squared errors, broadcast to `x`; None for 1.
      num_states: 4 or 8.

    Returns:
      Codes in the shape of `x`: int8 if the largest code is at most 127, else int32.
    """
    check_num_states(num_states)
    checks.check_nonnegative("price", price)
    x = jnp.asarray(x, jnp.float32)
    lengths = jnp.asarray(lengths, jnp.float32)
    weights = jnp.asarray(1.0 if weights is None else weights, jnp.float32)
    if lengths.ndim < 2 or lengths.shape[-2] != 2 or lengths.shape[-1] < 2:
        raise ValueError(f"lengths must have shape (..., 2, 2 or more), got {lengths.shape}.")
    return _cheapest_path(x, lengths, jnp.asarray(price, jnp.float32), weights, num_states)


@functools.partial(jax.jit, static_argnames="num_states")
def _cheapest_path(
    x: jax.Array, lengths: jax.Array, price: jax.Array, weights: jax.Array, num_states: int
) -> jax.Array:
    num_chains, length = int(np.prod(x.shape[:-1])), x.shape[-1]
    dtype = jnp.int8 if lengths.shape[-1] <= 128 else jnp.int32
    if not x.size:
        return jnp.zeros(x.shape, dtype)
    # Blocks of chains bound the memory.
    block = min(max(_BLOCK // length, 1), num_chains)
    num_blocks = -(-num_chains // block)

    def in_blocks(array: jax.Array) -> jax.Array:
        flat = array.reshape(num_chains, *array.shape[x.ndim - 1 :])
        padding = [(0, num_blocks * block - num_chains)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(num_blocks, block, *flat.shape[1:])

    parts = {"x": in_blocks(x)}
    if weights.ndim:
        parts["weights"] = in_blocks(jnp.broadcast_to(weights, x.shape))
    if lengths.ndim > 2:
        parts["lengths"] = in_blocks(lengths)

    def path_of_block(part: dict[str, jax.Array]) -> jax.Array:
        whole = {"lengths": lengths, "weights": weights} | part
        costs, codes = _candidates(**whole, price=price)
        return _best_candidates(costs, codes.astype(dtype), num_states)

    codes = lax.map(path_of_block, parts).reshape(-1, length)[:num_chains].reshape(x.shape)
    return jnp.where(x < 0, -codes, codes)


def cheapest_levels(
    x: jax.Array, lengths: jax.Array, price: jax.Array, is_entry: jax.Array, num_states: int = 8
) -> jax.Array:
    """Returns the levels of the codes of `cheapest_path`, float32; for use inside a program.

    Entries at the end of chains that are padding are not `is_entry`.
    """
    costs, codes = _candidates(x, lengths, jnp.ones(()), price)
    costs = jnp.where(is_entry, costs, 0)  # no state is a worse end than another
    is_odd = jnp.array([0.0, 0.0, 1.0, 1.0])[:, None, None]
    levels = _best_candidates(costs, 2 * codes - is_odd * jnp.minimum(codes, 1), num_states)
    return jnp.where(x < 0, -levels, levels)


def _candidates(
    x: jax.Array, lengths: jax.Array, weights: jax.Array, price: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns cost and magnitude of the best code: (state modulo 2 and parity, chain, entry)."""
    size, largest = jnp.abs(x), lengths.shape[-1] - 1
    costs, codes = [], []
    for is_odd in (0, 1):
        table = lengths[..., is_odd, :]

        def cost(code: jax.Array, is_odd: int = is_odd, table: jax.Array = table) -> jax.Array:
            level = 2 * code - is_odd * jnp.minimum(code, 1)
            place = code.astype(jnp.int32)
            bits = table[place] if table.ndim == 1 else jnp.take_along_axis(table, place, axis=-1)
            return weights * jnp.square(size - level) + price * bits

        for parity in (0, 1):
            # In an odd state the nearest may be 0 where this rule has 2: it is the other candidate.
            nearest = 2 * jnp.round(((size + is_odd) / 2 - parity) / 2) + parity
            nearest = jnp.clip(nearest, parity, largest - (largest - parity) % 2)
            smaller = jnp.maximum(nearest - 2, parity)
            cost_nearest, cost_smaller = cost(nearest), cost(smaller)
            costs.append(jnp.minimum(cost_nearest, cost_smaller))
            codes.append(jnp.where(cost_smaller < cost_nearest, smaller, nearest))
    return jnp.stack(costs), jnp.stack(codes)


# Compiled, because single operations take longer to compile, one after the other.
@functools.partial(jax.jit, static_argnames=("num_codes", "shape", "has_odd_zero"))
def model_lengths(
    deviation: ArrayLike, num_codes: int, *, shape: float = 2.0, has_odd_zero: bool = False
) -> jax.Array:
    """Returns the bits of codes of a Gaussian (shape 2) or Laplacian (shape 1) source.

    The probability of a code is that of its cell, from the density at its level. Above about 1.5
    bits a path is better without a code 0 in odd states, and many rounds with measured lengths end
    there by themselves. One round with these lengths is then nearly as good.

    Args:
      deviation: Of the entries, in steps; > 0, of any shape. May be traced.
      num_codes: Codes from 0 on, at least 2.
      shape: Exponent of a generalized Gaussian density.
      has_odd_zero: True to use code 0 in odd states.

    Returns:
      float32, `deviation.shape + (2, num_codes)`, for `cheapest_path`.
    """
    code = np.arange(num_codes)
    levels = np.stack([2 * code, 2 * code - np.minimum(code, 1)]).astype(np.float32)
    widths = np.full(levels.shape, 2.0, np.float32)
    if has_odd_zero:
        widths[1, :2] = 1.0, 1.5  # the cells around 0 are narrower
    spread = math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    unit = spread * jnp.asarray(deviation, jnp.float32)
    unit = jnp.broadcast_to(unit[..., None, None], unit.shape + levels.shape)
    levels, widths = (jnp.broadcast_to(array, unit.shape) for array in (levels, widths))
    exponents = jnp.log(widths) - (levels / unit) ** shape
    if not has_odd_zero:
        exponents = exponents.at[..., 1, 0].set(-np.inf)
    # Both signs of a code count.
    total = jax.nn.logsumexp(jnp.where(levels > 0, exponents + math.log(2), exponents), axis=-1)
    return jnp.minimum((total[..., None] - exponents) / math.log(2), _NEVER)


def measured_lengths(codes: ArrayLike, num_codes: int, *, num_states: int = 8) -> jax.Array:
    """Returns the bits of codes that occur as often as in `codes`.

    Args:
      codes: Of one source; chains run along the last axis.
      num_codes: Codes from 0 on; larger ones count as the largest.
      num_states: 4 or 8.

    Returns:
      float32 of shape (2, num_codes), for `cheapest_path`. Both signs have the same length, and a
      code that does not occur counts as occurring half a time.
    """
    codes = jnp.asarray(codes)
    is_odd = jnp.asarray(odd_states(codes, num_states)).astype(jnp.int32)
    place = jnp.minimum(jnp.abs(codes.astype(jnp.int32)), num_codes - 1) + num_codes * is_odd
    counts = jnp.bincount(place.reshape(-1), length=2 * num_codes).reshape(2, num_codes)
    counts = jnp.maximum(counts.astype(jnp.float32), 0.5)
    total = jnp.sum(counts, axis=1, keepdims=True)
    of_one_sign = counts / np.minimum(np.arange(num_codes) + 1, 2).astype(np.float32)[None]
    return jnp.log2(total / of_one_sign)


def lengths_of(codes: jax.Array, *, num_codes: int, num_states: int) -> jax.Array:
    """Returns the bits of each code by lengths that are measured on all of them."""
    lengths = measured_lengths(codes, num_codes, num_states=num_states)
    is_odd = jnp.asarray(odd_states(codes, num_states)).astype(jnp.int32)
    return lengths[is_odd, jnp.abs(codes.astype(jnp.int32))]


def measured_path(
    x: ArrayLike,
    *,
    price: ArrayLike = 0.4,
    num_codes: int = 64,
    num_states: int = 8,
    num_rounds: int = 3,
) -> jax.Array:
    """Returns the cheapest path by lengths that are measured on its own codes.

    The first lengths are those of models, one with and one without a code 0 in odd states. The next
    ones are those of the codes before. The cheaper of both ends is returned.

    Args:
      x: Finite entries of one source in units of the step; chains run along the last axis.
      price: Squared steps that a bit is worth, as in `cheapest_path`.
      num_codes: Codes from 0 on, at least 2.
      num_states: 4 or 8.
      num_rounds: Paths searched one after another from each model, at least 1.

    Returns:
      Codes in the shape of `x`: int8 if `num_codes` is at most 128, else int32.
    """
    x = jnp.asarray(x, jnp.float32)
    deviation = jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(x))), 0.5)

    def path_from(has_odd_zero: bool) -> tuple[jax.Array, jax.Array]:
        """Returns the codes, and their error plus the price of their bits."""
        lengths = model_lengths(deviation, num_codes, has_odd_zero=has_odd_zero)
        codes = jnp.zeros(x.shape, jnp.int8)
        for _ in range(num_rounds):
            codes = cheapest_path(x, lengths, price=price, num_states=num_states)
            lengths = measured_lengths(codes, num_codes, num_states=num_states)
        levels = jnp.asarray(levels_of(codes, num_states)).astype(jnp.float32)
        bits = jnp.sum(lengths_of(codes, num_codes=num_codes, num_states=num_states))
        return codes, jnp.sum(jnp.square(x - levels)) + price * bits

    codes, cost = path_from(False)
    others, other_cost = path_from(True)
    return jnp.where(other_cost < cost, others, codes)


def _predecessors(num_states: int) -> np.ndarray:
    """Returns for each state the two branches into it, as 2 * state + parity: (num_states, 2)."""
    branches = NEXT_STATES[num_states].reshape(-1)
    return np.stack([np.flatnonzero(branches == state) for state in range(num_states)])


def _best_candidates(costs: jax.Array, codes: jax.Array, num_states: int) -> jax.Array:
    """Returns the codes along the best path of each chain; arguments are those of `_candidates`."""
    branches = _predecessors(num_states)
    # State s and parity p: candidate 2 * (s mod 2) + p.
    candidate = branches // 2 % 2 * 2 + branches % 2

    def forward(cost: jax.Array, branch_costs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One entry: the least cost of each state, and which of its two branches has it."""
        least, taken = [], jnp.zeros(cost.shape[1], jnp.uint8)
        for state, pair in enumerate(branches):
            first, second = (
                cost[branch // 2] + branch_costs[i]
                for branch, i in zip(pair, candidate[state], strict=True)
            )
            least.append(jnp.minimum(first, second))
            taken |= (second < first).astype(jnp.uint8) << np.uint8(state)
        # Relative to state 0: sums of long chains would lose digits.
        return jnp.stack([one - least[0] for one in least]), taken

    start = jnp.full((num_states, costs.shape[1]), _UNREACHABLE).at[0].set(0)
    last, taken = lax.scan(forward, start, jnp.moveaxis(costs, 2, 0))

    def backward(state: jax.Array, taken: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = 2 * state + (taken.astype(jnp.int32) >> state & 1)
        branch = jnp.asarray(branches.reshape(-1), jnp.int32)[place]
        return branch // 2, branch // 2 % 2 * 2 + branch % 2

    _, chosen = lax.scan(backward, jnp.argmin(last, axis=0).astype(jnp.int32), taken, reverse=True)
    return jnp.take_along_axis(codes, chosen.T[None], axis=0)[0]
