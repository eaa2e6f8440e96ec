"""A leaf in a file, of which some rows are read at a time."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """A plain leaf in a file; `leaf[start:stop]` reads rows.

    Attributes:
      shape: Its shape, of one dimension or more.
      dtype: Its dtype, of whole bytes.
      read_bytes: Reads so many bytes of it from a position on, as a flat array of uint8.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_bytes: Callable[[int, int], np.ndarray]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        data = self.read_bytes(start * self.row_bytes, (stop - start) * self.row_bytes)
        return data.view(self.dtype).reshape(-1, *self.shape[1:])

    def within(
        self,
        context: Callable[[], AbstractContextManager],
        after: Callable[[int], object] = lambda num_bytes: None,
    ) -> "StoredRows":
        """Returns the same leaf, read within a context; `after` gets the bytes of each read."""

        def read_bytes(start: int, num_bytes: int) -> np.ndarray:
            with context():
                data = self.read_bytes(start, num_bytes)
            after(num_bytes)
            return data

        return dataclasses.replace(self, read_bytes=read_bytes)
