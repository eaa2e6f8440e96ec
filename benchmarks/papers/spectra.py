"""SPECTRA (Jiang et al., https://arxiv.org/abs/2603.14315): updates with a bounded spectral norm.

    python benchmarks/papers/spectra.py [--seeds 3] [--steps 400]

The paper: clipping the singular values of the *updates* of AdamW, Signum and others, before the
step size, lowers the validation loss of language models, and leaves smaller weights.

Here: a character model of two layers, by Adam and by Signum, each with several step sizes. The
best step size is that of the lowest mean test loss; differences are paired by seed. The script
fails if a claim at its end does not hold. Ten CPU minutes.
"""

import argparse
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_transformer import draw_batch, init_params, labels, loss_of, test_loss

import jaxclip
from jaxclip.gradients import clip_by_spectral_norm

BOUND = 4.0
DIRECTIONS = {
    "Adam": lambda: optax.scale_by_adam(0.9, 0.98),
    "Signum": lambda: jaxclip.scale_by_signum(0.95),
}
STEP_SIZES = {
    ("Adam", None): (3e-3, 6e-3, 1e-2),
    ("Adam", BOUND): (6e-3, 1e-2),
    ("Signum", None): (5e-4, 1e-3, 2e-3),
    ("Signum", BOUND): (2e-3, 4e-3, 1e-2),
}


def optimizer(name: str, bound: float | None, step_size: float, num_steps: int) -> Any:
    falling = optax.linear_schedule(step_size, 0.0, num_steps)
    # Of the updates, not of the gradients: behind the direction, before the step size.
    clip = optax.identity() if bound is None else clip_by_spectral_norm(bound, steps=6)
    matrices = optax.chain(DIRECTIONS[name](), clip, optax.scale_by_learning_rate(falling))
    others = optax.adam(optax.linear_schedule(3e-3, 0.0, num_steps))
    return optax.partition({"matrices": matrices, "others": others}, labels("matrices", "others"))


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def train(
    name: str, bound: float | None, step_size: jax.Array, num_steps: int, seed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Test loss, and the norm of all matrices of the layers."""
    tx = optimizer(name, bound, step_size, num_steps)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init_params(init_key)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda p: loss_of(p, draw_batch(key))[0])(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(data_key, num_steps)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    squares = [jnp.sum(w**2) for w in jax.tree.leaves(params["layers"])]
    return test_loss(params), jnp.sqrt(jnp.sum(jnp.stack(squares)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {args.seeds} seeds, {args.steps} steps, bound {BOUND:g}")
    print(f"{'updates':10}{'clipped':>8}{'step size':>11}{'test loss':>18}{'norm of weights':>17}")
    losses: dict[tuple, np.ndarray] = {}
    norms: dict[tuple, float] = {}
    for (name, bound), step_sizes in STEP_SIZES.items():
        for step_size in step_sizes:
            runs = [
                train(name, bound, jnp.float32(step_size), args.steps, jnp.uint32(seed))
                for seed in range(args.seeds)
            ]
            loss, norm = np.asarray(runs, np.float64).T
            losses[name, bound, step_size], norms[name, bound, step_size] = loss, norm.mean()
            error = loss.std(ddof=1) / args.seeds**0.5
            clipped = "no" if bound is None else "yes"
            print(
                f"{name:10}{clipped:>8}{step_size:11g}{loss.mean():11.3f} +- {error:.3f}"
                f"{norm.mean():17.1f}",
                flush=True,
            )
    print()
    is_true = True
    for name in DIRECTIONS:
        plain, clipped = (
            min((losses[name, bound, size] for size in STEP_SIZES[name, bound]), key=np.mean)
            for bound in (None, BOUND)
        )
        gap = clipped - plain
        error = gap.std(ddof=1) / args.seeds**0.5
        size = max(set(STEP_SIZES[name, None]) & set(STEP_SIZES[name, BOUND]))
        growth = norms[name, BOUND, size] - norms[name, None, size]
        holds = bool(gap.mean() < -2 * error and growth < 0)
        is_true &= holds
        print(
            f"{'holds' if holds else 'FAILS'}: {name}: the clip changes the loss at the best step "
            f"sizes by {gap.mean():+.3f} +- {error:.3f}, and the norm at {size:g} by {growth:+.1f}"
        )
    sys.exit(not is_true)


if __name__ == "__main__":
    main()
