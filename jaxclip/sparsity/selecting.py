"""Exactly the k largest of many numbers, ties included, by counting instead of sorting.

Counts are sums, so sharded arrays stay on their devices, and k may be traced.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core.floats import compute_dtype


def ranking(scores: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns positive integers in the order of scores >= 0, compared in a dtype."""
    integers = jnp.uint64 if jnp.finfo(dtype).bits == 64 else jnp.uint32
    # Bits order like the numbers, and XLA does not flush their subnormals to 0.
    return lax.bitcast_convert_type(scores.astype(dtype), integers) + jnp.asarray(1, integers)


def dtype_of_scores(*dtypes: DTypeLike) -> DTypeLike:
    """Returns the real dtype in which magnitudes of these dtypes are compared."""
    return jnp.finfo(compute_dtype(*dtypes)).dtype


def largest(keys: Sequence[jax.Array], count: ArrayLike) -> list[jax.Array]:
    """Returns masks of the `count` largest keys of all arrays together; of ties, the first.

    Complexity: a count of all keys for each of their bits, and of positions if there are ties.
    """
    count = jnp.asarray(count, jnp.int32)
    integers = keys[0].dtype
    top = jnp.stack([jnp.max(key, initial=0) for key in keys]).max()

    def are_few_above(bound: jax.Array) -> jax.Array:
        return num_true([key > bound for key in keys]) <= count

    bound = _first_true(are_few_above, jnp.zeros((), integers), top)
    above = [key > bound for key in keys]
    tied = [key == bound for key in keys]
    num_wanted, total = count - num_true(above), sum(key.size for key in keys)
    places = _places(keys)

    def are_enough_before(place: jax.Array) -> jax.Array:
        return num_true([t & (p < place) for t, p in zip(tied, places, strict=True)]) >= num_wanted

    # Both ends are known, and nothing is counted, where all of the ties are wanted or none.
    end = jnp.asarray(total, jnp.uint32)
    low = jnp.where(num_true(tied) == num_wanted, end, jnp.zeros_like(end))
    high = jnp.where(num_wanted > 0, end, low)
    place = _first_true(are_enough_before, jnp.minimum(low, high), high)
    return [a | (t & (p < place)) for a, t, p in zip(above, tied, places, strict=True)]


def largest_in_groups(keys: jax.Array, count: jax.Array, axis: int) -> jax.Array:
    """Returns the mask of the `count` largest keys along an axis, for each group its own count."""
    axis = axis % keys.ndim
    other, one = jnp.expand_dims(keys, axis), jnp.expand_dims(keys, axis + 1)
    size = keys.shape[axis]
    pairs = (*(1,) * axis, size, size, *(1,) * (keys.ndim - axis - 1))
    is_earlier = np.tri(size, k=-1, dtype=bool).reshape(pairs)
    is_ahead = (other > one) | ((other == one) & is_earlier)
    return jnp.sum(is_ahead, axis=axis + 1, dtype=jnp.int32) < count


def num_true(conditions: Sequence[jax.Array]) -> jax.Array:
    """Returns how many entries of some arrays are True, as int32."""
    return sum((jnp.sum(c, dtype=jnp.int32) for c in conditions), jnp.zeros((), jnp.int32))


def _first_true(
    condition: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array
) -> jax.Array:
    """Returns the least integer in [low, high] for which a condition holds from there on."""
    one, two = (jnp.asarray(n, low.dtype) for n in (1, 2))

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // two
        holds = condition(middle)
        return jnp.where(holds, low, middle + one), jnp.where(holds, middle, high)

    return lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, high))[0]


def _places(keys: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the position of each entry, counted through all arrays."""
    # From the positions along each axis: a range would have to be reshaped, which a sharded
    # axis forbids.
    places, start = [], 0
    for key in keys:
        strides = np.cumprod([1, *key.shape[:0:-1]])[::-1] if key.ndim else []
        place = jnp.full(key.shape, start, jnp.uint32)
        for axis, stride in enumerate(strides):
            along = lax.broadcasted_iota(jnp.uint32, key.shape, axis)
            place = place + along * jnp.asarray(int(stride), jnp.uint32)
        places.append(place)
        start += key.size
    return places
