"""Second moments of the inputs that a weight is multiplied by, and the matrices they are for.

    outputs = inputs @ W        error of the outputs = E^T H E,  H = sum of x x^T over the inputs x

A weight array is seen as a stack of (inputs, outputs) matrices; each matrix has moments of its own.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core.reports import format_table
from jaxclip._core.trees import PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MatrixView:
    """The axes of a weight array that are stacked, summed over, and kept by a product.

    Attributes:
      shape: The array's shape, or a refinement of it in which an axis is split into several.
      stack: Axes of `shape` with a matrix for each index: layers, experts, groups of channels.
      inputs: Axes of `shape` that the product sums over, in the order of the moments.
      outputs: The other axes of `shape`.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        axes = sorted((*self.stack, *self.inputs, *self.outputs))
        if axes != list(range(len(self.shape))):
            raise ValueError(
                f"stack, inputs and outputs must be the axes of {self.shape}, each once, got "
                f"{self.stack}, {self.inputs} and {self.outputs}."
            )

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """Matrices in the stack, inputs, outputs."""
        groups = (self.stack, self.inputs, self.outputs)
        stack, inputs, outputs = (math.prod(self.shape[a] for a in axes) for axes in groups)
        return stack, inputs, outputs

    def is_of(self, shape: tuple[int, ...]) -> bool:
        """Returns True if `self.shape` is that shape, or splits its axes."""
        rest = list(self.shape)
        for length in shape:
            part = 1
            while rest and (part < length or rest[0] == 1):
                part *= rest.pop(0)
            if part != length:
                return False
        return not rest

    def unfold(self, array: np.ndarray) -> np.ndarray:
        """Returns a weight array, of jax or NumPy, as matrices (stack, inputs, outputs)."""
        order = (*self.stack, *self.inputs, *self.outputs)
        return array.reshape(self.shape).transpose(order).reshape(self.matrix_shape)

    def fold(self, matrices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns matrices (stack, inputs, outputs) as a weight array of that shape."""
        order = (*self.stack, *self.inputs, *self.outputs)
        apart = matrices.reshape([self.shape[a] for a in order])
        return apart.transpose(np.argsort(order)).reshape(shape)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("second", "first", "count"),
    meta_fields=("view",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class InputMoments:
    """Sums over the inputs of one weight array, a pytree; moments of parts of the data add up.

    Attributes:
      second: Sums of x x^T, (stack, inputs, inputs); or their diagonals, (stack, inputs), for
        inputs that are too many, and for rows that are looked up by index, where they count.
      first: Sums of x, (stack, inputs).
      count: Number of inputs x that were summed, of each matrix (stack,).
      view: The matrices of the weight array.
    """

    second: jax.Array
    first: jax.Array
    count: jax.Array
    view: MatrixView

    @property
    def is_diagonal(self) -> bool:
        """True if only the diagonals of the second moments are known."""
        return self.second.ndim == 2

    def __add__(self, other: "InputMoments") -> "InputMoments":
        if self.view != other.view or self.is_diagonal != other.is_diagonal:
            raise ValueError(
                "moments must be for the same view of a weight and both be whole or diagonal to "
                f"be added, got {self.view} and {other.view}."
            )
        return jax.tree.map(jnp.add, self, other)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("moments", "sensitivities"),
    meta_fields=("missing", "notes"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Moments and sensitivities of the weights of a model, a pytree.

    Attributes:
      moments: Moments of the inputs of each weight, by the weight's path in the parameters.
      sensitivities: Rise of the outputs' error by path, for one unit of the weight's own error;
        empty if it was not measured.
      missing: Paths of weights whose inputs were not found.
      notes: Pairs of a path and what is to be said of how that weight is used.
    """

    moments: dict[str, InputMoments]
    sensitivities: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: "Calibration") -> "Calibration":
        if self.moments.keys() != other.moments.keys():
            apart = sorted(self.moments.keys() ^ other.moments.keys())
            raise ValueError(f"calibrations to be added must be for the same weights: {apart}.")
        moments = {path: m + other.moments[path] for path, m in self.moments.items()}
        sensitivities = self.sensitivities or other.sensitivities
        return Calibration(moments, sensitivities, self.missing, self.notes)

    def to_tree(self) -> dict[str, Any]:
        """Returns a dict of dicts of arrays, which `checkpoints.save` and any other file can hold.

        Views, missing paths and notes are the bytes of a text in `about`.
        """
        arrays = ("second", "first", "count")
        about = {
            "views": {path: dataclasses.asdict(m.view) for path, m in self.moments.items()},
            "missing": self.missing,
            "notes": self.notes,
        }
        return {
            "moments": {p: {k: getattr(m, k) for k in arrays} for p, m in self.moments.items()},
            "sensitivities": dict(self.sensitivities),
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        }

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Calibration":
        """Returns the calibration of which `to_tree` made a dict, with the arrays as they are."""
        try:
            about = json.loads(np.asarray(tree["about"]).tobytes())
            views = {
                path: MatrixView(**{name: tuple(axes) for name, axes in view.items()})
                for path, view in about["views"].items()
            }
            moments = {p: InputMoments(**tree["moments"][p], view=v) for p, v in views.items()}
            missing, notes = tuple(about["missing"]), tuple(map(tuple, about["notes"]))
            return cls(moments, dict(tree.get("sensitivities", {})), missing, notes)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"tree must be what Calibration.to_tree returns; this one is not: {error!r}."
            ) from error

    def __str__(self) -> str:
        """Returns a table of the weights: their inputs, and those without moments."""
        notes = dict(self.notes)
        rows = [("weight", "inputs", "moments", "samples", "note")]
        for path, m in self.moments.items():
            stack, inputs, _ = m.view.matrix_shape
            shape = f"{stack} x {inputs:,}" if m.view.stack else f"{inputs:,}"
            samples = f"{float(np.mean(m.count)):,.0f}"
            kind = "diagonal" if m.is_diagonal else "whole"
            rows.append((path, shape, kind, samples, notes.get(path, "")))
        rows += [(path, "", "none", "", notes.get(path, "")) for path in self.missing]
        return format_table(rows)
