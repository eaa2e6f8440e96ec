"""Rounding with feedback: later inputs make up for the rounding errors of earlier ones.

    tr(E^T H E) = sum over i of d_i * |r_i|^2,    r_i = e_i + sum over j > i of u_ji * e_j

The moments are factored, H = U diag(d) U^T with U unit lower triangular. From the last input to the
first, each is rounded to where its r_i is small, given the errors e_j before it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.grids import Grid
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.lowbit.coding.trellis import chain_length, levels_of
from jaxclip.lowbit.rounding.moments import InputMoments, MatrixView
from jaxclip.lowbit.rounding.paths import cheapest_levels, cheapest_path, model_lengths

# Added to the diagonals, as a fraction of their mean: it bounds errors where the data had no input.
_DAMPING = 0.01
_BLOCK = 64  # inputs whose errors are fed back one by one; between blocks by one product
_WIDTH = 512  # outputs of a program: compiled once for all widths
_NUM_CODES = 64  # magnitudes on a path: levels are below 127
# Squared steps, about the error of rounding; keeps lengths of codes finite for rows of zeros.
_LEAST_VARIANCE = 0.2


class InputFactor(NamedTuple):
    """The moments of one matrix, factored: `H = U diag(weights) U^T` after reordering.

    Attributes:
      order: Places of the inputs, so that the last is rounded first.
      unit: U, unit lower triangular, float32; None where moments are diagonal.
      weights: The diagonal factor, in that order, float64.
    """

    order: np.ndarray
    unit: np.ndarray | None
    weights: np.ndarray


class FactoredMoments(NamedTuple):
    """The factors of the moments of a weight array, one for each matrix of its view."""

    view: MatrixView
    factors: tuple[InputFactor, ...]

    @property
    def is_diagonal(self) -> bool:
        """True if no input's error can be made up for by another input."""
        return all(factor.unit is None for factor in self.factors)


def factor_moments(
    moments: InputMoments | FactoredMoments, shape: tuple[int, ...], name: str
) -> FactoredMoments:
    """Returns the factors of the moments of an array of that shape; raises if they are of another.

    Complexity: inputs^3 / 3 operations in float64, and three matrices of that size, for each
    matrix of the stack.
    """
    if isinstance(moments, FactoredMoments):
        return moments
    if not moments.view.is_of(shape):
        raise ValueError(
            f"moments must be for {name}, an array of shape {shape}, got those for "
            f"{moments.view.shape}."
        )
    if not checks.is_concrete(moments.second):
        raise TypeError(f"moments of {name} must be concrete: round weights outside of jit.")
    if not np.isfinite(moments.second).all():
        raise ValueError(f"moments of {name} must be finite.")
    sums = (np.asarray(x, np.float64) for x in (moments.second, moments.first))
    factors = tuple(_factor(*pair) for pair in zip(*sums, strict=True))
    return FactoredMoments(moments.view, factors)


def _factor(second: np.ndarray, first: np.ndarray) -> InputFactor:
    if second.ndim == 1 and np.array_equal(second, first):
        # Counts of rows that were looked up. A row that was not may well be, by other data.
        return InputFactor(np.arange(second.size), None, second + 1)
    diagonal = second if second.ndim == 1 else np.diagonal(second)
    mean = diagonal.mean() if diagonal.size else 0.0
    if not mean > 0:  # inputs that are all 0 say nothing
        return InputFactor(np.arange(diagonal.size), None, np.ones(diagonal.size))
    if second.ndim == 1:
        return InputFactor(np.arange(diagonal.size), None, diagonal + _DAMPING * mean)
    # Rounded first, a large input has all others to make up for its error.
    order = np.argsort(diagonal, kind="stable")
    damped = second[np.ix_(order, order)]
    damped[np.diag_indices_from(damped)] += _DAMPING * mean
    root = np.linalg.cholesky(damped)
    lengths = np.diagonal(root)
    return InputFactor(order, (root / lengths).astype(np.float32), lengths**2)


def importance_of(moments: FactoredMoments, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the weight of each entry's squared rounding error, for an array of that shape."""
    stack, num_inputs, num_outputs = moments.view.matrix_shape
    weights = np.empty((stack, num_inputs, 1), np.float32)
    for matrix, factor in zip(weights, moments.factors, strict=True):
        matrix[factor.order, 0] = factor.weights
    wide = np.broadcast_to(weights, (stack, num_inputs, num_outputs))
    return moments.view.fold(wide, shape)


def output_energy(array: ArrayLike, moments: FactoredMoments) -> float:
    """Returns `tr(W^T H W)`, the squared outputs of a weight on all inputs, with damped moments."""
    matrices = moments.view.unfold(np.asarray(array, np.float32))
    return sum(_weighted(w, factor) for w, factor in zip(matrices, moments.factors, strict=True))


def output_error(array: ArrayLike, quantized: QuantizedArray, moments: FactoredMoments) -> float:
    """Returns `tr(E^T H E)` of the rounding errors E of a weight."""
    restored = np.asarray(dequantize(quantized, jnp.float32))
    return output_energy(np.asarray(array, np.float32) - restored, moments)


def _weighted(matrix: np.ndarray, factor: InputFactor) -> float:
    residuals = matrix[factor.order]
    if factor.unit is not None:
        residuals = factor.unit.T @ residuals
    return float(factor.weights @ np.square(residuals, dtype=np.float64).sum(axis=1))


def round_with_feedback(
    array: ArrayLike,
    quantized: QuantizedArray,
    moments: FactoredMoments,
    *,
    price: float = 0.0,
) -> QuantizedArray:
    """Returns a low-bit array with codes chosen for a small error of the outputs.

    Scales and zeros stay.

    Complexity: inputs^2 * outputs operations for each matrix of the stack.
    """
    if moments.is_diagonal and not price:
        return quantized  # each entry by itself: the nearest code is best
    view, shape = moments.view, quantized.shape
    w = np.asarray(array).astype(np.float32)
    codes = np.empty(view.matrix_shape, np.int8)
    wide = [_unfolded(quantized, part, view) for part in (quantized.scale, quantized.zero)]
    for place, factor in enumerate(moments.factors):
        scale, zero = (x if x is None else x[place, factor.order] for x in wide)
        assert scale is not None
        matrix = view.unfold(w)[place, factor.order]
        codes[place, factor.order] = _round_matrix(
            quantized.grid, matrix, scale, zero, factor, price
        )
    return dataclasses.replace(quantized, qvalue=_like(quantized.qvalue, view.fold(codes, shape)))


def _unfolded(
    quantized: QuantizedArray, part: jax.Array | None, view: MatrixView
) -> np.ndarray | None:
    """Returns scales or zeros for each entry, as matrices."""
    if part is None:
        return None
    values = np.asarray(part).astype(np.float32)
    wide = np.asarray(quantized.grid.expand_with(np, values, quantized.shape))
    return view.unfold(np.broadcast_to(wide, quantized.shape))


def _like(old: jax.Array, codes: np.ndarray) -> jax.Array:
    """Returns codes in the dtype, and on the device, of those before them."""
    codes = codes.astype(old.dtype)
    return jax.device_put(codes, old.sharding) if isinstance(old, jax.Array) else codes  # pyright: ignore


def _round_matrix(
    grid: Grid,
    w: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    factor: InputFactor,
    price: float,
) -> np.ndarray:
    """Returns the codes of one matrix (inputs, outputs), whose inputs are in the factor's order."""
    shrinkage = _shrinkage(w, scale, price)
    if factor.unit is None:
        return grid.nearest(w / scale * shrinkage, 0 if zero is None else zero).astype(np.int8)
    unit, of_rows = _padded_rows(factor.unit, {"shrinkage": (shrinkage, 1)})

    def round_piece(**of_entries: jax.Array) -> jax.Array:
        return _round_rows(grid, **of_entries, **of_rows, unit=unit)

    zeros = np.zeros((1, 1), np.float32) if zero is None else zero
    entries = {"w": (w, 0), "scale": (scale, 1), "zero": (np.broadcast_to(zeros, w.shape), 0)}
    return _in_pieces(round_piece, entries, _WIDTH)


def _padded_rows(unit: np.ndarray, of_rows: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns U without its diagonal, and values of inputs, padded to whole blocks."""
    # Few different shapes, because each takes a program of its own. Inputs that are added come
    # first, have weights of 0, and so no errors to feed back.
    more = -len(unit) % _BLOCK
    padded = np.pad(unit - np.eye(len(unit), dtype=np.float32), (0, more))
    return padded, {name: _padded(x, more, 0, fill) for name, (x, fill) in of_rows.items()}


def _padded(x: np.ndarray, rows: int, columns: int, fill: float) -> np.ndarray:
    """Returns an array with more rows and columns at the end."""
    widths = [(0, rows), (0, columns)] + [(0, 0)] * (x.ndim - 2)
    return np.pad(x, widths, constant_values=fill)


def _in_pieces(
    round_piece: Callable[..., jax.Array], entries: dict[str, Any], width: int
) -> np.ndarray:
    """Returns the codes of a matrix, rounded some outputs at a time, each piece padded."""
    num_inputs, num_outputs = entries["w"][0].shape
    more = -num_inputs % _BLOCK
    codes = np.empty((num_inputs, num_outputs), np.int8)
    for start in range(0, num_outputs, width):
        stop = min(start + width, num_outputs)
        padded = {
            name: _padded(x[:, start:stop], more, _WIDTH - (stop - start), fill)
            for name, (x, fill) in entries.items()
        }
        codes[:, start:stop] = np.asarray(round_piece(**padded))[:num_inputs, : stop - start]
    return codes


def _shrinkage(w: np.ndarray, scale: np.ndarray, price: float) -> np.ndarray:
    """Returns the factor of each input's ratios before they are rounded, for a price of bits."""
    # A Gaussian code of deviation s has code^2 / (2 ln(2) s^2) bits and a constant: the cost
    # (x - code)^2 + price * bits is least at x / (1 + price / (2 ln(2) s^2)).
    variance = np.square(w / scale, dtype=np.float64).mean(axis=1, keepdims=True) + 1 / 12
    return (1 / (1 + price / (2 * np.log(2) * variance))).astype(np.float32)


def path_with_feedback(
    w: np.ndarray, scale: np.ndarray, factor: InputFactor, price: float
) -> np.ndarray:
    """Returns the levels (inputs, outputs) of one matrix, each row a path through the trellis.

    Args:
      w: The matrix, float32.
      scale: Steps of the inputs, (inputs, 1), float32.
      factor: The factored moments of the inputs.
      price: Squared steps that a bit is worth.
    """
    deviation = np.sqrt(np.mean(np.square(w / scale), axis=1) + _LEAST_VARIANCE)
    lengths = np.asarray(model_lengths(deviation, _NUM_CODES))
    length = chain_length(w.shape[1])
    if factor.unit is None:
        pieces = [slice(i, i + length) for i in range(0, w.shape[1], length)]
        codes = [cheapest_path(w[:, p] / scale, lengths, price=price) for p in pieces]
        return np.concatenate([np.asarray(levels_of(np.asarray(c))) for c in codes], axis=1)
    order = factor.order
    unit, of_rows = _padded_rows(
        factor.unit, {"scale": (scale[order], 1), "lengths": (lengths[order], 0)}
    )

    def round_piece(**of_entries: jax.Array) -> jax.Array:
        return _round_rows_on_trellis(
            **of_entries, **of_rows, unit=unit, price=jnp.asarray(price, jnp.float32)
        )

    levels = np.empty(w.shape, np.int8)
    is_output = np.ones(w.shape, bool)
    entries = {"w": (w[order], 0), "is_output": (is_output, False)}
    levels[order] = _in_pieces(round_piece, entries, length)
    return levels


# --- Programs -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _round_rows(
    grid: Grid,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array,
    shrinkage: jax.Array,
    unit: jax.Array,
) -> jax.Array:
    """Returns the codes of a matrix, each the nearest to what feedback makes of its entry."""

    def round_row(x: jax.Array, row: jax.Array) -> jax.Array:
        return grid.nearest(x * shrinkage[row], zero[row]) - zero[row]

    return (_feed_back(w, scale, unit, round_row) + zero).astype(jnp.int8)


@jax.jit
def _round_rows_on_trellis(
    w: jax.Array,
    is_output: jax.Array,
    scale: jax.Array,
    lengths: jax.Array,
    unit: jax.Array,
    price: jax.Array,
) -> jax.Array:
    """Returns the levels of a matrix, each row on the cheapest path of a trellis."""

    def round_row(x: jax.Array, row: jax.Array) -> jax.Array:
        return cheapest_levels(x[None], lengths[row], price, is_output[:1])[0]

    return _feed_back(w, scale, unit, round_row).astype(jnp.int8)


def _feed_back(
    w: jax.Array,
    scale: jax.Array,
    unit: jax.Array,
    round_row: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Returns the rounded rows of a matrix, from the last to the first, over their scales.

    Args:
      w: Shape (inputs, outputs), whole blocks of inputs.
      scale: Steps, shape (inputs, outputs) or (inputs, 1).
      unit: U with a diagonal of 0.
      round_row: Function of a row over its scales, and its place, that returns it rounded.
    """
    num_rows, width = w.shape

    def round_block(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
        start = num_rows - _BLOCK * (k + 1)
        own, steps = (lax.dynamic_slice_in_dim(x, start, _BLOCK) for x in (w, scale))
        feedback = lax.dynamic_slice_in_dim(unit, start, _BLOCK, axis=1)
        inside = lax.dynamic_slice_in_dim(feedback, start, _BLOCK)
        # Errors of rows that are still to come are 0.
        wanted = own + jnp.matmul(feedback.T, state[0], precision=lax.Precision.HIGHEST)

        def one_row(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
            errors, rounded = state
            row = _BLOCK - 1 - i
            x = wanted[row] + jnp.matmul(inside[:, row], errors, precision=lax.Precision.HIGHEST)
            found = round_row(x / steps[row], start + row)
            error = own[row] - found * steps[row]
            return errors.at[row].set(error), rounded.at[row].set(found)

        nothing = jnp.zeros((_BLOCK, width))
        found = lax.fori_loop(0, _BLOCK, one_row, (nothing, nothing))
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip(state, found, strict=True)
        )

    nothing = jnp.zeros_like(w)
    return lax.fori_loop(0, num_rows // _BLOCK, round_block, (nothing, nothing))[1]
