"""Rules for operations in which the batch meets a weight as a matrix, or looks up its rows."""

from typing import Any

from jaxclip.calibration.recorder import Recorder, Rule, Value, evaluate
from jaxclip.calibration.sums import Operand, of_lookup, of_product


def _dot(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    contracted, batched = equation.params["dimension_numbers"]
    for i in (0, 1):
        weight, other = values[i], values[1 - i]
        if weight.view is None or not other.is_data:
            continue
        pairs = [tuple(zip(axes[1 - i], axes[i], strict=True)) for axes in (contracted, batched)]
        found = of_product(weight.view, Operand(other.array, *pairs), recorder.max_dim)
        if found is not None:
            recorder.record(*found)
            return [Value(evaluate(equation, values)[0], is_data=True)]
    return None


def _gather(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Counts rows that are looked up whole, by one index each."""
    rows, indices = values
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if rows.view is None or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    axis = numbers.start_index_map[0]
    if [size for i, size in enumerate(sizes) if i != axis] != [
        size for i, size in enumerate(rows.array.shape) if i != axis
    ]:
        return None
    if sizes[axis] != 1 or rows.array.shape[axis] == 1:
        return None
    is_clipped = str(equation.params["mode"]).endswith("CLIP")
    found = of_lookup(rows.view, axis, indices.array[..., 0], is_clipped)
    if found is None:
        return None
    array = evaluate(equation, values)[0]
    if not indices.is_data:  # these may be rows, or a permutation of a matrix
        return [Value(array, lookups=(found,))]
    recorder.record(*found)
    return [Value(array, is_data=True)]


CONSUMERS: dict[str, Rule] = {"dot_general": _dot, "gather": _gather}
