"""QK-Clip: attention logits held at a threshold by scaling the weights of queries and keys.

    gamma = min(1, tau / largest logit of the head),    logit <- gamma * logit

A query head takes a part of its `gamma` and its key head the rest: `sqrt(gamma)` each where no
other head shares the key.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import FLOAT32_TINY, compute_dtype, keep_weak_type, round_toward_zero
from jaxclip._core.trees import PyTree, for_every_leaf, is_clippable, path_name


@dataclasses.dataclass(frozen=True)
class HeadAxis:
    """The place of attention heads in a leaf, made by `query_heads` or `key_heads`.

    Attributes:
      axis: The axis of heads, or of heads joined with their features.
      num_heads: Number of heads of a joined axis; None for an axis of heads alone.
      num_apart: Number of last features of each head that have a factor of their own.
      is_key: True for keys.
    """

    axis: int
    num_heads: int | None
    num_apart: int
    is_key: bool


def query_heads(axis: int = -2, num_heads: int | None = None, num_shared: int = 0) -> HeadAxis:
    """Makes the description of where the weights of queries have their heads, for `qk_clip`.

    Args:
      axis: The axis of heads, followed by that of their features: -2 in kernels `(in, heads,
        features)` and biases `(heads, features)` of flax.
      num_heads: Number of heads, if `axis` joins them with their features, heads first: axis 0 of
        PyTorch's `(heads * features, in)`.
      num_shared: Number of last features in each head that meet a key shared by all heads, as the
        rotary part of multi-head latent attention does. They are scaled by `gamma`.

    Returns:
      A value for the argument `heads` of `qk_clip`.

    Raises:
      ValueError: If a count is not an integer in range.

    Example:
      >>> query_heads(num_shared=64)
      HeadAxis(axis=-2, num_heads=None, num_apart=64, is_key=False)
    """
    return _head_axis(axis, num_heads, "num_shared", num_shared, is_key=False)


def key_heads(axis: int = -2, num_heads: int | None = None, num_values: int = 0) -> HeadAxis:
    """Makes the description of where the weights of keys have their heads, for `qk_clip`.

    Args:
      axis: The axis of heads, as in `query_heads`.
      num_heads: Number of heads of a joined axis, as in `query_heads`. There may be fewer than of
        queries, each shared by as many neighbors (grouped-query attention).
      num_values: Number of last features in each head that are values, not keys: they are kept.

    Returns:
      A value for the argument `heads` of `qk_clip`.

    Raises:
      ValueError: If a count is not an integer in range.

    Example:
      >>> key_heads(axis=0, num_heads=8)
      HeadAxis(axis=0, num_heads=8, num_apart=0, is_key=True)
    """
    return _head_axis(axis, num_heads, "num_values", num_values, is_key=True)


def qk_clip(
    params: optax.Params, max_logits: PyTree, tau: ArrayLike, *, heads: PyTree
) -> optax.Params:
    """Scales queries and keys so that no head's largest attention logit is above `tau`.

    `gamma = min(1, tau / max_logit)` for each query head, whose logits are multiplied by exactly
    this: `sqrt(gamma)` by the query and `sqrt(gamma)` by the key. A key that several queries share
    is multiplied by the largest of their `sqrt(gamma)`, and each query by the rest of its own
    `gamma`; so a head at or below `tau` keeps its logits whatever its neighbors do.

    Call it after `optax.apply_updates`, with the largest logits of the step. For layers stacked in
    one leaf, as `scan` wants them, use `jax.vmap` over the layers.

    Args:
      params: Any pytree of arrays, such as the parameters of an attention layer or of a model.
      max_logits: Vector of the largest logit of each query head, from `max_attention_logits`; or a
        prefix tree of these, one vector for each attention layer and None elsewhere.
      tau: The threshold: a number in (0, inf), or a traced scalar. One that is not positive scales
        nothing. The reference uses 100.
      heads: Prefix tree of `params`: `query_heads(...)` or `key_heads(...)` for the leaves that
        make queries and keys, biases too; None for all others.

    Returns:
      New parameters of the same structure, shapes, dtypes and weak types. Heads at or below `tau`
      come back bit-identical, as do those whose largest logit is not finite.

    Raises:
      TypeError: If an entry of `heads` is of a wrong type.
      ValueError: If `tau` is concrete and not in (0, inf), if a prefix does not fit, or if numbers
        of heads do not divide each other.

    Example:
      >>> params = {"query": jnp.ones((1, 2, 1)), "key": jnp.ones((1, 2, 1)), "out": jnp.ones(2)}
      >>> heads = {"query": query_heads(), "key": key_heads(), "out": None}
      >>> clipped = qk_clip(params, jnp.array([400.0, 50.0]), 100.0, heads=heads)
      >>> print(clipped["query"].ravel(), clipped["key"].ravel(), clipped["out"])
      [0.5 1. ] [0.5 1. ] [1. 1.]

    References:
      Kimi Team, Kimi K2: Open Agentic Intelligence, 2025, https://arxiv.org/abs/2507.20534
    """
    checks.check_positive("tau", tau)
    entries, treedef = jax.tree_util.tree_flatten_with_path(params)
    vectors, structure = jax.tree.flatten(max_logits, is_leaf=lambda x: x is None)
    layers = structure.unflatten(range(len(vectors)))
    layer_of_leaf = for_every_leaf("max_logits", layers, params)
    layout_of_leaf = for_every_leaf("heads", heads, params)
    leaves = [w for _, w in entries]
    parts: list[list[_Part]] = [[] for _ in vectors]
    for i, (path, w) in enumerate(entries):
        layout, layer = layout_of_leaf[i], layer_of_leaf[i]
        if layout is not None and not isinstance(layout, HeadAxis):
            raise TypeError(
                f"heads must be query_heads(...), key_heads(...) or None, got {layout!r} for "
                f"{path_name(path)!r}."
            )
        if layout is not None and is_clippable(w):
            parts[layer].append(_part_of(i, path_name(path), np.shape(w), layout))
    for vector, of_layer in zip(vectors, parts, strict=True):
        if vector is not None and of_layer:
            for part, factor in _factors(of_layer, jnp.asarray(vector), tau):
                leaves[part.position] = _scaled(jnp.asarray(leaves[part.position]), factor)
    return treedef.unflatten(leaves)


def max_attention_logits(
    query: ArrayLike,
    key: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
    axis_name: str | None = None,
) -> jax.Array:
    """Returns the largest attention logit of each query head: `max(scale * query @ key)`.

    For `qk_clip`, beside `jax.nn.dot_product_attention`, which takes the same arrays. It needs the
    memory of all logits. The largest logsumexp that a fused kernel returns is at most `log(S)`
    above the largest logit, and will do instead.

    Args:
      query: Queries after positions were encoded, `(..., T, heads, features)`.
      key: Keys of the same batch, `(..., S, key heads, features)`; as many heads, or a divisor.
      scale: Number that products are multiplied by; None is `1 / sqrt(features)`.
      mask: Bools, True where a query sees a key; broadcasts against `(..., heads, T, S)`.
      is_causal: True to leave out keys after the query.
      axis_name: Mapped axis that splits the batch, inside `shard_map` or `vmap`.

    Returns:
      A float32 vector of length `heads` (float64 for float64), with no derivative. NaN for a head
      with a NaN among its logits; -inf for one that sees nothing. Join those of several batches by
      `jnp.maximum`.

    Raises:
      ValueError: If shapes do not fit, or heads do not divide.

    Example:
      >>> query, key = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 1, 4))
      >>> max_attention_logits(query.at[:, :, 1].set(5.0), key)
      Array([ 2., 10.], dtype=float32)
    """
    q, k = lax.stop_gradient((jnp.asarray(query), jnp.asarray(key)))
    if q.ndim < 3 or q.ndim != k.ndim or (q.shape[:-3], q.shape[-1]) != (k.shape[:-3], k.shape[-1]):
        raise ValueError(
            "query and key must have shapes (..., T, heads, features) and (..., S, key heads, "
            f"features), got {q.shape} and {k.shape}."
        )
    (num_heads, num_features), num_keys = q.shape[-2:], k.shape[-2]
    if not num_keys or num_heads % num_keys:
        raise ValueError(f"the heads of key must divide the {num_heads} of query, got {num_keys}.")
    wide = compute_dtype(q.dtype, k.dtype)
    scale = 1 / np.sqrt(max(num_features, 1)) if scale is None else scale
    grouped = q.reshape(*q.shape[:-2], num_keys, num_heads // num_keys, num_features)
    logits = jnp.einsum("...tgid,...sgd->...gits", grouped.astype(wide), k.astype(wide))
    logits = logits.reshape(*q.shape[:-3], num_heads, q.shape[-3], k.shape[-3])
    logits = logits * jnp.asarray(scale, wide)
    if is_causal:
        is_seen = jnp.tri(*logits.shape[-2:], dtype=bool)
        logits = jnp.where(jnp.broadcast_to(is_seen, logits.shape), logits, -jnp.inf)
    if mask is not None:
        logits = jnp.where(jnp.broadcast_to(mask, logits.shape), logits, -jnp.inf)
    axes = tuple(a for a in range(logits.ndim) if a != logits.ndim - 3)
    largest = jnp.max(logits, axis=axes, initial=-jnp.inf)
    # A maximum alone may lose a NaN: XLA on CPU does.
    largest = jnp.where(jnp.any(jnp.isnan(logits), axis=axes), jnp.nan, largest)
    return largest if axis_name is None else jnp.max(lax.all_gather(largest, axis_name), axis=0)


def soft_cap(logits: ArrayLike, cap: ArrayLike) -> jax.Array:
    """Bounds logits smoothly: `cap * tanh(logits / cap)`.

    Nearly the identity well below `cap`. It bounds what the softmax sees and not the products of
    queries and keys, which may still grow: `qk_clip` bounds these.

    Args:
      logits: Real floating array.
      cap: The bound: a number in (0, inf], or a traced scalar. One that is not positive caps
        nothing. Gemma 2 uses 50 for attention and 30 for the last layer.

    Returns:
      An array of the same shape, dtype and weak type, with magnitudes of at most `cap` in exact
      arithmetic. NaN stays NaN.

    Raises:
      ValueError: If `cap` is concrete and not in (0, inf].

    Example:
      >>> print(soft_cap(jnp.array([-1000.0, 0.5, 50.0]), 50.0).astype(jnp.int32))
      [-50   0  38]

    References:
      Gemma Team, Gemma 2: Improving Open Language Models at a Practical Size, 2024,
      https://arxiv.org/abs/2408.00118
    """
    x = jnp.asarray(logits)
    if isinstance(cap, float) and cap == float("inf"):
        return x
    checks.check_positive("cap", cap)
    wide = compute_dtype(x.dtype)
    bound = jnp.asarray(round_toward_zero(cap, wide))
    is_bound = (bound > 0) & jnp.isfinite(bound)
    bound = jnp.where(is_bound, bound, jnp.ones_like(bound))
    capped = bound * jnp.tanh(x.astype(wide) / bound)
    return keep_weak_type(jnp.where(is_bound, round_toward_zero(capped, x.dtype), x), x)


# --- Heads of a leaf ------------------------------------------------------------------


def _head_axis(
    axis: int, num_heads: int | None, name: str, num_apart: int, *, is_key: bool
) -> HeadAxis:
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise ValueError(f"axis must be an integer, {checks.describe(axis)}.")
    if num_heads is not None:
        checks.check_count("num_heads", num_heads)
    checks.check_count(name, num_apart, at_least=0)
    return HeadAxis(axis, num_heads, num_apart, is_key)


class _Part(NamedTuple):
    """Heads in one leaf: its position and path, their sizes, and how many axes are around them."""

    position: int
    path: str
    layout: HeadAxis
    num_heads: int
    num_features: int
    num_axes: tuple[int, int]


def _part_of(position: int, path: str, shape: tuple[int, ...], layout: HeadAxis) -> _Part:
    rank, is_joined = len(shape), layout.num_heads is not None
    axis = layout.axis % rank if -rank <= layout.axis < rank else rank
    if axis >= (rank if is_joined else rank - 1):
        after = "" if is_joined else " other than the last, that of features"
        raise ValueError(
            f"axis must be one of the leaf{after}; got {layout.axis} for {path!r} of shape {shape}."
        )
    num_heads = shape[axis] if layout.num_heads is None else layout.num_heads
    if is_joined and shape[axis] % num_heads:
        raise ValueError(
            f"num_heads must divide axis {layout.axis} of {path!r}, of size {shape[axis]}; "
            f"got {num_heads}."
        )
    num_features = shape[axis] // num_heads if is_joined else shape[axis + 1]
    if layout.num_apart > num_features:
        name = "num_values" if layout.is_key else "num_shared"
        raise ValueError(
            f"{name} must be at most the number of features in a head of {path!r}, "
            f"{num_features}; got {layout.num_apart}."
        )
    num_axes = axis, rank - axis - (1 if is_joined else 2)
    return _Part(position, path, layout, num_heads, num_features, num_axes)


def _factors(
    parts: list[_Part], max_logits: jax.Array, tau: ArrayLike
) -> list[tuple[_Part, jax.Array]]:
    """Returns the parts of one layer, each with the factor that its leaf is multiplied by."""
    if max_logits.ndim != 1 or not jnp.issubdtype(max_logits.dtype, jnp.floating):
        raise ValueError(
            "max_logits must be a floating vector, a number for each query head; got shape "
            f"{max_logits.shape} and dtype {max_logits.dtype} (for stacked layers use jax.vmap)."
        )
    gamma = _gamma(max_logits, tau)
    ones = jnp.ones_like(gamma)
    num_keys = _num_keys(parts, gamma.size)
    if num_keys:  # scaled no further than the query that needs it least; queries take the rest
        of_key = jnp.sqrt(jnp.max(gamma.reshape(num_keys, -1), axis=1))
        of_query = gamma / jnp.repeat(of_key, gamma.size // num_keys)
    else:
        of_key, of_query = ones, gamma
    kinds = {True: (of_key, ones[:num_keys]), False: (of_query, gamma)}
    return [(part, _spread(part, *kinds[part.layout.is_key])) for part in parts]


def _gamma(max_logits: jax.Array, tau: ArrayLike) -> jax.Array:
    """Returns `min(1, tau / max_logits)`, and 1 where that means nothing."""
    logits = max_logits.astype(compute_dtype(max_logits.dtype))
    bound = jnp.asarray(tau, logits.dtype)
    is_above = (logits > bound) & jnp.isfinite(logits) & (bound > 0)
    gamma = bound / jnp.where(is_above, logits, jnp.ones_like(logits))
    # Not 0, which could not be divided among query and key.
    return jnp.where(is_above, jnp.maximum(gamma, FLOAT32_TINY), jnp.ones_like(logits))


def _num_keys(parts: list[_Part], num_queries: int) -> int:
    """Returns the number of key heads of a layer, 0 without keys; raises if numbers do not fit."""
    keys = [p for p in parts if p.layout.is_key]
    num_keys = keys[0].num_heads if keys else 0
    for p in parts:
        expected, source = num_queries, "max_logits"
        if p.layout.is_key:
            expected, source = num_keys, keys[0].path
        if p.num_heads != expected:
            raise ValueError(
                f"{p.path!r} must have as many heads as {source!r}, {expected}; got {p.num_heads}."
            )
    if keys and (num_keys == 0 or num_queries % num_keys):
        raise ValueError(
            f"the number of key heads must divide that of query heads, {num_queries}; got "
            f"{num_keys} at {keys[0].path!r}."
        )
    if keys and len(keys) == len(parts):
        raise ValueError(
            f"heads must also name the queries that meet the keys at {keys[0].path!r}."
        )
    return num_keys


def _spread(part: _Part, of_heads: jax.Array, of_apart: jax.Array) -> jax.Array:
    """Returns the factor of each head and feature in a shape that broadcasts against the leaf."""
    is_apart = np.arange(part.num_features) >= part.num_features - part.layout.num_apart
    factor = jnp.where(is_apart[None], of_apart[:, None], of_heads[:, None])
    factor = factor.reshape(-1) if part.layout.num_heads is not None else factor
    before, after = part.num_axes
    return factor.reshape((1,) * before + factor.shape + (1,) * after)


def _scaled(w: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns a leaf times a real factor in its own dtype; bits are kept where that is 1."""
    wide = compute_dtype(w.dtype, factor.dtype)
    product = (w.astype(wide) * factor.astype(wide)).astype(w.dtype)
    return keep_weak_type(jnp.where(factor == 1, w, product), w)
