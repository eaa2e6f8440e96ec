"""Faster programs, and programs that compile faster: options for XLA, and leaves in groups."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np
from jax import lax

_MOST_IN_GROUP = 8  # with 16, XLA on CPU splits the kernel and writes a part of it to memory
_MOST_ENTRIES = 2**20  # larger leaves are reduced side by side, each by a core of its own

# Registers of 512 bits where the processor has them; XLA prefers 256, and elsewhere it still does.
WIDE_VECTORS = ("xla_cpu_prefer_vector_width", 512)


@functools.cache
def cpu_options(*options: tuple[str, bool | int | str]) -> dict[str, bool | int | str]:
    """Returns the options if the default backend is a CPU whose XLA knows them, else none."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(0.0).compile()
    except Exception:  # jaxlibs raise different errors for an option that they lack
        return {}
    return dict(options)


class WideJit:
    """A jitted function that is compiled for wide vectors unless another program calls it."""

    # jax takes compiler options only at the top level. The program around has its own.
    def __init__(self, function: Callable[..., Any], **arguments: Any):
        functools.update_wrapper(self, function)
        self._inner = jax.jit(function, **arguments)
        self._jit = functools.partial(jax.jit, function, **arguments)

    @functools.cached_property
    def _outer(self) -> Callable[..., Any]:
        return self._jit(compiler_options=cpu_options(WIDE_VECTORS) or None)

    def __call__(self, *args: Any) -> Any:
        is_traced = any(isinstance(x, jax.core.Tracer) for x in (*args, lax.neg(np.int32(0))))
        return self._inner(*args) if is_traced else self._outer(*args)


def groups_alike(
    leaves: Sequence[jax.Array], keys: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Returns the positions of leaves in groups that one kernel can reduce: that compiles faster.

    Leaves of a group have one shape and dtype, and one key.
    """
    alike: dict[Hashable, list[int]] = {}
    for i, x in enumerate(leaves):
        # Not on a mesh, where leaves of one shape may be split in different ways.
        is_alone = x.size > _MOST_ENTRIES or not jax.typeof(x).sharding.mesh.empty
        key = x.shape, x.dtype, keys and keys[i], i if is_alone else None
        alike.setdefault(key, []).append(i)
    return [
        group[start : start + _MOST_IN_GROUP]
        for group in alike.values()
        for start in range(0, len(group), _MOST_IN_GROUP)
    ]
