"""Eager checks of arguments, with errors that name the argument, the rule and the value.

Only Python and NumPy numbers are checked by value. A jax array may be traced, so only its
shape and dtype are checked, also where it arrives late, from a schedule. The transform then treats
a bad value by a documented policy, the same in eager and jitted code.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxclip._core.trees import PyTree, is_clippable, path_name

_Arguments = ParamSpec("_Arguments")
_Made = TypeVar("_Made")


def is_concrete(value: object) -> bool:
    """Returns True unless `value` is being traced by jax."""
    return not isinstance(value, jax.core.Tracer)


def describe(value: object) -> str:
    """Returns the end of an error: the value, its type, and a hint if it may be traced."""
    hint = f": {_STATIC_HINT}" if isinstance(value, jax.Array) else ""
    return f"got {value!r} of type {type(value).__name__}{hint}"


_STATIC_HINT = "under optax.inject_hyperparams name it in static_args"


def _check_real(name: str, value: Any, rule: str) -> None:
    """Raises TypeError unless `value` is a real number or array."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return
    if value is None or isinstance(value, (bool, str, bytes, complex)):
        raise TypeError(f"{name} must be {rule}, {describe(value)}.")
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise TypeError(f"{name} must be {rule}, {describe(value)}.")
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be {rule}, got an array of dtype {dtype}.")


def _concrete_scalar(name: str, value: Any, rule: str) -> float | None:
    """Returns `value` as a Python float, or None if it is a jax array."""
    _check_real(name, value, rule)
    if np.shape(value) != ():
        raise ValueError(f"{name} must be {rule}, got an array of shape {np.shape(value)}.")
    if isinstance(value, jax.Array):
        return None
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be {rule}, got an integer beyond float64.") from error


def check_threshold(name: str, value: Any) -> None:
    """Raises unless `value` is a number in [0, inf], or a scalar jax array."""
    number = _concrete_scalar(name, value, "a number in [0, inf]")
    if number is not None and not number >= 0:
        raise ValueError(f"{name} must be in [0, inf], {describe(value)}.")


def check_threshold_array(name: str, value: Any) -> None:
    """Raises unless `value` is a number in [0, inf], an array of them, or a jax array."""
    if np.ndim(value) == 0:
        check_threshold(name, value)
        return
    _check_real(name, value, "an array of numbers in [0, inf]")
    if isinstance(value, np.ndarray) and not np.all(value >= 0):
        raise ValueError(f"{name} must be in [0, inf] everywhere, got {value.min()}.")


def check_positive(name: str, value: Any) -> None:
    """Raises unless `value` is a number in (0, inf), or a jax array."""
    number = _concrete_scalar(name, value, "a positive number")
    if number is not None and not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, {describe(value)}.")


def check_finite(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number, or a jax array."""
    number = _concrete_scalar(name, value, "a finite number")
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, {describe(value)}.")


def check_bound(name: str, value: Any, never: float) -> None:
    """Raises unless `value` is a number other than NaN and `never`, or a jax array."""
    number = _concrete_scalar(name, value, "a number")
    if number is not None and (math.isnan(number) or number == never):
        raise ValueError(f"{name} must be neither NaN nor {never}, {describe(value)}.")


def check_nonnegative(name: str, value: Any) -> None:
    """Raises unless `value` is a number in [0, inf), or a jax array."""
    number = _concrete_scalar(name, value, "a non-negative number")
    if number is not None and not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, {describe(value)}.")


def check_decay_rate(name: str, value: Any) -> None:
    """Raises unless `value` is a number in [0, 1], or a jax array."""
    number = _concrete_scalar(name, value, "a number in [0, 1]")
    if number is not None and not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], {describe(value)}.")


def value_at(name: str, given: Any, step: ArrayLike) -> ArrayLike:
    """Returns a number, or a schedule's value at a step; raises unless that is a real scalar."""
    if not callable(given):
        return given
    value: Any = given(step)
    name = f"the value of the schedule {name}"
    _concrete_scalar(name, value, "a real floating scalar")
    if _is_integer_scalar(value):
        raise TypeError(f"{name} must be a real floating scalar, got {jnp.result_type(value)}.")
    return value


def refuse_step(name: str, given: Any, expected: str) -> None:
    """Raises TypeError for an integer scalar, which functions get that are taken for schedules."""
    if _is_integer_scalar(given):
        raise TypeError(
            f"{name} must be given {expected}, got a scalar of dtype {given.dtype}: "
            "optax.inject_hyperparams calls every function among the arguments with the step; name "
            "those that are not schedules in static_args."
        )


def refuses_step(factory: Callable[_Arguments, _Made]) -> Callable[_Arguments, _Made]:
    """Returns a factory that raises TypeError if it is called with a step, as a schedule is."""

    @functools.wraps(factory)
    def make(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Made:
        if args and isinstance(args[0], jax.Array):
            refuse_step(factory.__name__, args[0], "no step")
        return factory(*args, **kwargs)

    return make


def _is_integer_scalar(value: Any) -> bool:
    """Returns True for 0-d integer arrays, but not for numbers of Python in an array."""
    dtype = getattr(value, "dtype", None)
    is_integer = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    return is_integer and np.ndim(value) == 0 and not getattr(value, "weak_type", False)


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raises unless `value` is one of `allowed`, of the same type."""
    for choice in allowed:
        if type(value) is type(choice) and value == choice:
            return
    raise ValueError(f"{name} must be one of {list(allowed)}, {describe(value)}.")


def check_count(name: str, value: object, at_least: int = 1) -> None:
    """Raises unless `value` is a Python or NumPy integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, {describe(value)}.")


def check_traced_count(name: str, value: Any, at_least: int = 1) -> None:
    """Raises unless `value` is a count, or an integer scalar of jax, which may be traced."""
    if not isinstance(value, jax.Array):
        check_count(name, value, at_least)
    elif value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}.")


def check_local_path(name: str, path: str | os.PathLike) -> None:
    """Raises ValueError for a path with a scheme, which would become a local folder `gs:`."""
    if "://" in os.fspath(path):
        raise ValueError(f"{name} must be a path of the local file system, got {path!r}.")


def check_params_given(name: str, params: optax.Params | None) -> None:
    """Raises if a transform that reads the parameters was not given them."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters: call `tx.update(updates, state, params)` with params."
        )


def check_same_structure(name: str, updates: PyTree, other_name: str, other: PyTree) -> None:
    """Raises if two trees differ, and names the first path where structure or shape differs."""
    left = jax.tree_util.tree_leaves_with_path(updates)
    right = jax.tree_util.tree_leaves_with_path(other)
    for (path, a), (other_path, b) in zip(left, right, strict=False):
        if path_name(path) != path_name(other_path):
            raise ValueError(
                f"{name} and {other_name} must have the same structure; they first differ at "
                f"{path_name(path)!r} in {name} against {path_name(other_path)!r} in {other_name}."
            )
        if is_clippable(a) and np.shape(a) != np.shape(b):
            raise ValueError(
                f"{name} and {other_name} must have the same shapes; at {path_name(path)!r} "
                f"{name} has {np.shape(a)} and {other_name} has {np.shape(b)}."
            )
    if len(left) != len(right):
        longer, where = (left, name) if len(left) > len(right) else (right, other_name)
        extra = path_name(longer[min(len(left), len(right))][0])
        raise ValueError(
            f"{name} and {other_name} must have the same structure; {extra!r} is only in {where}."
        )


def check_num_leaves(leaves: list[jax.Array], expected: int) -> None:
    """Raises unless the updates have as many floating leaves as the parameters had at init."""
    if len(leaves) != expected:
        raise ValueError(
            f"updates must have as many floating leaves as the parameters had at init, "
            f"{expected}, got {len(leaves)}."
        )


def check_transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `value` as a transform that accepts extra arguments; raises if it is not one."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(f"{name} must be an optax transformation, got {value!r}.")
    return optax.with_extra_args_support(value)
