"""Low-bit leaves as arrays of Qwix, and back.

    array == scale * (qvalue - zero_point)

Both libraries have this equation. Qwix stores one scale a tile, whose sides divide the array's.
"""

import jax
import jax.numpy as jnp

from jaxclip._core import checks, extras
from jaxclip._core.grids import Bits, Grid
from jaxclip._core.trees import PyTree, path_name
from jaxclip.interop.leaves import UnfitCodesError, fits_in_4_bits, warn_of_floats
from jaxclip.lowbit.arrays import QuantizedArray, dequantize, is_quantized

_WIDTHS: dict[str, Bits] = {"int2": 2, "int3": 3, "int4": 4, "int5": 5, "int6": 6}
_WIDTHS |= {"int7": 8, "int8": 8}


def to_qwix(tree: PyTree) -> PyTree:
    """Replaces low-bit leaves by arrays of Qwix, which `qwix.dot_general` multiplies.

    Codes, scales and zero points stay as they are, so the arrays stand for the same numbers.

    Args:
      tree: Pytree of arrays and `QuantizedArray` leaves; may be traced.

    Returns:
      A tree of the same structure with `qwix.QArray` nodes: `qvalue` is int4 if all codes of the
      grid are in -8..7, else int8, `scale` as in the leaf ("log8" as float32). The dtype of a
      `QArray` is that of its scales. A leaf with groups that cross the rows of its last grouped
      axis, or are cut off at its end, becomes a plain array, with a warning.

    Raises:
      ImportError: If qwix is not installed.
      ValueError: If codes, scales and grid of a leaf do not fit together.

    Example:
      >>> from jaxclip import Grid, compress
      >>> small = compress({"kernel": jnp.ones((64, 8))}, Grid(4, group_size=32))
      >>> to_qwix(small)["kernel"].scale.shape  # doctest: +SKIP
      (2, 8)

    References:
      Qwix, https://github.com/google/qwix
    """
    qwix = extras.import_extra("qwix", "qwix")
    lacking: dict[str, str] = {}

    def convert(path: tuple, leaf: PyTree) -> PyTree:
        if not is_quantized(leaf):
            return leaf
        name = path_name(path)
        leaf.check_parts(name)
        try:
            scale = _by_tiles(leaf, leaf.scale)
        except UnfitCodesError as error:
            lacking[name] = str(error)
            return dequantize(leaf)
        dtype = jnp.dtype(jnp.int4 if fits_in_4_bits(leaf) else jnp.int8)
        zero = None if leaf.zero is None else _by_tiles(leaf, leaf.zero).astype(dtype)
        return qwix.QArray(leaf.unpacked().qvalue.astype(dtype), scale, zero, dtype)

    converted = jax.tree_util.tree_map_with_path(convert, tree, is_leaf=is_quantized)
    warn_of_floats("Qwix", lacking)
    return converted


def from_qwix(tree: PyTree) -> PyTree:
    """Replaces arrays of Qwix by low-bit leaves, for `checkpoints.save` and `decompress`.

    Args:
      tree: Pytree with `qwix.QArray` nodes of integer codes; may be traced.

    Returns:
      A tree with a `QuantizedArray` for each of these nodes, which stands for the same numbers.
      Its width is that of the node's `qtype`. Where tiles cut several axes, scales are repeated
      along all but the last of these.

    Raises:
      ImportError: If qwix is not installed.
      TypeError: If a node has codes that are no integers, such as "nf4" or float8, or scales of a
        dtype that a grid lacks; the message names the leaf and the type.
      ValueError: If a scale is 0 or not finite, or with zero points not positive.

    Example:
      >>> import qwix  # doctest: +SKIP
      >>> array = qwix.quantize(jnp.ones((64, 8)), "int4", tiled_axes={0: 32})  # doctest: +SKIP
      >>> from_qwix({"kernel": array})["kernel"].grid.group_size  # doctest: +SKIP
      32
    """
    qwix = extras.import_extra("qwix", "qwix")

    def convert(path: tuple, node: PyTree) -> PyTree:
        return _low_bit(path_name(path), node) if isinstance(node, qwix.QArray) else node

    return jax.tree_util.tree_map_with_path(
        convert, tree, is_leaf=lambda node: isinstance(node, qwix.QArray)
    )


def _by_tiles(leaf: QuantizedArray, per_block: jax.Array) -> jax.Array:
    """Returns one value a block in the shape of Qwix's tiles; raises if blocks are no tiles."""
    grid, shape = leaf.fitted_grid, leaf.shape
    axes = grid.group_axes(leaf.ndim)
    if not axes or per_block.shape[axes[-1]] == 1:  # whole axes are shared
        return jnp.asarray(per_block)
    size, length = grid.group_size_of(shape), shape[axes[-1]]
    if length % size:
        raise UnfitCodesError(
            f"has groups of {size}, which do not divide the {length} entries of axis {axes[-1]}"
        )
    *lead, last = axes
    counts = [shape[a] for a in lead]
    # Groups are counted along the last of their axes, in row-major order of all of them.
    values = jnp.moveaxis(jnp.squeeze(per_block, tuple(lead)), last - len(lead), -1)
    values = values.reshape(*values.shape[:-1], *counts, length // size)
    return jnp.moveaxis(values, range(-len(axes), 0), axes)


def _low_bit(name: str, array: PyTree) -> QuantizedArray:
    """Returns the low-bit array of a `QArray`."""
    codes, scale, zero = array.qvalue, array.scale, array.zero_point
    type_name = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype).name
    width = _WIDTHS.get(type_name)
    if width is None or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(
            f"leaf {name!r} has codes of type {type_name} in {codes.dtype}, but low-bit leaves "
            "have integers of 2 to 8 bits."
        )
    scale_dtype = jnp.dtype(scale.dtype).name
    if scale_dtype not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"leaf {name!r} has scales of dtype {scale_dtype}, which no grid has.")
    axis, group_size, repeats = _blocks_of_tiles(codes.shape, scale.shape)
    for a, count in repeats.items():
        scale = jnp.repeat(scale, count, axis=a)
        zero = None if zero is None else jnp.repeat(zero, count, axis=a)
    grid = Grid(
        width,
        axis=axis,
        group_size=group_size,
        zero_point=zero is not None,
        scale_dtype=scale_dtype,
    )
    zero = None if zero is None else zero.astype(jnp.int8)
    low_bit = QuantizedArray(codes.astype(jnp.int8), scale, grid, jnp.dtype(scale_dtype), zero)
    low_bit.check_parts(name)
    if all(map(checks.is_concrete, jax.tree.leaves(low_bit))):
        low_bit.check_values(name)
    return low_bit


def _blocks_of_tiles(
    shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> tuple[tuple[int, ...] | None, int | None, dict[int, int]]:
    """Returns `axis` and `group_size` of a grid, and by axis how often scales are repeated."""
    ndim = len(shape)
    tiles = [n // count if count else 1 for n, count in zip(shape, scale_shape, strict=True)]
    cut = [a for a, tile in enumerate(tiles) if 1 < tile < shape[a]]
    if not cut:
        channels = tuple(a - ndim for a, tile in enumerate(tiles) if tile == 1 and shape[a] > 1)
        return channels or None, None, {}
    # A group runs along all axes that are no channels, so that only the last cut axis may be none.
    others = [a for a in range(ndim) if a != cut[-1]]
    repeats = {a: tiles[a] for a in others if tiles[a] > 1}
    return tuple(a - ndim for a in others) or None, tiles[cut[-1]], repeats
