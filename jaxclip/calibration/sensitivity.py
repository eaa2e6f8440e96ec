"""Sensitivity of a model's outputs to each weight, one weight rounded at a time."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core.trees import PyTree, floating_leaves
from jaxclip.calibration.measuring import numbered, on_device, weight_paths
from jaxclip.lowbit.arrays import dequantize
from jaxclip.lowbit.rounding.feedback import factor_moments, output_energy
from jaxclip.lowbit.rounding.input_steps import equal_rate_step, quantize_by_inputs
from jaxclip.lowbit.rounding.moments import Calibration, InputMoments

# Of the step of equal rates: about two and a half bits, where sensitivities matter most.
_STEP = 2.0**-1.5


def sensitivities(
    apply_fn: Callable[[optax.Params, PyTree], PyTree],
    params: optax.Params,
    batches: Iterable[PyTree],
    calibration: Calibration,
    *,
    round_leaf: Callable[[jax.Array, str], jax.Array] | None = None,
    progress: bool = True,
) -> Calibration:
    """Measures how much the outputs of a model suffer from the error of each weight.

        sensitivity = (sum |f' - f|^2 / sum |f|^2) / tr(E^T H E)

    f are the outputs on all batches, and f' those with one weight rounded. E is that weight's
    error and H its second moments, damped as for rounding; 1 for a weight without moments.
    Sensitivities tell how to share bits out: at the same number of bits a weight of n entries that
    adds the error s to the outputs deserves log2(s / n) / 2 more than one that adds n.

    The model runs once for each weight and batch, and once more for each batch, as one program
    for all weights. The rounded weights are kept, so the parameters take twice their memory.

    Args:
      apply_fn: Function `apply_fn(params, batch)` that returns an array or a pytree of arrays.
        Its floating leaves are compared.
      params: Pytree of arrays.
      batches: Iterable of batches, as in `measure`. A few are enough, and may be fewer.
      calibration: What `measure` returned for these parameters.
      round_leaf: Function of a weight and its path that returns it with an error, which should be
        small and of the kind that is to come. None rounds as `compress(target_bytes=)` does, by the
        moments, to about two and a half bits.
      progress: True to show a bar in a terminal or a notebook, if rich is installed.

    Returns:
      The calibration with a float32 scalar for each weight that has moments or is missing. It is
      0 for a weight that was not used or that rounding leaves as it is.

    Raises:
      ValueError: If the calibration is for other parameters, there are no batches, or the outputs
        are all 0 or not finite.

    Example:
      >>> import numpy as np
      >>> from jaxclip import calibration
      >>> params, x = {"a": np.eye(2), "b": 3 * np.eye(2)}, np.array([[0.6, 0.8]])
      >>> apply_fn = lambda p, x: x @ p["a"] @ p["b"]
      >>> c = calibration.measure(apply_fn, params, [x], progress=False)
      >>> c = calibration.sensitivities(apply_fn, params, [x], c, progress=False)
      >>> {path: round(float(s), 1) for path, s in c.sensitivities.items()}
      {'a': 0.9, 'b': 0.1}
    """
    places = {path: i for i, path in enumerate(weight_paths(params, ())) if path is not None}
    paths = [*calibration.moments, *calibration.missing]
    unknown = [path for path in paths if path not in places]
    if unknown:
        raise ValueError(f"calibration must be for params, which have no weight {unknown[0]!r}.")
    params = on_device(params)
    leaves = jax.tree.leaves(params)
    weights = {path: leaves[places[path]] for path in paths}
    if round_leaf is None:
        round_one = functools.partial(_rounded_by_moments, calibration)
    else:
        round_one = jax.jit(round_leaf, static_argnums=1)
    rounded = {path: _rounded(weight, path, round_one) for path, weight in weights.items()}
    changed = [(places[path], weight) for path, weight in rounded.items()]
    errors = _relative_errors(apply_fn, params, changed, numbered(batches, progress))
    found = {}
    for path, error in zip(paths, errors, strict=True):
        if not math.isfinite(error):
            raise ValueError(f"the outputs of apply_fn must be finite with {path!r} rounded.")
        own = _own_error(calibration.moments.get(path), weights[path], rounded[path], path)
        found[path] = np.float32(error / own if own > 0 else 0)
    return dataclasses.replace(calibration, sensitivities=found)


def _relative_errors(
    apply_fn: Callable,
    params: optax.Params,
    changed: list[tuple[int, jax.Array]],
    batches: Iterable[tuple[int, PyTree]],
) -> np.ndarray:
    """Returns the outputs' relative squared error with one leaf changed at a time, for each."""
    leaves, structure = jax.tree.flatten(params)
    apply = jax.jit(apply_fn)
    errors, energy = np.zeros(len(changed)), 0.0
    for number, batch in batches:
        reference = apply(params, batch)
        found = []
        for place, leaf in changed:
            others = structure.unflatten([*leaves[:place], leaf, *leaves[place + 1 :]])
            found.append(_squared_distance(apply(others, batch), reference))
        squares = float(_energy(reference))
        if not math.isfinite(squares):
            raise ValueError(f"the outputs of apply_fn must be finite; batch {number} has others.")
        errors += np.asarray(jnp.stack(found), np.float64)
        energy += squares
    if not energy > 0:
        raise ValueError("the outputs of apply_fn must be floating and not all 0.")
    return errors / energy


def _rounded_by_moments(calibration: Calibration, leaf: jax.Array, path: str) -> jax.Array:
    """Returns a weight as it comes from an entropy-coded file."""
    given = calibration.moments.get(path)
    moments = None if given is None else factor_moments(given, leaf.shape, repr(path))
    step = _STEP * equal_rate_step(leaf, moments)
    rounded = dequantize(quantize_by_inputs(leaf, moments, step, name=repr(path)))
    return jax.device_put(rounded, leaf.sharding)


def _rounded(leaf: Any, path: str, round_leaf: Callable) -> jax.Array:
    leaf = jnp.asarray(leaf)
    rounded = jnp.asarray(round_leaf(leaf, path))
    if rounded.shape != leaf.shape:
        raise ValueError(
            f"round_leaf must keep the shape of a weight; at {path!r} it made {rounded.shape} of "
            f"{leaf.shape}."
        )
    return rounded.astype(leaf.dtype)


@jax.jit
def _squared_distance(outputs: PyTree, reference: PyTree) -> jax.Array:
    """Returns the sum of squares of the differences of all floating leaves."""
    pairs = zip(floating_leaves(outputs), floating_leaves(reference), strict=True)
    return _energy([_wide(x) - _wide(y) for x, y in pairs])


@jax.jit
def _energy(outputs: PyTree) -> jax.Array:
    """Returns the sum of squares of all floating leaves."""
    squares = [jnp.sum(jnp.square(jnp.abs(_wide(x)))) for x in floating_leaves(outputs)]
    return sum(squares, start=jnp.zeros((), jnp.float32))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _own_error(
    moments: InputMoments | None, leaf: jax.Array, rounded: jax.Array, path: str
) -> float:
    """Returns tr(E^T H E), or |E|^2 if there are no moments."""
    # With the damping by which steps are chosen: a table of which the data looked up few rows has a
    # small sensitivity, because its bytes are spent on all rows.
    error = np.asarray(rounded, np.float32) - np.asarray(leaf, np.float32)
    if moments is None:
        return float(np.square(error, dtype=np.float64).sum())
    return output_energy(error, factor_moments(moments, error.shape, repr(path)))
