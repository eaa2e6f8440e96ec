"""When training ends: rules that are values, joined by `|`.

A rule is a pure function of what a step has shown, a `Seen`, and of what the rule remembers:
arrays in, arrays out. So the same rule serves a loop on the host and one inside `lax.scan`.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxclip._core import checks


class StopReason(enum.Enum):
    """Why training ended; the value of a member is a sentence."""

    MAX_STEPS = "The last of the steps was taken."
    MAX_SECONDS = "The time was up."
    REACHED = "The metric reached its target."
    PLATEAU = "The metric no longer got better."
    NONFINITE = "Too many steps in a row were not finite."
    DATA_ENDED = "The data came to an end."
    INTERRUPTED = "A signal asked for it (SIGINT or SIGTERM)."

    def __str__(self) -> str:
        return self.value


class Seen(NamedTuple):
    """What a rule may look at; scalars, or numbers.

    Attributes:
      step: Steps taken so far, skipped ones included.
      seconds: Time since the start.
      num_skipped: Steps skipped so far because something was not finite, counted from when
        the rule remembered nothing yet.
      metrics: Numbers by name, "loss" among them. A metric that is not measured at every
        step is there only when it was.
    """

    step: ArrayLike
    seconds: ArrayLike
    num_skipped: ArrayLike
    metrics: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class StopRule:
    """When to stop, made by a function of this module; `a | b` stops when either does.

    Attributes:
      init: `init()` gives what the rule remembers before the first step, arrays.
      update: `update(memory, seen)` gives the new memory, and an int32 code: 0 to go on,
        else 1 + the place of the `StopReason` among its members.
      metrics: Names of the metrics that it looks at.
      num_steps: The step at which it stops by count, at the latest; None if it does not.
      uses_clock: Whether it looks at the seconds.
      remembers: What the parts of the memory are of. Of two rules with the same, either can
        go on with what the other remembers.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Seen], tuple[Any, jax.Array]]
    metrics: frozenset[str] = frozenset()
    num_steps: int | None = None
    uses_clock: bool = False
    remembers: tuple[str, ...] = ()

    def __or__(self, other: "StopRule") -> "StopRule":
        if not isinstance(other, StopRule):
            return NotImplemented

        def update(memory: Any, seen: Seen) -> tuple[Any, jax.Array]:
            first, code = self.update(memory[0], seen)
            second, other_code = other.update(memory[1], seen)
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

    def reason(self, code: Any) -> StopReason | None:
        """Returns what a concrete code of `update` stands for; None to go on."""
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
      >>> memory, code = rule.update(rule.init(), Seen(10, 0.5, 0, {"loss": 1.0}))
      >>> print(rule.reason(code))
      The last of the steps was taken.
    """
    checks.check_count("num_steps", num_steps)
    rule = _stateless(StopReason.MAX_STEPS, lambda seen: jnp.asarray(seen.step) >= num_steps)
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
      >>> rule.reason(rule.update(rule.init(), Seen(10, 60.5, 0, {}))[1])
      <StopReason.MAX_SECONDS: 'The time was up.'>
    """
    checks.check_positive("seconds", seconds)
    rule = _stateless(StopReason.MAX_SECONDS, lambda seen: jnp.asarray(seen.seconds) >= seconds)
    return dataclasses.replace(rule, uses_clock=True)


def reached(metric: str, target: float, *, mode: str = "max") -> StopRule:
    """Stops when a metric is at its target or better.

    Args:
      metric: Its name.
      target: Finite number.
      mode: "max" if larger is better, "min" if smaller is.

    Returns:
      A `StopRule`. NaN is never there.

    Raises:
      TypeError: If `metric` is not a string, or `target` not a number.
      ValueError: If `target` is not finite, or `mode` neither of the two.

    Example:
      >>> rule = reached("accuracy", 0.98)
      >>> rule.reason(rule.update(rule.init(), Seen(3, 1.0, 0, {"accuracy": 0.99}))[1])
      <StopReason.REACHED: 'The metric reached its target.'>
    """
    _check_metric(metric, mode)
    checks.check_finite("target", target)

    def is_there(seen: Seen) -> Any:
        if metric not in seen.metrics:
            return False
        value = jnp.asarray(seen.metrics[metric])
        return value >= target if mode == "max" else value <= target

    rule = _stateless(StopReason.REACHED, is_there)
    return dataclasses.replace(rule, metrics=frozenset({metric}))


def plateau(metric: str, patience: int, min_delta: float = 0.0, *, mode: str = "min") -> StopRule:
    """Stops when a metric was measured `patience` times without a new best.

    Args:
      metric: Its name.
      patience: Integer of at least 1.
      min_delta: By how much more than the best a value must be better to be the new best;
        not negative.
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
      ...     memory, code = rule.update(memory, Seen(step + 1, 0.0, 0, {"loss": loss}))
      >>> print(rule.reason(code))
      The metric no longer got better.
    """
    _check_metric(metric, mode)
    checks.check_count("patience", patience)
    checks.check_nonnegative("min_delta", min_delta)
    sign = 1 if mode == "min" else -1

    def init() -> tuple[jax.Array, jax.Array]:
        return jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)

    def update(memory: Any, seen: Seen) -> tuple[Any, jax.Array]:
        if metric not in seen.metrics:
            return memory, jnp.zeros((), jnp.int32)
        best, num_since = memory
        value = sign * jnp.asarray(seen.metrics[metric]).astype(jnp.float32)
        is_better = value < best - min_delta
        num_since = jnp.where(is_better, 0, num_since + 1)
        code = _code(StopReason.PLATEAU, num_since >= patience)
        return (jnp.where(is_better, value, best), num_since), code

    margin = float(min_delta) if checks.is_concrete(min_delta) else min_delta
    of = f"the best {metric!r} by {mode!r} and {margin!r}, and looks since then"
    return StopRule(init, update, frozenset({metric}), remembers=(of,))


def nonfinite(num_steps: int) -> StopRule:
    """Stops when `num_steps` steps in a row were skipped because something was not finite.

    Args:
      num_steps: Integer of at least 1.

    Returns:
      A `StopRule`. Where not every step is looked at, a row is taken to go on as long as
      steps are skipped between two looks.

    Raises:
      ValueError: If `num_steps` is not an integer of at least 1.

    Example:
      >>> rule = nonfinite(2)
      >>> memory = rule.init()
      >>> for num_skipped in (1, 1, 2, 3):
      ...     memory, code = rule.update(memory, Seen(0, 0.0, num_skipped, {}))
      >>> print(rule.reason(code))
      Too many steps in a row were not finite.
    """
    checks.check_count("num_steps", num_steps)

    def init() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)

    def update(memory: Any, seen: Seen) -> tuple[Any, jax.Array]:
        before, in_a_row = memory
        now = jnp.asarray(seen.num_skipped).astype(jnp.int32)
        in_a_row = jnp.where(now > before, in_a_row + now - before, 0)
        return (now, in_a_row), _code(StopReason.NONFINITE, in_a_row >= num_steps)

    return StopRule(init, update, remembers=("steps skipped in a row",))


# --- Parts ----------------------------------------------------------------------------


def _stateless(reason: StopReason, is_met: Callable[[Seen], Any]) -> StopRule:
    return StopRule(lambda: (), lambda memory, seen: (memory, _code(reason, is_met(seen))))


def _code(reason: StopReason, is_met: Any) -> jax.Array:
    return jnp.where(is_met, 1 + list(StopReason).index(reason), 0).astype(jnp.int32)


def _check_metric(metric: Any, mode: Any) -> None:
    if not isinstance(metric, str):
        raise TypeError(f"metric must be the name of a metric, got {metric!r}.")
    checks.check_choice("mode", mode, ("min", "max"))
