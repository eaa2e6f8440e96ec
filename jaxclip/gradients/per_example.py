"""Clips the gradient of each example, and averages: `mean_i g_i * min(1, max_norm / norm(g_i))`.

One example can then change the sum of the gradients by at most `max_norm`. Differential privacy
asks for this bound, the sensitivity of the sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from jaxclip._core import checks
from jaxclip._core.floats import compute_dtype
from jaxclip._core.trees import PyTree, map_clippable, path_name
from jaxclip.norms.of_trees import measure_norm
from jaxclip.norms.scaling import clip_to_norm, zero_if


class PerExampleGradients(NamedTuple):
    """Result of a function made by `per_example`, for n examples.

    Attributes:
      loss: Scalar, the mean loss of the examples that the mask keeps; 0 if it keeps none.
      grads: The mean of the clipped gradients, or their sum over `divide_by`; float32, or wider or
        complex as the parameters are.
      norms: Float32 vector, the norm of each gradient before the clip; 0 where masked out.
      num_clipped: Scalar int32, the examples whose gradient was above `max_norm`.
      num_nonfinite: Scalar int32, the examples whose gradient was not finite, and counts as zeros.
      aux: What `loss_fn` returns beside the loss, stacked; None without `has_aux`.
    """

    loss: jax.Array
    grads: optax.Updates
    norms: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array
    aux: PyTree


def per_example(
    loss_fn: Callable[..., Any],
    max_norm: ArrayLike,
    *,
    microbatch_size: int | None = None,
    divide_by: ArrayLike | None = None,
    has_aux: bool = False,
    axis_name: str | None = None,
) -> Callable[..., PerExampleGradients]:
    """Makes a function like `jax.value_and_grad` that clips the gradient of each example.

    `grads = sum_i g_i * min(1, max_norm / norm(g_i)) / divide_by`, `norm` over all parameters.

    The sum has sensitivity `max_norm`: it changes by at most this if one example is added, removed
    or masked out, and by at most twice this if one is replaced. Each term keeps the bound in exact
    arithmetic; their sum in float32 is rounded. For private training give a constant `divide_by`,
    and add noise in proportion to `max_norm / divide_by`: the number of examples, by which the
    default divides, is itself data.

    Args:
      loss_fn: `(params, batch) -> loss`. It gets batches of one example. With `has_aux` it
        returns `(loss, aux)`. Random keys can be a leaf of the batch.
      max_norm: Number in [0, inf], or a traced scalar, in the units of the gradient.
      microbatch_size: Number of examples whose gradients are in memory at once, at least 1; None
        for all of the batch. It need not divide the batch.
      divide_by: Positive number or traced scalar; None for the number of examples that the mask
        keeps. 1 gives the sum.
      has_aux: True if `loss_fn` returns `(loss, aux)`.
      axis_name: Mapped axis that splits the batch, inside `shard_map` or `vmap`: all results but
        norms and `aux` are those of the whole batch. Leave it None under `jit` on sharded arrays.

    Returns:
      A function `(params, batch, mask=None) -> PerExampleGradients`, to be jitted by the caller.
      All leaves of `batch` have the examples as their first axis; `mask` is a vector of bools,
      False for padding. Gradients with a NaN or an infinity count as zeros, as do all if a traced
      `max_norm` is NaN.

    Raises:
      ValueError: If `max_norm` is negative or NaN, or `microbatch_size` or `divide_by` not
        positive; when called, if the batch is empty or its leaves or the mask differ in length.

    Example:
      >>> def loss_fn(w, batch):
      ...     return jnp.mean(batch * w)
      >>> result = per_example(loss_fn, 2.0)(jnp.array(1.0), jnp.array([1.0, -1.0, 300.0]))
      >>> print(f"{result.grads:.3f}", result.norms, result.num_clipped)
      0.667 [  1.   1. 300.] 1

    References:
      Abadi et al., Deep Learning with Differential Privacy, 2016, https://arxiv.org/abs/1607.00133
    """
    checks.check_threshold("max_norm", max_norm)
    checks.check_choice("has_aux", has_aux, (False, True))
    if microbatch_size is not None:
        checks.check_count("microbatch_size", microbatch_size)
    if divide_by is not None:
        checks.check_positive("divide_by", divide_by)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def clip_one(params: optax.Params, example: PyTree, is_real: jax.Array) -> tuple:
        value, grads = value_and_grad(params, jax.tree.map(lambda x: x[None], example))
        loss, aux = value if has_aux else (value, None)
        wide = map_clippable(lambda g: g.astype(compute_dtype(g.dtype)), grads)
        norm = measure_norm(wide).norm
        clipped, outcome = clip_to_norm(wide, norm, max_norm)
        each = _Example(
            loss=jnp.where(is_real, loss, jnp.zeros_like(loss)),
            norm=jnp.where(is_real, norm.value().astype(jnp.float32), 0),
            is_clipped=is_real & (outcome.is_clipped > 0),
            is_nonfinite=is_real & outcome.is_bad,
            aux=aux,
        )
        return zero_if(~is_real, clipped), each

    def clipped_grad(
        params: optax.Params, batch: PyTree, mask: ArrayLike | None = None
    ) -> PerExampleGradients:
        size = _num_examples(batch)
        is_real = jnp.ones((size,), bool) if mask is None else _as_mask(mask, size)
        zero = _zero_that_varies(batch)
        params = _varying(params, zero)

        def sum_of(examples: PyTree, is_real: jax.Array) -> tuple:
            clipped, each = jax.vmap(lambda *x: clip_one(params, *x))(examples, is_real)
            return jax.tree.map(lambda g: jnp.sum(g, axis=0), clipped), each

        if microbatch_size is None or microbatch_size >= size:
            total, each = sum_of(batch, is_real)
        else:
            zeros = map_clippable(lambda p: jnp.zeros(p.shape, compute_dtype(p.dtype)), params)
            zeros = _varying(zeros, zero)
            total, each = _in_parts(sum_of, zeros, (batch, is_real), microbatch_size)
        sums = (
            jnp.sum(each.loss),
            jnp.sum(is_real, dtype=jnp.int32),
            jnp.sum(each.is_clipped, dtype=jnp.int32),
            jnp.sum(each.is_nonfinite, dtype=jnp.int32),
        )
        if axis_name is not None:
            total, sums = lax.psum((total, sums), axis_name)
        loss, num_real, num_clipped, num_nonfinite = sums
        count = jnp.maximum(num_real, 1)
        divisor = count if divide_by is None else jnp.asarray(divide_by)
        return PerExampleGradients(
            loss=loss / count.astype(loss.dtype),
            grads=map_clippable(lambda g: g / divisor.astype(g.dtype), total),
            norms=each.norm,
            num_clipped=num_clipped,
            num_nonfinite=num_nonfinite,
            aux=each.aux,
        )

    return clipped_grad


class _Example(NamedTuple):
    """Reports on one example, or stacked on several."""

    loss: jax.Array
    norm: jax.Array
    is_clipped: jax.Array
    is_nonfinite: jax.Array
    aux: PyTree


def _num_examples(batch: PyTree) -> int:
    """Returns the length of the first axis of all leaves; raises if there is none."""
    entries = jax.tree_util.tree_leaves_with_path(batch)
    sizes = [np.shape(x)[0] if np.ndim(x) else None for _, x in entries]
    for (path, x), size in zip(entries, sizes, strict=True):
        if size is None or size != sizes[0]:
            raise ValueError(
                "the leaves of batch must have the examples as their first axis, "
                f"{sizes[0]} by the first leaf; {path_name(path)!r} has shape {np.shape(x)}."
            )
    if not sizes or not sizes[0]:
        raise ValueError("batch must have at least one example, got none.")
    return sizes[0]


def _as_mask(mask: ArrayLike, size: int) -> jax.Array:
    is_real = jnp.asarray(mask)
    if is_real.shape != (size,) or is_real.dtype != bool:
        raise ValueError(
            f"mask must be a vector of {size} bools, one for each example; got shape "
            f"{is_real.shape} and dtype {is_real.dtype}."
        )
    return is_real


def _zero_that_varies(batch: PyTree) -> jax.Array | None:
    """Returns a 0 made of the batch inside `shard_map`, which differs by device in jax's eyes."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return None
    zero = jnp.zeros((), jnp.float32)
    for x in jax.tree.leaves(batch):
        if jnp.issubdtype(x.dtype, jnp.number):
            zero += jnp.sum(jnp.real(x[:0])).astype(jnp.float32)
    return zero


def _varying(tree: PyTree, zero: jax.Array | None) -> PyTree:
    """Returns a tree whose leaves are each device's own inside `shard_map`."""
    # Of parameters that all devices share jax would sum the gradients over the devices, before the
    # clip.
    return tree if zero is None else map_clippable(lambda x: x + zero.astype(x.dtype), tree)


def _in_parts(sum_of: Callable, zeros: PyTree, examples: tuple, part_size: int) -> tuple:
    """Returns `sum_of` all examples, a few at a time; masked ones fill the last few up."""
    size = examples[1].shape[0]
    num_parts = -(-size // part_size)
    num_added = num_parts * part_size - size

    # Each part takes examples from all over the batch, so that they stay on their devices.
    def split(x: jax.Array, added: jax.Array) -> jax.Array:
        x = jnp.concatenate([x, added]) if num_added else x
        return jnp.swapaxes(x.reshape(part_size, num_parts, *x.shape[1:]), 0, 1)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(num_parts * part_size, *x.shape[2:])[:size]

    def add(total: PyTree, part: tuple) -> tuple:
        of_part, each = sum_of(*part)
        return jax.tree.map(jnp.add, total, of_part), each

    batch, is_real = examples
    parts = (
        jax.tree.map(lambda x: split(x, x[:num_added]), batch),
        split(is_real, jnp.zeros((num_added,), bool)),
    )
    total, each = lax.scan(add, zeros, parts)
    return total, jax.tree.map(joined, each)
