"""What may be given as a threshold, and what becomes of it for every leaf.

A threshold is, wherever one is asked for:

* a number in [0, inf], or a 0-d array, possibly traced (inf: never clip);
* a schedule, `step -> number`;
* a rule, `array -> threshold`: one of `jaxclip.threshold_rules`, or `fan_in` of
  `jaxclip.layer_rules`; or one for a whole tree, `jaxclip.tree_rules.per_tree`;
* a prefix tree of these, one for each part of the parameters.

A bound holds for the number as given: it is rounded towards zero into the dtype of what
it bounds, so 0.1 never becomes bfloat16's 0.10009766.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks, trees
from jaxclip.thresholds.rules import ThresholdRule


def check_threshold_tree(name: str, threshold: Any) -> None:
    """Raises unless every entry of a threshold tree is a number, schedule or rule.

    Args:
      name: The argument's name, for the message.
      threshold: What was given. Traced numbers are not looked at.

    Raises:
      TypeError: If an entry is a string, None, bool, complex, or a rule's factory.
      ValueError: If a concrete number is negative or NaN.

    Example:
      >>> check_threshold_tree("max_abs", {"w": -1.0})
      Traceback (most recent call last):
      ValueError: max_abs at 'w' must be in [0, inf], got -1.0 of type float.
    """
    entries = jax.tree_util.tree_leaves_with_path(threshold, is_leaf=is_threshold_leaf)
    for path, given in entries:
        where = f"{name} at '{trees.path_name(path)}'" if path else name
        if is_rule_factory(given):
            raise TypeError(f"{where} is the factory {given.__name__}: call it to make a rule.")
        if not callable(given):
            checks.check_threshold_array(where, given)


def is_rule_factory(given: Any) -> bool:
    """Returns whether something is a function that makes a rule, by what it says it returns.

    Args:
      given: Anything.

    Example:
      >>> from jaxclip import max_abs
      >>> is_rule_factory(max_abs), is_rule_factory(max_abs())
      (True, False)
    """
    return getattr(given, "__annotations__", {}).get("return") is ThresholdRule


def check_one_threshold(name: str, threshold: Any) -> None:
    """Raises unless `threshold` is a number, schedule, or rule for what sees a leaf at a time.

    Args:
      name: The argument's name, for the message.
      threshold: What was given. Traced numbers are not looked at.

    Raises:
      TypeError: If it is a tree of thresholds or a rule for a whole tree, and as
        `check_threshold_tree`.
      ValueError: If a concrete number is negative or NaN.

    Example:
      >>> check_one_threshold("max_norm", [1.0, 2.0])
      Traceback (most recent call last):
      TypeError: max_norm must be one threshold and no tree of them, got [1.0, 2.0].
    """
    if isinstance(threshold, (dict, list, tuple)):
        raise TypeError(f"{name} must be one threshold and no tree of them, got {threshold!r}.")
    check_threshold_tree(name, threshold)
    if not getattr(threshold, "is_leafwise", True):
        raise TypeError(
            f"{name} must be a threshold for each leaf alone, but per_tree looks at all leaves."
        )


def check_number_or_schedule(
    name: str, given: Any, check_number: Callable[[str, Any], None] = checks.check_threshold
) -> None:
    """Raises unless `given` is a number or a schedule; rules, though callable, are neither.

    Args:
      name: The argument's name, for the message.
      given: What was given. Traced numbers are not looked at.
      check_number: What raises, given the name and a number, if it is out of range.

    Raises:
      TypeError: If it is a rule, a rule's factory, or no number.
      ValueError: If a concrete number is out of range.

    Example:
      >>> from jaxclip import fan_in
      >>> check_number_or_schedule("decay", fan_in(1.0))
      Traceback (most recent call last):
      TypeError: decay must be a number or a schedule: a rule measures arrays, not steps.
    """
    if isinstance(given, ThresholdRule) or is_rule_factory(given):
        raise TypeError(
            f"{name} must be a number or a schedule: a rule measures arrays, not steps."
        )
    if not callable(given):
        check_number(name, given)


def is_threshold_leaf(x: Any) -> bool:
    """Returns whether a node of a prefix tree is one threshold, whatever it has inside.

    Args:
      x: A node.

    Example:
      >>> is_threshold_leaf(None), is_threshold_leaf({"kernel": 0.5})
      (True, False)
    """
    return x is None or callable(x)


def resolve_threshold(threshold: Any, params: Any, step: Any = None) -> Any:
    """Returns a threshold for every leaf of `params`, from whatever was given.

    Args:
      threshold: A number, schedule, rule, an array that broadcasts against the leaves, or
        a prefix tree of these.
      params: Pytree whose leaves are bounded. Rules look at shapes or values.
      step: Scalar integer for schedules; without it they are taken at step 0.

    Returns:
      A tree with the structure of `params`. Each leaf is a Python float if it was given
      as a number, else a float32 array that broadcasts against the leaf (float64 if it was
      given so). A jax array's entries below 0 count as 0; leaves that have no threshold
      (integers, or biases under `fan_in`) get `inf`.

    Raises:
      TypeError: If a threshold is a string, None, bool, complex, or a rule's factory.
      ValueError: If a concrete number is negative or NaN, an array does not broadcast, or
        the prefix does not fit; the message names the path.

    Example:
      >>> resolve_threshold({"w": 0.5, "b": float("inf")}, {"w": jnp.ones(2), "b": jnp.ones(2)})
      {'b': inf, 'w': 0.5}
    """
    check_threshold_tree("threshold", threshold)
    step = jnp.zeros((), jnp.int32) if step is None else step

    def resolve_subtree(prefix_path: tuple, given: Any, subtree: Any) -> Any:
        if callable(given) and not isinstance(given, ThresholdRule):
            given = jnp.asarray(given(step))
        flat, structure = jax.tree_util.tree_flatten_with_path(subtree)
        bounded = [
            (trees.path_name(prefix_path + path), leaf)
            for path, leaf in flat
            if trees.is_clippable(leaf)
        ]
        if isinstance(given, ThresholdRule):
            found = given.for_leaves(bounded, step)
        elif isinstance(given, jax.Array) and given.ndim == 0:
            found = [as_threshold(given)] * len(bounded)  # the same array for all leaves
        else:
            found = [as_threshold(given, name, np.shape(leaf)) for name, leaf in bounded]
        rest = iter(found)
        return structure.unflatten(
            [next(rest) if trees.is_clippable(leaf) else float("inf") for _, leaf in flat]
        )

    try:
        entries, treedef = jax.tree_util.tree_flatten_with_path(
            threshold, is_leaf=is_threshold_leaf
        )
        subtrees = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            "threshold must be one value or a prefix tree of the parameters; "
            f"this one is not: {error}"
        ) from error
    resolved = [
        resolve_subtree(*entry, tree) for entry, tree in zip(entries, subtrees, strict=True)
    ]
    return jax.tree.unflatten(treedef, resolved)


def as_threshold(given: Any, name: str = "", shape: tuple[int, ...] = ()) -> Any:
    """Returns a threshold as what bounds: a Python float, or a jax array, never below 0.

    Args:
      given: A number or an array of them.
      name: The leaf's path, for the message.
      shape: The shape of the leaf that it bounds; the array gets its rank.

    Raises:
      ValueError: If an array does not broadcast to that shape.

    Example:
      >>> as_threshold(1), as_threshold(jnp.array([-1.0, 2.0]), "kernel", (3, 2)).tolist()
      (1.0, [[0.0, 2.0]])
    """
    if np.ndim(given) == 0 and not isinstance(given, jax.Array):
        return float(given)
    t = jnp.asarray(given)
    if t.ndim:
        padded = (1,) * (len(shape) - t.ndim) + t.shape
        if len(padded) != len(shape) or any(
            n not in (1, m) for n, m in zip(padded, shape, strict=True)
        ):
            raise ValueError(
                f"threshold for '{name}' must broadcast to its shape {shape}, got {t.shape}."
            )
        t = t.reshape(padded)
    return jnp.maximum(t if t.dtype == jnp.float64 else t.astype(jnp.float32), 0)
