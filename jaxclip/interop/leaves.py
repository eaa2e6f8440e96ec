"""Leaves as named tensors for a file of another library.

A leaf is in memory, or on disk and read when its tensors are written; shapes are known in advance.
"""

import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core.floats import cast, rounded
from jaxclip._core.trees import PyTree
from jaxclip.checkpoints.format import pytrees
from jaxclip.checkpoints.format.layout import check_has_values, check_leaf, is_random_key
from jaxclip.checkpoints.reading import Source
from jaxclip.lowbit.arrays import QuantizedArray, dequantize_stored, is_quantized

# Pairs of a regex and what replaces its matches in names, as in `re.sub`; applied in order.
Rename: TypeAlias = Sequence[tuple[str, str]]
_MOST_SHOWN = 5  # leaves that a warning names


class UnfitCodesError(ValueError):
    """Error of codes or scales that do not fit into a format; its message is the reason."""


class NamedLeaf(NamedTuple):
    """A leaf under its name in the new file.

    Attributes:
      name: The name.
      outline: The leaf, or the same with shapes in place of arrays.
      read: Returns the leaf with its values.
    """

    name: str
    outline: PyTree
    read: Callable[[], PyTree]

    @property
    def is_low_bit(self) -> bool:
        """True if the leaf has codes."""
        return is_quantized(self.outline)


class ExportTensor(NamedTuple):
    """A tensor that is still to be written.

    Attributes:
      shape: Its shape.
      dtype: Its dtype.
      make: Returns its values, a NumPy array of that shape and dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def named_leaves(tree: PyTree, separator: str, rename: Rename = ()) -> dict[str, NamedLeaf]:
    """Returns the checked leaves of a tree by name; a tree that is one leaf is "array"."""
    leaves = _by_name(tree, separator, rename)
    for name, leaf in leaves.items():
        if is_random_key(leaf):
            raise TypeError(
                f"leaf {name!r} has dtype {leaf.dtype}, which other libraries lack. Write "
                "`jax.random.key_data(key)`, or of an nnx module `nnx.state(module, nnx.Param)`."
            )
        for part in jax.tree.leaves(leaf):  # codes, scales and zeros of a low-bit leaf
            check_leaf(name, part)
            check_has_values(name, part)
        if is_quantized(leaf):
            leaf.check_parts(name)
            leaf.check_values(name)
    return {name: NamedLeaf(name, leaf, lambda x=leaf: x) for name, leaf in leaves.items()}


def stored_leaves(source: Source, separator: str, rename: Rename) -> dict[str, NamedLeaf]:
    """Returns the leaves of an open file by name; names of foreign files stay as they are."""
    last: list[tuple[str, PyTree]] = []  # all tensors of a low-bit leaf come from one read

    def read(stored: str) -> PyTree:
        if not last or last[0][0] != stored:
            last.clear()  # before the next is read: one leaf bounds the memory
            last.append((stored, source.read(stored)))
        return last[0][1]

    names = _by_name(source.restore(lambda name: name), separator, rename)
    return {
        name: NamedLeaf(name, source.leaves[stored], functools.partial(read, stored))
        for name, stored in names.items()
    }


def _by_name(tree: PyTree, separator: str, rename: Rename) -> dict[str, PyTree]:
    rules, used = _parse_rules(rename), set()
    leaves: dict[str, PyTree] = {}
    for keys, leaf in pytrees.named_leaves(pytrees.as_plain(tree)):
        name = separator.join(map(str, keys)) or "array"
        for i, (pattern, new) in enumerate(rules):
            name, count = pattern.subn(new, name)
            used |= {i} if count else set()
        if name in leaves:
            raise ValueError(
                f"two leaves have the name {name!r} when keys are joined by {separator!r}"
                f"{' and renamed' if rules else ''}."
            )
        leaves[name] = leaf
    unused = [rules[i][0].pattern for i in range(len(rules)) if i not in used]
    if unused:
        raise ValueError(f"rename has patterns that match no name: {unused}.")
    return leaves


def _parse_rules(rename: Rename) -> list[tuple[re.Pattern, str]]:
    """Returns the rules of new names with compiled patterns."""
    rules = []
    for pair in rename:
        try:
            text, new = pair
            pattern = re.compile(text)
            re.compile(f"{text}|").sub(new, "")  # raises for groups that the pattern lacks
            rules.append((pattern, new))
        except (re.error, TypeError, ValueError) as error:
            raise ValueError(
                f"rename must be pairs (regex, replacement), got {pair!r}: {error}"
            ) from error
    return rules


def warn_of_floats(format_name: str, reasons: Mapping[str, str]) -> None:
    """Warns of low-bit leaves that are written as floats, by name and reason."""
    if not reasons:
        return
    count = f"{len(reasons):,} low-bit {'leaf is' if len(reasons) == 1 else 'leaves are'}"
    shown = "; ".join(f"{name!r} {reason}" for name, reason in [*reasons.items()][:_MOST_SHOWN])
    more = len(reasons) - _MOST_SHOWN
    rest = f"; and {more:,} more" if more > 0 else ""
    warnings.warn(
        f"{count} written as floats, because {format_name} cannot hold the codes: {shown}{rest}.",
        stacklevel=4,
    )


def plain_tensor(leaf: NamedLeaf, dtype: np.dtype | None = None) -> ExportTensor:
    """Returns the tensor of a leaf's values, in `dtype` if they are floating; codes dequantized."""
    is_floating = jnp.issubdtype(leaf.outline.dtype, jnp.floating)
    own = jnp.dtype(leaf.outline.dtype) if is_floating else leaf.outline.dtype
    target = dtype if dtype is not None and is_floating else own
    if isinstance(target, np.dtype) and not target.isnative:
        target = target.newbyteorder("=")

    def make() -> np.ndarray:
        if leaf.is_low_bit:
            return dequantize_stored(leaf.read(), target, leaf.name)
        return cast(leaf.name, np.asarray(leaf.read()), target)

    return ExportTensor(tuple(leaf.outline.shape), target, make)


def check_held(part: str, values: np.ndarray, dtype: np.dtype, is_held: np.ndarray) -> None:
    """Raises unless all scales or offsets of a leaf are held by the dtype of a format."""
    if not np.all(is_held):
        lost = values[~is_held][0]
        problem = "0" if rounded(lost, dtype) == 0 else "too large"
        raise UnfitCodesError(f"has {part} of {lost:.3g}, which is {problem} in {dtype}")


def codes_of(name: str, leaf: QuantizedArray) -> np.ndarray:
    """Returns the codes of a low-bit leaf as int8, or raises if one is outside its grid."""
    codes = np.asarray(leaf.unpacked().qvalue).astype(np.int8)
    leaf.check_codes(codes, name)
    return codes


def fits_in_4_bits(leaf: QuantizedArray) -> bool:
    """Returns True if all codes of the leaf's grid are in -8..7; shapes suffice."""
    low, high = leaf.grid.code_range
    return low >= -8 and high <= 7
