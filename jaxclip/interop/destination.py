"""The destination of an export: a file, or a new folder of shards with an index."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxclip._core import checks
from jaxclip._core.atomic import new_folder, replacing
from jaxclip.checkpoints import shards
from jaxclip.checkpoints.format.writing import write_plain
from jaxclip.interop.leaves import ExportTensor

JsonObject: TypeAlias = dict[str, Any]


def floating_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """Returns a floating dtype or None as given; raises TypeError for other dtypes."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, got {dtype!r}.")
    return None if dtype is None else jnp.dtype(dtype)


@dataclasses.dataclass(frozen=True)
class Destination:
    """A safetensors file, or a new folder of shards if these have a size.

    Attributes:
      path: The file or folder.
      max_shard_bytes: Bytes of tensors in a shard, at least 1; None for one file.
      overwrite: True to replace an existing file.
      companions: Files to copy into the folder.
      metadata: Entries for the headers; `format` is "pt" without one.
    """

    path: str | os.PathLike
    max_shard_bytes: int | None
    overwrite: bool
    companions: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_shard_bytes is not None:
            checks.check_count("max_shard_bytes", self.max_shard_bytes)

    def write(
        self, leaves: dict[str, dict[str, ExportTensor]], quantization: JsonObject | None = None
    ) -> None:
        """Writes tensors and companions; all appear at once or not at all."""
        # `config.json` among the companions gets `quantization` as its `quantization_config`.
        tensors: dict[str, ExportTensor] = {}
        for parts in leaves.values():
            for name, tensor in parts.items():
                if name in tensors:
                    raise ValueError(f"two tensors would have the name {name!r}.")
                tensors[name] = tensor
        if self.max_shard_bytes is None:
            with replacing(self.path, self.overwrite) as file:
                self._write_tensors(file, tensors)
            return
        sizes = {n: sum(t.num_bytes for t in parts.values()) for n, parts in leaves.items()}
        split = shards.split_shards(sizes, self.max_shard_bytes)
        files = shards.shard_names(len(split))
        names_in = {
            file: [t for name in names for t in leaves[name]]
            for file, names in zip(files, split, strict=True)
        }
        with new_folder(self.path) as folder:
            for file_name, names in names_in.items():
                with replacing(folder / file_name) as file:
                    self._write_tensors(file, {name: tensors[name] for name in names})
            if len(names_in) > 1:
                with replacing(folder / shards.INDEX_NAME) as file:
                    file.write(shards.make_index(names_in, sum(sizes.values())))
            for companion in self.companions:
                _copy(companion, folder, quantization)

    def _write_tensors(self, file: BinaryIO, tensors: dict[str, ExportTensor]) -> None:
        specs = {name: jax.ShapeDtypeStruct(t.shape, t.dtype) for name, t in tensors.items()}

        def make(name: str) -> np.ndarray:
            return tensors[name].make()

        # As copies, because other readers may have dtypes that this package's own files lack.
        write_plain(file, specs, make, is_copy=True, metadata=self.metadata)


def _copy(companion: Path, folder: Path, quantization: JsonObject | None) -> None:
    with companion.open("rb") as source, replacing(folder / companion.name) as file:
        if companion.name == "config.json" and quantization:
            config = json.loads(source.read()) | {"quantization_config": quantization}
            file.write(json.dumps(config, indent=2).encode() + b"\n")
        else:
            shutil.copyfileobj(source, file)
