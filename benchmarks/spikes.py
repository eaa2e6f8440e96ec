"""Which clip keeps training alive when gradients spike or turn into NaN?

    python benchmarks/spikes.py [sgd | adamw]

A 64-64-10 network learns scikit-learn's digits for 300 steps, five seeds at once. On a
schedule that is the same for every method, some gradients are multiplied by 10 to 10,000
(`spikes`; `late` only after the warm-ups, from step 100 on) or become NaN (`nans`). Each cell
is the final training loss, mean +- standard deviation over the seeds, and the mean test
accuracy. Deterministic; well under two minutes on 2 cores.
"""

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip
from jaxclip import adaptive

NUM_STEPS, NUM_SEEDS, BATCH_SIZE = 300, 5, 64
OPTIMIZERS = {"sgd": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(3e-3)}
METHODS = {
    "no clip": optax.identity,
    "clip_by_global_norm(1.0)": functools.partial(jaxclip.clip_by_global_norm, 1.0),
    "autoclip()": adaptive.autoclip,
    "autoclip(0.5)": functools.partial(adaptive.autoclip, 0.5),
    "zclip()": adaptive.zclip,
    "adagc()": adaptive.adagc,
    "adagc(warmup=20)": functools.partial(adaptive.adagc, warmup=20),
    "clip_spikes()": adaptive.clip_spikes,
    "clip_spikes(50)": functools.partial(adaptive.clip_spikes, 50.0),
    "clip_leaf_spikes()": adaptive.clip_leaf_spikes,
}


def fault_schedules() -> dict[str, np.ndarray]:
    """What the gradient of each step is multiplied by: 1, a spike, or NaN."""
    rng = np.random.default_rng(0)
    hit = rng.random(NUM_STEPS) < 0.05
    sizes = 10 ** rng.uniform(1, 4, NUM_STEPS)
    return {
        "clean": np.ones(NUM_STEPS, np.float32),
        "spikes": np.where(hit, sizes, 1).astype(np.float32),
        "late": np.where(hit & (np.arange(NUM_STEPS) >= 100), sizes, 1).astype(np.float32),
        "nans": np.where(hit, np.nan, 1).astype(np.float32),
    }


def load_data() -> tuple[tuple, tuple]:
    digits = load_digits()
    order = np.random.default_rng(1).permutation(len(digits.target))
    x = (digits.data[order] / 16).astype(np.float32)
    y = digits.target[order].astype(np.int32)
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def init_params(key: jax.Array) -> Any:
    sizes = (64, 64, 10)
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [
        {"w": jax.random.normal(k, (m, n)) * np.sqrt(2 / m), "b": jnp.zeros(n)}
        for k, m, n in shapes
    ]


def logits_of(params: Any, x: jax.Array) -> jax.Array:
    first, last = params
    return jax.nn.relu(x @ first["w"] + first["b"]) @ last["w"] + last["b"]


def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()


def make_trainer(tx: optax.GradientTransformation, train: tuple, test: tuple) -> Any:
    """A compiled function of (keys, factors): losses and accuracies of all seeds."""
    (x, y), (test_x, test_y) = jax.tree.map(jnp.asarray, (train, test))

    def run(key: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
        init_key, data_key = jax.random.split(key)
        params = init_params(init_key)

        def step(carry: Any, scanned: Any) -> tuple[Any, None]:
            params, state = carry
            batch_key, factor = scanned
            rows = jax.random.randint(batch_key, (BATCH_SIZE,), 0, len(y))
            grads = jax.grad(loss_of)(params, x[rows], y[rows])
            grads = jax.tree.map(lambda g: g * factor, grads)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        scanned = (jax.random.split(data_key, NUM_STEPS), factors)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), scanned)
        hits = jnp.argmax(logits_of(params, test_x), axis=-1) == test_y
        return loss_of(params, x, y), jnp.mean(hits)

    return jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(None, 0)))


def methods() -> dict[str, Any]:
    """What makes an optimizer robust, by name: the clips, and the skip if there is one."""
    found = {
        name: lambda inner, make=make: optax.chain(make(), inner) for name, make in METHODS.items()
    }
    if hasattr(jaxclip, "skip_or_clip"):
        found["skip_or_clip(3 sd)"] = functools.partial(
            jaxclip.skip_or_clip, num_deviations=3.0, num_warmup=25
        )
    if hasattr(jaxclip, "skip_nonfinite"):
        found["skip_nonfinite"] = jaxclip.skip_nonfinite
    return found


def cell(losses: np.ndarray, accuracies: np.ndarray) -> str:
    loss = f"{losses.mean():8.3f} +- {losses.std(ddof=1):6.3f}"
    loss = loss if np.isfinite(losses).all() else f"{'diverged':>18}"
    return f"{loss}{100 * accuracies.mean():5.0f} %"


def main(name_of_optimizer: str = "sgd") -> None:
    started = time.perf_counter()
    train, test = load_data()
    schedules = fault_schedules()
    factors = jnp.stack([jnp.asarray(f) for f in schedules.values()])
    hits = np.flatnonzero(schedules["spikes"] != 1)
    print(
        f"{len(hits)} of {NUM_STEPS} steps are hit, the first at {hits[:4]}, spikes of up to "
        f"{schedules['spikes'].max():.0f}x; training loss +- sd of {NUM_SEEDS} seeds, test accuracy"
    )
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    print(f"\n{name_of_optimizer:25}" + "".join(f"{name:^25}" for name in schedules))
    for name, wrap in methods().items():
        trainer = make_trainer(wrap(OPTIMIZERS[name_of_optimizer]), train, test)
        losses, accuracies = map(np.asarray, trainer(keys, factors))
        print(f"{name:25}" + "".join(map(cell, losses, accuracies)), flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
