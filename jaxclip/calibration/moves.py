"""Rules for operations that move the entries of a weight, or scale all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxclip._core.trees import is_clippable
from jaxclip.calibration.recorder import Recorder, Rule, Value, evaluate
from jaxclip.calibration.views import View


def _moved(move: Callable[[View, Any], View | None]) -> Rule:
    """Returns the rule of an operation with one operand, whose view it changes."""

    def rule(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
        del recorder
        views = _each(values[0], lambda view: move(view, equation.params))
        if views is None or len(values) > 1:
            return None
        return [values[0]._replace(array=evaluate(equation, values)[0], views=views)]

    return rule


def _each(value: Value, move: Callable[[View], View | None]) -> tuple[View, ...] | None:
    """Returns the moved views of a value; None if it has none, or one cannot be followed."""
    moved = [move(view) for view in value.views]
    followed = tuple(view for view in moved if view is not None)
    return followed if followed and len(followed) == len(moved) else None


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
    axis, start, parts = equation.params["axis"], 0, []
    for size in map(int, equation.params["sizes"]):
        views = _each(values[0], lambda view, a=start, n=size: view.sliced(axis, a, n))
        if views is None:
            return None
        parts.append(views)
        start += size
    arrays = evaluate(equation, values)
    return [values[0]._replace(array=x, views=v) for x, v in zip(arrays, parts, strict=True)]


def _join(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Follows weights that are joined, along an axis that they have or a new one."""
    del recorder
    if any(value.is_data or value.lookups for value in values):
        return None
    axis = equation.params.get("dimension", equation.params.get("axis"))
    is_new = equation.primitive.name == "stack"
    array = evaluate(equation, values)[0]
    views, start = [], 0
    for value in values:
        for view in value.views:
            view = view.with_axes((*view.axes[:axis], (), *view.axes[axis:])) if is_new else view
            views.append(view.joined(axis, start, array.shape[axis]))
        start += 1 if is_new else value.array.shape[axis]
    return _together(array, views, values)


def _added(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Follows a sum with other weights or constants, as of a weight and its adapter."""
    del recorder
    has_one_shape = len({jnp.shape(value.array) for value in values}) == 1
    if not has_one_shape or any(value.is_data or value.lookups for value in values):
        return None
    views = [view for value in values for view in value.views]
    return _together(evaluate(equation, values)[0], views, values)


def _together(
    array: Any, views: Sequence[View | None], values: Sequence[Value]
) -> list[Value] | None:
    """Returns an array that holds several weights, each of them once; None if that is not so."""
    followed = [view for view in views if view is not None]
    lost = dict(pair for value in values for pair in value.lost)
    paths = [*(view.path for view in followed), *lost]
    if not followed or len(followed) < len(views) or len(set(paths)) < len(paths):
        return None
    return [Value(array, views=tuple(followed), lost=tuple(lost.items()))]


def _dynamic_slice(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Follows a slice whose start may be traced, as in a loop over layers."""
    del recorder
    starts = [start.array for start in values[1:]]
    # Starts beyond the end are moved alike by all slices of this kind, those of the sums included.
    slices = list(zip(starts, equation.params["slice_sizes"], strict=True))
    views = _each(values[0], lambda view: _cut(view, slices))
    if views is None:
        return None
    return [values[0]._replace(array=evaluate(equation, values)[0], views=views)]


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
        if weight.views and other.scalar is not None:
            scalar = lax.convert_element_type(other.scalar, "float32")
            scalar = 1 / scalar if is_quotient else scalar
            views = tuple(view.scaled(scalar) for view in weight.views)
            return [weight._replace(array=evaluate(equation, values)[0], views=views)]
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
    "rev": _moved(lambda view, p: view.reversed(p["dimensions"])),
    "split": _split,
    "concatenate": _join,
    "stack": _join,
    "dynamic_slice": _dynamic_slice,
    **dict.fromkeys(("add", "sub", "add_any"), _added),
    "mul": _scaled,
    "div": _scaled,
    "neg": _moved(_negated),
    **dict.fromkeys(_UNCHANGED, _unchanged),
}
