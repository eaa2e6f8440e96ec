"""Per-leaf norms that a transform's state keeps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxclip._core import trees


class LeafReport(NamedTuple):
    """What each leaf had to do with the last steps, for `explain` to read.

    Attributes:
      norms: Float32 vector, the norms of the floating leaves, in order, at the last good step.
      nonfinite_leaf: Scalar int32, which floating leaf was the first not to be finite at the
        last bad step; -1 if there was none.
    """

    norms: jax.Array
    nonfinite_leaf: jax.Array

    @classmethod
    def create(cls, params: Any) -> "LeafReport":
        """Returns the report before the first step."""
        num_leaves = sum(map(trees.is_clippable, jax.tree.leaves(params)))
        return cls(jnp.zeros((num_leaves,), jnp.float32), jnp.full((), -1, jnp.int32))

    def update(self, leaf_norms: jax.Array | None, is_bad: jax.Array) -> "LeafReport":
        """Returns the report after a step; unchanged if its leaf norms are not known."""
        if leaf_norms is None or leaf_norms.size == 0:
            return self
        is_finite = jnp.isfinite(leaf_norms)
        first = jnp.where(jnp.all(is_finite), -1, jnp.argmin(is_finite).astype(jnp.int32))
        fits = leaf_norms.shape == self.norms.shape
        kept = self.norms if fits else jnp.zeros_like(leaf_norms)
        return LeafReport(
            norms=jnp.where(is_bad, kept, leaf_norms),
            nonfinite_leaf=jnp.where(first >= 0, first, self.nonfinite_leaf),
        )
