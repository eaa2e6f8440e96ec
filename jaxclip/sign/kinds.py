"""Sign kinds, which can replace the sign: hard, soft, stochastic, scaled.

A sign kind is a value made by a factory of this module, for the argument `sign` of
`scale_by_sign` and its family. It maps a direction x to a step, leaf by leaf:

    hard        sign(x)                          the default
    soft        tanh(x / (temperature * q))      q a quantile of |x| in the leaf
    stochastic  +1 or -1 with mean x / max|x|
    scaled      s * sign(x)                      s measured on the leaf

For every kind 0 and NaN give 0, and an infinity keeps its sign. q, max and s are taken over
the finite entries of a leaf. A complex entry keeps its phase: `z / |z|` replaces the sign,
and `|z|` replaces `|x|`.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import (
    compute_dtype,
    increment,
    keep_weak_type,
    phase_and_modulus,
    quotient,
    select,
)
from jaxclip._core.trees import PyTree, map_clippable
from jaxclip.thresholds.values import check_number_or_schedule


def sign_and_modulus(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sign of every entry, `z / |z|` if complex and 0 for NaN, and its modulus."""
    if jnp.iscomplexobj(x):
        return phase_and_modulus(x)
    return select(jnp.isnan(x), jnp.zeros_like(x), jnp.sign(x)), jnp.abs(x)


def alignment(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the sign of `a * b`, real, without its overflow or underflow; 0 for NaN."""
    sign_a, sign_b = sign_and_modulus(a)[0], sign_and_modulus(b)[0]
    wide = compute_dtype(a.dtype, b.dtype)
    return jnp.sign(jnp.real(jnp.conj(sign_a.astype(wide)) * sign_b.astype(wide)))


@dataclasses.dataclass(frozen=True)
class SignKind:
    """A sign kind: a value, hashable by its fields, whose state is in the optimizer's state.

    The class itself is the hard sign. Other kinds come from the factories of this module.
    """

    def init(self) -> PyTree:
        """Returns the state before the first step; an empty tuple for most kinds."""
        return ()

    def apply(
        self, directions: PyTree, updates: optax.Updates, state: PyTree
    ) -> tuple[optax.Updates, PyTree]:
        """Returns the steps for a tree of directions, and the next state."""

        # Steps have the dtypes and weak types of `updates`, whose other leaves pass through.
        def leaf(g: jax.Array, x: ArrayLike) -> jax.Array:
            return keep_weak_type(self.step(jnp.asarray(x), g).astype(g.dtype), g)

        return map_clippable(leaf, updates, directions), state

    def step(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Returns the step for one leaf, of direction `x` and incoming gradient `g`."""
        del g
        return _hard_sign(x)


@jax.jit  # leaves of one shape share one trace
def _hard_sign(x: jax.Array) -> jax.Array:
    return sign_and_modulus(x)[0]


def resolve_sign_kind(sign: SignKind | None) -> SignKind:
    """Returns the sign kind that was given, the hard sign for None; raises TypeError."""
    if sign is None:
        return SignKind()
    if not isinstance(sign, SignKind):
        hint = "a factory: call it" if callable(sign) else f"of type {type(sign).__name__}"
        raise TypeError(
            f"The sign kind must be None or made by soft_sign(...), stochastic_sign(...) or "
            f"scaled_sign(...), got {sign!r}, {hint}."
        )
    return sign


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(compute_dtype(x.dtype))


def _finite_modulus(modulus: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(modulus), modulus, jnp.zeros_like(modulus))


# --- Soft -----------------------------------------------------------------------------


class _SoftSignState(NamedTuple):
    """State of a soft sign whose temperature is a schedule: a scalar int32 step count."""

    step: jax.Array


@dataclasses.dataclass(frozen=True)
class _SoftSign(SignKind):
    temperature: ArrayLike | optax.Schedule = 0.5
    quantile: float = 0.5

    def init(self) -> PyTree:
        return _SoftSignState(jnp.zeros((), jnp.int32)) if callable(self.temperature) else ()

    def apply(
        self, directions: PyTree, updates: optax.Updates, state: PyTree
    ) -> tuple[optax.Updates, PyTree]:
        if not callable(self.temperature):
            return super().apply(directions, updates, state)
        now = dataclasses.replace(
            self, temperature=checks.value_at("temperature", self.temperature, state.step)
        )
        steps, _ = now.apply(directions, updates, ())
        return steps, _SoftSignState(increment(state.step))

    def step(self, x: jax.Array, g: jax.Array) -> jax.Array:
        sign, modulus = sign_and_modulus(_widen(x))
        dtype = modulus.dtype
        scale = _quantile(lax.stop_gradient(modulus), self.quantile)
        temperature = jnp.asarray(self.temperature).astype(dtype)
        # A scale or temperature of 0 (or a traced NaN or negative one) is the hard sign.
        is_soft = (scale >= jnp.finfo(dtype).tiny) & (temperature > 0)
        scale = jnp.where(is_soft, scale, jnp.ones_like(scale))
        temperature = jnp.where(is_soft, temperature, jnp.ones_like(temperature))
        size = jnp.where(jnp.isnan(modulus), jnp.zeros_like(modulus), modulus)
        size = jnp.tanh(quotient(quotient(size, scale), temperature))
        return jnp.where(is_soft, sign * size.astype(sign.dtype), sign)


@checks.refuses_step
def soft_sign(temperature: ArrayLike | optax.Schedule = 0.5, *, quantile: float = 0.5) -> SignKind:
    """Makes the smooth sign `tanh(x / (temperature * q))`, q a quantile of |x| in the leaf.

    Entries well above the typical magnitude of their leaf take the full step. Small entries
    take a proportional step, so weights come to rest instead of oscillating. The scale is
    relative to the leaf: a gradient times any factor gives the same step. As the temperature goes
    to 0 this is the hard sign. SoftSignum's rule, the value 1 - eps at the quantile, is
    `temperature = 1 / atanh(1 - eps)`.

    Args:
      temperature: Number >= 0, traced scalar, or a schedule `step -> number`. A traced
        NaN or negative one counts as 0.
      quantile: In (0, 1]: the fraction of a leaf's finite non-zero |x| that is at most q. It
        is found by counting, without a sort, to 7 bits (rounded down).

    Returns:
      A sign kind with values in [-1, 1]; stateless unless the temperature is a schedule.

    Raises:
      TypeError: If an argument is not a number (or the temperature a schedule).
      ValueError: If `temperature` is negative or infinite, or `quantile` outside (0, 1].

    Example:
      >>> from jaxclip.sign.directions import scale_by_sign
      >>> tx = scale_by_sign(soft_sign(1.0))
      >>> grads = jnp.array([-4.0, 0.5, 1.0, 0.0])
      >>> print(tx.update(grads, tx.init(grads))[0].round(1))
      [-1.   0.5  0.8  0. ]

    References:
      Feoktistov et al., Softsign: Smooth Sign in Your Optimizer For Better Parameter
      Heterogeneity Handling, 2026, https://arxiv.org/abs/2605.31371
    """
    check_number_or_schedule("temperature", temperature, checks.check_nonnegative)
    checks.check_positive("quantile", quantile)
    checks.check_decay_rate("quantile", quantile)
    return _SoftSign(temperature, quantile)


@functools.partial(jax.jit, inline=True)
def _quantile(modulus: jax.Array, quantile: ArrayLike) -> jax.Array:
    """Returns the quantile of the finite non-zero entries, rounded down to 8 significant bits."""
    # By bisection on the bit patterns, which are ordered like the numbers: about 15 passes
    # of comparing and counting, so sharded entries stay on their devices.
    info = jnp.finfo(modulus.dtype)
    integers = jnp.uint64 if info.bits == 64 else jnp.uint32
    codes = lax.bitcast_convert_type(modulus, integers) >> jnp.asarray(info.nmant - 7, integers)
    is_counted = (modulus > 0) & jnp.isfinite(modulus)
    total = jnp.sum(is_counted, dtype=modulus.dtype)
    wanted = jnp.asarray(quantile).astype(modulus.dtype) * total
    top = jnp.asarray(2 ** (info.nexp + 7), integers)
    low = jnp.min(jnp.where(is_counted, codes, top), initial=top)
    high = jnp.max(jnp.where(is_counted, codes, jnp.zeros_like(codes)), initial=0)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // jnp.asarray(2, integers)
        num_at_most = jnp.sum(is_counted & (codes <= middle), dtype=modulus.dtype)
        is_enough = num_at_most >= wanted
        low = jnp.where(is_enough, low, middle + jnp.asarray(1, integers))
        high = jnp.where(is_enough, middle, high)
        return low, high

    code, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, high))
    code = jnp.where(total > 0, code, jnp.zeros_like(code))
    return lax.bitcast_convert_type(code << jnp.asarray(info.nmant - 7, integers), modulus.dtype)


# --- Stochastic -----------------------------------------------------------------------


class _StochasticSignState(NamedTuple):
    """State of a stochastic sign: the PRNG key of the next step."""

    key: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class _StochasticSign(SignKind):
    key: jax.Array
    axis_name: str | None = None

    def init(self) -> PyTree:
        # A copy, because the state may be donated and the key here is used again.
        return _StochasticSignState(jnp.copy(self.key))

    def apply(
        self, directions: PyTree, updates: optax.Updates, state: PyTree
    ) -> tuple[optax.Updates, PyTree]:
        next_key, key = jax.random.split(state.key)
        if self.axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(self.axis_name))
        leaves, treedef = jax.tree.flatten(updates)
        keys = jax.tree.unflatten(treedef, range(len(leaves)))

        def leaf(g: jax.Array, x: ArrayLike, position: int) -> jax.Array:
            x = _draw(jnp.asarray(x), jax.random.fold_in(key, position))
            return keep_weak_type(x.astype(g.dtype), g)

        return map_clippable(leaf, updates, directions, keys), _StochasticSignState(next_key)


def _draw(x: jax.Array, key: jax.Array) -> jax.Array:
    """Returns signs with mean `x / max|x|`; real ones are never 0 where x is not."""
    sign, modulus = sign_and_modulus(_widen(x))
    largest = jnp.max(_finite_modulus(modulus), initial=0)
    is_normal = largest >= jnp.finfo(modulus.dtype).tiny
    relative = quotient(modulus, jnp.where(is_normal, largest, jnp.ones_like(largest)))
    relative = jnp.where(is_normal, relative, jnp.ones_like(relative))
    uniform = jax.random.uniform(key, x.shape, modulus.dtype)
    if jnp.iscomplexobj(x):
        return jnp.where(uniform < relative, sign, jnp.zeros_like(sign))
    return jnp.where(uniform < (1 + relative) / 2, sign, -sign)


@checks.refuses_step
def stochastic_sign(key: jax.Array, *, axis_name: str | None = None) -> SignKind:
    """Makes the unbiased sign: +1 with probability `(1 + x / B) / 2`, else -1.

    B is the largest finite |x| of the leaf, so the expectation is `x / B`. On average the step
    points along the gradient, which the hard sign of a noisy gradient need not do, and
    majority votes of many workers converge. Entries that are exactly 0 stay 0. A complex
    entry is `z / |z|` with probability `|z| / B`, else 0.

    Args:
      key: PRNG key (`jax.random.key(0)`); the state carries it and splits it every step.
      axis_name: Mapped axis whose workers draw independently from the same key, inside
        `shard_map`, `pmap` or `vmap`. None where the gradients are global.

    Returns:
      A sign kind with values in {-1, 0, 1} and a key in its state.

    Raises:
      TypeError: If `key` is not a PRNG key.

    Example:
      >>> from jaxclip.sign.directions import scale_by_sign
      >>> tx = scale_by_sign(stochastic_sign(jax.random.key(0)))
      >>> grads = jnp.array([-4.0, 4.0, 0.0])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([-1.,  1.,  0.], dtype=float32)

    References:
      Safaryan and Richtarik, Stochastic Sign Descent Methods: New Algorithms and Better
      Theory, 2019, https://arxiv.org/abs/1905.12938
      Jin et al., Stochastic-Sign SGD for Federated Learning with Theoretical Guarantees,
      2020, https://arxiv.org/abs/2002.10940
    """
    dtype = getattr(key, "dtype", None)
    is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_typed and not (dtype == jnp.uint32 and getattr(key, "ndim", 0) == 1):
        raise TypeError(f"key must be a PRNG key such as jax.random.key(0), got {key!r}.")
    return _StochasticSign(key, axis_name)


# --- Scaled ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ScaledSign(SignKind):
    scale: str = "mean_abs"

    def step(self, x: jax.Array, g: jax.Array) -> jax.Array:
        x = _widen(x)
        sign, modulus = sign_and_modulus(x)
        finite = _finite_modulus(modulus)
        if self.scale == "mean_abs":
            size = jnp.sum(finite / max(x.size, 1))
        elif self.scale == "rms":
            size = _root_mean_square(finite, max(x.size, 1))
        else:
            num_steps = jnp.sum(sign != 0, dtype=finite.dtype)
            incoming = _finite_modulus(sign_and_modulus(_widen(g))[1])
            size = _root_mean_square(incoming, jnp.maximum(num_steps, 1))
        size = jnp.minimum(size, jnp.finfo(g.dtype).max.astype(size.dtype))
        return sign * size.astype(sign.dtype)


def _root_mean_square(x: jax.Array, count: ArrayLike) -> jax.Array:
    """Returns `sqrt(sum(x**2) / count)` of entries >= 0, without overflow or underflow."""
    largest = jnp.max(x, initial=0)
    relative = quotient(x, jnp.where(largest > 0, largest, jnp.ones_like(largest)))
    return largest * jnp.sqrt(jnp.sum(jnp.square(relative)) / count)


@checks.refuses_step
def scaled_sign(scale: Literal["mean_abs", "rms", "gradient_norm"] = "mean_abs") -> SignKind:
    """Makes the sign that keeps a magnitude: `s * sign(x)`, s measured on each leaf.

    Steps then shrink with the gradient, as those of SGD do. Error feedback needs this: a
    compressed gradient, not a normalized one.

    Args:
      scale: The size s. "mean_abs": the mean of |x|, which makes `s * sign(x)` the closest
        such vector to x and the step of EF-signSGD. "rms": the root mean square of x, which
        keeps the norm of x (of a leaf without zeros). "gradient_norm": the step gets the norm
        of the incoming gradient of the leaf (grafting), whatever momentum made of the
        direction.

    Returns:
      A stateless sign kind.

    Raises:
      ValueError: If `scale` is not one of the three.

    Example:
      >>> from jaxclip.sign.directions import scale_by_sign
      >>> tx = scale_by_sign(scaled_sign("mean_abs"))
      >>> grads = jnp.array([-3.0, 1.0, 0.5, 1.5])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([-1.5,  1.5,  1.5,  1.5], dtype=float32)

    References:
      Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression
      Schemes, 2019, https://arxiv.org/abs/1901.09847
      Agarwal et al., Disentangling Adaptive Gradient Methods from Learning Rates, 2020,
      https://arxiv.org/abs/2002.11803
    """
    checks.check_choice("scale", scale, ("mean_abs", "rms", "gradient_norm"))
    return _ScaledSign(scale)
