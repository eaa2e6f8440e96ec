"""Threshold rules that measure magnitudes: their maximum, a percentile, or a deviation.

All are reductions along axes, without a sort or a flattening, so they run on sharded arrays.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    FLOAT32_MAX,
    inverse_size,
)
from jaxclip._core.grids import Grid
from jaxclip.thresholds.rules import ThresholdRule


@dataclasses.dataclass(frozen=True, eq=False)
class _MaxAbs(ThresholdRule):
    def measure(self, blocks: jax.Array, axes: tuple[int, ...], counts: np.ndarray) -> jax.Array:
        del counts
        return jnp.max(magnitude(blocks), axis=axes, keepdims=True, initial=0)

    def pool(self, arrays: Sequence[jax.Array]) -> jax.Array:
        return _largest_magnitude(arrays)


def magnitude(x: jax.Array) -> jax.Array:
    """Returns `|x|` in float32."""
    return jnp.abs(x).astype(jnp.float32)


def _largest_magnitude(arrays: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(magnitude(x), initial=0) for x in arrays])


def add_up(numbers: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum of one or more arrays."""
    return functools.reduce(operator.add, numbers)


def count_entries(arrays: Sequence[jax.Array]) -> int:
    """Returns the number of entries of all arrays, at least 1."""
    return max(sum(x.size for x in arrays), 1)


@checks.refuses_step
def max_abs(
    *, axis: int | tuple[int, ...] | None = None, group_size: int | None = None
) -> ThresholdRule:
    """Makes the rule `t = max |w|`: nothing is clipped.

    Args:
      axis: Channel axis or axes with a threshold each; None for one threshold.
      group_size: Entries of a channel that share a threshold, as in `Grid`.

    Returns:
      A rule: array -> float32 thresholds that broadcast against the array.

    Raises:
      TypeError: If `axis` is not an integer, a tuple of them or None.
      ValueError: If `group_size` is not a positive integer.

    Example:
      >>> max_abs(axis=1)(jnp.array([[1.0, -4.0], [-2.0, 3.0]]))
      Array([[2., 4.]], dtype=float32)
    """
    return _MaxAbs(Grid(None, axis=axis, group_size=group_size))


@dataclasses.dataclass(frozen=True, eq=False)
class _PercentileAbs(ThresholdRule):
    q: float = 100.0

    def measure(self, blocks: jax.Array, axes: tuple[int, ...], counts: np.ndarray) -> jax.Array:
        if self.q == 100 or blocks.size == 0:
            return jnp.max(magnitude(blocks), axis=axes, keepdims=True, initial=0)
        return _percentile(blocks, self._num_above(counts).astype(np.int32), axes)

    def pool(self, arrays: Sequence[jax.Array]) -> jax.Array:
        sizes, largest = [magnitude(x) for x in arrays], _largest_magnitude(arrays)
        count = count_entries(arrays)
        if self.q == 100:
            return largest
        if count > np.iinfo(np.int32).max:
            raise ValueError(
                f"percentile_abs counts up to 2**31 - 1 entries, but the tree has {count}."
            )

        def count_above(bound: jax.Array) -> jax.Array:
            return add_up([jnp.sum(size > bound, dtype=jnp.int32) for size in sizes])

        return _least_exceeded_by(self._num_above(count), count_above, largest)

    def _num_above(self, counts: ArrayLike) -> np.ndarray:
        """Returns the number of weights that may be above the threshold."""
        # Counted from the top, because padding of a group is at the bottom.
        counts = np.asarray(counts, np.float64)
        return counts - np.ceil(counts * self.q / 100)


# Jitted, because each call outside of jit would compile the loop anew.
@functools.partial(jax.jit, static_argnames="axes")
def _percentile(blocks: jax.Array, num_above: ArrayLike, axes: tuple[int, ...]) -> jax.Array:
    """Returns the least number that at most `num_above` magnitudes of each block exceed."""
    size = magnitude(blocks)

    def count_above(bound: jax.Array) -> jax.Array:
        return jnp.sum(size > bound, axis=axes, keepdims=True, dtype=jnp.int32)

    largest = jnp.max(size, axis=axes, keepdims=True, initial=0)
    return _least_exceeded_by(num_above, count_above, largest)


def _least_exceeded_by(
    num_above: ArrayLike, count_above: Callable[[jax.Array], jax.Array], largest: jax.Array
) -> jax.Array:
    """Returns the least number that no more than `num_above` weights exceed: a weight, or 0."""
    # Floats of one sign are ordered like their bits, so 32 halvings find it.
    most = jnp.broadcast_to(jnp.asarray(num_above, jnp.int32), largest.shape)
    high = lax.bitcast_convert_type(largest, jnp.int32)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = low + (high - low) // 2
        is_enough = count_above(lax.bitcast_convert_type(middle, jnp.float32)) <= most
        return jnp.where(is_enough, low, middle + 1), jnp.where(is_enough, middle, high)

    _, least = lax.fori_loop(0, 32, halve, (0 * high, high))
    return lax.bitcast_convert_type(least, jnp.float32)


@checks.refuses_step
def percentile_abs(
    q: float,
    *,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> ThresholdRule:
    """Makes the rule `t = the q-th percentile of |w|`: a fraction `1 - q / 100` is clipped.

    The least `|w|` that at least `q` percent of the entries do not exceed. It is one of the
    magnitudes, as in `numpy.quantile` with method "inverted_cdf". 32 counting passes find it
    without a sort, so the rule runs on sharded arrays.

    Args:
      q: Number in (0, 100]; 100 is `max_abs`.
      axis: Channel axis or axes with a threshold each; None for one threshold.
      group_size: Entries of a channel that share a threshold, as in `Grid`.

    Returns:
      A rule: array -> float32 thresholds that broadcast against the array.

    Raises:
      TypeError: If `q` is not a number, or `axis` not an integer, a tuple of them or None.
      ValueError: If `q` is not in (0, 100], or `group_size` not a positive integer.

    Example:
      >>> print(percentile_abs(75)(jnp.array([1.0, -4.0, -2.0, 3.0])))
      [3.]
    """
    q = q.item() if isinstance(q, jax.Array) else q
    checks.check_positive("q", q)
    if not q <= 100:
        raise ValueError(f"q must be in (0, 100], got {q!r}.")
    return _PercentileAbs(Grid(None, axis=axis, group_size=group_size), float(q))


@dataclasses.dataclass(frozen=True, eq=False)
class _StdMultiple(ThresholdRule):
    k: float = 1.0

    def measure(self, blocks: jax.Array, axes: tuple[int, ...], counts: np.ndarray) -> jax.Array:
        size = magnitude(blocks)
        factor = inverse_size(jnp.max(size, axis=axes, keepdims=True, initial=0))
        mean = jnp.sum(jnp.square(size * factor), axis=axes, keepdims=True) / counts
        return self._multiple(mean, factor)

    def pool(self, arrays: Sequence[jax.Array]) -> jax.Array:
        factor = inverse_size(_largest_magnitude(arrays))
        sums = [jnp.sum(jnp.square(magnitude(x) * factor)) for x in arrays]
        return self._multiple(add_up(sums) / count_entries(arrays), factor)

    def _multiple(self, mean_square: jax.Array, factor: jax.Array) -> jax.Array:
        return jnp.minimum(np.float32(self.k) * jnp.sqrt(mean_square) / factor, FLOAT32_MAX)


@checks.refuses_step
def std_multiple(
    k: float,
    *,
    axis: int | tuple[int, ...] | None = None,
    group_size: int | None = None,
) -> ThresholdRule:
    """Makes the rule `t = k * sqrt(mean(w**2))`, k standard deviations around zero.

    The deviation is taken from 0 and not from the mean, because clipping is around 0 too. So
    it is the root mean square, and weights with another mean get a wider threshold.

    Args:
      k: Finite number above 0; 2 to 4 are usual.
      axis: Channel axis or axes with a threshold each; None for one threshold.
      group_size: Entries of a channel that share a threshold, as in `Grid`.

    Returns:
      A rule: array -> float32 thresholds that broadcast against the array. Right for every
      finite array: squares neither overflow nor vanish.

    Raises:
      TypeError: If `k` is not a number, or `axis` not an integer, a tuple of them or None.
      ValueError: If `k` is not positive and finite, or `group_size` not a positive integer.

    Example:
      >>> print(std_multiple(2.0)(jnp.array([3.0, -3.0, 3.0, 3.0])))
      [6.]
    """
    k = k.item() if isinstance(k, jax.Array) else k
    checks.check_positive("k", k)
    return _StdMultiple(Grid(None, axis=axis, group_size=group_size), float(k))
