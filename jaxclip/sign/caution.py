"""Cautious updates: `u <- u * [u * g < 0]`, rescaled; entries that go up the gradient are 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import compute_dtype, keep_weak_type
from jaxclip._core.trees import PyTree, is_clippable, map_clippable
from jaxclip.sign.decay import cast_saturated
from jaxclip.sign.kinds import alignment


class CautiousState(NamedTuple):
    """State of `cautious`.

    Attributes:
      inner_state: State of the inner transformation.
      agreement_rate: Scalar float32 in [0, 1], fraction of the entries that the last step
        kept; 1 before the first step.
    """

    inner_state: optax.OptState
    agreement_rate: jax.Array


def cautious(
    inner: optax.GradientTransformation, *, is_direction: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Keeps only the entries of an optimizer's step that go against the current gradient.

    `u <- u * [u * g < 0] * size / (count + 1)` leaf by leaf, where u is the update of
    `inner`, g the gradient and count the number of entries kept. Entries that agree in sign
    with the gradient become 0, and the others grow. (A leaf of one entry takes half its step.)

    Args:
      inner: An optimizer, whose updates `optax.apply_updates` adds. Weight decay inside it is
        masked with the rest; the paper decays outside.
      is_direction: True if `inner` returns a direction that is subtracted later, as
        `scale_by_lion` does: entries are then kept where `u * g > 0`.

    Returns:
      A transform; shapes, dtypes and weak types of the updates of `inner` are kept.

    Raises:
      TypeError: If `inner` is not a gradient transformation.
      ValueError: If `is_direction` is not a bool.

    Example:
      >>> import jaxclip
      >>> tx = cautious(jaxclip.signum(0.5, beta=0.5))
      >>> w = jnp.zeros(3)
      >>> _, state = tx.update(jnp.array([4.0, 4.0, 4.0]), tx.init(w), w)
      >>> updates, _ = tx.update(jnp.array([-1.0, 1.0, 1.0]), state, w)
      >>> updates
      Array([ 0. , -0.5, -0.5], dtype=float32)

    References:
      Liang et al., Cautious Optimizers: Improving Training with One Line of Code, 2024,
      https://arxiv.org/abs/2411.16085
    """
    inner = checks.check_transformation("inner", inner)
    checks.check_choice("is_direction", is_direction, (False, True))

    def is_kept(u: jax.Array, g: ArrayLike) -> jax.Array:
        sign = alignment(u, jnp.asarray(g))
        return sign > 0 if is_direction else sign < 0

    def keep(u: jax.Array, kept: jax.Array) -> jax.Array:
        wide = compute_dtype(u.dtype)
        factor = u.size / (jnp.sum(kept, dtype=jnp.finfo(wide).dtype) + 1)
        scaled = cast_saturated(u.astype(wide) * factor.astype(wide), u.dtype)
        return keep_weak_type(jnp.where(kept, scaled, jnp.zeros_like(u)), u)

    def init_fn(params):
        return CautiousState(inner.init(params), jnp.ones((), jnp.float32))

    def update_fn(updates, state, params=None, **extra_args):
        steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        checks.check_same_structure("updates", updates, "updates of inner", steps)
        kept = map_clippable(is_kept, steps, updates)
        rate = _rate_of_true(kept, steps)
        return map_clippable(keep, steps, kept), CautiousState(inner_state, rate)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rate_of_true(flags: PyTree, like: PyTree) -> jax.Array:
    """Returns the fraction of True at the floating leaves of `like`; 1 if it has none."""
    leaves = zip(jax.tree.leaves(flags), jax.tree.leaves(like), strict=True)
    counted = [flag for flag, x in leaves if is_clippable(x)]
    size = sum(flag.size for flag in counted)
    if size == 0:
        return jnp.ones((), jnp.float32)
    total = sum((jnp.sum(f, dtype=jnp.float32) for f in counted), jnp.zeros((), jnp.float32))
    return total / size
