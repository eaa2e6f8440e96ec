"""One jit-compiled train step, and a loop that repeats it until a stop rule is met.

A bad step, with a NaN or infinity in a gradient that reaches a weight, changes nothing and is
counted.
"""

from jaxclip.training.averaging import average_weights as average_weights
from jaxclip.training.averaging import averaged_weights as averaged_weights
from jaxclip.training.info import StepInfo as StepInfo
from jaxclip.training.lint import Finding as Finding
from jaxclip.training.lint import lint as lint
from jaxclip.training.logs import log_to_jsonl as log_to_jsonl
from jaxclip.training.loop import FitResult as FitResult
from jaxclip.training.loop import fit as fit
from jaxclip.training.runs import Best as Best
from jaxclip.training.step import TrainState as TrainState
from jaxclip.training.step import make_train_step as make_train_step
from jaxclip.training.stochastic_rounding import (
    apply_updates_stochastically as apply_updates_stochastically,
)
from jaxclip.training.stopping import Progress as Progress
from jaxclip.training.stopping import StopReason as StopReason
from jaxclip.training.stopping import StopRule as StopRule
from jaxclip.training.stopping import max_seconds as max_seconds
from jaxclip.training.stopping import max_steps as max_steps
from jaxclip.training.stopping import nonfinite as nonfinite
from jaxclip.training.stopping import plateau as plateau
from jaxclip.training.stopping import reached as reached
from jaxclip.training.telemetry import clip_stats as clip_stats
from jaxclip.training.telemetry import explain as explain
