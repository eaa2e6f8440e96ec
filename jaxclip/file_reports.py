"""What a file of weights holds, as its headers say."""

import dataclasses
import math

import jax.numpy as jnp

from jaxclip.grids import Bits
from jaxclip.quantization import QuantizedArray
from jaxclip.sources import Source

__all__ = ["FileReport", "TensorReport", "report_source"]


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One leaf of a file.

    Attributes:
      path: Its name in the file.
      shape: Shape of the array.
      dtype: Dtype of the array, `float32`.
      bits: Width of its codes, or None if it is stored as it is.
      num_bytes: Bytes that it takes in the file.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    bits: Bits | None
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What a file or folder of weights holds; `print` it for a table.

    Attributes:
      path: The file or folder.
      tensors: One `TensorReport` a leaf.
    """

    path: str
    tensors: tuple[TensorReport, ...]

    @property
    def num_weights(self) -> int:
        """Entries of all arrays."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes that all leaves take, without headers."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def __str__(self) -> str:
        width = max([len(tensor.path) for tensor in self.tensors] + [12])
        lines = [f"{'leaf':<{width}} {'shape':>16} {'dtype':>9} {'bits':>8} {'bytes':>13}"]
        lines += [
            f"{t.path:<{width}} {'x'.join(map(str, t.shape)) or 'scalar':>16} {t.dtype:>9} "
            f"{t.bits or 'as is':>8} {t.num_bytes:>13,}"
            for t in self.tensors
        ]
        totals = f"{len(self.tensors):,} leaves, {self.num_weights:,} entries"
        return "\n".join([*lines, f"{totals:<{width + 36}} {self.num_bytes:>13,}"])


def report_source(path: str, source: Source) -> FileReport:
    """Returns what a source holds; no weight is read.

    Args:
      path: Its name, for the report.
      source: An open source.

    Example:
      >>> import jax
      >>> leaves = {"w": jax.ShapeDtypeStruct((2, 3), "float32")}
      >>> report_source("net.npz", Source(leaves, str, {"w": 24})).num_weights
      6
    """
    tensors = tuple(
        TensorReport(
            path=name,
            shape=tuple(leaf.shape),
            dtype=jnp.dtype(leaf.dtype).name,
            bits=leaf.bits if isinstance(leaf, QuantizedArray) else None,
            num_bytes=source.num_bytes[name],
        )
        for name, leaf in source.leaves.items()
    )
    return FileReport(path, tensors)
