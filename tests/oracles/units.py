"""A tree of leaves of different size, and norms of units in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def tree_of(dtype: Any, scale: float = 1.0) -> dict[str, jax.Array]:
    k = jax.random.split(jax.random.key(3), 3)
    tree = {"a": jax.random.normal(k[0], (6, 5)), "b": 9 * jax.random.normal(k[1], (7,))}
    tree |= {"c": 0.01 * jax.random.normal(k[2], (3, 2, 4))}
    return jax.tree.map(lambda x: (x * scale).astype(dtype), tree)


def exact(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def norm(x: Any, axis: Any = None) -> np.ndarray:
    return np.sqrt(np.sum(np.square(exact(x)), axis=axis, keepdims=axis is not None))


def update(tx: Any, grads: Any, params: Any = None) -> tuple[Any, Any]:
    return jax.jit(tx.update)(grads, tx.init(grads), params)
