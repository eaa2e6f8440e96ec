"""Clips each unit of the gradient by its own norm: `g * min(1, bound / norm(g))`.

A unit is a leaf, one layer of a stacked leaf, or the weights into one output. A NaN or an infinity
anywhere gives zeros for all leaves and is counted in `num_nonfinite`, as in `clip_by_global_norm`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    FLOAT32_MAX,
    compute_dtype,
    increment,
    not_folded,
    quotient,
    round_toward_zero,
)
from jaxclip._core.trees import (
    PyTree,
    floating_leaves,
    is_clippable,
    path_name,
    replace_floating,
)
from jaxclip.gradients.state import ClipStats, LeafReport
from jaxclip.norms.magnitudes import RescaledNorm, accumulator
from jaxclip.norms.of_units import MeasuredUnits, join_units, measure_units
from jaxclip.norms.scaling import NormClip, Scaling, norm_of_norms, scale_leaf, scaling_to
from jaxclip.thresholds.values import check_threshold_tree, resolve_threshold

# Inputs of a bound other than the norm: for each leaf a scalar or `MeasuredUnits`.
Terms: TypeAlias = list[Any]


class UnitClipState(NamedTuple):
    """State of the clips by unit.

    Attributes:
      step: Scalar int32, steps so far.
      stats: A `ClipStats`; its norms are global, its `clip_rate` is that of the units at the last
        step.
      leaves: A `LeafReport`.
    """

    keeps_finite = True

    step: jax.Array
    stats: ClipStats
    leaves: LeafReport


class ClipByLeafNormState(UnitClipState):
    """State of `clip_by_leaf_norm`; a unit is a leaf, or one layer of it."""

    transform_name = "clip_by_leaf_norm"


class ClipByBlockRmsState(UnitClipState):
    """State of `clip_by_block_rms`; a unit is a leaf."""

    transform_name = "clip_by_block_rms"


def clip_by_leaf_norm(
    max_norm: PyTree, *, stacked_axes: int | None = None, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf by a coefficient of its own so that its norm is at most `max_norm`.

    `g <- g * min(1, max_norm / norm(g))`, leaf by leaf.

    Args:
      max_norm: A threshold (number in [0, inf], traced scalar, schedule, rule, or prefix
        tree of these), in the units of the gradient; one number per leaf.
      stacked_axes: Number of leading axes that stack layers (scan over layers); each layer is
        then clipped by itself. None is 0 (a number as default would be traced under
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
      >>> print(clipped["w"].round(3), clipped["b"], state.stats.clip_rate)
      [0.6 0.8] [0.5] 0.5

    References:
      Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2013,
      https://arxiv.org/abs/1211.5063
    """
    check_threshold_tree("max_norm", max_norm)
    num_stacked = 0 if stacked_axes is None else stacked_axes
    checks.check_count("stacked_axes", num_stacked, at_least=0)

    def terms_of(updates, params, step):
        del params
        return [_scalar_bounds("max_norm", max_norm, updates, step)]

    def axes_of(shape):
        return tuple(range(min(num_stacked, len(shape)), len(shape)))

    return clip_units(ClipByLeafNormState, axes_of, terms_of, _bound_as_given, axis_name)


def clip_by_block_rms(
    threshold: PyTree, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that the root mean square of its entries is at most `threshold`.

    `g <- g * min(1, threshold / rms(g))`, leaf by leaf. Agrees with `optax.clip_by_block_rms`, and
    is right where that is not: a threshold of 0, half precision, very large or small entries.

    Args:
      threshold: A threshold (number in [0, inf], traced scalar, schedule, rule, or prefix
        tree of these), in the units of the gradient; one number per leaf.
      axis_name: Mapped axis to take the mean over inside `shard_map` or `pmap`, where each
        device holds a part of equal size. Under `jit` on sharded arrays leave it None.

    Returns:
      A transform; shapes, dtypes and weak types of the updates are kept. The root mean square
      of each leaf is at most `threshold` in exact arithmetic; leaves at or below it come back
      bit-identical; a bad step gives zeros.

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

    def terms_of(updates, params, step):
        del params
        bounds = _scalar_bounds("threshold", threshold, updates, step)
        num_devices = 1 if axis_name is None else lax.psum(1, axis_name)
        sizes = [max(np.size(g), 1) * num_devices for g in floating_leaves(updates)]
        return [bounds, [_root_rounded_down(size) for size in sizes]]

    return clip_units(ClipByBlockRmsState, all_axes, terms_of, _bound_times_root, axis_name)


def _root_rounded_down(size: int) -> np.float32:
    """Returns a float32 below `sqrt(size)`: its product with a bound is never too large."""
    return np.nextafter(np.float32(size**0.5), np.float32(0))


# --- Bounds ---------------------------------------------------------------------------
# Computed from the norm and the terms of a clip, for one leaf or for a vector of all units.


def _bound_as_given(norm: RescaledNorm, limit: jax.Array) -> jax.Array:
    return limit.astype(norm.norm.dtype)


def _bound_times_root(norm: RescaledNorm, limit: jax.Array, root: jax.Array) -> jax.Array:
    with np.errstate(over="ignore"):  # a product beyond the range bounds nothing
        return limit.astype(norm.norm.dtype) * root.astype(norm.norm.dtype)


def _scalar_bounds(name: str, threshold: PyTree, updates: optax.Updates, step: jax.Array) -> Terms:
    """Returns the thresholds of the floating leaves; raises unless each is one number."""
    scalars = []
    bounds = resolve_threshold(threshold, updates, step, name=name)
    pairs = zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(bounds), strict=True)
    for (path, leaf), bound in pairs:
        if not is_clippable(leaf):
            continue
        if np.size(bound) != 1:
            raise ValueError(
                f"{name} must be one number per leaf; at {path_name(path)!r} it has shape "
                f"{np.shape(bound)}."
            )
        if not isinstance(bound, jax.Array):  # rounded while its value is still known exactly
            dtype = jnp.finfo(compute_dtype(jnp.asarray(leaf).dtype)).dtype
            bound = round_toward_zero(bound, dtype)
        scalars.append(bound if np.ndim(bound) == 0 else jnp.reshape(bound, ()))
    return scalars


# --- The clip of units ----------------------------------------------------------------


def clip_units(
    state_type: type[UnitClipState],
    axes_of: Callable[[tuple[int, ...]], tuple[int, ...]],
    terms_of: Callable[[optax.Updates, optax.Params | None, jax.Array], list[Terms]],
    bound_of: Callable[..., jax.Array],
    axis_name: str | None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transform that clips the units over `axes_of` a leaf's shape to `bound_of` terms."""

    def init_fn(params):
        return state_type(
            step=jnp.zeros((), jnp.int32),
            stats=ClipStats.create(),
            leaves=LeafReport.create(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        leaves = [jnp.asarray(g) for g in floating_leaves(updates)]
        terms = terms_of(updates, params, state.step)
        units = [measure_units(g, axes_of(g.shape), axis_name=axis_name) for g in _alike(leaves)]
        counts = np.array([u.total.size for u in units], int)
        norm = join_units(units)
        joined = [_join_terms(term, counts) for term in terms] if leaves else []
        bounds = bound_of(norm, *joined) if leaves else norm.norm
        scaling, clip = scaling_to(norm, bounds)
        is_bad = jnp.any(clip.is_bad)
        scaling = scaling.divided()._replace(is_bad=is_bad)
        clipped = [
            _clip_leaf(g, scaling, start, u.norm.norm.shape)
            for g, u, start in zip(leaves, units, _starts(counts), strict=True)
        ]
        leaf_norms = _leaf_norms(norm, clip.pre_norm, counts)
        return replace_floating(updates, clipped), state_type(
            step=increment(state.step),
            stats=_stats_after(state.stats, clip, is_bad),
            leaves=state.leaves.update(leaf_norms, is_bad),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def all_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns every axis of a shape: a unit is a leaf."""
    return tuple(range(len(shape)))


def _alike(leaves: list[jax.Array]) -> list[jax.Array]:
    """Returns the leaves, all in float64 if one is."""
    if accumulator(leaves) == jnp.float32:
        return leaves
    return [g.astype(compute_dtype(g.dtype, jnp.float64)) for g in leaves]


def _starts(counts: np.ndarray) -> Iterator[jax.Array]:
    """Yields the place of each leaf's first unit among all units, unknown to XLA."""
    # Known places would be a kernel for each leaf. Divided, because XLA copies cheaper operations
    # into the kernels that use them.
    one = not_folded(jnp.ones((), jnp.uint32))
    start = jnp.zeros((), jnp.uint32)
    for count in counts:
        yield start
        start = lax.div(start + np.uint32(count), one)


# Jitted, so that leaves of one shape share one trace.
@functools.partial(jax.jit, static_argnums=3)
def _clip_leaf(
    g: jax.Array, scaling: Scaling, start: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Scales a leaf by the part of all units' scaling that is in its place."""

    def part(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice(x, (start,), (math.prod(shape),)).reshape(shape)

    rest = None if scaling.rest is None else part(scaling.rest)
    own = Scaling.create(part(scaling.coef), rest, part(scaling.rescale))
    return scale_leaf(g, own._replace(is_bad=scaling.is_bad))


def _join_terms(terms: Terms, counts: np.ndarray) -> ArrayLike | RescaledNorm:
    """Returns a term for each unit; one for all if every leaf has the same array."""
    if isinstance(terms[0], MeasuredUnits):
        return join_units(terms)
    if all(term is terms[0] for term in terms):
        return terms[0]
    if not any(isinstance(term, jax.Array) for term in terms):
        return np.repeat(np.array(terms), counts)
    dtype = max((term.dtype for term in terms), key=lambda dtype: dtype.itemsize)
    entries = [
        jnp.broadcast_to(jnp.asarray(term, dtype), num_units)
        for term, num_units in zip(terms, counts, strict=True)
    ]
    return jnp.concatenate(entries)


def _stats_after(stats: ClipStats, clip: NormClip, is_bad: jax.Array) -> ClipStats:
    """Returns the statistics after a clip of all units."""
    pre_norm, post_norm = _finite_norm(clip.pre_norm), _finite_norm(clip.post_norm)
    rate = jnp.sum(clip.is_clipped) / max(clip.is_clipped.size, 1)
    return stats.update(
        is_bad,
        pre_norm=pre_norm,
        post_norm=post_norm,
        clip_coef=jnp.where(pre_norm > 0, jnp.minimum(post_norm / pre_norm, 1), 1),
        clip_rate=jnp.where(is_bad, 0, rate),
    )


def _leaf_norms(norm: RescaledNorm, sizes: jax.Array, counts: np.ndarray) -> jax.Array:
    """Returns the norm of each leaf from those of its units; NaN where one is not finite."""
    sizes = jnp.where(jnp.isfinite(norm.norm), sizes, jnp.nan)
    if np.all(counts == 1):
        return sizes
    leaf = np.repeat(np.arange(counts.size), counts)
    add_up = functools.partial(
        jax.ops.segment_sum, num_segments=counts.size, indices_are_sorted=True
    )
    largest = jax.ops.segment_max(sizes, leaf, counts.size, indices_are_sorted=True)
    largest = jnp.maximum(largest, 0)  # of a leaf without units
    scaled = quotient(sizes, jnp.where(largest > 0, largest, 1)[leaf])
    norms = largest * jnp.sqrt(add_up(scaled * scaled, leaf))
    norms = jnp.minimum(norms, FLOAT32_MAX)
    is_nan = add_up(jnp.isnan(sizes).astype(jnp.float32), leaf) > 0
    return jnp.where(is_nan, jnp.nan, norms)


def _finite_norm(norms: jax.Array) -> jax.Array:
    """Returns the norm of a vector of norms, at most the largest float32."""
    return jnp.minimum(norm_of_norms(norms), FLOAT32_MAX)
