"""Folders of models: the index of shards, read with suspicion, that of new ones, other files.

A folder holds `model.safetensors.index.json`, whose `weight_map` names the shard of every
tensor. A name there is data from elsewhere: only bare file names are followed, and only
inside the folder.

What is wrong with an index raises ValueError; `checkpoints` adds the folder's name.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxclip.checkpoints.format.parsing import strict_json

INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 100_000_000
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth?|ckpt|h5|msgpack|onnx(_data)?|gguf|npz|npy|index\.json)", re.I | re.S
)


def find_shards(folder: Path) -> Path | None:
    """Returns the index of a folder, or None if it holds a single file of weights.

    Args:
      folder: A directory.

    Returns:
      The path of `model.safetensors.index.json`; None if there is `model.safetensors` alone.

    Raises:
      ValueError: If the folder holds neither, or both.

    Example:
      >>> find_shards(Path("/"))
      Traceback (most recent call last):
      ValueError: the folder holds neither model.safetensors.index.json nor model.safetensors.
    """
    has_index, has_single = ((folder / name).exists() for name in (INDEX_NAME, "model.safetensors"))
    if has_index and has_single:
        raise ValueError(
            f"the folder holds both {INDEX_NAME} and model.safetensors: name the one to read."
        )
    if not has_index and not has_single:
        raise ValueError(f"the folder holds neither {INDEX_NAME} nor model.safetensors.")
    return folder / INDEX_NAME if has_index else None


def read_index(raw: bytes, folder: Path) -> tuple[dict[str, str], int | None]:
    """Returns the shard of every tensor that an index lists, and the total size it gives.

    Args:
      raw: The index, JSON.
      folder: The directory that it lies in.

    Returns:
      A dict from tensor name to a bare file name in the folder, and `total_size` in bytes or
      None if the index has none.

    Raises:
      ValueError: If the index is not valid, names a file that is not a bare `.safetensors`
        name, is missing or lies elsewhere, or a numbered shard in the folder is not listed.

    Example:
      >>> read_index(b'{"weight_map": {"w": "../x.safetensors"}}', Path("."))
      Traceback (most recent call last):
      ValueError: tensor 'w': its shard '../x.safetensors' is not a bare .safetensors name.
    """
    if len(raw) > _MAX_INDEX_BYTES:
        raise ValueError(f"{INDEX_NAME} is larger than {_MAX_INDEX_BYTES:,} bytes.")
    index = strict_json(raw, INDEX_NAME)
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
        raise ValueError(f"shard {min(unlisted)!r} is in the folder but not in {INDEX_NAME}.")
    return weight_map, _total_size(index.get("metadata", {}))


def _is_bare_name(name: str) -> bool:
    if not name.isprintable() or set(name) & set("/\\:") or len(name.encode()) > 255:
        return False
    return name.endswith(".safetensors") and not name.startswith(".")


def _check_inside(folder: Path, name: str, what: str) -> None:
    """Raises unless the file exists and is no link that leads out of the folder.

    Caches of the Hugging Face hub keep files as `blobs/HASH` beside `snapshots/REVISION`,
    where the names are links: those two folders belong together.
    """
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(folder / name))
    homes = {root}
    if root.parent.name == "snapshots":
        homes.add(root.parent.parent / "blobs")
    if target.parent not in homes:
        raise ValueError(f"{what} {name!r} is a link that leads out of the folder.")
    if not target.exists():
        raise ValueError(f"{what} {name!r} is missing.")


def _total_size(metadata: Any) -> int | None:
    total = metadata.get("total_size") if type(metadata) is dict else None
    if total is not None and (type(total) is not int or total < 0):
        raise ValueError(f"{INDEX_NAME} has a total_size that is not a size: {total!r}.")
    return total


def check_total_size(total: int | None, found: int) -> None:
    """Raises unless the shards hold as many bytes as the index says, if it says.

    Args:
      total: `total_size` of the index, or None.
      found: Bytes of all tensors.

    Raises:
      ValueError: If they differ.

    Example:
      >>> check_total_size(4, 8)
      Traceback (most recent call last):
      ValueError: model.safetensors.index.json says 4 bytes of tensors, the shards hold 8.
    """
    if total is not None and total != found:
        raise ValueError(
            f"{INDEX_NAME} says {total:,} bytes of tensors, the shards hold {found:,}."
        )


def is_part_of_folder(name: str) -> bool:
    """Returns whether a file of this name changes what a folder that it lies in holds.

    Args:
      name: A bare file name.

    Example:
      >>> is_part_of_folder("model-00001-of-00002.safetensors"), is_part_of_folder("a.safetensors")
      (True, False)
    """
    return name in (INDEX_NAME, "model.safetensors") or _SHARD.fullmatch(name) is not None


def model_files(folder: Path) -> list[Path]:
    """Returns what a folder holds beside weights: configuration, tokenizer, card, license.

    Not what is hidden, nor folders.

    Args:
      folder: A directory.

    Returns:
      Paths of regular files, in the order of their names.

    Raises:
      ValueError: If one is a link that leads out of the folder.
      OSError: If it is no directory that can be read.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name in ("config.json", "model.safetensors", ".gitattributes"):
      ...         _ = Path(folder, name).write_text("")
      ...     [file.name for file in model_files(Path(folder))]
      ['config.json']
    """
    names = [n for n in sorted(os.listdir(folder)) if n[0] != "." and not _WEIGHTS.fullmatch(n)]
    files = [folder / name for name in names if not (folder / name).is_dir()]
    for file in files:
        _check_inside(folder, file.name, "file")
        if not file.is_file():
            raise ValueError(f"file {file.name!r} is neither a regular file nor a folder.")
    return files


# --- New folders ------------------------------------------------------------------------


def split_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Returns which parts go into which shard: in their order, each as full as it gets.

    Args:
      sizes: Bytes of each part, by name.
      max_bytes: Most bytes of a shard; a part that is larger has one to itself.

    Returns:
      The names in each shard, at least one shard.

    Example:
      >>> split_shards({"a": 3, "b": 2, "c": 9, "d": 1}, 5)
      [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def shard_names(count: int) -> list[str]:
    """Returns the names of the files of a folder; a single one has its own.

    Args:
      count: How many there are, at most 99,999.

    Raises:
      ValueError: If there are more.

    Example:
      >>> shard_names(2)
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    if count > 99_999:
        raise ValueError(f"a folder holds at most 99,999 shards, these would be {count:,}.")
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def make_index(names: Mapping[str, Sequence[str]], total_size: int) -> bytes:
    """Returns the index of a folder.

    Args:
      names: The tensors in each shard, by its file name.
      total_size: Bytes of all tensors.

    Returns:
      JSON: equal arguments give equal bytes.

    Example:
      >>> index = make_index({"model-00001-of-00001.safetensors": ["w"]}, 4)
      >>> json.loads(index)["weight_map"]
      {'w': 'model-00001-of-00001.safetensors'}
    """
    weight_map = {name: shard for shard, inside in names.items() for name in inside}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
