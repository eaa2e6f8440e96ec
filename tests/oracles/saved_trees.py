"""Trees to save, and what must hold when they are loaded."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip._core.grids import Grid
from jaxclip.lowbit.quantizer import quantize


def random_weights(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def small_tree() -> dict:
    return {
        "layer": {
            "kernel": quantize(random_weights(5, 3), Grid("ternary")),
            "bias": np.arange(3, dtype=np.float32),
        },
        "steps": [np.int32(7), None],
    }


def new_tree() -> dict:
    """What version 1 of the format could not say."""
    grid = Grid(3, scale_dtype="log8", zero_point=True)
    return {"layer": {"kernel": quantize(random_weights(5, 2), grid)}}


def assert_same(left, right) -> None:
    """Same structure, static fields, dtypes, shapes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def leftovers(directory: pathlib.Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(".jaxclip-tmp")]
