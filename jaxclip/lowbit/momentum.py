"""Momentum in few bits: an optimizer whose moving average is a low-bit array between steps.

    m' = scale * floor(m / scale + u),    scale = max |m| / high of its block,    0 <= u < 1 random

Rounded to nearest, an average stands still wherever a step changes it by less than half a level.
Rounded at random it is right on average, `E[m'] = m`, and that needs no memory of the errors.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import checks
from jaxclip._core.floats import FLOAT32_MAX, FLOAT32_TINY, increment, is_sharded, quotient
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.random_bits import mixed, random_bits
from jaxclip._core.trees import PyTree, is_clippable, path_name
from jaxclip.lowbit.arrays import QuantizedArray, dequantize, is_quantized
from jaxclip.lowbit.scale_formats import round_scale
from jaxclip.thresholds.by_magnitude import max_abs

_FIELDS = ("mu", "trace")  # the names of optax, and of this package


class LowBitMomentumState(NamedTuple):
    """State of `low_bit_momentum`.

    Attributes:
      step: Scalar int32, steps so far.
      inner_state: State of the wrapped optimizer, each momentum a `QuantizedArray`.
    """

    step: jax.Array
    inner_state: optax.OptState


def low_bit_momentum(
    inner: optax.GradientTransformation, bits: Bits | Grid = 8, *, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that its momentum takes 8 or 4 bits a weight between steps.

    `m <- scale * floor(m / scale + u)` after every step of `inner`, `scale = max |m| / high` block
    by block and u at random in [0, 1), so `E[m]` is unchanged. The step itself is that of `inner`,
    from the momentum before it is rounded.

    A momentum is a field `mu` or `trace` of a state, as those of `lion`, `signum`, `optax.sgd`,
    `optax.adam` and `optax.contrib.muon`. Second moments (`nu`) stay as they are: rounded to 0
    they would be divided by.

    Args:
      inner: Any optimizer with a momentum.
      bits: 8 or 4, with one bfloat16 scale for 64 entries; or a `Grid` of that width.
      min_size: Entries from which on an array is low-bit, at least 1; smaller ones, mostly biases,
        stay as they are.

    Returns:
      A transform whose updates are those of `inner` for the rounded momentum. An entry of the
      momentum that becomes NaN or infinite stays as it was, and blocks of zeros stay zeros. The
      random numbers follow from the step alone, so a run repeats, and replicas agree.

    Raises:
      TypeError: If `inner` is not a transformation, or an argument is of a wrong type.
      ValueError: If the grid is not of 8 or 4 bits, or has zero points, balanced levels, or
        scales in float16 or log8; in `init`, if `inner` has no momentum, or the axes of the grid
        do not fit it.

    Example:
      >>> import jaxclip
      >>> params = {"kernel": jnp.zeros((512, 64))}
      >>> for tx in (jaxclip.lion(1e-3), low_bit_momentum(jaxclip.lion(1e-3), 4)):
      ...     print(sum(x.nbytes for x in jax.tree.leaves(tx.init(params))))
      131084
      17424

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021,
      https://arxiv.org/abs/2110.02861
      Li et al., Memory Efficient Optimizers with 4-bit States, 2023,
      https://arxiv.org/abs/2309.01507
      Xu et al., Pushing the Limits of Low-Bit Optimizers, 2025, https://arxiv.org/abs/2505.00347
    """
    inner = checks.check_transformation("inner", inner)
    grid = bits if isinstance(bits, Grid) else Grid(bits, group_size=64, scale_dtype="bfloat16")
    _check_grid(grid)
    checks.check_count("min_size", min_size)

    def init_fn(params):
        words = jnp.zeros((2,), jnp.uint32)

        def stored(path: tuple, leaf: Any) -> Any:
            if not _is_stored(leaf, min_size):
                return leaf
            try:
                return _rounded(jnp.asarray(leaf), grid, words, np.uint32(0))
            except ValueError as error:
                raise ValueError(f"bits of the momentum at {path_name(path)!r}: {error}") from error

        state = _map_momentum(stored, inner.init(params))
        return LowBitMomentumState(jnp.zeros((), jnp.int32), state)

    def update_fn(updates, state, params=None, **extra_args):
        stored, treedef = jax.tree.flatten(state.inner_state, is_leaf=is_quantized)
        before = [dequantize(x) if is_quantized(x) else x for x in stored]
        inner_state = treedef.unflatten(before)
        updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        step = increment(state.step)
        words = mixed(step.astype(jnp.uint32) + np.array([0, 0x9E3779B9], np.uint32))
        after = treedef.flatten_up_to(inner_state)
        for i, (q, old, new) in enumerate(zip(stored, before, after, strict=True)):
            if is_quantized(q):
                after[i] = _rounded(
                    jnp.where(jnp.isfinite(new), new, old), q.grid, words, np.uint32(i)
                )
        return updates, LowBitMomentumState(step, treedef.unflatten(after))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_grid(grid: Grid) -> None:
    """Raises unless a grid holds a momentum, and saves memory."""
    # In memory 5 and 6 bits take a byte, 3 take half of one, and scales of log8 are float32.
    if grid.bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4 for a momentum, got {grid.bits!r}.")
    if grid.zero_point or grid.levels == "balanced":
        raise ValueError(
            "bits must be a grid with a level at 0 and no zero points, because the entries of a "
            f"momentum lie around 0, got {grid}."
        )
    if grid.scale_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"scale_dtype must be float32 or bfloat16 for a momentum, got {grid.scale_dtype!r}: "
            "float16 has no numbers as small as gradients, and log8 takes four bytes in memory."
        )


def _map_momentum(fn: Callable[[tuple, Any], Any], state: PyTree) -> PyTree:
    """Returns a state with a function of path and leaf applied to all that is a momentum."""
    found = []

    def has_momentum(node: Any) -> bool:
        return any(field in _FIELDS for field in getattr(node, "_fields", ()))

    def replaced(path: tuple, node: Any) -> Any:
        if not has_momentum(node):
            return node
        found.append(node)
        fields = {name: getattr(node, name) for name in node._fields if name in _FIELDS}
        return node._replace(
            **jax.tree_util.tree_map_with_path(lambda rest, x: fn((*path, *rest), x), fields)
        )

    mapped = jax.tree_util.tree_map_with_path(replaced, state, is_leaf=has_momentum)
    if not found:
        names = " or ".join(map(repr, _FIELDS))
        raise ValueError(f"inner must have a momentum, a field {names} in its state; it has none.")
    return mapped


def _is_stored(leaf: Any, min_size: int) -> bool:
    """Returns True for real floating arrays of two bytes or more and of enough entries."""
    if not is_clippable(leaf) or jnp.iscomplexobj(leaf) or jnp.finfo(leaf.dtype).bits <= 8:
        return False
    return np.ndim(leaf) > 0 and np.size(leaf) >= min_size


# Jitted, so that leaves of one shape share one trace.
@functools.partial(jax.jit, static_argnums=1)
def _rounded(
    x: jax.Array, grid: Grid, words: jax.Array, number: jax.Array | np.uint32
) -> QuantizedArray:
    """Returns a momentum on a grid, rounded at random; `number` is its own among all leaves."""
    grid = dataclasses.replace(grid, axis=None) if x.ndim == 1 else grid.from_the_end(x.ndim)
    low, high = grid.code_range
    m = x.astype(jnp.float32)
    # Rounded up, because clipped at every step the largest entries would shrink by half.
    margin = np.float32((1 + float(jnp.finfo(grid.scale_dtype).eps) / 2) / high)
    scale = jnp.asarray(max_abs().bind(grid).compact(m)) * margin
    scale = round_scale(jnp.clip(scale, FLOAT32_TINY, FLOAT32_MAX), grid.scale_dtype)
    ratio = quotient(m, grid.expand(scale.astype(jnp.float32), m.shape))
    # 16 bits: their sum with a code is exact in float32, so a momentum on the grid stays there.
    noise = random_bits(words, number, m.shape) >> np.uint32(16)
    places = jnp.floor(ratio + noise.astype(jnp.float32) * np.float32(2.0**-16))
    codes = jnp.clip(places, low, high).astype(jnp.int8)
    q = QuantizedArray(codes, scale, grid, x.dtype)
    if grid.bits == 4 and is_sharded(x):  # an explicit mesh forbids to cut the split axis in bytes
        return q.with_code_dtype(jnp.int4)
    return q.packed()
