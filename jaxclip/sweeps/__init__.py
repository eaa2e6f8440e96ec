"""Sweeps: step sizes, thresholds, bits and seeds compared in one compiled program.

Each row is trained, compressed and measured; the result knows its Pareto front.
"""

from jaxclip.sweeps.grid import sweep as sweep
from jaxclip.sweeps.results import SweepResult as SweepResult
from jaxclip.sweeps.results import SweepRow as SweepRow
from jaxclip.sweeps.results import pareto_front as pareto_front
from jaxclip.sweeps.tasks import Task as Task
from jaxclip.sweeps.tasks import random_batches as random_batches
