"""Rounding by rate and error: codes that take fewer bits once they are entropy-coded.

The nearest code has the least error, but a rare code is long. A weight goes from code l to the
next code l' towards 0 where the bits saved are worth the added error:

    (w - s l')^2 - (w - s l)^2  <  price * s^2 * (bits(l) - bits(l')),   bits(l) = -log2 p(l)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.floats import quotient
from jaxclip._core.trees import PyTree
from jaxclip.lowbit.arrays import QuantizedArray, dequantize, is_quantized
from jaxclip.lowbit.coding.trellis import as_chains, check_num_states, from_chains, levels_of
from jaxclip.lowbit.rounding.paths import lengths_of, measured_path
from jaxclip.thresholds.by_rate import code_counts

_NUM_ROUNDS = 3  # the bits of a code depend on the codes chosen


def cheaper_codes(small: PyTree, original: PyTree, *, price: ArrayLike = 0.12) -> PyTree:
    """Moves codes one step towards 0 where the bits saved are worth the error.

    For entropy-coded files, together with `rate_optimal`; the reader does not change.
    For each array `sum((w - q)**2) + price * mean(scale**2) * bits` is no larger than before, with
    the bits of an ideal order-0 code (`code_entropy` times the number of entries). The error
    grows: an entry that moves is within 1.5 steps of its weight instead of half a step.

    Args:
      small: A `QuantizedArray`, or a tree with some; other leaves stay as they are.
      original: The arrays that were quantized, in the same structure.
      price: Error that a bit is worth, in squared steps; at least 0. May be traced. At 0 no code
        moves. The default is near the price at high rates: the error `s**2 / 12` of a uniform
        grid falls by `s**2 * log(2) / 6 = 0.116 s**2` for one more bit.

    Returns:
      The same tree, each code unchanged or one step nearer to 0.

    Raises:
      ValueError: If `price` is negative or NaN, an array has one bit or a zero point, or the
        trees do not fit.

    Example:
      >>> import jax
      >>> from jaxclip import quantize
      >>> from jaxclip.thresholds import code_entropy, rate_optimal
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> q = quantize(w, 8, threshold=rate_optimal(2.0))
      >>> print(f"{code_entropy(cheaper_codes(q, w).qvalue):.2f} bits per weight")
      1.86 bits per weight

    References:
      Wiedemann et al., DeepCABAC, 2019, https://arxiv.org/abs/1905.08318
    """
    checks.check_nonnegative("price", price)

    def rounded(path: tuple, q: PyTree, w: ArrayLike) -> PyTree:
        if not is_quantized(q):
            return q
        name = f" at {trees.path_name(path)!r}" if path else ""
        if q.grid.is_odd or q.zero is not None:
            got = "a zero point" if q.zero is not None else "one bit"
            got = "balanced levels" if q.grid.levels == "balanced" else got
            raise ValueError(f"small{name} must have a code 0 for the value 0, got {got}.")
        if jnp.shape(w) != q.shape:
            raise ValueError(f"original{name} must have shape {q.shape}, got {jnp.shape(w)}.")
        q = q.unpacked()
        codes = _choose_codes(jnp.asarray(w), q, jnp.asarray(price, jnp.float32))
        return dataclasses.replace(q, qvalue=codes)

    return jax.tree_util.tree_map_with_path(rounded, small, original, is_leaf=is_quantized)


def dependent_codes(
    small: PyTree, original: PyTree, *, price: ArrayLike = 0.4, num_states: int = 8
) -> PyTree:
    """Rounds anew at half the step, to a path of a trellis: less error in fewer bytes.

    Dependent quantization, for files with `coding="lanes"` or `"smallest"`. There codes do not take
    more bytes than those of `small` did, although the step is half as large: at each entry only
    every second level may follow. The path is found by the algorithm of Viterbi, with
    `error + price * bits` as its cost. The reader does not change.

    Args:
      small: A `QuantizedArray` of 8 bits, best with a threshold of `rate_optimal`, or a tree with
        some; other leaves stay as they are.
      original: The arrays that were quantized, in the same structure.
      price: Error that a bit is worth, in squares of the halved step; at least 0. May be traced.
      num_states: States of the trellis, 4 or 8.

    Returns:
      The same tree with other codes and half the scales. An array stays as it is where the cost
      would not fall: codes end at 126 halved steps, so large outliers would be clipped.

    Raises:
      ValueError: If `price` or `num_states` is not valid, an array does not have 8 bits or has a
        zero point, or the trees do not fit.

    Example:
      >>> import jax
      >>> from jaxclip import quantize, dequantize
      >>> from jaxclip.thresholds import rate_optimal
      >>> w = jax.random.normal(jax.random.key(0), (64, 256))
      >>> q = quantize(w, 8, threshold=rate_optimal(2.5))
      >>> errors = [jnp.mean((w - dequantize(x)) ** 2) for x in (q, dependent_codes(q, w))]
      >>> bool(errors[1] < 0.9 * errors[0])
      True

    References:
      Schwarz et al., Hybrid video coding with trellis-coded quantization, 2019
    """
    checks.check_nonnegative("price", price)
    check_num_states(num_states)

    def rounded(path: tuple, q: PyTree, w: ArrayLike) -> PyTree:
        if not is_quantized(q):
            return q
        name = f" at {trees.path_name(path)!r}" if path else ""
        if q.bits != 8 or q.zero is not None:
            got = f"bits={q.bits!r}" if q.bits != 8 else "a zero point"
            raise ValueError(f"small{name} must have 8 bits and no zero point, got {got}.")
        if jnp.shape(w) != q.shape:
            raise ValueError(f"original{name} must have shape {q.shape}, got {jnp.shape(w)}.")
        return _on_path(jnp.asarray(w).astype(jnp.float32), q, price, num_states)

    return jax.tree_util.tree_map_with_path(rounded, small, original, is_leaf=is_quantized)


def _on_path(w: jax.Array, q: QuantizedArray, price: ArrayLike, num_states: int) -> QuantizedArray:
    """Returns the array on a path of the trellis, or as it is if that has less error."""
    if not q.size:
        return q
    scale = jnp.asarray(q.scale)
    step = q.grid.expand(scale.astype(jnp.float32), q.shape) / 2
    channels = q.grid.channel_axes(q.ndim)
    chains = as_chains(quotient(w, jnp.broadcast_to(step, q.shape)), channels)
    codes = measured_path(chains, price=price, num_states=num_states)
    levels = from_chains(jnp.asarray(levels_of(codes, num_states)), q.shape, channels)
    found = dataclasses.replace(q, qvalue=levels.astype(jnp.int8), scale=scale / 2)
    price = price * jnp.mean(jnp.square(step))

    def cost(array: QuantizedArray, codes: jax.Array) -> jax.Array:
        bits = jnp.sum(lengths_of(codes, num_codes=129, num_states=num_states))
        return jnp.sum(jnp.square(w - dequantize(array, jnp.float32))) + price * bits

    is_cheaper = cost(found, codes) < cost(q, jnp.asarray(q.qvalue).reshape(1, -1))
    return jax.tree.map(lambda new, old: jnp.where(is_cheaper, new, old), found, q)


@jax.jit
def _choose_codes(w: jax.Array, q: QuantizedArray, price: jax.Array) -> jax.Array:
    nearest = jnp.asarray(q.qvalue).astype(jnp.int8)
    smaller = nearest - jnp.sign(nearest)
    scale = jnp.asarray(q.scale).astype(jnp.float32)
    # In multiples of the steps' root mean square, whose squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(scale), initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    typical = largest * jnp.sqrt(jnp.mean(jnp.square(quotient(scale, largest))))
    step = q.grid.expand(quotient(scale, typical), q.shape)
    x = quotient(w.astype(jnp.float32), typical)
    error_of_nearest = jnp.square(x - step * nearest.astype(jnp.float32))
    error_of_smaller = jnp.square(x - step * smaller.astype(jnp.float32))

    def code_lengths(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the bits of each code, and of all codes together."""
        counts = code_counts(codes).astype(jnp.float32)
        # A code that does not occur counts as occurring half a time.
        bits = jnp.log2(max(codes.size, 1) / jnp.maximum(counts, 0.5))
        return bits, jnp.sum(counts * bits)

    def cost(codes: jax.Array) -> jax.Array:
        errors = jnp.where(codes == nearest, error_of_nearest, error_of_smaller)
        return jnp.sum(errors) + price * code_lengths(codes)[1]

    codes = best = nearest
    least = cost(nearest)
    for _ in range(_NUM_ROUNDS):
        bits, _ = code_lengths(codes)
        saved = bits[nearest.astype(jnp.uint8)] - bits[smaller.astype(jnp.uint8)]
        codes = jnp.where(error_of_smaller - error_of_nearest < price * saved, smaller, nearest)
        found = cost(codes)
        best = jnp.where(found < least, codes, best)
        least = jnp.minimum(found, least)
    return best.astype(jnp.asarray(q.qvalue).dtype)
