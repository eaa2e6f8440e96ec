"""What weights look like, in memory and in files, and which thresholds they suggest."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core.extras import progress_bar
from jaxclip._core.grids import Bits
from jaxclip.checkpoints.reading import open_source
from jaxclip.checkpoints.sizes import FileReport, report_source
from jaxclip.lowbit.arrays import QuantizedArray, dequantize
from jaxclip.thresholds.by_error import mse_optimal

_CHUNK = 2**20
"""Entries looked at in one piece: bounds the memory."""
_SAMPLE = 2**16
"""Entries that suggest thresholds: one shape, so that the search compiles once a width."""
_NUM_BINS = 16
_SUGGESTED: tuple[Bits, ...] = (4, 3, 2, "ternary")
_BARS = " ▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class WeightStatistics:
    """How the entries of one array are spread.

    Attributes:
      num_entries: Number of entries.
      num_nonfinite: How many of them are NaN or infinite; they are left out of the rest.
      max_abs: Largest magnitude.
      rms: Root mean square.
      outlier_share: Share of entries beyond `outlier` times the rms.
      outlier: That number.
      histogram: Counts of 16 equal bins of [-max_abs, max_abs].
      thresholds: The clip threshold of least squared error for one scale, by bit width; from
        2**16 entries, evenly spaced, of a larger array.
    """

    num_entries: int
    num_nonfinite: int
    max_abs: float
    rms: float
    outlier_share: float
    outlier: float
    histogram: tuple[int, ...]
    thresholds: dict[Bits, float]

    @property
    def sparkline(self) -> str:
        """The histogram as a line of 16 bars; anything but nothing is visible."""
        top = max(self.histogram, default=0) or 1
        steps = len(_BARS) - 1
        return "".join(_BARS[math.ceil(steps * count / top)] for count in self.histogram)


def describe_weights(array: np.ndarray, outlier: float = 3.0) -> WeightStatistics:
    """Returns how the entries of an array are spread, in bounded memory.

    Args:
      array: Real array of any shape; not traced.
      outlier: From how many times the rms on an entry is counted as an outlier.

    Returns:
      A `WeightStatistics`; sums are in float64.

    Example:
      >>> s = describe_weights(np.array([0.1, -0.1, 0.1, -2.0], np.float32), outlier=1.5)
      >>> s.max_abs, round(s.rms, 3), s.outlier_share, s.sparkline
      (2.0, 1.004, 0.25, '▄      ▄█       ')
    """
    flat = np.asarray(array).reshape(-1)
    num_finite, squares, largest = 0, 0.0, 0.0
    for chunk in _finite_chunks(flat):
        num_finite += chunk.size
        largest = max(largest, float(np.abs(chunk).max(initial=0)))
    for chunk in _finite_chunks(flat):
        squares += float(np.square(chunk / (largest or 1)).sum())
    rms = largest * math.sqrt(squares / max(num_finite, 1))
    num_beyond, histogram = 0, np.zeros(_NUM_BINS, np.int64)
    for chunk in _finite_chunks(flat):
        num_beyond += int(np.count_nonzero(np.abs(chunk) > outlier * rms))
        span = largest or 1.0
        histogram += np.histogram(chunk, _NUM_BINS, (-span, span))[0]
    return WeightStatistics(
        num_entries=flat.size,
        num_nonfinite=flat.size - num_finite,
        max_abs=largest,
        rms=rms,
        outlier_share=num_beyond / max(num_finite, 1),
        outlier=outlier,
        histogram=tuple(histogram.tolist()),
        thresholds=_suggested(flat),
    )


def describe_file(path: str | os.PathLike, outlier: float = 3.0) -> dict[str, WeightStatistics]:
    """Returns how the floating leaves of a file or folder are spread, read one by one.

    Args:
      path: As in `checkpoints.load`.
      outlier: As in `describe_weights`.

    Returns:
      A `WeightStatistics` for each floating leaf, by name; of the values that low-bit leaves
      stand for.

    Raises:
      CheckpointError: As in `checkpoints.load`.

    Example:
      >>> describe_file("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    found = {}
    with open_source(Path(path)) as source:
        for name, like in source.leaves.items():
            if jnp.issubdtype(like.dtype, jnp.floating):
                leaf = source.read(name)
                array = dequantize(leaf) if isinstance(leaf, QuantizedArray) else leaf
                found[name] = describe_weights(np.asarray(array), outlier)
    return found


def verify_file(path: str | os.PathLike, progress: bool = True) -> FileReport:
    """Reads a whole file or folder and checks all that can be checked.

    Files of ours have a checksum for every byte. Others' have none: for them shapes, sizes
    and names are checked.

    Args:
      path: As in `checkpoints.load`.
      progress: Whether to show a bar where there is a terminal or a notebook, and rich.

    Returns:
      What `checkpoints.inspect` returns.

    Raises:
      CheckpointError: If anything is wrong.

    Example:
      >>> verify_file("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    with open_source(Path(path)) as source:
        total = sum(source.num_bytes.values())
        with progress_bar(total, progress, is_in_bytes=True) as advance:
            for name, num_bytes in source.num_bytes.items():
                source.read(name)
                advance(num_bytes)
        return report_source(str(path), source)


def _finite_chunks(flat: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(np.float64)
        yield chunk[np.isfinite(chunk)]


def _suggested(flat: np.ndarray) -> dict[Bits, float]:
    sample = flat[:: -(-flat.size // _SAMPLE) or 1].astype(np.float32)
    sample = np.pad(np.where(np.isfinite(sample), sample, 0), (0, _SAMPLE - sample.size))
    return {bits: float(_threshold(sample, bits)) for bits in _SUGGESTED}


@functools.partial(jax.jit, static_argnums=1)
def _threshold(sample: jax.Array, bits: Bits) -> jax.Array:
    return mse_optimal(bits)(sample).reshape(())
