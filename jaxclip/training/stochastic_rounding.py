"""Stochastic rounding: half-precision parameters that do not lose small steps.

A bfloat16 weight of 0.02 has neighbours 1e-4 away. A step of 3e-5 added to it and rounded
to nearest changes nothing, step after step. Rounded up or down at random, the weight moves
as it should on average: `E[round(x)] = x`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.floats import compute_dtype, keep_weak_type
from jaxclip._core.random_bits import random_bits

_HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def apply_updates_stochastically(
    params: optax.Params, updates: optax.Updates, key: jax.Array
) -> optax.Params:
    """Returns `params + updates`, half-precision leaves rounded without bias.

    The sum is taken in float32. Bfloat16 and float16 parameters get one of its two
    neighbours, at random, such that the expectation is the sum. Other floating leaves are
    rounded to nearest, as by `optax.apply_updates`.

    Args:
      params: Any pytree of arrays.
      updates: Tree of the same structure and shapes, of any floating dtypes. Their own
        rounding error remains: a step in bfloat16 is right to 0.4 %.
      key: PRNG key, used once. Replicas of the parameters must be given the same key.

    Returns:
      New parameters; structure, shapes, dtypes and weak types are those of `params`.
      Leaves that are not floating stay as they are.

    Raises:
      ValueError: If the two trees differ in structure or shapes.

    Example:
      >>> w = jnp.full(1000, 1.0, jnp.bfloat16)  # the next number is 1 + 1/128
      >>> step = jnp.full(1000, 1 / 1024, jnp.bfloat16)
      >>> float(jnp.mean(optax.apply_updates(w, step).astype(jnp.float32)))
      1.0
      >>> moved = apply_updates_stochastically(w, step, jax.random.key(0)).astype(jnp.float32)
      >>> abs(float(jnp.mean(moved)) - (1 + 1 / 1024)) < 5e-4
      True

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision, 2015,
      https://arxiv.org/abs/1502.02551
      Zamirai et al., Revisiting BFloat16 Training, 2020, https://arxiv.org/abs/2010.06192
      Chris Wellons, Prospecting for Hash Functions, 2018,
      https://nullprogram.com/blog/2018/07/31 (the random bits: a hash of key and position)
    """
    checks.check_same_structure("params", params, "updates", updates)
    leaves, treedef = jax.tree.flatten(params)
    positions = jax.tree.unflatten(treedef, range(len(leaves)))
    words = jax.random.bits(key, (2,), jnp.uint32)

    def add(p: jax.Array, u: ArrayLike, position: int) -> jax.Array:
        u = jnp.asarray(u)
        wide = compute_dtype(p.dtype, u.dtype)
        total = p.astype(wide) + u.astype(wide)
        if p.dtype in _HALF:
            rounded = _round(total, p.dtype, random_bits(words, position, p.shape))
        else:
            rounded = total.astype(p.dtype)
        return keep_weak_type(rounded, p)

    return trees.map_clippable(add, params, updates, positions)


def _round(x: jax.Array, dtype: np.dtype, random_bits: jax.Array) -> jax.Array:
    """Rounds to one of the two neighbours in a half-precision dtype, without bias."""
    # Random bits are added below the last bit that is kept, and the rest is cut off: x goes
    # away from zero with a probability equal to the fraction that is cut, to 2**-13. Values
    # of the dtype, infinities and NaN stay the same, and finite values stay finite.
    info = jnp.finfo(dtype)
    x = x.astype(jnp.float32)
    # By bits, because arithmetic treats a subnormal as 0 where the backend flushes them.
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign, magnitude = bits & np.uint32(0x80000000), bits & np.uint32(0x7FFFFFFF)
    cut = (1 << (23 - info.nmant)) - 1
    noise = random_bits >> np.uint32(32 - cut.bit_length())
    if info.nexp == 8:
        rounded = (magnitude + noise) & np.uint32(0xFFFFFFFF & ~cut)
    else:
        # Float16's subnormals are evenly spaced. Shifted by its smallest normal number they
        # are floats of one exponent, which are evenly spaced, too.
        size, tiny = jnp.abs(x), np.float32(info.smallest_normal)
        shift = jnp.where(size < tiny, tiny, jnp.zeros_like(size))
        shifted = lax.bitcast_convert_type(size + shift, jnp.uint32) + noise
        kept = lax.bitcast_convert_type(shifted & np.uint32(0xFFFFFFFF & ~cut), jnp.float32)
        rounded = lax.bitcast_convert_type(kept - shift, jnp.uint32)
    largest = np.float32(info.max).view(np.uint32)
    result = lax.bitcast_convert_type(jnp.minimum(rounded, largest) | sign, jnp.float32)
    return jnp.where(jnp.isfinite(x), result, x).astype(dtype)
