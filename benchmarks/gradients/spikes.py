"""Which clip keeps training alive when gradients spike or turn into NaN?

    python benchmarks/gradients/spikes.py [sgd | adamw]

First a 64-64-10 network learns scikit-learn's digits for 300 steps, five seeds at once, with
both optimizers or the one that is named. On a schedule that is the same for every method, 15
gradients are multiplied by 10 to 10,000 (`spikes`; `late` only from step 100 on, after the
warm-ups) or become NaN (`nans`). A cell is the final training loss and the test accuracy in
percent, each as mean +- standard deviation over the seeds. A method runs with its defaults, which
are as published, and below that with what fits this task.

Then a record: the norms of each leaf's gradient before the clip, from one run of the network
with these spikes, are given to each clip of norms. Counted are the spikes that it clipped
(or skipped), the other steps that it left alone, and the most that it let through of a spike,
in units of the median norm of the 20 steps around it.

Deterministic; under three minutes on 2 idle cores.
"""

import functools
import importlib.metadata
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip

NUM_STEPS, NUM_SEEDS, BATCH_SIZE, NUM_FAULTS, NUM_CALM = 300, 5, 64, 15, 100
OPTIMIZERS = {"sgd": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(3e-3)}


def before(make: Callable, *args: Any, **settings: Any) -> Callable:
    """A clip as the first link of a chain with the optimizer."""
    return lambda inner: optax.chain(make(*args, **settings), inner)


def around(make: Callable, **settings: Any) -> Callable:
    """A guard around the optimizer."""
    return functools.partial(make, **settings)


CLIPS_OF_NORMS = {
    "clip_by_global_norm(1.0)": before(jaxclip.clip_by_global_norm, 1.0),
    "autoclip()": before(jaxclip.gradients.autoclip),
    "autoclip(0.5)": before(jaxclip.gradients.autoclip, 0.5),
    "autoclip(window=100)": before(jaxclip.gradients.autoclip, window=100),
    "autoclip(0.5, window=100)": before(jaxclip.gradients.autoclip, 0.5, window=100),
    "zclip()": before(jaxclip.gradients.zclip),
    "zclip(max_norm=1.0)": before(jaxclip.gradients.zclip, max_norm=1.0),
    "adagc()": before(jaxclip.gradients.adagc),
    "adagc(2.0, warmup=20)": before(jaxclip.gradients.adagc, 2.0, warmup=20),
    "skip_or_clip(inf, 3 sd)": around(
        jaxclip.gradients.skip_or_clip, num_deviations=3.0, num_warmup=25
    ),
    "skip_or_clip(10.0, 6 sd)": around(
        jaxclip.gradients.skip_or_clip, drop_norm=10.0, num_deviations=6.0, num_warmup=25
    ),
}
METHODS = {
    "no clip": lambda inner: inner,
    **CLIPS_OF_NORMS,
    "skip_nonfinite()": around(jaxclip.skip_nonfinite),
    "clip_spikes()": before(jaxclip.gradients.clip_spikes),
    "clip_spikes(10.0)": before(jaxclip.gradients.clip_spikes, 10.0),
    "clip_leaf_spikes()": before(jaxclip.gradients.clip_leaf_spikes),
    "   ..., autoclip(0.5)": lambda inner: optax.chain(
        jaxclip.gradients.clip_leaf_spikes(), jaxclip.gradients.autoclip(0.5), inner
    ),
}


def fault_schedules() -> dict[str, np.ndarray]:
    """What the gradient of each step is multiplied by: 1, a spike, or NaN."""
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.geomspace(10, 10_000, NUM_FAULTS))
    steps = rng.choice(NUM_STEPS, NUM_FAULTS, replace=False)
    late_steps = NUM_CALM + rng.choice(NUM_STEPS - NUM_CALM, NUM_FAULTS, replace=False)
    schedules = {
        name: np.ones(NUM_STEPS, np.float32) for name in ("clean", "spikes", "late", "nans")
    }
    schedules["spikes"][steps] = sizes
    schedules["late"][late_steps] = sizes
    schedules["nans"][steps] = np.nan
    return schedules


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


def make_run(tx: optax.GradientTransformation, train: tuple, test: tuple) -> Callable:
    """A function of (key, factors): final loss, accuracy, each step's norms by leaf."""
    (x, y), (test_x, test_y) = jax.tree.map(jnp.asarray, (train, test))

    def run(key: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        init_key, data_key = jax.random.split(key)
        params = init_params(init_key)

        def step(carry: Any, scanned: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            batch_key, factor = scanned
            rows = jax.random.randint(batch_key, (BATCH_SIZE,), 0, len(y))
            grads = jax.grad(loss_of)(params, x[rows], y[rows])
            grads = jax.tree.map(lambda g: g * factor, grads)
            updates, state = tx.update(grads, state, params)
            norms = jnp.stack([jnp.linalg.norm(g.reshape(-1)) for g in jax.tree.leaves(grads)])
            return (optax.apply_updates(params, updates), state), norms

        scanned = (jax.random.split(data_key, NUM_STEPS), factors)
        (params, _), norms = jax.lax.scan(step, (params, tx.init(params)), scanned)
        hits = jnp.argmax(logits_of(params, test_x), axis=-1) == test_y
        return loss_of(params, x, y), jnp.mean(hits), norms

    return run


def cell(losses: np.ndarray, accuracies: np.ndarray) -> str:
    loss = f"{losses.mean():10.3f} +- {losses.std(ddof=1):7.3f}"
    loss = loss if np.isfinite(losses).all() else f"{'NaN':>21}"
    return f"{loss}{100 * accuracies.mean():6.1f} +- {100 * accuracies.std(ddof=1):4.1f}"


def print_training(name_of_optimizer: str, train: tuple, test: tuple) -> None:
    schedules = fault_schedules()
    factors = jnp.stack([jnp.asarray(f) for f in schedules.values()])
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    print(f"\n{name_of_optimizer:26}" + "".join(f"{name:>35}" for name in schedules))
    for name, wrap in METHODS.items():
        run = make_run(wrap(OPTIMIZERS[name_of_optimizer]), train, test)
        runs = jax.jit(jax.vmap(jax.vmap(run, in_axes=(0, None)), in_axes=(None, 0)))
        losses, accuracies, _ = map(np.asarray, runs(keys, factors))
        print(f"{name:26}" + "".join(map(cell, losses, accuracies)), flush=True)


def replay(wrap: Callable, norms: jax.Array) -> np.ndarray:
    """Each step's norm after the clip, of gradients with one entry a leaf."""
    tx = wrap(optax.identity())

    def step(state: Any, parts: jax.Array) -> tuple[Any, jax.Array]:
        updates, state = tx.update(list(parts), state)
        return state, jnp.linalg.norm(jnp.stack(updates))

    return np.asarray(jax.jit(lambda: jax.lax.scan(step, tx.init(list(norms[0])), norms)[1])())


def print_record(train: tuple, test: tuple) -> None:
    wrap = CLIPS_OF_NORMS["clip_by_global_norm(1.0)"]
    run = jax.jit(make_run(wrap(OPTIMIZERS["sgd"]), train, test))
    schedules = fault_schedules()
    print(f"\n{'record':26}" + "".join(f"{name:>34}" for name in ("spikes", "late")))
    print(f"{'':26}" + 2 * f"{'spikes clipped':>15}{'others not':>11}{'let by':>8}")
    norms = {k: run(jax.random.key(0), jnp.asarray(schedules[k]))[2] for k in ("spikes", "late")}
    for name, wrap in CLIPS_OF_NORMS.items():
        row = ""
        for kind, parts in norms.items():
            raw, passed = np.linalg.norm(parts, axis=1), replay(wrap, parts)
            is_spike, is_clipped = schedules[kind] != 1, passed < raw * (1 - 1e-5)
            usual = raw / schedules[kind]
            usual = np.array([np.median(usual[max(i - 10, 0) : i + 11]) for i in range(len(raw))])
            let_by = (passed / usual)[is_spike].max()
            recall, spared = is_clipped[is_spike].mean(), 1 - is_clipped[~is_spike].mean()
            row += f"{100 * recall:13.0f} %{100 * spared:9.0f} %{let_by:7.1f}x"
        print(f"{name:26}" + row, flush=True)


def main(*names: str) -> None:
    started = time.perf_counter()
    train, test = load_data()
    spikes = fault_schedules()["spikes"]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "numpy")]
    print(", ".join(versions))
    print(
        f"{NUM_FAULTS} of {NUM_STEPS} steps are hit, the first at "
        f"{np.flatnonzero(spikes != 1)[:4]}; {NUM_SEEDS} seeds"
    )
    for name in names or OPTIMIZERS:
        print_training(name, train, test)
    print_record(train, test)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
