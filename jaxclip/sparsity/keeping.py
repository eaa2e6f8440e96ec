"""Training with few weights: an optimizer that keeps all but the largest at zero.

v = w + inner(g * m, w),    m <- the largest of |v|,    w <- m * v
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import compute_dtype, has_nonfinite, increment, keep_weak_type, saturate
from jaxclip._core.trees import Mask, PyTree, check_mask_for_leaves
from jaxclip._core.updates import update_to
from jaxclip.sparsity.patterns import (
    Chooser,
    Pattern,
    Scope,
    SparseLeaf,
    check_pattern,
    sparse_leaves,
)
from jaxclip.thresholds.values import check_number_or_schedule


class KeepSparseState(NamedTuple):
    """State of `keep_sparse`.

    Attributes:
      step: Scalar int32, steps so far.
      mask: The weights that are kept, bools in the shape of each leaf; a scalar True for leaves
        that are left alone.
      inner_state: State of the wrapped optimizer.
    """

    step: jax.Array
    mask: PyTree
    inner_state: optax.OptState


def keep_sparse(
    inner: optax.GradientTransformation,
    density: ArrayLike | optax.Schedule,
    *,
    pattern: Pattern = "free",
    scope: Scope = "leaf",
    grow: ArrayLike | optax.Schedule | None = None,
    every: int = 1,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that only a fraction of the weights differs from zero.

    `v = w + inner(g * m, w)`. Every `every` steps the mask `m` is chosen anew, as the largest of
    `|v|` among the weights that it keeps; then `w <- m * v`. The optimizer inside sees no
    gradient of pruned weights, so norms and averages are those of the sparse network.

    A schedule prunes step by step. The cubic one of Zhu and Gupta is
    `optax.polynomial_schedule(1.0, density, 3, num_steps)`. RigL is a constant density with
    `grow=optax.cosine_decay_schedule(0.3, num_steps), every=100`.

    A box fits inside or after it. Around it fits `keep_on_grid(keep_sparse(inner, ...), grid)`,
    where the mask is chosen by the weights before rounding; not the other way round, because the
    grid would keep on counting weights that were taken from it.

    Args:
      inner: Any optimizer.
      density: The fraction of weights to keep: number in (0, 1], traced scalar, or schedule. A
        value below 0 counts as 0, one above 1 as 1; NaN leaves the mask alone.
      pattern: "free" for any entries; "rows" for whole outputs, by the mean of `|v|`; a group
        size m for the same number of every m consecutive inputs: a density of 1/2 and 4 is 2:4.
      scope: "leaf" for the density in every leaf, "tree" for one choice among all leaves.
        Groups are always by leaf.
      grow: The fraction of the kept weights to exchange whenever the mask is chosen, for those of
        the largest `|g|`, which start at 0: number in [0, 1], traced scalar, or schedule. None
        for masks that only shrink; a density that rises then brings nothing back.
      every: Steps from one choice of the mask to the next. May be traced.
      mask: The leaves to prune: a tree of bools (a prefix is enough), or a function of the
        parameters that returns one; None for leaves of two or more dimensions.

    Returns:
      A transform that needs `params`; shapes, dtypes and weak types of the updates are kept. Its
      state has a bool for each weight. After `optax.apply_updates` pruned weights are exactly 0,
      if the updates are of the weights' dtype or one that contains it, and else after a few
      steps. The number of weights kept is `density` times their number, rounded: to one for a
      number, for a traced one to float32. Of equal magnitudes the first are kept. A step that is
      NaN or infinite is passed on for the weights that are kept, and the mask stays.

    Raises:
      TypeError: If `inner` is not a transformation, or an argument is of a wrong type.
      ValueError: If `density`, `grow`, `pattern`, `scope` or `every` is not allowed, or `update`
        gets no params; in `init`, if a leaf does not fit the pattern.

    Example:
      >>> params = {"kernel": jnp.array([[0.9, -0.2], [0.1, 0.6]])}
      >>> tx = keep_sparse(optax.sgd(0.1), 0.5)
      >>> grads = {"kernel": jnp.ones((2, 2))}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"].round(3))
      [[0.8 0. ]
       [0.  0.5]]

    References:
      Zhu and Gupta, To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878
      Evci et al., Rigging the Lottery: Making All Tickets Winners, 2020,
      https://arxiv.org/abs/1911.11134
      Mishra et al., Accelerating Sparse Deep Neural Networks, 2021,
      https://arxiv.org/abs/2104.08378
    """
    inner = checks.check_transformation("inner", inner)
    check_number_or_schedule("density", density, check_density)
    if grow is not None:
        check_number_or_schedule("grow", grow, checks.check_decay_rate)
    check_pattern(pattern, scope)
    checks.check_traced_count("every", every)
    check_mask_for_leaves(mask)
    chooser = Chooser(pattern, scope)

    def init_fn(params):
        leaves = sparse_leaves(params, mask)
        for leaf in leaves:
            if leaf is not None:
                chooser.check(leaf)
        structure = jax.tree.structure(params)
        weights = jax.tree.leaves(params)
        kept = [
            jnp.ones((), bool) if leaf is None else jnp.ones_like(w, bool)
            for leaf, w in zip(leaves, weights, strict=True)
        ]
        step = jnp.zeros((), jnp.int32)
        return KeepSparseState(step, structure.unflatten(kept), inner.init(params))

    def update_fn(updates, state, params=None, **extra_args):
        checks.check_params_given("keep_sparse", params)
        checks.check_same_structure("updates", updates, "params", params)
        leaves = sparse_leaves(params, mask)
        places = [i for i, leaf in enumerate(leaves) if leaf is not None]
        structure = jax.tree.structure(updates)

        def chosen(tree: PyTree) -> list[jax.Array]:
            all_leaves = jax.tree.leaves(tree)
            return [jnp.asarray(all_leaves[i]) for i in places]

        def replaced(tree: PyTree, new: list[jax.Array]) -> PyTree:
            all_leaves = jax.tree.leaves(tree)
            for i, x in zip(places, new, strict=True):
                all_leaves[i] = x
            return structure.unflatten(all_leaves)

        grads, weights, old = chosen(updates), chosen(params), chosen(state.mask)
        updates = replaced(updates, list(map(_masked, old, grads)))
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        steps = chosen(updates)
        now = checks.value_at("density", density, state.step)
        fraction = None if grow is None else checks.value_at("grow", grow, state.step)
        is_due = state.step % jnp.maximum(jnp.asarray(every, jnp.int32), 1) == 0
        is_due &= ~jnp.isnan(jnp.asarray(now, jnp.float32))
        chosen_leaves = tuple(leaf for leaf in leaves if leaf is not None)
        counts = chooser.counts(chosen_leaves, now)
        new = _next_masks(
            chooser, chosen_leaves, is_due, old, weights, steps, counts, fraction, grads
        )
        updates = replaced(updates, list(map(_sparse_step, old, new, steps, weights)))
        return updates, KeepSparseState(
            increment(state.step), replaced(state.mask, new), inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_density(name: str, value: object) -> None:
    """Raises unless `value` is a number in (0, 1], or a jax array."""
    checks.check_positive(name, value)
    checks.check_decay_rate(name, value)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_masks(
    chooser: Chooser,
    leaves: tuple[SparseLeaf, ...],
    is_due: jax.Array,
    old: list[jax.Array],
    weights: list[jax.Array],
    steps: list[jax.Array],
    counts: list[jax.Array],
    fraction: ArrayLike | None,
    grads: list[jax.Array],
) -> list[jax.Array]:
    """Returns the masks after a step: new ones if they are due and the step is finite."""
    if not leaves:
        return old

    def choose(_: None) -> list[jax.Array]:
        growth = None if fraction is None else (fraction, list(map(_modulus, grads)))
        new = chooser.choose(leaves, old, list(map(_moved, weights, steps)), counts, growth)
        is_bad = has_nonfinite((grads, steps))
        return [jnp.where(is_bad, before, after) for before, after in zip(old, new, strict=True)]

    # A `cond`: between choices the mask costs nothing, unless the condition is batched.
    return lax.cond(is_due, choose, lambda _: old, None)


def _masked(kept: jax.Array, g: jax.Array) -> jax.Array:
    return keep_weak_type(jnp.where(kept, g, jnp.zeros_like(g)), g)


def _modulus(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(compute_dtype(x.dtype)))


def _moved(w: jax.Array, u: jax.Array) -> jax.Array:
    """Returns the magnitudes after a step, in float32 or wider."""
    wide = compute_dtype(w.dtype, u.dtype)
    return jnp.abs(w.astype(wide) + u.astype(wide))


def _sparse_step(old: jax.Array, new: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
    """Returns the update, or that to 0 for weights that are pruned or start from there."""
    to_zero = saturate(update_to(jnp.zeros_like(w), u, w), u.dtype)
    return keep_weak_type(jnp.where(old & new, u, to_zero), u)
