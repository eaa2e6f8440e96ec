"""Exports of a file or folder of weights, leaf by leaf, to the format of another library."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jax.typing import DTypeLike

from jaxclip._core import checks
from jaxclip.checkpoints import shards
from jaxclip.checkpoints.format.headers import MAX_RATIO
from jaxclip.checkpoints.reading import open_source
from jaxclip.interop.bitmasks import write_sparse
from jaxclip.interop.compressed_tensors import write_packed
from jaxclip.interop.destination import Destination, JsonObject, floating_dtype
from jaxclip.interop.gguf import check_gguf, write_gguf
from jaxclip.interop.gguf_packing import WRITTEN, BlockKind
from jaxclip.interop.leaves import Rename, stored_leaves
from jaxclip.interop.plain import write_values

Format: TypeAlias = (
    Literal["safetensors", "compressed-tensors", "sparse-24-bitmask", "gguf"] | BlockKind
)
_MAX_CONFIG_BYTES = 2**26
_SHARD_BYTES = 5 * 10**9  # of a shard in a folder where no size is given


def export_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: Format,
    *,
    dtype: DTypeLike | None = None,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    separator: str = ".",
    rename: Rename = (),
    max_shard_bytes: int | None = None,
    model_files: str | os.PathLike | None = None,
    max_ratio: float = MAX_RATIO,
    overwrite: bool = False,
) -> JsonObject | None:
    """Writes a file or folder of weights in the format of another library, leaf by leaf.

    Memory is bounded by a few times the largest leaf. The new file equals what `to_safetensors`,
    `to_compressed_tensors` or `to_gguf` writes for the tree that `checkpoints.load` reads.

    Args:
      src: File or folder of weights that `checkpoints.load` reads.
      dst: File to write, or new folder. It is a folder if `max_shard_bytes` or `model_files`
        is given, or if `src` is a folder of shards and `dst` does not end in .safetensors.
      to: "safetensors" for plain weights; "compressed-tensors" for the codes that the source has,
        in pack-quantized; "sparse-24-bitmask" for weights that are 2:4 sparse, the other layout of
        `to_compressed_tensors`; "gguf" for the codes that the source has; or a `kind` of
        `to_gguf`, such as "Q4_0", for GGUF with blocks of that kind, if the source has no low-bit
        leaf. In a source that has some, the other leaves stay floating.
      dtype: Floating dtype of plain weights, or of scales and other floating leaves in
        compressed-tensors; None keeps that of each leaf.
      architecture: Value of `general.architecture` in GGUF.
      metadata: Further keys of GGUF.
      separator: String that joins the keys of nested trees; names in files of other libraries
        stay as they are.
      rename: Pairs `(regex, replacement)` for names, each applied as in `re.sub`, in order.
      max_shard_bytes: Largest size of a shard, in bytes of tensors; 5 GB if `dst` is a folder and
        none is given. Not for GGUF.
      model_files: The model's folder. Its files other than weights are copied into the new
        folder: tokenizer, card, and `config.json`, which gets its `quantization_config`.
        Subfolders are left out. Not for GGUF.
      max_ratio: Bytes of arrays that a byte of `src` may stand for, as for `checkpoints.load`.
      overwrite: True to replace an existing file. A folder is never replaced.

    Returns:
      For both layouts of compressed-tensors the value of `quantization_config`, which the
      `config.json` of `model_files` gets; for GGUF the number of tensors of each type; None for
      safetensors.

    Raises:
      CheckpointError: If a file of `src` is damaged or of an unknown kind.
      FileExistsError: If `dst` exists, unless it is a file and `overwrite` is set; also if it
        is one of the files that are read.
      OSError: If there is nothing at `src`, or `dst` cannot be written.
      TypeError: If `dtype` is not floating, or the format lacks the dtype of a leaf.
      ValueError: If `to` is not one of these, or GGUF should have shards or other files; if
        compressed-tensors has codes for no leaf, no leaf is 2:4 sparse, or a name is too long for
        GGUF; if a rule of `rename` is wrong or matches no name; if `model_files` has no
        `config.json`, one that is quantized already, or a link that leads out of it; if `dst`
        is in the folder that is read and has the name of an index, a numbered shard or
        `model.safetensors`.
      ImportError: If GGUF is asked for and the gguf package is not installed.

    Example:
      >>> export_checkpoint("small.safetensors", "net.gguf", "Q4_0")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'small.safetensors'.
    """
    is_gguf = to in ("gguf", *WRITTEN)
    if not is_gguf:
        others = ("safetensors", "compressed-tensors", "sparse-24-bitmask", "gguf")
        checks.check_choice("to", to, (*others, *WRITTEN))
    kind = None if to == "gguf" else to
    dtype = floating_dtype(dtype)
    if is_gguf:
        check_gguf(kind)
        for name, value in {"max_shard_bytes": max_shard_bytes, "model_files": model_files}.items():
            if value is not None:
                raise ValueError(f"{name} is for safetensors, {to} is one file.")
        if dtype is not None:
            raise ValueError(f"dtype is for safetensors, {to} has float16 scales.")
    elif metadata:
        raise ValueError(f"metadata is for GGUF, {to} has none.")
    companions = () if model_files is None else _companions(Path(model_files))
    with open_source(Path(src), max_ratio) as source:
        source.check_unchanged_by(Path(dst))
        leaves = stored_leaves(source, separator, rename)
        if is_gguf:
            return write_gguf(dst, leaves, architecture, kind, metadata or {}, overwrite)
        is_of_shards = len(source.files) > 1 and Path(dst).suffix != ".safetensors"
        if max_shard_bytes is None and (companions or is_of_shards):
            max_shard_bytes = _SHARD_BYTES
        destination = Destination(dst, max_shard_bytes, overwrite, companions, source.metadata)
        if to == "safetensors":
            return write_values(destination, leaves, dtype)
        if to == "sparse-24-bitmask":
            return write_sparse(destination, leaves, dtype, separator)
        return write_packed(destination, leaves, dtype, separator)


def _companions(folder: Path) -> tuple[Path, ...]:
    """Returns the files of a model other than weights, which must include `config.json`."""
    try:
        files = shards.model_files(folder)
        if (folder / "config.json").stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"config.json is larger than {_MAX_CONFIG_BYTES:,} bytes.")
        config = json.loads((folder / "config.json").read_bytes())
        if type(config) is not dict:
            raise ValueError("config.json is not a JSON object.")
        if "quantization_config" in config:
            raise ValueError("config.json has a quantization_config: use that of plain weights.")
    except (OSError, ValueError, RecursionError) as error:
        message = f"model_files must be the folder of a model, got {str(folder)!r}: {error}"
        raise ValueError(message) from error
    return tuple(files)
