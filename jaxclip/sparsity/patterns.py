"""Patterns: which entries of a leaf are kept or pruned together, and which compete.

free   every entry is a unit; all units of the leaf, or of the tree, compete
rows   the weights of one output are a unit
m      every entry is a unit; it competes with the others of m consecutive inputs (N:M)
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.layouts import layouts_of, output_axes
from jaxclip._core.trees import Mask, PyTree, is_clippable, masked, path_name
from jaxclip.sparsity.selecting import (
    dtype_of_scores,
    largest,
    largest_in_groups,
    num_true,
    ranking,
)

# "free", "rows", or the size of the groups of an N:M pattern.
Pattern: TypeAlias = Literal["free", "rows"] | int
Scope: TypeAlias = Literal["leaf", "tree"]


def check_pattern(pattern: Pattern, scope: Scope) -> None:
    """Raises ValueError unless the pattern is a name or a group size, and the scope is known."""
    if pattern not in ("free", "rows"):
        is_size = isinstance(pattern, (int, np.integer)) and not isinstance(pattern, bool)
        if not is_size or pattern < 2:
            raise ValueError(
                "pattern must be 'free', 'rows' or a group size of at least 2, such as 4 for 2:4 "
                f"with a density of 1/2, {checks.describe(pattern)}."
            )
    checks.check_choice("scope", scope, ("leaf", "tree"))


class SparseLeaf(NamedTuple):
    """A leaf to be made sparse: its path and shape, and the axes of its outputs and groups."""

    path: str
    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    group_axis: int


def sparse_leaves(params: PyTree, mask: Mask | None) -> list[SparseLeaf | None]:
    """Returns what is known of each leaf to be made sparse, None for the others."""
    chosen = jax.tree.leaves(masked(mask, params, params, 0))
    entries = jax.tree_util.tree_leaves_with_path(params)
    names = [path_name(path) for path, _ in entries]
    found: list[SparseLeaf | None] = []
    for name, leaf, layout in zip(names, chosen, layouts_of(names), strict=True):
        shape = np.shape(leaf)
        if not is_clippable(leaf) or (mask is None and len(shape) < 2):
            found.append(None)
            continue
        outputs: tuple[int, ...] = ()
        if len(shape) >= 2:
            axes = output_axes(name, shape, layout)
            outputs = tuple(a % len(shape) for a in ((axes,) if isinstance(axes, int) else axes))
        inputs = [a for a in range(len(shape)) if a not in outputs]
        axis = inputs[-1 if layout == "in_out" else 0] if inputs else -1
        found.append(SparseLeaf(name, shape, outputs, axis))
    return found


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Chooses masks for leaves by a pattern, from a score >= 0 for each entry."""

    pattern: Pattern
    scope: Scope

    def check(self, leaf: SparseLeaf) -> None:
        """Raises ValueError if a leaf does not fit the pattern."""
        if isinstance(self.pattern, str):
            if self.pattern == "rows" and not leaf.outputs:
                raise ValueError(
                    f"pattern 'rows' needs leaves of two or more dimensions; {leaf.path!r} has "
                    f"shape {leaf.shape}: leave it out by `mask`."
                )
            return
        if not leaf.shape or leaf.shape[leaf.group_axis] % self.pattern:
            raise ValueError(
                f"pattern must divide the inputs of every leaf, got groups of {self.pattern} for "
                f"{leaf.path!r} of shape {leaf.shape}, axis {leaf.group_axis}: leave it out by "
                "`mask`."
            )

    def counts(self, leaves: Sequence[SparseLeaf], density: ArrayLike) -> list[jax.Array]:
        """Returns how many units are kept where they compete: in each leaf, the tree or a group."""
        sizes = [sum(self._num_units(leaves[i]) for i in part) for part in self._parts(leaves)]
        return [rounded_product(density, size) for size in sizes]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def choose(
        self,
        leaves: tuple[SparseLeaf, ...],
        active: Sequence[jax.Array],
        scores: Sequence[jax.Array],
        counts: Sequence[jax.Array],
        growth: tuple[ArrayLike, Sequence[jax.Array]] | None = None,
    ) -> list[jax.Array]:
        """Returns the masks that keep the largest scores among the active entries.

        Args:
          leaves: The leaves.
          active: Masks of the entries to choose from.
          scores: Scores of the entries, real and >= 0.
          counts: Units to keep, of `counts`.
          growth: The fraction of the kept units to exchange, and scores by which others come
            in their place; None for masks that only shrink.
        """
        dtype = dtype_of_scores(*(s.dtype for s in scores))

        def ranked(scores: Sequence[jax.Array]) -> list[jax.Array]:
            pairs = zip(leaves, scores, strict=True)
            return [ranking(self._units(leaf, s), dtype) for leaf, s in pairs]

        pools = [self._units(leaf, x) for leaf, x in zip(leaves, active, strict=True)]
        ranks, others = ranked(scores), None if growth is None else ranked(growth[1])
        kept: list[jax.Array] = []
        for part, count in zip(self._parts(leaves), counts, strict=True):
            of_part = _Competition(
                axis=leaves[part[0]].group_axis + 1 if isinstance(self.pattern, int) else None,
                active=[pools[i] for i in part],
            )
            own = [ranks[i] for i in part]
            if growth is None or others is None:
                kept += of_part.largest(own, count)
            else:
                kept += of_part.exchanged(own, [others[i] for i in part], count, growth[0])
        return [self._entries(k, like) for k, like in zip(kept, active, strict=True)]

    def _parts(self, leaves: Sequence[SparseLeaf]) -> list[list[int]]:
        """Returns the positions of leaves whose units compete."""
        if self.scope == "tree" and isinstance(self.pattern, str):
            return [list(range(len(leaves)))]
        return [[i] for i in range(len(leaves))]

    def _num_units(self, leaf: SparseLeaf) -> int:
        if isinstance(self.pattern, int):
            return self.pattern
        axes = leaf.outputs if self.pattern == "rows" else range(len(leaf.shape))
        return math.prod(leaf.shape[a] for a in axes)

    def _units(self, leaf: SparseLeaf, x: jax.Array) -> jax.Array:
        """Returns the values of units: their means, or for conditions whether one is True."""
        if self.pattern == "free":
            return x
        if self.pattern == "rows":
            axes = tuple(a for a in range(x.ndim) if a not in leaf.outputs)
            if x.dtype == bool:
                return jnp.any(x, axis=axes, keepdims=True)
            num_inputs = math.prod(leaf.shape[a] for a in axes)
            return jnp.sum(x / max(num_inputs, 1), axis=axes, keepdims=True)
        axis = leaf.group_axis
        return x.reshape(*x.shape[:axis], -1, self.pattern, *x.shape[axis + 1 :])

    def _entries(self, units: jax.Array, like: jax.Array) -> jax.Array:
        """Returns the mask of entries for one of units, sharded like another."""
        if self.pattern == "rows":
            return units | jnp.zeros_like(like)
        return units.reshape(like.shape) if self.pattern != "free" else units


@dataclasses.dataclass(frozen=True)
class _Competition:
    """Units of which the largest are kept: those of some leaves, or of each group of a leaf."""

    axis: int | None
    active: list[jax.Array]

    def largest(self, ranks: list[jax.Array], count: jax.Array) -> list[jax.Array]:
        """Returns the masks of the largest active units, at most `count`."""
        ranks = [
            jnp.where(a, r, jnp.zeros_like(r)) for r, a in zip(ranks, self.active, strict=True)
        ]
        return self._first(ranks, jnp.minimum(count, self._num_active()))

    def exchanged(
        self,
        ranks: list[jax.Array],
        others: list[jax.Array],
        count: jax.Array,
        fraction: ArrayLike,
    ) -> list[jax.Array]:
        """Returns `count` units: the largest active ones, and for a fraction others by rank."""
        num_wanted = count - rounded_product(fraction, count)
        num_kept = jnp.minimum(num_wanted, self._num_active())
        kept = self.largest(ranks, num_wanted)
        others = [jnp.where(k, jnp.zeros_like(o), o) for k, o in zip(kept, others, strict=True)]
        grown = self._first(others, count - num_kept)
        return [k | g for k, g in zip(kept, grown, strict=True)]

    def _num_active(self) -> jax.Array:
        if self.axis is None:
            return num_true(self.active)
        return jnp.sum(self.active[0], axis=self.axis, keepdims=True, dtype=jnp.int32)

    def _first(self, ranks: list[jax.Array], count: jax.Array) -> list[jax.Array]:
        if self.axis is None:
            return largest(ranks, count)
        return [largest_in_groups(ranks[0], count, self.axis)]


def rounded_product(fraction: ArrayLike, size: ArrayLike) -> jax.Array:
    """Returns a fraction of a count, rounded; in Python if both are known, 0 for NaN."""
    if isinstance(fraction, (int, float)) and isinstance(size, (int, float)):
        fraction = 0 if math.isnan(fraction) else min(max(fraction, 0), 1)
        return jnp.asarray(round(fraction * size), jnp.int32)
    fraction = jnp.clip(jnp.asarray(fraction, jnp.float32), 0, 1)
    wide = jnp.asarray(size).astype(jnp.float32)
    return jnp.round(jnp.nan_to_num(fraction) * wide).astype(jnp.int32)
