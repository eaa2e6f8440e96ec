"""Variations on training in a box, each to find out whether it helps.

python evidence/run.py language --methods "Adam in a box, ternary from 1/2 on"
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax

import jaxclip
from jaxclip.thresholds.rules import ThresholdRule


class AbsMean(ThresholdRule):
    """t = mean |w|: the best scale of {-t, t}; BitNet's for {-t, 0, t}."""

    def measure(self, blocks, axes, counts):
        total = jnp.sum(jnp.abs(blocks), axis=axes, keepdims=True)
        return total / jnp.asarray(counts, blocks.dtype)


def on_grid(params, width):
    """The weights rounded, with a scale for each output channel."""
    return jaxclip.decompress(
        jaxclip.compress(params, width, rule=jaxclip.thresholds.least_squares)
    )


def pull_to_grid(width, start, num_steps, most=0.1):
    """Last link of a chain: draws weights to their levels, ever more, from `start` on."""

    def update(updates, step, params):
        share = most * jnp.clip((step - start) / (num_steps - start), 0, 1)
        weights = optax.apply_updates(params, updates)
        updates = jax.tree.map(
            lambda u, w, q: u + share * (q - w), updates, weights, on_grid(weights, width)
        )
        return updates, step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


class ByLayer(ThresholdRule):
    """`fan_in(kappa)`, times a factor where a leaf's path has a part that matches."""

    def __init__(self, kappa, pattern, factor):
        super().__init__()
        object.__setattr__(self, "of_leaf", (kappa, pattern, factor))

    def for_leaf(self, path, leaf, step):
        kappa, pattern, factor = self.of_leaf
        found = jaxclip.fan_in(kappa).for_leaf(path, leaf, step)
        return factor * found if re.search(pattern, path) else found


FIRST = "^(dense_0|layer_0/kernel|bytes|places)"
LAST = "^(dense_2|layer_3|out)"


def make_ideas(num_steps, weight_decay, method, step_sizes):
    """The variations by name; `method` makes an entry."""

    def falling(a):
        return optax.cosine_decay_schedule(a, num_steps)

    def adam(a, **more):
        return optax.adam(falling(a), **more)

    def adamw(a):
        return optax.adamw(falling(a), weight_decay=weight_decay)

    def lion(a, **more):
        return jaxclip.lion(falling(a), weight_decay=0.0, **more)

    def boxed(inner, kappa=1.0):
        return optax.chain(inner, jaxclip.project_weights(jaxclip.box(jaxclip.fan_in(kappa))))

    def narrowing(kappa):
        return jaxclip.fan_in(lambda i: kappa * (4 - 3 * jnp.minimum(i / (0.75 * num_steps), 1)))

    ideas = {}
    starts = {"throughout": 0, "from 1/2 on": num_steps // 2, "from 3/4 on": 3 * num_steps // 4}
    for name, inner in {
        "Adam in a box": lambda a: boxed(adam(a)),
        "Lion in a box": lambda a: boxed(lion(a)),
        "Lion in a box twice as wide": lambda a: boxed(lion(a), 2.0),
        "AdamW": adamw,
    }.items():
        for width, title in (("ternary", "ternary"), (1, "1 bit")):
            for when, start in starts.items():
                optimizer = functools.partial(_ending, inner, width, start)
                ideas[f"{name}, {title} {when}"] = method(
                    optimizer, ends_at=width, learns_scales=True
                )
    for name, inner in {"Adam in a box": adam, "Lion in a box": lion}.items():
        boxed_at = functools.partial(method, inner)
        ideas[f"{name}, half as wide"] = boxed_at(box=0.5)
        ideas[f"{name}, twice as wide"] = boxed_at(box=2.0)
        ideas[f"{name} that narrows"] = boxed_at(box=1.0, threshold=narrowing)
        for where, pattern in (
            ("first", FIRST),
            ("last", LAST),
            ("first and last", f"{FIRST}|{LAST}"),
        ):
            free = functools.partial(ByLayer, pattern=pattern, factor=float("inf"))
            ideas[f"{name}, {where} layer free"] = boxed_at(box=1.0, threshold=free)
        wide = functools.partial(ByLayer, pattern=f"{FIRST}|{LAST}", factor=2.0)
        ideas[f"{name}, ends twice as wide"] = boxed_at(box=1.0, threshold=wide)
        pulled = functools.partial(_pulled, inner, num_steps)
        ideas[f"{name}, pulled to three levels"] = method(pulled, box=1.0)
        ideas[f"{name}, scales learned"] = boxed_at(box=1.0, learns_scales=True)
    ideas["AdamW, scales learned"] = method(adamw, learns_scales=True)
    ideas["Adam in a box, b2 .95"] = method(lambda a: adam(a, b2=0.95), box=1.0)
    ideas["Lion in a box, b1 .95, b2 .98"] = method(lambda a: lion(a, b1=0.95, b2=0.98), box=1.0)
    ideas["Lion in a box, b2 .9"] = method(lambda a: lion(a, b2=0.9), box=1.0)
    ideas["Lion in a box, step relative to it"] = method(
        lambda a: lion(a, relative_to=jaxclip.fan_in(1.0)),
        box=1.0,
        step_sizes=[8 * a for a in step_sizes],
    )
    return ideas


def _ending(inner, width, start, a):
    return jaxclip.keep_on_grid(inner(a), width, start_step=start)


def _pulled(inner, num_steps, a):
    return optax.chain(inner(a), pull_to_grid("ternary", 2 * num_steps // 3, num_steps))
