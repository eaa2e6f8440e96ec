"""Gradient clipping with a threshold the user gives.

Every clip multiplies by one float32 coefficient and casts once. Float16 and bfloat16
results are rounded towards zero, so that a bound holds in exact arithmetic on the values
that come out; at or below the threshold the output is the input, bit for bit.

A step whose gradient holds a NaN or an infinity is a bad step: a clip by norm returns
zeros for all leaves and counts it in `num_nonfinite`; an element-wise clip bounds the
infinities, zeroes the NaNs, and counts it too. To leave the optimizer's state untouched
as well, use `make_train_step`, which skips the whole step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import trees
from jaxclip._core.floats import (
    FLOAT32_MAX,
    compute_dtype,
    keep_weak_type,
    round_toward_zero,
)
from jaxclip._core.trees import map_clippable
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.of_trees import MeasuredNorm, measure_norm, rescaled_global_norm

# --- Scaling to a norm ----------------------------------------------------------------


class NormClip(NamedTuple):
    """What a clip by norm does; scalars, or one entry for each norm.

    Attributes:
      pre_norm: Float32, the norm before, at most the largest float32; not to be used after a
        bad step.
      post_norm: Float32, `clip_coef * pre_norm`; 0 after a bad step.
      clip_coef: Float32 in [0, 1], what is multiplied with; 0 after a bad step.
      is_clipped: Float32, 1 if the norm was above the bound and the step not bad, else 0.
      is_bad: Bool, whether the norm or the bound was not a number, or the norm infinite.
    """

    pre_norm: jax.Array
    post_norm: jax.Array
    clip_coef: jax.Array
    is_clipped: jax.Array
    is_bad: jax.Array


class Scaling(NamedTuple):
    """How to scale a leaf: arrays of one shape, which broadcasts against the leaf.

    Attributes:
      is_scaled: Bool: multiply by the factors, one after the other, or leave the bits alone.
      rescale: Power of two, which brings the leaf to ordinary magnitudes; 1 for these.
      coef: The coefficient for that, or a part of it.
      rest: 1, but where the coefficient is below the normal range.
    """

    is_scaled: jax.Array
    rescale: jax.Array
    coef: jax.Array
    rest: jax.Array


def scaling_to(norm: RescaledNorm, bound: Any, eps: ArrayLike = 0.0) -> tuple[Scaling, NormClip]:
    """Returns what brings a norm down to a bound: `min(1, bound / (norm + eps))`.

    Args:
      norm: `RescaledNorm` of any shape.
      bound: Number in [0, inf] or array that broadcasts against the norms; below 0 counts as
        0, NaN makes a bad step.
      eps: Added to the norm.

    Returns:
      A `Scaling` and a `NormClip`, of the shape of the norms.

    Example:
      >>> norms = RescaledNorm(jnp.array([2.0, 1.0]), jnp.ones(2))
      >>> scaling, clip = scaling_to(norms, 1.0)
      >>> print(scaling.is_scaled, clip.pre_norm, clip.clip_coef.round(3))
      [ True False] [2. 1.] [0.5 1. ]
    """
    size, rescale = norm
    # The norm that decides and divides; `size` itself stays what telemetry reports.
    padded = size + jnp.asarray(eps).astype(size.dtype) * rescale
    bound = jnp.maximum(jnp.asarray(round_toward_zero(bound, size.dtype)), 0)
    # Compared without dividing by `rescale`, so that neither side overflows.
    is_above = padded > bound * rescale
    is_bad = ~jnp.isfinite(size) | jnp.isnan(bound)
    divisor = jnp.where(is_above & ~is_bad, padded, jnp.ones_like(size))
    # Covers the rounding of the norm, the quotient and the products.
    margin = 1 - 8 * jnp.finfo(size.dtype).eps
    bound = jnp.where(is_above, bound, jnp.ones_like(size))
    coef = bound / divisor * margin
    # Below the normal range it is applied as two factors, each within it.
    is_normal = coef >= jnp.finfo(size.dtype).tiny
    coef, rest = jnp.where(is_normal, coef, margin / divisor), jnp.where(is_normal, 1, bound)
    scaling = Scaling(is_scaled=is_above, rescale=rescale, coef=coef, rest=rest)

    pre_norm = jnp.minimum(size / rescale, FLOAT32_MAX)
    post_norm = bound * (size / divisor * margin)
    post_norm = jnp.minimum(jnp.where(is_above, post_norm, pre_norm), FLOAT32_MAX)
    clip_coef = jnp.where(is_above, rescale * coef * rest, jnp.ones_like(size))
    return scaling, NormClip(
        pre_norm=pre_norm.astype(jnp.float32),
        post_norm=jnp.where(is_bad, 0, post_norm).astype(jnp.float32),
        clip_coef=jnp.where(is_bad, 0, clip_coef).astype(jnp.float32),
        is_clipped=(is_above & ~is_bad).astype(jnp.float32),
        is_bad=is_bad,
    )


def norm_of(
    updates: Any, given: Any = None, ord: float = 2, axis_name: str | None = None
) -> tuple[RescaledNorm, jax.Array | None]:
    """Returns the norm of a tree and of its leaves: as measured already, or measured now.

    Args:
      updates: Pytree of arrays.
      given: None, a `MeasuredNorm`, used if it is of these updates, or a number.
      ord: As in `global_norm`.
      axis_name: As in `global_norm`.

    Returns:
      A `RescaledNorm`, and the norms of the leaves as in `MeasuredNorm`; None for these if a
      number was given.

    Example:
      >>> norm, each = norm_of({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)})
      >>> print(norm.value(), each)
      5.0 [4. 3.]
    """
    if given is None or isinstance(given, MeasuredNorm):
        if given is None or not given.is_of(updates, ord, axis_name):
            given = measure_norm(updates, ord=ord, axis_name=axis_name)
        return given.norm, given.leaf_norms
    # The norm of a number, which is rescaled if need be.
    dtype = None if trees.is_clippable(given) else jnp.float32
    return rescaled_global_norm(jnp.asarray(given, dtype)), None


def clip_to_norm(
    tree: Any, norm: RescaledNorm, bound: Any, eps: ArrayLike = 0.0
) -> tuple[Any, NormClip]:
    """Scales a tree whose norm is known so that its norm is at most `bound`.

    Args:
      tree: Pytree of arrays; leaves that are not floating pass through.
      norm: Its norm, as `rescaled_global_norm` gives it.
      bound: Number in [0, inf] or scalar array; below 0 counts as 0, NaN is a bad step.
      eps: Added to the norm.

    Returns:
      The tree: the input, bit for bit, at or below the bound; else times one coefficient
      with a norm of at most `bound`; zeros if the step is bad. And a `NormClip`.

    Example:
      >>> from jaxclip.norms.of_trees import rescaled_global_norm
      >>> g = jnp.array([3.0, 4.0])
      >>> clipped, clip = clip_to_norm(g, rescaled_global_norm(g), 10.0)
      >>> print(clipped, clip.pre_norm, clip.clip_coef)
      [3. 4.] 5.0 1.0
    """
    scaling, clip = scaling_to(norm, bound, eps)
    return map_clippable(lambda g: scale_leaf(g, scaling, clip.is_bad), tree), clip


@jax.jit
def scale_leaf(g: jax.Array, scaling: Scaling, is_bad: jax.Array) -> jax.Array:
    """Returns a leaf scaled, in its own dtype; half precision is rounded towards zero.

    Jitted, so that leaves of one shape share one trace.

    Args:
      g: Floating array.
      scaling: Scalars, or arrays that broadcast against `g`.
      is_bad: Scalar bool, whether to give zeros instead.

    Returns:
      Array like `g`: unchanged, scaled, or zeros.

    Example:
      >>> g = jnp.array([3.0, 4.0])
      >>> scaling, clip = scaling_to(RescaledNorm(jnp.array(5.0), jnp.array(1.0)), 2.5)
      >>> print(scale_leaf(g, scaling, clip.is_bad).round(2))
      [1.5 2. ]
    """
    # A float32 leaf beside float64 ones: the factors of their norm need not fit float32.
    real = jnp.finfo(compute_dtype(g.dtype, scaling.coef.dtype)).dtype
    factors = [factor.astype(real) for factor in scaling[1:]]

    def scale(x: jax.Array) -> jax.Array:
        scaled = functools.reduce(jnp.multiply, factors, x.astype(real))
        return round_toward_zero(scaled, x.dtype) if real != x.dtype else scaled

    if jnp.iscomplexobj(g):
        scaled = lax.complex(scale(jnp.real(g)), scale(jnp.imag(g)))
    else:
        scaled = scale(g)
    kept = jnp.where(scaling.is_scaled, scaled, g)
    return keep_weak_type(jnp.where(is_bad, jnp.zeros_like(g), kept), g)
