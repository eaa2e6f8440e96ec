"""Norms that are right for every finite input, in one pass over memory.

A sum of squares in float32 overflows from 1.8e19 on and loses small numbers below
1e-19. Both are noticed from the sum itself, and only then is a second pass taken, over
the input times a power of two, so that ordinary gradients pay nothing.

    norm(tree) = norm_of_rescaled / rescale,        rescale in {2**-k, 1, 2**k}

The pair is kept apart where it matters: the norm of finite float32 numbers can itself
exceed float32, and a clip coefficient still has to come out right.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxclip._checks import check_choice, compute_dtype, is_clippable

__all__ = [
    "MeasuredNorm",
    "RescaledNorm",
    "global_norm",
    "rescaled_global_norm",
    "unit_and_modulus",
]


class MeasuredNorm(NamedTuple):
    """The norm of a tree, to be used again where that same tree comes by.

    Attributes:
      tree: What was measured.
      norm: Its `RescaledNorm`.
      ord: Which norm.
      axis_name: The mapped axis that it was taken over, if any.
    """

    tree: Any
    norm: "RescaledNorm"
    ord: float = 2
    axis_name: str | None = None

    def is_of(self, tree: Any, ord: float, axis_name: str | None) -> bool:
        """Whether this is that norm of the very arrays in `tree`."""
        if (self.ord, self.axis_name) != (ord, axis_name):
            return False
        mine, theirs = jax.tree.leaves(self.tree), jax.tree.leaves(tree)
        pairs = zip(mine, theirs, strict=False)
        return len(mine) == len(theirs) and all(a is b for a, b in pairs)


class RescaledNorm(NamedTuple):
    """A norm as two factors, `norm / rescale`, that cannot overflow or underflow.

    Attributes:
      norm: Scalar, the norm of the tree times `rescale`.
      rescale: Scalar power of two; 1 for ordinary magnitudes.
    """

    norm: jax.Array
    rescale: jax.Array


def global_norm(tree: Any, *, ord: float = 2, axis_name: str | None = None) -> jax.Array:
    """Returns the norm of all floating entries of a tree taken as one vector.

    `(sum |x|**ord) ** (1 / ord)`, or `max |x|` for `ord=inf`. Every leaf is accumulated in
    float32 (float64 leaves in float64) whatever its dtype, and magnitudes whose squares
    overflow or underflow are rescaled. Integer, bool, float0 and key leaves do not count.

    Args:
      tree: Any pytree of arrays; complex entries count by modulus.
      ord: 1, 2 or inf.
      axis_name: Mapped axis to reduce over inside `shard_map`, `pmap` or `vmap`. Under
        `jit` on sharded arrays leave it None: the norm is global already.

    Returns:
      A float32 scalar (float64 if a leaf is float64). 0 for an empty tree; inf if the norm
      exceeds the dtype or an entry is infinite; NaN if an entry is. Float32 subnormals
      count as 0 where the backend flushes them (XLA on CPU does).

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> global_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)})
      Array(5., dtype=float32)
      >>> global_norm(jnp.full(4, 300.0, jnp.float16))
      Array(600., dtype=float32)

    References:
      James L. Blue, A Portable Fortran Program to Find the Euclidean Norm of a Vector,
      1978, https://doi.org/10.1145/355769.355771
    """
    norm, rescale = rescaled_global_norm(tree, ord=ord, axis_name=axis_name)
    return norm / rescale


def rescaled_global_norm(
    tree: Any, *, ord: float = 2, axis_name: str | None = None
) -> RescaledNorm:
    """Returns `global_norm` as a norm and a power-of-two rescale that divides it.

    Args:
      tree: As in `global_norm`.
      ord: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A `RescaledNorm`: finite whenever every entry of `tree` is.

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> norm, rescale = rescaled_global_norm(jnp.full(16, 3e38))
      >>> bool(jnp.isfinite(norm)), float(rescale) == 2.0**-90
      (True, True)
    """
    check_choice("ord", ord, (1, 2, 1.0, 2.0, float("inf")))
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_clippable(x)]
    return _rescaled_norm(leaves, float(ord), axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _rescaled_norm(leaves: list[jax.Array], ord: float, axis_name: str | None) -> RescaledNorm:
    return _measure(leaves, ord, axis_name)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _measure(leaves: list[jax.Array], ord: float, axis_name: str | None) -> RescaledNorm:
    dtype, power, floor = _range_of(leaves)

    def rescale_for(total: jax.Array) -> jax.Array:
        # A NaN fails both comparisons and goes straight through.
        rescale = jnp.where(total > jnp.finfo(dtype).max, 2.0**-power, jnp.ones((), dtype))
        return jnp.where(total < floor, 2.0**power, rescale) if ord == 2 else rescale

    # A loop that ends after its first round for ordinary magnitudes. The program holds the
    # reductions once, where a branch for the second round would hold them twice.
    def another_round(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rescale, _, num_rounds = carry
        total = _accumulate(leaves, rescale, dtype, ord, axis_name)
        better = jnp.where(num_rounds == 0, rescale_for(total), rescale)
        return better, total, num_rounds + jnp.where(better == rescale, 2, 1)

    zero = _zero_like_total(leaves, dtype, axis_name)
    start = (zero + 1, zero, zero.astype(jnp.int32))
    rescale, total, _ = lax.while_loop(lambda carry: carry[2] < 2, another_round, start)
    return RescaledNorm(jnp.sqrt(total) if ord == 2 else total, rescale)


@_rescaled_norm.defjvp
def _rescaled_norm_jvp(
    ord: float, axis_name: str | None, primals: Any, tangents: Any
) -> tuple[RescaledNorm, RescaledNorm]:
    """`d norm = sum(x * dx) / norm` for ord 2; 0 at 0, so that a clip there is the identity."""
    leaves, changes = primals[0], tangents[0]
    norm, rescale = _rescaled_norm(leaves, ord, axis_name)
    divisor = jnp.where(norm > 0, norm, jnp.ones_like(norm))
    total = jnp.zeros_like(norm)
    for x, dx in zip(leaves, changes, strict=True):
        slope = _slope(x, norm, rescale, divisor, ord)
        product = slope * (dx.astype(slope.dtype) * rescale.astype(slope.dtype))
        total += jnp.sum(jnp.real(product))
    total = total if axis_name is None else lax.psum(total, axis_name)
    return RescaledNorm(norm, rescale), RescaledNorm(total, jnp.zeros_like(rescale))


def _slope(
    x: jax.Array, norm: jax.Array, rescale: jax.Array, divisor: jax.Array, ord: float
) -> jax.Array:
    """Derivative of the rescaled norm by each rescaled entry (conjugated if complex)."""
    wide = compute_dtype(x.dtype)
    scaled = jnp.conj(x.astype(wide)) * rescale.astype(wide)
    if ord == 2:
        return scaled / divisor.astype(wide)
    modulus = jnp.abs(scaled)
    direction = scaled / jnp.where(modulus > 0, modulus, jnp.ones_like(modulus)).astype(wide)
    return direction if ord == 1 else direction * (modulus == norm).astype(wide)


def _range_of(leaves: list[jax.Array]) -> tuple[Any, int, float]:
    """What to accumulate in; a power of two that brings its largest and smallest magnitudes
    to squares that neither overflow (for up to 2**50 entries) nor sink below the normal
    range; and the sum of squares below which some of them may have sunk."""
    if any(x.dtype in (jnp.float64, jnp.complex128) for x in leaves):
        return jnp.float64, 540, 2.0**-800
    return jnp.float32, 90, 2.0**-64


def _zero_like_total(leaves: list[jax.Array], dtype: Any, axis_name: str | None) -> jax.Array:
    """0, which inside `shard_map` varies over the mesh axes that the total varies over."""
    zero = jnp.zeros((), dtype)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return zero
    for x in leaves:  # from no entries at all, or from one, so that nothing is computed
        one = jnp.sum(x[..., :0]) if x.ndim else jnp.where(x == x, 0, 0)
        zero += jnp.real(one).astype(dtype)
    return zero if axis_name is None else lax.psum(zero, axis_name)


def _accumulate(
    leaves: list[jax.Array], rescale: jax.Array, dtype: Any, ord: float, axis_name: str | None
) -> jax.Array:
    """Sum of |x * rescale|**ord, or the largest |x * rescale|, over leaves and devices."""

    def leaf_total(x: jax.Array) -> jax.Array:
        parts = [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]
        parts = [p.astype(dtype) * rescale for p in parts]
        if ord == 2:
            squares = [jnp.square(p) for p in parts]
            return jnp.sum(squares[0] if len(squares) == 1 else squares[0] + squares[1])
        modulus = jnp.abs(parts[0]) if len(parts) == 1 else jnp.hypot(*parts)
        return jnp.sum(modulus) if ord == 1 else jnp.max(modulus, initial=0)

    add, reduce_devices = (jnp.add, lax.psum) if ord < float("inf") else (jnp.maximum, lax.pmax)
    totals = [leaf_total(x) for x in leaves] or [jnp.zeros((), dtype)]
    while len(totals) > 1:  # in pairs, so that rounding grows with the logarithm of their number
        pairs = zip(totals[::2], totals[1::2], strict=False)
        totals = [add(*pair) for pair in pairs] + totals[len(totals) // 2 * 2 :]
    total = totals[0]
    return total if axis_name is None else reduce_devices(total, axis_name)


def unit_and_modulus(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `z / |z|` and `|z|` of complex numbers, without overflow or underflow.

    Args:
      z: Complex array.

    Returns:
      `z / |z|` in the dtype of `z` (0 where z is 0 or not finite), and `|z|` in the real
      dtype (inf where it exceeds the dtype).

    Example:
      >>> unit, modulus = unit_and_modulus(jnp.array([3e38 + 3e38j, 0]))
      >>> print(jnp.round(unit, 3), modulus)
      [0.707+0.707j 0.   +0.j   ] [inf  0.]
    """
    real, imag = jnp.real(z), jnp.imag(z)
    largest = jnp.maximum(jnp.abs(real), jnp.abs(imag))
    ordinary = (largest > 0) & jnp.isfinite(largest)
    divisor = jnp.where(ordinary, largest, jnp.ones_like(largest))
    real, imag = real / divisor, imag / divisor
    length = jnp.sqrt(jnp.where(ordinary, real * real + imag * imag, jnp.ones_like(real)))
    unit = jnp.where(ordinary, lax.complex(real / length, imag / length), jnp.zeros_like(z))
    return unit, jnp.where(ordinary, length * largest, largest)
