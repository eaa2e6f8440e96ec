"""What a sweep trains, and whether it can."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip._core import checks
from jaxclip.training.stopping import StopRule

STEP_NUMBERS = ("loss", "weight_clip_rate", "weight_outside_rate", "num_skipped")


class Task(NamedTuple):
    """What is trained; a setting is a step size and a number that makes the box.

    Attributes:
      loss_fn: As in `make_train_step`.
      init_fn: `init_fn(key)` gives initial parameters.
      optimizer: `optimizer(step_size)` gives an optax transformation; the step size is traced.
      batches: `batches(key)` gives the batch of one step; pure, with a fresh key each step.
      weight_threshold: `weight_threshold(number)` gives a threshold of `make_train_step`; the
        number is traced. None for the number itself.
      evaluate: `evaluate(params)` gives scalars by name; pure.
      stop: A rule with a `max_steps` in it, and no `max_seconds`.
      evaluate_every: After how many steps the stop rule gets what `evaluate` gives; None if
        it looks at nothing of it.
    """

    loss_fn: Callable[..., Any]
    init_fn: Callable[[jax.Array], optax.Params]
    optimizer: Callable[[jax.Array], optax.GradientTransformation]
    batches: Callable[[jax.Array], Any]
    weight_threshold: Callable[[jax.Array], Any] | None
    evaluate: Callable[[optax.Params], dict[str, jax.Array]]
    stop: StopRule
    evaluate_every: int | None = None


def random_batches(data: Any, batch_size: int) -> Callable[[jax.Array], Any]:
    """Makes `batches(key)`, which draws examples at random, with replacement.

    Args:
      data: Pytree of arrays with a leading axis of examples, all of one length.
      batch_size: Examples of a batch, at least 1.

    Returns:
      A pure function of a PRNG key, for `sweep`.

    Raises:
      ValueError: If `batch_size` is not a count, or the arrays are not of one length.

    Example:
      >>> batches = random_batches({"x": jnp.ones((10, 3)), "y": jnp.arange(10)}, 4)
      >>> batch = batches(jax.random.key(0))
      >>> batch["x"].shape, batch["y"].shape
      ((4, 3), (4,))
    """
    checks.check_count("batch_size", batch_size)
    data = jax.tree.map(jnp.asarray, data)
    lengths = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(data)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"data must have arrays of one length, not 0, got {sorted(lengths)}.")
    num_examples = lengths.pop()

    def batches(key: jax.Array) -> Any:
        picks = jax.random.randint(key, (batch_size,), 0, num_examples)
        return jax.tree.map(lambda x: x[picks], data)

    return batches


def checked_task(task: Task, metrics: Sequence[str]) -> Task:
    """Returns the task as a program takes it.

    Args:
      task: As it was given.
      metrics: Names that `evaluate` must give.

    Raises:
      TypeError: If `stop` is not a stop rule, or `evaluate` gives no dict.
      ValueError: If a metric is not among those that `evaluate` gives, or no scalar; if `stop`
        has no last step, looks at the clock or at what both a step and `evaluate` give, or needs
        an `evaluate_every`.

    Example:
      >>> import jaxclip
      >>> zeros = lambda *_: jnp.zeros(())
      >>> task = Task(*[zeros] * 5, lambda params: {"size": params}, jaxclip.max_steps(3), 2)
      >>> checked_task(task, ["size"]).evaluate_every is None
      True
    """
    _check_stop(task.stop)
    params = jax.eval_shape(task.init_fn, jax.random.key(0))
    found = jax.eval_shape(task.evaluate, params)
    if not isinstance(found, dict):
        raise TypeError(f"evaluate must return a dict of metrics, got {type(found).__name__}.")
    for name in metrics:
        if name not in found:
            raise ValueError(f"evaluate gives {sorted(found)}, and no {name!r}.")
    for name, value in found.items():
        if jnp.shape(value):
            raise ValueError(f"evaluate must give scalars, {name!r} has shape {jnp.shape(value)}.")
    check_told_apart(task.stop, STEP_NUMBERS, found)
    watched = sorted(task.stop.metrics & set(found))
    if watched and task.evaluate_every is None:
        raise ValueError(f"stop looks at {watched}: set evaluate_every.")
    return task._replace(evaluate_every=task.evaluate_every if watched else None)


def check_told_apart(stop: StopRule, reported: Iterable[str], evaluated: Iterable[str]) -> None:
    """Checks that the stop rule looks at no name of two numbers: it would see either in turn.

    Args:
      stop: A stop rule.
      reported: Names of what each step reports.
      evaluated: Names of what `evaluate` gives.

    Raises:
      ValueError: If it does.

    Example:
      >>> import jaxclip
      >>> check_told_apart(jaxclip.training.plateau("error", 3), ["loss"], ["loss", "error"])
    """
    both = sorted(stop.metrics & set(reported) & set(evaluated))
    if both:
        raise ValueError(
            f"evaluate returns {both}, which the step reports already, and stop looks at it: "
            "give it another name."
        )


def checked_seeds(seeds: int | Sequence[int]) -> list[int]:
    """Returns the seeds that were counted or named.

    Args:
      seeds: As in `sweep`.

    Raises:
      TypeError: If one is no integer.
      ValueError: If there is none, one twice, or one that a PRNG key does not take.

    Example:
      >>> checked_seeds(3), checked_seeds([7, 5])
      ([0, 1, 2], [7, 5])
    """
    if isinstance(seeds, (int, np.integer)):
        checks.check_count("seeds", seeds)
        return list(range(int(seeds)))
    found = []
    for i, seed in enumerate(seeds):
        try:
            found.append(operator.index(seed))
        except TypeError as error:
            raise TypeError(f"seeds[{i}] must be an integer, got {seed!r}.") from error
        if not -(2**31) <= found[-1] < 2**31:
            raise ValueError(f"seeds[{i}] must be within 32 bits, got {seed!r}.")
    if not found or len(set(found)) != len(found):
        raise ValueError(f"seeds must have at least one integer, and none twice, got {found}.")
    return found


def _check_stop(stop: StopRule) -> None:
    if not isinstance(stop, StopRule):
        raise TypeError(f"stop must be a stop rule, such as max_steps(1000), got {stop!r}.")
    if stop.num_steps is None:
        raise ValueError("stop must have a last step: add | max_steps(...).")
    if stop.uses_clock:
        raise ValueError("stop looks at the clock, which all rows of a sweep share.")
