"""Clips each entry of the gradient by itself."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxclip._core import floats, trees
from jaxclip._core.floats import (
    compute_dtype,
    exceeds,
    increment,
    keep_weak_type,
    not_folded,
    phase_and_modulus,
    round_toward_zero,
)
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold


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
        leaves = [(jnp.asarray(g), b) for g, b in pairs if trees.is_clippable(g)]
        clipped = [_clip_entries(g, _entry_bound(g, b)) for g, b in leaves]
        counts = jnp.stack([jnp.zeros((), jnp.float32), *(n for _, n in clipped)])
        num_clipped = jnp.sum(counts)
        is_bad = jnp.isnan(num_clipped) | floats.has_nan([b for _, b in leaves])
        num_entries = max(sum(g.size for g, _ in leaves), 1)
        return trees.replace_floating(updates, [g for g, _ in clipped]), ClipByValueState(
            step=increment(state.step),
            clip_rate=jnp.where(is_bad, state.clip_rate, num_clipped / num_entries),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
        num_clipped = jnp.sum(jnp.abs(g) > bound, dtype=jnp.float32) + floats.zero_or_nan(g)
        unit, modulus = phase_and_modulus(g)
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
