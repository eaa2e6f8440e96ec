"""Plain safetensors files, which every reader of the format loads."""

import os

import numpy as np
from jax.typing import DTypeLike

from jaxclip._core.trees import PyTree
from jaxclip.interop.destination import Destination, floating_dtype
from jaxclip.interop.leaves import NamedLeaf, Rename, named_leaves, plain_tensor


def to_safetensors(
    path: str | os.PathLike,
    tree: PyTree,
    *,
    dtype: DTypeLike | None = None,
    separator: str = ".",
    rename: Rename = (),
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a tree as plain weights, low-bit leaves dequantized.

    Args:
      path: File to write, or a new folder if `max_shard_bytes` is given.
      tree: Pytree of arrays and `QuantizedArray`.
      dtype: Floating dtype of all floating tensors; None keeps the dtype of each leaf.
      separator: String that joins the keys of nested trees to a name.
      rename: Pairs `(regex, replacement)` for names, each applied as in `re.sub`, in order.
      max_shard_bytes: Largest size of a shard, in bytes of tensors; None for one file. The folder
        gets shards and an index, or one `model.safetensors` if all tensors fit. The tensors of a
        leaf stay together, so a larger leaf is alone in its shard.
      overwrite: True to replace an existing file. A folder is never replaced.

    Raises:
      TypeError: If `dtype` is not floating, or a leaf is not an array of a dtype that
        safetensors has.
      ValueError: If two leaves get the same name, a rule of `rename` is wrong or matches none, a
        finite entry is infinite in `dtype`, or `max_shard_bytes` is not an integer of at least 1.
      FileExistsError: If `path` exists, unless it is a file and `overwrite` is set.
      OSError: If the directory of `path` does not exist or cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from jaxclip import checkpoints, compress
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = pathlib.Path(folder.name, "net.safetensors")
      >>> small = compress({"layer": {"kernel": jnp.ones((2, 2))}}, "ternary")
      >>> to_safetensors(path, small, dtype=jnp.float16)
      >>> checkpoints.load(path)["layer.kernel"].dtype
      dtype('float16')
      >>> folder.cleanup()
    """
    destination = Destination(path, max_shard_bytes, overwrite)
    write_values(destination, named_leaves(tree, separator, rename), floating_dtype(dtype))


def write_values(
    destination: Destination, leaves: dict[str, NamedLeaf], dtype: np.dtype | None
) -> None:
    """Writes leaves as plain tensors."""
    destination.write({name: {name: plain_tensor(leaf, dtype)} for name, leaf in leaves.items()})
