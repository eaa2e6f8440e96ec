"""The ways of training that are compared, each a few lines of optax.

Every one takes a step size, the same cosine schedule to zero and the same number of steps.
A box is `fan_in(1.0)`: sqrt(2 / fan_in) for each matrix, biases and norm scales free.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ideas import AbsMean, make_ideas
from optax import contrib

import jaxclip

# One grid for all, a factor of 2 apart; the best is chosen on held-out data, by one seed.
STEP_SIZES = [2.5e-4 * 2**k for k in range(7)]


class Method(NamedTuple):
    """What is done while training, and to which widths the result may be rounded."""

    optimizer: Callable[[Any], optax.GradientTransformation]
    box: float | None = None
    width: Any = None  # of quantization-aware training
    density: float | None = None  # of pruning while training
    step_sizes: list[float] = STEP_SIZES
    threshold: Callable[[Any], Any] = jaxclip.fan_in  # what the box is a multiple of
    ends_at: Any = None  # the width of the grid on which training ends
    learns_scales: bool = False  # after training


def low_bit(params, width):
    """The low-bit tree of quantization-aware training: absmean up to ternary, as in BitNet."""
    if width in ("ternary", 1):
        return jaxclip.compress(params, jaxclip.Grid(width, axis=None), rule=AbsMean())
    return jaxclip.compress(params, width, rule=jaxclip.max_abs)


def through_grid(loss_fn, width):
    """The loss of the rounded weights, with the derivative passed straight through."""

    def loss(params, batch):
        rounded = jaxclip.decompress(low_bit(jax.lax.stop_gradient(params), width))
        straight = jax.tree.map(lambda w, q: w + jax.lax.stop_gradient(q - w), params, rounded)
        return loss_fn(straight, batch)

    return loss


def smallest(w, density):
    """The magnitude that a share of `density` of the entries is above; found by halving."""
    size = jnp.abs(w)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        is_too_many = jnp.mean(size > middle) > density
        return jnp.where(is_too_many, middle, low), jnp.where(is_too_many, high, middle)

    return jax.lax.fori_loop(0, 20, halve, (jnp.zeros(()), jnp.max(size)))[1]


def prune_gradually(density, num_steps):
    """Last link of a chain: keeps the largest weights, fewer and fewer (Zhu and Gupta 2017).

    The density falls as the cube of the time left, over the first three quarters of training.
    """

    def update(updates, count, params):
        left = 1 - jnp.minimum(count.astype(jnp.float32) / (0.75 * num_steps), 1)
        now = density + (1 - density) * left**3

        def prune(u, w):
            return jnp.where(jnp.abs(w + u) > smallest(w + u, now), u, -w) if w.ndim > 1 else u

        return jax.tree.map(prune, updates, params), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def prune(params, density):
    """One-shot magnitude pruning of the matrices, leaf by leaf."""
    return jax.tree.map(
        lambda w: jnp.where(jnp.abs(w) > smallest(w, density), w, 0) if w.ndim > 1 else w, params
    )


def make_methods(num_steps, weight_decay):
    """The methods by name."""

    def falling(step_size):
        return optax.cosine_decay_schedule(step_size, num_steps)

    def adamw(a):
        return optax.adamw(falling(a), weight_decay=weight_decay)

    def pruned_adamw(a):
        return optax.chain(adamw(a), prune_gradually(1 / 16, num_steps))

    def adam(a):
        return optax.adam(falling(a))

    def lion(a):
        return jaxclip.lion(falling(a), weight_decay=0.0)

    def lion_with_decay(a):
        return jaxclip.lion(falling(a), weight_decay=weight_decay)

    def clipped_lion(a):
        return optax.chain(jaxclip.clip_by_global_norm(1.0), lion(a))

    def signum(a):
        return jaxclip.signum(falling(a))

    def sign_sgd(a):
        return jaxclip.sign_sgd(falling(a))

    methods = {
        "AdamW": Method(adamw),
        "AdamW, trained at 4 bits": Method(adamw, width=4),
        "AdamW, trained at ternary": Method(adamw, width="ternary"),
        "AdamW, trained at 1 bit": Method(adamw, width=1),
        "AdamW, pruned to 1/16": Method(pruned_adamw, density=1 / 16),
        "Adam in a box": Method(adam, box=1.0),
        "Lion": Method(lion_with_decay),
        "signSGD in a box": Method(sign_sgd, box=1.0),
        "Signum in a box": Method(signum, box=1.0),
        "Lion in a box": Method(lion, box=1.0),
        "Lion in a box, gradients clipped": Method(clipped_lion, box=1.0),
    }
    if hasattr(contrib, "muon"):
        methods["Muon in a box"] = Method(
            lambda a: contrib.muon(falling(a)),
            box=1.0,
            step_sizes=[16 * a for a in STEP_SIZES],
        )
    return methods | make_ideas(num_steps, weight_decay, Method, STEP_SIZES)
