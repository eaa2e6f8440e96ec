"""Dependent quantization: entries rounded one after another on two interleaved grids.

    x ~ step * level,   level = 2 * code - sign(code) * (state mod 2),   state' = next(state, code)

In an even state a level is an even number, in an odd state an odd number or 0; the parity of each
code drives the state. Codes cost as much as those of a grid of twice the step, but a path through
the states is nearer to the entries than the points of that grid. Chains of entries run along the
last axis. Each begins in state 0, so that chains are decoded side by side.

References:
  Marcellin and Fischer, Trellis coded quantization of memoryless and Gauss-Markov sources, 1990
  Schwarz et al., Hybrid video coding with trellis-coded quantization, 2019
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks

# By number of states, the next state for an even and an odd code. 8 states as in ISO/IEC 15938-17;
# 4 states as in H.266, numbered so that the odd ones have the odd levels.
NEXT_STATES = {
    4: np.array([[0, 1], [2, 3], [1, 0], [3, 2]]),
    8: np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]]),
}
_LONGEST_CHAIN = 512


def check_num_states(num_states: int) -> None:
    """Raises unless there is a trellis of so many states."""
    checks.check_choice("num_states", num_states, tuple(NEXT_STATES))


def chain_length(row: int) -> int:
    """Returns the length of the chains into which a row of entries is cut, at most 512."""
    # A chain loses half a bit by its known first state; more chains are decoded side by side.
    return max(-(-row // max(-(-row // _LONGEST_CHAIN), 1)), 1)


def as_chains(array: Any, channel_axes: tuple[int, ...]) -> Any:
    """Returns an array, of jax or NumPy, as chains (chains, length), and zeros after each row.

    A row is a channel, or without channel axes all entries along the last axis.
    """
    num_rows, row, order = _rows_of(array.shape, channel_axes)
    rows = array.transpose(order).reshape(num_rows, row)
    length = chain_length(row)
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.pad(rows, ((0, 0), (0, -row % length))).reshape(-1, length)


def from_chains(chains: Any, shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> Any:
    """Returns the array of that shape whose chains are given."""
    num_rows, row, order = _rows_of(shape, channel_axes)
    rows = chains.reshape(num_rows, row + -row % chain_length(row))[:, :row]
    return rows.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def chains_shape(shape: tuple[int, ...], channel_axes: tuple[int, ...]) -> tuple[int, int]:
    """Returns the number of chains of an array, and their length."""
    num_rows, row, _ = _rows_of(shape, channel_axes)
    length = chain_length(row)
    return num_rows * -(-row // length), length


def _rows_of(
    shape: tuple[int, ...], channel_axes: tuple[int, ...]
) -> tuple[int, int, tuple[int, ...]]:
    """Returns the number of rows, the entries of one, and the order of axes that joins them."""
    first = channel_axes or tuple(range(len(shape) - 1))
    order = (*first, *(a for a in range(len(shape)) if a not in first))
    num_rows = math.prod(shape[a] for a in first)
    return num_rows, math.prod(shape[a] for a in order[len(first) :]), order


# --- Codes and levels -----------------------------------------------------------------------


@functools.cache
def _byte_tables(num_states: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns next states and passed states modulo 2, for eight parities a byte.

    Both are uint8, indexed by 256 * state + byte; a byte's lowest bit is of its first code.
    """
    state = np.repeat(np.arange(num_states), 256)
    byte = np.tile(np.arange(256), num_states)
    is_odd = np.zeros_like(state)
    for i in range(8):
        is_odd |= (state & 1) << i
        state = NEXT_STATES[num_states][state, byte >> i & 1]
    return state.astype(np.uint8), is_odd.astype(np.uint8)


def _odd_states_numpy(codes: np.ndarray, num_states: int) -> np.ndarray:
    """Returns 1 where the state of a code is odd, else 0; `codes` has shape (chains, length)."""
    next_states, is_odd = _byte_tables(num_states)
    parities = np.ascontiguousarray(np.packbits(codes & 1, axis=1, bitorder="little").T)
    passed = np.empty_like(parities)
    state = np.zeros(len(codes), np.uint8)
    for i, byte in enumerate(parities):
        place = state.astype(np.intp) << 8 | byte
        passed[i] = is_odd.take(place)
        state = next_states.take(place)
    return np.unpackbits(passed.T, axis=1, count=codes.shape[1], bitorder="little")


@functools.partial(jax.jit, static_argnames="num_states")
def _odd_states_jax(codes: jax.Array, num_states: int) -> jax.Array:
    """Returns the same as `_odd_states_numpy`, compiled."""
    next_states, is_odd = map(jnp.asarray, _byte_tables(num_states))
    parities = jnp.packbits((codes & 1).astype(bool), axis=1, bitorder="little").T

    def step(state: jax.Array, byte: jax.Array) -> tuple[jax.Array, jax.Array]:
        place = state.astype(jnp.int32) * 256 + byte.astype(jnp.int32)
        return next_states[place], is_odd[place]

    _, passed = lax.scan(step, jnp.zeros(len(codes), jnp.uint8), parities)
    return jnp.unpackbits(passed.T, axis=1, count=codes.shape[1], bitorder="little")


def odd_states(codes: ArrayLike, num_states: int = 8) -> jax.Array | np.ndarray:
    """Returns 1 where the state of a code is odd, else 0: uint8, from NumPy for NumPy's arrays."""
    check_num_states(num_states)
    if not np.size(codes):
        return np.zeros(np.shape(codes), np.uint8)
    shape = np.shape(codes)
    if isinstance(codes, np.ndarray):
        return _odd_states_numpy(codes.reshape(-1, shape[-1]), num_states).reshape(shape)
    rows = jnp.asarray(codes).reshape(-1, shape[-1])
    return _odd_states_jax(rows, num_states).reshape(shape)


def levels_of(codes: ArrayLike, num_states: int = 8) -> jax.Array | np.ndarray:
    """Returns the levels of codes: `step * levels` are the quantized entries.

    Args:
      codes: Integers of any shape with at least one axis; chains run along the last.
      num_states: 4 or 8.

    Returns:
      Integers of the same shape, int16 for codes of int8 and else int32; an array of NumPy for
      one of NumPy.
    """
    array = codes if isinstance(codes, np.ndarray) else jnp.asarray(codes)
    xp = np if isinstance(array, np.ndarray) else jnp
    is_odd = odd_states(array, num_states)
    dtype = np.int16 if array.dtype == np.int8 else np.int32
    # The sign in the dtype of the codes: fewer bytes to move.
    sign = xp.sign(array) * is_odd.astype(array.dtype)
    return 2 * array.astype(dtype) - sign.astype(dtype)


def path_of(levels: np.ndarray, num_states: int = 8) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the codes of levels, in their dtype, and 1 where their state is odd, else 0 (uint8).

    None if the levels are on no path of the trellis.
    """
    # Odd levels are of odd states, others but 0 of even ones: the states need not be known.
    is_odd = (levels & 1).astype(np.uint8)
    codes = (levels >> 1) + (is_odd & (levels > 0))
    found = np.asarray(odd_states(codes, num_states))
    is_wrong = (is_odd != found) & (levels != 0)
    return None if is_wrong.any() else (codes.astype(levels.dtype, copy=False), found)
