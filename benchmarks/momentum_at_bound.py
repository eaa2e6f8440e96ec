"""Does it help to zero a momentum that pushes a weight on its bound further out?

    python benchmarks/momentum_at_bound.py

The 64-128-128-10 network of the examples learns scikit-learn's digits with Lion inside the box
`fan_in(1.0)`, five seeds at once, with and without `zero_momentum_at_bound`. Printed are the test
accuracy in percent, of the weights and of the weights at low bits (one scale a channel, no
retraining), and the share of the boxed weights that end on the bound, each as mean +- standard
deviation over the seeds.

Deterministic; under a minute on 2 idle cores.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxclip
from jaxclip.weights.clipping import weight_clip_rate

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
from digits import accuracy, draw, loss_fn, model, train

NUM_STEPS, NUM_SEEDS, BATCH_SIZE, STEP_SIZE = 1000, 5, 64, 4e-3


def train_all(zero_momentum_at_bound):
    """The parameters after the last step, one tree a seed."""
    rule = jaxclip.fan_in(1.0)
    optimizer = jaxclip.weights.constrain(
        jaxclip.lion(optax.cosine_decay_schedule(STEP_SIZE, NUM_STEPS), weight_decay=0.0),
        jaxclip.box(rule),
        zero_momentum_at_bound=zero_momentum_at_bound,
    )
    order = jnp.asarray(draw(NUM_STEPS * NUM_SEEDS, BATCH_SIZE))
    images, labels = map(jnp.asarray, train)

    def run(key, picks):
        params = model.init(key, images[:1])

        def step(carry, pick):
            params, state = carry
            grads = jax.grad(loss_fn)(params, (images[pick], labels[pick]))
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), picks)
        return jaxclip.clip_weights(params, rule)  # those an ulp inside, onto the bound

    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    picks = order.reshape(NUM_SEEDS, NUM_STEPS, BATCH_SIZE)
    trained = jax.jit(jax.vmap(run))(keys, picks)
    return [jax.tree.map(lambda w, i=i: w[i], trained) for i in range(NUM_SEEDS)]


def at_low_bits(params, bits):
    return jaxclip.decompress(jaxclip.compress(params, bits=bits))


def spread(values):
    return f"{100 * np.mean(values):5.1f} +- {100 * np.std(values):3.1f}"


def on_bound(params):
    return float(weight_clip_rate(params, jaxclip.fan_in(1.0)))


print(f"{'zero_momentum_at_bound':24}{'float32':15}{'2 bits':15}{'ternary':15}on the bound")
for is_zeroed in (False, True):
    seeds = train_all(is_zeroed)
    cells = [
        [accuracy(params) for params in seeds],
        [accuracy(at_low_bits(params, 2)) for params in seeds],
        [accuracy(at_low_bits(params, "ternary")) for params in seeds],
        [on_bound(params) for params in seeds],
    ]
    print(f"{is_zeroed!s:24}" + "  ".join(f"{spread(cell):13}" for cell in cells))
