"""Norms that are right for every finite input, in one pass over memory.

A sum of squares in float32 overflows from 1.8e19 on and loses small numbers below
1e-19. Both are noticed from the sum itself, and only then is a second pass taken, over
the input times a power of two, so that ordinary gradients pay nothing.

    norm(tree) = norm_of_rescaled / rescale,        rescale in {2**-k, 1, 2**k}

The pair is kept apart where it matters: the norm of finite float32 numbers can itself
exceed float32, and a clip coefficient still has to come out right.

Every leaf's own sum is kept on the way to the norm of the tree, as one vector: it costs
nothing, tells which leaf is to blame for a spike, and is added up in pairs, so that rounding
grows with the logarithm of the number of leaves.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._core.checks import check_choice
from jaxclip._core.floats import (
    FLOAT32_MAX,
    has_nonfinite,
    power_of_two,
)
from jaxclip._core.trees import is_clippable
from jaxclip.norms.magnitudes import (
    _ORDERS,
    RescaledNorm,
    _root,
    accumulator,
    change_of_norm,
    largest_of,
    over_devices,
    rescaled_total,
)


class MeasuredNorm(NamedTuple):
    """The norm of a tree, to be used again where that same tree comes by.

    Attributes:
      tree: What was measured.
      norm: Its `RescaledNorm`, of scalars.
      leaf_norms: Float32 vector, the norm of each floating leaf in order, at most the largest
        float32; not finite where an entry is not.
      ord: Which norm.
      axis_name: The mapped axis that it was taken over, if any.
    """

    tree: Any
    norm: RescaledNorm
    leaf_norms: jax.Array
    ord: float = 2
    axis_name: str | None = None

    def is_of(self, tree: Any, ord: float, axis_name: str | None) -> bool:
        """Whether this is that norm of the very arrays in `tree`."""
        if (self.ord, self.axis_name) != (ord, axis_name):
            return False
        mine, theirs = jax.tree.leaves(self.tree), jax.tree.leaves(tree)
        pairs = zip(mine, theirs, strict=False)
        return len(mine) == len(theirs) and all(a is b for a, b in pairs)


# --- Of a tree ------------------------------------------------------------------------


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
    return rescaled_global_norm(tree, ord=ord, axis_name=axis_name).value()


def rescaled_global_norm(
    tree: Any, *, ord: float = 2, axis_name: str | None = None
) -> RescaledNorm:
    """Returns `global_norm` as a norm and a power-of-two rescale that divides it.

    Args:
      tree: As in `global_norm`.
      ord: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A `RescaledNorm` of scalars: finite whenever every entry of `tree` is.

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> norm, rescale = rescaled_global_norm(jnp.full(16, 3e38))
      >>> bool(jnp.isfinite(norm)), float(rescale) == 2.0**-90
      (True, True)
    """
    return measure_norm(tree, ord=ord, axis_name=axis_name).norm


def measure_norm(tree: Any, *, ord: float = 2, axis_name: str | None = None) -> MeasuredNorm:
    """Returns `global_norm` with what was learned on the way: each leaf's norm.

    Args:
      tree: As in `global_norm`.
      ord: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A `MeasuredNorm`. Only its `norm` has a derivative.

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> measured = measure_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)})
      >>> print(measured.norm.value(), measured.leaf_norms)
      5.0 [4. 3.]
    """
    check_choice("ord", ord, _ORDERS)
    norm, leaf_norms_ = _tree_norm(_floating_leaves(tree), float(ord), axis_name)
    return MeasuredNorm(tree, norm, leaf_norms_, ord, axis_name)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _tree_norm(
    leaves: list[jax.Array], ord: float, axis_name: str | None
) -> tuple[RescaledNorm, jax.Array]:
    dtype = accumulator(leaves)
    axes = [tuple(range(x.ndim)) for x in leaves]

    def totals_at(exponent: jax.Array) -> jax.Array:
        rescale, pairs = power_of_two(exponent, dtype), zip(leaves, axes, strict=True)
        totals = [rescaled_total(x, rescale, a, ord).reshape(1) for x, a in pairs]
        return over_devices(jnp.concatenate(totals), ord, axis_name)

    def exponent_for(totals: jax.Array) -> jax.Array:
        return _better_exponent(_add_up(totals, ord), ord)

    if not leaves:
        return RescaledNorm(jnp.zeros((), dtype), jnp.ones((), dtype)), jnp.zeros((0,), jnp.float32)
    zeros = jnp.zeros((len(leaves),), dtype) + _zero_that_varies(leaves, dtype, axis_name)
    totals, exponent = _in_two_rounds(totals_at, exponent_for, zeros)
    rescale, largest = power_of_two(exponent, dtype), jnp.asarray(FLOAT32_MAX, dtype)
    each = jnp.minimum(_root(totals, ord) / rescale, largest)
    each = jnp.where(jnp.isfinite(totals), each, totals).astype(jnp.float32)
    return RescaledNorm(_root(_add_up(totals, ord), ord), rescale), each


@_tree_norm.defjvp
def _tree_norm_jvp(ord: float, axis_name: str | None, primals: Any, tangents: Any) -> tuple:
    """`d norm = sum(x * dx) / norm` for ord 2; 0 at 0, so that a clip there is the identity."""
    leaves, changes = primals[0], tangents[0]
    norm, each = _tree_norm(leaves, ord, axis_name)
    total = jnp.zeros_like(norm.norm)
    for x, dx in zip(leaves, changes, strict=True):
        total += jnp.sum(change_of_norm(x, dx, norm, ord))
    total = total if axis_name is None else lax.psum(total, axis_name)
    change = RescaledNorm(total, jnp.zeros_like(norm.rescale))
    return (norm, each), (change, jnp.zeros_like(each))


def is_nonfinite(tree: Any, given: Any = None) -> jax.Array:
    """Returns whether a floating entry of a tree is not finite.

    Args:
      tree: Any pytree of arrays.
      given: A `MeasuredNorm`, which says so without a pass if it is of this tree; else
        anything, such as None.

    Returns:
      A scalar bool.

    Example:
      >>> print(is_nonfinite({"w": jnp.array([1.0, jnp.inf])}))
      True
    """
    if isinstance(given, MeasuredNorm) and given.is_of(tree, given.ord, given.axis_name):
        return ~jnp.isfinite(given.norm.norm)
    return has_nonfinite(tree)


# --- Parts ----------------------------------------------------------------------------


def _floating_leaves(tree: Any) -> list[jax.Array]:
    return [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_clippable(x)]


def _in_two_rounds(totals_at: Any, exponent_for: Any, zeros: jax.Array) -> tuple[Any, Any]:
    """Totals at the rescale that suits them, and the sign of its exponent.

    A loop that ends after its first round for ordinary magnitudes. The program holds the
    reductions once, where a branch for the second round would hold them twice.
    """

    def another_round(carry: tuple) -> tuple:
        exponent, _, num_rounds = carry
        totals = totals_at(exponent)
        better = jnp.where(num_rounds == 0, exponent_for(totals), exponent)
        return better, totals, num_rounds + jnp.where(better == exponent, 2, 1)

    zero = jnp.zeros_like(exponent_for(zeros))  # varies as the totals do
    start = (zero, zeros, zero)
    exponent, totals, _ = lax.while_loop(lambda carry: carry[2] < 2, another_round, start)
    return totals, exponent


def _better_exponent(totals: jax.Array, ord: float) -> jax.Array:
    """-1 for each total that is too large, 1 for each that may have sunk, else 0 (for NaN)."""
    info = jnp.finfo(totals.dtype)
    # Well within the range for the other norms, so that `1 / norm` is normal, too.
    largest = float(info.max) if ord == 2 else 2.0 ** (info.maxexp // 2)
    exponent = jnp.where(totals > largest, jnp.int32(-1), jnp.int32(0))
    if ord != 2:
        return exponent
    smallest = 2.0**-800 if info.bits == 64 else 2.0**-64
    return jnp.where(totals < smallest, jnp.int32(1), exponent)


def _add_up(totals: jax.Array, ord: float) -> jax.Array:
    """The sum of a vector, in pairs, or its largest entry; 0 if it is empty."""
    if ord == np.inf or totals.size == 0:
        return largest_of(totals)
    while totals.size > 1:
        half = totals.size // 2
        rest = totals[2 * half :]
        totals = jnp.concatenate([totals[:half] + totals[half : 2 * half], rest])
    return totals[0]


def _zero_that_varies(leaves: list[jax.Array], dtype: Any, axis_name: str | None) -> jax.Array:
    """0, which inside `shard_map` varies over the mesh axes that the totals vary over."""
    zero = jnp.zeros((), dtype)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return zero
    for x in leaves:  # from no entries at all, or from one, so that nothing is computed
        one = jnp.sum(x[..., :0]) if x.ndim else jnp.where(x == x, 0, 0)
        zero += jnp.real(one).astype(dtype)
    return zero if axis_name is None else lax.psum(zero, axis_name)
