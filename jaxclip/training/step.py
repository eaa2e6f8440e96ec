"""The jitted train step: loss, gradients, optimizer, exact box, telemetry.

    state, info = step(state, batch)

One step is one compiled program. A step whose loss or gradients are not finite changes
neither parameters nor optimizer state: it is skipped and counted.
"""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.experimental.shard_alike import shard_alike
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxclip._core import checks
from jaxclip._core.floats import keep_weak_type
from jaxclip.norms.of_trees import measure_norm
from jaxclip.thresholds.values import check_threshold_tree
from jaxclip.training.stochastic_rounding import apply_updates_stochastically
from jaxclip.training.telemetry import clip_stats
from jaxclip.weights.clipping import clip_weights, weight_clip_rate, weight_outside_rate


class TrainState(NamedTuple):
    """What the next step needs; a plain pytree.

    Attributes:
      step: Scalar int32, steps taken, skipped ones included.
      params: The parameters.
      opt_state: State of the optimizer.
      key: PRNG key for losses that take one and for stochastic rounding, or None.
      num_skipped: Scalar int32, steps skipped so far because something was not finite.
    """

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState
    key: jax.Array | None
    num_skipped: jax.Array

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
            leaves the caller's arrays alone.
          optimizer: The transformation that `make_train_step` gets too.
          key: PRNG key, for losses `(params, batch, key)` and for stochastic rounding.

        Returns:
          A `TrainState` at step 0.
        """
        # Copies throughout: some optimizers keep the parameters in their state, and a buffer
        # that is there twice cannot be donated.
        params, opt_state, key = jax.tree.map(jnp.copy, (params, optimizer.init(params), key))
        state = cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=opt_state,
            key=key,
            num_skipped=jnp.zeros((), jnp.int32),
        )
        return _on_one_mesh(state)


def _on_one_mesh(state: TrainState) -> TrainState:
    """The state with what lies on one device, as counters do, on all those of the parameters.

    The step returns it there, and would be compiled a second time for its own result.
    """
    leaves = [x for x in jax.tree.leaves(state.params) if checks.is_concrete(x)]
    meshes = {x.sharding.mesh for x in leaves if isinstance(x.sharding, NamedSharding)}
    if len(meshes) != 1:
        return state
    everywhere = NamedSharding(meshes.pop(), PartitionSpec())

    def place(x: jax.Array) -> jax.Array:
        if not (checks.is_concrete(x) and isinstance(x.sharding, SingleDeviceSharding)):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # as such they stay in their process
            data = jax.device_put(jax.random.key_data(x), everywhere)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jax.device_put(x, everywhere)

    return jax.tree.map(place, state)


class StepInfo(NamedTuple):
    """What a reader of the step wants to know; all of it is on the device.

    Attributes:
      loss: Scalar, the loss before the step.
      aux: What the loss returned beside it, or None.
      stats: `clip_stats` of the optimizer; the first clip of the chain also under its bare
        names, such as `stats["pre_norm"]`.
      weight_clip_rate: Scalar float32, share of the boxed weights that are on the bound; 0
        without a box.
      weight_outside_rate: Scalar float32, share of the boxed weights that the first step found
        outside the box, as pretrained ones may be; 0 at the other steps, and from a program
        that was lowered and compiled by hand.
      num_skipped: Scalar int32, steps skipped so far.
    """

    loss: jax.Array
    aux: Any
    stats: dict[str, jax.Array]
    weight_clip_rate: jax.Array
    weight_outside_rate: jax.Array
    num_skipped: jax.Array


def _find_trace_state() -> Callable[..., Any]:
    """jax's `get_opaque_trace_state`, preferably from its old home.

    The new one, `jax.extend.core`, takes as long to import as all of jaxclip.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = getattr(jax.core, "get_opaque_trace_state", None)
    return found or importlib.import_module("jax.extend.core").get_opaque_trace_state


_trace_state_of = _find_trace_state()


def _trace_state() -> Any:
    """Which transformation, if any, is tracing right now; to be compared only."""
    return _trace_state_of(convention="flax")


_TOP_LEVEL = _trace_state()


class TrainStep:
    """A train step `(state, batch) -> (state, info)`, compiled on first use.

    Called with arrays it runs as one jitted program; inside another `jit`, `vmap` or
    `scan` it is the plain function, to be compiled with the rest.
    """

    def __init__(
        self,
        function: Callable[[TrainState, Any], tuple[TrainState, StepInfo]],
        outside_rate: Callable[[TrainState], jax.Array] | None,
        donate: bool,
        compiler_options: Mapping[str, Any] | None,
    ):
        self._function = function
        self._outside_rate = outside_rate
        self._donate = donate
        self._compiler_options = compiler_options
        self._last_step = None

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        """Returns the state after one step, and what happened in it."""
        if _trace_state() != _TOP_LEVEL:
            return self.__wrapped__(state, batch)
        # A program of its own: within the step, XLA would copy the parameters for it. And a
        # state that this step gave is not the first; to read its counter would be to wait.
        outside = None
        if self._outside_rate and state.step is not self._last_step and int(state.step) == 0:
            outside = jax.jit(self._outside_rate)(state)
        state, info = self._jitted(state, batch)
        self._last_step = state.step
        return state, info if outside is None else info._replace(weight_outside_rate=outside)

    def __wrapped__(self, state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        """The plain function, for a program that has more in it than the step."""
        new_state, info = self._function(state, batch)
        if self._outside_rate:
            # At every step, which costs less than the copies that a condition would.
            outside = jnp.where(state.step == 0, self._outside_rate(state), 0)
            info = info._replace(weight_outside_rate=outside)
        return new_state, info

    def lower(self, state: TrainState, batch: Any) -> Any:
        """Returns the lowered program, as `jax.jit(...).lower` does."""
        return self._jitted.lower(state, batch)

    @functools.cached_property
    def _jitted(self) -> Any:
        options = _backend_options() | dict(self._compiler_options or {})
        return jax.jit(
            self._function,
            donate_argnums=(0,) if self._donate and _donation_is_safe() else (),
            compiler_options=options or None,
        )


def make_train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    weight_threshold: Any = None,
    mask: Any = None,
    has_aux: bool = False,
    stochastic_rounding: bool = False,
    donate: bool = True,
    compiler_options: Mapping[str, Any] | None = None,
) -> TrainStep:
    """Makes the jitted step: gradients, optimizer, apply, projection onto the box.

    Args:
      loss_fn: `(params, batch) -> loss` or `(params, batch, key) -> loss`; a third required
        parameter, or a keyword-only `key`, gets a fresh PRNG key each step. With `has_aux`
        it returns `(loss, aux)`.
      optimizer: Any optax transformation; it is also given `value=loss` and
        `pre_norm`, the norm of the gradients.
      weight_threshold: A threshold as in `clip_weights` (`fan_in(1.0)`, a number, a
        schedule, ...): parameters are projected after every step. None for no box.
        Pretrained weights outside the box are brought in by the first step.
      mask: As in `clip_weights`.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      stochastic_rounding: Whether bfloat16 and float16 parameters are updated by
        `apply_updates_stochastically`, so that steps below half the distance to their next
        number are not lost. Takes a fresh key from the state each step.
      donate: Whether the step may reuse the memory of the state it is given; that state
        can then not be used again. On CPU with jax before 0.9 it never does, for there XLA
        may overwrite donated matrices before they are read, and compute wrong numbers.
      compiler_options: Options for XLA, over those set here. On CPU the step sets
        `xla_cpu_copy_insertion_use_region_analysis`, without which XLA copies every
        momentum before updating it in place.

    Returns:
      `step(state, batch) -> (state, info)`, a `TrainStep`. If the loss or a gradient is
      not finite, parameters and optimizer state come back bit-identical and `num_skipped`
      goes up by one.

    Raises:
      TypeError: If `weight_threshold` is of a wrong type.
      ValueError: If `weight_threshold` is out of range, or there is a mask without one.

    Example:
      >>> import jaxclip
      >>> loss_fn = lambda w, target: jnp.sum((w - target) ** 2)
      >>> tx = jaxclip.sign_sgd(0.25)
      >>> step = make_train_step(loss_fn, tx, weight_threshold=0.5)
      >>> state = TrainState.create(jnp.zeros(2), tx)
      >>> for _ in range(3):
      ...     state, info = step(state, jnp.array([2.0, -0.2]))
      >>> print(state.params, info.weight_clip_rate)
      [ 0.5  -0.25] 0.5
    """
    if weight_threshold is not None:
        check_threshold_tree("weight_threshold", weight_threshold)
    elif mask is not None:
        raise ValueError("mask says which weights are boxed; it needs a weight_threshold.")
    checks.check_choice("stochastic_rounding", stochastic_rounding, (False, True))
    optimizer = optax.with_extra_args_support(optimizer)
    takes_key = _takes_key(loss_fn)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, StepInfo]:
        key, arguments, keywords = state.key, (state.params, batch), {}
        if takes_key:
            if key is None:
                raise ValueError("loss_fn takes a key: TrainState.create(..., key=...) needs one.")
            key, loss_key = jax.random.split(key)
            if takes_key == "keyword":
                keywords = {"key": loss_key}
            else:
                arguments = (*arguments, loss_key)
        value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(*arguments, **keywords)
        loss, aux = value if has_aux else (value, None)

        # A clip that sees these very gradients takes the norm from here.
        measured = measure_norm(grads)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=loss, pre_norm=measured
        )
        if stochastic_rounding:
            if key is None:
                raise ValueError("stochastic_rounding needs TrainState.create(..., key=...).")
            key, rounding_key = jax.random.split(key)
            params = apply_updates_stochastically(state.params, updates, rounding_key)
        else:
            params = optax.apply_updates(state.params, updates)
        on_bound = jnp.zeros((), jnp.float32)
        if weight_threshold is not None:
            params = clip_weights(params, weight_threshold, mask, step=state.step)

        is_good = jnp.isfinite(loss) & jnp.isfinite(measured.norm.norm)
        stats = clip_stats(opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: _placed_as(
                keep_weak_type(jnp.where(is_good, new, old), jnp.asarray(old)), old
            ),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        if weight_threshold is not None:
            on_bound = weight_clip_rate(params, weight_threshold, mask, step=state.step)
        num_skipped = state.num_skipped + jnp.where(is_good, 0, 1)
        info = StepInfo(
            loss=loss,
            aux=aux,
            stats=stats | _bare_names(stats),
            weight_clip_rate=on_bound,
            weight_outside_rate=jnp.zeros((), jnp.float32),
            num_skipped=num_skipped,
        )
        return TrainState(state.step + 1, params, opt_state, key, num_skipped), info

    def outside_rate(state: TrainState) -> jax.Array:
        return weight_outside_rate(state.params, weight_threshold, mask, step=state.step)

    has_box = weight_threshold is not None
    return TrainStep(step, outside_rate if has_box else None, donate, compiler_options)


def _placed_as(new: jax.Array, old: Any) -> jax.Array:
    """The array, to lie on the devices of a mesh as the old one does.

    On an Auto mesh XLA would choose, and might split what was whole.
    """
    return new if jax.typeof(old).sharding.mesh.empty else shard_alike(new, old)[0]


def _takes_key(loss_fn: Callable[..., Any]) -> str | None:
    """How `loss_fn` takes a key: "positional", "keyword" or not at all."""
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):
        return None
    required = [p for p in parameters if p.default is p.empty]
    if any(p.name == "key" and p.kind == p.KEYWORD_ONLY for p in required):
        return "keyword"
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return "positional" if len(positional) >= 3 else None


def _bare_names(stats: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The statistics of the first clip in the chain, without its name."""
    first = next((k.split("/")[0] for k in stats if k.endswith("/clip_rate")), None)
    prefix = f"{first}/"
    return {k.removeprefix(prefix): v for k, v in stats.items() if k.startswith(prefix)}


def _donation_is_safe() -> bool:
    """Not on CPU with jax 0.7.2 and 0.8.0; it is with 0.9.0 (see its test)."""
    return jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 9)


@functools.cache
def _backend_options() -> dict[str, Any]:
    """XLA options for the default backend; none where this jaxlib does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_copy_insertion_use_region_analysis": True}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except Exception:  # whatever a jaxlib raises for an option it does not have
        return {}
    return options
