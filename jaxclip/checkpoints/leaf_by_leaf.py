"""A file or folder of weights written anew, leaf by leaf.

Memory is bounded by the largest leaf. The new file appears when it is complete, and the source is
never written to.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxclip._core.atomic import check_destination, replacing
from jaxclip._core.extras import progress_bar
from jaxclip.checkpoints.format.headers import MAX_RATIO, header_size
from jaxclip.checkpoints.format.layout import (
    FilePlan,
    Leaf,
    StoredLeaf,
    StreamedLeaf,
    leaf_name,
    plan_file,
)
from jaxclip.checkpoints.format.writing import write_plain, write_tree
from jaxclip.checkpoints.format.zeros import without_zeros
from jaxclip.checkpoints.reading import Source, open_source
from jaxclip.checkpoints.sizes import SizeReport, density_of, report_plan, with_errors
from jaxclip.checkpoints.stored_rows import StoredRows
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.coding.entropy_coding import Coding, check_coding
from jaxclip.lowbit.distortion import QuantizationError

LeafWithError: TypeAlias = tuple[Leaf | StreamedLeaf, QuantizationError | None]


@dataclasses.dataclass(frozen=True)
class Output:
    """A file to write, and the options for reading and writing.

    Attributes:
      dst: Its path.
      overwrite: True to replace an existing file.
      progress: True to show a bar if possible.
      coding: Entropy coding of codes, or None.
      is_dry_run: True to write nothing.
      keeps_names: True if tensors keep the names of a source without a tree. This format escapes
        some characters in names, so a source with such names is written as a plain file.
      max_ratio: Bytes of arrays that a byte of the source may stand for.
    """

    dst: Path
    overwrite: bool
    progress: bool
    coding: Coding | None = None
    is_dry_run: bool = False
    keeps_names: bool = False
    max_ratio: float = MAX_RATIO


def rewrite(
    src: str | os.PathLike,
    output: Output,
    outline: Callable[[Source], dict[str, Leaf]],
    rewrite_leaf: Callable[[str, StoredLeaf], LeafWithError],
    num_passes: int = 1,
    rewrite_rows: Callable[[str, StoredRows], LeafWithError | None] = lambda name, leaf: None,
) -> SizeReport:
    """Writes the result of `rewrite_leaf` for each leaf; `outline` gives the shapes in advance.

    A leaf of which rows can be read apart is that of `rewrite_rows`, unless this returns None.
    """
    check_coding(output.coding)
    if output.dst.suffix != ".safetensors":
        raise ValueError(f"dst must end in .safetensors, got {str(output.dst)!r}.")
    needs_no_weights = output.is_dry_run and output.coding is None
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(Path(src), output.max_ratio))
        source.check_unchanged_by(output.dst)
        if not output.is_dry_run:
            check_destination(output.dst, output.overwrite)
        num_passes -= needs_no_weights
        read = source.read
        source = stack.enter_context(_with_bar(source, num_passes, output.progress))
        outlined = outline(source)
        plan = plan_file(
            source.restore(outlined.__getitem__), is_copy=True, metadata=source.metadata
        )
        if needs_no_weights:
            return report_plan(plan, header_size(plan, None))
        keys = _keys_of_flat_dict(source)
        source_names = {leaf_name((key,)): name for key, name in keys.items()}
        errors: dict[str, QuantizationError | None] = {}
        densities: dict[str, float | None] = {}

        def produce(name: str) -> Leaf | StreamedLeaf:
            source_name = source_names.get(name, name)
            rows = source.rows(source_name)
            rewritten = None if rows is None else rewrite_rows(source_name, rows)
            if rewritten is None:
                rewritten = rewrite_leaf(source_name, source.read(source_name))
            leaf, errors[name] = rewritten
            if isinstance(leaf, StreamedLeaf):
                return _counted(leaf, name, densities)
            densities[name] = density_of(leaf)
            return leaf

        if output.keeps_names and any(leaf_name((key,)) != key for key in keys):
            specs = {key: outlined[name] for key, name in keys.items()}
            if not any(isinstance(spec, QuantizedArray) for spec in specs.values()):
                return _write_plain_file(output, plan, specs, produce)
        if output.is_dry_run:
            file = stack.enter_context(open(os.devnull, "wb"))
        else:
            file = stack.enter_context(replacing(output.dst, output.overwrite))
        # Only leaves that are copied are plain where there is a coding.
        plan = without_zeros(plan, lambda name: read(source_names.get(name, name)), output.coding)
        final = write_tree(file, plan, produce, output.coding)
    report = report_plan(final, header_size(plan, output.coding)).with_densities(densities)
    return with_errors(report, errors)


def _counted(leaf: StreamedLeaf, name: str, densities: dict[str, float | None]) -> StreamedLeaf:
    """Returns a leaf that puts its density among others when it has been written."""

    def parts() -> Iterator[np.ndarray]:
        count = 0
        for part in leaf.parts():
            count += np.count_nonzero(part)
            yield part
        densities[name] = count / math.prod(leaf.shape)

    return dataclasses.replace(leaf, parts=parts)


@contextlib.contextmanager
def _with_bar(source: Source, num_passes: int, is_wanted: bool) -> Iterator[Source]:
    """Shows a bar for the bytes that are read from the source in a number of passes."""
    num_bytes = num_passes * sum(source.num_bytes.values())
    with progress_bar(num_bytes, is_wanted and num_passes > 0, is_in_bytes=True) as advance:

        def read(name: str) -> StoredLeaf:
            leaf = source.read(name)
            advance(source.num_bytes[name])
            return leaf

        def rows(name: str) -> StoredRows | None:
            stored = source.rows(name)
            return None if stored is None else stored.within(contextlib.nullcontext, advance)

        yield dataclasses.replace(source, read=read, rows=rows)


def _write_plain_file(
    output: Output,
    plan: FilePlan,
    specs: dict[str, Any],
    produce: Callable[[str], Leaf | StreamedLeaf],
) -> SizeReport:
    """Writes arrays under their own names, without tree and checksums."""
    keys = {leaf_name((key,)): key for key in specs}
    with replacing(output.dst, output.overwrite) as file:
        num_bytes = write_plain(
            file,
            specs,
            lambda key: _as_plain_or_streamed(produce(leaf_name((key,)))),
            is_copy=True,
            metadata=plan.metadata,
        )
    report = report_plan(plan, num_bytes)
    leaves = [dataclasses.replace(leaf, path=keys[leaf.path]) for leaf in report.leaves]
    return dataclasses.replace(report, leaves=tuple(leaves))


def _as_plain_or_streamed(leaf: Leaf | StreamedLeaf) -> np.ndarray | StreamedLeaf:
    return leaf if isinstance(leaf, StreamedLeaf) else np.asarray(leaf)


def _keys_of_flat_dict(source: Source) -> dict[str, str]:
    """Returns the source's name of each key if it holds one dict of leaves, else an empty dict."""
    tree = source.restore(lambda name: name)
    is_flat = type(tree) is dict and all(type(x) is str for pair in tree.items() for x in pair)
    return tree if is_flat and "__metadata__" not in tree else {}
