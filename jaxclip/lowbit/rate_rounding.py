"""Codes that cost fewer bits once they are entropy coded: rounding that looks at the rate.

The nearest code has the least error, but a rare code is long. A weight goes to the next code
towards 0 where the bits that this saves are worth the error that it adds:

    (w - s l')^2 - (w - s l)^2  <  price * s^2 * (bits(l) - bits(l'))

with `bits(l) = -log2` of the share of code l. At high rates a uniform grid has the error
s^2 / 12, which falls by 2 ln 2 times itself for a bit more, .116 s^2: the price of a bit.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip.lowbit.arrays import QuantizedArray, is_quantized
from jaxclip.thresholds.by_rate import code_counts

_ROUNDS = 3


def cheaper_codes(small: Any, original: Any, *, price: ArrayLike = 0.12) -> Any:
    """Returns low-bit arrays with codes nearer to 0 where the bits saved are worth the error.

    For files that are entropy coded, beside `rate_optimal`; the reader does not change. For each
    array `sum((w - q)**2) + price * mean(scale**2) * bits` is no larger than before, with the
    bits of an ideal order-0 code (`code_entropy` times the number of entries). The error grows:
    an entry that moves is within 1.5 steps of its weight, no longer within half of one.

    Args:
      small: A `QuantizedArray`, or a tree with some; other leaves stay as they are.
      original: What was quantized, in the same structure.
      price: Error that a bit is worth, in squared steps; at least 0. May be traced. At 0 nothing
        moves.

    Returns:
      The same, each code as it was or one nearer to 0.

    Raises:
      ValueError: If `price` is negative or NaN, an array has one bit or a zero point, or the
        trees do not fit.

    Example:
      >>> from jaxclip import quantize
      >>> from jaxclip.thresholds import rate_optimal
      >>> from jaxclip.thresholds.by_rate import code_entropy
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> q = quantize(w, 8, threshold=rate_optimal(2.0))
      >>> print(f"{code_entropy(cheaper_codes(q, w).qvalue):.2f} bits a weight")
      1.86 bits a weight

    References:
      Wiedemann et al., DeepCABAC, 2019, https://arxiv.org/abs/1905.08318
    """
    checks.check_nonnegative("price", price)

    def chosen(path: tuple, q: Any, w: Any) -> Any:
        if not is_quantized(q):
            return q
        name = f" at '{trees.path_name(path)}'" if path else ""
        if q.bits == 1 or q.zero is not None:
            what = "one bit" if q.bits == 1 else "a zero point"
            raise ValueError(f"small{name} must have a code 0 for the value 0, got {what}.")
        if jnp.shape(w) != q.shape:
            raise ValueError(f"original{name} must have shape {q.shape}, got {jnp.shape(w)}.")
        codes = _choose(jnp.asarray(w), q, jnp.asarray(price, jnp.float32))
        return dataclasses.replace(q, qvalue=codes)

    return jax.tree_util.tree_map_with_path(chosen, small, original, is_leaf=is_quantized)


@jax.jit
def _choose(w: jax.Array, q: QuantizedArray, price: jax.Array) -> jax.Array:
    codes = jnp.asarray(q.qvalue).astype(jnp.int8)
    scale = jnp.asarray(q.scale).astype(jnp.float32)
    # In units of the steps' root mean square, whose squares neither overflow nor vanish.
    size = jnp.abs(scale)
    largest = jnp.max(size, initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    relative = size / unit
    unit = unit * jnp.sqrt(jnp.mean(jnp.square(relative)))
    step = q.grid.expand(scale / unit, q.shape)
    x = w.astype(jnp.float32) / unit
    smaller = codes - jnp.sign(codes)
    error, more = (jnp.square(x - step * y.astype(jnp.float32)) for y in (codes, smaller))

    def lengths(chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Bits of each code, those that do not occur as if they did half a time; and of all."""
        counts = code_counts(chosen).astype(jnp.float32)
        bits = jnp.log2(max(chosen.size, 1) / jnp.maximum(counts, 0.5))
        return bits, jnp.sum(counts * bits)

    def cost(chosen: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen == codes, error, more)) + price * lengths(chosen)[1]

    best, least = codes, cost(codes)
    chosen = codes
    for _ in range(_ROUNDS):
        bits, _ = lengths(chosen)
        saved = bits[codes.astype(jnp.uint8)] - bits[smaller.astype(jnp.uint8)]
        chosen = jnp.where(more - error < price * saved, smaller, codes)
        found = cost(chosen)
        best = jnp.where(found < least, chosen, best)
        least = jnp.minimum(found, least)
    return best.astype(jnp.asarray(q.qvalue).dtype)
