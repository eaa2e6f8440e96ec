"""Folders of a model: shards, the index that lists them, and files other than weights.

A folder holds `model.safetensors.index.json`, whose `weight_map` names the shard of every tensor.
These names are untrusted: only bare file names are followed, and only inside the folder.
Errors are ValueErrors; `reading` adds the folder's name.
"""

import io
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxclip.checkpoints.format.json_text import strict_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_INDEX_BYTES = 100_000_000
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth?|ckpt|h5|msgpack|onnx(_data)?|gguf|npz|npy|index\.json)", re.I | re.S
)


def find_weights(folder: Path) -> Path:
    """Returns the file to open in a folder: the index of its shards, or its single file."""
    has_index = (folder / INDEX_NAME).exists()
    has_single = (folder / SINGLE_NAME).exists()
    if has_index and has_single:
        raise ValueError(
            f"the folder holds both {INDEX_NAME} and {SINGLE_NAME}: name the one to read."
        )
    if not has_index and not has_single:
        raise ValueError(f"the folder holds neither {INDEX_NAME} nor {SINGLE_NAME}.")
    return folder / (INDEX_NAME if has_index else SINGLE_NAME)


def read_index(file: io.BufferedIOBase, folder: Path) -> tuple[dict[str, str], Any, int]:
    """Returns the shard of every tensor, the index's total size as given, and the index's size."""
    raw = file.read(_MAX_INDEX_BYTES + 1)
    if len(raw) > _MAX_INDEX_BYTES:
        raise ValueError(f"{INDEX_NAME} is larger than {_MAX_INDEX_BYTES:,} bytes.")
    # An entry of a tensor has at least 16 bytes, and its name may have brackets.
    max_values = 2**20 + len(raw) // 8
    index = strict_json(raw, INDEX_NAME, max_values=max_values, fractions=True)
    weight_map = index.get("weight_map") if type(index) is dict else None
    if type(weight_map) is not dict or not weight_map:
        raise ValueError(f"{INDEX_NAME} has no weight_map.")
    for name, shard in weight_map.items():
        if type(shard) is not str or not _is_bare_name(shard):
            raise ValueError(
                f"tensor {name!r}: its shard {shard!r} is not a bare .safetensors name."
            )
    listed = set(weight_map.values())
    for shard in sorted(listed):
        _check_inside(folder, shard, "shard")
    unlisted = {name for name in os.listdir(folder) if _SHARD.fullmatch(name)} - listed
    if unlisted:
        _warn(f"shard {min(unlisted)!r} is in the folder but not in {INDEX_NAME}: left out.")
    metadata = index.get("metadata")
    return weight_map, metadata.get("total_size") if type(metadata) is dict else None, len(raw)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _is_bare_name(name: str) -> bool:
    if not name.isprintable() or set(name) & set("/\\:") or len(name.encode()) > 255:
        return False
    return name.endswith(".safetensors") and not name.startswith(".")


def _check_inside(folder: Path, name: str, kind: str) -> None:
    """Raises unless the file exists and is not a link that leads out of the folder."""
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(folder / name))
    allowed = {root}
    # A cache of the Hugging Face hub keeps files as `blobs/HASH`, and links to them in
    # `snapshots/REVISION`: these two folders belong together.
    if root.parent.name == "snapshots":
        allowed.add(root.parent.parent / "blobs")
    if target.parent not in allowed:
        raise ValueError(f"{kind} {name!r} is a link that leads out of the folder.")
    if not target.exists():
        raise ValueError(f"{kind} {name!r} is missing.")


def warn_of_differences(total: Any, found: int, unassigned: Mapping[str, str]) -> None:
    """Warns of a total size that is not that of the tensors, and of tensors that are left out.

    `unassigned` has the shards of tensors that the index does not assign to them, by name.
    """
    # Indexes on the hub carry fractions and wrong sums, and shards that hold more.
    if total is not None and total != found:
        _warn(
            f"{INDEX_NAME} gives a total_size of {str(total)[:40]!r}, but its tensors take "
            f"{found:,} bytes."
        )
    if unassigned:
        name, shard = next(iter(unassigned.items()))
        _warn(
            f"{len(unassigned)} tensors that {INDEX_NAME} does not assign to their shards are "
            f"left out, such as {name!r} in {shard!r}."
        )


def is_part_of_folder(name: str) -> bool:
    """Returns True if a file of this name belongs to the weights of its folder."""
    return name in (INDEX_NAME, SINGLE_NAME) or _SHARD.fullmatch(name) is not None


def model_files(folder: Path) -> list[Path]:
    """Returns a model's files sorted by name, except weights, folders and hidden files."""
    names = [n for n in sorted(os.listdir(folder)) if n[0] != "." and not _WEIGHTS.fullmatch(n)]
    files = [folder / name for name in names if not (folder / name).is_dir()]
    for file in files:
        _check_inside(folder, file.name, "file")
        if not file.is_file():
            raise ValueError(f"file {file.name!r} is neither a regular file nor a folder.")
    return files


def split_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Returns the names in each shard, in order, each shard as full as possible."""
    shards: list[list[str]] = [[]]
    free_bytes = max_bytes
    for name, size in sizes.items():
        if size > free_bytes and shards[-1]:
            shards.append([])
            free_bytes = max_bytes
        shards[-1].append(name)
        free_bytes -= size
    return shards


def shard_names(count: int) -> list[str]:
    """Returns the file names of `count` shards."""
    if count > 99_999:
        raise ValueError(f"a folder holds at most 99,999 shards, these would be {count:,}.")
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def make_index(names: Mapping[str, Sequence[str]], total_size: int) -> bytes:
    """Returns the index of a folder as JSON; `names` has the tensors in each shard, by file."""
    weight_map = {name: shard for shard, inside in names.items() for name in inside}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
