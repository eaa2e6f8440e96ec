"""Plain safetensors files that every reader loads."""

import os
from typing import Any

import numpy as np

from jaxclip.interop.destination import _floating_dtype, _Place
from jaxclip.interop.leaves import NamedLeaf, named_leaves, plain_tensor


def to_safetensors(
    path: str | os.PathLike,
    tree: Any,
    *,
    dtype: Any = None,
    separator: str = ".",
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a tree as plain weights, low-bit leaves dequantized, for any safetensors reader.

    Args:
      path: Where to.
      tree: Pytree of arrays and `QuantizedArray`.
      dtype: Floating dtype of all floating tensors; None for each leaf's own.
      separator: What joins the keys of nested trees to a name.
      max_shard_bytes: None for one file. Else `path` is a new folder of shards with an index, or of
        one `model.safetensors` if that holds all; a shard has at most so many bytes of tensors,
        but for a leaf that is larger by itself. The tensors of a leaf stay together.
      overwrite: Whether an existing file may be replaced; a folder is not.

    Raises:
      TypeError: If `dtype` is not floating, or a leaf is no array of a dtype that
        safetensors has.
      ValueError: If two leaves get the same name, a finite entry is infinite in `dtype`, or
        `max_shard_bytes` is no integer of at least 1.
      OSError: As `checkpoints.save`.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxclip import checkpoints, compress
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = pathlib.Path(folder.name, "net.safetensors")
      >>> small = compress({"layer": {"kernel": jnp.ones((2, 2))}}, bits="ternary")
      >>> to_safetensors(path, small, dtype=jnp.float16)
      >>> checkpoints.load(path)["layer.kernel"].dtype
      dtype('float16')
      >>> folder.cleanup()
    """
    place = _Place(path, max_shard_bytes, overwrite)
    _write_values(place, named_leaves(tree, separator), _floating_dtype(dtype))


def _write_values(place: _Place, leaves: dict[str, NamedLeaf], dtype: np.dtype | None) -> None:
    place.write({n: {n: plain_tensor(leaf, dtype)} for n, leaf in leaves.items()})
