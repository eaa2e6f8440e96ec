"""Exports that other libraries load without this one.

    to_safetensors          plain weights: every reader of safetensors
    to_compressed_tensors   4- and 8-bit codes: compressed-tensors, so transformers and vLLM
    to_gguf                 blocks of 32 at 4 and 8 bits: llama.cpp and the gguf package
    export_checkpoint       any of them from a file, which need not fit into memory

Names are the keys of the tree joined by a separator. Files and folders of shards appear whole or
not at all, and are written tensor by tensor. `docs/interop.md` says what was verified, and by what.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip import _checks, folders
from jaxclip.atomic import new_folder, replacing
from jaxclip.exports import ExportTensor, NamedLeaf, named_leaves, plain_tensor, stored_leaves
from jaxclip.gguf_blocks import BYTES_PER_BLOCK
from jaxclip.gguf_files import check_gguf, write_gguf
from jaxclip.pack_quantized import Scheme, pack_leaf, quantization_config
from jaxclip.sources import open_source
from jaxclip.writing import write_plain

__all__ = ["export_checkpoint", "to_compressed_tensors", "to_gguf", "to_safetensors"]

_SHARD_BYTES = 5 * 10**9
"""Of a shard where none is asked for."""


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


def to_compressed_tensors(
    path: str | os.PathLike,
    tree: Any,
    *,
    dtype: Any = None,
    separator: str = ".",
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes low-bit weights in the pack-quantized layout, and returns its configuration.

    A low-bit leaf `layer.weight` becomes `layer.weight_packed` (int32, codes packed along the
    inputs), `layer.weight_scale` and `layer.weight_shape`, with zero points also
    `layer.weight_zero_point`: of 4 bits if its codes are in -8..7, else of 8. Other leaves stay
    as they are.

    Args:
      path: Where to, such as `folder/model.safetensors`.
      tree: Pytree whose `QuantizedArray` leaves are matrices (outputs, inputs) named
        `...weight`, with a scale for the matrix, for each output (`axis=0`), or for each
        group of inputs (`axis=0, group_size=g`).
      dtype: Floating dtype of scales and of the other floating leaves; None for their own.
        A reader that computes in half precision rounds float32 scales.
      separator: What joins the keys of nested trees to a name.
      max_shard_bytes: As in `to_safetensors`.
      overwrite: Whether an existing file may be replaced; a folder is not.

    Returns:
      The value of `quantization_config` for the model's `config.json`. Matrices without
      codes are in its `ignore`.

    Raises:
      TypeError: If `dtype` is not floating, or a leaf is no array of a dtype that
        safetensors has.
      ValueError: If no leaf is low-bit, or one is of a shape, name or granularity that the
        layout has not; the message names it.
      OSError: As `checkpoints.save`.

    Example:
      >>> import tempfile
      >>> from jaxclip import compress
      >>> small = compress({"layer": {"weight": jnp.ones((4, 64))}}, axis=0, group_size=32)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     config = to_compressed_tensors(folder + "/model.safetensors", small)
      >>> config["config_groups"]["group_0"]["weights"]["strategy"]
      'group'

    References:
      The compressed-tensors package, https://github.com/vllm-project/compressed-tensors
    """
    place = _Place(path, max_shard_bytes, overwrite)
    return _write_packed(place, named_leaves(tree, separator), _floating_dtype(dtype), separator)


def to_gguf(
    path: str | os.PathLike,
    tree: Any,
    architecture: str,
    *,
    kind: str | None = "Q4_0",
    metadata: Mapping[str, Any] | None = None,
    separator: str = ".",
    overwrite: bool = False,
) -> None:
    """Writes a tree as GGUF, with codes in blocks of 32 along the last axis.

    Floating leaves of two or more dimensions become blocks of `kind`, with scales of little
    squared error. Low-bit leaves keep their codes: as Q4_0 if these are in -8..7 (Q4_1 with
    zero points), else as Q8_0; only scales and offsets are rounded, to float16. What has one
    dimension, or rows that are not a multiple of 32 long, stays float: float16 as it is, else
    float32.

    Args:
      path: Where to.
      tree: Pytree of arrays and `QuantizedArray`; names and shapes as the reader wants them,
        for llama.cpp (outputs, inputs) under its own names.
      architecture: Value of `general.architecture`, such as "llama".
      kind: "Q4_0" (4.5 bits a weight), "Q4_1" (5), "Q8_0" (8.5), or None to leave floating
        leaves as they are.
      metadata: Further keys, such as `{"llama.block_count": 12}`: texts, booleans, integers
        (uint32 where they fit, else int64), floats (float32), and lists of one of these.
      separator: What joins the keys of nested trees to a name.
      overwrite: Whether an existing file may be replaced.

    Raises:
      ImportError: If the gguf package is not installed; the message names the extra.
      TypeError: If a leaf is of a dtype, or an entry of `metadata` of a type, that GGUF has
        not.
      ValueError: If `kind` is none of these, a weight is NaN or infinite or beyond float16
        scales, the scale of a low-bit leaf varies within a block, one of more than 4 bits
        has zero points, or a name or shape is longer than GGUF allows.
      OSError: As `checkpoints.save`.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "net.gguf")
      ...     to_gguf(path, {"output.weight": jnp.ones((4, 64))}, "llama", kind="Q8_0")
      ...     path.read_bytes()[:4]
      b'GGUF'

    References:
      The GGUF format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    check_gguf(kind)
    leaves = named_leaves(tree, separator)
    write_gguf(path, leaves, architecture, kind, metadata or {}, overwrite)


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
    _checks.check_choice("to", to, ("safetensors", "compressed-tensors", *BYTES_PER_BLOCK))
    dtype = _floating_dtype(dtype)
    if to in BYTES_PER_BLOCK:
        check_gguf(to)
        for name, value in {"max_shard_bytes": max_shard_bytes, "model_files": model_files}.items():
            if value is not None:
                raise ValueError(f"{name} is for safetensors, {to} is one file.")
    companions = () if model_files is None else _companions(Path(model_files))
    with open_source(Path(src)) as source:
        source.check_unharmed_by(Path(dst))
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


def _floating_dtype(dtype: Any) -> np.dtype | None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, got {dtype!r}.")
    return None if dtype is None else jnp.dtype(dtype)


def _companions(folder: Path) -> tuple[Path, ...]:
    """The files of a model beside its weights, of which `config.json` is one."""
    try:
        files = folders.model_files(folder)
        config = json.loads((folder / "config.json").read_bytes())
        if type(config) is not dict:
            raise ValueError("config.json holds no object.")
        if "quantization_config" in config:
            raise ValueError("config.json has a quantization_config: give that of plain weights.")
    except (OSError, ValueError, RecursionError) as error:
        message = f"model_files must be the folder of a model, got '{folder}': {error}"
        raise ValueError(message) from error
    return tuple(files)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where tensors go: a file, or a new folder of shards if these have a size."""

    path: str | os.PathLike
    max_shard_bytes: int | None
    overwrite: bool
    companions: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.max_shard_bytes is not None:
            _checks.check_count("max_shard_bytes", self.max_shard_bytes)

    def write(
        self, leaves: dict[str, dict[str, ExportTensor]], quantization: dict[str, Any] | None = None
    ) -> None:
        """Writes the tensors of each leaf, and the model's other files."""
        tensors: dict[str, ExportTensor] = {}
        for parts in leaves.values():
            for name, tensor in parts.items():
                if name in tensors:
                    raise ValueError(f"two tensors would have the name '{name}'.")
                tensors[name] = tensor
        if self.max_shard_bytes is None:
            with replacing(self.path, self.overwrite) as file:
                _write_tensors(file, tensors)
            return
        sizes = {n: sum(t.num_bytes for t in parts.values()) for n, parts in leaves.items()}
        shards = folders.split_shards(sizes, self.max_shard_bytes)
        files = folders.shard_names(len(shards))
        inside = {f: [t for n in s for t in leaves[n]] for f, s in zip(files, shards, strict=True)}
        with new_folder(self.path) as folder:
            for file_name, names in inside.items():
                with replacing(folder / file_name) as file:
                    _write_tensors(file, {name: tensors[name] for name in names})
            if len(inside) > 1:
                with replacing(folder / folders.INDEX_NAME) as file:
                    file.write(folders.make_index(inside, sum(sizes.values())))
            for companion in self.companions:
                with companion.open("rb") as read, replacing(folder / companion.name) as file:
                    if companion.name == "config.json" and quantization:
                        config = json.loads(read.read()) | {"quantization_config": quantization}
                        file.write(json.dumps(config, indent=2).encode() + b"\n")
                    else:
                        shutil.copyfileobj(read, file)


def _write_tensors(file: BinaryIO, tensors: dict[str, ExportTensor]) -> None:
    specs = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in tensors.items()}
    write_plain(file, specs, lambda name: tensors[name].make())


def _write_values(place: _Place, leaves: dict[str, NamedLeaf], dtype: np.dtype | None) -> None:
    place.write({n: {n: plain_tensor(leaf, dtype)} for n, leaf in leaves.items()})


def _write_packed(
    place: _Place, leaves: dict[str, NamedLeaf], dtype: np.dtype | None, separator: str
) -> dict[str, Any]:
    tensors: dict[str, dict[str, ExportTensor]] = {}
    schemes: dict[Scheme, list[str]] = {}
    ignored = []
    for name, leaf in leaves.items():
        module = name.removesuffix("weight").removesuffix(separator)
        if leaf.is_low_bit:
            tensors[name], scheme = pack_leaf(leaf, dtype)
            schemes.setdefault(scheme, []).append(module)
        else:
            tensors[name] = {name: plain_tensor(leaf, dtype)}
            is_matrix = name.endswith("weight") and len(leaf.outline.shape) == 2
            ignored += [module] if is_matrix else []
    if not schemes:
        raise ValueError("tree has no QuantizedArray leaf: compress it first.")
    config = quantization_config(schemes, ignored)
    place.write(tensors, config)
    return config
