"""A small task, and sweeps of it with changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxclip
from jaxclip.sweeps.grid import sweep
from jaxclip.sweeps.tasks import Task, random_batches

INPUTS = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32))
STEPS = 12


def init_fn(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {"kernel": 0.4 * jax.random.normal(first, (6, 8)), "bias": jnp.zeros(8)},
        "out": {"kernel": 0.4 * jax.random.normal(second, (8, 3)), "bias": jnp.zeros(3)},
    }


def apply(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"][None]


def loss_fn(params, batch):
    return jnp.mean((apply(params, batch[0]) - batch[1]) ** 2)


def evaluate(params):
    errors = jnp.mean((apply(params, INPUTS) - TARGETS) ** 2, axis=1)
    return {"test": jnp.mean(errors[:32]), "train": jnp.mean(errors[32:])}


def momentum(step_size):
    def falling(count):
        return step_size * (1 - count.astype(jnp.float32) / (2 * STEPS))

    return optax.chain(jaxclip.clip_by_global_norm(1.0), optax.sgd(falling, momentum=0.9))


BATCHES = random_batches((INPUTS, TARGETS), 16)
TASK = Task(
    loss_fn,
    init_fn,
    momentum,
    BATCHES,
    stop=jaxclip.max_steps(STEPS),
    evaluate=evaluate,
    metric="test",
    train_metric="train",
    mode="min",
    weight_threshold=jaxclip.fan_in,
)
COMMON = {
    "step_sizes": [0.3, 0.03],
    "thresholds": [0.5, 1.0, np.inf],
    "seeds": 2,
    "bits": (None, 4),
    "devices": jax.devices()[:1],
    "keep_params": True,
    "progress": False,
}


def run(**changes):
    """A sweep of `TASK` and `COMMON`, with changes of either."""
    of_task = {f.name for f in dataclasses.fields(Task)} & changes.keys()
    task = dataclasses.replace(TASK, **{name: changes.pop(name) for name in of_task})
    return sweep(task, **(COMMON | changes))


GOAL = np.linspace(-0.3, 0.5, 4).astype(np.float32)


def run_small(name="w", names=("error", "norm"), shifted=None, **changes):
    """The least there is to sweep, in compiled functions that have their data inside."""
    functions = {
        "loss_fn": lambda data, p, noise: jnp.mean((p[name] - data - noise) ** 2),
        "batches": lambda data, key: 0.1 * jax.random.normal(key, (4,)) + data,
        "evaluate": lambda data, p: dict(
            zip(names, (jnp.mean((p[name] - data) ** 2), jnp.mean(p[name] ** 2)), strict=True)
        ),
    }
    for which, function in functions.items():
        data = GOAL + np.float32(which == shifted)
        functions[which] = jax.jit(functools.partial(function, data))
    small = {"step_sizes": [0.1], "thresholds": [1.0], "seeds": 1, "bits": (None,)}
    small |= {"metric": "error", "train_metric": None, "weight_threshold": None}
    small |= {"stop": jaxclip.max_steps(2), "optimizer": optax.sgd}
    return run(init_fn=lambda key: {name: jnp.zeros(4)}, **(functions | small | changes))


def params_at(result, i, j, seed):
    return jax.tree.map(lambda leaf: leaf[i, j, seed], result.params)
