"""Scaling a tree or a leaf down to a norm: by `min(1, bound / (norm + eps))`.

One coefficient in float32 (float64 for float64 leaves) and one cast. Half precision is rounded
towards zero, so that the bound holds in exact arithmetic on the values that come out. At or below
the bound the output is the input, bit for bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    FLOAT32_MAX,
    Spread,
    compute_dtype,
    keep_weak_type,
    not_folded,
    rescale_for,
    round_toward_zero,
    select,
)
from jaxclip._core.trees import PyTree, is_clippable, map_clippable
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.of_trees import MeasuredNorm, measure_norm, rescaled_global_norm


class NormClip(NamedTuple):
    """Outcome of a clip by norm; scalars, or one entry for each norm.

    The norms and the coefficient mean nothing where `is_bad`.

    Attributes:
      pre_norm: Float32, the norm before, at most the largest float32.
      post_norm: Float32, `clip_coef * pre_norm`.
      clip_coef: Float32 in [0, 1], the coefficient.
      is_clipped: Float32, 1 if the norm was above the bound and the step not bad, else 0.
      is_bad: Bool, True if the norm is not finite or the bound is NaN.
    """

    pre_norm: jax.Array
    post_norm: jax.Array
    clip_coef: jax.Array
    is_clipped: jax.Array
    is_bad: jax.Array


class Scaling(NamedTuple):
    """Factors for a leaf, applied one after the other; arrays that broadcast against it.

    Attributes:
      coef: The coefficient for the rescaled leaf, or a part of it; NaN where `is_bad`.
      rest: The other part where the coefficient is below the normal range; else 1. None if it is
        never below.
      rescale: Power of two that brings the leaf to ordinary magnitudes; 1 for these, and 0 where
        the leaf is not scaled.
      keeps_bits: Bool, True where the leaf comes back as it is.
      is_bad: Bool, True where zeros come back.
    """

    coef: jax.Array
    rest: jax.Array | None
    rescale: jax.Array
    keeps_bits: jax.Array
    is_bad: jax.Array

    @classmethod
    def create(cls, coef: jax.Array, rest: jax.Array | None, rescale: jax.Array) -> "Scaling":
        """Returns the scaling by these factors."""
        # Each condition is one comparison, because XLA repeats it in the kernel of every leaf.
        return cls(coef, rest, rescale, rescale == 0, jnp.isnan(coef))

    def divided(self) -> "Scaling":
        """Returns this scaling, divided by a 1 that XLA does not know."""
        # It copies cheaper operations into the kernel of every leaf.
        one = not_folded(jnp.ones_like(self.coef))
        rest = None if self.rest is None else self.rest / one
        return Scaling.create(self.coef, rest, self.rescale / one)


def as_bound(value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Returns a bound rounded towards zero in a real dtype; below 0 counts as 0."""
    return jnp.maximum(jnp.asarray(round_toward_zero(value, dtype)), 0)


def bound_at(
    name: str,
    given: ArrayLike | optax.Schedule,
    step: jax.Array,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Returns `as_bound` of a number, or of a schedule's value at a step."""
    return as_bound(checks.value_at(name, given, step), dtype)


def scaling_to(
    norm: RescaledNorm, bound: ArrayLike, eps: ArrayLike = 0.0
) -> tuple[Scaling, NormClip]:
    """Returns the scaling that brings norms of any shape down to a bound, and its outcome."""
    size, rescale = norm
    info = jnp.finfo(size.dtype)
    has_eps = not isinstance(eps, (int, float)) or eps != 0
    # This norm decides and divides; telemetry reports `size` itself.
    padded = size + jnp.asarray(eps).astype(size.dtype) * rescale if has_eps else size
    # A rescaled norm is far below the largest number, so this quotient is in the normal range.
    is_known = isinstance(bound, (int, float, np.ndarray, np.generic))
    is_large = not has_eps and is_known and bool(np.all(bound >= 2.0**-20))
    bound, ones = as_bound(bound, size.dtype), jnp.ones_like(size)
    # Compared without dividing by `rescale`, so that neither side overflows.
    is_above = padded > bound * rescale
    is_bad = ~jnp.isfinite(size) | jnp.isnan(bound)
    bound = select(is_above, bound, ones)
    divisor = select(is_above & ~is_bad, padded, ones)
    # The margin covers the rounding of the norm, the quotient and the products.
    margin = select(is_above, jnp.full_like(size, 1 - 8 * float(info.eps)), ones)
    # Below the normal range the coefficient is applied as two factors, each within it.
    is_normal = None if is_large else ~(bound < divisor * (2 * float(info.tiny)))
    dividend = margin * (bound if is_normal is None else select(is_normal, bound, ones))
    # Divided last: XLA copies cheaper operations on scalars into the kernel of every leaf.
    coef = select(is_bad, jnp.full_like(size, jnp.nan), dividend) / divisor
    rest = None if is_normal is None else select(is_normal, ones, bound)
    scaling = Scaling.create(coef, rest, select(is_above, rescale, jnp.zeros_like(size)))

    def times_rest(x: jax.Array) -> jax.Array:
        return x if rest is None else x * rest

    pre_norm = jnp.minimum(size / rescale, FLOAT32_MAX)
    post_norm = jnp.minimum(times_rest(size * coef), FLOAT32_MAX)
    return scaling, NormClip(
        pre_norm=pre_norm.astype(jnp.float32),
        post_norm=select(is_above, post_norm, pre_norm).astype(jnp.float32),
        clip_coef=times_rest(select(is_above, rescale, ones) * coef).astype(jnp.float32),
        is_clipped=(is_above & ~is_bad).astype(jnp.float32),
        is_bad=is_bad,
    )


def norm_of(
    updates: optax.Updates,
    given: MeasuredNorm | ArrayLike | None = None,
    ord: float = 2,
    axis_name: str | None = None,
) -> tuple[RescaledNorm, jax.Array | None]:
    """Returns the norm of a tree and those of its leaves, which are None if `given` is a number."""
    # A `given` norm is used if it was measured on these very updates.
    if given is None or isinstance(given, MeasuredNorm):
        if given is None or not given.is_of(updates, ord, axis_name):
            given = measure_norm(updates, ord=ord, axis_name=axis_name)
        return given.norm, given.leaf_norms
    # As the norm of that number, which rescales it where its square would overflow.
    dtype = None if is_clippable(given) else jnp.float32
    return rescaled_global_norm(jnp.asarray(given, dtype)), None


def norm_of_norms(norms: jax.Array) -> jax.Array:
    """Returns the 2-norm of a vector of norms, whose squares may overflow or underflow."""
    rescale = rescale_for(jnp.max(norms, initial=0))
    return jnp.sqrt(jnp.sum(jnp.square(norms * rescale))) / rescale


def clip_to_norm(
    tree: PyTree, norm: RescaledNorm, bound: ArrayLike, eps: ArrayLike = 0.0
) -> tuple[PyTree, NormClip]:
    """Scales a tree with a known norm down to a bound; zeros if the step is bad."""
    scaling, clip = scaling_to(norm, bound, eps)
    factors = jax.tree.map(Spread, scaling.divided())

    def scale(g: jax.Array) -> jax.Array:
        return scale_leaf(g, jax.tree.map(lambda factor: factor.like(g), factors))

    return map_clippable(scale, tree), clip


def zero_if(condition: jax.Array, tree: PyTree) -> PyTree:
    """Returns a tree with zeros in its floating leaves where a condition holds."""

    def zero_leaf(g: jax.Array) -> jax.Array:
        return keep_weak_type(select(condition, jnp.zeros_like(g), g), g)

    return map_clippable(zero_leaf, tree)


# Jitted, so that leaves of one shape share one trace.
@jax.jit
def scale_leaf(g: jax.Array, scaling: Scaling) -> jax.Array:
    """Scales a leaf in its own dtype, half precision towards zero."""
    # A float32 leaf in a tree with float64 ones: the factors of their norm need not fit float32.
    real = jnp.finfo(compute_dtype(g.dtype, scaling.coef.dtype)).dtype

    def scale(x: jax.Array) -> jax.Array:
        scaled = x.astype(real)
        for factor in (scaling.rescale, scaling.coef, scaling.rest):
            scaled = scaled if factor is None else scaled * factor.astype(real)
        return round_toward_zero(scaled, x.dtype) if real != x.dtype else scaled

    if jnp.iscomplexobj(g):
        scaled = lax.complex(scale(jnp.real(g)), scale(jnp.imag(g)))
    else:
        scaled = scale(g)
    kept = select(scaling.keeps_bits, g, scaled)
    return keep_weak_type(select(scaling.is_bad, jnp.zeros_like(g), kept), g)
