"""Eager checks of what users pass in, the tree paths their messages name, and which leaves count.

Only Python and NumPy numbers are checked by value. A jax array may be traced, so of any jax
array only shape and dtype are checked: its value meets a stated policy inside the
transform, the same in eager and jitted code.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

# Which leaves are meant: a tree of bools (a prefix will do), or a function that gives one.
Mask = Any | Callable[[Any], Any]


def is_concrete(value: Any) -> bool:
    """True unless `value` is being traced by jax."""
    return not isinstance(value, jax.core.Tracer)


def is_sharded(x: jax.Array) -> bool:
    """Whether an axis is split over an explicit mesh: then it must not be reshaped."""
    return any(s is not None for s in getattr(jax.typeof(x).sharding, "spec", ()))


def _describe(value: Any) -> str:
    return f"got {value!r} of type {type(value).__name__}"


def _check_real(name: str, value: Any, rule: str) -> None:
    """Raises TypeError unless `value` is a real number or array."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return
    if value is None or isinstance(value, (bool, str, bytes, complex)):
        raise TypeError(f"{name} must be {rule}, {_describe(value)}.")
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise TypeError(f"{name} must be {rule}, {_describe(value)}.")
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be {rule}, got an array of dtype {dtype}.")


def _concrete_scalar(name: str, value: Any, rule: str) -> float | None:
    """`value` as a Python float; None for a jax array. Raises TypeError or ValueError."""
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
        raise ValueError(f"{name} must be in [0, inf], {_describe(value)}.")


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
        raise ValueError(f"{name} must be positive and finite, {_describe(value)}.")


def check_finite(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number, or a jax array."""
    number = _concrete_scalar(name, value, "a finite number")
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, {_describe(value)}.")


def check_bound(name: str, value: Any, never: float) -> None:
    """Raises unless `value` is a number other than NaN and `never`, or a jax array."""
    number = _concrete_scalar(name, value, "a number")
    if number is not None and (math.isnan(number) or number == never):
        raise ValueError(f"{name} must be neither NaN nor {never}, {_describe(value)}.")


def check_nonnegative(name: str, value: Any) -> None:
    """Raises unless `value` is a number in [0, inf), or a jax array."""
    number = _concrete_scalar(name, value, "a non-negative number")
    if number is not None and not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, {_describe(value)}.")


def check_decay_rate(name: str, value: Any) -> None:
    """Raises unless `value` is a number in [0, 1], or a jax array."""
    number = _concrete_scalar(name, value, "a number in [0, 1]")
    if number is not None and not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], {_describe(value)}.")


def check_choice(name: str, value: Any, allowed: tuple) -> None:
    """Raises unless `value` is one of `allowed`, of the same type."""
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise ValueError(f"{name} must be one of {list(allowed)}, {_describe(value)}.")


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, {_describe(value)}.")


def path_name(path: tuple) -> str:
    """A tree path as `layer/kernel`; flax nnx's trailing `.value` is left out."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value").removesuffix("/.value")


def is_clippable(leaf: Any) -> bool:
    """True for real and complex floating leaves; all others pass through transforms."""
    if isinstance(leaf, (bool, int)):
        return False
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def map_clippable(fn: Any, tree: Any, *rest: Any) -> Any:
    """Maps over the floating leaves, as jax arrays; the other leaves of `tree` pass through."""

    def apply(x: Any, *others: Any) -> Any:
        return fn(jnp.asarray(x), *others) if is_clippable(x) else x

    return jax.tree.map(apply, tree, *rest)


def masked(mask: Mask | None, params: Any, tree: Any, otherwise: Any) -> Any:
    """`tree`, of the structure of `params`, with `otherwise` for the leaves not in the mask."""
    if mask is None:
        return tree
    chosen = mask(params) if callable(mask) else mask
    entries, structure = jax.tree_util.tree_flatten_with_path(chosen)
    for path, is_in in entries:
        is_scalar = isinstance(is_in, (bool, np.bool_)) or (
            isinstance(is_in, (np.ndarray, jax.Array)) and not is_in.ndim and is_in.dtype == bool
        )
        if not is_scalar:
            where = f" at '{path_name(path)}'" if path else ""
            raise TypeError(f"mask must be True or False{where}, got {is_in!r}.")
    try:
        subtrees = structure.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"mask must be a prefix tree of the parameters; this one is not: {error}"
        ) from error
    kept = [
        jax.tree.map(lambda x, is_in=is_in: x if is_in else otherwise, subtree)
        for (_, is_in), subtree in zip(entries, subtrees, strict=True)
    ]
    return structure.unflatten(kept)


def floating_leaves(tree: Any) -> list[Any]:
    """The leaves that count, in order."""
    return [x for x in jax.tree.leaves(tree) if is_clippable(x)]


def replace_floating(updates: Any, leaves: list[jax.Array], rest: Any = None) -> Any:
    """`rest`, or `updates` itself, with what is floating in `updates` replaced in order."""
    new, rest = iter(leaves), updates if rest is None else rest
    return jax.tree.map(lambda x, r: next(new) if is_clippable(x) else r, updates, rest)


def clamp(value: Any, low: Any, high: Any) -> jax.Array:
    """`value` in float32 and in [low, high]; NaN stays NaN."""
    return jnp.clip(jnp.asarray(value, jnp.float32), low, high)


def exceeds(x: jax.Array, bound: jax.Array) -> jax.Array:
    """`|x| > bound` for real `x`, or the bound is 0; False for NaN.

    Compares bits, which order like magnitudes: XLA on CPU takes subnormals for zero (also
    where it turns a comparison of bits with 0 into one of numbers).
    """
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    no_sign = jnp.asarray(jnp.iinfo(unsigned).max >> 1, unsigned)
    magnitude, limit = (lax.bitcast_convert_type(a, unsigned) & no_sign for a in (x, bound))
    return ((magnitude > limit) | (limit == 0)) & ~jnp.isnan(x)


def import_extra(module: str, extra: str) -> Any:
    """Imports an optional module, or raises ImportError naming the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here; install it with: pip install 'jaxclip[{extra}]'"
        ) from error


def increment(count: jax.Array, condition: Any = True) -> jax.Array:
    """`count + 1` where `condition` holds, stopping at the largest integer."""
    return jnp.where(condition, jnp.asarray(optax.safe_increment(count)), count)


def has_nonfinite(tree: Any) -> jax.Array:
    """Whether a floating entry is not finite."""
    # Stacked as they are: a chain of 1,000 conditions is slow to compile.
    leaves = [zero_or_nan(jnp.asarray(x)) for x in floating_leaves(tree)]
    return jnp.any(jnp.isnan(jnp.stack(leaves))) if leaves else jnp.zeros((), bool)


@jax.jit
def zero_or_nan(x: jax.Array) -> jax.Array:
    """Float32 0, or NaN if an entry is not finite.

    A sum, for XLA on CPU writes out the conditions of which it takes the conjunction. Jitted,
    so that leaves of one shape share one trace.
    """
    if jnp.iscomplexobj(x):
        return zero_or_nan(jnp.real(x)) + zero_or_nan(jnp.imag(x))
    return jnp.sum((x - x).astype(jnp.float32))


def is_bad_step(updates: Any, bounds: Any) -> jax.Array:
    """Whether a floating entry of `updates` is not finite, or a bound (one a leaf) NaN."""
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(bounds), strict=True)
    return has_nonfinite(updates) | has_nan([b for g, b in pairs if is_clippable(g)])


def has_nan(bounds: list[Any]) -> jax.Array:
    """Whether a bound is NaN; numbers are not: they were checked when the transform was made."""
    nan = [jnp.any(jnp.isnan(bound)) for bound in bounds if isinstance(bound, jax.Array)]
    return jnp.any(jnp.stack(nan)) if nan else jnp.zeros((), bool)


def compute_dtype(*dtypes: Any) -> Any:
    """Float32, or wider or complex if one of `dtypes` is: what leaf functions compute in."""
    is_wide = any(jnp.finfo(d).bits == 64 for d in dtypes)
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes):
        return jnp.complex128 if is_wide else jnp.complex64
    return jnp.float64 if is_wide else jnp.float32


def keep_weak_type(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, weakly typed if `like` is; both have the same shape and dtype."""
    if like.weak_type and not x.weak_type:
        return like.at[...].set(x)
    return x


def check_params_given(name: str, params: Any) -> None:
    """Raises if a transform that reads the parameters was not given them."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters: call `tx.update(updates, state, params)` with params."
        )


def check_same_structure(name: str, updates: Any, other_name: str, other: Any) -> None:
    """Raises naming the first path at which two trees differ in structure or shape."""
    left = jax.tree_util.tree_leaves_with_path(updates)
    right = jax.tree_util.tree_leaves_with_path(other)
    for (path, a), (other_path, b) in zip(left, right, strict=False):
        if path_name(path) != path_name(other_path):
            raise ValueError(
                f"{name} and {other_name} must have the same structure; they first differ at "
                f"'{path_name(path)}' in {name} against '{path_name(other_path)}' in {other_name}."
            )
        if is_clippable(a) and np.shape(a) != np.shape(b):
            raise ValueError(
                f"{name} and {other_name} must have the same shapes; at '{path_name(path)}' "
                f"{name} has {np.shape(a)} and {other_name} has {np.shape(b)}."
            )
    if len(left) != len(right):
        longer, where = (left, name) if len(left) > len(right) else (right, other_name)
        extra = path_name(longer[min(len(left), len(right))][0])
        raise ValueError(
            f"{name} and {other_name} must have the same structure; '{extra}' is only in {where}."
        )


def check_num_leaves(leaves: list[Any], expected: int) -> None:
    """Raises unless the updates have as many floating leaves as the parameters had."""
    if len(leaves) != expected:
        raise ValueError(
            f"updates must have the floating leaves that the parameters had at init, "
            f"{expected} of them, got {len(leaves)}."
        )


def check_transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """`value` as a transform that accepts extra arguments. Raises TypeError if it is none."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        raise TypeError(f"{name} must be an optax transformation, got {value!r}.")
    return optax.with_extra_args_support(value)
