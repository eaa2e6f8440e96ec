"""Clipping leaf by leaf, or unit by unit: each part by its own norm.

A unit is what has a norm of its own: a leaf, one layer of a stacked leaf, or the weights
into one output. A step with a NaN or an infinity anywhere gives zeros for all leaves and is
counted in `num_nonfinite`, as by `clip_by_global_norm`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxclip._core import checks, trees
from jaxclip._core.floats import (
    FLOAT32_MAX,
    compute_dtype,
    increment,
    round_toward_zero,
)
from jaxclip._core.trees import floating_leaves, replace_floating
from jaxclip.norms.magnitudes import RescaledNorm
from jaxclip.norms.of_trees import rescaled_global_norm
from jaxclip.norms.of_units import MeasuredUnits, join_units, measure_units
from jaxclip.norms.scaling import scale_leaf, scaling_to
from jaxclip.norms.state import LeafReport
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold


class _State(NamedTuple):
    """What the clips of this room keep.

    Attributes:
      step: Scalar int32, steps so far.
      pre_norm: Scalar float32, global norm of the last finite updates before the clip.
      post_norm: Scalar float32, the same after the clip; 0 after a bad step.
      clip_coef: Scalar float32 in [0, 1], `post_norm / pre_norm`; 0 after a bad step.
      clip_rate: Scalar float32, share of the units that the last step clipped.
      num_nonfinite: Scalar int32, steps so far with a NaN or infinity.
      leaves: A `LeafReport`.
    """

    step: jax.Array
    pre_norm: jax.Array
    post_norm: jax.Array
    clip_coef: jax.Array
    clip_rate: jax.Array
    num_nonfinite: jax.Array
    leaves: LeafReport


class ClipByLeafNormState(_State):
    """State of `clip_by_leaf_norm`; a unit is a leaf, or one layer of it."""


class ClipByBlockRmsState(_State):
    """State of `clip_by_block_rms`; a unit is a leaf."""


def clip_by_leaf_norm(
    max_norm: Any, *, stacked_axes: int | None = None, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf by a coefficient of its own so that its norm is at most `max_norm`.

    `g <- g * min(1, max_norm / norm(g))`, leaf by leaf.

    Args:
      max_norm: A threshold (number in [0, inf], traced scalar, schedule, rule, or prefix
        tree of these), in the units of the gradient.
      stacked_axes: How many leading axes stack layers (scan over layers): each layer is
        then clipped by itself. None is 0 (a number by default would be traced under
        `optax.inject_hyperparams`).
      axis_name: Mapped axis to take the norms over inside `shard_map` or `pmap`. Under
        `jit` on sharded arrays leave it None.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The norm of each
      unit is at most `max_norm` in exact arithmetic; units at or below it come back
      bit-identical; a bad step gives zeros.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN, or `stacked_axes` not a count.

    Example:
      >>> tx = clip_by_leaf_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> clipped, state = tx.update(grads, tx.init(grads))
      >>> print(clipped["w"].round(3), clipped["b"], state.clip_rate)
      [0.6 0.8] [0.5] 0.5

    References:
      Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2013,
      https://arxiv.org/abs/1211.5063
    """
    check_threshold_tree("max_norm", max_norm)
    num_stacked = 0 if stacked_axes is None else stacked_axes
    if num_stacked != 0:
        checks.check_count("stacked_axes", num_stacked)

    def terms_for(updates, params, step):
        del params
        return [_scalar_bounds("max_norm", resolve_threshold(max_norm, updates, step), updates)]

    def axes_of(shape):
        return tuple(range(min(num_stacked, len(shape)), len(shape)))

    return _unit_clip(ClipByLeafNormState, axes_of, terms_for, _bound_as_given, axis_name)


def clip_by_block_rms(
    threshold: Any, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that the root mean square of its entries is at most `threshold`.

    `g <- g * min(1, threshold / rms(g))`, leaf by leaf. As `optax.clip_by_block_rms`, and right
    where that is not: a threshold of 0, half precision, very large or small entries.

    Args:
      threshold: As `max_norm` of `clip_by_leaf_norm`.
      axis_name: As in `clip_by_leaf_norm`; leaves are then parts of equal size.

    Returns:
      A transform, as `clip_by_leaf_norm`.

    Raises:
      TypeError: If a threshold is of a wrong type.
      ValueError: If a concrete threshold is negative or NaN.

    Example:
      >>> tx = clip_by_block_rms(1.0)
      >>> grads = jnp.array([3.0, 3.0, 3.0, 3.0])
      >>> print(tx.update(grads, tx.init(grads))[0].round(3))
      [1. 1. 1. 1.]

    References:
      Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost,
      2018, https://arxiv.org/abs/1804.04235
    """
    check_threshold_tree("threshold", threshold)

    def terms_for(updates, params, step):
        del params
        given = resolve_threshold(threshold, updates, step)
        num_devices = 1 if axis_name is None else lax.psum(1, axis_name)
        # Rounded down, so that the root of the size takes nothing over the bound.
        sizes = [max(np.size(g), 1) * num_devices for g in floating_leaves(updates)]
        roots = [np.nextafter(np.float32(size**0.5), np.float32(0)) for size in sizes]
        return [_scalar_bounds("threshold", given, updates), roots]

    return _unit_clip(ClipByBlockRmsState, _all_axes, terms_for, _bound_times_root, axis_name)


# --- Bounds ---------------------------------------------------------------------------
# From the norm of a unit and the terms of a clip, for one leaf, or for a vector of all units.


def _bound_as_given(norm: RescaledNorm, limit: jax.Array) -> jax.Array:
    return limit.astype(norm.norm.dtype)


def _bound_times_root(norm: RescaledNorm, limit: jax.Array, root: jax.Array) -> jax.Array:
    return limit.astype(norm.norm.dtype) * root.astype(norm.norm.dtype)


# --- Parts ----------------------------------------------------------------------------


def _unit_clip(
    state_type: Any,
    axes_of: Callable[[tuple[int, ...]], tuple[int, ...]],
    terms_for: Callable[[Any, Any, jax.Array], list[list[Any]]],
    bound_of: Callable[..., jax.Array],
    axis_name: str | None,
) -> optax.GradientTransformationExtraArgs:
    """A transform that clips each unit to a bound.

    `terms_for(updates, params, step)` gives lists with an entry for each leaf, a scalar or a
    `MeasuredUnits`, from which `bound_of` computes the bound.
    """

    def init_fn(params):
        floats = {n: jnp.zeros((), jnp.float32) for n in ("pre_norm", "post_norm", "clip_rate")}
        counts = {n: jnp.zeros((), jnp.int32) for n in ("step", "num_nonfinite")}
        coef, leaves = jnp.ones((), jnp.float32), LeafReport.create(params)
        return state_type(**floats, **counts, clip_coef=coef, leaves=leaves)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        leaves = [jnp.asarray(g) for g in floating_leaves(updates)]
        terms = terms_for(updates, params, state.step)
        units = [measure_units(g, axes_of(g.shape), axis_name=axis_name) for g in leaves]
        counts = np.array([u.total.size for u in units], int)
        # What is reported comes from all units at once; a leaf is scaled by its own alone.
        norm = join_units(units)
        joined = [_join_terms(term, counts) for term in terms] if leaves else []
        bounds = bound_of(norm, *joined) if leaves else norm.norm
        clip = scaling_to(norm, bounds)[1]
        is_bad = jnp.any(clip.is_bad)
        clipped = [
            _clip_leaf(bound_of, g, u.norm, is_bad, *map(_norm_or_scalar, leaf_terms))
            for g, u, *leaf_terms in zip(leaves, units, *terms, strict=True)
        ]
        pre, post = _length(clip.pre_norm), _length(clip.post_norm)
        coef = jnp.where(pre > 0, jnp.minimum(post / pre, 1), 1)
        return replace_floating(updates, clipped), state_type(
            step=increment(state.step),
            pre_norm=jnp.where(is_bad, state.pre_norm, pre),
            post_norm=jnp.where(is_bad, 0, post),
            clip_coef=jnp.where(is_bad, 0, coef),
            clip_rate=jnp.where(is_bad, 0, jnp.sum(clip.is_clipped) / max(norm.norm.size, 1)),
            num_nonfinite=increment(state.num_nonfinite, is_bad),
            leaves=state.leaves.update(_leaf_norms(norm, clip.pre_norm, counts), is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, static_argnums=0)
def _clip_leaf(
    bound_of: Any, g: jax.Array, norm: RescaledNorm, is_bad: jax.Array, *terms: Any
) -> jax.Array:
    """Jitted, so that leaves of one shape share one trace."""
    return scale_leaf(g, scaling_to(norm, bound_of(norm, *terms))[0], is_bad)


def _norm_or_scalar(term: Any) -> Any:
    return term.norm if isinstance(term, MeasuredUnits) else term


def _join_terms(terms: list[Any], counts: np.ndarray) -> Any:
    """An entry for each unit; one for all where that is the same array."""
    if isinstance(terms[0], MeasuredUnits):
        return join_units(terms)
    if all(term is terms[0] for term in terms):
        return terms[0]
    if not any(isinstance(term, jax.Array) for term in terms):
        return np.repeat(np.array(terms), counts)
    dtype = max((term.dtype for term in terms), key=lambda dtype: dtype.itemsize)
    entries = [
        jnp.broadcast_to(jnp.asarray(t, dtype), n) for t, n in zip(terms, counts, strict=True)
    ]
    return jnp.concatenate(entries)


def _leaf_norms(norm: RescaledNorm, sizes: jax.Array, counts: np.ndarray) -> jax.Array:
    """The norm of each leaf from those of its units; NaN where an entry is not finite."""
    sizes = jnp.where(jnp.isfinite(norm.norm), sizes, jnp.nan)
    if np.all(counts == 1):
        return sizes
    leaf = np.repeat(np.arange(counts.size), counts)
    add_up = functools.partial(
        jax.ops.segment_sum, num_segments=counts.size, indices_are_sorted=True
    )
    largest = jax.ops.segment_max(sizes, leaf, counts.size, indices_are_sorted=True)
    largest = jnp.maximum(largest, 0)  # of a leaf without units
    scaled = sizes / jnp.where(largest > 0, largest, 1)[leaf]
    norms = largest * jnp.sqrt(add_up(scaled * scaled, leaf))
    norms = jnp.minimum(norms, FLOAT32_MAX)
    is_nan = add_up(jnp.isnan(sizes).astype(jnp.float32), leaf) > 0
    return jnp.where(is_nan, jnp.nan, norms)


def _length(norms: jax.Array) -> jax.Array:
    """Norm of a vector of norms, at most the largest float32."""
    norm = rescaled_global_norm(norms).value()
    return jnp.minimum(norm, FLOAT32_MAX)


def _all_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(shape)))


def _scalar_bounds(name: str, bounds: Any, updates: Any) -> list[Any]:
    """The thresholds of the floating leaves; raises unless each is one number."""
    found = []
    pairs = zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(bounds), strict=True)
    for (path, leaf), bound in pairs:
        if not trees.is_clippable(leaf):
            continue
        if np.size(bound) != 1:
            where = trees.path_name(path)
            raise ValueError(
                f"{name} must be one number for a leaf; at '{where}' it has {np.shape(bound)}."
            )
        if not isinstance(bound, jax.Array):  # exactly, as long as it is a number
            dtype = jnp.finfo(compute_dtype(jnp.asarray(leaf).dtype)).dtype
            bound = round_toward_zero(bound, dtype)
        found.append(bound if np.ndim(bound) == 0 else jnp.reshape(bound, ()))
    return found
