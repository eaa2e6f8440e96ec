"""The box without a projection (Chen et al., https://arxiv.org/abs/2310.05898; Scion, 2502.07529).

    python benchmarks/papers/frank_wolfe.py

The papers: a sign step of size alpha with weight decay lambda minimizes the loss over the box
|w| <= 1 / lambda. Weights that start outside come in exponentially fast, and those in it stay.

Here: a 64-64-10 network for scikit-learn's digits starts with weights far outside the box of 0.1
(lambda = 10). Then, from a start in the box, the same step is compared with Lion and a projection
onto it: accuracy as trained, and after rounding to ternary weights. The script fails if a claim at
its end does not hold. Half a minute on 2 idle cores.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxclip

BOX, GAMMA, NUM_STEPS, BATCH, NUM_SEEDS = 0.1, 0.02, 1000, 64, 5
SIZES = (64, 64, 10)


def load_data() -> tuple[tuple, tuple]:
    digits = load_digits()
    order = np.random.default_rng(1).permutation(len(digits.target))
    x = (digits.data[order] / 16).astype(np.float32)
    y = digits.target[order].astype(np.int32)
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def init_params(key: jax.Array, scale: float) -> Any:
    keys = jax.random.split(key, len(SIZES) - 1)
    shapes = zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    return [scale * jax.random.normal(k, s) for k, *s in shapes]


def logits_of(params: Any, x: jax.Array) -> jax.Array:
    first, last = params
    # The factor makes up for the narrow box.
    return 4 * (jax.nn.relu(4 * (x @ first)) @ last)


def loss_fn(params: Any, batch: tuple) -> jax.Array:
    logits = logits_of(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train(
    tx: optax.GradientTransformation, params: Any, data: tuple, key: jax.Array
) -> tuple[Any, jax.Array]:
    """Trained parameters, and the largest weight before each step and at the end."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(data[1]))
        grads = jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[rows], data))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), largest_of(params)

    keys = jax.random.split(key, NUM_STEPS)
    (params, _), largest = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params, jnp.append(largest, largest_of(params))


def largest_of(params: Any) -> jax.Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(w)) for w in params]))


def print_way_in(data: tuple) -> dict[str, np.bool]:
    """The largest weight on its way into the box."""
    step = jaxclip.sign.frank_wolfe(GAMMA, BOX, jaxclip.scale_by_lion())
    run = jax.jit(functools.partial(train, step, data=data))
    _, largest = run(init_params(jax.random.key(0), 1.0), key=jax.random.key(1))
    largest = np.asarray(largest, np.float64)
    shown = [0, 50, 100, 150, 200, 300, 400, 600, 1000]
    slowest = BOX + (largest[0] - BOX) * (1 - GAMMA) ** np.arange(len(largest))
    print("largest weight after step " + "".join(f"{i:8}" for i in shown))
    print("at the slowest, by theory " + "".join(f"{slowest[i]:8.3f}" for i in shown))
    print("seen                      " + "".join(f"{largest[i]:8.3f}" for i in shown))
    return {
        "no slower than exponentially (papers: the same)": np.all(largest <= slowest * (1 + 1e-5)),
        "within a thousandth of the box at the end": largest[-1] <= 1.001 * BOX,
    }


def print_beside_projection(data: tuple, test: tuple) -> dict[str, np.bool]:
    """Accuracies of both ways into the same box, over step sizes."""

    def in_box(alpha: float) -> optax.GradientTransformation:
        lion = jaxclip.lion(alpha, weight_decay=0.0)
        return optax.chain(lion, jaxclip.project_weights(jaxclip.box(BOX)))

    def by_corners(alpha: float) -> optax.GradientTransformation:
        return jaxclip.sign.frank_wolfe(alpha / BOX, BOX, jaxclip.scale_by_lion())

    def accuracies(make: Callable, alpha: jax.Array, key: jax.Array) -> jax.Array:
        init_key, data_key = jax.random.split(key)
        params = jaxclip.clip_weights(init_params(init_key, BOX / 2), BOX)
        params, largest = train(make(alpha), params, data, data_key)
        # Ternary: the scale of each output is the box itself.
        ternary = [BOX * jnp.sign(w) * (jnp.abs(w) > BOX / 2) for w in params]
        on_bound = jnp.mean(jnp.concatenate([(jnp.abs(w) > 0.99 * BOX).ravel() for w in params]))
        hits = [
            jnp.mean(jnp.argmax(logits_of(p, test[0]), -1) == test[1]) for p in (params, ternary)
        ]
        return 100 * jnp.stack([*hits, on_bound, jnp.max(largest)])

    print(f"\n{'':32}accuracy       as ternary     on the bound")
    keys, best = jax.random.split(jax.random.key(2), NUM_SEEDS), {}
    for name, make in {"lion + box": in_box, "frank_wolfe": by_corners}.items():
        run = jax.jit(jax.vmap(functools.partial(accuracies, make), in_axes=(None, 0)))
        for alpha in (0.0003, 0.001, 0.003):
            rows = np.asarray(run(jnp.float32(alpha), keys))
            means, spreads = rows.mean(0), rows.std(0, ddof=1)
            cells = "".join(f"{means[i]:8.1f} +- {spreads[i]:3.1f}" for i in range(3))
            print(f"{name:14} step {alpha:<10}{cells}", flush=True)
            best[name] = np.maximum(best.get(name, means), means)
    lost = best["lion + box"] - best["frank_wolfe"]
    return {
        "weights never leave the box (Scion: the same)": best["frank_wolfe"][3] <= 100 * BOX,
        "as accurate as the projection, within a point": lost[0] < 1,
        "the projection puts more weights on the bound, and is better as ternary": lost[1] > 0
        and lost[2] > 10,
    }


def main() -> None:
    data, test = jax.tree.map(jnp.asarray, load_data())
    claims = print_way_in(data) | print_beside_projection(data, test)
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    sys.exit(not all(claims.values()))


if __name__ == "__main__":
    main()
