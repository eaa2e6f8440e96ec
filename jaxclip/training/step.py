"""The jitted train step: loss, gradients, optimizer, exact box, telemetry.

    state, info = step(state, batch)

One step is one compiled program. A step whose loss is not finite, or a gradient of a leaf that
trains, changes neither parameters nor optimizer state: it is skipped and counted.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.compiling import cpu_options
from jaxclip._core.floats import Spread, increment, keep_weak_type, select
from jaxclip._core.trees import Mask, PyTree
from jaxclip._core.updates import is_unbounded
from jaxclip.norms.of_trees import measure_norm
from jaxclip.thresholds.values import check_threshold_tree
from jaxclip.training.frozen import find_frozen, first_nonfinite, zero_nonfinite
from jaxclip.training.info import StepInfo
from jaxclip.training.stochastic_rounding import apply_updates_stochastically
from jaxclip.training.telemetry import clip_stats, find_learning_rate
from jaxclip.weights.clipping import clip_to_bounds, rate_on_bounds, resolve_bounds

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # since jax 0.12
    shard_alike = None


class TrainState(NamedTuple):
    """State of training between two steps; a plain pytree.

    Attributes:
      step: Scalar int32, steps taken, skipped ones included; it stays at 2**31 - 1.
      params: The parameters.
      opt_state: State of the optimizer.
      key: PRNG key for losses that take one and for stochastic rounding, or None.
      num_skipped: Scalar int32, steps skipped so far because something was not finite.
      weight_clip_rate: Scalar float32, the `StepInfo.weight_clip_rate` that was counted last.
    """

    step: jax.Array
    params: PyTree
    opt_state: optax.OptState
    key: jax.Array | None
    num_skipped: jax.Array
    weight_clip_rate: jax.Array

    @classmethod
    def create(
        cls,
        params: optax.Params,
        optimizer: optax.GradientTransformation,
        *,
        key: jax.Array | None = None,
    ) -> "TrainState":
        """Returns the state before the first step.

        Args:
          params: Initial parameters. They are copied, so a step that donates its state
            does not invalidate the caller's arrays.
          optimizer: The transformation that is also given to `make_train_step`.
          key: PRNG key, for losses `(params, batch, key)` and for stochastic rounding.

        Returns:
          A `TrainState` at step 0.
        """
        # Everything is copied: some optimizers keep the parameters in their state, and a
        # buffer that occurs twice cannot be donated.
        params, opt_state, key = jax.tree.map(jnp.copy, (params, optimizer.init(params), key))
        state = cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=opt_state,
            key=key,
            num_skipped=jnp.zeros((), jnp.int32),
            weight_clip_rate=jnp.zeros((), jnp.float32),
        )
        return _on_one_mesh(state)


def _on_one_mesh(state: TrainState) -> TrainState:
    """Replicates leaves on a single device, such as counters, over the parameters' mesh."""
    # The step returns them there, and would otherwise be compiled again for its own result.
    leaves = [x for x in jax.tree.leaves(state.params) if checks.is_concrete(x)]
    meshes = {x.sharding.mesh for x in leaves if isinstance(x.sharding, NamedSharding)}
    if len(meshes) != 1:
        return state
    replicated = NamedSharding(meshes.pop(), PartitionSpec())

    def place(x: jax.Array) -> jax.Array:
        if not (checks.is_concrete(x) and isinstance(x.sharding, SingleDeviceSharding)):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            # By their data: device_put does not take a key array to other processes.
            data = jax.device_put(jax.random.key_data(x), replicated)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jax.device_put(x, replicated)

    return jax.tree.map(place, state)


def make_train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    weight_threshold: PyTree = None,
    mask: Mask | None = None,
    has_aux: bool = False,
    stochastic_rounding: bool = False,
    telemetry_every: int = 16,
    donate: bool = True,
    compiler_options: Mapping[str, bool | int | str] | None = None,
) -> jax.stages.Wrapped:
    """Makes the jitted step: gradients, optimizer, apply, projection onto the box.

    Args:
      loss_fn: `(params, batch) -> loss` or `(params, batch, key) -> loss`. A third required
        parameter, or a keyword-only `key`, gets a fresh PRNG key each step. With `has_aux`
        it returns `(loss, aux)`.
      optimizer: Any optax transformation. It also gets `value` and `grad`, the loss as a function
        of the parameters as `value_fn` and `obj_fn`, and the norm of the gradients as `pre_norm`.
      weight_threshold: A threshold as in `clip_weights` (`fan_in(1.0)`, a number, a
        schedule, ...): parameters are projected after every step. None for no box, also for
        single leaves of a tree. Pretrained weights outside the box are brought in by the first
        step.
      mask: The leaves to box, all if None: a tree of bools, or a function of the parameters
        that returns one.
      has_aux: True if `loss_fn` returns `(loss, aux)`.
      stochastic_rounding: True to update bfloat16 and float16 parameters by
        `apply_updates_stochastically`, so that steps below half the distance to their next
        number are not lost. Takes a fresh key from the state each step.
      telemetry_every: Steps between two counts of the weights on the bound, which read all
        parameters once more; 1 to count at every step. All other numbers of `StepInfo` are
        those of the step itself.
      donate: True to let the step reuse the memory of the state it is given, which can then
        not be used again. On CPU with jax before 0.9 it never does, because XLA may there
        overwrite donated matrices before they are read, and compute wrong numbers.
      compiler_options: Options for XLA, which override those set here. On CPU the step sets
        `xla_cpu_copy_insertion_use_region_analysis`, without which XLA copies every
        momentum before updating it in place.

    Returns:
      `step(state, batch) -> (state, info)`, compiled by `jax.jit` on the first call: make it
      once, because another step of the same loss is another program. It has `lower`, `trace`, and
      the plain function as `__wrapped__`. Inside another program, such
      as a `scan`, or with traced arrays it is that plain function; to batch or differentiate
      over a value in its closure, call `__wrapped__`.

      A step is bad if the loss is not finite, or a gradient of a leaf that trains, even if the
      optimizer would make a finite update of it. Then parameters and optimizer state come back
      bit-identical, `num_skipped` goes up by one, and `info.nonfinite_path(params)` names the
      leaf. A frozen leaf makes no step bad: one whose gradient never reaches its own weight, as
      under `optax.set_to_zero`, `partition` or `optax.transforms.freeze`. The optimizer gets
      the non-finite entries of its gradient as 0.

    Raises:
      TypeError: If `weight_threshold` is of a wrong type.
      ValueError: If `weight_threshold` is out of range, there is a mask without one, or
        `telemetry_every` is not an integer of at least 1.

    Example:
      >>> import jaxclip
      >>> loss_fn = lambda w, target: jnp.sum((w - target) ** 2)
      >>> tx = jaxclip.sign_sgd(0.25)
      >>> step = make_train_step(loss_fn, tx, weight_threshold=0.5, telemetry_every=1)
      >>> state = TrainState.create(jnp.zeros(2), tx)
      >>> for _ in range(3):
      ...     state, info = step(state, jnp.array([2.0, -0.2]))
      >>> print(state.params, info.weight_clip_rate)
      [ 0.5  -0.25] 0.5
    """
    step_with_bounds = make_step_with_bounds(
        loss_fn,
        optimizer,
        weight_threshold,
        mask,
        has_aux=has_aux,
        stochastic_rounding=stochastic_rounding,
        telemetry_every=telemetry_every,
    )

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, StepInfo]:
        return step_with_bounds(state, batch)[:2]

    options = backend_options() | dict(compiler_options or {})
    jitted = jax.jit(
        step,
        donate_argnums=(0,) if donate and is_donation_safe() else (),
        compiler_options=options or None,
    )
    return _TopLevelStep(step, jitted) if options else jitted


def make_step_with_bounds(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    weight_threshold: PyTree,
    mask: Mask | None = None,
    *,
    has_aux: bool = False,
    stochastic_rounding: bool = False,
    telemetry_every: int = 1,
) -> Callable[[TrainState, PyTree], tuple[TrainState, StepInfo, PyTree]]:
    """Returns the plain step, which returns state, info and the bound of each leaf as well."""
    if weight_threshold is None and mask is not None:
        raise ValueError("mask selects the weights to box, so it needs a weight_threshold.")
    threshold = float("inf") if weight_threshold is None else weight_threshold
    check_threshold_tree("weight_threshold", threshold)
    checks.check_choice("stochastic_rounding", stochastic_rounding, (False, True))
    checks.check_count("telemetry_every", telemetry_every)
    optimizer = optax.with_extra_args_support(optimizer)
    key_kind = _find_key_parameter(loss_fn)
    reads_weights = callable(mask) or any(map(callable, jax.tree.leaves(threshold)))

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, StepInfo, PyTree]:
        key, arguments, keywords = _loss_arguments(state, batch, key_kind)
        value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(*arguments, **keywords)
        loss, aux = value if has_aux else (value, None)

        # optax's line searches hand what they do not know to `value_fn`, and refuse the rest.
        def value_fn(
            params: optax.Params, obj_fn: Any = None, pre_norm: Any = None, grad_fn: Any = None
        ) -> jax.Array:
            del obj_fn, pre_norm, grad_fn
            value = loss_fn(params, *arguments[1:], **keywords)
            return value[0] if has_aux else value

        def grad_fn(params: optax.Params, index: jax.Array) -> optax.Updates:
            del index  # of a step within the step, to which optax's SAM might give another key
            return jax.grad(value_fn)(params)

        # Jitted, so that it is traced once, for `find_frozen` and for the step. Inlined, because
        # XLA splits the constants of a call over devices and gathers them again.
        @functools.partial(jax.jit, inline=True)
        def update(grads: optax.Updates, opt_state: optax.OptState) -> tuple:
            # A clip that gets these very gradients reuses this norm.
            measured = measure_norm(grads)
            functions = {"value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}
            given = {"value": loss, "grad": grads, "pre_norm": measured, **functions}
            given = _known_to(optimizer.update, given)
            result = optimizer.update(grads, opt_state, state.params, **given)
            return *result, measured.norm, measured.leaf_norms

        is_frozen = find_frozen(update, grads, state.opt_state)
        counted = zero_nonfinite(grads, is_frozen)
        updates, opt_state, norm, leaf_norms = update(counted, state.opt_state)
        if stochastic_rounding:
            key, rounding_key = _split_key(key, "stochastic_rounding needs a key")
            params = apply_updates_stochastically(state.params, updates, rounding_key)
        else:
            params = optax.apply_updates(state.params, updates)
        is_good = jnp.isfinite(loss) & jnp.isfinite(norm.norm)
        # A rule measures the weights that the step keeps, not those of a bad step.
        kept = _select(is_good, params, state.params) if reads_weights else params
        bounds = resolve_bounds(kept, threshold, mask, state.step)
        params = _select(is_good, clip_to_bounds(params, bounds, are_sums=True), state.params)
        stats, learning_rate = clip_stats(opt_state), find_learning_rate(opt_state)
        opt_state = _select(is_good, opt_state, state.opt_state)
        clip_rate = _weight_clip_rate(state, params, bounds, telemetry_every)
        num_skipped = increment(state.num_skipped, ~is_good)
        info = StepInfo.create(
            loss,
            aux,
            stats,
            grad_norm=norm.value(),
            learning_rate=learning_rate,
            weight_clip_rate=clip_rate,
            num_skipped=num_skipped,
            nonfinite_leaf=first_nonfinite(leaf_norms, grads, is_frozen),
        )
        num_steps = increment(state.step)
        state = TrainState(num_steps, params, opt_state, key, num_skipped, clip_rate)
        return state, info, bounds

    return step


class _TopLevelStep:
    """The jitted step, which runs as the plain function inside another program."""

    # jax takes compiler options only at the top level: a scan over `jitted` would raise. A class,
    # because jax.vmap and jax.jit copy the attributes of a function, `lower` among them.
    def __init__(self, function: Callable[..., Any], jitted: jax.stages.Wrapped):
        functools.update_wrapper(self, function)
        self._function, self._jitted = function, jitted

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, StepInfo]:
        if isinstance(state.step, jax.core.Tracer):
            return self._function(state, batch)
        try:
            return self._jitted(state, batch)
        except ValueError:
            # Asked only now, because even this small operation costs a small step 10 %.
            if not isinstance(lax.neg(np.int32(0)), jax.core.Tracer):
                raise
        return self._function(state, batch)

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """Returns the lowered program, as `jax.jit(...).lower` does."""
        return self._jitted.lower(state, batch)

    def trace(self, state: TrainState, batch: PyTree) -> jax.stages.Traced:
        """Returns the traced program, as `jax.jit(...).trace` does."""
        return self._jitted.trace(state, batch)


def _select(is_good: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Returns the new tree if the step was good, else the old one, placed as the old one."""
    condition = Spread(is_good)

    def select_leaf(new: jax.Array, old: ArrayLike) -> jax.Array:
        old = jnp.asarray(old)
        selected = keep_weak_type(select(condition.like(old), new, old), old)
        # On an Auto mesh XLA chooses the placement: before jax 0.12 it may split a replicated leaf.
        has_mesh = not jax.typeof(old).sharding.mesh.empty
        return shard_alike(selected, old)[0] if shard_alike and has_mesh else selected

    return jax.tree.map(select_leaf, new, old)


def _weight_clip_rate(
    state: TrainState, params: optax.Params, bounds: PyTree, every: int
) -> jax.Array:
    """Returns the fraction of the weights on their bounds at a step that counts, else the last."""

    # With the bounds of the clip: a rule measured again would see the clipped weights.
    def count() -> jax.Array:
        return rate_on_bounds(params, bounds)

    if every == 1 or all(map(is_unbounded, jax.tree.leaves(bounds))):
        return count()
    num_steps = increment(state.step)
    is_due = (num_steps % every == 0) | (num_steps == 1)
    return lax.cond(is_due, count, lambda: state.weight_clip_rate)


def _find_key_parameter(loss_fn: Callable[..., Any]) -> str | None:
    """Returns how `loss_fn` takes a key: "positional", "keyword" or None if it takes none."""
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):
        return None
    required = [p for p in parameters if p.default is p.empty]
    if any(p.name == "key" and p.kind == p.KEYWORD_ONLY for p in required):
        return "keyword"
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return "positional" if len(positional) >= 3 else None


def _known_to(update: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns the extra arguments that an update takes; most take any."""
    try:
        parameters = inspect.signature(update).parameters
    except (TypeError, ValueError):
        return given
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in given.items() if takes_any or name in parameters}


def _loss_arguments(
    state: TrainState, batch: PyTree, key_kind: str | None
) -> tuple[jax.Array | None, tuple, dict[str, jax.Array]]:
    """Returns the state's next key, and the arguments and keywords of the loss."""
    if key_kind is None:
        return state.key, (state.params, batch), {}
    key, loss_key = _split_key(state.key, "loss_fn takes a key")
    if key_kind == "keyword":
        return key, (state.params, batch), {"key": loss_key}
    return key, (state.params, batch, loss_key), {}


def _split_key(key: jax.Array | None, reason: str) -> tuple[jax.Array, jax.Array]:
    """Returns the next key of the state, and one to use now."""
    if key is None:
        raise ValueError(f"{reason}: give TrainState.create(..., key=...) one.")
    next_key, used_key = jax.random.split(key)
    return next_key, used_key


def is_donation_safe() -> bool:
    """Returns False on CPU before jax 0.9, where XLA overwrites arrays that it still reads."""
    return jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 9)


def backend_options() -> dict[str, bool | int | str]:
    """Returns the options of XLA that steps are compiled with on the default backend."""
    return cpu_options(("xla_cpu_copy_insertion_use_region_analysis", True))
