"""Small parameters for tests of low-bit trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def make_params():
    """A leaf of every kind that `compress` meets."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    return {
        "embed": {"embedding": draw(11, 6)},
        "dense": {"kernel": draw(6, 5), "bias": draw(5)},
        "half": {"kernel": draw(4, 6).astype(jnp.bfloat16), "scale": draw(4)},
        "step": jnp.arange(4),
        "rotation": draw(2, 2).astype(jnp.complex64),
        "none": None,
        "temperature": draw(),
    }


@functools.cache
def uneven_params():
    """Leaves that one width does not suit: small and large weights, easy and hard ones."""
    rng = np.random.default_rng(1)
    draw = lambda size: jnp.asarray((size * rng.normal(size=(24, 16))).astype(np.float32))  # noqa: E731
    easy = jnp.asarray(rng.choice([-1.0, 0.0, 1.0], (24, 16)).astype(np.float32))
    return {"large": draw(3.0), "small": draw(0.1), "easy": easy, "bias": jnp.ones(16)}


def params_and_goal(dtype=jnp.float32):
    """Parameters, and a loss with one minimum."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": jax.random.normal(keys[0], (6, 4), dtype), "bias": jnp.zeros(4, dtype)}
    goal = jax.random.normal(keys[1], (6, 4), dtype)
    return params, lambda p: jnp.sum((p["kernel"] - goal) ** 2 + (p["bias"] - 1)[None] ** 2)
