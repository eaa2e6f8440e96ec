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
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip import _checks
from jaxclip._checks import compute_dtype, exceeds, increment, keep_weak_type, map_clippable
from jaxclip.norms import MeasuredNorm, measure_norm, rescaled_global_norm
from jaxclip.rescaling import RescaledNorm, not_folded, unit_and_modulus
from jaxclip.thresholds import (
    check_number_or_schedule,
    check_threshold_tree,
    resolve_threshold,
    round_toward_zero,
)

__all__ = [
    "ClipByGlobalNormState",
    "ClipByValueState",
    "LeafReport",
    "NormClip",
    "Scaling",
    "clip_by_global_norm",
    "clip_by_value",
    "clip_to_norm",
    "norm_of",
    "scale_leaf",
    "scaling_to",
]


class ClipByValueState(NamedTuple):
    """State of `clip_by_value`.

    Attributes:
      step: Scalar int32, steps so far.
      clip_rate: Scalar float32, share of the entries that the last finite step clipped.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
    """

    step: jax.Array
    clip_rate: jax.Array
    num_nonfinite: jax.Array


class LeafReport(NamedTuple):
    """What each leaf had to do with the last steps, for `explain` to read.

    Attributes:
      norms: Float32 vector, the norms of the floating leaves, in order, at the last good step.
      nonfinite_leaf: Scalar int32, which floating leaf was the first not to be finite at the
        last bad step; -1 if there was none.
    """

    norms: jax.Array
    nonfinite_leaf: jax.Array

    @classmethod
    def create(cls, params: Any) -> "LeafReport":
        """Returns the report before the first step."""
        num_leaves = sum(map(_checks.is_clippable, jax.tree.leaves(params)))
        return cls(jnp.zeros((num_leaves,), jnp.float32), jnp.full((), -1, jnp.int32))

    def update(self, leaf_norms: jax.Array | None, is_bad: jax.Array) -> "LeafReport":
        """Returns the report after a step; unchanged if its leaf norms are not known."""
        if leaf_norms is None or leaf_norms.size == 0:
            return self
        is_finite = jnp.isfinite(leaf_norms)
        first = jnp.where(jnp.all(is_finite), -1, jnp.argmin(is_finite).astype(jnp.int32))
        fits = leaf_norms.shape == self.norms.shape
        kept = self.norms if fits else jnp.zeros_like(leaf_norms)
        return LeafReport(
            norms=jnp.where(is_bad, kept, leaf_norms),
            nonfinite_leaf=jnp.where(first >= 0, first, self.nonfinite_leaf),
        )


class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`.

    Attributes:
      step: Scalar int32, steps so far.
      pre_norm: Scalar float32, norm of the last finite gradient before the clip, at most the
        largest float32.
      post_norm: Scalar float32, `clip_coef * pre_norm`; 0 after a bad step.
      clip_coef: Scalar float32 in [0, 1], what the last gradient was multiplied by.
      clip_rate: Scalar float32, share of the steps so far that were clipped.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity in the gradient.
      leaves: A `LeafReport`; unchanged where a `pre_norm` was given as a number.
    """

    step: jax.Array
    pre_norm: jax.Array
    post_norm: jax.Array
    clip_coef: jax.Array
    clip_rate: jax.Array
    num_nonfinite: jax.Array
    leaves: LeafReport


def clip_by_value(max_abs: Any) -> optax.GradientTransformationExtraArgs:
    """Clips every gradient entry to `[-max_abs, max_abs]`.

    `g <- min(max(g, -c), c)`; complex entries are scaled to modulus at most `c`. An
    infinity becomes the bound with its sign; NaN becomes 0.

    Args:
      max_abs: A threshold: number in [0, inf], traced scalar, schedule, rule, or a prefix
        tree of these, in the units of the gradient.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The bound holds
      for `max_abs` as given: it is rounded towards zero into each leaf's dtype.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN.

    Example:
      >>> tx = clip_by_value(1.0)
      >>> grads = jnp.array([-3.0, 0.5, 2.0])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([-1. ,  0.5,  1. ], dtype=float32)
    """
    check_threshold_tree("max_abs", max_abs)

    def init_fn(params):
        del params
        return ClipByValueState(
            step=jnp.zeros((), jnp.int32),
            clip_rate=jnp.zeros((), jnp.float32),
            num_nonfinite=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        bounds = resolve_threshold(max_abs, updates, state.step)
        pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(bounds), strict=True)
        leaves = [(jnp.asarray(g), b) for g, b in pairs if _checks.is_clippable(g)]
        clipped = [_clip_entries(g, _entry_bound(g, b)) for g, b in leaves]
        counts = jnp.stack([jnp.zeros((), jnp.float32), *(n for _, n in clipped)])
        num_clipped = jnp.sum(counts)
        is_bad = jnp.isnan(num_clipped) | _checks.has_nan([b for _, b in leaves])
        num_entries = max(sum(g.size for g, _ in leaves), 1)
        return _checks.replace_floating(updates, [g for g, _ in clipped]), ClipByValueState(
            step=increment(state.step),
            clip_rate=jnp.where(is_bad, state.clip_rate, num_clipped / num_entries),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_by_global_norm(
    max_norm: Any, *, ord: float | None = None, eps: ArrayLike = 0.0, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales all gradients by one coefficient so that their global norm is at most `max_norm`.

    `g <- g * min(1, max_norm / (norm(g) + eps))`. As `optax.clip_by_global_norm`, and right where
    that is not: half-precision and very large or small gradients, `max_norm` 0, a traced
    `max_norm` with bfloat16 gradients.

    Args:
      max_norm: Number in [0, inf], traced scalar (below 0 counts as 0), or schedule, in
        the units of the gradient. A traced NaN makes a bad step.
      ord: 1, 2 or inf; which norm. None is 2 (a number by default would be traced under
        `optax.inject_hyperparams`).
      eps: Added to the norm, not negative; 1e-6 gives PyTorch's `clip_grad_norm_`, which
        also shrinks gradients less than eps below `max_norm`.
      axis_name: Mapped axis to take the norm over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None: the norm is global already.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The norm of the
      result is at most `max_norm` in exact arithmetic; gradients at or below it come back
      bit-identical; a bad step gives zeros. `update(..., pre_norm=n)` takes a norm that is
      known already (a number, or a `norms.MeasuredNorm`, used if it is of these updates).

    Raises:
      TypeError: If `max_norm` is of a wrong type.
      ValueError: If `max_norm` is negative or NaN, `ord` not 1, 2 or inf, or `eps` negative.

    Example:
      >>> tx = clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
      >>> clipped, state = tx.update(grads, tx.init(grads))
      >>> print(f"{clipped['b']:.3f} {state.pre_norm:.3f} {state.post_norm:.3f}")
      0.800 5.000 1.000

    References:
      Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2013,
      https://arxiv.org/abs/1211.5063
    """
    ord = 2 if ord is None else ord
    _checks.check_choice("ord", ord, (1, 2, 1.0, 2.0, float("inf")))
    _checks.check_nonnegative("eps", eps)
    check_number_or_schedule("max_norm", max_norm)
    schedule: Any = max_norm if callable(max_norm) else None

    def init_fn(params):
        # An array for each field: one array twice could not be donated.
        return ClipByGlobalNormState(
            step=jnp.zeros((), jnp.int32),
            pre_norm=jnp.zeros((), jnp.float32),
            post_norm=jnp.zeros((), jnp.float32),
            clip_coef=jnp.ones((), jnp.float32),
            clip_rate=jnp.zeros((), jnp.float32),
            num_nonfinite=jnp.zeros((), jnp.int32),
            leaves=LeafReport.create(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del params
        bound: Any = schedule(state.step) if schedule else max_norm
        norm, each = norm_of(updates, extra_args.get("pre_norm"), ord, axis_name)
        clipped, clip = clip_to_norm(updates, norm, bound, eps)
        step = increment(state.step)
        rate_change = (clip.is_clipped - state.clip_rate) / step.astype(jnp.float32)
        return clipped, ClipByGlobalNormState(
            step=step,
            pre_norm=jnp.where(clip.is_bad, state.pre_norm, clip.pre_norm),
            post_norm=clip.post_norm,
            clip_coef=clip.clip_coef,
            clip_rate=state.clip_rate + rate_change,
            num_nonfinite=increment(state.num_nonfinite, clip.is_bad),
            leaves=state.leaves.update(each, clip.is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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

    largest = float(jnp.finfo(jnp.float32).max)
    pre_norm = jnp.minimum(size / rescale, largest)
    post_norm = bound * (size / divisor * margin)
    post_norm = jnp.minimum(jnp.where(is_above, post_norm, pre_norm), largest)
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
    dtype = None if _checks.is_clippable(given) else jnp.float32
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
      >>> from jaxclip.norms import rescaled_global_norm
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


def _entry_bound(g: jax.Array, bound: Any) -> Any:
    """The bound in the real dtype of `g`; a traced NaN bounds to 0, a bad step."""
    bound = round_toward_zero(bound, jnp.finfo(g.dtype).dtype)
    return jnp.where(jnp.isnan(bound), 0, bound) if isinstance(bound, jax.Array) else bound


@jax.jit
def _clip_entries(g: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leaf with its entries clipped, and how many were; NaN if one was not finite.

    Jitted, so that leaves of one shape share one trace.
    """
    if jnp.iscomplexobj(g):
        num_clipped = jnp.sum(jnp.abs(g) > bound, dtype=jnp.float32) + _checks.zero_or_nan(g)
        unit, modulus = unit_and_modulus(g)
        eps = jnp.finfo(bound.dtype).eps  # the modulus itself is rounded
        inside = (bound * (1 - 4 * eps)).astype(g.dtype)
        is_outside = (modulus >= bound * (1 - 2 * eps)) & jnp.isfinite(bound)
        clipped = jnp.where(is_outside, unit * inside, g)
        clipped = jnp.where(jnp.isfinite(g), clipped, jnp.zeros_like(g))
    else:
        # In arithmetic, for XLA on CPU writes out the conditions that it is to count.
        wide = compute_dtype(g.dtype)
        largest = jnp.asarray(jnp.finfo(wide).max, wide)
        x, limit = not_folded((g.astype(wide), jnp.minimum(bound.astype(wide), largest)))
        excess = jnp.abs(x) - limit
        is_clipped = jnp.sign(excess + jnp.abs(excess)) + (x - x)
        num_clipped = jnp.sum(is_clipped).astype(jnp.float32)
        # Not as a minimum and a maximum: those flush subnormals inside the bound to zero.
        clipped = jnp.where(exceeds(g, bound), jnp.where(g < 0, -bound, bound), g)
        clipped = jnp.where(jnp.isnan(g), jnp.zeros_like(g), clipped)
    return keep_weak_type(clipped, g), num_clipped
