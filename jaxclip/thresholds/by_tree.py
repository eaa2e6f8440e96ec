"""The rule with one threshold for a whole tree.

Leaves are measured together but never concatenated: each gives its maximum, counts or sums, and
these are combined. So every leaf may be sharded in its own way.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxclip._core import checks, trees
from jaxclip._core.grids import Grid
from jaxclip._core.trees import PyTree
from jaxclip.thresholds.rules import Bound, ThresholdRule
from jaxclip.thresholds.values import check_threshold_tree


@dataclasses.dataclass(frozen=True, eq=False)
class _PerTree(ThresholdRule):
    rule: ThresholdRule = dataclasses.field(default_factory=ThresholdRule)
    is_blockwise: ClassVar[bool] = False
    is_leafwise: ClassVar[bool] = False

    def __call__(self, array: PyTree) -> jax.Array:
        self.refuse_step(array)
        flat = jax.tree_util.tree_leaves_with_path(array)
        named = [(trees.path_name(path), x) for path, x in flat if trees.is_clippable(x)]
        return self._for_named(named)

    def _for_named(self, leaves: Sequence[tuple[str, ArrayLike]]) -> jax.Array:
        for path, leaf in leaves:
            self.rule.check_leaf(path, leaf)
        return _pooled(self.rule, [leaf for _, leaf in leaves])

    def compact(self, array: jax.Array) -> jax.Array:
        raise TypeError(
            "per_tree measures all leaves, but got one array: give `compress` the tree, or "
            "take the threshold of the tree, `per_tree(rule)(tree)`."
        )

    def for_leaves(self, leaves: Sequence[tuple[str, ArrayLike]], step: ArrayLike) -> list[Bound]:
        del step
        return [self._for_named(leaves)] * len(leaves)

    def bind(self, grid: Grid) -> ThresholdRule:
        return _PerTree(rule=self.rule.bind(_of_all_entries(grid)))


def _of_all_entries(grid: Grid) -> Grid:
    return dataclasses.replace(grid, axis=None, group_size=None)


@checks.refuses_step
def per_tree(rule: ThresholdRule) -> ThresholdRule:
    """Makes a rule that chooses one threshold for all leaves together.

    `t = rule(w)`, where `w` are the entries of all floating leaves of the tree. In a prefix tree
    these are the leaves of its subtree, with a mask those that it keeps, and in `compress` those
    that become low-bit. With `axis=None` each leaf stores one scale.
    `clip_weights`, `box`, `make_train_step`, `compress` and leaf-wise gradient clips take this
    rule. Functions that see one leaf at a time refuse it: other projections, `quantize`, and the
    rewriting of files.

    Args:
      rule: `max_abs`, `percentile_abs`, `std_multiple` or `mse_optimal`, without `axis`,
        `group_size` and `importance`.

    Returns:
      A rule: tree -> float32 scalar, 0 for a tree without entries. Leaves may have different
      dtypes and shardings. In `compress` each width has its own threshold, measured on all
      leaves of the rule as if all had that width. With a zero point, `mse_optimal` chooses it
      for the grid around 0.

    Raises:
      TypeError: If `rule` is not a rule, or has no threshold for many arrays; when it is
        used, if `mse_optimal` meets a complex leaf.
      ValueError: If `rule` has an axis, groups or an `importance`; when it is
        used, if `percentile_abs` has 2**31 entries or more to count.

    Example:
      >>> from jaxclip.thresholds.by_magnitude import max_abs
      >>> params = {"a": jnp.array([0.5, -2.0]), "b": jnp.array([[1.0]])}
      >>> float(per_tree(max_abs())(params))
      2.0
    """
    check_threshold_tree("rule", rule)
    if not isinstance(rule, ThresholdRule) or type(rule).pool is ThresholdRule.pool:
        raise TypeError(
            "rule must be max_abs, percentile_abs, std_multiple or mse_optimal: these have one "
            f"threshold for many arrays; got {rule!r}."
        )
    if rule.grid != _of_all_entries(rule.grid):
        raise ValueError(f"rule must have no axis and no group_size in per_tree, got {rule!r}.")
    if getattr(rule, "importance", None) is not None:
        raise ValueError("rule must have no importance in per_tree.")
    return _PerTree(rule=rule)


def shared_over(rule: Any, leaves: Sequence[ArrayLike]) -> ThresholdRule:
    """Returns a rule for single arrays, with the threshold that a `per_tree` has for leaves."""
    return _Shared(rule=rule.rule, leaves=tuple(leaves))


@dataclasses.dataclass(frozen=True, eq=False)
class _Shared(ThresholdRule):
    rule: ThresholdRule = dataclasses.field(default_factory=ThresholdRule)
    leaves: tuple[ArrayLike, ...] = ()
    known: dict[ThresholdRule, jax.Array] = dataclasses.field(default_factory=dict)

    def _as_value(self) -> tuple:
        return (id(self),)  # it belongs to one tree

    def compact(self, array: jax.Array) -> jax.Array:
        if self.rule not in self.known:
            self.known[self.rule] = _pooled(self.rule, self.leaves)
        return jnp.full(self.grid.scale_shape(array.shape), self.known[self.rule])

    def bind(self, grid: Grid) -> ThresholdRule:
        return dataclasses.replace(self, grid=grid, rule=self.rule.bind(_of_all_entries(grid)))


def _pooled(rule: ThresholdRule, leaves: Sequence[ArrayLike]) -> jax.Array:
    if not leaves:
        return jnp.zeros((), jnp.float32)
    return _pool(rule, [jnp.asarray(leaf) for leaf in leaves])


@functools.partial(jax.jit, static_argnums=0)
def _pool(rule: ThresholdRule, arrays: list[jax.Array]) -> jax.Array:
    return rule.pool(arrays)
