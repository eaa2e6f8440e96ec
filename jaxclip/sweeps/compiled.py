"""Compiled programs by what they compute: a digest of them, and those of the last sweeps."""

import collections
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fingerprint(*programs: Any) -> str:
    """Returns a digest of traced functions and their data, equal in all processes."""
    digest = hashlib.sha256()
    for program in programs:
        # The structure has the names: a jaxpr identifies its outputs only by position.
        text = f"{program.jaxpr} {jax.tree.structure(program.out_info)}"
        digest.update(re.sub(r"0x[0-9a-f]+", "", text).encode())  # addresses in memory
        for constant in _constants(program.jaxpr):
            if jnp.issubdtype(getattr(constant, "dtype", np.float32), jax.dtypes.prng_key):
                constant = jax.random.key_data(constant)
            digest.update(np.asarray(constant).tobytes())
    return digest.hexdigest()


# The compiled programs of the last sweeps, the latest last. Few, because they hold their data.
_RECENT: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
_NUM_RECENT = 16


def remembered(program: jax.stages.Traced, make: Callable[[], Any], *places: Any) -> Any:
    """Returns what `make()` returned for an equal program at the same places, or returns now."""
    # Equal by what it computes, not by its functions: these may read other data than before.
    if has_operation(program, "callback"):  # functions outside of it, known by address only
        return make()
    trees = jax.tree.structure((program.args_info, program.out_info))
    precision = str(jax.config.jax_default_matmul_precision)  # pyright: ignore
    key = (fingerprint(program), trees, repr(places), precision)
    if key not in _RECENT:
        _RECENT[key] = make()
    _RECENT.move_to_end(key)
    while len(_RECENT) > _NUM_RECENT:
        _RECENT.popitem(last=False)
    return _RECENT[key]


def has_operation(program: jax.stages.Traced, name: str) -> bool:
    """Returns True if the program has an operation with `name` in its name."""
    return any(name in equation.primitive.name for equation in _equations(program.jaxpr))


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr, each followed by those of the jaxprs in it."""
    for equation in jaxpr.eqns:
        yield equation
        # Jaxprs are recognized by their attributes: `jax.extend.core` is slow to import.
        for x in jax.tree.leaves(equation.params):
            if hasattr(x, "eqns"):
                yield from _equations(x)


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Yields the constants of a jaxpr and of all jaxprs in it, which its text omits."""
    # Jaxprs are recognized by their attributes, because `jax.extend.core` is slow to import.
    yield from getattr(jaxpr, "consts", ())  # an open jaxpr has none
    for equation in jaxpr.eqns:
        yield from (x.val for x in equation.invars if hasattr(x, "val"))
        for x in jax.tree.leaves(equation.params):
            if hasattr(x, "eqns"):
                yield from _constants(x)
            elif isinstance(x, (np.ndarray, jax.Array)):
                yield x
