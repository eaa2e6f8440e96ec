"""Stop rules: values, joined by `|`, that say when training ends.

    memory, code = rule.update(memory, progress)

A rule is a pure function of the `Progress` of training and of its own memory: arrays in,
arrays out. So the same rule serves a loop on the host and one inside `lax.scan`.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.trees import PyTree

Mode: TypeAlias = Literal["max", "min"]  # the better direction of a metric


class StopReason(enum.Enum):
    """Why training ended; the value of a member is a sentence."""

    MAX_STEPS = "The last step was taken."
    MAX_SECONDS = "The time limit was reached."
    REACHED = "The metric reached its target."
    PLATEAU = "The metric stopped improving."
    NONFINITE = "Too many steps in a row were not finite."
    DATA_ENDED = "The data ended."
    INTERRUPTED = "A signal arrived."
    OUTRANKED = "Other settings of the sweep were better."

    def __str__(self) -> str:
        return self.value


class Progress(NamedTuple):
    """Training progress passed to a stop rule; all fields are scalars.

    Attributes:
      step: Steps taken so far, skipped ones included.
      seconds: Time since the start.
      num_skipped: Steps skipped because something was not finite, counted from the rule's
        `init`.
      metrics: Scalars by name, "loss" among them. A metric that is not measured at every
        step is present only at the steps that measured it.
    """

    step: ArrayLike
    seconds: ArrayLike
    num_skipped: ArrayLike
    metrics: Mapping[str, ArrayLike]


@dataclasses.dataclass(frozen=True)
class StopRule:
    """Condition for the end of training, made by a factory; `a | b` stops when either does.

    Attributes:
      init: `init()` gives the memory of the rule before the first step: a pytree of arrays.
      update: `update(memory, progress)` gives the new memory, and an int32 code: 0 to
        continue, else 1 + the position of the `StopReason` among its members.
      metrics: Names of the metrics that the rule reads.
      num_steps: The largest number of steps that it allows; None if it has no such limit.
      uses_clock: True if it reads the seconds.
      remembers: Descriptions of the parts of the memory. A rule can continue from the memory
        of another if both have the same descriptions.
    """

    init: Callable[[], PyTree]
    update: Callable[[PyTree, Progress], tuple[PyTree, jax.Array]]
    metrics: frozenset[str] = frozenset()
    num_steps: int | None = None
    uses_clock: bool = False
    remembers: tuple[str, ...] = ()

    def __or__(self, other: "StopRule") -> "StopRule":
        if not isinstance(other, StopRule):
            return NotImplemented

        def update(memory: PyTree, progress: Progress) -> tuple[PyTree, jax.Array]:
            first, code = self.update(memory[0], progress)
            second, other_code = other.update(memory[1], progress)
            return (first, second), jnp.where(code > 0, code, other_code)

        counts = [n for n in (self.num_steps, other.num_steps) if n is not None]
        return StopRule(
            init=lambda: (self.init(), other.init()),
            update=update,
            metrics=self.metrics | other.metrics,
            num_steps=min(counts, default=None),
            uses_clock=self.uses_clock or other.uses_clock,
            remembers=self.remembers + other.remembers,
        )

    def reason(self, code: int | jax.Array) -> StopReason | None:
        """Returns the reason that a concrete code of `update` stands for; None to continue."""
        return list(StopReason)[int(code) - 1] if int(code) > 0 else None


def max_steps(num_steps: int) -> StopRule:
    """Stops when `num_steps` steps have been taken, those before a restart included.

    Args:
      num_steps: Integer of at least 1.

    Returns:
      A `StopRule`.

    Raises:
      ValueError: If `num_steps` is not an integer of at least 1.

    Example:
      >>> rule = max_steps(10)
      >>> memory, code = rule.update(rule.init(), Progress(10, 0.5, 0, {"loss": 1.0}))
      >>> print(rule.reason(code))
      The last step was taken.
    """
    checks.check_count("num_steps", num_steps)
    rule = _stateless(
        StopReason.MAX_STEPS, lambda progress: jnp.asarray(progress.step) >= num_steps
    )
    return dataclasses.replace(rule, num_steps=int(num_steps))


def max_seconds(seconds: float) -> StopRule:
    """Stops after the first step that ends `seconds` or more after the start.

    Args:
      seconds: Positive number; compiling counts, too.

    Returns:
      A `StopRule`.

    Raises:
      TypeError: If `seconds` is not a number.
      ValueError: If it is not positive.

    Example:
      >>> rule = max_seconds(60.0) | max_steps(1000)
      >>> rule.reason(rule.update(rule.init(), Progress(10, 60.5, 0, {}))[1])
      <StopReason.MAX_SECONDS: 'The time limit was reached.'>
    """
    checks.check_positive("seconds", seconds)
    rule = _stateless(
        StopReason.MAX_SECONDS, lambda progress: jnp.asarray(progress.seconds) >= seconds
    )
    return dataclasses.replace(rule, uses_clock=True)


def reached(metric: str, target: float, *, mode: Mode = "max") -> StopRule:
    """Stops when a metric is at its target or better.

    Args:
      metric: Its name.
      target: Finite number.
      mode: "max" if larger is better, "min" if smaller is.

    Returns:
      A `StopRule`. NaN never reaches a target.

    Raises:
      TypeError: If `metric` is not a string, or `target` not a number.
      ValueError: If `target` is not finite, or `mode` neither of the two.

    Example:
      >>> rule = reached("accuracy", 0.98)
      >>> rule.reason(rule.update(rule.init(), Progress(3, 1.0, 0, {"accuracy": 0.99}))[1])
      <StopReason.REACHED: 'The metric reached its target.'>
    """
    _check_metric(metric, mode)
    checks.check_finite("target", target)

    def is_reached(progress: Progress) -> ArrayLike:
        if metric not in progress.metrics:
            return False
        value = jnp.asarray(progress.metrics[metric])
        return value >= target if mode == "max" else value <= target

    rule = _stateless(StopReason.REACHED, is_reached)
    return dataclasses.replace(rule, metrics=frozenset({metric}))


def plateau(metric: str, patience: int, min_delta: float = 0.0, *, mode: Mode = "min") -> StopRule:
    """Stops when a metric was measured `patience` times without a new best.

    Args:
      metric: Its name.
      patience: Integer of at least 1.
      min_delta: How much better than the best a value must be to become the new best; not
        negative.
      mode: "min" if smaller is better, "max" if larger is.

    Returns:
      A `StopRule`. NaN is never a new best.

    Raises:
      TypeError: If `metric` is not a string, or `min_delta` not a number.
      ValueError: If another argument is out of its range.

    Example:
      >>> rule = plateau("loss", 2)
      >>> memory = rule.init()
      >>> for step, loss in enumerate([1.0, 0.9, 0.95, 0.9]):
      ...     memory, code = rule.update(memory, Progress(step + 1, 0.0, 0, {"loss": loss}))
      >>> print(rule.reason(code))
      The metric stopped improving.
    """
    _check_metric(metric, mode)
    checks.check_count("patience", patience)
    checks.check_nonnegative("min_delta", min_delta)
    sign = 1 if mode == "min" else -1

    def init() -> tuple[jax.Array, jax.Array]:
        return jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)

    def update(memory: PyTree, progress: Progress) -> tuple[PyTree, jax.Array]:
        if metric not in progress.metrics:
            return memory, jnp.zeros((), jnp.int32)
        best, num_since = memory
        value = sign * jnp.asarray(progress.metrics[metric]).astype(jnp.float32)
        is_better = value < best - min_delta
        num_since = jnp.where(is_better, 0, num_since + 1)
        code = _code(StopReason.PLATEAU, num_since >= patience)
        return (jnp.where(is_better, value, best), num_since), code

    margin = float(min_delta) if checks.is_concrete(min_delta) else min_delta
    description = f"the best {metric!r} by {mode!r} and {margin!r}, and looks since then"
    return StopRule(init, update, frozenset({metric}), remembers=(description,))


def nonfinite(num_steps: int) -> StopRule:
    """Stops when `num_steps` steps in a row were skipped because something was not finite.

    Args:
      num_steps: Integer of at least 1.

    Returns:
      A `StopRule`. Where not every step is checked, a run of skipped steps counts as
      unbroken as long as steps are skipped between two checks.

    Raises:
      ValueError: If `num_steps` is not an integer of at least 1.

    Example:
      >>> rule = nonfinite(2)
      >>> memory = rule.init()
      >>> for num_skipped in (1, 1, 2, 3):
      ...     memory, code = rule.update(memory, Progress(0, 0.0, num_skipped, {}))
      >>> print(rule.reason(code))
      Too many steps in a row were not finite.
    """
    checks.check_count("num_steps", num_steps)

    def init() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)

    def update(memory: PyTree, progress: Progress) -> tuple[PyTree, jax.Array]:
        last, num_in_a_row = memory
        num_skipped = jnp.asarray(progress.num_skipped).astype(jnp.int32)
        num_in_a_row = jnp.where(num_skipped > last, num_in_a_row + num_skipped - last, 0)
        return (num_skipped, num_in_a_row), _code(StopReason.NONFINITE, num_in_a_row >= num_steps)

    return StopRule(init, update, remembers=("steps skipped in a row",))


def _stateless(reason: StopReason, is_met: Callable[[Progress], ArrayLike]) -> StopRule:
    def update(memory: PyTree, progress: Progress) -> tuple[PyTree, jax.Array]:
        return memory, _code(reason, is_met(progress))

    return StopRule(init=lambda: (), update=update)


def _code(reason: StopReason, is_met: ArrayLike) -> jax.Array:
    return jnp.where(is_met, 1 + list(StopReason).index(reason), 0).astype(jnp.int32)


def _check_metric(metric: str, mode: Mode) -> None:
    if not isinstance(metric, str):
        raise TypeError(f"metric must be the name of a metric, got {metric!r}.")
    checks.check_choice("mode", mode, ("min", "max"))
