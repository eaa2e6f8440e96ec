"""Training by an optimizer, step by step."""

import jax
import optax


def walk(tx, params, loss_fn, num_steps):
    """Parameters and state after each step."""
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(num_steps):
        updates, state = update(jax.grad(loss_fn)(params), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state
