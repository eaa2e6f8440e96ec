"""Training through a low-bit grid: rounded values forward, a straight derivative backward.

    value        dequantize(quantize(w))
    derivative   1 where w is within the grid's range, 0 outside

The threshold itself has no derivative: scales and zeros are measured anew from the weights and
treated as constants.
"""

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
) -> jax.Array:
    """Returns an array rounded to a low-bit grid, with the straight-through derivative.

    For training with the grid in the loop: apply it to the weights inside the loss.

    Args:
      array: Real floating array of any shape. May be traced.
      bits: A `Grid`; or its width, 1, 2, 3, 4, 5, 6, 8 or "ternary", for one scale for the whole
        array.
      threshold: A rule or its factory, a number in (0, inf), or an array of one per block.

    Returns:
      An array of the shape and dtype of `array`. The derivative is 1 where the entry is
      within the levels of its block (for 1 bit, within the threshold), and 0 elsewhere.

    Raises:
      TypeError: If `array` is not real floating, or `threshold` is not a threshold.
      ValueError: If an argument is not allowed, or a concrete entry is NaN or infinite.

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
    """
    array = jnp.asarray(array)
    quantized = quantize(lax.stop_gradient(array), bits, threshold=threshold)
    return _straight_through(array, lax.stop_gradient(quantized))


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
