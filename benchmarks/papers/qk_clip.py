"""QK-Clip (Kimi K2, https://arxiv.org/abs/2507.20534, figure 2): do attention logits stay bounded?

    python benchmarks/papers/qk_clip.py

The paper: a model trained by Muon without the clip has attention logits above 1,000; with it and
tau = 100, they rise to 100 and stay there. A soft cap leaves the products of queries and keys to
grow.

Here: a character model of two layers, trained by optax's Muon for 600 steps with a step size so
large that its logits grow as fast. The script fails if one of the claims at its end does not hold.
Two minutes on 2 idle cores.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_transformer import NUM_HEADS, draw_batch, init_params, labels, loss_of, test_loss

from jaxclip.weights import key_heads, qk_clip, query_heads, soft_cap

NUM_STEPS, STEP_SIZE, TAU = 600, 0.1, 100.0


def clip_layers(params: Any, max_logits: list[jax.Array]) -> Any:
    """QK-Clip of the queries and keys of every layer."""
    heads = {"query": query_heads(1, NUM_HEADS), "key": key_heads(1, NUM_HEADS)}
    layers = [
        layer | qk_clip({name: layer[name] for name in heads}, logits, TAU, heads=heads)
        for layer, logits in zip(params["layers"], max_logits, strict=True)
    ]
    return params | {"layers": layers}


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(is_clipped: bool, is_capped: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Training losses, the largest attention logit of each step, and the test loss."""
    settings = {"cap": functools.partial(soft_cap, cap=TAU)} if is_capped else {}
    kinds = {"muon": optax.contrib.muon(STEP_SIZE), "adam": optax.adam(3e-3)}
    tx = optax.partition(kinds, labels("muon", "adam"))
    params = init_params(jax.random.key(0))

    def step(carry: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, state = carry
        of_batch = functools.partial(loss_of, tokens=draw_batch(key), **settings)
        (loss, max_logits), grads = jax.value_and_grad(of_batch, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if is_clipped:
            params = clip_layers(params, max_logits)
        return (params, state), (loss, jnp.max(jnp.stack(max_logits)))

    keys = jax.random.split(jax.random.key(1), NUM_STEPS)
    (params, _), (losses, largest) = jax.lax.scan(step, (params, tx.init(params)), keys)
    return losses, largest, test_loss(params, **settings)


def main() -> None:
    shown = [*range(0, NUM_STEPS, 60), NUM_STEPS - 1]
    print("largest attention logit of a step" + " " * 62 + "train  test loss")
    print(f"{'':14}" + "".join(f"{i:7}" for i in shown))
    rows = {"Muon": (False, False), "soft_cap(100)": (False, True), "qk_clip, 100": (True, False)}
    logits, test = {}, {}
    for name, kind in rows.items():
        losses, largest, test[name] = map(np.asarray, train(*kind))
        logits[name] = largest
        curve = "".join(f"{largest[i]:7.0f}" for i in shown)
        print(f"{name:14}{curve}{losses[-60:].mean():8.2f}{test[name]:7.2f}", flush=True)
    last = {name: np.median(curve[-60:]) for name, curve in logits.items()}
    claims = {
        "Muon alone has logits above 1,000 (paper: the same)": logits["Muon"].max() > 1000,
        "under soft_cap the products still grow beyond 3 tau": last["soft_cap(100)"] > 3 * TAU,
        "with qk_clip they end at tau, within a tenth": abs(last["qk_clip, 100"] / TAU - 1) < 0.1,
        "and never reach 2 tau in between": logits["qk_clip, 100"].max() < 2 * TAU,
        "the loss is no worse for it (paper: the same)": test["qk_clip, 100"] < test["Muon"] + 0.02,
    }
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    sys.exit(not all(claims.values()))


if __name__ == "__main__":
    main()
