"""Rules for operations that move the entries of a weight, or scale all of them."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import lax

from jaxclip._core.trees import is_clippable
from jaxclip.calibration.recorder import Recorder, Rule, Value, evaluate
from jaxclip.calibration.views import View


def _moved(move: Callable[[View, Any], View | None]) -> Rule:
    """Returns the rule of an operation with one operand, whose view it changes."""

    def rule(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
        del recorder
        view = values[0].view
        new = None if view is None or len(values) > 1 else move(view, equation.params)
        return None if new is None else [Value(evaluate(equation, values)[0], view=new)]

    return rule


def _reshape(view: View, params: Any) -> View | None:
    order = params["dimensions"]
    view = view if order is None else view.transposed(order)
    return view.reshaped(params["new_sizes"])


def _slice(view: View, params: Any) -> View | None:
    """Returns the view of a slice whose bounds are numbers."""
    if params["strides"] is not None and set(params["strides"]) != {1}:
        return None
    bounds = zip(params["start_indices"], params["limit_indices"], strict=True)
    return _cut(view, [(start, limit - start) for start, limit in bounds])


def _cut(view: View, slices: Sequence[tuple[Any, int]]) -> View | None:
    """Returns the view of a start and a width along each axis."""
    new: View | None = view
    for axis, (start, width) in enumerate(slices):
        if new is not None and width != view.sizes[axis]:
            new = new.sliced(axis, start, width)
    return new


def _split(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    del recorder
    view, axis = values[0].view, equation.params["axis"]
    if view is None:
        return None
    views, start = [], 0
    for size in map(int, equation.params["sizes"]):
        views.append(view if size == view.sizes[axis] else view.sliced(axis, start, size))
        start += size
    if None in views:
        return None
    return [Value(x, view=v) for x, v in zip(evaluate(equation, values), views, strict=True)]


def _dynamic_slice(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Follows a slice whose start may be traced, as in a loop over layers."""
    del recorder
    view, starts = values[0].view, [start.array for start in values[1:]]
    if view is None:
        return None
    # Starts beyond the end are moved alike by all slices of this kind, those of the sums included.
    view = _cut(view, list(zip(starts, equation.params["slice_sizes"], strict=True)))
    return None if view is None else [Value(evaluate(equation, values)[0], view=view)]


def _unchanged(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Follows operations with one result of the same entries for each operand."""
    del recorder
    arrays = evaluate(equation, values)
    if len(arrays) != len(values) or not all(map(is_clippable, arrays)):
        return None
    return [value._replace(array=x) for value, x in zip(values, arrays, strict=True)]


def _scaled(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Follows a product with a scalar, or a quotient by one."""
    del recorder
    is_quotient = equation.primitive.name == "div"
    for weight, other in [values] if is_quotient else [values, values[::-1]]:
        if weight.view is not None and other.scalar is not None:
            scalar = lax.convert_element_type(other.scalar, "float32")
            view = weight.view.scaled(1 / scalar if is_quotient else scalar)
            return [Value(evaluate(equation, values)[0], view=view)]
    return None


def _negated(view: View, params: Any) -> View:
    del params
    return view.scaled(-1.0)


# fmt: off
_UNCHANGED = (
    "convert_element_type", "reduce_precision", "copy", "copy_p", "device_put", "reshard",
    "sharding_constraint", "layout_constraint", "mesh_cast", "optimization_barrier", "pvary",
    "name", "stop_gradient",
)
# fmt: on
MOVES: dict[str, Rule] = {
    "transpose": _moved(lambda view, p: view.transposed(p["permutation"])),
    "reshape": _moved(_reshape),
    "squeeze": _moved(lambda view, p: view.squeezed(p["dimensions"])),
    "broadcast_in_dim": _moved(
        lambda view, p: view.broadcast(p["shape"], p["broadcast_dimensions"])
    ),
    "tile": _moved(lambda view, p: view.tiled(p["reps"])),
    "slice": _moved(_slice),
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "mul": _scaled,
    "div": _scaled,
    "neg": _moved(_negated),
    **dict.fromkeys(_UNCHANGED, _unchanged),
}
