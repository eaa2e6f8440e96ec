"""A loss whose gradients are given, so that nothing but the optimizer part of a step is left."""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def given_loss(params: Any, grads: Any) -> jax.Array:
    return jnp.zeros((), jnp.float32)


given_loss.defvjp(lambda p, g: (jnp.zeros((), jnp.float32), g), lambda g, _: (g, None))
