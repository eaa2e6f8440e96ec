"""Entropy-coded weights with a step for each input, rounded on a trellis with feedback.

    step_i = c / sqrt(d_i),    d_i from the factored moments,    error of the outputs ~ c^2

With such steps every input adds about as much to the error of the outputs; at high rates that is
the least error. The step c of a leaf is a number that all leaves share, divided by the square root
of the leaf's sensitivity. So bits go where they lower the error of the model's outputs most.

Reference: WaterSIC, 2026, https://arxiv.org/abs/2603.04956
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core.grids import Grid
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.quantizer import check_finite
from jaxclip.lowbit.rounding.feedback import (
    FactoredMoments,
    InputFactor,
    path_with_feedback,
    round_with_feedback,
)
from jaxclip.lowbit.rounding.moments import MatrixView
from jaxclip.lowbit.scale_formats import round_scale

PRICE = 0.4  # squared steps that a bit is worth, where these are no larger than the weights
_LARGEST_LEVEL = 120  # of 126: log8 may round a step down by 4.4 %


def quantize_by_inputs(
    array: ArrayLike,
    moments: FactoredMoments | None,
    step: float,
    *,
    price: float = PRICE,
    name: str = "array",
) -> QuantizedArray:
    """Returns an array whose levels are on a path of the trellis, for an entropy-coded file.

    Args:
      array: Finite real floating array of one or more dimensions, concrete.
      moments: Factored moments of its inputs; None for one step without data.
      step: c, in units of the square root of the outputs' squared error.
      price: Squared steps that a bit is worth, or squared weights where these are smaller.
      name: Name of the array in errors.
    """
    w = np.asarray(array).astype(np.float32)
    check_finite(name, w)
    price *= _price_factor(equal_rate_step(w, moments) / step)
    dtype = np.asarray(array).dtype
    axes = () if moments is None else _channel_axes(moments.view, w.shape)
    moments = _without_data(w.shape) if moments is None else moments
    if axes is None:  # no grid has a step for each of these inputs
        return _with_one_step(w, moments, step, price, dtype)
    view = dataclasses.replace(moments.view, outputs=tuple(sorted(moments.view.outputs)))
    matrices = view.unfold(w)
    scale = np.stack([_steps(m, f, step) for m, f in zip(matrices, moments.factors, strict=True)])
    if axes:
        scale = np.asarray(round_scale(scale, "log8"))
    else:
        scale = np.full_like(scale, scale.max(initial=0))
    levels = [
        path_with_feedback(*matrix, price=price)
        for matrix in zip(matrices, scale, moments.factors, strict=True)
    ]
    wide = view.fold(np.broadcast_to(scale, matrices.shape), w.shape)
    kept = tuple(slice(None) if a in axes else slice(0, 1) for a in range(w.ndim))
    codes = view.fold(np.stack(levels).astype(np.int8), w.shape)
    grid = _coded_grid(axes, w.ndim)
    return QuantizedArray(jnp.asarray(codes), jnp.asarray(wide[kept]), grid, dtype)


def coded_outline(
    view: MatrixView | None, shape: tuple[int, ...], dtype: np.dtype
) -> QuantizedArray:
    """Returns the result of `quantize_by_inputs` with shapes for arrays."""
    grid = _coded_grid(() if view is None else _channel_axes(view, shape), len(shape))
    codes: Any = jax.ShapeDtypeStruct(shape, jnp.int8)
    scale: Any = jax.ShapeDtypeStruct(grid.scale_shape(shape), jnp.float32)
    return QuantizedArray(codes, scale, grid, dtype)


def _coded_grid(channel_axes: tuple[int, ...] | None, ndim: int) -> Grid:
    """Returns the grid of a step for each index along the axes, or of one step."""
    if not channel_axes:
        return Grid(8, levels="narrow", axis=None)
    axis = tuple(a - ndim for a in channel_axes)
    return Grid(8, levels="narrow", axis=axis, scale_dtype="log8")


def equal_rate_step(array: ArrayLike, moments: FactoredMoments | None) -> float:
    """Returns the step at which, at high rates, every array takes the same bits an entry."""
    w = np.asarray(array, np.float32)
    moments = _without_data(w.shape) if moments is None else moments
    logs = [
        0.5 * np.log(np.square(rows[f.order], dtype=np.float64).mean(axis=1) * f.weights + 1e-300)
        for rows, f in zip(moments.view.unfold(w), moments.factors, strict=True)
    ]
    of_rows = np.concatenate(logs)
    of_rows = of_rows[of_rows > -300]  # rows of zeros take no bits at any step
    return float(np.exp(of_rows.mean())) if of_rows.size else 1.0


def _price_factor(deviation: float) -> float:
    """Returns the part of a price that remains for weights of a deviation in steps."""
    # Weights below a step cannot have an error above their own variance, and a bit saves a fraction
    # of the error.
    return min(deviation, 1.0) ** 2


def _without_data(shape: tuple[int, ...]) -> FactoredMoments:
    """Returns moments of 1 for an array as rows of its last axis."""
    rows = math.prod(shape[:-1])
    view = MatrixView((rows, shape[-1]), (), (0,), (1,))
    return FactoredMoments(view, (InputFactor(np.arange(rows), None, np.ones(rows)),))


def _steps(w: np.ndarray, factor: InputFactor, step: float) -> np.ndarray:
    """Returns the steps of the inputs of one matrix, (inputs, 1), float32."""
    steps = np.empty((len(w), 1))
    steps[factor.order, 0] = step / np.sqrt(factor.weights)
    # Coarser where the largest weight would be beyond the levels.
    least = np.abs(w).max(axis=1, keepdims=True, initial=0) / _LARGEST_LEVEL
    return np.maximum(steps, least).astype(np.float32)


def _channel_axes(view: MatrixView, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the axes of an array that are inputs or stacked; None if one is only in part."""
    channels, rest = [], list(enumerate(view.shape))
    for axis, length in enumerate(shape):
        part, kinds = 1, set()
        while rest and (part < length or rest[0][1] == 1):
            place, size = rest.pop(0)
            part *= size
            if size > 1:
                kinds.add(place in view.outputs)
        if len(kinds) > 1:
            return None
        if kinds == {False}:
            channels.append(axis)
    return tuple(channels)


def _with_one_step(
    w: np.ndarray, moments: FactoredMoments, step: float, price: float, dtype: np.dtype
) -> QuantizedArray:
    """Returns an array on a uniform grid of one step, rounded with feedback."""
    weights = np.concatenate([factor.weights for factor in moments.factors])
    # The levels of a path are half a step of its codes apart: as many bits need twice its step.
    common = 2 * step / math.exp(np.mean(np.log(weights)) / 2)
    common = max(common, float(np.abs(w).max(initial=0)) / _LARGEST_LEVEL)
    codes = np.clip(np.round(w / common), -_LARGEST_LEVEL, _LARGEST_LEVEL).astype(np.int8)
    scale = jnp.full((1,) * w.ndim, common, jnp.float32)
    nearest = QuantizedArray(jnp.asarray(codes), scale, _coded_grid(None, w.ndim), dtype)
    return round_with_feedback(w, nearest, moments, price=price / 4)
