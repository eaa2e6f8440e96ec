"""Size and compile time of the transforms' programs, beside optax's in the same run.

    python benchmarks/gradients/transforms.py

Equations are counted in the jaxpr for one more leaf of the same shape: those of inner loops are
included, those of a function that is called for every leaf, and traced once for its shape, once.
Compile time is for 1,000 leaves, tracing included, medians of alternating runs.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import optax

import jaxclip

PAIRS = {
    "clip_by_global_norm": (jaxclip.clip_by_global_norm, optax.clip_by_global_norm, (1.0,)),
    "clip_by_value / clip": (jaxclip.clip_by_value, optax.clip, (1.0,)),
    "clip_by_block_rms": (jaxclip.clip_by_block_rms, optax.clip_by_block_rms, (1.0,)),
    "adaptive_grad_clip": (jaxclip.adaptive_grad_clip, optax.adaptive_grad_clip, (0.01,)),
    "scale_by_sign": (jaxclip.scale_by_sign, optax.scale_by_sign, ()),
    "lion": (jaxclip.lion, optax.lion, (1e-3,)),
}
NUM_LEAVES, ROUNDS = 1000, 3


def count_equations(jaxpr, seen):
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and id(inner) not in seen:
                seen.add(id(inner))
                total += count_equations(inner, seen)
    return total


def equations_per_leaf(tx, dtype):
    def equations(num_leaves):
        params = [jnp.ones((4, 3), dtype)] * num_leaves
        state = tx.init(params)
        jaxpr = jax.make_jaxpr(lambda g: tx.update(g, state, params))(params).jaxpr
        return count_equations(jaxpr, set())

    return (equations(30) - equations(10)) / 20


def compile_seconds(tx):
    params = [jnp.ones((4, 3))] * NUM_LEAVES
    state = tx.init(params)
    start = time.perf_counter()
    jax.jit(lambda g, s, p: tx.update(g, s, p)).lower(params, state, params).compile()
    return time.perf_counter() - start


def main():
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.default_backend()}")
    print(f"{'transform':<22} {'equations a leaf (f32, bf16)':^32} {'compile, 1,000 leaves':^30}")
    print(f"{'':<22} {'jaxclip':>16} {'optax':>14} {'jaxclip':>10} {'optax':>8} {'ratio':>8}")
    for name, (ours, theirs, arguments) in PAIRS.items():
        pair = ours(*arguments), theirs(*arguments)
        counts = [[equations_per_leaf(tx, d) for d in (jnp.float32, jnp.bfloat16)] for tx in pair]
        seconds = [[compile_seconds(tx) for tx in pair] for _ in range(ROUNDS)]
        mine, peer = (statistics.median(column) for column in zip(*seconds, strict=True))
        cells = [f"{a:.0f}, {b:.0f}" for a, b in counts]
        print(
            f"{name:<22} {cells[0]:>16} {cells[1]:>14} "
            f"{mine:>8.2f} s {peer:>6.2f} s {mine / peer:>8.2f}"
        )


if __name__ == "__main__":
    main()
