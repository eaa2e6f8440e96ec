"""Rules for operations that run programs: calls, loops and branches."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxclip.calibration.recorder import Recorder, Rule, Value
from jaxclip.calibration.sums import AllSums, Key, with_scan_axis


def _call(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Evaluates a program on its own arguments in place."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    programs = [equation.params[name] for name in names if name in equation.params]
    return recorder.run(programs[0], values) if programs else None


def _cond(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Evaluates one of several branches; the others add nothing to the sums."""
    index, *operands = values
    if not any(value.is_data for value in values):
        return None

    def evaluate(branch: Any, arrays: Sequence[Any]) -> tuple[list[Any], AllSums]:
        given = [v._replace(array=x) for v, x in zip(operands, arrays, strict=True)]
        return recorder.scope(lambda: _left(recorder, recorder.run(branch, given), "cond"))

    arrays = [value.array for value in operands]
    branches = equation.params["branches"]
    shapes: AllSums = OrderedDict()
    for branch in branches:
        shapes |= jax.eval_shape(lambda xs, b=branch: evaluate(b, xs)[1], arrays)

    def with_zeros(branch: Any, arrays: Sequence[Any]) -> tuple[list[Any], AllSums]:
        outputs, sums = evaluate(branch, arrays)
        return outputs, _added(_zeros(shapes), sums)

    functions = [lambda *xs, b=branch: with_zeros(b, xs) for branch in branches]
    outputs, sums = lax.switch(index.array, functions, *arrays)
    for found in sums.items():
        recorder.record(*found)
    return [Value(x, is_data=True) for x in outputs]


class _Body(NamedTuple):
    """The program of a loop."""

    recorder: Recorder
    program: Any
    consts: list[Value]
    name: str

    @classmethod
    def of(
        cls, recorder: Recorder, program: Any, consts: list[Value], carry: list[Value], name: str
    ) -> "_Body":
        """Returns a body after noting the weights in its carry."""
        # The body changes them: jax makes constants of what a loop only carries along.
        for value in carry:
            recorder.lose(value, name)
        return cls(recorder, program, consts, name)

    def __call__(
        self, carried: Sequence[Any], others: Sequence[Value] = ()
    ) -> tuple[list[Any], list[Any], AllSums]:
        """Returns what is carried on, other outputs, and the sums of one iteration."""
        given = [*self.consts, *(Value(x, is_data=True) for x in carried), *others]
        self.recorder.depth += 1
        values, sums = self.recorder.scope(lambda: self.recorder.run(self.program, given))
        self.recorder.depth -= 1
        arrays = _left(self.recorder, values, self.name)
        return arrays[: len(carried)], arrays[len(carried) :], sums


def _scan(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Evaluates a loop; weights that it takes apart have a matrix for each iteration."""
    if not any(value.is_data for value in values):
        return None
    params, depth = equation.params, recorder.depth
    num_consts, num_fixed = _split_of_scan(equation)
    carry, xs = values[num_consts:num_fixed], values[num_fixed:]
    body = _Body.of(recorder, params["jaxpr"], values[:num_consts], carry, "scan")

    def evaluate(carried: Sequence[Any], sliced: Sequence[Any]) -> Any:
        slices = [_iteration(value, x, depth) for value, x in zip(xs, sliced, strict=True)]
        new, ys, sums = body(carried, slices)
        own = [k for k in sums if k.scanned and k.scanned[-1][0] == depth]
        stacked = OrderedDict((k, sums.pop(k)) for k in own)
        return new, ys, sums, stacked

    def step(state: Any, sliced: Sequence[Any]) -> Any:
        new, ys, sums, stacked = evaluate(state[0], sliced)
        return (new, _added(state[1], sums)), (ys, stacked)

    first, arrays = [v.array for v in carry], [v.array for v in xs]
    shapes = jax.eval_shape(lambda c, x: evaluate(c, [a[0] for a in x])[2], first, arrays)
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    (last, total), (ys, stacked) = lax.scan(step, (first, _zeros(shapes)), arrays, **options)
    for found in total.items():
        recorder.record(*found)
    for found in stacked.items():
        recorder.record(*with_scan_axis(*found))
    return [Value(x, is_data=True) for x in (*last, *ys)]


def _split_of_scan(equation: Any) -> tuple[int, int]:
    """Returns how many inputs of a loop are constants, and how many are no slices."""
    # By the shapes, because jax 0.12 has other parameters: only slices lose an axis on their way
    # in, and only what is stacked gains one on its way out.
    body = equation.params["jaxpr"]
    body = getattr(body, "jaxpr", body)

    def num_longer(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in pairs)

    num_fixed = len(equation.invars) - num_longer(equation.invars, body.invars)
    num_carry = len(equation.outvars) - num_longer(equation.outvars, body.outvars)
    return num_fixed - num_carry, num_fixed


def _while(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Evaluates a loop of any length; what its condition does with weights is not followed."""
    if not any(value.is_data for value in values):
        return None
    params = equation.params
    num_first, num_fixed = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    consts, carry = values[num_first:num_fixed], values[num_fixed:]
    body = _Body.of(recorder, params["body_jaxpr"], consts, carry, "while")

    def goes_on(state: Any) -> Any:
        given = [Value(v.array) for v in values[:num_first]] + [Value(x) for x in state[0]]
        return recorder.run(params["cond_jaxpr"], given)[0].array

    def step(state: Any) -> Any:
        new, _, sums = body(state[0])
        return new, _added(state[1], sums)

    first = [v.array for v in carry]
    shapes = jax.eval_shape(lambda carried: body(carried)[2], first)
    last, total = lax.while_loop(goes_on, step, (first, _zeros(shapes)))
    for found in total.items():
        recorder.record(*found)
    return [Value(x, is_data=True) for x in last]


def _iteration(value: Value, array: Any, depth: int) -> Value:
    """Returns the value of one iteration of an array that a scan takes apart."""
    if value.is_data or not value.is_weight:
        return Value(array, value.is_data)
    moved = [view.taken_apart(depth) for view in value.views]
    views = tuple(view for view in moved if view is not None)
    if value.lookups or len(views) < len(moved):
        return Value(array, lost=value.lost_by("scan"))
    return Value(array, views=views, lost=value.lost)


def _left(recorder: Recorder, values: Sequence[Value], name: str) -> list[Any]:
    """Returns the outputs of a loop or branch; weights among them are not followed further."""
    for value in values:
        recorder.lose(value, name)
    return [value.array for value in values]


def _zeros(shapes: AllSums) -> AllSums:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _added(total: AllSums, new: AllSums) -> AllSums:
    """Returns sums with those of equal keys added, of which there may be fewer."""

    def one(key: Key) -> Any:
        return jax.tree.map(jnp.add, total[key], new[key]) if key in new else total[key]

    return OrderedDict((key, one(key)) for key in total)


# fmt: off
_CALLS = (
    "pjit", "jit", "closed_call", "core_call", "checkpoint", "remat", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
)
# fmt: on
PROGRAMS: dict[str, Rule] = {
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    **dict.fromkeys(_CALLS, _call),
}
