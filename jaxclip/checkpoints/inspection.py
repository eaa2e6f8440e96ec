"""Statistics of weights in a file, and a check of all its bytes.

Weights are read leaf by leaf and measured in pieces, so memory is bounded by the largest leaf.
`rms = sqrt(mean(w**2))`, and an outlier is an entry beyond some multiple of it.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import signals
from jaxclip._core.extras import progress_bar
from jaxclip._core.grids import Bits
from jaxclip.checkpoints.format.headers import MAX_RATIO
from jaxclip.checkpoints.reading import open_source
from jaxclip.checkpoints.sizes import SizeReport, report_source
from jaxclip.lowbit.arrays import dequantize, is_quantized
from jaxclip.thresholds.by_error import mse_optimal

_CHUNK = 2**20  # entries measured in one piece, which bounds the memory
_SAMPLE = 2**16  # entries that suggest thresholds: a fixed number, so a width compiles only once
_NUM_BINS = 16
_SUGGESTED: tuple[Bits, ...] = (4, 3, 2, "ternary")
_BARS = " ▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class WeightStatistics:
    """Statistics of the entries of one array.

    Attributes:
      num_entries: Number of entries.
      num_nonfinite: Number of NaNs and infinities, which the numbers below leave out.
      density: Fraction of the entries that are not 0, in [0, 1]; 1 if there are none.
      max_abs: Largest magnitude.
      rms: Root mean square.
      outlier_rate: Fraction of entries beyond `outlier` times the rms, in [0, 1].
      outlier: That multiple.
      histogram: Counts of 16 equal bins of [-max_abs, max_abs].
      thresholds: Clip threshold of least squared error for one scale, by bit width. A larger
        array is represented by 2**16 entries, evenly spaced.
    """

    num_entries: int
    num_nonfinite: int
    density: float
    max_abs: float
    rms: float
    outlier_rate: float
    outlier: float
    histogram: tuple[int, ...]
    thresholds: dict[Bits, float]

    @property
    def sparkline(self) -> str:
        """The histogram as a line of 16 bars; every bin that is not empty is visible."""
        top = max(self.histogram, default=0) or 1
        steps = len(_BARS) - 1
        return "".join(_BARS[math.ceil(steps * count / top)] for count in self.histogram)


def describe_weights(array: np.ndarray, outlier: float = 3.0) -> WeightStatistics:
    """Returns the statistics of a real array, with sums in float64 and bounded memory."""
    flat = np.asarray(array).reshape(-1)
    num_finite, num_zeros, squares, largest = 0, 0, 0.0, 0.0
    for chunk in _finite_chunks(flat):
        num_finite += chunk.size
        num_zeros += chunk.size - int(np.count_nonzero(chunk))
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
        density=1 - num_zeros / max(flat.size, 1),
        max_abs=largest,
        rms=rms,
        outlier_rate=num_beyond / max(num_finite, 1),
        outlier=outlier,
        histogram=tuple(histogram.tolist()),
        thresholds=_suggested_thresholds(flat),
    )


def describe_file(
    path: str | os.PathLike, outlier: float = 3.0, *, max_ratio: float = MAX_RATIO
) -> dict[str, WeightStatistics]:
    """Returns statistics of the floating leaves of a file or folder, read one by one.

    Args:
      path: A file or folder that `checkpoints.load` takes.
      outlier: Multiple of the rms beyond which an entry counts as an outlier.
      max_ratio: Bytes of arrays that a byte of the file may stand for, as for `load`.

    Returns:
      A `WeightStatistics` for each floating leaf, by name. Low-bit leaves are dequantized.

    Raises:
      CheckpointError: If the file is damaged, foreign or of a newer version.
      FileNotFoundError: If there is no file.

    Example:
      >>> describe_file("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    statistics = {}
    with open_source(Path(path), max_ratio) as source:
        for name, like in source.leaves.items():
            if jnp.issubdtype(like.dtype, jnp.floating):
                leaf = source.read(name)
                array = dequantize(leaf) if is_quantized(leaf) else leaf
                statistics[name] = describe_weights(np.asarray(array), outlier)
    return statistics


def verify_file(
    path: str | os.PathLike, progress: bool = True, *, max_ratio: float = MAX_RATIO
) -> SizeReport:
    """Reads a whole file or folder and checks everything that can be checked.

    Files of `checkpoints.save` have a checksum for every byte. Those of other libraries have
    none: names, shapes and sizes are checked.

    Args:
      path: A file or folder that `checkpoints.load` takes.
      progress: True to show a bar on a terminal or in a notebook, if rich is installed.
      max_ratio: Bytes of arrays that a byte of the file may stand for, as for `load`.

    Returns:
      The report of `checkpoints.inspect`.

    Raises:
      CheckpointError: If anything is wrong.
      FileNotFoundError: If there is no file.

    Example:
      >>> verify_file("net.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'net.safetensors'.
    """
    with open_source(Path(path), max_ratio) as source:
        total = sum(source.num_bytes.values())
        with progress_bar(total, progress, is_in_bytes=True) as advance:
            for name, num_bytes in source.num_bytes.items():
                source.read(name)
                advance(num_bytes)
        return report_source(source)


def _finite_chunks(flat: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, flat.size, _CHUNK):
        signals.check_stop()
        chunk = flat[start : start + _CHUNK].astype(np.float64)
        yield chunk[np.isfinite(chunk)]


def _suggested_thresholds(flat: np.ndarray) -> dict[Bits, float]:
    sample = flat[:: -(-flat.size // _SAMPLE) or 1].astype(np.float32)
    sample = np.pad(np.where(np.isfinite(sample), sample, 0), (0, _SAMPLE - sample.size))
    thresholds = {}
    for bits in _SUGGESTED:
        signals.check_stop()
        thresholds[bits] = float(_threshold(sample, bits))
    return thresholds


@functools.partial(jax.jit, static_argnums=1)
def _threshold(sample: jax.Array, bits: Bits) -> jax.Array:
    return mse_optimal(bits)(sample).reshape(())
