"""Layouts of weights: which axes of a leaf are its outputs, by its name and shape.

in_out   flax, Keras        Dense (in, out), Conv (height, width, in, out)
out_in   PyTorch, equinox   Linear (out, in), Conv (out, in, height, width)
"""

import collections
import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from jaxclip._core import checks

Layout: TypeAlias = Literal["in_out", "out_in"]
LAYOUTS: tuple[Layout, ...] = ("in_out", "out_in")
Axes: TypeAlias = int | tuple[int, ...]

_EXPERTS = re.compile(r"expert|\bmoe\b", re.IGNORECASE)
_LONGEST_KERNEL = 32  # a last axis from here on is that of a matrix, not of a convolution


def layouts_of(
    names: Sequence[str], layout: Layout | None = None, default: Layout = "in_out"
) -> list[Layout]:
    """Returns the layout of each leaf: the one that is given, or by its name."""
    # A name that says nothing follows most of the others, or else `default`.
    checks.check_choice("layout", layout, (None, *LAYOUTS))
    if layout is not None:
        return [layout] * len(names)
    found: list[Layout | None] = [_by_name(name) for name in names]
    counts = collections.Counter(x for x in found if x is not None)
    most = max((default, *LAYOUTS), key=lambda x: (counts[x], x == default))
    return [most if x is None else x for x in found]


def _by_name(name: str) -> Layout | None:
    name = re.sub(r"([/.]value|:[0-9]+)$", "", name)  # as flax nnx and Keras end names
    last = re.split(r"[/.]", name)[-1]
    if last in ("kernel", "embedding"):
        return "in_out"
    return "out_in" if "weight" in last else None


def _is_image_kernel(shape: tuple[int, ...], layout: Layout) -> bool:
    """Returns True for a convolution over two or more dimensions, with a small kernel."""
    # Other leaves of experts are stacks of matrices, perhaps of several layers.
    kernel = shape[2:] if layout == "out_in" else shape[:-2]
    return len(kernel) > 1 and len(set(kernel)) == 1 and kernel[0] % 2 == 1 and kernel[0] < 16


def output_axes(name: str, shape: tuple[int, ...], layout: Layout) -> Axes:
    """Returns the axis or axes of the outputs of a leaf of two or more dimensions."""
    has_experts = _EXPERTS.search(name) is not None and not _is_image_kernel(shape, layout)
    if layout == "out_in":
        is_stack = len(shape) == 3 and shape[-1] >= _LONGEST_KERNEL
        return tuple(range(len(shape) - 1)) if len(shape) > 2 and (has_experts or is_stack) else 0
    if has_experts and len(shape) > 2:
        return (*range(len(shape) - 2), -1)
    words = name.split("/")
    is_attention = len(words) > 1 and words[-2] in ("query", "key", "value")
    return (1, 2) if is_attention and len(shape) == 3 else -1  # (features, heads, head_dim)
