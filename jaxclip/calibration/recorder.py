"""A program evaluated beside the sums over the inputs of the weights in it.

Each equation is evaluated as it stands. An array that is a weight in another form has a `View`;
where it meets an array that depends on the batch, the rule of that operation adds to the sums.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxclip.calibration.sums import AllSums, Key, Sums
from jaxclip.calibration.views import View

Lookups: TypeAlias = tuple[tuple[Key, Sums], ...]


class Value(NamedTuple):
    """An array of the program.

    Attributes:
      array: The array.
      is_data: True if it depends on the batch; the other fields are for arrays that do not.
      views: The weight that it holds; several if they were joined.
      lost: Paths of weights that it depends on in other ways, and the first operation that did.
      scalar: The scalar that all of its entries equal, if that is known.
      lookups: Counts of its rows, if they were looked up by indices.
    """

    array: Any
    is_data: bool = False
    views: tuple[View, ...] = ()
    lost: tuple[tuple[str, str], ...] = ()
    scalar: Any = None
    lookups: Lookups = ()

    @property
    def is_weight(self) -> bool:
        """True if it is a weight, or depends on weights alone."""
        return bool(self.views or self.lost or self.lookups)

    def lost_by(self, operation: str) -> tuple[tuple[str, str], ...]:
        """Returns the weights that an operation loses, and where each was lost first."""
        followed = ((view.path, operation) for view in self.views)
        return *followed, *self.lost, *((key.path, operation) for key, _ in self.lookups)


def constant(array: Any) -> Value:
    """Returns the value of an array that depends on nothing."""
    return Value(array, scalar=None if getattr(array, "ndim", 0) else array)


# Returns the values of an equation's outputs, or None if the rule does not apply.
Rule: TypeAlias = Callable[["Recorder", Any, list[Value]], list[Value] | None]

# fmt: off
# Operations whose result has the rows of their operands, in another shape or beside others.
_KEEP_ROWS = frozenset((
    "add", "add_any", "sub", "concatenate", "select_n", "broadcast_in_dim", "reshape", "squeeze",
    "transpose", "slice", "convert_element_type", "copy", "sharding_constraint", "reshard",
))
_KEEP_SCALAR = frozenset(("broadcast_in_dim", "reshape", "convert_element_type", "copy"))
# fmt: on


class Recorder:
    """Evaluates programs, and holds sums over the inputs of the weights in them.

    Attributes:
      rules: Rules for operations on weights, by the operation's name.
      max_dim: Largest number of inputs for which second moments are kept whole.
      sums: Sums over the inputs, in the order of the program.
      notes: By path, the operation through which a weight was not followed.
      depth: Number of loops around the program that is evaluated.
    """

    def __init__(self, rules: Mapping[str, Rule], max_dim: int):
        self.rules = rules
        self.max_dim = max_dim
        self.sums: AllSums = OrderedDict()
        self.notes: dict[str, str] = {}
        self.depth = 0

    def run(self, jaxpr: Any, values: Sequence[Value]) -> list[Value]:
        """Returns the values of a program's outputs."""
        # Jaxprs and literals are recognized by their attributes: `jax.extend.core` imports slowly.
        # Since jax 0.12 all jaxprs are closed, and each is its own `jaxpr`.
        consts = getattr(jaxpr, "consts", ())
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
        known |= zip(jaxpr.invars, values, strict=True)

        def read(atom: Any) -> Value:
            return constant(atom.val) if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            with equation.ctx.manager:
                results = self._results(equation, [read(atom) for atom in equation.invars])
            known |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def record(self, key: Key, sums: Sums) -> None:
        """Adds sums to those of the same key."""
        old = self.sums.get(key)
        self.sums[key] = sums if old is None else jax.tree.map(jnp.add, old, sums)

    def lose(self, value: Value, operation: str) -> None:
        """Notes weights that meet the batch in an operation that says nothing of their inputs."""
        for path, first in value.lost_by(operation):
            self.notes.setdefault(path, first)

    def scope(self, evaluate: Callable[[], Any]) -> tuple[Any, AllSums]:
        """Returns what a function does, and the sums of what it evaluates."""
        outside, self.sums = self.sums, OrderedDict()
        try:
            return evaluate(), self.sums
        finally:
            self.sums = outside

    def _results(self, equation: Any, values: list[Value]) -> list[Value]:
        if any(value.is_weight for value in values):
            rule = self.rules.get(equation.primitive.name)
            results = rule(self, equation, values) if rule else None
            if results is not None:
                return results
        arrays = evaluate(equation, values)
        if any(value.is_data for value in values):
            return self._with_data(equation.primitive.name, values, arrays)
        return _without_data(equation.primitive.name, values, arrays)

    def _with_data(self, name: str, values: list[Value], arrays: list[Any]) -> list[Value]:
        """Returns the results of an operation in which weights meet the batch."""
        for value in values:
            if name in _KEEP_ROWS and value.lookups:
                for found in value.lookups:
                    self.record(*found)
                value = value._replace(lookups=())
            self.lose(value, name)
        return [Value(x, is_data=True) for x in arrays]


def _without_data(name: str, values: list[Value], arrays: list[Any]) -> list[Value]:
    """Returns the results of an operation on weights and constants alone."""
    lookups = [found for value in values for found in value.lookups]
    if lookups and name in _KEEP_ROWS and not any(v.views or v.lost for v in values):
        return [Value(x, lookups=tuple(lookups)) for x in arrays]
    lost = dict(pair for value in reversed(values) for pair in value.lost_by(name))
    if lost:
        return [Value(x, lost=tuple(lost.items())) for x in arrays]
    if name in _KEEP_SCALAR and values[0].scalar is not None:
        return [Value(arrays[0], scalar=values[0].scalar)]
    return [constant(x) for x in arrays]


def evaluate(equation: Any, values: Sequence[Value]) -> list[Any]:
    """Returns the arrays that an equation gives."""
    params, arrays = equation.primitive.get_bind_params(equation.params), [v.array for v in values]
    if not isinstance(params, dict):  # before jax 0.10: functions come before the arrays
        functions, params = params
        arrays = [*functions, *arrays]
    results = equation.primitive.bind(*arrays, **params)
    return list(results) if equation.primitive.multiple_results else [results]
