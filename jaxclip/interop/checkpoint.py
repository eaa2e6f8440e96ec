"""Exports that other libraries load without this one.

    to_safetensors          plain weights: every reader of safetensors
    to_compressed_tensors   4- and 8-bit codes: compressed-tensors, so transformers and vLLM
    to_gguf                 blocks of 32 at 4 and 8 bits: llama.cpp and the gguf package
    export_checkpoint       any of them from a file, which need not fit into memory

Names are the keys of the tree joined by a separator. Files and folders of shards appear whole or
not at all, and are written tensor by tensor. `docs/interop.md` says what was verified, and by what.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxclip._core import checks
from jaxclip.checkpoints import shards
from jaxclip.checkpoints.reading import open_source
from jaxclip.interop.compressed_tensors import _write_packed
from jaxclip.interop.destination import _floating_dtype, _Place
from jaxclip.interop.gguf import check_gguf, write_gguf
from jaxclip.interop.gguf_blocks import BYTES_PER_BLOCK
from jaxclip.interop.leaves import stored_leaves
from jaxclip.interop.plain import _write_values

_SHARD_BYTES = 5 * 10**9
"""Of a shard where none is asked for."""


def export_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str,
    *,
    dtype: Any = None,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    separator: str = ".",
    max_shard_bytes: int | None = None,
    model_files: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Writes a file or folder of weights in the format of another library, leaf by leaf.

    Memory is bounded by a few times the largest leaf. What is written equals what the functions
    above write for the tree that `checkpoints.load` reads.

    Args:
      src: As in `checkpoints.load`.
      dst: The file to write, or the new folder: with `max_shard_bytes` or `model_files`, and
        where a folder of shards becomes safetensors and `dst` does not end in .safetensors.
      to: "safetensors" for plain weights, "compressed-tensors", or "Q4_0", "Q4_1" or "Q8_0" for
        GGUF.
      dtype: As in `to_safetensors` and `to_compressed_tensors`.
      architecture: As in `to_gguf`, as `metadata`.
      metadata: Further keys of GGUF.
      separator: What joins the keys of nested trees; names in files of other libraries stay as
        they are.
      max_shard_bytes: As in `to_safetensors`, 5 GB if `dst` is a folder; not for GGUF.
      model_files: The model's folder, whose files beside weights go into the new one:
        tokenizer, card, and `config.json`, which gets its `quantization_config`. Folders in it
        do not. Not for GGUF.
      overwrite: Whether an existing file may be replaced; a folder is not.

    Returns:
      For compressed-tensors the value of `quantization_config`, which the `config.json` of
      `model_files` gets; else None.

    Raises:
      CheckpointError: As `checkpoints.load`.
      FileExistsError: As `checkpoints.save`; also if `dst` is one of the files that are read.
      TypeError: As the function for the format.
      ValueError: As the function for the format; if `to` is none of these, or GGUF should
        have shards or other files; if `model_files` has no `config.json`, one that is quantized
        already, or a link that leads out of it; if `dst` lies in a folder that is read and has
        the name of an index, a numbered shard or `model.safetensors`.
      ImportError: As `to_gguf`.

    Example:
      >>> export_checkpoint("small.safetensors", "net.gguf", "Q4_0")
      Traceback (most recent call last):
      FileNotFoundError: there is no file 'small.safetensors'.
    """
    checks.check_choice("to", to, ("safetensors", "compressed-tensors", *BYTES_PER_BLOCK))
    dtype = _floating_dtype(dtype)
    if to in BYTES_PER_BLOCK:
        check_gguf(to)
        for name, value in {"max_shard_bytes": max_shard_bytes, "model_files": model_files}.items():
            if value is not None:
                raise ValueError(f"{name} is for safetensors, {to} is one file.")
    companions = () if model_files is None else _companions(Path(model_files))
    with open_source(Path(src)) as source:
        source.check_unchanged_by(Path(dst))
        leaves = stored_leaves(source, separator)
        if to in BYTES_PER_BLOCK:
            return write_gguf(dst, leaves, architecture, to, metadata or {}, overwrite)
        is_of_shards = len(source.files) > 1 and Path(dst).suffix != ".safetensors"
        if max_shard_bytes is None and (companions or is_of_shards):
            max_shard_bytes = _SHARD_BYTES
        place = _Place(dst, max_shard_bytes, overwrite, companions)
        if to == "safetensors":
            return _write_values(place, leaves, dtype)
        return _write_packed(place, leaves, dtype, separator)


def _companions(folder: Path) -> tuple[Path, ...]:
    """The files of a model beside its weights, of which `config.json` is one."""
    try:
        files = shards.model_files(folder)
        config = json.loads((folder / "config.json").read_bytes())
        if type(config) is not dict:
            raise ValueError("config.json holds no object.")
        if "quantization_config" in config:
            raise ValueError("config.json has a quantization_config: give that of plain weights.")
    except (OSError, ValueError, RecursionError) as error:
        message = f"model_files must be the folder of a model, got '{folder}': {error}"
        raise ValueError(message) from error
    return tuple(files)
