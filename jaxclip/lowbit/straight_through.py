"""Training through a low-bit grid: rounded values forward, a straight derivative backward.

    value        dequantize(quantize(w))
    derivative   1 where w is within the grid's range, 0 outside

The threshold has no derivative unless it is learned: scales and zeros are measured anew from the
weights and treated as constants.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core.grids import Bits, Grid
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.lowbit.quantizer import Threshold, quantize
from jaxclip.thresholds.by_error import mse_optimal

# The range is wider by a millionth, so that with `max_abs` the largest weight counts as inside.
_SLACK = 2.0**-20


def fake_quantize(
    array: ArrayLike,
    bits: Bits | Grid = 4,
    *,
    threshold: Threshold = mse_optimal,
    learn_threshold: bool = False,
) -> jax.Array:
    """Returns an array rounded to a low-bit grid, with the straight-through derivative.

    For training with the grid in the loop: apply it to the weights inside the loss. For weights
    alone `keep_on_grid` needs no change of the loss; this is for activations, too.

    Args:
      array: Real floating array of any shape. May be traced.
      bits: A `Grid`; or its width, 1, 2, 3, 4, 5, 6, 8 or "ternary", for one scale for the whole
        array.
      threshold: A rule or its factory, a number in (0, inf), or an array of one per block.
      learn_threshold: True for a derivative by the threshold t, a number or an array, as in learned
        step size quantization: `d w / d ln t = (w - x) / sqrt(entries of a block * highest code)`
        for an entry x within the levels, with w in place of w - x outside them and at 1 bit. Learn
        ln t, so that t stays positive.

    Returns:
      An array of the shape and dtype of `array`. The derivative is 1 where the entry is
      within the levels of its block (for 1 bit, within the threshold), and 0 elsewhere.

    Raises:
      TypeError: If `array` is not real floating, `threshold` is not a threshold, or a rule is to be
        learned.
      ValueError: If an argument is not allowed, a concrete entry is NaN or infinite, or a
        threshold is to be learned that comes with zero points.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> w = jnp.array([0.3, 0.8, -2.0])
      >>> round_trip = lambda w: fake_quantize(w, "ternary", threshold=1.0)
      >>> print(round_trip(w), jax.grad(lambda w: round_trip(w).sum())(w))
      [ 0.  1. -1.] [1. 1. 0.]

    References:
      Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons for
      Conditional Computation, 2013, https://arxiv.org/abs/1308.3432
      Esser et al., Learned Step Size Quantization, 2020, https://arxiv.org/abs/1902.08153
    """
    array = jnp.asarray(array)
    if learn_threshold and callable(threshold):
        raise TypeError(f"threshold must be a number or an array to be learned, got {threshold!r}.")
    quantized = quantize(lax.stop_gradient(array), bits, threshold=threshold)
    quantized = lax.stop_gradient(quantized)
    rounded = _straight_through(array, quantized)
    if not learn_threshold:
        return rounded
    if quantized.grid.zero_point:
        raise ValueError("learn_threshold needs a grid without zero points.")
    given: Any = threshold
    return rounded + _by_threshold(array, quantized, given).astype(rounded.dtype)


def _by_threshold(array: jax.Array, quantized: QuantizedArray, threshold: ArrayLike) -> jax.Array:
    """Returns zeros in float32 that have the derivative by the threshold."""
    grid, given = quantized.grid, jnp.asarray(threshold, jnp.float32)
    counts = grid.compact(jnp.asarray(grid.block_counts(array.shape)), array.ndim)
    relative = (given / lax.stop_gradient(given) - 1) / jnp.sqrt(counts * grid.code_range[1])
    relative = jnp.broadcast_to(relative, quantized.scale.shape)
    slope = lax.stop_gradient(slope_by_scale(array, quantized))
    return slope * grid.expand(relative, array.shape)


def slope_by_scale(array: ArrayLike, quantized: QuantizedArray) -> jax.Array:
    """Returns the derivative of the rounded entries by the logarithm of their scale, float32."""
    x = jnp.asarray(array).astype(jnp.float32)
    scale = quantized.grid.expand(quantized.scale.astype(jnp.float32), x.shape)
    rounded = scale * quantized.qvalue.astype(jnp.float32)
    if quantized.grid.bits == 1:  # codes do not depend on the scale
        return rounded
    return jnp.where(is_inside(x, quantized), rounded - x, rounded)


@jax.custom_jvp
def _straight_through(array: jax.Array, quantized: QuantizedArray) -> jax.Array:
    del array
    return dequantize(quantized)


@_straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[jax.Array, QuantizedArray], tangents: tuple[jax.Array, QuantizedArray]
) -> tuple[jax.Array, jax.Array]:
    array, quantized = primals
    inside = is_inside(array, quantized)
    tangent = tangents[0]
    return dequantize(quantized), jnp.where(inside, tangent, jnp.zeros_like(tangent))


def is_inside(array: jax.Array, quantized: QuantizedArray) -> jax.Array:
    """Returns True for entries between the outermost levels of their block."""
    low, high = quantized.grid.code_range
    zero = 0 if quantized.zero is None else quantized.zero.astype(jnp.float32)
    scale = quantized.scale.astype(jnp.float32) * (1 + _SLACK)
    ends = scale * (low - zero), scale * (high - zero)  # a negative scale swaps them
    bottom = quantized.grid.expand(jnp.minimum(*ends), array.shape)
    top = quantized.grid.expand(jnp.maximum(*ends), array.shape)
    x = array.astype(jnp.float32)
    return (bottom <= x) & (x <= top)
