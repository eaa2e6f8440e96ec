"""How many steps of Lion in a box have gradients of a norm above 1.

python evidence/norms.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from methods import make_methods
from tasks import TASKS

import jaxclip

# The step sizes that were chosen, see results.
STEP_SIZES = {"digits": 8e-3, "fashion": 5e-4}


def main():
    for name, step_size in STEP_SIZES.items():
        task = TASKS[name]()
        inner = make_methods(task.num_steps, task.weight_decay)["Lion in a box"].optimizer
        box = jaxclip.box(jaxclip.fan_in(1.0))
        tx = optax.chain(inner(step_size), jaxclip.project_weights(box))

        def step(carry, i, task=task, tx=tx):
            params, state = carry
            batch = task.batches(jax.random.fold_in(jax.random.key(1), i))
            grads = jax.grad(task.loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), jaxclip.global_norm(grads)

        params = task.init_fn(jax.random.key(0))
        _, norms = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(task.num_steps))
        above = np.mean(np.asarray(norms) > 1)
        print(f"{name:8} {above:.1%} of {task.num_steps} steps, median {np.median(norms):.2f}")


if __name__ == "__main__":
    main()
