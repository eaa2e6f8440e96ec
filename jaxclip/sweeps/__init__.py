"""Sweeps: step sizes, boxes, widths and seeds of one task compared; compiled once for all.

Each setting is trained, compressed and measured; the result knows which settings no other
beats in both metric and bytes.
"""

from jaxclip.sweeps.grid import sweep as sweep
from jaxclip.sweeps.results import SweepResult as SweepResult
from jaxclip.sweeps.table import SweepRow as SweepRow
from jaxclip.sweeps.table import pareto_front as pareto_front
from jaxclip.sweeps.tasks import Task as Task
from jaxclip.sweeps.tasks import random_batches as random_batches
