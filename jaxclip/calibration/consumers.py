"""Rules for operations in which the batch meets a weight as a matrix, or looks up its rows."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from jaxclip.calibration.recorder import Recorder, Rule, Value, evaluate
from jaxclip.calibration.sums import Operand, of_groups, of_lookup, of_product
from jaxclip.calibration.views import View


def _dot(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    contracted, batched = equation.params["dimension_numbers"]
    for i in (0, 1):
        weight, other = values[i], values[1 - i]
        if not weight.views or not other.is_data:
            continue
        pairs, stacked = (
            tuple(zip(axes[1 - i], axes[i], strict=True)) for axes in (contracted, batched)
        )
        operand = Operand(other.array, pairs, stacked)
        return _recorded(recorder, equation, values, weight, weight.views, operand)
    return None


def _recorded(
    recorder: Recorder,
    equation: Any,
    values: list[Value],
    weight: Value,
    views: Sequence[View],
    operand: Operand,
) -> list[Value] | None:
    """Returns the result of a product after its sums were recorded, for each weight in it."""
    found = [of_product(view, operand, recorder.max_dim) for view in views]
    if None in found:
        return None
    for pair in found:
        if pair is not None:
            recorder.record(*pair)
    recorder.lose(weight._replace(views=()), equation.primitive.name)
    return [Value(evaluate(equation, values)[0], is_data=True)]


def _gather(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Counts rows that are looked up whole, by one index each."""
    rows, indices = values
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if len(rows.views) != 1 or rows.lost or numbers.operand_batching_dims:
        return None
    mode = str(equation.params["mode"])
    cut = [i for i, size in enumerate(sizes) if size != rows.array.shape[i]]
    # Along whole axes a clipped index is 0, as where vmap makes a lookup of a dynamic slice.
    if len(cut) != 1 or sizes[cut[0]] != 1 or cut[0] not in numbers.start_index_map:
        return None
    # Elsewhere an index into a whole axis may read nothing.
    if mode.endswith("FILL_OR_DROP") and len(numbers.start_index_map) > 1:
        return None
    place = numbers.start_index_map.index(cut[0])
    found = of_lookup(rows.views[0], cut[0], indices.array[..., place], mode.endswith("CLIP"))
    if found is None:
        return None
    array = evaluate(equation, values)[0]
    if not indices.is_data:  # these may be rows, or a permutation of a matrix
        return [Value(array, lookups=(found,))]
    recorder.record(*found)
    return [Value(array, is_data=True)]


def _convolve(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Sums over patches: a kernel has a matrix for each group of channels."""
    images, kernel = values
    params = equation.params
    if not kernel.views or not images.is_data or params["batch_group_count"] != 1:
        return None
    numbers, num_groups = params["dimension_numbers"], params["feature_group_count"]
    # Outputs, channels of a group, and the axes of space.
    num_outputs, *window = (kernel.array.shape[i] for i in numbers.rhs_spec)
    by_group = (num_groups, num_outputs // num_groups, *window)
    views = [view.transposed(numbers.rhs_spec).reshaped(by_group) for view in kernel.views]
    if None in views:
        return None

    def patches(x: jax.Array) -> jax.Array:
        """Returns (batch, groups, channels, *window, *space)."""
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        x = lax.conv_general_dilated_patches(
            x.transpose(numbers.lhs_spec),
            window[1:],
            precision=lax.Precision.HIGHEST,
            **{name: params[name] for name in names},
        )
        return x.reshape(x.shape[0], num_groups, *window, *x.shape[2:])

    contracted = tuple((2 + i, 2 + i) for i in range(len(window)))
    operand = Operand(images.array, contracted, ((1, 0),), patches)
    followed = [view for view in views if view is not None]
    return _recorded(recorder, equation, values, kernel, followed, operand)


def _ragged_dot(recorder: Recorder, equation: Any, values: list[Value]) -> list[Value] | None:
    """Sums over the rows that each expert meets."""
    rows, weight, group_sizes, *_ = values
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (of_rows, of_weight), batched = numbers.dot_dimension_numbers
    is_plain = (
        not batched[0]
        and tuple(of_rows) == (1,)
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and rows.array.ndim == 2
    )
    if len(weight.views) != 1 or weight.lost or not rows.is_data or not is_plain:
        return None
    axes = (numbers.rhs_group_dimensions[0], of_weight[0])
    found = of_groups(weight.views[0], rows.array, group_sizes.array, axes, recorder.max_dim)
    if found is None:
        return None
    recorder.record(*found)
    return [Value(evaluate(equation, values)[0], is_data=True)]


CONSUMERS: dict[str, Rule] = {
    "conv_general_dilated": _convolve,
    "dot_general": _dot,
    "gather": _gather,
    "ragged_dot_general": _ragged_dot,
}
