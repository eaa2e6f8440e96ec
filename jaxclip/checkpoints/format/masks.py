"""Which entries of a float leaf a file has, where its zeros are left out."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Mask:
    """A bit for each entry of a leaf, which says that the entry is stored.

    Attributes:
      num_values: Entries that are stored.
      num_bytes: Bytes of the mask in the file.
      coding: Its entropy coding, None for packed bits.
      bits: The bits, eight a byte in row-major order; None in a file that is read.
      data: Its bytes in the file; None in a file that is read.
    """

    num_values: int
    num_bytes: int
    coding: str | None
    bits: np.ndarray | None = None
    data: np.ndarray | None = None

    def chunk(self) -> np.ndarray:
        """Returns the bytes of the mask in the file."""
        assert self.data is not None
        return self.data

    def values_of(self, flat: np.ndarray, itemsize: int) -> np.ndarray:
        """Returns the bytes of the entries that are stored, from the bytes of all."""
        assert self.bits is not None
        entries = flat.view(f"u{itemsize}")
        is_value = np.unpackbits(self.bits, count=entries.size, bitorder="little").view(bool)
        return entries[is_value].view(np.uint8)
