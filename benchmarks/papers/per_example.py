"""DP-SGD (Abadi et al., https://arxiv.org/abs/1607.00133, figure 3): what does privacy cost?

    pip install jax-privacy && python benchmarks/papers/per_example.py

The paper: a network for MNIST's 60,000 digits has a test accuracy of 98.3 % without privacy, and of
97, 95 and 90 % with epsilon = 8, 2 and 0.5 (delta = 1e-5).

Here: a network for scikit-learn's 1,437 digits, delta = 1e-4. `per_example` clips, with a mask for
the examples that are drawn; noise and accounting are jax_privacy's. With 40 times fewer examples
the same epsilon takes more noise. The script fails if a claim at its end does not hold. One minute
on 2 idle cores.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy import accounting, noise_addition
from sklearn.datasets import load_digits

from jaxclip.gradients import per_example

PAPER = {np.inf: 98.3, 8.0: 97.0, 2.0: 95.0, 0.5: 90.0}
NUM_STEPS, LOT_SIZE, MAX_NORM, STEP_SIZE, DELTA, NUM_SEEDS = 200, 240, 1.0, 2.0, 1e-4, 5


def load_data() -> tuple[tuple, tuple]:
    digits = load_digits()
    order = np.random.default_rng(1).permutation(len(digits.target))
    x = (digits.data[order] / 16 - 0.3).astype(np.float32)
    y = digits.target[order].astype(np.int32)
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def init_params(key: jax.Array) -> Any:
    keys = jax.random.split(key)
    return {
        "first": jax.random.normal(keys[0], (64, 32)) / 8,
        "bias": jnp.zeros(32),
        "last": jax.random.normal(keys[1], (32, 10)) / np.sqrt(32),
    }


def logits_of(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["first"] + params["bias"]) @ params["last"]


def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    logits = logits_of(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def noise_for(epsilon: float, num_examples: int) -> float:
    """The noise, as a multiple of `MAX_NORM`, with which the whole run has this epsilon."""
    if np.isinf(epsilon):
        return 0.0
    return accounting.calibrate_noise_multiplier(
        target_epsilon=epsilon,
        accountant=accounting.analysis.DpsgdTrainingAccountant(accounting.PldAccountantConfig()),
        batch_sizes=LOT_SIZE,
        num_updates=NUM_STEPS,
        num_samples=num_examples,
        target_delta=DELTA,
    )


def make_run(data: tuple, test: tuple) -> Any:
    clipped_grad = per_example(loss_fn, MAX_NORM, microbatch_size=500, divide_by=LOT_SIZE)
    num_examples = len(data[1])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def run(noise: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Test accuracy, and the fraction of gradients that were clipped at the last step."""
        init_key, noise_key, draw_key = jax.random.split(key, 3)
        private = noise_addition.gaussian_privatizer(
            stddev=noise * MAX_NORM / LOT_SIZE, prng_key=noise_key
        )
        tx = optax.chain(private, optax.sgd(STEP_SIZE))
        params = init_params(init_key)

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            is_drawn = jax.random.bernoulli(key, LOT_SIZE / num_examples, (num_examples,))
            result = clipped_grad(params, data, is_drawn)
            updates, state = tx.update(result.grads, state)
            clip_rate = result.num_clipped / jnp.sum(is_drawn)
            return (optax.apply_updates(params, updates), state), clip_rate

        keys = jax.random.split(draw_key, NUM_STEPS)
        (params, _), clip_rates = jax.lax.scan(step, (params, tx.init(params)), keys)
        hits = jnp.argmax(logits_of(params, test[0]), axis=-1) == test[1]
        return 100 * jnp.mean(hits), clip_rates[-1]

    return run


def main() -> None:
    data, test = jax.tree.map(jnp.asarray, load_data())
    run, ours = make_run(data, test), {}
    print("epsilon    noise   clipped at the end   accuracy here   in the paper")
    for epsilon, paper in PAPER.items():
        noise = noise_for(epsilon, len(data[1]))
        hits, clip_rates = run(jnp.float32(noise), jax.random.split(jax.random.key(0), NUM_SEEDS))
        ours[epsilon] = float(hits.mean())
        spread = float(hits.std(ddof=1))
        rate = 100 * float(clip_rates.mean())
        accuracy = f"{ours[epsilon]:.1f} +- {spread:.1f}"
        print(f"{epsilon:7} {noise:8.2f} {rate:18.0f} % {accuracy:>15} {paper:14.1f}", flush=True)
    lost = {epsilon: ours[np.inf] - accuracy for epsilon, accuracy in ours.items()}
    claims = {
        "more privacy, less accuracy: 8 > 2 > 0.5": ours[8] > ours[2] > ours[0.5],
        "epsilon 8 costs less than 2 points (paper: 1.3)": lost[8] < 2,
        "epsilon 2 costs 2 to 6 points (paper: 3.3)": 2 < lost[2] < 6,
        "epsilon 0.5 costs more than twice that (paper: 8.3)": lost[0.5] > 2 * lost[2],
    }
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    sys.exit(not all(claims.values()))


if __name__ == "__main__":
    main()
