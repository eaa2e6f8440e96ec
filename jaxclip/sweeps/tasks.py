"""The problem of a sweep: loss, data and optimizer, the end of training, and the evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.trees import PyTree
from jaxclip.sparsity.keeping import keep_sparse
from jaxclip.training.stopping import Mode, StopReason, StopRule

OUTRANKED = 1 + list(StopReason).index(StopReason.OUTRANKED)  # a stop rule's code
STEP_METRICS = ("loss", "grad_norm", "weight_clip_rate", "num_skipped")


@dataclasses.dataclass(frozen=True)
class Task:
    """A training problem; a step size and the half-width of a box complete it.

    Attributes:
      loss_fn: Loss of `make_train_step`, without `aux`.
      init_fn: `init_fn(key)` returns initial parameters; or several such functions by name, to
        compare models, for instance of different widths. The other functions serve all of them.
      optimizer: `optimizer(step_size)` returns an optax transformation, or with weight decays
        `optimizer(step_size, weight_decay=...)`. Both numbers are traced: they may go into a
        schedule, but not into a Python `if`. With `average_weights` in it, the averages are
        evaluated, compressed and returned.
      batches: `batches(key)` returns the batch of a step; pure, with a new key for each step.
        `random_batches` makes such a function from arrays.
      stop: A stop rule with a `max_steps` in it and no `max_seconds`, such as
        `max_steps(1000) | plateau("loss", 50)`. It sees the metrics of every step.
      evaluate: `evaluate(params)` returns scalars by name; pure, because it is compiled.
      metric: Name of the scalar by which settings are judged.
      train_metric: Name of the same scalar on the training data, for the generalization gap.
      mode: "max" if a larger metric is better, "min" if a smaller one is.
      weight_threshold: `weight_threshold(number)` returns a threshold for `make_train_step`;
        the number is traced. `fan_in` takes multiples of the initial scale, a function of your
        own may return a schedule. None bounds all weights by the number itself.
      evaluate_every: Steps between two evaluations for `stop`; needed only if `stop` reads
        a scalar of `evaluate`.

    Raises:
      TypeError: If `stop` is not a stop rule, or the name of a model is not a string.
      ValueError: If there is no model, `stop` has no last step or reads the clock, `mode` is
        neither "max" nor "min", or `evaluate_every` is not an integer of at least 1.

    Example:
      >>> import jaxclip
      >>> task = Task(
      ...     lambda w, noise: jnp.mean((w - noise) ** 2),
      ...     lambda key: jnp.zeros((64, 8)),
      ...     jaxclip.sign_sgd,
      ...     lambda key: jax.random.normal(key, (64, 8)),
      ...     stop=jaxclip.max_steps(10),
      ...     evaluate=lambda w: {"size": jnp.mean(w**2)},
      ...     metric="size",
      ...     mode="min",
      ... )
      >>> jaxclip.sweep(task, step_sizes=[0.1], seeds=1, bits=(4,), progress=False).loss.shape
      (1, 1, 1)
    """

    loss_fn: Callable[..., ArrayLike]
    init_fn: Callable[[jax.Array], optax.Params] | Mapping[str, Callable[[jax.Array], optax.Params]]
    optimizer: Callable[..., optax.GradientTransformation]
    batches: Callable[[jax.Array], PyTree]
    _: dataclasses.KW_ONLY
    stop: StopRule
    evaluate: Callable[[optax.Params], dict[str, ArrayLike]]
    metric: str
    train_metric: str | None = None
    mode: Mode = "max"
    weight_threshold: Callable[[jax.Array], PyTree] | None = None
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.init_fn, Mapping):
            if not self.init_fn:
                raise ValueError("init_fn must have at least one model, got an empty mapping.")
            for name in self.init_fn:
                if not isinstance(name, str):
                    raise TypeError(f"init_fn must have strings for names of models, got {name!r}.")
        if not isinstance(self.stop, StopRule):
            raise TypeError(
                f"stop must be a stop rule, such as max_steps(1000), got {self.stop!r}."
            )
        if self.stop.num_steps is None:
            raise ValueError("stop must have a last step: add | max_steps(...).")
        if self.stop.uses_clock:
            raise ValueError("stop must not read the clock, which all rows of a sweep share.")
        checks.check_choice("mode", self.mode, ("max", "min"))
        if self.evaluate_every is not None:
            checks.check_count("evaluate_every", self.evaluate_every)


def random_batches(data: PyTree, batch_size: int) -> Callable[[jax.Array], PyTree]:
    """Returns `batches(key)`, a function that draws examples at random with replacement.

    Args:
      data: Pytree of arrays with a leading axis of examples, all of one length.
      batch_size: Examples in a batch, at least 1.

    Returns:
      A pure function from a PRNG key to a batch, for `Task`.

    Raises:
      ValueError: If `batch_size` is not an integer of at least 1, or the arrays differ in length.

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

    def batches(key: jax.Array) -> PyTree:
        indices = jax.random.randint(key, (batch_size,), 0, num_examples)
        return jax.tree.map(lambda x: x[indices], data)

    return batches


class Setting(NamedTuple):
    """The numbers that a sweep varies, traced in a program; None for those that it does not."""

    weight_decay: Any
    density: Any
    step_size: Any
    threshold: Any


def initial_params(task: Task, key: jax.Array) -> optax.Params:
    """Returns the parameters that a task of one model begins with."""
    assert callable(task.init_fn)  # `checked_models` makes such tasks
    return task.init_fn(key)


def optimizer_of(task: Task, setting: Setting) -> optax.GradientTransformation:
    """Returns the optimizer of a setting, which also prunes if densities are compared."""
    decay = {} if setting.weight_decay is None else {"weight_decay": setting.weight_decay}
    optimizer = task.optimizer(setting.step_size, **decay)
    if setting.density is None:
        return optimizer
    num_steps = int(task.stop.num_steps or 0)
    num_pruning, density = -(-3 * num_steps // 4), setting.density

    def falling(step: ArrayLike) -> ArrayLike:
        rest = jnp.maximum(1 - jnp.asarray(step + 1, jnp.float32) / num_pruning, 0)
        return density + (1 - density) * rest**3

    return keep_sparse(optimizer, falling, every=max(num_steps // 100, 1))


def checked_models(task: Task) -> dict[str | None, Task]:
    """Returns a task with one `init_fn` for each model, checked; None for a model without name."""
    models = task.init_fn if isinstance(task.init_fn, Mapping) else {None: task.init_fn}
    return {
        name: _checked_task(dataclasses.replace(task, init_fn=init_fn))
        for name, init_fn in models.items()
    }


def outline_of_params(task: Task) -> PyTree:
    """Returns the shapes and dtypes of the parameters of a task of one model."""
    return jax.eval_shape(functools.partial(initial_params, task), jax.random.key(0))


def _checked_task(task: Task) -> Task:
    """Returns the task, checked by its shapes; `evaluate_every` is None if `stop` ignores it."""
    params = outline_of_params(task)
    metrics = jax.eval_shape(task.evaluate, params)
    if not isinstance(metrics, dict):
        raise TypeError(f"evaluate must return a dict of metrics, got {type(metrics).__name__}.")
    for name in (task.metric, task.train_metric):
        if name is not None and name not in metrics:
            raise ValueError(f"evaluate returns {sorted(metrics)}, but no {name!r}.")
    for name, value in metrics.items():
        if jnp.shape(value):
            raise ValueError(
                f"evaluate must return scalars, {name!r} has shape {jnp.shape(value)}."
            )
    check_unambiguous(task.stop, STEP_METRICS, metrics)
    watched = sorted(task.stop.metrics & set(metrics))
    if watched and task.evaluate_every is None:
        raise ValueError(f"stop reads {watched} of evaluate: set evaluate_every.")
    return task if watched else dataclasses.replace(task, evaluate_every=None)


def check_unambiguous(stop: StopRule, reported: Container[str], evaluated: Container[str]) -> None:
    """Raises if `stop` reads a name that both a step and `evaluate` use: it would get both."""
    both = sorted(name for name in stop.metrics if name in reported and name in evaluated)
    if both:
        raise ValueError(
            f"evaluate returns {both}, which the step reports already, and stop reads it: "
            "choose another name."
        )
