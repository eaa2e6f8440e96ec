"""Norms of trees that are right for every finite input, in one pass over memory.

    norm(tree) = norm_of_rescaled / rescale,        rescale in {2**-k, 1, 2**k}

Sums are in float64. Where that is not to be had, the sum itself shows an overflow, and only then
does a second pass measure the input times a power of two.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxclip._core.checks import check_choice
from jaxclip._core.floats import (
    FLOAT32_MAX,
    has_nonfinite,
    power_of_two,
)
from jaxclip._core.trees import PyTree, floating_leaves
from jaxclip.norms.magnitudes import (
    ORDERS,
    RescaledNorm,
    accumulator,
    better_exponent,
    change_of_norm,
    largest_of,
    over_devices,
    rescaled_total,
    root_of_total,
    root_of_wide_total,
    uses_float64,
    wide_roots,
    wide_total,
    with_float64,
)


class MeasuredNorm(NamedTuple):
    """The norm of a tree, kept so that transforms of that same tree need not measure it again.

    Attributes:
      tree: The tree that was measured.
      norm: Its `RescaledNorm`, of scalars. Only this has a derivative.
      leaf_norms: Float32 vector, the norm of each floating leaf in order, at most the largest
        float32; not finite where an entry is not.
      ord: 1, 2 or inf.
      axis_name: The mapped axis that it was taken over, if any.
    """

    tree: PyTree
    norm: RescaledNorm
    leaf_norms: jax.Array
    ord: float = 2
    axis_name: str | None = None

    def is_of(self, tree: PyTree, ord: float, axis_name: str | None) -> bool:
        """Returns True if this is the same norm of the same array objects."""
        if (self.ord, self.axis_name) != (ord, axis_name):
            return False
        mine, theirs = jax.tree.leaves(self.tree), jax.tree.leaves(tree)
        pairs = zip(mine, theirs, strict=False)
        return len(mine) == len(theirs) and all(a is b for a, b in pairs)


def global_norm(tree: PyTree, *, ord: float = 2, axis_name: str | None = None) -> jax.Array:
    """Returns the norm of all floating entries of a tree taken as one vector.

    `(sum |x|**ord) ** (1 / ord)`, or `max |x|` for `ord=inf`. Sums are in float32 whatever the
    dtype (in float64 for float64 leaves). Magnitudes whose squares overflow or underflow are
    rescaled. Integer, bool, float0 and key leaves do not count.

    Args:
      tree: Any pytree of arrays; complex entries count by modulus.
      ord: 1, 2 or inf.
      axis_name: Mapped axis to reduce over inside `shard_map`, `pmap` or `vmap`. Under
        `jit` on sharded arrays leave it None, because there the norm is global already.

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
    tree: PyTree, *, ord: float = 2, axis_name: str | None = None
) -> RescaledNorm:
    """Returns `global_norm` as two scalars that are finite whenever every entry is."""
    # The norm of finite float32 numbers can itself exceed float32, and a clip coefficient still
    # has to come out right.
    return measure_norm(tree, ord=ord, axis_name=axis_name).norm


def measure_norm(tree: PyTree, *, ord: float = 2, axis_name: str | None = None) -> MeasuredNorm:
    """Returns the norm of a tree with the norms of its leaves, which cost nothing extra.

    For `update(..., pre_norm=measured)` of several transforms in one step: each takes the norm
    from here if it gets these very arrays, and measures its own input otherwise.

    Args:
      tree: Any pytree of arrays; complex entries count by modulus.
      ord: 1, 2 or inf, as in `global_norm`.
      axis_name: Mapped axis to reduce over inside `shard_map`, `pmap` or `vmap`.

    Returns:
      A `MeasuredNorm`; `norm.value()` of it is `global_norm(tree)`.

    Raises:
      ValueError: If `ord` is not 1, 2 or inf.

    Example:
      >>> measured = measure_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)})
      >>> print(measured.norm.value(), measured.leaf_norms)
      5.0 [4. 3.]
    """
    check_choice("ord", ord, ORDERS)
    leaves = [jnp.asarray(x) for x in floating_leaves(tree)]
    norm, norms_of_leaves = _tree_norm(leaves, float(ord), axis_name)
    return MeasuredNorm(tree, norm, norms_of_leaves, ord, axis_name)


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
        return better_exponent(_add_up(totals, ord), ord)

    if not leaves:
        return RescaledNorm(jnp.zeros((), dtype), jnp.ones((), dtype)), jnp.zeros((0,), jnp.float32)
    if uses_float64(dtype):
        return _wide_norm(leaves, ord, axis_name)
    zeros = jnp.zeros((len(leaves),), dtype) + _zero_that_varies(leaves, dtype, axis_name)
    totals, exponent = _in_two_rounds(totals_at, exponent_for, zeros)
    rescale, largest = power_of_two(exponent, dtype), jnp.asarray(FLOAT32_MAX, dtype)
    norms = jnp.minimum(root_of_total(totals, ord) / rescale, largest)
    norms = jnp.where(jnp.isfinite(totals), norms, totals).astype(jnp.float32)
    return RescaledNorm(root_of_total(_add_up(totals, ord), ord), rescale), norms


def _wide_norm(
    leaves: list[jax.Array], ord: float, axis_name: str | None
) -> tuple[RescaledNorm, jax.Array]:
    """Returns the norm of a tree and those of its leaves by sums in float64."""
    with with_float64():
        totals = [wide_total(x, tuple(range(x.ndim)), ord).reshape(1) for x in leaves]
        totals = over_devices(jnp.concatenate(totals), ord, axis_name)
        norms, total = wide_roots(totals, ord)
        return root_of_wide_total(total, ord), norms


@_tree_norm.defjvp
def _tree_norm_jvp(ord: float, axis_name: str | None, primals: tuple, tangents: tuple) -> tuple:
    """Returns `d norm = sum(x * dx) / norm` for ord 2; 0 at 0, so that a clip is the identity."""
    leaves, changes = primals[0], tangents[0]
    norm, norms_of_leaves = _tree_norm(leaves, ord, axis_name)
    total = jnp.zeros_like(norm.norm)
    for x, dx in zip(leaves, changes, strict=True):
        total += jnp.sum(change_of_norm(x, dx, norm, ord))
    total = total if axis_name is None else lax.psum(total, axis_name)
    change = RescaledNorm(total, jnp.zeros_like(norm.rescale))
    return (norm, norms_of_leaves), (change, jnp.zeros_like(norms_of_leaves))


def is_nonfinite(tree: PyTree, given: object = None) -> jax.Array:
    """Returns True if a floating entry is not finite; a `MeasuredNorm` of the tree saves a pass."""
    if isinstance(given, MeasuredNorm) and given.is_of(tree, given.ord, given.axis_name):
        return ~jnp.isfinite(given.norm.norm)
    return has_nonfinite(tree)


def _in_two_rounds(
    totals_at: Callable[[jax.Array], jax.Array],
    exponent_for: Callable[[jax.Array], jax.Array],
    zeros: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the totals at the rescale that suits them, and the sign of its exponent."""
    # A loop, which ends after its first round for ordinary magnitudes. The program holds the
    # reductions once; with a branch for the second round it would hold them twice.

    def another_round(carry: tuple) -> tuple:
        exponent, _, num_rounds = carry
        totals = totals_at(exponent)
        better = jnp.where(num_rounds == 0, exponent_for(totals), exponent)
        return better, totals, num_rounds + jnp.where(better == exponent, 2, 1)

    zero = jnp.zeros_like(exponent_for(zeros))  # varies as the totals do
    start = (zero, zeros, zero)
    exponent, totals, _ = lax.while_loop(lambda carry: carry[2] < 2, another_round, start)
    return totals, exponent


def _add_up(totals: jax.Array, ord: float) -> jax.Array:
    """Returns the sum of a vector, or its largest entry for `ord=inf`; 0 if it is empty."""
    # In pairs: rounding then grows with the logarithm of the number of leaves.
    if ord == np.inf or totals.size == 0:
        return largest_of(totals)
    while totals.size > 1:
        half = totals.size // 2
        rest = totals[2 * half :]
        totals = jnp.concatenate([totals[:half] + totals[half : 2 * half], rest])
    return totals[0]


def _zero_that_varies(
    leaves: list[jax.Array], dtype: DTypeLike, axis_name: str | None
) -> jax.Array:
    """Returns 0, which inside `shard_map` varies over the mesh axes that the totals vary over."""
    zero = jnp.zeros((), dtype)
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return zero
    for x in leaves:  # from at most one entry, so it costs nothing
        one = jnp.sum(x[..., :0]) if x.ndim else jnp.where(x == x, 0, 0)
        zero += jnp.real(one).astype(dtype)
    return zero if axis_name is None else lax.psum(zero, axis_name)
