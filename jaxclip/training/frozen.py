"""Leaves that do not train: no gradient of theirs reaches their own weight, at any step.

Read off the program of the optimizer, so it holds for whatever froze them: `partition`,
`set_to_zero`, `masked`, a wrapper around these, or a transform of one's own.
"""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core.floats import first_true, has_nonfinite


class _Value(NamedTuple):
    """An array of the program: the gradients that it depends on, as bits, and if it is 0."""

    sources: int = 0
    is_zero: bool = False


_ZERO = _Value(is_zero=True)

# fmt: off
# Primitives that run a program on their own arguments.
_CALLS = frozenset((
    "pjit", "jit", "closed_call", "core_call", "checkpoint", "remat2", "shard_map",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
))
# Primitives that make 0 of zeros.
_KEEP_ZERO = frozenset((
    "add", "add_any", "sub", "neg", "abs", "sign", "sqrt", "square", "max", "min", "real", "imag",
    "complex", "conj", "convert_element_type", "reduce_precision", "reduce_sum", "copy",
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "concatenate",
    "sharding_constraint", "reshard", "pvary", "psum",
))
# fmt: on


def find_frozen(
    update: jax.stages.Wrapped, grads: optax.Updates, opt_state: optax.OptState
) -> list[bool]:
    """Returns True for each leaf of the gradients that never reaches its own weight.

    `update(grads, opt_state)` is jitted, and returns updates and a new state before all else.
    Where no gradient reaches a weight, none is called frozen: the optimizer may take them itself,
    of its `value_fn`.
    """
    traced = update.trace(grads, opt_state)
    updates, new_state, *_ = traced.out_info
    num_grads = len(jax.tree.leaves(grads))
    num_states = len(jax.tree.leaves(opt_state))
    if (len(jax.tree.leaves(updates)), len(jax.tree.leaves(new_state))) != (num_grads, num_states):
        return [False] * num_grads
    # Before the arguments come the arrays that `update` closes over.
    num_others = len(traced.jaxpr.jaxpr.invars) - num_grads - num_states
    inputs = [_Value()] * num_others + [_Value(1 << i) for i in range(num_grads)]
    states = [_Value()] * num_states
    while True:  # what a step leaves in the state may reach a weight at a later one
        outputs = _outputs(traced.jaxpr, inputs + states)
        is_frozen = [not (outputs[i].sources >> i) & 1 for i in range(num_grads)]
        if not any(is_frozen):  # the usual case, and reaching further changes nothing
            return is_frozen
        pairs = zip(states, outputs[num_grads:][:num_states], strict=True)
        grown = [_Value(old.sources | new.sources) for old, new in pairs]
        if grown == states:
            return [False] * num_grads if all(is_frozen) else is_frozen
        states = grown


def zero_nonfinite(grads: optax.Updates, is_frozen: Sequence[bool]) -> optax.Updates:
    """Returns the gradients with the non-finite entries of frozen leaves as 0."""

    def of_leaf(is_frozen: bool, g: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(g), g, jnp.zeros_like(g)) if is_frozen else g

    leaves, structure = jax.tree.flatten(grads)
    return structure.unflatten(map(of_leaf, is_frozen, leaves))


def first_nonfinite(
    leaf_norms: jax.Array, grads: optax.Updates, is_frozen: Sequence[bool]
) -> jax.Array:
    """Returns the position of the first leaf that is not finite, frozen ones last; -1 if none."""
    # `leaf_norms` are those of `zero_nonfinite`: only the frozen leaves are read here.
    first = first_true(~jnp.isfinite(leaf_norms))
    if not any(is_frozen):
        return first
    frozen = [g for g, is_in in zip(jax.tree.leaves(grads), is_frozen, strict=True) if is_in]
    first_frozen = first_true(jnp.stack([has_nonfinite(g) for g in frozen]))
    positions = np.append(np.flatnonzero(is_frozen), -1).astype(np.int32)
    return jnp.where(first >= 0, first, jnp.asarray(positions)[first_frozen])


def _outputs(jaxpr: Any, inputs: Sequence[_Value]) -> list[_Value]:
    """Returns the values of a program's outputs."""
    # Jaxprs and literals are recognized by their attributes: `jax.extend.core` is slow to import.
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Value:
        if hasattr(atom, "val"):
            return _ZERO if getattr(atom.val, "ndim", 0) == 0 and atom.val == 0 else _Value()
        return known.get(atom, _Value())  # a constant, if it is not known

    for equation in jaxpr.eqns:
        results = _results(equation, [read(atom) for atom in equation.invars])
        known |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _results(equation: Any, values: list[_Value]) -> list[_Value]:
    """Returns the values that one operation gives."""
    name = equation.primitive.name
    if name in _CALLS:
        programs = [equation.params[k] for k in ("jaxpr", "call_jaxpr") if k in equation.params]
        if programs:
            return _outputs(programs[0], values)
    if name == "cond":
        branches = [_outputs(branch, values[1:]) for branch in equation.params["branches"]]
        return [_chosen(values[0], cases) for cases in zip(*branches, strict=True)]
    if name == "select_n":
        return [_chosen(values[0], values[1:])]
    if name == "optimization_barrier":
        return values
    # 0 times a coefficient that depends on other gradients: it is finite in a step that counts.
    is_product = name == "mul" and any(value.is_zero for value in values)
    is_quotient = name == "div" and values[0].is_zero
    is_kept = name in _KEEP_ZERO and all(value.is_zero for value in values)
    result = _ZERO if is_product or is_quotient or is_kept else _joined(values)
    return [result] * len(equation.outvars)


def _chosen(chooser: _Value, cases: Sequence[_Value]) -> _Value:
    return _ZERO if all(case.is_zero for case in cases) else _joined([chooser, *cases])


def _joined(values: Sequence[_Value]) -> _Value:
    return _Value(reduce(operator.or_, (value.sources for value in values), 0))
