"""Errors of leaves in the unit of the model's outputs, by which bits are shared out.

    error of the outputs = sensitivity * tr(E^T H E)

E is the rounding error of a leaf, and H the second moments of its inputs.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.distortion import squared_error, squared_norm
from jaxclip.lowbit.rounding.feedback import (
    FactoredMoments,
    factor_moments,
    output_energy,
    output_error,
)
from jaxclip.lowbit.rounding.input_steps import equal_rate_step
from jaxclip.lowbit.rounding.moments import InputMoments


@dataclasses.dataclass(frozen=True)
class LeafCalibration:
    """The part of a calibration that is for one leaf; all but `factored` need factored moments.

    Attributes:
      moments: Moments of the leaf's inputs, factored or not; None if they were not found.
      sensitivity: Error of the model's outputs for a unit of the leaf's; None if not measured.
    """

    moments: InputMoments | FactoredMoments | None
    sensitivity: float | None = None

    def factored(self, shape: tuple[int, ...], name: str) -> "LeafCalibration":
        """Returns this with factored moments, to be used several times."""
        if self.moments is None:
            return self
        return dataclasses.replace(self, moments=factor_moments(self.moments, shape, name))

    def equal_rate_step(self, leaf: ArrayLike) -> float:
        """Returns the step at which, at high rates, leaves take equal bits."""
        assert not isinstance(self.moments, InputMoments)
        return equal_rate_step(leaf, self.moments)

    def unit_step(self, leaf: ArrayLike) -> float:
        """Returns the leaf's part in a step that all leaves share."""
        if self.sensitivity is None:
            return self.equal_rate_step(leaf)
        # Outputs that do not depend on a leaf leave it no bits.
        return 1 / math.sqrt(max(self.sensitivity, 1e-30))

    def error_of(self, leaf: np.ndarray | jax.Array, small: QuantizedArray) -> float:
        """Returns the error of a low-bit leaf that budgets make small."""
        moments = self.moments
        assert not isinstance(moments, InputMoments)
        if moments is None:
            error, whole = squared_error(leaf, small), squared_norm(leaf)
        else:
            error, whole = output_error(leaf, small, moments), output_energy(leaf, moments)
        if self.sensitivity is not None:
            return self.sensitivity * error
        # Else a unit of relative error costs the same in every leaf.
        return error / whole if whole > 0 else 0.0
