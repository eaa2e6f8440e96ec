"""Training of scales: factors of the scales of a low-bit tree are trained, its codes are fixed.

    w = (factor * scale) * (code - zero)

One factor for each block, 1 at first.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip._core import trees
from jaxclip._core.trees import PyTree, is_clippable
from jaxclip.lowbit.arrays import is_quantized
from jaxclip.lowbit.scale_formats import round_scale


def trainable_parts(
    small: PyTree,
) -> tuple[dict[str, jax.Array], Callable[[Mapping[str, jax.Array]], PyTree]]:
    """Returns the parts of a low-bit tree that can be trained, and a function to put them back.

    The codes are fixed. Each low-bit leaf gives factors of its scales, ones at first, so one step
    size suits scales of all sizes. The other floating leaves, biases and norm scales, are returned
    as they are. A short training of these recovers much of the accuracy that rounding lost, and
    the file has the same size.

    Args:
      small: A tree from `compress`, with at least one low-bit leaf.

    Returns:
      `parts`, a dict from path to array, and `rebuild`: `rebuild(parts)` is the low-bit tree with
      these parts. Its derivative is straight through the rounding of scales to their format, and
      `rebuild` of the unchanged parts is `small` itself.

    Raises:
      TypeError: By `rebuild`, if the parts are not a dict.
      ValueError: If no leaf is low-bit, or two have the same path because a key has a "/"; by
        `rebuild`, if the parts have other paths or shapes.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxclip import compress, decompress
      >>> small = compress({"kernel": jnp.array([[1.0], [-2.0]])}, 1)
      >>> parts, rebuild = trainable_parts(small)
      >>> loss_fn = lambda parts: jnp.sum(decompress(rebuild(parts))["kernel"] ** 2)
      >>> jax.grad(loss_fn)(parts)
      {'kernel': Array([[9.]], dtype=float32)}

    References:
      Esser et al., Learned Step Size Quantization, 2020, https://arxiv.org/abs/1902.08153
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(small, is_leaf=is_quantized)
    if not any(is_quantized(leaf) for _, leaf in flat):
        raise ValueError("small must have a low-bit leaf, as the result of compress has.")
    names = _names_of([path for path, _ in flat])
    parts = {}
    for name, (_, leaf) in zip(names, flat, strict=True):
        if is_quantized(leaf):
            parts[name] = jnp.ones_like(leaf.scale, jnp.float32)
        elif is_clippable(leaf):
            parts[name] = jnp.asarray(leaf)
    shapes = {name: part.shape for name, part in parts.items()}

    def rebuild(parts: Mapping[str, jax.Array]) -> PyTree:
        if not isinstance(parts, Mapping):
            raise TypeError(f"parts must be a dict from path to array, got {parts!r}.")
        given = {name: np.shape(part) for name, part in parts.items()}
        for name in sorted({*given, *shapes}, key=str):
            if given.get(name) != shapes.get(name):
                raise ValueError(
                    f"parts[{name!r}] must have shape {shapes.get(name)}, got {given.get(name)}."
                )
        pairs = zip(names, flat, strict=True)
        return structure.unflatten([_with_part(leaf, parts.get(name)) for name, (_, leaf) in pairs])

    return parts, rebuild


def _names_of(paths: list[tuple]) -> list[str]:
    names: dict[str, tuple] = {}
    for path in paths:
        other = names.setdefault(trees.path_name(path), path)
        if other is not path:
            one, two = jax.tree_util.keystr(other), jax.tree_util.keystr(path)
            raise ValueError(
                f"small must have a leaf for each path, but {one} and {two} are both called "
                f"{trees.path_name(path)!r}: rename one."
            )
    return list(names)


def _with_part(leaf: PyTree, part: jax.Array | None) -> PyTree:
    if part is None or not is_quantized(leaf):
        return leaf if part is None else part
    # Factors keep the signs of scales; a negative one would break a grid with a zero point.
    scale = leaf.scale.astype(jnp.float32) * jnp.abs(part).astype(jnp.float32)
    rounded = round_scale(lax.stop_gradient(scale), leaf.grid.scale_dtype)
    straight = rounded.astype(jnp.float32) + (scale - lax.stop_gradient(scale))
    return dataclasses.replace(leaf, scale=straight.astype(rounded.dtype))
