"""Where an export goes: a file, or a folder of shards with an index."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core import checks
from jaxclip._core.atomic import new_folder, replacing
from jaxclip.checkpoints import shards
from jaxclip.checkpoints.format.writing import write_plain
from jaxclip.interop.leaves import ExportTensor


def _floating_dtype(dtype: Any) -> np.dtype | None:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be floating, got {dtype!r}.")
    return None if dtype is None else jnp.dtype(dtype)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where tensors go: a file, or a new folder of shards if these have a size."""

    path: str | os.PathLike
    max_shard_bytes: int | None
    overwrite: bool
    companions: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.max_shard_bytes is not None:
            checks.check_count("max_shard_bytes", self.max_shard_bytes)

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
        parts = shards.split_shards(sizes, self.max_shard_bytes)
        files = shards.shard_names(len(parts))
        inside = {f: [t for n in s for t in leaves[n]] for f, s in zip(files, parts, strict=True)}
        with new_folder(self.path) as folder:
            for file_name, names in inside.items():
                with replacing(folder / file_name) as file:
                    _write_tensors(file, {name: tensors[name] for name in names})
            if len(inside) > 1:
                with replacing(folder / shards.INDEX_NAME) as file:
                    file.write(shards.make_index(inside, sum(sizes.values())))
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
