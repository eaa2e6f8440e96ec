"""Statistics that transforms keep in their states, for `clip_stats` and `explain` to read.

A clip keeps a `ClipStats` in the field `stats` of its state, and a `LeafReport` in `leaves` if it
takes norms. The state's class names its transform as `transform_name`, and has `keeps_finite` if
updates and state are finite whenever gradients and weights are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxclip._core.floats import first_true, increment
from jaxclip._core.trees import floating_leaves

# A `jax.Array` or None, which the type `optax.OptState` does not allow.
_MaybeScalar: TypeAlias = Any


class ClipStats(NamedTuple):
    """Statistics of a clip after its last step: scalars, or None where they do not apply.

    A bad step has a NaN or infinity in the gradient, or a NaN as threshold.

    Attributes:
      pre_norm: Float32, global norm of the last finite gradient before the clip, at most the
        largest float32. Of `clip_by_spectral_norm` the largest spectral norm.
      post_norm: Float32, the same norm after the clip; 0 after a bad step.
      clip_coef: Float32 in [0, 1], `post_norm / pre_norm`; 0 after a bad step.
      clip_rate: Float32 in [0, 1], the clipped fraction of the steps, leaves, units, matrices or
        entries that the clip bounds. The mean over all steps for `clip_by_global_norm`,
        `skip_or_clip` and the clips that learn from history; of the last step for the others.
      num_nonfinite: Int32, bad steps so far.
    """

    pre_norm: _MaybeScalar
    post_norm: _MaybeScalar
    clip_coef: _MaybeScalar
    clip_rate: _MaybeScalar
    num_nonfinite: jax.Array

    @classmethod
    def create(cls, without: Sequence[str] = ()) -> "ClipStats":
        """Returns the statistics before the first step, with None for the names in `without`."""
        # An array for each field: one array twice could not be donated.
        stats = cls(
            pre_norm=jnp.zeros((), jnp.float32),
            post_norm=jnp.zeros((), jnp.float32),
            clip_coef=jnp.ones((), jnp.float32),
            clip_rate=jnp.zeros((), jnp.float32),
            num_nonfinite=jnp.zeros((), jnp.int32),
        )
        return stats._replace(**dict.fromkeys(without))

    def update(
        self,
        is_bad: jax.Array,
        *,
        pre_norm: jax.Array | None = None,
        post_norm: jax.Array | None = None,
        clip_coef: jax.Array | None = None,
        clip_rate: jax.Array | None = None,
        num_steps: jax.Array | None = None,
    ) -> "ClipStats":
        """Returns the statistics after a step; with `num_steps` the rate is averaged over these."""
        if clip_rate is not None and self.clip_rate is not None and num_steps is not None:
            change = (clip_rate - self.clip_rate) / num_steps.astype(jnp.float32)
            clip_rate = self.clip_rate + change
        return ClipStats(
            pre_norm=_if_good(is_bad, pre_norm, self.pre_norm),
            post_norm=_if_good(is_bad, post_norm, 0),
            clip_coef=_if_good(is_bad, clip_coef, 0),
            clip_rate=clip_rate,
            num_nonfinite=increment(self.num_nonfinite, is_bad),
        )


def _if_good(
    is_bad: jax.Array, number: jax.Array | None, otherwise: ArrayLike | None
) -> jax.Array | None:
    if number is None or otherwise is None:
        return None
    return jnp.where(is_bad, otherwise, number)


def keeps_finite(state: optax.OptState) -> bool:
    """Returns True if a transform with this state is known to make finite updates and states."""
    if isinstance(state, optax.MaskedState):
        return keeps_finite(state.inner_state)
    if type(state) is tuple:  # of a chain
        return all(map(keeps_finite, state))
    return getattr(type(state), "keeps_finite", False)


class LeafReport(NamedTuple):
    """Per-leaf norms of the last finite step and the first non-finite leaf.

    Attributes:
      norms: Float32 vector, the norms of the floating leaves in order at the last finite step.
      nonfinite_leaf: Scalar int32, index of the first floating leaf that was not finite at the
        last bad step; -1 if there was none.
    """

    norms: jax.Array
    nonfinite_leaf: jax.Array

    @classmethod
    def create(cls, params: optax.Params) -> "LeafReport":
        """Returns the report before the first step."""
        num_leaves = len(floating_leaves(params))
        return cls(jnp.zeros((num_leaves,), jnp.float32), jnp.full((), -1, jnp.int32))

    def update(self, leaf_norms: jax.Array | None, is_bad: jax.Array) -> "LeafReport":
        """Returns the report after a step; unchanged if its leaf norms are not known."""
        if leaf_norms is None or leaf_norms.size == 0:
            return self
        first = first_true(~jnp.isfinite(leaf_norms))
        fits = leaf_norms.shape == self.norms.shape
        kept = self.norms if fits else jnp.zeros_like(leaf_norms)
        return LeafReport(
            norms=jnp.where(is_bad, kept, leaf_norms),
            nonfinite_leaf=jnp.where(first >= 0, first, self.nonfinite_leaf),
        )
