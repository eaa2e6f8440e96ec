"""Random bits for rounding: a hash of two words, the number of a leaf, and the place in it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike


def random_bits(words: jax.Array, leaf: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns uint32 bits for each entry of a leaf, from two words of the step's key."""
    # A hash of the position is computed in the kernel that rounds; XLA on CPU would write
    # `jax.random.bits` of this shape to memory first.
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        position += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    # Mixed twice, because consecutive leaves, positions and words must not show in the result.
    start = words[0] + mixed(words[1] + jnp.asarray(leaf, jnp.uint32))
    return mixed(mixed(position * np.uint32(0x9E3779B9) + start) ^ words[1])


def mixed(x: jax.Array) -> jax.Array:
    """Returns a hash of 32 bits in which each bit depends on all bits of `x`."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
