"""What `step.py` times: trees of parameters, and ways to take a step on them."""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxclip

BOX, STEP_SIZE, DECAY = 0.1, 1e-4, 0.1


class Case(NamedTuple):
    """`start(params, grads)` gives a state, `step(state, grads)` the next one."""

    start: Callable[[Any, Any], Any]
    step: Callable[[Any, Any], Any]
    lower: Callable[[Any, Any], Any] | None


# --- Trees ----------------------------------------------------------------------------


def gpt2_shapes(num_layers, width=768, vocabulary=50257, context=1024):
    shapes = {"wte": (vocabulary, width), "wpe": (context, width), "ln": (width,), "lnb": (width,)}
    for i in range(num_layers):
        for name, outputs, inputs in [("qkv", 3, 1), ("out", 1, 1), ("up", 4, 1), ("down", 1, 4)]:
            shapes[f"{i}/{name}"] = (inputs * width, outputs * width)
            shapes[f"{i}/{name}_bias"] = (outputs * width,)
        for name in ("ln_1", "ln_1_bias", "ln_2", "ln_2_bias"):
            shapes[f"{i}/{name}"] = (width,)
    return shapes


@functools.partial(jax.jit, static_argnums=(0, 1))
def _waves(shape, dtype):
    """Numbers up to 0.02; unlike random ones they take no memory beside the result."""
    positions = jnp.arange(math.prod(shape), dtype=jnp.int32)
    return (0.02 * jnp.sin(positions.astype(jnp.float32))).astype(dtype).reshape(shape)


def make_tree(shapes, dtype):
    params = {name: _waves(shape, dtype) for name, shape in shapes.items()}
    return params, jax.tree.map(lambda w: (0.3 * w).astype(dtype), params)


# --- Ways to take a step --------------------------------------------------------------


@jax.custom_vjp
def given_gradients(params, grads):
    return jnp.zeros((), jnp.float32)


given_gradients.defvjp(
    lambda params, grads: (jnp.zeros((), jnp.float32), grads), lambda grads, _: (grads, None)
)


def ours(optimizer, *, box=BOX, reads_telemetry=False, stochastic_rounding=False):
    key = jax.random.key(0) if stochastic_rounding else None
    train_step = jaxclip.make_train_step(
        given_gradients,
        optimizer,
        weight_threshold=box,
        stochastic_rounding=stochastic_rounding,
    )

    def step(state, grads):
        state, info = train_step(state, grads)
        if reads_telemetry:
            info.read()
        return state

    def start(params, grads):
        return jaxclip.TrainState.create(params, optimizer, key=key)

    return Case(start, step, train_step.lower)


def theirs(optimizer, *, with_our_option=False):
    """optax as users chain it, and a box."""
    has_option = with_our_option and jax.default_backend() == "cpu"
    options = {"xla_cpu_copy_insertion_use_region_analysis": True} if has_option else None

    def step(state, grads):
        params, opt_state = state
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return jax.tree.map(lambda w: jnp.clip(w, -BOX, BOX), params), opt_state

    jitted = jax.jit(step, donate_argnums=0, compiler_options=options)
    return Case(
        lambda params, grads: (jax.tree.map(jnp.copy, params), optimizer.init(params)),
        jitted,
        jitted.lower,
    )


def in_torch():
    """PyTorch's clip, and Lion and a box over all leaves at once; gradients are its own."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def start(params, grads):
        def moved(x):
            return torch.from_numpy(np.array(x, np.float32)).to(device)

        leaves = [torch.nn.Parameter(moved(x)) for x in jax.tree.leaves(params)]
        for leaf, gradient in zip(leaves, jax.tree.leaves(grads), strict=True):
            leaf.grad = moved(gradient)
        return leaves, [torch.zeros_like(x) for x in leaves]

    @torch.no_grad()
    def step(state, _):
        leaves, momenta = state
        torch.nn.utils.clip_grad_norm_(leaves, 1.0, foreach=True)
        grads = [x.grad for x in leaves]
        directions = torch._foreach_mul(momenta, 0.9)
        torch._foreach_add_(directions, grads, alpha=0.1)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(momenta, 0.99)
        torch._foreach_add_(momenta, grads, alpha=0.01)
        torch._foreach_mul_(leaves, 1 - STEP_SIZE * DECAY)
        torch._foreach_add_(leaves, directions, alpha=-STEP_SIZE)
        torch._foreach_clamp_min_(leaves, -BOX)
        torch._foreach_clamp_max_(leaves, BOX)
        if device == "cuda":
            torch.cuda.synchronize()
        return state

    return Case(start, step, None)


# --- Groups: cases that take turns on one tree ----------------------------------------


class Group(NamedTuple):
    """Cases by name, each made when it is asked for."""

    shapes: dict[str, tuple[int, ...]]
    dtype: Any
    cases: dict[str, Callable[[], Case]]


def groups(num_layers, num_millions):
    """All of them by name, without asking for a device."""
    our_clip, their_clip = jaxclip.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
    our_plain, their_plain = (
        lion(STEP_SIZE, weight_decay=DECAY) for lion in (jaxclip.lion, optax.lion)
    )
    our_lion, their_lion = optax.chain(our_clip, our_plain), optax.chain(their_clip, their_plain)
    wide = {"mu_dtype": jnp.float32, "weight_decay": DECAY}
    our_wide = optax.chain(our_clip, jaxclip.lion(STEP_SIZE, **wide))
    their_wide = optax.chain(their_clip, optax.lion(STEP_SIZE, **wide))
    adamw = optax.adamw(STEP_SIZE)
    our_agc, their_agc = jaxclip.adaptive_grad_clip(0.01), optax.adaptive_grad_clip(0.01)
    has_torch = importlib.util.find_spec("torch") is not None
    gpt2, small = gpt2_shapes(num_layers), {str(i): (64, 64) for i in range(1000)}
    large = {"w": (num_millions * 1000, 1000)}
    return {
        "lion": Group(
            gpt2,
            jnp.float32,
            {
                "clip, Lion: jaxclip": lambda: ours(our_lion),
                "clip, Lion: jaxclip, read": lambda: ours(our_lion, reads_telemetry=True),
                "clip, Lion: optax": lambda: theirs(their_lion),
                "clip, Lion: optax, same option": lambda: theirs(their_lion, with_our_option=True),
            }
            | ({"clip, Lion: torch, foreach": in_torch} if has_torch else {}),
        ),
        "adamw": Group(
            gpt2,
            jnp.float32,
            {
                "clip, AdamW: jaxclip": lambda: ours(optax.chain(our_clip, adamw)),
                "clip, AdamW: optax": lambda: theirs(optax.chain(their_clip, adamw)),
            },
        ),
        "agc": Group(
            gpt2,
            jnp.float32,
            {
                "AGC, Lion: jaxclip": lambda: ours(optax.chain(our_agc, our_plain)),
                "AGC, Lion: optax": lambda: theirs(optax.chain(their_agc, their_plain)),
            },
        ),
        "guards": Group(
            gpt2,
            jnp.float32,
            {
                "autoclip, Lion: jaxclip": lambda: ours(
                    optax.chain(jaxclip.gradients.autoclip(), our_plain)
                ),
                "skip(autoclip, Lion): jaxclip": lambda: ours(
                    jaxclip.skip_nonfinite(optax.chain(jaxclip.gradients.autoclip(), our_plain))
                ),
                "skip_or_clip(Lion): jaxclip": lambda: ours(
                    jaxclip.gradients.skip_or_clip(our_plain, max_norm=1.0, num_deviations=6.0)
                ),
            },
        ),
        "bfloat16": Group(
            gpt2,
            jnp.bfloat16,
            {
                "bfloat16: jaxclip": lambda: ours(our_wide),
                "bfloat16: jaxclip, stochastic": lambda: ours(our_wide, stochastic_rounding=True),
                "bfloat16: optax": lambda: theirs(their_wide),
            },
        ),
        "small": Group(
            small,
            jnp.float32,
            {
                "1,000 leaves: jaxclip": lambda: ours(our_lion),
                "1,000 leaves: optax": lambda: theirs(their_lion),
            },
        ),
        "stacked": Group(
            {"w": (1000, 64, 64)},
            jnp.float32,
            {
                "1,000 layers, stacked: jaxclip": lambda: ours(our_lion),
                "1,000 layers, stacked: optax": lambda: theirs(their_lion),
            },
        ),
        # One a process: two states of this size may not fit.
        "large, jaxclip": Group(large, jnp.float32, {"one leaf: jaxclip": lambda: ours(our_lion)}),
        "large, optax": Group(large, jnp.float32, {"one leaf: optax": lambda: theirs(their_lion)}),
    }
